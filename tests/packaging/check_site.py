"""Every public name has its place on the built site: ``python tests/packaging/check_site.py
FOLDER``.

The site's ``objects.inv`` lists what was really rendered, which the text of ``docs/api`` alone does
not tell.
"""

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from public_names import PUBLIC

UNRENDERED = {"sj_robust.__version__"}


def rendered(site):
    """Names in the inventory of a site: a head of four lines, then lines under zlib, the name first
    in each.
    """
    head, _, body = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert head.startswith(b"# Sphinx inventory version 2"), f"{site}/objects.inv is no inventory"
    return {line.split()[0] for line in zlib.decompress(body).decode().splitlines() if line}


if __name__ == "__main__":
    found = rendered(Path(sys.argv[1]))
    wanted = {f"{module}.{name}" for module, names in PUBLIC.items() for name in names} - UNRENDERED
    # a function that bears its file's name, such as attacks.apgd, is hidden behind the file and
    # named by both
    missing = sorted(
        name for name in wanted if not {name, f"{name}.{name.rpartition('.')[2]}"} & found
    )
    if missing:
        sys.exit(
            f"not on the site: {', '.join(missing)}; docs/api names the modules, and a constant "
            "needs a docstring"
        )
    print(f"{len(wanted)} public names are on the site")
