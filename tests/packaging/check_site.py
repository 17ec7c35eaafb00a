"""Every public name has its place on the built site, and every link of the site leads somewhere:
``python tests/packaging/check_site.py FOLDER``.
"""

import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from public_names import PUBLIC


def names_on(site):
    """What was rendered: ``objects.inv`` has a head of four lines, then lines under zlib, the name
    first in each.
    """
    _, _, body = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    lines = zlib.decompress(body).decode().splitlines()
    return {line.split()[0] for line in lines if line}


def missing_from(found):
    """Public names without a place. What a package takes from a module of its own may have its
    place there.
    """
    missing = []
    for module, names in PUBLIC.items():
        for name in names:
            places = (place for place in found if place.startswith(f"{module}."))
            if not any(place.endswith(f".{name}") for place in places):
                missing.append(f"{module}.{name}")
    return missing


class Links(HTMLParser):
    """Targets and anchors of a page."""

    def __init__(self, page):
        super().__init__()
        self.targets = []
        self.anchors = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")}
        self.targets += [values[name] for name in ("href", "src") if values.get(name)]


def dead_links(site):
    """Page and target of every link inside the site that leads nowhere."""
    written = (page for page in site.rglob("*.html") if "_static" not in page.parts)
    pages = {page: Links(page) for page in written}
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            anchors = pages[path].anchors if path in pages else set()
            anchor = unquote(parts.fragment)
            if not path.is_file() or (anchor and path in pages and anchor not in anchors):
                yield f"{page.relative_to(site)}: {target}"


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    missing = missing_from(names_on(folder))
    if missing != ["sj_robust.__version__"]:
        sys.exit(f"not on the site: {missing}; docs/api names modules, a constant has a docstring")
    dead = sorted(set(dead_links(folder)))
    if dead:
        sys.exit("\n".join(["links that lead nowhere:", *dead]))
