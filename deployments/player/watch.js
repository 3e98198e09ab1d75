// One video that is watched: played while it is made, steered, and what can follow from it.

import { ApiError, call, follow, mediaOf } from "./api.js";
import { filledIn, onSubmit } from "./forms.js";
import { Pace } from "./pace.js";
import { Stream, aheadOf } from "./stream.js";
import { Timeline, clock, endOf } from "./timeline.js";

const LOOK_MS = 100; // at the player
const ASK_MS = 1000; // how the video stands
const LOOK_BACK = 5; // chunks, for how fast they are made

const now = () => performance.now() / 1000;

export class Watch {
  #id;
  #go;
  #closed = new AbortController();
  #status;
  #told = null; // of it
  #chunks = []; // as /events tells of them
  #heard = new EventTarget(); // `chunk` for each of them, `end`
  #pace = new Pace();
  #stream = null;
  #timeline;
  #openedAt = now();

  /** `go(...videoIds)` leads to other videos, side by side. */
  constructor(videoId, go) {
    this.#id = videoId;
    this.#go = go;
    this.element = document.getElementById("pane").content.cloneNode(true).firstElementChild;
    this.element.hidden = true; // until it is known
    this.video = this.element.querySelector("video");
    this.#timeline = new Timeline(this.element.querySelector(".timeline"), (seconds) => this.seek(seconds));
    this.#listen();
  }

  /** Shows the video. Throws ApiError if there is none. */
  async open() {
    const { signal } = this.#closed;
    this.#show(await call("GET", `videos/${this.#id}`));
    if (signal.aborted) return;
    follow(
      this.#status,
      {
        chunk: (chunk) => {
          this.#chunks.push(chunk);
          this.#pace.heard(chunk, now());
          this.#heard.dispatchEvent(new Event("chunk"));
        },
        prompt: () => this.#ask(),
        done: () => this.#over(),
        error: () => this.#over(),
      },
      signal,
    );
    this.#every(LOOK_MS, () => this.#look());
    this.#every(ASK_MS, () => this.#ended || this.#ask());
    this.#play(Number(sessionStorage.getItem(this.#place) ?? 0));
  }

  close() {
    this.#closed.abort();
    this.#stream?.close();
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load(); // which lets go of what was loaded
  }

  seek(seconds) {
    this.video.currentTime = Math.max(0, seconds);
  }

