// The image, its regions drawn over it, zoom and pan, and drawing a region by hand.
//
// The stage scrolls natively, so that arrow keys, scroll bars and touch move the image without code of ours.

import { draw, find, percent } from "./dom.js";
import { say } from "./strings.js";

const STEP = 1.25;
const LARGEST = 16;
const CLICK_PIXELS = 4;
const SMALLEST_SHARE = 0.002;

const between = (value, low, high) => Math.min(Math.max(value, low), high);

/** A box from two corners, as shares. */
const boxOf = ([x1, y1], [x2, y2]) => [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];

export class Viewer {
  constructor() {
    for (const name of ["stage", "canvas", "picture", "overlay", "nothing", "regions", "zoom"]) this[name] = find(name);
    Object.assign(this, { view: null, boxes: [], scale: 1, fitted: true, shown: true, onDrawn: null, corner: null });
    find("zoom-in").addEventListener("click", () => this.zoomBy(STEP));
    find("zoom-out").addEventListener("click", () => this.zoomBy(1 / STEP));
    find("fit").addEventListener("click", () => this.fit());
    find("actual").addEventListener("click", () => this.zoomTo(1));
    this.regions.addEventListener("click", () => this.toggle());
    this.picture.addEventListener("load", () => this.loaded());
    this.stage.addEventListener("keydown", (event) => this.keyed(event));
    this.stage.addEventListener("wheel", (event) => this.wheeled(event), { passive: false });
    this.stage.addEventListener("pointerdown", (event) => this.pressed(event));
    new ResizeObserver(() => this.fitted && this.fit()).observe(this.stage);
    this.enable();
  }

  /** Show a view ({url}) or nothing. The zoom stays where the image does. */
  show(view, description) {
    this.picture.alt = description;
    if (view?.url === this.view?.url) return;
    this.view = view;
    this.canvas.hidden = !view;
    this.nothing.hidden = Boolean(view);
    this.stage.classList.toggle("empty", !view);
    if (view) this.picture.src = view.url;
    else this.picture.removeAttribute("src");
    this.enable();
  }

  /** Draw boxes: {label, box, drawn, doubtful}; box is [x1, y1, x2, y2] as shares of the image. */
  mark(boxes) {
    this.boxes = boxes;
    this.overlay.replaceChildren(...(this.shown ? boxes.map((region) => this.region(region)) : []));
    this.regions.setAttribute("aria-pressed", String(this.shown));
  }

  region({ label, box: [x1, y1, x2, y2], drawn, doubtful }) {
    const place = {
      x: `${x1 * 100}%`, y: `${y1 * 100}%`, width: `${(x2 - x1) * 100}%`, height: `${(y2 - y1) * 100}%`,
    };
    const words = doubtful ? say("doubtful", { label }) : label;
    // the label stands above the box, or in it where the image ends
    const above = y1 > 0.06;
    const text = draw("text", { x: `${x1 * 100}%`, y: place.y, dy: above ? -7 : 18 }, words);
    const inset = above ? 0 : 6;
    text.setAttribute("dx", inset);
    if (x1 > 0.6) {
      text.setAttribute("x", `${x2 * 100}%`);
      text.setAttribute("text-anchor", "end");
      text.setAttribute("dx", -inset);
    }
    return draw(
      "g", { class: drawn ? "drawn" : doubtful ? "found doubtful" : "found" },
      draw("rect", { class: "halo", ...place }), draw("rect", { class: "box", ...place }), text,
    );
  }

  toggle() {
    this.shown = !this.shown;
    this.mark(this.boxes);
  }

  /** Let the reader draw one box on the image; `done` is given its shares, null ends it. */
  drawing(done) {
    this.onDrawn = done;
    this.corner = null;
    this.stage.classList.toggle("drawing", Boolean(done));
  }

  loaded() {
    const size = `${this.picture.naturalWidth}x${this.picture.naturalHeight}`;
    // frames of one file keep the zoom
    if (this.fitted || size !== this.size) this.fit();
    else this.resize(this.scale);
    this.size = size;
  }

  get fitting() {
    const { clientWidth, clientHeight } = this.stage;
    const { naturalWidth, naturalHeight } = this.picture;
    return naturalWidth ? Math.min(clientWidth / naturalWidth, clientHeight / naturalHeight) : 1;
  }

  fit() {
    this.resize(this.fitting);
    this.fitted = true;
  }

