"""Instruction sets and threads of the compiled kernel, and a GPU that is not there."""

import pytest
import torch
from ops.calls import KERNELS

from sj_robust.ops.dlif import cpp, cupy_launch, operator, triton_launch

CACHED = (
    triton_launch._triton_reason,
    cupy_launch._cupy_reason,
    operator._failure,
    operator._warn,
)


@pytest.fixture(params=["reference", "eager", *KERNELS])
def backend(request, monkeypatch):
    """Name of a backend; the compiled one counts once for every instruction set of this
    processor.
    """
    name, _, instruction_set = request.param.partition(" ")
    if instruction_set:
        monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, instruction_set)
    return name


@pytest.fixture(params=cpp.instruction_sets() or ("baseline",))
def instruction_set(request, monkeypatch):
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, request.param)
    return request.param


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
    for cached in CACHED:
        cached.cache_clear()
    yield monkeypatch
    for cached in CACHED:
        cached.cache_clear()
