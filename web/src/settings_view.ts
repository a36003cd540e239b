// Settings of the conversation that is open, which new ones begin with; and of this browser.
import { key, toolsOf } from "./api";
import { h, type Child } from "./dom";
import { notice, openDialog } from "./dialogs";
import { theme, type Theme } from "./theme";
import type { Settings } from "./types";

const EFFORTS = [["", "The model’s own"], ["none", "None"], ["low", "Low"], ["medium", "Medium"], ["high", "High"]] as const;
const THEMES: [Theme, string][] = [["system", "As the system"], ["light", "Light"], ["dark", "Dark"]];

// A tool that demo-gpt-oss was trained to call
const EXAMPLE_TOOL = JSON.stringify([{
  type: "function",
  function: {
    name: "calculator",
    description: "Evaluates an arithmetic expression.",
    parameters: { type: "object", properties: { expression: { type: "string" } }, required: ["expression"] },
  },
}], null, 2);

/** Fields write into `settings` as they change; `changed` is called each time. plan: what the model's memory is made of. */
export function showSettings(settings: Settings, plan: string | null, changed: () => void): void {
  const numeric = (id: string, label: string, name: "temperature" | "topP" | "maxTokens" | "seed", limits: Record<string, string>, hint: string) => {
    const field = h("input", {
      id, type: "number", inputmode: "decimal", placeholder: "Default", value: settings[name] ?? undefined, "aria-describedby": `${id}-hint`, ...limits,
      oninput: () => {
        if (!field.validity.valid) return; // the browser marks it, and the last right value stays
        settings[name] = field.value === "" ? null : field.valueAsNumber;
        changed();
      },
    });
    return labelled(id, label, hint, field);
  };
  const system = h("textarea", {
    id: "system", rows: "4", dir: "auto", placeholder: "None", "aria-describedby": "system-hint",
    oninput: () => { settings.system = system.value; changed(); },
  });
  system.value = settings.system;
  const effort = h("select", {
    id: "effort", "aria-describedby": "effort-hint",
    onchange: () => { settings.effort = effort.value || null; changed(); },
  }, ...EFFORTS.map(([value, label]) => h("option", { value, selected: (settings.effort ?? "") === value }, label)));

  openDialog("Settings", "settings",
    h("section", {},
      labelled("system", "System prompt", "What the model is told before the conversation.", system),
      labelled("effort", "Reasoning effort", "How long gpt-oss thinks before it answers.", effort),
      h("div", { class: "grid" },
        numeric("temperature", "Temperature", "temperature", { min: "0", max: "2", step: "any" }, "0 is always the likeliest token."),
        numeric("top-p", "Top-p", "topP", { min: "0", max: "1", step: "any" }, "The share of probability to choose from."),
        numeric("max-tokens", "Longest answer", "maxTokens", { min: "1", step: "1" }, "In tokens, reasoning included."),
        numeric("seed", "Seed", "seed", { min: "0", step: "1" }, "The same seed gives the same answer.")),
      toolsField(settings, changed),
      plan && h("p", { class: "hint plan" }, `${settings.model}: ${plan}.`)),
    h("section", {},
      h("h3", {}, "This browser"),
      h("fieldset", { class: "themes" }, h("legend", {}, "Appearance"),
        ...THEMES.map(([value, label]) => h("label", {},
          h("input", { type: "radio", name: "theme", value, checked: theme.get() === value, onchange: () => theme.set(value) }), label))),
      key.get() !== null && h("button", {
        type: "button", class: "button",
        onclick: (event) => { key.set(null); event.target.remove(); notice("The key is forgotten"); },
      }, "Forget the API key"),
      h("p", { class: "hint" }, "Conversations are kept in this browser only. ",
        h("a", { href: "page/LICENSES.txt", target: "_blank" }, "Libraries and licences"))));
}

function toolsField(settings: Settings, changed: () => void): HTMLElement {
  const said = h("p", { class: "said", role: "alert", id: "tools-said" });
  const check = () => {
    try {
      toolsOf(field.value);
      said.textContent = "";
    } catch (error) {
      said.textContent = (error as Error).message;
    }
    settings.tools = field.value;
    changed();
  };
  const field = h("textarea", { id: "tools", rows: "6", dir: "ltr", spellcheck: "false", class: "code", "aria-describedby": "tools-hint tools-said", oninput: check });
  field.value = settings.tools;
  const example = h("button", { type: "button", class: "button", onclick: () => { field.value = EXAMPLE_TOOL; check(); } }, "Insert an example");
  const folded = h("details", { class: "tools" }, h("summary", {}, "Tools"),
    labelled("tools", "Definitions as JSON", "As in OpenAI’s API. The model’s calls are shown, and you give their results.", field), said, example);
  folded.open = settings.tools.trim() !== "";
  return folded;
}

function labelled(id: string, label: string, hint: string, field: Child): HTMLElement {
  return h("div", { class: "field" }, h("label", { for: id }, label), field, h("p", { class: "hint", id: `${id}-hint` }, hint));
}
