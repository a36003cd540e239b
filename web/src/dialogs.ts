// Dialogs and short notices. They are the browser's own <dialog>: it keeps the focus inside and closes on Escape.
import { announce, byId, h, iconButton, type Child } from "./dom";

export const isMac = /Mac|iPhone|iPad/.test(navigator.platform);

/** A dialog that is removed when it is closed. */
export function openDialog(title: string, className: string, ...children: Child[]): HTMLDialogElement {
  const heading = h("h2", { id: "dialog-title" }, title);
  const dialog = h("dialog", { class: className, "aria-labelledby": "dialog-title" },
    h("header", {}, heading, iconButton("close", "Close", () => dialog.close())), ...children);
  const before = document.activeElement;
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (before instanceof HTMLElement) before.focus();
  });
  dialog.addEventListener("mousedown", (event) => event.target === dialog && dialog.close()); // on the backdrop
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

export const SHORTCUTS: [keys: string[], what: string][] = [
  [["Enter"], "Send the message"],
  [["⇧", "Enter"], "A new line"],
  [["Esc"], "Stop the answer"],
  [["↑"], "Edit your last message, from an empty field"],
  [["⌘", "⇧", "O"], "New chat"],
  [["⌘", "K"], "Search the chats"],
  [["⌘", "B"], "Show or hide the chats"],
  [["⌘", "⇧", "Enter"], "Answer again"],
  [["⌘", ","], "Settings"],
  [["⌘", "/"], "These shortcuts"],
];

const keyName = (key: string): string => (isMac ? key : (({ "⌘": "Ctrl", "⇧": "Shift" } as Record<string, string>)[key] ?? key));

export function showShortcuts(): void {
  openDialog("Keyboard", "shortcuts",
    h("dl", {}, ...SHORTCUTS.map(([keys, what]) =>
      h("div", {}, h("dt", {}, what), h("dd", {}, ...keys.map((each) => h("kbd", {}, keyName(each))))))));
}

/** Asks for the server's key until it takes one. Resolves to whether there is one. */
export function askForKey(unlock: (value: string, keep: boolean) => Promise<boolean>, signal?: AbortSignal): Promise<boolean> {
  return new Promise((resolve) => {
    let accepted = false;
    const field = h("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "key-said" });
    const keep = h("input", { type: "checkbox", checked: true });
    const said = h("p", { id: "key-said", class: "said", role: "alert" });
    const form = h("form", {
      onsubmit: async (event) => {
        event.preventDefault();
        said.textContent = "";
        if (await unlock(field.value.trim(), keep.checked)) {
          accepted = true;
          dialog.close();
        } else {
          said.textContent = "The server does not take this key.";
          field.select();
        }
      },
    },
      h("p", {}, "This server was started with an API key. It is sent to this server only."),
      h("label", { for: "key" }, "Key"), field, said,
      h("label", { class: "check" }, keep, "Keep it in this browser"),
      h("div", { class: "row end" }, h("button", { type: "submit", class: "button primary" }, "Continue")));
    const dialog = openDialog("API key", "narrow", form);
    dialog.addEventListener("close", () => resolve(accepted));
    signal?.addEventListener("abort", () => dialog.close());
    field.focus();
  });
}

/** A notice for a few seconds, with something to take back perhaps. */
export function notice(text: string, action?: { label: string; run: () => void }): void {
  const shown = h("div", { class: "notice" }, h("span", { dir: "auto" }, text));
  let timer = 0;
  const later = () => (timer = window.setTimeout(() => shown.remove(), action ? 8_000 : 5_000));
  if (action) {
    shown.append(h("button", { type: "button", class: "button", onclick: () => { shown.remove(); action.run(); } }, action.label));
  }
  // It waits for who is about to press its button
  for (const event of ["pointerenter", "focusin"]) shown.addEventListener(event, () => clearTimeout(timer));
  for (const event of ["pointerleave", "focusout"]) shown.addEventListener(event, later);
  byId("notices").append(shown);
  announce(action ? `${text}. ${action.label} is possible.` : text);
  later();
}
