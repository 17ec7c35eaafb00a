"""README and docs are tests as well; parallel tests take one thread each, no test waits for the
disk, collection does without the garbage collector, and coverage keeps its tracer.
"""

import gc
import importlib.util
import os
import sys

import pytest
from documentation.pages import PAGES, is_slow
from sybil.integration.pytest import SybilItem

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, one for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_collect_file = PAGES.pytest()
collect_ignore_glob = ["docs/*.py", "docs/*/*.py", "tests/packaging/*.py"]
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("sj_robust/ops/dlif/triton_kernel.py")
if importlib.util.find_spec("spikingjelly.activation_based.model.spikformer") is None:
    collect_ignore_glob.append("recipes/configs/certified/spikformer.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A page is quick or slow as a whole, since its blocks need each other."""
    for item in items:
        if isinstance(item, SybilItem) and is_slow(item.example.document):
            item.add_marker(pytest.mark.slow)


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
