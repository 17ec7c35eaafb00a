"""Instruction sets and threads of the compiled kernel."""

import pytest
import torch

from sj_robust.ops.dlif import cpp


@pytest.fixture(params=cpp.instruction_sets() or ("baseline",))
def instruction_set(request, monkeypatch):
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=["reference", "eager", *(f"cpp {name}" for name in cpp.instruction_sets())])
def backend(request, monkeypatch):
    """Name of a backend; the compiled one counts once for every instruction set of this processor."""
    name, _, instruction_set = request.param.partition(" ")
    if instruction_set:
        monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, instruction_set)
    return name


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
