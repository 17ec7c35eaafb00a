// Draws every *.mmd of this folder as an SVG that can be read on a light and on a dark page: node docs/figures/draw_diagrams.mjs
// Needs `npm install --no-save mermaid playwright-core`, and Chromium (CHROMIUM names another one than /usr/bin/chromium).
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.cwd(), "package.json"));
const { chromium } = require("playwright-core");
const config = {
  startOnLoad: false,
  deterministicIds: true,
  htmlLabels: false,
  theme: "base",
  themeCSS: ".edgeLabel rect { opacity: 1; }",
  themeVariables: {
    fontFamily: "system-ui, sans-serif",
    primaryColor: "#e3edf7",
    primaryBorderColor: "#5b7fa3",
    primaryTextColor: "#1c2126",
    lineColor: "#7f8a96",
    edgeLabelBackground: "#eef1f4",
  },
};
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
const page = await browser.newPage();
await page.setContent("<body></body>");
await page.addScriptTag({ path: join(require.resolve("mermaid"), "../mermaid.min.js") });
for (const name of readdirSync(import.meta.dirname).filter((name) => name.endsWith(".mmd"))) {
  const path = join(import.meta.dirname, name);
  const svg = await page.evaluate(
    async ({ config, name, text }) => {
      mermaid.initialize(config);
      return (await mermaid.render(name, text)).svg;
    },
    { config, name: name.replace(".mmd", ""), text: readFileSync(path, "utf8") },
  );
  const [, width, height] = svg.match(/viewBox="0 0 ([\d.]+) ([\d.]+)"/);
  const sized = svg.replace('width="100%"', `width="${Math.round(width)}" height="${Math.round(height)}"`);
  writeFileSync(path.replace(".mmd", ".svg"), sized + "\n");
}
await browser.close();
