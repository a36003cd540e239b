// Runs before the first paint, so that a page chosen dark never flashes white.
try {
  const kept = localStorage.getItem("openelm_mlx.theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch {
  // a browser without storage has the system's theme
}
