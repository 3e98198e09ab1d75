// The band of chunks under a video: which are there, which are buffered, where it plays, and which prompt was in force.

const HUES = [215, 25, 150, 285, 50, 340]; // of one prompt after the other
const TOP = 6; // pixels, above the chunks: what is buffered
const GAP = 1; // pixels, between two chunks if there is room

export class Timeline {
  #canvas;
  #list;
  #shown = "";
  #seek;
  #lengthS = 1; // of the video, as it was drawn last

  /** `element` holds a canvas and a list; `seek(seconds)` is told where somebody points. */
  constructor(element, seek) {
    this.#canvas = element.querySelector("canvas");
    this.#list = element.querySelector("ol");
    this.#seek = seek;
    this.#canvas.addEventListener("click", ({ offsetX }) => seek((offsetX / this.#canvas.clientWidth) * this.#lengthS));
  }

  /**
   * `chunks`: {pts_s, duration_s} of those that are there; `lengthS`: of the whole video, Infinity without an end;
   * `prompts`: {chunk, at_seconds, prompt}, the first one at 0; `video`: the element that plays it.
   */
  draw({ chunks, lengthS, prompts, video }) {
    const madeS = endOf(chunks);
    this.#lengthS = Number.isFinite(lengthS) ? lengthS : Math.max(30, madeS * 1.1);
    this.#tell(prompts, video.currentTime);
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    this.#canvas.width = width * devicePixelRatio; // which also wipes it
    this.#canvas.height = height * devicePixelRatio;
    const draw = this.#canvas.getContext("2d");
    draw.scale(devicePixelRatio, devicePixelRatio);
    const x = (seconds) => (seconds / this.#lengthS) * width;
    const ink = getComputedStyle(this.#canvas).color;

    draw.globalAlpha = 0.15;
    draw.fillStyle = ink;
    draw.fillRect(0, TOP, width, height - TOP);
    draw.globalAlpha = 1;
    let prompt = 0;
    for (const [index, { pts_s, duration_s }] of chunks.entries()) {
      while (prompts[prompt + 1]?.chunk <= index) prompt++;
      draw.fillStyle = `hsl(${HUES[prompt % HUES.length]} 65% 55%)`;
      const size = x(duration_s);
      draw.fillRect(x(pts_s), TOP, size > 4 * GAP ? size - GAP : size, height - TOP);
    }
    draw.fillStyle = ink;
    for (const { at_seconds } of prompts.slice(1)) draw.fillRect(x(at_seconds) - 1, 0, 2, height);
    draw.globalAlpha = 0.6;
    for (let i = 0; i < video.buffered.length; i++) {
      const start = x(video.buffered.start(i));
      draw.fillRect(start, 1, x(video.buffered.end(i)) - start, TOP - 3);
    }
    draw.globalAlpha = 1;
    draw.beginPath();
    draw.roundRect(x(video.currentTime) - 2, 0, 5, height, 2);
    draw.fill();
    draw.strokeStyle = getComputedStyle(this.#canvas).backgroundColor;
    draw.stroke();
  }

  #tell(prompts, seconds) {
    const current = prompts.findLastIndex(({ at_seconds }) => at_seconds <= seconds);
    const shown = JSON.stringify([prompts, current]);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const focused = [...this.#list.children].findIndex((item) => item.contains(document.activeElement));
    this.#list.replaceChildren(
      ...prompts.map(({ at_seconds, chunk, prompt }, index) => {
        const item = document.createElement("li");
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = clock(at_seconds);
        button.title = `chunk ${chunk}`;
        button.addEventListener("click", () => this.#seek(at_seconds));
        if (index === current) item.setAttribute("aria-current", "true");
        item.append(button, ` ${prompt}`);
        item.style.setProperty("--hue", HUES[index % HUES.length]);
        return item;
      }),
    );
    this.#list.children[focused]?.querySelector("button").focus();
  }
}

/** Seconds of video in these chunks. */
export function endOf(chunks) {
  const last = chunks.at(-1);
  return last ? last.pts_s + last.duration_s : 0;
}

/** Seconds as people write them: 1:02.7. */
export function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  return `${Math.floor(tenths / 600)}:${String(((tenths % 600) / 10).toFixed(1)).padStart(4, "0")}`;
}
