"""What the recipes share and no user of the library needs: options, sweeps, benchmarks, the paper's
figures.
"""

import os
from pathlib import Path


def paths_for_children() -> dict[str, str]:
    """Variables with which a process of its own finds these modules."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
