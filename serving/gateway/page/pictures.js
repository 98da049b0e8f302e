// The images that were added: the server reads each, and what it made of it is shown.

import { Failure } from "./api.js";
import { announce, find, icon, make } from "./dom.js";
import { say } from "./strings.js";

const SIMULTANEOUS = 2;
const DEBOUNCE_MS = 200;
const BUSY_ATTEMPTS = 5;

let waiting = [];
let working = 0;

/** Run `work` when fewer than SIMULTANEOUS others run. */
async function inTurn(work) {
  if (working >= SIMULTANEOUS) await new Promise((resolve) => waiting.push(resolve));
  working += 1;
  try {
    return await work();
  } finally {
    working -= 1;
    waiting.shift()?.();
  }
}

const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

/** An image: its file, and its views by frame (null: the frame that the server picks). */
class Picture {
  constructor(file, session) {
    Object.assign(this, { file, session, name: file.name || "image", frame: null, failure: null, stale: 0 });
    this.views = new Map();
    this.ready = this.look(null);
  }

  /** The view of the chosen frame; undefined until it was read. */
  get view() {
    return this.views.get(this.frame);
  }

  /** Have a frame read. Resolves when `view` or `failure` is there. */
  async look(frame) {
    try {
      if (!this.views.has(frame)) {
        const view = await inTurn(() => this.patiently(frame));
        this.views.set(frame, view);
        // the frame that the server picked has a number, too
        this.views.set(view.frame, view);
      }
      this.frame = frame;
      this.failure = null;
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      this.failure = error;
    }
  }

  /** One preview. A busy server is asked again when it says. */
  async patiently(frame) {
    for (let attempt = 1; ; attempt += 1) {
      try {
        // a file that was moved or is a folder fails as if the network had: tell the two apart
        await this.file.slice(0, 1).arrayBuffer().catch(() => {
          throw new Failure({ name: "error-file" });
        });
        return await this.session.preview(this.file, frame);
      } catch (error) {
        if (error.retryAfter === null || error.retryAfter === undefined || attempt === BUSY_ATTEMPTS) throw error;
        await sleep(error.retryAfter);
      }
    }
  }

  /** The file as a data: URI with the frame, as api.ImageIn wants it. */
  async encode(frame) {
    const data = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(new Failure({ name: "error-file" }));
      reader.readAsDataURL(this.file);
    });
    return frame === null ? { data } : { data, frame };
  }

  /** Give the views' memory back. */
  free() {
    for (const { url } of this.views.values()) URL.revokeObjectURL(url);
  }
}

/** The row of thumbnails. `onChange` is told when something is to be drawn anew, `onChoose` when the reader turned to
 * an image of the row; `isUsed` says which images the history still needs. */
export class Tray {
  constructor(session, { onChange, onChoose, isUsed }) {
    Object.assign(this, { session, onChange, onChoose, isUsed, pictures: [], chosen: null, timer: 0 });
    find("choose").addEventListener("click", () => find("files").click());
    find("files").addEventListener("change", ({ target }) => {
      this.add([...target.files]);
      target.value = "";
    });
    this.listenForDrops(find("stage"));
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (files.length) this.add(files);
    });
    find("frame").addEventListener("input", ({ target }) => this.slide(Number(target.value) - 1));
  }

  listenForDrops(stage) {
    const over = (event) => {
      if (!event.dataTransfer?.types.includes("Files") || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      stage.classList.add("target");
    };
    const leave = (event) => {
      if (!event.relatedTarget) stage.classList.remove("target");
    };
    document.addEventListener("dragenter", over);
    document.addEventListener("dragover", over);
    document.addEventListener("dragleave", leave);
    document.addEventListener("drop", async (event) => {
      event.preventDefault();
      stage.classList.remove("target");
      if (!document.querySelector("dialog[open]")) this.add(await droppedFiles(event.dataTransfer));
    });
  }

  /** Add files and show the first. */
  add(files) {
    if (!files.length) return;
    const added = files.map((file) => new Picture(file, this.session));
    this.pictures.push(...added);
    this.chosen = added[0];
    this.onChoose();
    announce(say("images-added", { count: files.length }));
    for (const picture of added) picture.ready.then(() => this.render());
    this.render();
  }

  remove(picture) {
    const index = this.pictures.indexOf(picture);
    this.pictures.splice(index, 1);
    this.onChoose();
    if (this.chosen === picture) this.chosen = this.pictures[Math.min(index, this.pictures.length - 1)] ?? null;
    if (!this.isUsed(picture)) picture.ready.then(() => picture.free());
    this.render();
    const next = find("tray").querySelectorAll(".remove")[Math.min(index, this.pictures.length - 1)];
    (next ?? find("choose")).focus();
  }

  choose(picture) {
    this.chosen = picture;
    this.onChoose();
    this.render();
  }

  /** Show another frame of the chosen image, once the slider rests. */
  slide(frame) {
    const picture = this.chosen;
    clearTimeout(this.timer);
    const turn = (picture.stale += 1);
    find("frame-number").textContent = say("frame-of", { frame: frame + 1, frames: picture.view.frames });
    this.timer = setTimeout(
      async () => {
        const before = picture.frame;
        await picture.look(frame);
        if (picture.failure) picture.frame = before;
        // a later move of the slider wins
        if (turn === picture.stale) this.onChange();
      },
      picture.views.has(frame) ? 0 : DEBOUNCE_MS,
    );
  }

  render() {
    const focused = document.activeElement?.dataset?.focus;
    const count = this.pictures.length;
    find("tray").replaceChildren(
      ...this.pictures.map((picture, index) => {
        const names = { number: index + 1, name: picture.name };
        const label = say("show-image", names) + (picture.failure ? `, ${say("image-failed")}` : "");
        const url = picture.failure ? null : picture.view?.url;
        return make(
          "li",
          {},
          make(
            "button",
            {
              type: "button", className: `thumb${picture.failure ? " failed" : ""}`, "aria-label": label, title: label,
              "aria-current": picture === this.chosen ? "true" : null, "data-focus": `show-${index}`,
              onclick: () => this.choose(picture),
            },
            url ? make("img", { src: url, alt: "" }) : null,
            url ? null : picture.failure ? icon("alert") : make("span", { className: "bead" }),
            count > 1 ? make("span", { className: "number" }, String(index + 1)) : null,
          ),
          make(
            "button",
            {
              type: "button", className: "remove", "aria-label": say("remove-image", names),
              title: say("remove-image", names), "data-focus": `remove-${index}`, onclick: () => this.remove(picture),
            },
            icon("close"),
          ),
        );
      }),
    );
    if (focused) find("tray").querySelector(`[data-focus="${focused}"]`)?.focus();
    this.onChange();
  }
}

/** All files of a drop, those in folders too. */
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  return (await Promise.all(entries.map(filesOf))).flat();
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const files = [];
  for (;;) {
    // readEntries gives at most a hundred at a time, and none at the end
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return files;
    files.push(...(await Promise.all(some.map(filesOf))).flat());
  }
}
