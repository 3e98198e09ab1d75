// The service's HTTP API: JSON in, JSON out, and its errors with the field that they are about.

const BASE = new URL("v1/", document.baseURI);

/** An answer that is no success. `param`: the field at fault, if there is one; `status`: 0 if nothing answered. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

export const urlOf = (path) => new URL(path, BASE).href;

/** The answer to a request. `body`: what becomes JSON, or a FormData. Throws ApiError. */
export async function call(method, path, body) {
  const request = { method, body };
  if (body !== undefined && !(body instanceof FormData)) {
    request.body = JSON.stringify(body);
    request.headers = { "Content-Type": "application/json" };
  }
  const response = await fetch(urlOf(path), request).catch(() => {
    throw new ApiError(0, { message: "the service does not answer" });
  });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new ApiError(response.status, answer.error ?? { message: `the service answered with ${response.status}` });
  }
  return answer;
}

/**
 * Tells what happens to a video, from its first chunk on, until it has ended or `signal` says so. The browser comes back
 * by itself after a lost connection, with the last id, so nothing is told twice.
 * `handlers`: event's name ▸ what to do with its data.
 */
export function follow(videoId, handlers, signal) {
  const source = new EventSource(urlOf(`videos/${videoId}/events`));
  signal.addEventListener("abort", () => source.close());
  for (const [name, handle] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => {
      if (event.data === undefined) return; // the browser's own `error`, of a connection
      if (name === "done" || name === "error") source.close();
      handle(JSON.parse(event.data));
    });
  }
}
