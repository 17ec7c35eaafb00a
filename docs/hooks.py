"""MkDocs: the README is the home page, with its links as they are inside the site."""

from pathlib import Path
from typing import Any

LINKS = {"](docs/": "](", "](recipes/README.md)": "](recipes.md)", "[CITATION.cff](CITATION.cff)": "`CITATION.cff`"}


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Text of a page."""
    if page.file.src_uri != "index.md":
        return markdown
    text = (Path(config.docs_dir).parent / "README.md").read_text(encoding="utf-8")
    for written, inside in LINKS.items():
        text = text.replace(written, inside)
    return text
