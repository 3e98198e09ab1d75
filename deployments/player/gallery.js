// Recent videos, each with its first picture, which moves while it is pointed at.

import { call, mediaOf } from "./api.js";

const PAGE = 12;
const ASK_MS = 5000;

const shown = new WeakMap(); // card ▸ its video as it last stood, as links get old

export class Gallery {
  #list;
  #older;
  #cards = new Map(); // id ▸ its element, in the order of the list
  #shown = PAGE;

  constructor(element) {
    this.#list = element.querySelector("ul");
    this.#older = element.querySelector("button");
    this.#older.addEventListener("click", () => {
      this.#shown += PAGE;
      this.refresh();
    });
    setInterval(() => document.hidden || this.refresh(), ASK_MS);
  }

  /** Shows how the videos stand now. While nothing answers, what was known stays. */
  async refresh() {
    const limit = Math.min(this.#shown, 100);
    const page = await call("GET", `videos?limit=${limit}`).catch(() => null);
    if (!page) return;
    const listed = new Set(page.data.map(({ id }) => id));
    for (const [id, card] of this.#cards) {
      if (!listed.has(id)) {
        card.remove();
        this.#cards.delete(id);
      }
    }
    let before = null;
    for (const video of page.data) {
      const card = this.#cards.get(video.id) ?? this.#added(video.id);
      show(card, video);
      const place = before ? before.nextSibling : this.#list.firstChild;
      if (place !== card) this.#list.insertBefore(card, place);
      before = card;
    }
    this.#older.hidden = !page.has_more || limit === 100;
  }

  #added(id) {
    const card = document.getElementById("card").content.cloneNode(true).firstElementChild;
    const link = card.querySelector("a");
    link.href = `#/videos/${id}`;
    for (const name of ["pointerenter", "focus"]) link.addEventListener(name, () => play(card));
    for (const name of ["pointerleave", "blur"]) link.addEventListener(name, () => card.querySelector("video")?.remove());
    this.#cards.set(id, card);
    return card;
  }
}

function show(card, video) {
  const { prompt, status, seconds, progress, usage } = video;
  card.dataset.status = status;
  shown.set(card, video);
  const text = (selector, value) => {
    const element = card.querySelector(selector);
    if (element.textContent !== value) element.textContent = value;
  };
  text(".prompt", prompt);
  const length = seconds === null ? "without an end" : `${seconds} s`;
  text(".about", status === "in_progress" && seconds !== null ? `${length} · ${progress} %` : `${length} · ${told(status)}`);
  const picture = card.querySelector(".picture");
  if (usage.chunks && !picture.querySelector("img")) {
    const image = document.createElement("img");
    Object.assign(image, { src: mediaOf(video, "content", { variant: "thumbnail" }), alt: "", loading: "lazy" });
    picture.append(image);
  }
}

const told = (status) => ({ in_progress: "being made", completed: "whole", cancelled: "stopped" })[status] ?? status;

function play(card) {
  if (card.dataset.status !== "completed" || card.querySelector("video")) return;
  const video = document.createElement("video");
  Object.assign(video, { src: mediaOf(shown.get(card), "content"), muted: true, loop: true, playsInline: true, tabIndex: -1 });
  video.setAttribute("aria-hidden", "true");
  card.querySelector(".picture").append(video);
  video.play().catch(() => {}); // taken away before it began, or a browser that plays nothing by itself: the picture stays
}
