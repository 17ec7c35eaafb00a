"""MkDocs: the READMEs are pages of the site, docstrings are read as their authors write them,
formulas are MathML.

Diagrams are drawn by Mermaid from the site itself where ``npm install --no-save mermaid`` has put
it into ``node_modules``, else by the copy that the theme loads from a server of others.
"""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

README = {
    "](docs/": "](",
    "](recipes/README.md)": "](recipes.md)",
    "[CITATION.cff](CITATION.cff)": "`CITATION.cff`",
}
PAGES = {
    "index.md": ("README.md", README),
    "recipes.md": ("recipes/README.md", {"](../docs/": "]("}),
}
PLACE = re.compile(
    r'id="(sj_robust[\w.]*)"|:(?:meth|class|func|data|mod|attr):<code>~?([\w.]+)</code>'
)
OVERWRITTEN = re.compile(
    r'<div class="jp-OutputArea-child">\s*<div [^>]*></div>\s*'
    r"<div [^>]*>\s*<pre>\r[^<]*\r</pre>\s*</div>\s*</div>"
)
MERMAID = Path(__file__).parents[1] / "node_modules/mermaid/dist/mermaid.min.js"
SEARCH = 'data-md-component="search" role="dialog"'
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, *, config: Any) -> Any:
    """Files of the site."""
    if MERMAID.is_file():
        files.append(File.generated(config, "assets/mermaid.min.js", abs_src_path=str(MERMAID)))
    return files


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Page with its theme around it: diagrams get Mermaid before the theme asks for it, the search
    dialog a name.
    """
    if MERMAID.is_file() and 'class="mermaid"' in output:
        address = "../" * page.url.count("/") + "assets/mermaid.min.js"
        output = output.replace("</head>", f'<script src="{address}"></script></head>', 1)
    return output.replace(SEARCH, f'{SEARCH} aria-label="Search"')


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Text of a page."""
    if page.file.src_uri not in PAGES:
        return markdown
    source, links = PAGES[page.file.src_uri]
    text = (Path(config.docs_dir).parent / source).read_text(encoding="utf-8")
    for written, inside in links.items():
        text = text.replace(written, inside)
    return text


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Page in HTML: formulas need no script, progress is left out, the roles of docstrings are
    links, and ``::`` before an example is a colon.

    Docstrings are written as in SpikingJelly, whose documentation is made by Sphinx.
    """
    html = FORMULA.sub(
        lambda found: convert(unescape(found[3]), display="inline" if found[2] == "(" else "block"),
        html,
    )
    html = OVERWRITTEN.sub(
        "", html
    )  # progress of a notebook, of which a reader in front of it sees one line at a time
    anchors = list(dict.fromkeys(re.findall(r'id="(sj_robust[\w.]*)"', html)))
    here = ""

    def place(match: re.Match[str]) -> str:
        nonlocal here
        anchor, name = match.groups()
        if anchor:
            here = anchor
            return match.group()
        target = _anchor_of(name, here, anchors)
        code = f"<code>{name}</code>"
        if target is None and name.startswith("sj_robust."):  # on another page, if at all
            return f'<autoref identifier="{name}" optional>{code}</autoref>'
        return f'<a href="#{target}">{code}</a>' if target else code

    return re.sub(r"::(</p>\s*<)", r":\1", PLACE.sub(place, html))


def _anchor_of(name: str, here: str, anchors: list[str]) -> str | None:
    """The anchor that a name means at a place: a member of what is described there, or the only one
    of this name.
    """
    parts = here.split(".")
    for length in range(len(parts), 0, -1):
        inside = ".".join([*parts[:length], name])
        if inside in anchors:
            return inside
    found = [anchor for anchor in anchors if anchor == name or anchor.endswith(f".{name}")]
    if not found and "." in name:  # named where it is defined, described where it is public
        found = [anchor for anchor in anchors if anchor.endswith(f".{name.rpartition('.')[2]}")]
    return found[0] if len(found) == 1 or name in found[:1] else None
