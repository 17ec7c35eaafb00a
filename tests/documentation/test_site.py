"""What publishes the site."""

import json
import runpy

import pytest
from documentation.pages import ROOT


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<p>new", encoding="utf-8")
    (tmp_path / "pages").mkdir()
    return tmp_path / "site"


def test_every_version_has_a_folder_and_a_line_in_the_menu(site):
    add = runpy.run_path(str(ROOT / ".github" / "add_version.py"))["add"]
    pages = site.with_name("pages")
    add(site, pages, "dev", "/project")
    assert "url=dev/" in (pages / "index.html").read_text(encoding="utf-8")
    for version in ("0.2.0", "0.10.0", "0.1.0", "dev"):
        (site / "index.html").write_text(version, encoding="utf-8")
        add(site, pages, version, "/project")
        assert (pages / version / "index.html").read_text(encoding="utf-8") == version
    menu = json.loads((pages / "versions.json").read_text(encoding="utf-8"))
    assert [line["version"] for line in menu] == ["0.10.0", "dev", "0.2.0", "0.1.0"]
    assert menu[0]["preferred"]
    assert menu[0]["url"] == "/project/latest/"
    assert (pages / "latest" / "index.html").read_text(encoding="utf-8") == "0.10.0"
    assert "url=latest/" in (pages / "index.html").read_text(encoding="utf-8")
