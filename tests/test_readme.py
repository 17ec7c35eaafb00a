"""The README's Python blocks run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_a_block_for_each_use():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=["neuron", "monitor", "attack"])
def test_block_runs(block):
    exec(compile(block, "README.md", "exec"), {})
