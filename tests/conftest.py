"""Keeps what a tracer saw: pyautoattack and torch.compile take it away, and coverage would miss every later test."""

import sys

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Gives the tracer back that stood before the test."""
    tracer = sys.gettrace()
    try:
        return (yield)
    finally:
        if sys.gettrace() is not tracer:
            sys.settrace(tracer)
