// Rebuilds the page's files in the package from src/: `npm ci && npm run build`. The result is committed, so that an
// installation needs no npm; the same sources and lock file give the same bytes.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const target = process.argv[2] ?? join(here, "../openelm_mlx/server/page");
const modules = join(here, "node_modules");

const options = {
  bundle: true,
  minify: true,
  target: ["es2022", "safari16.4"],
  legalComments: "none", // the whole texts are in LICENSES.txt
  charset: "utf8",
  metafile: true,
  absWorkingDir: here,
  logLevel: "warning",
};

rmSync(target, { recursive: true, force: true });
mkdirSync(target, { recursive: true });

const script = await build({ ...options, format: "esm", entryPoints: { app: "src/main.ts" }, outdir: target });
const theme = await build({ ...options, format: "iife", entryPoints: { theme: "src/theme_first.ts" }, outdir: target });
const style = await build({
  ...options,
  entryPoints: { app: "src/style/app.css" },
  outdir: target,
  assetNames: "fonts/[name]-[hash]", // hashed names may be kept for good by the browser
  loader: { ".woff2": "file", ".woff": "empty", ".ttf": "empty" },
  plugins: [onlyWoff2()],
});
for (const name of ["index.html", "icon.svg"]) cpSync(join(here, "src", name), join(target, name));
writeFileSync(join(target, "LICENSES.txt"), licences([script, theme, style]));
writeFileSync(join(target, "sources.sha256"), `${hashOfSources()}\n`);
for (const name of readdirSync(target, { recursive: true }).sort()) console.log(name);

// Tells, also where there is no npm, whether the committed files are those of the committed sources.
function hashOfSources() {
  const names = readdirSync(join(here, "src"), { recursive: true, withFileTypes: true })
    .filter((each) => each.isFile())
    .map((each) => join(each.parentPath, each.name));
  const all = [...names, ...["build.mjs", "package-lock.json", "licences/katex-fonts.txt"].map((name) => join(here, name))];
  const hash = createHash("sha256");
  for (const name of all.map((path) => relative(here, path).replaceAll("\\", "/")).sort()) {
    hash.update(`${name}\n`).update(readFileSync(join(here, name)));
  }
  return hash.digest("hex");
}

// KaTeX names each font as woff2, woff and ttf. Every browser that runs this page reads woff2.
function onlyWoff2() {
  return {
    name: "only-woff2",
    setup({ onLoad }) {
      onLoad({ filter: /katex(\.min)?\.css$/ }, ({ path }) => ({
        contents: readFileSync(path, "utf8").replace(/,url\([^)]*\.(woff|ttf)\) format\("[a-z0-9]+"\)/g, ""),
        loader: "css",
      }));
    },
  };
}

// Which packages really are in the bundle, by esbuild's own account, each with its licence.
function licences(results) {
  const packages = new Set();
  for (const { metafile } of results)
    for (const output of Object.values(metafile.outputs))
      for (const [path, { bytesInOutput }] of Object.entries(output.inputs)) {
        const name = /node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(path)?.[1];
        if (name && (bytesInOutput > 0 || path.endsWith(".css"))) packages.add(name);
      }
  const parts = [...packages].sort().map((name) => {
    const folder = join(modules, name);
    const { version, license, repository } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
    const file = readdirSync(folder).find((each) => /^licen[cs]e/i.test(each));
    const text = file ? readFileSync(join(folder, file), "utf8").trim() : `Licence: ${license}`;
    const url = (typeof repository === "string" ? repository : repository?.url ?? "").replace(/^git\+/, "");
    return { title: `${name} ${version} (${license})`, url, text };
  });
  const line = "-".repeat(78);
  return [
    "Libraries in app.js and app.css, and the fonts of KaTeX in fonts/, with their licences.",
    ...parts.map(({ title }) => `  ${title}`),
    "  KaTeX's fonts (OFL-1.1)",
    ...parts.map(({ title, url, text }) => `${line}\n${[title, url].filter(Boolean).join("\n")}\n\n${text.replace(/\r\n/g, "\n")}`),
    `${line}\n${readFileSync(join(here, "licences/katex-fonts.txt"), "utf8")}`,
  ].join("\n\n").replace(/\n\n  /g, "\n  ");
}
