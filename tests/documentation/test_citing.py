"""The package is cited by its name and its version, on the page and in the file for programs."""

import re

import yaml
from documentation.pages import ROOT

from sj_robust import __version__

PAGE = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_entry_of_the_package_has_its_version_and_that_of_the_file():
    entry = re.search(r"@software\{sj_robust,\n(.*?)\n\}", PAGE, re.DOTALL)[1]
    values = dict(re.findall(r"(\w+) += \{(.*)\}", entry))
    assert values["version"] == __version__ == CITATION["version"]
    assert values["title"].replace("\\_", "_") == CITATION["title"]
    assert values["author"].strip("{}").replace("\\_", "_") == CITATION["authors"][0]["name"]


def test_every_reference_of_the_file_is_an_entry_of_the_page():
    for reference in CITATION["references"]:
        assert reference["title"] in PAGE
