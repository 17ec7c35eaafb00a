"""Pages as the site shows them: with what they include, the links of the hook, and MkDocs' headings."""

import importlib.util
import re
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import markdown
import yaml
from documentation.pages import ROOT

DOCS = ROOT / "docs"
INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
OBJECTS = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
COMMAND = re.compile(r"\b(?:recipes|tests)/[\w/]+\.py\b")


@dataclass
class View(HTMLParser):
    """What a page holds, as a browser would read it."""

    text: str
    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    code: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.inside = False
        self.feed(markdown.markdown(self.text, extensions=["toc", "tables", "fenced_code"]))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect an element."""
        values = {name: value or "" for name, value in attrs}
        self.links += [values["href"]] if tag == "a" else []
        self.images += [values["src"]] if tag == "img" else []
        self.anchors |= {values["id"]} if "id" in values else set()
        self.inside = self.inside or tag == "code"

    def handle_endtag(self, tag: str) -> None:
        """End of an element."""
        self.inside = self.inside and tag != "code"

    def handle_data(self, data: str) -> None:
        """Text; that of commands is kept."""
        if self.inside:
            self.code.append(data)

    def commands(self) -> list[str]:
        """Scripts of the repository in blocks and inline code."""
        return [name for text in self.code for name in COMMAND.findall(text)]


@cache
def view(page: Path, *, site: bool = True) -> View:
    """A page on the site, or as it stands in the repository."""
    text = page.read_text(encoding="utf-8")
    if site:
        text = hook().on_page_markdown(
            text,
            page=SimpleNamespace(file=SimpleNamespace(src_uri=page.relative_to(DOCS).as_posix())),
            config=SimpleNamespace(docs_dir=str(DOCS)),
            files=None,
        )
        text = INCLUDE.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), text)
    return View(re.sub(r"^( *)```(\w+).*$", r"\1```\2", text, flags=re.MULTILINE))


@cache
def hook() -> SimpleNamespace:
    """The hook of MkDocs."""
    spec = importlib.util.spec_from_file_location("documentation_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return SimpleNamespace(**vars(module))


def included() -> set[Path]:
    """Pages that stand inside others."""
    texts = [page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")]
    return {ROOT / name for text in texts for name in INCLUDE.findall(text)}


def navigation() -> list[str]:
    """Pages in the navigation, in order, as paths in docs."""

    class Loader(yaml.SafeLoader):
        """Takes the tags of MkDocs."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    entries: list[str] = []
    waiting = [yaml.load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]]
    while waiting:
        match waiting.pop(0):
            case str(path):
                entries.append(path)
            case dict(section):
                waiting = [*section.values(), *waiting]
            case list(parts):
                waiting = [*parts, *waiting]
    return entries
