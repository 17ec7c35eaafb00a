"""What tests start: how a forked process ends."""

import sys
from functools import partial

from launch import forked


def fails():
    raise ValueError("no such thing")


def test_a_forked_function_ends_as_a_script_does(capfd):
    ends = (lambda: None, sys.exit, partial(sys.exit, 3), partial(sys.exit, "error: in a line"))
    assert forked(*ends, fails) == [0, 0, 3, 1, 1]
    err = capfd.readouterr().err
    assert "error: in a line\n" in err
    assert "ValueError: no such thing\n" in err
