"""Every public name has its place on the built site: ``python tests/packaging/check_site.py
FOLDER``.

The site's ``objects.inv`` lists what was really rendered: a head of four lines, then lines under
zlib, the name first in each.
"""

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from public_names import PUBLIC


def names_on(site):
    """What was rendered."""
    _, _, body = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    lines = zlib.decompress(body).decode().splitlines()
    return {line.split()[0] for line in lines if line}


def missing_from(found):
    missing = []
    for module, names in PUBLIC.items():
        for name in names:
            # A function that bears its file's name, such as attacks.apgd, is named by both.
            places = {f"{module}.{name}", f"{module}.{name}.{name}"}
            if places.isdisjoint(found):
                missing.append(f"{module}.{name}")
    return missing


if __name__ == "__main__":
    missing = missing_from(names_on(Path(sys.argv[1])))
    if missing != ["sj_robust.__version__"]:
        sys.exit(f"not on the site: {missing}; docs/api names modules, a constant has a docstring")
