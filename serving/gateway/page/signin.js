// Signing in with an API key, again where the key was lost, and out.

import { Failure } from "./api.js";
import { failureLines, plain } from "./answer.js";
import { announce, find } from "./dom.js";
import { say } from "./strings.js";

// what a header may carry
const KEY = /^[\x21-\x7e]+$/;

/** Show the form until a key is accepted; resolves with what is served (api.CurrentRelease). */
export function askForKey(session, again = true) {
  const [dialog, form, field, problem] = ["sign-in", "sign-in-form", "key", "sign-in-problem"].map(find);
  const before = document.activeElement;
  const over = new AbortController();
  const { signal } = over;
  let busy = false;
  find("sign-in-why").dataset.text = again ? "sign-in-again" : "sign-in-why";
  find("sign-in-why").textContent = say(find("sign-in-why").dataset.text);
  find("give-up").hidden = !again;

  const refuse = (words) => {
    problem.textContent = words;
    field.setAttribute("aria-invalid", "true");
    field.focus();
  };

  return new Promise((resolve, reject) => {
    async function submit(event) {
      event.preventDefault();
      if (busy) return;
      const key = field.value.trim();
      if (!KEY.test(key)) return refuse(say(key ? "key-format" : "key-empty"));
      busy = true;
      problem.textContent = "";
      try {
        const served = await session.release(key);
        session.keep(key);
        finish(served);
      } catch (error) {
        if (!(error instanceof Failure)) return reject(error);
        const lines = failureLines(error).filter(Boolean).map((line) => line.textContent);
        refuse(error.status === 401 ? say("key-wrong") : lines.join(" "));
      } finally {
        busy = false;
      }
      return undefined;
    }

    function finish(served) {
      over.abort();
      field.value = "";
      field.removeAttribute("aria-invalid");
      dialog.close();
      find("sign-out").hidden = false;
      before?.focus?.();
      announce(say("signed-in"));
      resolve(served);
    }

    form.addEventListener("submit", submit, { signal });
    find("give-up").addEventListener("click", () => signOut(session), { signal });
    // Escape must not leave a page that cannot ask
    dialog.addEventListener("cancel", (event) => event.preventDefault(), { signal });
    dialog.addEventListener("keydown", (event) => event.key === "Escape" && event.preventDefault(), { signal });
    dialog.showModal();
    field.focus();
  });
}

/** Forget the key and all else: a page that is loaded anew has nothing in memory. */
export function signOut(session) {
  session.forget();
  location.replace(location.pathname);
}

/** Go on with the tab's key, or without one where the gateway wants none; else ask for one. */
export async function start(session) {
  find("sign-out").addEventListener("click", () => signOut(session));
  try {
    const served = await session.release();
    find("sign-out").hidden = !session.key;
    return served;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    const asking = askForKey(session, false);
    if (error.status !== 401) find("sign-in-problem").textContent = plain(error);
    return asking;
  }
}
