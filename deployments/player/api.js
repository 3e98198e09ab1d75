// The service's HTTP API: JSON in, JSON out, and its errors with the field that they are about.

const BASE = new URL("v1/", document.baseURI);
const AGAIN_MS = 1000;

/** An answer that is no success. `param`: the field at fault, if there is one; `status`: 0 if the service did not answer. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

/** The API key that goes with each request, as long as this tab is open. */
const keyOf = () => sessionStorage.getItem("key");

/** Throws ApiError for what can be no key. */
export function useKey(key) {
  if (!/^[!-~]+$/.test(key)) throw new ApiError(0, { message: "a key has ASCII letters, digits and signs", param: "key" });
  sessionStorage.setItem("key", key);
}

/** `keyless`: an answer was refused for want of a key that is good. */
export const heard = new EventTarget();

/** What a browser fetches by itself, without the key: by the link that came with the video, which lets it in. */
export function mediaOf({ id, share_url: shared }, path, query = {}) {
  const url = new URL(`videos/${id}/${path}`, BASE);
  url.search = new URLSearchParams([...new URL(shared).searchParams, ...Object.entries(query)]);
  return url.href;
}

/** The answer to a request. `body`: what becomes JSON, or a FormData. Throws ApiError. */
export async function call(method, path, body) {
  const request = { method, body, headers: keyOf() ? { Authorization: `Bearer ${keyOf()}` } : {} };
  if (body !== undefined && !(body instanceof FormData)) {
    request.body = JSON.stringify(body);
    request.headers["Content-Type"] = "application/json";
  }
  const response = await fetch(new URL(path, BASE), request).catch(() => {
    throw new ApiError(0, { message: "the service does not answer" });
  });
  const answer = await response.json().catch(() => ({}));
  if (answer.error?.code === "unauthorized" || answer.error?.code === "forbidden") heard.dispatchEvent(new Event("keyless"));
  if (!response.ok) {
    // Without an error of the service's it was what stands before it that answered.
    const status = answer.error ? response.status : 0;
    throw new ApiError(status, answer.error ?? { message: `the service answered with ${response.status}` });
  }
  return answer;
}

/**
 * Tells what happens to a video, from its first chunk on, until it has ended or `signal` says so, and nothing twice. The
 * browser comes back by itself after a lost connection, and gives up where another answer comes, as of what stands before
 * a service that is being replaced: then we come back.
 * `handlers`: event's name ▸ what to do with its data.
 */
export function follow(video, handlers, signal) {
  const told = new Set(); // ids of events
  const open = () => {
    if (signal.aborted) return;
    const source = new EventSource(mediaOf(video, "events"));
    signal.addEventListener("abort", () => source.close());
    for (const [name, handle] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => {
        if (event.data === undefined) { // the browser's own `error`, of a connection
          if (source.readyState === EventSource.CLOSED) setTimeout(open, AGAIN_MS);
        } else if (!told.has(event.lastEventId)) {
          told.add(event.lastEventId);
          if (name === "done" || name === "error") source.close();
          handle(JSON.parse(event.data));
        }
      });
    }
  };
  open();
}
