"""Instruction sets and threads of the compiled kernel, and a GPU that is not there."""

from types import SimpleNamespace

import pytest
import torch
from ops.calls import KERNELS, choose

from sj_robust.ops.dlif import cpp, cupy_launch, operator, triton_launch


@pytest.fixture(params=cpp.instruction_sets() or ("baseline",))
def instruction_set(request, monkeypatch):
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=["reference", "eager", *KERNELS])
def backend(request, monkeypatch):
    """Name of a backend; the compiled one counts once for every instruction set of this
    processor.
    """
    return choose(monkeypatch, request.param)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU and a torch for it, as far as anybody asks."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    remembered = (
        triton_launch._triton_reason,
        cupy_launch._cupy_reason,
        operator._failure,
        operator._warn,
    )
    for cached in remembered:
        cached.cache_clear()
    yield monkeypatch
    for cached in remembered:
        cached.cache_clear()


@pytest.fixture
def import_that_raises(monkeypatch):
    """Makes the import of a launcher's package fail."""

    def fail(launcher, error):
        def import_module(name):
            raise error

        monkeypatch.setattr(launcher, "importlib", SimpleNamespace(import_module=import_module))
        for cached in (triton_launch._triton_reason, cupy_launch._cupy_reason):
            cached.cache_clear()

    return fail
