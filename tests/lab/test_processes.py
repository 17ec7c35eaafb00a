"""The processes of a recipe."""

import pytest
from lab.processes import make_accelerator


def test_another_precision_of_accelerate_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.warns(UserWarning, match=r"bf16 is not used, but no: give the training --mixed-"):
        assert make_accelerator("cpu").mixed_precision == "no"
