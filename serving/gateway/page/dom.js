// Making elements. Text only ever becomes a text node: what a model, a file or the server says is never markup.

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "textContent", "className", "open"]);

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name) && !(element instanceof SVGElement)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** The element of that id, which the page has. */
export const find = (id) => document.getElementById(id);

/** An HTML element; an attribute `onclick` listens. Strings among the children become text. */
export const make = (tag, attributes = {}, ...children) =>
  build(document.createElement(tag), attributes, children);

/** An SVG element. */
export const draw = (tag, attributes = {}, ...children) =>
  build(document.createElementNS(SVG, tag), attributes, children);

/** An icon of the sprite in index.html, hidden from screen readers. */
export const icon = (name) => draw("svg", { "aria-hidden": "true" }, draw("use", { href: `#i-${name}` }));

/** 0.934 as "93 %": rounded down, so that a score below its threshold never looks as if it had reached it. */
export const percent = (share) => `${Math.floor(share * 100 + 1e-9)} %`;

/** Tell users of screen readers. The same words said twice are announced twice. */
export function announce(words) {
  const announcer = find("announcer");
  announcer.textContent = announcer.textContent === words ? `${words}\u00a0` : words;
}
