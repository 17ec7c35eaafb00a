"""Sphinx: ``sphinx-build -b dirhtml docs site``."""

import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util.logging import getLogger
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "tests")]

from public_names import PUBLIC  # noqa: E402  after the path

from sj_robust import __version__  # noqa: E402  after the path

project = "sj_robust"
author = copyright = "sj_robust contributors"
version = release = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["benchmarks/README.md", "concepts/architecture.md", "mutation.md"]
"""What only contributors read, in the repository."""
nitpicky = True

# Pages
myst_enable_extensions = ["colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 4
nb_execution_mode = os.environ.get("NOTEBOOKS", "force")  # off: while you write pages
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_output_stderr = "remove"  # messages of torch

# Docstrings
autodoc_default_options = {"members": True, "member-order": "bysource"}
napoleon_use_ivar = True
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
INVENTORIES = {
    "python": "https://docs.python.org/3",
    "torch": "https://docs.pytorch.org/docs/stable",
    "numpy": "https://numpy.org/doc/stable",
}
if "GITHUB_ACTIONS" in os.environ:  # elsewhere the site is built without a network
    intersphinx_mapping = {name: (address, None) for name, address in INVENTORIES.items()}
nitpick_ignore_regex = [("py:.*", r"(?!sj_robust\.).*")]
nitpick_ignore = [
    ("py:class", f"sj_robust.{name}")  # of annotations
    for name in (
        "data.stored.FileImages",
        "data.stored.StoredImages",
        "estimators.naming.EstimatorName",
        "evaluation.run.plain.Plain",
        "neuron.charging.Charging",
        "ops.dlif.config.Outputs",
        "perturbation.intensity.Association",
        "proofs.certificates.Proof",
        "proofs.differentiable.DifferentiableBounds",
        "proofs.rules.Bounds",
    )
]

# Looks
html_theme = "pydata_sphinx_theme"
html_title = "sj_robust"
html_static_path = ["custom.css"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_sidebars = {"index": []}
html_theme_options = {
    "navbar_persistent": ["search-button"],
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 7,
    "show_nav_level": 2,
    "show_toc_level": 2,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "footer_start": ["copyright"],
    "footer_end": [],
}
if "SITE_VERSION" in os.environ:  # as .github/workflows/docs.yml publishes it
    html_theme_options |= {
        "navbar_end": ["version-switcher", "theme-switcher", "navbar-icon-links"],
        "github_url": f"https://github.com/{os.environ['GITHUB_REPOSITORY']}",
        "check_switcher": False,
        "show_version_warning_banner": True,
        "switcher": {
            "json_url": f"/{os.environ['GITHUB_REPOSITORY'].partition('/')[2]}/versions.json",
            "version_match": os.environ["SITE_VERSION"],
        },
    }

README = {"](docs/": "](", "](recipes/README.md)": "](recipes.md)"}
INCLUDED = {
    "index": ("README.md", README),
    "recipes": ("recipes/README.md", {"](../docs/": "]("}),
}
"""Pages made of a README, and its links as they are on the site."""


def include_readme(app: Any, page: str, source: list[str]) -> None:
    """Put the parts of a README between the lines of its page."""
    if page not in INCLUDED:
        return
    name, links = INCLUDED[page]
    text = (ROOT / name).read_text(encoding="utf-8")
    for written, inside in links.items():
        text = text.replace(written, inside)
    for number, part in enumerate(re.split(r"<!-- site: \w+ -->", text)):
        source[0] = source[0].replace(f"% {name}, part {number}\n", part)


def plain(app: Any, what: str, name: str, one: Any, options: Any, text: list[str]) -> None:
    """In a shape such as [T, N, *], the star begins no emphasis; a source is one paragraph."""
    source = False
    for place, line in enumerate(text):
        source = line.startswith("Source: ") or (source and line.startswith("  "))
        line = line.strip().replace("Source:", "**Source:**", 1) if source else line
        text[place] = re.sub(r"(?<=[\[ ])\*\](?!`)", r"\\*]", line)


def inline_formula(writer: Any, node: Any) -> None:
    """A formula as MathML, which browsers draw without a script or a font."""
    writer.body.append(convert(node.astext()))
    raise SkipNode


def formula(writer: Any, node: Any) -> None:
    """A formula on a line of its own."""
    box = '<div class="formula" role="group" aria-label="formula" tabindex="0">'  # it may scroll
    writer.body.append(f"{box}{convert(node.astext(), display='block')}</div>")
    raise SkipNode


@cache
def documented(environment: Any) -> dict[str, list[str]]:
    """Full names by their last part, once all pages are read."""
    found: dict[str, list[str]] = {}
    for full in environment.domains["py"].objects:
        found.setdefault(full.rpartition(".")[2], []).append(full)
    return found


def short_name(app: Any, environment: Any, node: Any, content: Any) -> Any:
    """Reference to the one documented object that has this name, wherever it was imported from."""
    name = node.get("reftarget", "").rpartition(".")[2]
    found = documented(environment).get(name, [])
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    place = environment.domains["py"].objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, content)


def check_public_names(app: Any, environment: Any) -> None:
    """Warn of public names without a place on the site. What a package takes from a module of its
    own may have its place there.
    """
    for module, names in PUBLIC.items():
        for name in names:
            places = documented(environment).get(name, [])
            is_there = any(place.startswith(f"{module}.") for place in places)
            if not is_there and name != "__version__":
                getLogger(__name__).warning(
                    f"{module}.{name} is not on the site: docs/api names modules, a constant has "
                    "a docstring"
                )


def lines_of_signatures(app: Any, page: str, template: str, context: Any, tree: Any) -> None:
    """Parameters on lines of their own are no list of definitions, as screen readers take <dl>."""

    def lines(found: re.Match[str]) -> str:
        inside = found[1].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
        return f"<span>{inside}</span>"

    context["body"] = re.sub(r"<dl>(.*?)</dl>", lines, context.get("body", ""), flags=re.DOTALL)


def copy_leaderboard(app: Any, error: Exception | None) -> None:
    """The leaderboard that can be sorted, under the address that it has in the repository."""
    if error is None and app.builder.format == "html":
        path = Path("results/leaderboard/leaderboard.html")
        shutil.copy(ROOT / "docs" / path, app.outdir / path)


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("source-read", include_readme)
    app.connect("autodoc-process-docstring", plain)
    app.connect("env-check-consistency", check_public_names)
    app.connect("missing-reference", short_name)
    app.connect("html-page-context", lines_of_signatures)
    app.connect("build-finished", copy_leaderboard)
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
