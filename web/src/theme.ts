// Light, dark, or as the system says.
import { small } from "./store";

export type Theme = "system" | "light" | "dark";

export const theme = {
  get(): Theme {
    const kept = small.get("theme");
    return kept === "light" || kept === "dark" ? kept : "system";
  },
  set(value: Theme): void {
    small.set("theme", value === "system" ? null : value);
    show(value);
  },
};

function show(value: Theme): void {
  if (value === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
}
