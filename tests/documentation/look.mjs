// Pages as a reader sees them: node tests/documentation/look.mjs FOLDER ADDRESS ...
// Writes a screenshot of every page into the folder, light and dark, wide and as on a phone, and runs axe-core on it with
// everything unfolded. Fails on a critical or serious finding of axe-core, and if the page is wider than the phone.
// Needs `npm install --no-save axe-core playwright-core`, and Chromium (CHROMIUM names another one than /usr/bin/chromium).
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.cwd(), "package.json"));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const [folder, ...addresses] = process.argv.slice(2);
mkdirSync(folder, { recursive: true });
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
});
let failed = 0;

async function look(address, colorScheme, width) {
  const page = await browser.newPage({ colorScheme, viewport: { width, height: 900 } });
  page.setDefaultTimeout(300_000); // of a busy machine
  await page.goto(address, { waitUntil: "load" });
  await page.waitForTimeout(500); // scripts of the page
  const name = address.replace(/^\w+:\/+([\d.:]+\/)?/, "").replace(/\W+/g, "-").replace(/^-|-$/g, "") || "home";
  await page.screenshot({ path: join(folder, `${name}-${colorScheme}-${width}.png`), fullPage: true });
  const over = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  await page.evaluate(() => document.querySelectorAll("details").forEach((one) => (one.open = true)));
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => globalThis.axe.run());
  const bad = violations.filter(({ impact }) => ["critical", "serious"].includes(impact));
  const wide = over > 0 ? `, ${over} pixels too wide` : "";
  console.log(`${address} ${colorScheme} ${width}: ${bad.length} critical or serious, ${violations.length} in all${wide}`);
  for (const { id, nodes } of bad)
    for (const { target, html, failureSummary } of nodes)
      console.log("  ", id, target.join(" "), html.slice(0, 200), failureSummary.split("\n")[1]);
  failed += bad.length + (over > 0);
  await page.close();
}

for (const address of addresses)
  for (const colorScheme of ["light", "dark"])
    for (const width of [1280, 390]) await look(address, colorScheme, width);
await browser.close();
process.exitCode = failed ? 1 : 0;
