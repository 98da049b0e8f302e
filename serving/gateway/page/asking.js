// One question on its way: images encoded, sent, heard, sent again while the server is busy, or cancelled.

import { Failure } from "./api.js";

const ATTEMPTS = 4;
let made = 0;

/** A question about pictures, and what becomes of it. `state`: waiting, running, retrying, answered, abstained, failed
 * or cancelled. Views and frames are those at this moment: the history shows what was asked about. */
export class Entry {
  constructor(question, pictures) {
    this.id = made += 1;
    this.question = question;
    this.shots = pictures.map((picture) => ({ picture, frame: picture.frame, view: picture.view }));
    Object.assign(this, { state: "waiting", stage: null, provisional: "", result: null, failure: null, seconds: 0 });
    this.feedback = { verdict: null, correction: "", box: null, drawing: false, state: "open", problem: null };
  }

  /** The same question about the same frames, to be asked anew. */
  again() {
    const next = new Entry(this.question, []);
    next.shots = this.shots.map((shot) => ({ ...shot }));
    return next;
  }

  get over() {
    return !["waiting", "running", "retrying"].includes(this.state);
  }

  /** The regions of the image with that number. */
  regionsOf(image) {
    return (this.result?.regions ?? []).filter((region) => region.image === image);
  }

  /** Ask, and tell `changed(entry, what)` of every change: "state", "stage" or "text". Never throws what a server or
   * network can cause: that becomes `failure`. */
  async run(session, signal, changed) {
    const enter = (state) => {
      this.state = state;
      changed(this, "state");
    };
    try {
      signal.throwIfAborted();
      enter("running");
      const body = await unlessAborted(this.body(), signal);
      for (let attempt = 1; ; attempt += 1) {
        try {
          this.result = await session.diagnose(body, (event, data) => this.hear(event, data, changed), signal);
          break;
        } catch (error) {
          const busy = [429, 503].includes(error.status) && error.retryAfter !== null;
          if (!busy || attempt === ATTEMPTS) throw error;
          await this.wait(error, signal, enter);
        }
      }
      enter(this.result.decision === "abstained" ? "abstained" : "answered");
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof Failure)) throw error;
      this.failure = error instanceof Failure ? error : null;
      enter(this.failure ? "failed" : "cancelled");
    }
  }

  async body() {
    const images = [];
    for (const shot of this.shots) {
      await shot.picture.ready;
      shot.view ??= shot.picture.views.get(shot.frame);
      if (!shot.view) throw shot.picture.failure;
      images.push(await shot.picture.encode(shot.frame));
    }
    return { ...this.question, images };
  }

  hear(event, data, changed) {
    if (event === "delta") {
      this.provisional += data.text ?? "";
      changed(this, "text");
    } else if (event === "status") {
      this.stage = data.stage ?? null;
      changed(this, "stage");
    }
  }

  /** Count down until the server may be asked again. */
  async wait(failure, signal, enter) {
    Object.assign(this, { failure, provisional: "", stage: null });
    for (this.seconds = Math.ceil(failure.retryAfter); this.seconds > 0; this.seconds -= 1) {
      enter("retrying");
      await unlessAborted(new Promise((resolve) => setTimeout(resolve, 1000)), signal);
    }
    this.failure = null;
    enter("running");
  }
}

/** What `promise` resolves with; AbortError as soon as `signal` aborts. */
function unlessAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(signal.reason);
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", stop));
  });
}
