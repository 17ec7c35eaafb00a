"""Links and images of README and docs in the repository; those of the site are checked by ``mkdocs build --strict``."""

import re
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import markdown
import pytest
from documentation.pages import ROOT, documentation_pages, name_of

PAGES = documentation_pages()
DOCS = ROOT / "docs"
IMAGES = sorted(path for path in DOCS.rglob("*") if path.suffix in (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp"))


class View:
    """What a page holds, as a browser would read it."""

    def __init__(self, text):
        html = markdown.markdown(text, extensions=["toc", "tables", "fenced_code"])
        self.links, self.images, anchors = (
            [unescape(found) for found in re.findall(rf'<{tag}\b[^>]*? {name}="([^"]*)"', html)]
            for tag, name in (("a", "href"), ("img", "src"), (r"\w+", "id"))
        )
        self.anchors = set(anchors)
        self.commands = re.findall(r"\b(?:recipes|tests)/[\w/]+\.py\b", text)  # in blocks and inline code


@cache
def view(page):
    return View(re.sub(r"^( *)```(\w+).*$", r"\1```\2", page.read_text(encoding="utf-8"), flags=re.MULTILINE))


def broken(page, seen):
    """What is wrong with a page's links, a line each."""
    faults = ((link, fault_of(page, link, seen)) for link in [*seen.links, *seen.images])
    return [f"{name_of(page)}: {link}: {fault}" for link, fault in faults if fault]


def fault_of(page, link, seen):
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        right = parts.scheme == "https" and "." in parts.netloc and not set(link) & set(" <>\"'`")
        return None if right else "an address elsewhere begins with https:// and a host"
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_relative_to(ROOT):
        return "leads out of the repository"
    if not target.exists():
        return "no such file"
    of_the_site = target.name == "api.md" and parts.fragment.startswith("sj_robust.")
    if parts.fragment and not of_the_site:
        anchors = seen.anchors if target == page else view(target).anchors if target.suffix == ".md" else ()
        return None if unquote(parts.fragment) in anchors else "no such heading"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    assert broken(page, view(page)) == []


def test_what_is_found_and_what_is_right():
    page, right = DOCS / "compatibility.md", "[a](concepts/figures.md#does-mppd-tell-the-intensity) [a](#b_1)"
    right += " ![a](concepts/figures/rho.png) <https://arxiv.org/x> [a](api.md#sj_robust.neuron.DLIFNode)\n\n# b\n\n# b"
    assert broken(page, View(right)) == []
    for text, fault in {
        "[a](nowhere.md)": "no such file",
        "[a](concepts/method.md#nowhere)": "no such heading",
        "[a](#nowhere)": "no such heading",
        "![a](concepts/figures/nowhere.png)": "no such file",
        "[a](../../README.md)": "leads out",
        "[a](http://arxiv.org/abs/2405.20694)": "https",
        "<https://localhost>": "https",
    }.items():
        assert [fault in said for said in broken(page, View(text))] == [True], text


def test_images_are_shown_beside_the_command_that_makes_them():
    showing = {
        image: [p for p in PAGES if image in {(p.parent / name).resolve() for name in view(p).images}]
        for image in IMAGES
    }
    for image, pages in showing.items():
        assert pages, f"no page shows {name_of(image)}; remove it, or show it"
        assert any(view(page).commands for page in pages), f"no command of recipes/ or tests/ beside {name_of(image)}"
        for name in (name for page in pages for name in view(page).commands):
            assert (ROOT / name).is_file(), name


def test_paths_are_no_folders_of_a_machine():
    for page in PAGES:
        for folder in (*(f"/{name}/" for name in ("root", "work", "tmp")), f"{Path.home()}/"):
            assert folder not in page.read_text(encoding="utf-8"), f"{name_of(page)} names {folder}"
