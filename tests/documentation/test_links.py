"""Links, images and navigation of the documentation."""

import pydoc
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from documentation.pages import ROOT, documentation_pages, name_of
from documentation.views import DOCS, OBJECTS, View, hook, included, navigation, view

PAGES = documentation_pages()
SITE = [page for page in PAGES if page.is_relative_to(DOCS)]
IMAGES = sorted(path for path in DOCS.rglob("*") if path.suffix in (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp"))


def broken(page, seen, *, site, root):
    """What is wrong with a page's links, a line each."""
    return [f"{name_of(page)}: {link}: {fault}" for link in [*seen.links, *seen.images]
            if (fault := fault_of(page, link, site=site, root=root))]  # fmt: skip


def fault_of(page, link, *, site, root):
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        right = parts.scheme == "https" and "." in parts.netloc and not set(link) & set(" <>\"'`")
        return None if right else "an address elsewhere begins with https:// and a host"
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_relative_to(root):
        return f"leads out of {root.name}, where the site has nothing"
    if not (target.is_file() if site else target.exists()):
        return "no such file"
    if parts.fragment and not has_anchor(target, unquote(parts.fragment), site=site):
        return "no such heading"
    return None


def has_anchor(target, anchor, *, site):
    if target.suffix != ".md":
        return False
    if anchor in view(target, site=site and target.is_relative_to(DOCS)).anchors:
        return True
    documented = OBJECTS.findall(target.read_text(encoding="utf-8"))
    return any(anchor == name or anchor.startswith(f"{name}.") for name in documented) and bool(pydoc.locate(anchor))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_in_the_repository(page):
    assert broken(page, view(page, site=False), site=False, root=ROOT) == []


@pytest.mark.parametrize("page", SITE, ids=name_of)
def test_links_on_the_site(page):
    assert broken(page, view(page), site=True, root=DOCS) == []


def test_readmes_are_pages_of_the_site():
    for page, (source, _) in hook().PAGES.items():
        assert len(view(DOCS / page).links) >= len(view(ROOT / source, site=False).links) - 1  # CITATION.cff is no page
        assert len(view(DOCS / page).anchors) == len(view(ROOT / source, site=False).anchors) > 3


def test_every_page_is_in_the_navigation_once():
    entries = navigation()
    assert len(entries) == len(set(entries))
    assert {DOCS / entry for entry in entries} == set(SITE) - included()


@pytest.mark.parametrize("image", IMAGES, ids=name_of)
def test_an_image_is_shown_beside_the_command_that_makes_it(image):
    showing = [page for page in SITE if any((page.parent / name).resolve() == image for name in view(page).images)]
    assert showing, "no page shows it; remove it, or show it"
    assert any(view(page).commands() for page in showing), f"no command of recipes/ or tests/ on {showing}"


def test_commands_beside_images_exist():
    for page in SITE:
        for name in view(page).commands() if view(page).images else ():
            assert (ROOT / name).is_file(), f"{name_of(page)}: {name}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](nowhere.md)", "no such file"),
        ("[a](concepts/method.md#nowhere)", "no such heading"),
        ("[a](#nowhere)", "no such heading"),
        ("![a](concepts/figures/nowhere.png)", "no such file"),
        ("[a](../recipes/README.md)", "leads out of docs"),
        ("[a](http://arxiv.org/abs/2405.20694)", "https"),
        ("<https://localhost>", "https"),
        ("[a](api.md#sj_robust.neuron.DLIFNode.nothing)", "no such heading"),
    ],
)
def test_what_is_found(text, fault):
    [said] = broken(DOCS / "compatibility.md", View(text), site=True, root=DOCS)
    assert fault in said
    assert said.startswith("docs/compatibility.md: ")


def test_what_is_right():
    text = "[a](concepts/figures.md#does-mppd-tell-the-intensity) ![a](concepts/figures/rho.png) <https://arxiv.org/x>"
    assert (
        broken(DOCS / "compatibility.md", View(f"{text} [a](api.md#sj_robust.neuron.DLIFNode)"), site=True, root=DOCS)
        == []
    )
    assert View("# A\n\n## A\n\n```python\nx = 1\n```\n\n`recipes/a.py`").commands() == ["recipes/a.py"]
    assert View("# A b\n\n## A b").anchors == {"a-b", "a-b_1"}


def test_paths_are_no_folders_of_a_machine():
    for page in PAGES:
        for folder in (*(f"/{name}/" for name in ("root", "work", "tmp")), f"{Path.home()}/"):
            assert folder not in page.read_text(encoding="utf-8"), f"{name_of(page)} names {folder}"
