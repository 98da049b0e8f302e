// The page: what is shown, and who is told when something happens.

import { Session } from "./api.js";
import { asked, card, failureLines, outcome, plain } from "./answer.js";
import { Entry } from "./asking.js";
import { announce, find, make } from "./dom.js";
import { send } from "./feedback.js";
import { Tray } from "./pictures.js";
import { askForKey, start as startSession } from "./signin.js";
import { preferred, say, speak } from "./strings.js";
import { Viewer } from "./viewer.js";

const THEME = "medforge-theme";

const entries = []; // newest first
let entry = null; // the one whose card is shown
let shot = null; // number of the image of `entry` that is shown; null: the tray's choice is shown
let running = null; // AbortController of what is being asked

const session = new Session(() => askForKey(session));
const viewer = new Viewer();
const tray = new Tray(session, {
  onChange: () => render(),
  onChoose: () => (shot = null),
  isUsed: (picture) => entries.some(({ shots }) => shots.some((one) => one.picture === picture)),
});

// ---------------------------------------------------------------- what is shown

function caption(kind, view, name, number, count) {
  const { width, height, frame, frames } = view;
  const which = `caption-${kind}${frames > 1 ? "-frame" : ""}`;
  return say(which, { number, count, name, width, height, frame: frame + 1, frames });
}

function renderViewer() {
  const picture = shot === null ? tray.chosen : entry.shots[shot].picture;
  const view = shot === null ? (picture?.failure ? null : picture?.view) : entry.shots[shot].view;
  const words = !view
    ? ""
    : shot === null
      ? caption("image", view, picture.name, tray.pictures.indexOf(picture) + 1, tray.pictures.length)
      : caption("answer", view, picture.name, shot + 1, entry.shots.length);
  viewer.show(view ?? null, words);
  find("caption").textContent = words;
  viewer.mark(view && entry ? marks(view) : []);
  renderNothing(picture);
  renderFrames(shot === null ? picture : null);
}

/** The boxes of the answer on the image that is shown, and the reader's own. */
function marks(view) {
  return entry.shots.flatMap((one, image) => {
    if (one.view?.url !== view.url) return [];
    const { box } = entry.feedback;
    const own = box && box.image === image ? [{ label: say("corrected"), box: box.box, drawn: true }] : [];
    const found = entry.regionsOf(image).map((region) => ({ ...region, doubtful: entry.state === "abstained" }));
    return [...found, ...own];
  });
}

function renderNothing(picture) {
  const [text, detail] = [find("nothing-text"), find("nothing-detail")];
  text.textContent = picture && !picture.failure ? say("reading") : say("drop");
  detail.textContent = picture && !picture.failure ? "" : say("drop-detail");
  if (picture?.failure) {
    text.textContent = `${picture.name}: ${say("image-failed")}`;
    const lines = failureLines(picture.failure).filter(Boolean);
    detail.replaceChildren(...lines.map((line) => make("span", {}, `${line.textContent} `)));
  }
}

function renderFrames(picture) {
  const view = picture?.view;
  const several = Boolean(view && view.frames > 1);
  find("frames").hidden = !several;
  if (!several) return;
  find("frame").max = view.frames;
  find("frame").value = view.frame + 1;
  find("frame-number").textContent = say("frame-of", { frame: view.frame + 1, frames: view.frames });
}

/** Draw anew what is in an element, and give the focus back to what had it. */
function redraw(element, ...children) {
  const name = element.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  element.replaceChildren(...children);
  if (name) element.querySelector(`[data-focus="${name}"]`)?.focus();
}

function renderAnswer() {
  viewer.drawing(null);
  redraw(find("answer"), entry ? card(entry, actions) : make("p", { className: "hint" }, say("no-answer")));
}

function renderHistory() {
  redraw(find("history"), ...entries.map((one) => {
    const url = one.shots[0].view?.url;
    return make("li", {}, make("button", {
      type: "button", "aria-current": one === entry ? "true" : null, "data-focus": `entry-${one.id}`,
      onclick: () => select(one),
    },
    url ? make("img", { className: "thumb", src: url, alt: "" }) : make("span", { className: "thumb" }),
    make("span", { className: "what" },
      make("b", { lang: one.question.language }, asked(one.question)),
      make("span", {}, `${say(`state-${one.state}`)} · ${one.shots.map(({ picture }) => picture.name).join(", ")}`))));
  }));
}

function renderForm() {
  const task = chosenOf("task");
  find("task-help").textContent = say(`help-${task}`);
  find("question-field").hidden = task !== "ask";
  find("finding-field").hidden = task !== "finding" && task !== "locate";
  find("question").lang = find("finding").lang = find("language").value;
  const count = tray.pictures.length;
  find("modes").hidden = count < 2;
  find("sending").textContent = count < 2 ? "" : say(`sending-${chosenOf("mode")}`, { count });
  find("submit").setAttribute("aria-disabled", String(Boolean(running)));
  find("cancel").disabled = !running;
}

