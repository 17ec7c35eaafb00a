// axe-core on pages in light and dark, wide and narrow, everything unfolded: node tests/packaging/accessibility.mjs URL ...
// fails on a critical or serious violation. Needs npm install --no-save axe-core playwright-core, and Chromium.
import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const axe = readFileSync("node_modules/axe-core/axe.min.js", "utf8");
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
});
let found = 0;
for (const url of process.argv.slice(2))
  for (const colorScheme of ["light", "dark"])
    for (const width of [1280, 390]) {
      const page = await browser.newPage({ colorScheme, viewport: { width, height: 900 } });
      await page.goto(url, { waitUntil: "load" });
      await page.waitForTimeout(500); // scripts of the page
      await page.evaluate(() => document.querySelectorAll("details").forEach((one) => (one.open = true)));
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => globalThis.axe.run());
      const bad = violations.filter(({ impact }) => ["critical", "serious"].includes(impact));
      console.log(`${url} ${colorScheme} ${width}: ${bad.length} critical or serious, ${violations.length} in all`);
      for (const { id, nodes } of bad) for (const { target, html } of nodes) console.log("  ", id, target.join(" "), html);
      found += bad.length;
      await page.close();
    }
await browser.close();
process.exitCode = found ? 1 : 0;
