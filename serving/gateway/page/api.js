// The gateway's API: the key, errors, the stream of an answer. Addresses are relative to the page's own.

const STORED = "medforge-key";

/** A request that failed. `name` picks the words of strings.js; `message` is what the server said. */
export class Failure extends Error {
  constructor({ status = 0, name, message = "", code = "", param = null, requestId = null, retryAfter = null }) {
    super(message);
    Object.assign(this, { status, name, code, param, requestId, retryAfter });
  }
}

const KNOWN = [400, 403, 404, 413, 429, 500, 502, 503, 504];

/** The words for a status: its own, or those of its class. */
const nameOf = (status) => `error-${KNOWN.includes(status) ? status : status >= 500 ? 500 : 400}`;

function failureOf(status, document, requestId, retryAfter) {
  const error = document?.error ?? {};
  return new Failure({
    status,
    name: nameOf(status),
    message: typeof error.message === "string" ? error.message : "",
    code: error.code ?? "",
    param: error.param ?? null,
    requestId: error.request_id ?? requestId,
    retryAfter,
  });
}

/** Seconds of a Retry-After header, or null. */
function secondsOf(header) {
  const seconds = Number.parseFloat(header ?? "");
  return Number.isFinite(seconds) ? Math.min(Math.max(seconds, 1), 600) : null;
}

/** The session: a key that is kept in this tab only. `askForKey` shows the form and resolves with a new key. */
export class Session {
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.renewal = null;
  }

  get key() {
    return sessionStorage.getItem(STORED);
  }

  /** Keep a key. */
  keep(key) {
    sessionStorage.setItem(STORED, key);
  }

  /** Forget the key. */
  forget() {
    sessionStorage.removeItem(STORED);
  }

  /** Ask for a new key; requests that fail together ask once. */
  renew() {
    this.renewal ??= this.askForKey().finally(() => (this.renewal = null));
    return this.renewal;
  }

  /** The Response of one attempt. Throws Failure, or AbortError where `signal` aborts. */
  async attempt(path, { key = this.key, headers = {}, ...options } = {}) {
    let response;
    try {
      response = await fetch(path, {
        ...options,
        headers: { ...headers, ...(key ? { authorization: `Bearer ${key}` } : {}) },
        cache: "no-store",
        credentials: "omit",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure({ name: "error-network" });
    }
    if (response.ok) return response;
    const document = await response.json().catch(() => null);
    const { status, headers: answered } = response;
    throw failureOf(status, document, answered.get("x-request-id"), secondsOf(answered.get("retry-after")));
  }

  /** The Response. A key that is no longer accepted is asked for again, and the request is sent again. */
  async call(path, options = {}) {
    for (;;) {
      const key = this.key;
      try {
        return await this.attempt(path, options);
      } catch (error) {
        if (error.status !== 401) throw error;
        if (key === this.key) await this.renew();
        options.signal?.throwIfAborted();
      }
    }
  }

  /** What is served now (api.CurrentRelease). */
  async release(key = this.key) {
    return readJson(await this.attempt("v1/releases/current", { key }));
  }

  /** An image as the model sees it: {url, width, height, frame, frames}; width and height are those of the file. */
  async preview(file, frame, signal) {
    const query = frame === null ? "" : `?frame=${frame}`;
    const headers = { "content-type": "application/octet-stream" };
    const response = await this.call(`v1/preview${query}`, { method: "POST", body: file, headers, signal });
    const number = (name) => Number.parseInt(response.headers.get(`x-image-${name}`) ?? "", 10);
    const url = URL.createObjectURL(await response.blob());
    return { url, width: number("width"), height: number("height"), frame: number("frame"), frames: number("frames") };
  }

  /** Ask. `hear(event, data)` is told each event before the result; returns the result (api.DiagnoseResponse). */
  async diagnose(question, hear, signal) {
    const response = await this.call("v1/diagnose", {
      method: "POST",
      body: JSON.stringify(question),
      headers: { "content-type": "application/json", accept: "text/event-stream" },
      signal,
    });
    if (!(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) return readJson(response);
    const requestId = response.headers.get("x-request-id");
    try {
      for await (const { event, data } of events(response.body)) {
        if (event === "result") return data;
        if (event === "error") throw failureOf(statusOf(data), data, requestId, secondsOf(data?.error?.retry_after));
        hear(event, data);
      }
    } catch (error) {
      if (error instanceof Failure || error.name === "AbortError") throw error;
      throw new Failure({ name: error instanceof SyntaxError ? "error-garbled" : "error-broken", requestId });
    }
    throw new Failure({ name: "error-broken", requestId });
  }

  /** Send a verdict (api.FeedbackRequest). */
  async feedback(verdict) {
    const headers = { "content-type": "application/json" };
    await this.call("v1/feedback", { method: "POST", body: JSON.stringify(verdict), headers });
  }
}

/** The status of an error that came when the answer's own status had long been sent. */
function statusOf(data) {
  if (Number.isInteger(data?.error?.status)) return data.error.status;
  return data?.error?.type === "invalid_request_error" ? 400 : 502;
}

async function readJson(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure({ name: "error-garbled", requestId: response.headers.get("x-request-id") });
  }
}

/** The server-sent events of a body: {event, data} with data as JSON. An event that the end cuts off is dropped. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r\n\r\n|\n\n|\r\r/);
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = { event: "message", data: [] };
        for (const line of block.split(/\r\n|\n|\r/)) {
          const [, name, text] = /^([^:]*):? ?(.*)$/.exec(line);
          if (name === "event") fields.event = text;
          if (name === "data") fields.data.push(text);
        }
        if (fields.data.length) yield { event: fields.event, data: JSON.parse(fields.data.join("\n")) };
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
