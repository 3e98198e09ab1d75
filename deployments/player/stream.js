// Plays a video while it is made: its bytes go from fetch into a Media Source.
//
// The file is an init segment and one fragment for each chunk, whose place in the file the service tells. So a
// connection that is lost is taken up at the next byte, a seek begins at the fragment that is wanted, and of a long video
// only what lies around the place that is watched need be there.

const AHEAD_S = 60; // more is not read
const BEHIND_S = 30; // what was played longer ago is dropped
const AGAIN_MS = 500;

class Interrupted extends Error {}

export class Stream {
  #video;
  #of;
  #startS;
  #source = new MediaSource();
  #buffer = null;
  #head = new Uint8Array(); // what has come before the init segment was whole
  #next = 0; // byte to read
  #moved = false; // #next does not follow on what was read last
  #reading = new AbortController(); // of one request; ended by a seek
  #closed = new AbortController();
  #busy = Promise.resolve();

  /**
   * `of`: the video, asked whenever it matters: `url()` of the file; `bytes()` and `durationS()` of it, Infinity if
   * nobody knows; `chunkAt(seconds)` {pts_s, duration_s, offset}, the nearest there is; `failed(error)`, what to do if
   * it cannot be played.
   */
  constructor(video, of, startS) {
    this.#video = video;
    this.#of = of;
    this.#startS = startS;
    const { signal } = this.#closed;
    video.addEventListener("seeking", () => this.#sought(), { signal });
    video.src = URL.createObjectURL(this.#source);
    video.currentTime = startS; // once it has metadata; then that is a seek as any other
    this.#run().catch((error) => signal.aborted || of.failed(error));
  }

  close() {
    this.#closed.abort();
    this.#reading.abort();
    URL.revokeObjectURL(this.#video.src);
  }

  /** Reads nothing before `done` is: what is asked of the service meanwhile may cut a response off. */
  holdUntil(done) {
    this.#busy = done.catch(() => {});
    this.#reading.abort();
  }

  async #run() {
    await once(this.#source, "sourceopen", this.#closed.signal);
    while (!this.#closed.signal.aborted) {
      await this.#busy;
      this.#reading = new AbortController();
      const { signal } = this.#reading;
      try {
        if (await this.#read(signal)) {
          if (this.#source.readyState === "open") this.#source.endOfStream();
          if (!signal.aborted) await once(signal, "abort");
        }
      } catch (error) {
        if (signal.aborted) continue;
        if (!(error instanceof Interrupted)) throw error;
        await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      }
    }
  }

  /** Reads on from #next. Whether that was to the end of the file: no, if enough is there. */
  async #read(signal) {
    if (this.#next >= this.#of.bytes()) return true;
    const headers = { Range: `bytes=${this.#next}-` };
    const response = await fetch(this.#of.url(), { headers, signal }).catch(interrupted);
    if (response.status === 416) return true; // that was the end, and nobody had said so yet
    if (!response.ok) throw new Interrupted(`status ${response.status}`);
    if (this.#moved) {
      if (this.#source.readyState === "open") this.#buffer.abort(); // forgets the fragment that it is in
      this.#moved = false;
    }
    let skip = response.status === 206 ? 0 : this.#next; // a Range may be ignored
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read().catch(interrupted);
      if (done) return true;
      const bytes = value.subarray(skip);
      skip -= value.length - bytes.length;
      await this.#append(bytes);
      signal.throwIfAborted();
      if (!this.#moved) this.#next += bytes.length;
      if (this.#moved || this.#ahead > AHEAD_S) {
        await reader.cancel();
        while (this.#ahead > AHEAD_S / 2) await once(this.#video, "timeupdate", signal);
        return false;
      }
    }
  }

  async #append(bytes) {
    if (!this.#buffer) {
      const head = (this.#head = joined(this.#head, bytes));
      const type = typeOf(head);
      if (!type) return;
      this.#buffer = this.#source.addSourceBuffer(type);
      this.#source.duration = this.#of.durationS();
      bytes = head;
      if (this.#startS > 0) {
        bytes = head.subarray(0, initLength(head)); // nothing is shown of where it does not start
        this.#moveTo(this.#of.chunkAt(this.#startS));
      }
    }
    for (let full = true; full; ) {
      try {
        await this.#change(() => this.#buffer.appendBuffer(bytes));
        full = false;
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        await once(this.#video, "timeupdate", this.#reading.signal);
      }
      await this.#drop();
    }
  }

  /** Drops what lies far behind the place that is watched, and what a seek back has left far before it. */
  async #drop() {
    const { buffered, currentTime } = this.#video;
    if (!buffered.length) return;
    const behind = currentTime - BEHIND_S;
    if (buffered.start(0) < behind) await this.#change(() => this.#buffer.remove(0, behind));
    const before = currentTime + 2 * AHEAD_S;
    if (buffered.end(buffered.length - 1) > before) await this.#change(() => this.#buffer.remove(before, Infinity));
  }

  async #change(begin) {
    const over = once(this.#buffer, "updateend", this.#closed.signal);
    over.catch(() => {}); // if `begin` throws, nobody waits
    begin();
    await over;
  }

  #sought() {
    const { currentTime } = this.#video;
    if (!this.#buffer || rangeAt(this.#video, currentTime)) return;
    const chunk = this.#of.chunkAt(currentTime);
    if (!chunk) return;
    if (currentTime >= chunk.pts_s + chunk.duration_s) {
      this.#video.currentTime = chunk.pts_s; // it is not made yet: to the newest there is
    } else if (this.#moveTo(chunk)) {
      this.#reading.abort();
    }
  }

  /** Whether that is another place than the one that it is about to read. */
  #moveTo({ offset }) {
    if (this.#moved && this.#next === offset) return false;
    this.#next = offset;
    this.#moved = true;
    return true;
  }

  get #ahead() {
    return aheadOf(this.#video);
  }
}

/** Seconds that can be played from here on without a gap. */
export function aheadOf(video) {
  const range = rangeAt(video, video.currentTime);
  return range ? range.end - video.currentTime : 0;
}

function rangeAt({ buffered }, seconds) {
  for (let i = 0; i < buffered.length; i++) {
    if (buffered.start(i) <= seconds && seconds < buffered.end(i)) {
      return { start: buffered.start(i), end: buffered.end(i) };
    }
  }
  return null;
}

/** The MIME type of an fMP4 file by its beginning (ISO/IEC 14496-15: avcC tells profile, constraints, level). */
function typeOf(head) {
  if (!initLength(head)) return null;
  const at = new TextDecoder("latin1").decode(head).indexOf("avcC") + 5;
  const codec = [...head.subarray(at, at + 3)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return `video/mp4; codecs="avc1.${codec}"`;
}

/** Bytes of the init segment, ftyp and moov; 0 if they are not all there. */
function initLength(head) {
  const view = new DataView(head.buffer, head.byteOffset, head.length);
  for (let at = 0; at + 8 <= head.length; ) {
    const size = view.getUint32(at);
    const isLast = String.fromCharCode(...head.subarray(at + 4, at + 8)) === "moov";
    at += size;
    if (isLast) return at <= head.length ? at : 0;
  }
  return 0;
}

function joined(a, b) {
  const both = new Uint8Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
}

function interrupted(error) {
  throw error.name === "AbortError" ? error : new Interrupted(error.message);
}

/** The next event of that name; fails if `signal` says so before. */
function once(target, name, signal) {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const stop = () => reject(signal.reason);
    const heard = (event) => {
      signal?.removeEventListener("abort", stop); // it outlives many events
      resolve(event);
    };
    target.addEventListener(name, heard, { once: true, signal });
    signal?.addEventListener("abort", stop, { once: true });
  });
}
