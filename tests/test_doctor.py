"""The doctor names everything a bug report needs."""

import subprocess
import sys

import torch

from sj_robust import __version__
from sj_robust.ops import available_backends


def test_report_of_the_command():
    command = [sys.executable, "-W", "ignore", "-m", "sj_robust.doctor"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = dict(line.split(maxsplit=1) for line in output.splitlines() if not line.startswith("backend"))
    assert lines["sj_robust"] == __version__
    assert lines["torch"].startswith(torch.__version__)
    for name, state in available_backends().items():
        assert any(line.startswith(f"backend {name} ") and line.endswith(state) for line in output.splitlines())