  /** By chunks, back if negative. */
  step(chunks) {
    this.seek(this.video.currentTime + chunks * (this.#chunks[0]?.duration_s ?? 0));
  }

  toggle() {
    if (this.video.paused) this.#start();
    else this.video.pause();
  }

  /** Does what one of its buttons does, if that can be done now. */
  press(name) {
    const button = this.element.querySelector(`[data-do=${name}]`);
    if (!button.hidden && !button.disabled) button.click();
  }

  focusPrompt() {
    const { prompt } = this.element.querySelector("[data-form=prompt]").elements;
    if (!prompt.closest("form").hidden) prompt.focus();
  }

  // Playing

  async #play(at) {
    const { video } = this;
    while (at > 0 && endOf(this.#chunks) <= at && !this.#ended) await this.#next();
    if (this.#closed.signal.aborted) return;
    if (this.#ended && !this.#status.usage.chunks) return; // nothing will ever be there
    if (at >= endOf(this.#chunks)) at = 0; // it was seen to its end
    video.requestVideoFrameCallback?.(() => this.#figure("first", `${(now() - this.#openedAt).toFixed(2)} s`));
    if ("MediaSource" in window) {
      const of = {
        url: () => this.#file,
        bytes: () => this.#bytes,
        durationS: () => this.#lengthS,
        chunkAt: (seconds) => this.#chunks.findLast(({ pts_s }) => pts_s <= seconds),
        failed: (error) => this.#say(`This video cannot be played: ${error.message}`),
      };
      this.#stream = new Stream(video, of, at);
    } else {
      video.src = mediaOf(this.#status, "hls/index.m3u8");
      video.currentTime = at;
    }
    this.#start();
  }

  #start() {
    // What came between was a pause or another video; and a browser that plays nothing by itself leaves it to the viewer.
    this.video.play().catch((error) => error.name === "AbortError" || this.#say("Press play."));
  }

  #next() {
    return new Promise((resolve) => {
      const options = { once: true, signal: this.#closed.signal };
      for (const name of ["chunk", "end"]) this.#heard.addEventListener(name, resolve, options);
    });
  }

  /** What is done ten times a second. */
  #look() {
    const { video } = this;
    const madeS = endOf(this.#chunks);
    const aheadS = aheadOf(video);
    // While a video is paused nothing comes that could be waited for: what is there is played.
    const leftS = this.#status.paused ? 0 : this.#lengthS - video.currentTime - aheadS;
    const rate = this.#pace.rate(aheadS, leftS, video.defaultPlaybackRate, now());
    if (this.#stream && Math.abs(rate - video.playbackRate) > 0.005) video.playbackRate = rate;
    if (video.currentTime > 0) sessionStorage.setItem(this.#place, video.currentTime);

    const recent = this.#chunks.slice(-LOOK_BACK).filter(({ cadence_s }) => cadence_s > 0);
    const frames = recent.reduce((sum, chunk) => sum + chunk.frames, 0);
    const fps = frames / recent.reduce((sum, chunk) => sum + chunk.cadence_s, 0);
    const of = Number.isFinite(this.#lengthS) ? ` of ${clock(this.#lengthS)}` : "";
    this.#figure("made", `${clock(madeS)}${of}`);
    this.#figure("fps", recent.length ? fps.toFixed(1) : "–");
    this.#figure("factor", recent.length ? (fps / this.#status.fps).toFixed(2) : "–");
    this.#figure("buffer", `${aheadS.toFixed(1)} s`);
    this.#figure("rate", rate ? `${video.playbackRate.toFixed(2)} ×` : "waits for more");
    const { prompt, prompts } = this.#status;
    const timeline = [{ chunk: 0, at_seconds: 0, prompt }, ...prompts];
    this.#timeline.draw({ chunks: this.#chunks, lengthS: this.#lengthS, prompts: timeline, video });
  }

  // How it stands

  async #ask() {
    const status = await call("GET", `videos/${this.#id}`).catch((error) => {
      if (error.status !== 404) return null; // asked again soon
      this.close();
      this.#say("This video was deleted.");
      return null;
    });
    if (status && !this.#closed.signal.aborted) this.#show(status);
  }

  async #over() {
    this.#pace.complete = true;
    await this.#ask();
    this.#heard.dispatchEvent(new Event("end"));
  }

  #show(status) {
    const was = this.#status;
    this.#status = status;
    const { prompt, model, size, seed, steps, paused, queue_position: queued, error } = status;
    this.video.style.aspectRatio = size.replace("x", "/");
    this.#text("h2", prompt);
    this.#text(".about", `${model} · ${size} · seed ${seed} · steps ${steps.join(",")} · ${status.fps} fps`);
    this.#hide("[data-form=prompt], [data-do=pause], [data-do=stop], [data-do=newest]", this.#ended);
    this.#hide("[data-do=download]", !this.#ended || !status.usage.chunks);
    this.#hide(".after", !this.#ended);
    this.#forms.fork.elements.chunk.max = status.usage.chunks;
    this.#hide("[data-form=extend], [data-form=fork]", status.status !== "completed");
    this.#text("[data-do=pause]", paused ? "Resume making" : "Pause making");
    Object.assign(this.element.querySelector("[data-do=download]"), { href: this.#file, download: `${this.#id}.mp4` });
    if (!was) {
      this.element.hidden = false;
      const { remix, compare } = this.#forms;
      remix.elements.prompt.value = prompt;
      compare.elements.seed.value = seed + 1;
    }
    const told = {
      queued: queued === null ? "Begins." : `Waits for a sampler; ${queued} before it.`,
      in_progress: paused ? "Paused: the next chunk waits." : "Is being made.",
      completed: "Whole.",
      failed: `Failed: ${error?.message}`,
      cancelled: "Stopped.",
    }[status.status];
    if (this.#told !== told) this.#say((this.#told = told), status.note);
  }

  get #ended() {
    return ["completed", "failed", "cancelled"].includes(this.#status.status);
  }

  /** Seconds of the whole video: Infinity without an end, and what there is of one that was stopped. */
  get #lengthS() {
    const { status, seconds, frames, fps } = this.#status;
    if (status === "failed" || status === "cancelled") return endOf(this.#chunks);
    return seconds === null ? Infinity : frames / fps;
  }

  /** Of the whole file; Infinity as long as it may grow. */
  get #bytes() {
    const last = this.#chunks.at(-1);
    return this.#ended && last?.index === this.#status.usage.chunks - 1 ? last.offset + last.bytes : Infinity;
  }

  get #file() {
    const whole = !this.#ended || this.#status.status === "completed";
    return mediaOf(this.#status, "content", whole ? {} : { partial: true });
  }

  get #place() {
    return `place ${this.#id}`;
  }

  // What its viewers do

  get #forms() {
    return Object.fromEntries([...this.element.querySelectorAll("form")].map((form) => [form.dataset.form, form]));
  }

  #listen() {
    const post = (what, body) => call("POST", `videos/${this.#id}/${what}`, body);
    const { prompt, extend, fork, remix, compare } = this.#forms;
    onSubmit(prompt, async () => {
      const { chunk, at_seconds, note } = await post("prompt", filledIn(prompt));
      this.#say(`The new prompt begins with chunk ${chunk}, at ${clock(at_seconds)}.`, note);
      prompt.elements.prompt.value = "";
      await this.#ask();
    });
    onSubmit(extend, async () => {
      const { id } = await post("extend", filledIn(extend));
      this.#goOn(id, endOf(this.#chunks));
    });
    onSubmit(fork, async () => {
      const body = filledIn(fork);
      const { id } = await post("fork", body);
      this.#goOn(id, this.#chunks[body.chunk]?.pts_s ?? endOf(this.#chunks));
    });
    onSubmit(remix, async () => this.#go((await post("remix", filledIn(remix))).id));
    onSubmit(compare, async () => {
      const { id } = await post("fork", { chunk: 0, ...filledIn(compare) });
      this.#go(this.#id, id);
    });
    this.#does("pause", async () => this.#show(await post(this.#status.paused ? "resume" : "pause")));
    this.#does("stop", async () => {
      const stopped = post("cancel").then((status) => this.#show(status));
      this.#stream?.holdUntil(stopped);
      await stopped;
    });
    this.#does("newest", () => this.seek(this.#chunks.at(-1)?.pts_s ?? 0));
    this.#does("link", async () => {
      // There is no clipboard over plain HTTP from another machine, and a browser may refuse it.
      const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
      this.#say(copied ? "The link is copied." : location.href);
    });
    this.#does("delete", async () => {
      if (!confirm("Delete this video for everybody?")) return;
      this.close();
      await call("DELETE", `videos/${this.#id}`);
      this.#go();
    });
  }

  /** On to a video that begins with this one's pictures, from the place where it is another one. */
  #goOn(id, seconds) {
    sessionStorage.setItem(`place ${id}`, seconds);
    this.#go(id);
  }

  #does(name, act) {
    const button = this.element.querySelector(`[data-do=${name}]`);
    button.addEventListener("click", async () => {
      button.disabled = true;
      try {
        await act();
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        this.#say(error.message);
      } finally {
        button.disabled = false;
      }
    });
  }

  // Showing

  /** To everybody, also to those who do not see. */
  #say(...texts) {
    this.#text(".state", texts.filter(Boolean).join(" "));
  }

  #figure(name, text) {
    this.#text(`[data-figure=${name}]`, text);
  }

  #text(selector, text) {
    const element = this.element.querySelector(selector);
    if (element.textContent !== text) element.textContent = text;
  }

  #hide(selector, hidden) {
    for (const element of this.element.querySelectorAll(selector)) element.hidden = hidden;
  }

  #every(ms, act) {
    const timer = setInterval(act, ms);
    this.#closed.signal.addEventListener("abort", () => clearInterval(timer));
  }
}
