// How fast to play a video that may be made slower than it plays: just so slow that it need not stop.

const SLOWEST = 0.75; // a slower motion would be noticed
const RESERVE_S = 0.5; // that shall still be there when the next chunk comes
const LOOK_BACK = 5; // chunks
const HOLD_S = 5;

export class Pace {
  #cadences = []; // seconds from chunk to chunk, of the last ones
  #chunkS = 0;
  #heardAt = 0;
  #holding = false;
  complete = false; // no more will come

  /** A chunk has come, at `now` seconds by any clock. */
  heard(chunk, now) {
    // Nothing is known of the first chunk's successor, which takes no longer than the chunk itself.
    this.#cadences = [...this.#cadences, chunk.cadence_s ?? chunk.made_s].slice(-LOOK_BACK);
    this.#chunkS = chunk.duration_s;
    this.#heardAt = now;
  }

  /**
   * The rate at which what is there lasts until the next chunk is due and RESERVE_S longer; at most `wished`, at least
   * SLOWEST. Where even that is too fast it plays on to the end of what is there, and then holds (0) until several
   * seconds are there again, rather than stop at each chunk.
   *
   * `aheadS`: seconds of video that are there and were not played; `leftS`: that are not there yet.
   */
  rate(aheadS, leftS, wished, now) {
    if (this.complete || !this.#cadences.length) return wished;
    const cadenceS = this.#cadences.toSorted((a, b) => a - b)[this.#cadences.length >> 1];
    const missingS = (cadenceS * SLOWEST - this.#chunkS) * (leftS / this.#chunkS);
    if (missingS > 0 && aheadS < 0.1) this.#holding = true;
    if (aheadS >= Math.min(missingS, HOLD_S)) this.#holding = false;
    if (this.#holding) return 0;
    const dueS = Math.max(0, this.#heardAt + cadenceS - now);
    return Math.min(wished, Math.max(SLOWEST, aheadS / (dueS + RESERVE_S)));
  }
}
