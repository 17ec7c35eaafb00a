"""Add a built site to a checkout of the branch gh-pages.

python .github/add_version.py SITE PAGES VERSION /REPOSITORY

Every version has a folder, ``latest`` is a copy of the newest release, and ``versions.json`` feeds
the version menu of the theme.
"""

import json
import shutil
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

REDIRECT = """<!DOCTYPE html>
<meta http-equiv="refresh" content="0; url={0}/">
<a href="{0}/">{0}</a>
"""


def releases_in(pages: Path) -> list[str]:
    """The versions that are there, newest first."""
    found = []
    for folder in pages.iterdir():
        try:
            found.append(Version(folder.name))
        except InvalidVersion:  # dev, latest, and what is no version
            continue
    return [str(version) for version in sorted(found, reverse=True)]


def add(site: Path, pages: Path, version: str, root: str) -> None:
    """Put the site into its folder, and bring menu and front page up to date."""
    shutil.rmtree(pages / version, ignore_errors=True)
    shutil.copytree(site, pages / version)
    releases = releases_in(pages)
    front = "latest" if releases else version
    if releases and releases[0] == version:
        shutil.rmtree(pages / "latest", ignore_errors=True)
        shutil.copytree(site, pages / "latest")
    menu = []
    if releases:
        menu.append({"version": releases[0], "url": f"{root}/latest/", "preferred": True})
    names = ["dev"] if (pages / "dev").is_dir() else []
    menu += [{"version": name, "url": f"{root}/{name}/"} for name in [*names, *releases[1:]]]
    (pages / "versions.json").write_text(json.dumps(menu, indent=2) + "\n", encoding="utf-8")
    (pages / "index.html").write_text(REDIRECT.format(front), encoding="utf-8")
    (pages / ".nojekyll").touch()


if __name__ == "__main__":
    add(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
