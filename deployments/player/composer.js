// The form that asks for a new video.

import { call } from "./api.js";
import { filledIn, onSubmit } from "./forms.js";

const LEAD_S = 3; // of a video without an end, so that a new prompt is soon to be seen

export class Composer {
  #form;
  #models = [];

  /** `go(videoId)` leads to what was made. */
  constructor(form, go) {
    this.#form = form;
    const { model, open_ended: openEnded, seconds } = form.elements;
    model.addEventListener("change", () => this.#choose());
    openEnded.addEventListener("change", () => (seconds.disabled = openEnded.checked));
    onSubmit(form, async () => go((await call("POST", "videos", this.#body())).id));
    this.#takeDrops();
  }

  async load() {
    const { data } = await call("GET", "models");
    this.#models = data;
    this.#form.elements.model.replaceChildren(...data.map(({ id }) => new Option(id)));
    this.#choose();
  }

  focus() {
    this.#form.elements.prompt.focus();
  }

  /** Offers what the chosen model can do. */
  #choose() {
    const { model, preset, size, prompt } = this.#form.elements;
    const { presets, default_size, vocabulary, limits } = this.#models.find(({ id }) => id === model.value);
    preset.replaceChildren(...Object.entries(presets).map(([name, steps]) => new Option(`${name} ${steps.join(",")}`, name)));
    size.value = default_size;
    this.#form.elements.seconds.max = limits.seconds;
    const words = Object.entries(vocabulary ?? {}).map(([kind, some]) => `${kind}: ${some.join(", ")}`);
    document.getElementById("words").textContent = words.length ? `It knows these words. ${words.join(" · ")}` : "";
    if (!prompt.value && words.length) prompt.value = "a red sun over a blue sea, drifting left";
  }

  #body() {
    const { open_ended: openEnded, input_reference: file } = this.#form.elements;
    const { input_reference: _, open_ended: __, ...fields } = filledIn(this.#form);
    if (openEnded.checked) Object.assign(fields, { seconds: null, lead_seconds: LEAD_S });
    if (!file.files.length) return fields;
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) body.append(name, String(value));
    body.append("input_reference", file.files[0]);
    return body;
  }

  #takeDrops() {
    const drop = this.#form.querySelector(".drop");
    const over = (event) => {
      event.preventDefault();
      drop.classList.toggle("over", event.type === "dragover");
    };
    for (const name of ["dragover", "dragleave"]) this.#form.addEventListener(name, over);
    this.#form.addEventListener("drop", (event) => {
      over(event);
      if (event.dataTransfer.files.length) this.#form.elements.input_reference.files = event.dataTransfer.files;
    });
  }
}
