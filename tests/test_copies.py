"""Tasks in copies of this process: results, what is told, errors, a killed copy."""

import multiprocessing
import os
import signal
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from sj_robust.core.copies import in_copies, possible_copies

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux copies processes")
SHARED = torch.ones(3)


def slope(number, tell):
    """A gradient by what this process has, and where it was computed."""
    x = (SHARED * number).requires_grad_()
    (x**2).sum().backward()
    tell(number, "told")
    return number, x.grad.tolist(), os.getpid(), torch.get_num_threads()


@pytest.mark.parametrize(("count", "copies"), [(5, 1), (5, 2), (2, 3), (0, 2)])
def test_results_and_what_is_told(count, copies):
    told = []
    found = dict(in_copies(slope, count, copies, lambda *what: told.append(what)))
    assert {number: one[:2] for number, one in found.items()} == {
        number: (number, [2.0 * number] * 3) for number in range(count)
    }
    assert sorted(told) == [(number, "told") for number in range(count)]
    elsewhere = {one[2] for one in found.values()} - {os.getpid()}
    assert bool(elsewhere) == (1 < copies <= count)
    if elsewhere:
        assert {one[3] for one in found.values()} == {1}


def fails(number, tell):
    if number == 1:
        raise ValueError("this one")
    return number


def dies(number, tell):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("task", "error"), [(fails, ValueError), (dies, BrokenProcessPool)])
def test_the_first_error_ends_all(task, error):
    before = set(multiprocessing.active_children())
    with pytest.raises(error):
        list(in_copies(task, 4, 2, print))
    assert set(multiprocessing.active_children()) <= before


def test_who_leaves_stops_the_copies():
    before = set(multiprocessing.active_children())
    found = in_copies(slope, 40, 2, lambda *what: None)
    next(found)
    found.close()
    assert set(multiprocessing.active_children()) <= before


def test_as_many_as_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(os, "sysconf", lambda name: 2**20)
    assert possible_copies() == 2
    monkeypatch.setattr(os, "sysconf", lambda name: 1)  # no memory
    assert possible_copies() == 1
    monkeypatch.setattr(os, "sysconf", lambda name: 2**20)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert possible_copies() == 1
