"""Parallel tests take one thread each; coverage keeps its tracer, which pyautoattack and torch.compile take away."""

import os
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, one for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Gives the tracer back that stood before the test; without it coverage would miss every later test."""
    tracer = sys.gettrace()
    try:
        return (yield)
    finally:
        if sys.gettrace() is not tracer:
            sys.settrace(tracer)