  resize(scale) {
    this.scale = scale;
    // rounded down: a fraction of a pixel too much would bring scroll bars
    this.canvas.style.width = `${Math.floor(this.picture.naturalWidth * scale)}px`;
    this.canvas.style.height = `${Math.floor(this.picture.naturalHeight * scale)}px`;
    this.zoom.textContent = this.view ? percent(scale) : "–";
  }

  zoomBy(factor, point) {
    this.zoomTo(this.scale * factor, point);
  }

  /** Zoom so that the image's place under `point` (of the window; default: the stage's middle) stays there. */
  zoomTo(scale, point) {
    if (!this.view) return;
    const stage = this.stage.getBoundingClientRect();
    const [x, y] = point ?? [stage.x + stage.width / 2, stage.y + stage.height / 2];
    const before = this.canvas.getBoundingClientRect();
    const [shareX, shareY] = [(x - before.x) / before.width, (y - before.y) / before.height];
    const fitting = this.fitting;
    this.resize(between(scale, Math.min(fitting, 1) / 2, Math.max(LARGEST, fitting)));
    this.fitted = false;
    const after = this.canvas.getBoundingClientRect();
    this.stage.scrollLeft += after.x + shareX * after.width - x;
    this.stage.scrollTop += after.y + shareY * after.height - y;
  }

  keyed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.view) return;
    const action = {
      "+": () => this.zoomBy(STEP),
      "=": () => this.zoomBy(STEP),
      "-": () => this.zoomBy(1 / STEP),
      "0": () => this.fit(),
      "1": () => this.zoomTo(1),
      "r": () => this.toggle(),
      "R": () => this.toggle(),
    }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  wheeled(event) {
    if (!this.view) return;
    event.preventDefault();
    const pixels = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY : event.deltaY * 33;
    this.zoomBy(2 ** (-between(pixels, -240, 240) / 300), [event.clientX, event.clientY]);
  }

  /** The place of a pointer on the image, as shares inside it. */
  place(event) {
    const { x, y, width, height } = this.canvas.getBoundingClientRect();
    return [between((event.clientX - x) / width, 0, 1), between((event.clientY - y) / height, 0, 1)];
  }

  pressed(event) {
    if (!this.view || event.button !== 0) return;
    if (this.onDrawn) this.drawFrom(event);
    else if (event.pointerType !== "touch") this.panFrom(event);
  }

  panFrom(event) {
    const { stage } = this;
    const bounds = stage.getBoundingClientRect();
    // a press on a scroll bar is the browser's
    if (event.clientX - bounds.x >= stage.clientWidth || event.clientY - bounds.y >= stage.clientHeight) return;
    const [left, top] = [stage.scrollLeft, stage.scrollTop];
    stage.classList.add("dragged");
    this.follow(
      event,
      (moved) => {
        stage.scrollLeft = left + event.clientX - moved.clientX;
        stage.scrollTop = top + event.clientY - moved.clientY;
      },
      () => stage.classList.remove("dragged"),
    );
  }

  drawFrom(event) {
    event.preventDefault();
    const start = this.place(event);
    const done = this.onDrawn;
    const others = this.boxes.filter((region) => !region.drawn);
    const sketch = (box) => this.mark([...others, { label: say("corrected"), box, drawn: true }]);
    const finish = (from, to) => {
      const box = boxOf(from, to);
      if (box[2] - box[0] >= SMALLEST_SHARE && box[3] - box[1] >= SMALLEST_SHARE) done(box);
      else this.mark(others);
    };
    this.follow(
      event,
      (moved) => sketch(boxOf(start, this.place(moved))),
      (released) => {
        const far = Math.hypot(released.clientX - event.clientX, released.clientY - event.clientY) > CLICK_PIXELS;
        if (far) finish(start, this.place(released));
        else if (this.corner) finish(this.corner, start);
        // a click is the first of two corners: nobody has to drag
        this.corner = far || this.corner ? null : start;
      },
    );
  }

  follow(event, move, end) {
    const { stage } = this;
    const over = new AbortController();
    const stop = (last) => {
      over.abort();
      end(last);
    };
    const mine = (handle) => (other) => other.pointerId === event.pointerId && handle(other);
    stage.setPointerCapture(event.pointerId);
    stage.addEventListener("pointermove", mine(move), { signal: over.signal });
    stage.addEventListener("pointerup", mine(stop), { signal: over.signal });
    stage.addEventListener("pointercancel", mine(stop), { signal: over.signal });
  }

  enable() {
    for (const name of ["zoom-in", "zoom-out", "fit", "actual", "regions"]) find(name).disabled = !this.view;
    if (!this.view) this.zoom.textContent = "–";
  }
}
