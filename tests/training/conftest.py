"""A fresh Accelerate for every test, and the run that nothing disturbs, which stopped and broken
ones must repeat.
"""

from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from training import small_run

from sj_robust.training import load_checkpoint


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Its folder, history, and weights by the name of their checkpoint; with dropout, which draws
    globally.
    """
    folder = tmp_path_factory.mktemp("whole")
    history, _ = small_run.run(folder, dropout=0.3)
    weights = {name: load_checkpoint(folder / name)["model"] for name in ("last.pt", "best.pt")}
    return SimpleNamespace(folder=folder, history=history, weights=weights)
