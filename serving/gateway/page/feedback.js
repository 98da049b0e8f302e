// A reader's verdict on an answer: right or not, the right words, the right region.

import { Failure } from "./api.js";
import { find, make } from "./dom.js";
import { say } from "./strings.js";

const VERDICTS = ["correct", "partly", "wrong", "unsafe"];
const SIDES = ["left", "top", "right", "bottom"];

/** The pixels of a box of shares, on an image as it was sent. */
const pixelsOf = (box, { width, height }) =>
  box.map((share, index) => Math.round(share * (index % 2 ? height : width)));

/** The shares of four pixel numbers, or null where they make no box inside the image. */
function sharesOf(pixels, { width, height }) {
  const [left, top, right, bottom] = pixels;
  const inside = pixels.every(Number.isFinite) && left >= 0 && top >= 0 && right <= width && bottom <= height;
  return inside && left < right && top < bottom ? [left / width, top / height, right / width, bottom / height] : null;
}

/** The document for POST /v1/feedback (api.FeedbackRequest). */
export function verdictOf({ result, question, feedback }) {
  const document = { request_id: result.id, verdict: feedback.verdict };
  if (feedback.correction.trim()) document.correction = feedback.correction.trim();
  if (feedback.box) {
    const { image, box } = feedback.box;
    const label = result.regions[0]?.label ?? question.finding ?? "region";
    document.regions = [{ label, image, box, pixels: pixelsOf(box, result.images[image]), source: "reader" }];
  }
  return document;
}

function boxFields(entry, actions) {
  const draft = entry.feedback;
  let image = draft.box?.image ?? actions.shown(entry) ?? 0;
  const size = () => entry.result.images[image];
  const legend = make("legend");
  const problem = make("p", { className: "problem", role: "alert" });
  const inputs = SIDES.map((side, index) =>
    make("input", {
      type: "number", min: 0, step: 1, id: `box-${side}`, oninput: () => typed(),
    }));
  const fill = () => {
    const pixels = draft.box ? pixelsOf(draft.box.box, size()) : ["", "", "", ""];
    inputs.forEach((input, index) => (input.value = pixels[index]));
    legend.textContent = say("box-legend", { image: image + 1 });
  };
  const take = (box) => {
    draft.box = box ? { image, box } : null;
    problem.textContent = "";
    actions.refresh();
  };
  function typed() {
    const box = sharesOf(inputs.map((input) => input.valueAsNumber), size());
    const complete = inputs.every((input) => input.value !== "");
    take(box);
    if (complete && !box) problem.textContent = say("box-wrong");
  }
  actions.draw((box) => {
    const drawnOn = actions.shown(entry);
    if (drawnOn === null) {
      actions.refresh();
      problem.textContent = say("draw-elsewhere");
      return;
    }
    image = drawnOn;
    take(box);
    fill();
  });
  fill();
  return make("fieldset", { "aria-describedby": "draw-help" },
    legend,
    make("p", { className: "hint", id: "draw-help" }, say("drawing")),
    make("div", { className: "box-fields" },
      inputs.map((input, index) => make("label", {}, say(`box-${SIDES[index]}`), input))),
    problem,
    make("button", {
      type: "button", className: "link",
      onclick: () => {
        take(null);
        fill();
      },
    }, say("box-clear")));
}

/** The form under an answer; once it was sent, a line that says so. */
export function feedbackForm(entry, actions) {
  const draft = entry.feedback;
  if (draft.state === "kept") {
    const words = `${say(draft.verdict)}. ${say("kept")}`;
    return make("div", { className: "feedback" }, make("p", { id: "kept", tabindex: -1 }, words));
  }
  const problem = make("p", { className: "problem", role: "alert" }, draft.problem);
  const place = make("div", {});
  const toggle = make("button", { type: "button", "data-focus": "draw", "aria-expanded": "false" }, say("draw"));
  const open = () => {
    toggle.setAttribute("aria-expanded", String(draft.drawing));
    place.replaceChildren(...(draft.drawing ? [boxFields(entry, actions)] : []));
    if (!draft.drawing) actions.draw(null);
  };
  toggle.addEventListener("click", () => {
    draft.drawing = !draft.drawing;
    if (draft.drawing) actions.show(entry, draft.box?.image ?? actions.shown(entry) ?? 0);
    open();
  });
  const button = make("button", { disabled: draft.state === "sending", "data-focus": "send" },
    say(draft.state === "sending" ? "sending" : "send"));
  const form = make("form", {
    className: "feedback", autocomplete: "off", novalidate: true,
    onsubmit: (event) => {
      event.preventDefault();
      if (!draft.verdict) problem.textContent = say("need-verdict");
      else if (!draft.box && [...place.querySelectorAll("input")].some((input) => input.value !== "")) {
        problem.textContent = say("box-wrong");
      } else actions.send(entry);
    },
  },
  make("fieldset", { className: "segments" }, make("legend", {}, say("feedback")),
    VERDICTS.map((verdict) => make("label", {},
      make("input", {
        type: "radio", name: `verdict-${entry.id}`, value: verdict, checked: draft.verdict === verdict,
        "data-focus": `verdict-${verdict}`, onchange: () => (draft.verdict = verdict),
      }),
      make("span", {}, say(verdict))))),
  make("p", { className: "field" },
    make("label", { for: "correction" }, say("correction")),
    make("textarea", {
      id: "correction", rows: 2, maxlength: 8000, "data-focus": "correction", lang: entry.question.language,
      value: draft.correction, oninput: ({ target }) => (draft.correction = target.value),
    })),
  make("p", { className: "actions" }, toggle), place, problem, make("p", { className: "actions" }, button));
  open();
  return form;
}

/** Send the entry's verdict; `changed` is called when the form is to be drawn anew. */
export async function send(entry, session, changed) {
  const draft = entry.feedback;
  Object.assign(draft, { state: "sending", problem: null });
  changed();
  try {
    await session.feedback(verdictOf(entry));
    Object.assign(draft, { state: "kept", drawing: false });
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    const id = error.requestId ? say("error-request", { id: error.requestId }) : "";
    Object.assign(draft, { state: "open", problem: [say(error.name), error.message, id].filter(Boolean).join(" ") });
  }
  changed();
  if (draft.state === "kept") find("kept")?.focus();
}
