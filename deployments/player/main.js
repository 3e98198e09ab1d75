// The page: which videos are watched is in its address, #/videos/{id} or, side by side, #/videos/{id}/{id}.

import { heard, useKey } from "./api.js";
import { Composer } from "./composer.js";
import { onSubmit } from "./forms.js";
import { Gallery } from "./gallery.js";
import { Watch } from "./watch.js";

const place = document.getElementById("watch");
const door = document.getElementById("door");
const composer = new Composer(document.getElementById("composer"), go);
const gallery = new Gallery(document.getElementById("gallery"));
let watches = [];

function go(...videoIds) {
  location.hash = videoIds.length ? `#/videos/${videoIds.join("/")}` : "#/";
}

function show() {
  for (const watch of watches) watch.close();
  const [, ...ids] = location.hash.match(/^#\/videos\/(\w+)(?:\/(\w+))?$/) ?? [];
  const shown = ids.filter(Boolean).map((id) => new Watch(id, go));
  watches = shown;
  place.replaceChildren(...shown.map(({ element }) => element));
  place.classList.toggle("two", shown.length === 2);
  document.title = shown.length ? "Video – Helios" : "Helios";
  gallery.refresh();
  if (shown.length === 2) playTogether(...shown.map(({ video }) => video));
  for (const watch of shown) watch.open().catch((error) => lost(watch, error));
}

function lost(watch, error) {
  const told = document.createElement("p");
  told.className = "error";
  told.setAttribute("role", "alert");
  told.textContent = error.message;
  watch.close();
  watch.element.replaceChildren(told);
  watch.element.hidden = false;
}

/** What is done to one of two videos is done to the other. */
function playTogether(one, other) {
  for (const [from, to] of [
    [one, other],
    [other, one],
  ]) {
    from.addEventListener("play", () => to.play().catch(() => {})); // it says itself why it does not
    from.addEventListener("pause", () => from.ended || to.pause());
    from.addEventListener("seeked", () => {
      if (Math.abs(from.currentTime - to.currentTime) > 0.5) to.currentTime = from.currentTime;
    });
  }
}

const KEYS = {
  n: () => composer.focus(),
  k: (watch) => watch?.toggle(),
  l: (watch) => watch?.press("newest"),
  c: (watch) => watch?.focusPrompt(),
  p: (watch) => watch?.press("pause"),
  s: (watch) => watch?.press("stop"),
  ArrowLeft: (watch) => watch?.step(-1),
  ArrowRight: (watch) => watch?.step(1),
};

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || !(key in KEYS)) return;
  if (target.matches("input, textarea, select, video")) return; // they have keys of their own
  event.preventDefault();
  KEYS[key](watches[0]);
});

heard.addEventListener("keyless", () => {
  if (!door.hidden) return;
  door.hidden = false;
  door.elements.key.focus();
});
onSubmit(door, async () => {
  useKey(door.elements.key.value.trim());
  location.reload();
});

addEventListener("hashchange", show);
show();
await composer.load().catch((error) => {
  if (!["unauthorized", "forbidden"].includes(error.code)) throw error; // a key is asked for
});