function render() {
  renderViewer();
  renderForm();
}

// ---------------------------------------------------------------- asking

const chosenOf = (name) => find("ask").elements[name].value;

/** The question as the form has it, or the name of what is missing and where. */
function read() {
  const question = { task: chosenOf("task"), language: find("language").value };
  const field = { ask: "question", finding: "finding", locate: "finding" }[question.task];
  if (!tray.pictures.length) return { missing: "need-image", where: find("choose") };
  if (tray.pictures.some(({ failure }) => failure)) return { missing: "need-readable", where: find("choose") };
  if (field) {
    question[field] = find(field).value.trim();
    if (!question[field]) return { missing: `need-${field}`, where: find(field), invalid: true };
  }
  return { question };
}

function submit(event) {
  event.preventDefault();
  if (running) return;
  const { question, missing, where, invalid } = read();
  for (const name of ["question", "finding"]) find(name).removeAttribute("aria-invalid");
  find("ask-problem").textContent = missing ? say(missing) : "";
  if (missing) {
    if (invalid) where.setAttribute("aria-invalid", "true");
    where.focus();
    return;
  }
  const batch = chosenOf("mode") === "batch";
  const groups = batch ? tray.pictures.map((picture) => [picture]) : [tray.pictures];
  askAll(groups.map((pictures) => new Entry(question, pictures)));
}

async function askAll(asking) {
  const mine = (running = new AbortController());
  entries.unshift(...[...asking].reverse());
  select(asking[0]);
  showCard();
  announce(say("announce-asking"));
  try {
    for (const one of asking) {
      // the card follows the batch unless the reader looks at something else
      if (entry === asking[asking.indexOf(one) - 1]) select(one);
      await one.run(session, mine.signal, changed);
    }
  } finally {
    running = null;
    const lost = document.activeElement === find("cancel");
    renderForm();
    if (lost) find("answer-title").focus();
  }
}

/** Bring the card into view: below the question on a narrow screen, further down its panel on a wide one. */
const showCard = () => find("answer").scrollIntoView({ block: "nearest" });

function changed(one, what) {
  if (what === "text") {
    if (one !== entry || !find("provisional")) return;
    find("provisional").hidden = false;
    find("provisional-text").textContent = one.provisional;
    return;
  }
  if (one === entry) {
    renderAnswer();
    if (one.over) showCard();
    if (one.over && one.result) shot = one.result.regions[0]?.image ?? shot;
    renderViewer();
  }
  if (what !== "state") return;
  renderHistory();
  if (one.over) announce(outcome(one));
  else if (one.state === "retrying" && one.seconds === Math.ceil(one.failure.retryAfter)) {
    announce(say("announce-waiting", { seconds: one.seconds }));
  }
}

function select(one) {
  entry = one;
  shot = one.result?.regions[0]?.image ?? 0;
  renderAnswer();
  renderHistory();
  render();
}

const actions = {
  show: (one, image) => {
    [entry, shot] = [one, image];
    if (!viewer.shown) viewer.toggle();
    renderViewer();
    find("stage").scrollIntoView({ block: "nearest" });
  },
  shown: (one) => {
    const index = one.shots.findIndex(({ view }) => view && view.url === viewer.view?.url);
    return index < 0 ? null : index;
  },
  again: (one) => {
    if (!running) askAll([one.again()]);
  },
  refresh: () => renderViewer(),
  draw: (done) => viewer.drawing(done),
  send: (one) => send(one, session, () => one === entry && (renderAnswer(), renderViewer())),
};

// ---------------------------------------------------------------- language, theme, session

function setTheme(theme) {
  const media = { light: "not all", dark: "all", auto: "(prefers-color-scheme: dark)" };
  find("dark").media = media[theme];
  find("theme").value = theme;
  localStorage.setItem(THEME, theme);
}

function setLanguage(language) {
  speak(language);
  find("interface").value = language;
  renderServed();
  if (entry) renderAnswer();
  renderHistory();
  tray.render();
}

let served = null;

function renderServed() {
  const { digest, model } = served?.stable ?? {};
  find("served").textContent = !served ? "" : digest
    ? say("served", { model, digest: digest.slice(0, 12) }) : say("served-unknown", { model });
}

find("theme").addEventListener("change", ({ target }) => setTheme(target.value));
find("interface").addEventListener("change", ({ target }) => setLanguage(target.value));
find("ask").addEventListener("submit", submit);
find("ask").addEventListener("change", () => {
  find("ask-problem").textContent = "";
  renderForm();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").requestSubmit();
});
find("cancel").addEventListener("click", () => running?.abort());

setTheme(["light", "dark"].includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto");
setLanguage(preferred());
find("language").value = preferred();
served = await startSession(session);
renderServed();
