"""A page as a telephone shows it, measured in headless Chromium."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FRAME = """<!DOCTYPE html><body style="margin: 0">
<iframe width="{width}" height="844" style="border: 0" srcdoc="{page}"></iframe><script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {{
  const inside = frame.contentDocument, root = inside.documentElement;
  const right = (head) => head.getBoundingClientRect().right;
  const found = {{
    width: frame.contentWindow.innerWidth, scroll: root.scrollWidth, client: root.clientWidth,
    heads: [...inside.querySelectorAll("tr:first-child th")].map(right),
  }};
  document.body.dataset.found = JSON.stringify(found);
}});
</script></body>"""


def measured(page, folder, *, width=390):
    """Widths of a page in a frame, which may be narrower than any window, in pixels, and the right
    edges of its column headings; a screenshot is left in the folder.
    """
    file = folder / "frame.html"
    file.write_text(_FRAME.format(width=width, page=escape(page)), encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},844",
        f"--screenshot={folder / 'page.png'}",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    (found,) = re.findall(r'data-found="([^"]*)"', done.stdout)
    return json.loads(unescape(found))
