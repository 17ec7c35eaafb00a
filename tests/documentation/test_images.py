"""Images and paths of README and docs; links are checked by ``mkdocs build --strict``, where
READMEs are pages.
"""

import re
from pathlib import Path

from documentation.pages import ROOT, documentation_pages, name_of

PAGES = documentation_pages()
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
IMAGES = sorted(
    path
    for path in (ROOT / "docs").rglob("*")
    if path.suffix in (".png", ".svg", ".jpg", ".gif", ".webp")
)


def test_images_are_shown_beside_the_command_that_makes_them():
    shown, commands = (
        {page: set(re.findall(what, text)) for page, text in TEXTS.items()}
        for what in (r"!\[[^\]]*\]\(([^)]+)\)", r"\b(?:recipes|tests)/[\w/]+\.py\b")
    )
    for image in IMAGES:
        pages = [
            page
            for page in PAGES
            if image in {(page.parent / name).resolve() for name in shown[page]}
        ]
        assert pages, f"no page shows {name_of(image)}; remove it, or show it"
        assert any(commands[page] for page in pages), (
            f"no command of recipes/ or tests/ beside {name_of(image)}"
        )
        for name in (name for page in pages for name in commands[page]):
            assert (ROOT / name).is_file(), name


def test_paths_are_no_folders_of_a_machine():
    for page, text in TEXTS.items():
        for folder in (*(f"/{name}/" for name in ("root", "work", "tmp")), f"{Path.home()}/"):
            assert folder not in text, f"{name_of(page)} names {folder}"
