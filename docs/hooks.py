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
ROLE = re.compile(r":(?:meth|class|func|data|mod|attr):<code>~?([\w.]+)</code>")
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
    """Page in HTML: formulas need no script, the roles of docstrings are links, and ``::`` before
    an example is a colon.

    Docstrings are written as in SpikingJelly, whose documentation is made by Sphinx.
    """

    def formula(found: re.Match[str]) -> str:
        return convert(unescape(found[3]), display="inline" if found[2] == "(" else "block")

    anchors = set(re.findall(r'id="(sj_robust[\w.]*)"', html))

    def link(found: re.Match[str]) -> str:
        """To what alone bears the name on this page, or to the full name on another one."""
        name = found[1]
        here = [anchor for anchor in anchors if f".{anchor}".endswith(f".{name}")]
        target = here[0] if len(here) == 1 else name
        if not target.startswith("sj_robust."):
            return f"<code>{name}</code>"
        return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'

    html = ROLE.sub(link, FORMULA.sub(formula, html))
    return re.sub(r"::(</p>\s*<)", r":\1", html)
