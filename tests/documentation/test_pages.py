"""pytest finds every page, and the Chinese one has the blocks of the English one."""

import re
import tomllib

from documentation.pages import ROOT, blocks_of
from sybil import Document


def code_of(page):
    """The blocks of a page without their comments."""
    blocks = blocks_of(Document.parse(str(ROOT / page)))
    return [re.sub(r" *#.*", "", block.code) for block in blocks]


def test_every_page_is_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    paths = project["tool"]["pytest"]["ini_options"]["testpaths"]
    assert {"README.md", "CONTRIBUTING.md", "docs", "recipes"} <= set(paths)
    assert code_of("docs/quickstart_zh.md") == code_of("docs/quickstart.md")
