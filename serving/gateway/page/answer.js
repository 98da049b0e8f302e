// An answer, or why there is none.

import { feedbackForm } from "./feedback.js";
import { icon, make, percent } from "./dom.js";
import { STRINGS, current, say } from "./strings.js";

const FULL = 100;

/** What was asked, in one line. */
export function asked({ task, question, finding }) {
  return task === "ask" ? question : say(`asked-${task}`, { finding });
}

/** A failure in plain words. */
export const plain = (failure) => say(failure.name);

/** What the server said, and of which field where its words do not name it. */
function spoken({ param, message }) {
  return param && !message.startsWith(param) ? `${param}: ${message}` : message;
}

/** A failure: plain words, what the server said, and the request's id. */
export function failureLines(failure) {
  return [
    make("p", {}, plain(failure)),
    failure.message ? make("p", { lang: "en" }, spoken(failure)) : null,
    failure.requestId ? make("p", {}, make("code", {}, say("error-request", { id: failure.requestId }))) : null,
  ];
}

/** The outcome in one sentence, for screen readers. */
export function outcome(entry) {
  const { result, state } = entry;
  if (state === "failed") return say("announce-failed", { text: plain(entry.failure) });
  if (state === "cancelled") return say("announce-cancelled");
  if (state === "abstained") return say("announce-abstained", { text: reasonOf(result) });
  const region = result.regions.length ? say("region-found") : "";
  return say("announce-answered", { text: [findingOf(result), result.answer, region].filter(Boolean).join(" ") });
}

/** The reason of an abstention in the answer's own language. */
function reasonOf(result) {
  return result.reason_text ?? result.reason ?? "";
}

function findingOf({ finding }) {
  return finding ? say(finding.present ? "present" : "absent", { name: finding.name }) : null;
}

function banner(kind, name, title, ...lines) {
  return make("div", { className: `verdict ${kind}` }, name ? icon(name) : make("span", { className: "bead" }),
    make("div", {}, make("strong", {}, title), ...lines));
}

function pending(entry) {
  const stage = `stage-${entry.stage}`;
  if (entry.state === "retrying") {
    const name = entry.failure.status === 429 ? "retry-429" : "retry-503";
    return [banner("waiting", "pause", say(name, { seconds: entry.seconds }), ...failureLines(entry.failure).slice(1))];
  }
  const words = entry.state === "waiting" ? say("waiting") : stage in STRINGS[current()] ? say(stage) : say("running");
  return [
    banner("waiting", null, words),
    make("div", { className: "provisional", id: "provisional", hidden: !entry.provisional },
      make("strong", {}, say("provisional")),
      make("p", { className: "text", id: "provisional-text", lang: entry.question.language }, entry.provisional)),
  ];
}

/** A score against its threshold, in figures, in words and as a bar. */
function meter(name, { value, threshold, source }) {
  const enough = value >= threshold;
  const words = say(enough ? "above" : "below", { percent: percent(value), threshold: percent(threshold) });
  const fill = make("div", { className: "fill" });
  const mark = make("div", { className: "mark" });
  fill.style.width = `${value * FULL}%`;
  mark.style.left = `${threshold * FULL}%`;
  return make("div", { className: `meter${enough ? "" : " low"}` },
    make("p", { className: "line" },
      make("span", {}, make("b", {}, say(name)), ` ${say(`source-${source}`)}`), make("span", {}, words)),
    make("div", {
      className: "track", role: "meter", "aria-label": say(name), "aria-valuemin": 0, "aria-valuemax": FULL,
      "aria-valuenow": Math.floor(value * FULL + 1e-9), "aria-valuetext": words,
    }, fill, mark));
}

function places(entry, actions) {
  const { regions } = entry.result;
  if (!regions.length) return null;
  const whole = (share) => Math.round(share * FULL);
  return make("div", {}, make("h3", {}, say("places")),
    make("ul", { className: "places" }, regions.map((region, index) => {
      const { label, image, box: [left, top, right, bottom] } = region;
      const shares = { left: whole(left), right: whole(right), top: whole(top), bottom: whole(bottom) };
      const name = entry.state === "abstained" ? say("doubtful", { label }) : label;
      return make("li", {}, say("place", { label: name, image: image + 1, ...shares }),
        make("button", {
          type: "button", className: "link", "data-focus": `place-${index}`,
          "aria-label": say("show-place", { label, image: image + 1 }), onclick: () => actions.show(entry, image),
        }, say("show")));
    })));
}

function decision(entry) {
  const { result, question } = entry;
  if (entry.state === "abstained") {
    const advice = `do-${result.reason}`;
    return banner("abstained", "pause", say("abstained"),
      make("p", { lang: question.language }, reasonOf(result)),
      advice in STRINGS[current()] ? make("p", {}, say(advice)) : null);
  }
  const { finding } = result;
  return make("div", {},
    banner("answered", "check", findingOf(result) ?? say("answered"),
      finding && finding.probability !== null && finding.probability !== undefined
        ? make("p", {}, say("probability", { percent: percent(finding.probability) })) : null,
      result.regions.length ? make("p", {}, say("region-found")) : null));
}

function origin({ release, id }) {
  const version = release.version ? `${release.model} (${release.version})` : release.model;
  const rows = [
    ["release", make("code", {}, release.digest ?? say("unknown"))],
    ["model", version],
    ["track", say(`track-${release.track}`)],
    ["request", make("code", {}, id)],
  ];
  return make("dl", { className: "origin" },
    rows.flatMap(([name, value]) => [make("dt", {}, say(name)), make("dd", {}, value)]));
}

function disclaimer(result) {
  const own = say("disclaimer");
  // the server's words always; the interface's language beside them
  return make("div", { className: "disclaimer" },
    own === result.disclaimer ? null : make("p", {}, own), make("p", { lang: "en" }, result.disclaimer));
}

/** The card of an entry. `actions`: show(entry, image), again(entry), refresh(), draw(callback), send(entry). */
export function card(entry, actions) {
  const { result, state, question } = entry;
  const again = make("p", { className: "actions" },
    make("button", { type: "button", "data-focus": "again", onclick: () => actions.again(entry) }, say("again")));
  const language = question.task === "ask" ? question.language : null;
  const parts = [make("p", { className: "asked", lang: language }, asked(question))];
  if (!entry.over) parts.push(...pending(entry));
  else if (state === "failed") {
    parts.push(banner("failed", "alert", say("failed"), ...failureLines(entry.failure)), again);
  } else if (state === "cancelled") parts.push(banner("waiting", "close", say("cancelled")), again);
  else {
    parts.push(
      decision(entry),
      result.answer ? make("p", { className: "text", lang: question.language }, result.answer) : null,
      result.match ? meter("match", result.match) : null,
      result.confidence ? meter("confidence", result.confidence) : null,
      places(entry, actions),
      disclaimer(result),
      origin(result),
      feedbackForm(entry, actions),
    );
  }
  return make("article", { className: "card", "data-state": state }, parts);
}
