"""README and docs are tests as well; ``-m quick`` is what a user needs to trust an installation;
parallel tests take one thread each, no test waits for the disk, collection does without the garbage
collector, and coverage keeps its tracer.
"""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from documentation.pages import PAGES, is_slow
from sybil.integration.pytest import SybilItem

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, one for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent
QUICK = [
    "README.md",
    "sj_robust",  # the example of each public call: evaluations, proofs and a training among them
    "tests/attacks/test_budget.py",  # every attack
    "tests/estimators/test_backward.py",
    "tests/evaluation/test_own_network.py",
    "tests/models/test_shipped.py",
    "tests/neuron/test_dlif.py",
    "tests/neuron/test_replacement.py",
    "tests/ops/test_kernels.py",  # every backend that is there
    "tests/ops/test_trains.py",
    "tests/perturbation/test_monitor.py",
    "tests/proofs/test_networks.py",  # every method
    "tests/test_classifier.py",
    "tests/training/test_training_step.py",
]
"""Files and folders whose tests are quick, but for those marked slow: a cross-section."""

pytest_collect_file = PAGES.pytest()
collect_ignore_glob = ["docs/*.py", "docs/*/*.py", "recipes/studies/*.py", "tests/packaging/*.py"]
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("sj_robust/ops/*/triton_kernel.py")
if importlib.util.find_spec("spikingjelly.activation_based.model.spikformer") is None:
    collect_ignore_glob.append("recipes/configs/certified/spikformer.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A page is quick or slow as a whole, since its blocks need each other."""
    for item in items:
        if isinstance(item, SybilItem) and is_slow(item.example.document):
            item.add_marker(pytest.mark.slow)
        if is_quick(item.path) and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.quick)


def is_quick(path):
    """Whether a file is one of those whose tests are quick."""
    return any(path.is_relative_to(ROOT / name) for name in QUICK)


def pytest_ignore_collect(collection_path, config):
    """Where quick tests alone are asked for, other files are not read."""
    others = collection_path.is_file() and not is_quick(collection_path)
    return True if config.option.markexpr == "quick" and others else None


def pytest_configure():
    """Tests end processes, never the power: nothing waits until the disk has what was written."""
    os.fsync = lambda handle: None


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Garbage is looked for once, at the end: on the way it takes a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """What was imported stays for good: garbage is not looked for among its million objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], 200)


def pytest_sessionfinish():
    """Extensions complain of what is left when Python ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def short_evaluations(request):
    """The example of an evaluation in a docstring has short attacks."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    from evaluation.short_suite import shortened

    with shortened():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Gives back the tracer that stood before the test: pyautoattack and torch.compile take it
    away.
    """
    tracer = sys.gettrace()
    try:
        return (yield)
    finally:
        if sys.gettrace() is not tracer:
            sys.settrace(tracer)
