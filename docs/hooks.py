"""MkDocs: the READMEs are pages of the site, with their links as they are inside it."""

from pathlib import Path
from typing import Any

README = {"](docs/": "](", "](recipes/README.md)": "](recipes.md)", "[CITATION.cff](CITATION.cff)": "`CITATION.cff`"}
PAGES = {"index.md": ("README.md", README), "recipes.md": ("recipes/README.md", {"](../docs/": "]("})}


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Text of a page."""
    if page.file.src_uri not in PAGES:
        return markdown
    source, links = PAGES[page.file.src_uri]
    text = (Path(config.docs_dir).parent / source).read_text(encoding="utf-8")
    for written, inside in links.items():
        text = text.replace(written, inside)
    return text
