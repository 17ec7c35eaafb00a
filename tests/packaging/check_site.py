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

if __name__ == "__main__":
    _, _, body = Path(sys.argv[1], "objects.inv").read_bytes().partition(b"zlib.\n")
    found = {line.split()[0] for line in zlib.decompress(body).decode().splitlines() if line}
    missing = []
    for module, names in PUBLIC.items():
        # a function that bears its file's name, such as attacks.apgd, is named by both
        absent = [one for one in names if not {f"{module}.{one}", f"{module}.{one}.{one}"} & found]
        missing += [f"{module}.{name}" for name in absent]
    if missing != ["sj_robust.__version__"]:
        sys.exit(f"not on the site: {missing}; docs/api names modules, a constant has a docstring")
