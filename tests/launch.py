"""Recipes and scripts started by tests: in this process, or as processes that hear Ctrl-C."""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[1]
RECIPES = ("adv_train", "evaluate", "sweep", "figures", "benchmark")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "100",
    "PYTHONUNBUFFERED": "1",
}
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# SpikingJelly 0.0.0.0.14 uses what torch has deprecated since.
STRICT = ("-W", "error", "-W", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def unboxed(text):
    """What tyro says in boxes, in one line."""
    return " ".join(re.sub("[─│╭╮╯╰]|-{5,}", " ", text).split())


def in_process(name, folder, *options):
    """A recipe without a process of its own, which takes seconds to start."""
    with contextlib.chdir(folder):
        try:
            importlib.import_module(name).main(list(options))
        finally:
            AcceleratorState._reset_state(True)


def start(name, folder, *options, launcher=STRICT):
    """A recipe as a process, the leader of its group."""
    command = [sys.executable, *launcher, str(ROOT / "recipes" / f"{name}.py"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell may have started the tests in the background, where SIGINT is ignored; a child would
    # inherit that.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, start_new_session=True, preexec_fn=hears, **pipes
    )


def finish(process, code=0):
    """What a process says on stdout and on stderr until it ends."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def wait_until(condition, what, process=None):
    """Wait for something to happen while a process runs."""
    for _ in range(10_000):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)
    pytest.fail(f"{what} did not happen")


def script(path, *arguments):
    """A script of the tests to its end."""
    command = [sys.executable, str(path), *map(str, arguments)]
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def forked(*functions):
    """Exit codes of functions in processes of their own, which a script has forked since imports
    take seconds.
    """
    children = []
    for function in functions:
        if not (child := os.fork()):
            function()
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def two_processes(function):
    """Exit codes of a function in two forked processes that form a group (gloo)."""

    def join(rank):
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/group", rank=rank, world_size=2
        )
        function()
        if torch.distributed.is_initialized():  # a recipe has ended it already
            torch.distributed.barrier()  # a process that leaves early aborts the others
            torch.distributed.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        return forked(*(partial(join, rank) for rank in range(2)))
