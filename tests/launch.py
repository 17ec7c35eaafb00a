"""Recipes and scripts started by tests: in this process, or as processes that hear Ctrl-C."""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
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


def forked(*functions):
    """Exit codes of functions in processes of their own, forked since imports take seconds."""
    children = [fork(function) for function in functions]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def fork(function):
    """A process that calls a function and ends with 0, or what a script would end with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: others have threads
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forked:
    """A recipe in a forked process, the leader of its group, in place of what Popen starts."""

    def __init__(self, name, folder, *options):
        self.command = [f"{name}.py", *options]
        self.folder = folder
        self.returncode = None
        read, self.write = os.pipe()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by communicate
        self.pid = fork(self.run)
        os.close(self.write)
        self.stdout = os.fdopen(read)

    def run(self):
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(self.write, 1)
        os.dup2(self.errors.fileno(), 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  for good
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  for good
        sys.argv = self.command
        os.chdir(self.folder)
        recipe = importlib.import_module(self.command[0].removesuffix(".py"))
        importlib.import_module("lab.command_line").run_recipe(recipe.main)

    def poll(self, flags=os.WNOHANG):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, flags)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout=600):
        """What it says until it ends; after so many seconds it is killed with its children."""
        limit = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        limit.start()
        out = self.stdout.read()
        self.poll(0)
        limit.cancel()
        self.stdout.close()
        with self.errors as errors:
            errors.seek(0)
            return out, errors.read()


def two_processes(function):
    """Exit codes of a function in two forked processes that form a group (gloo)."""

    def join(rank):
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        AcceleratorState._reset_state(True)
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/group", rank=rank, world_size=2
        )
        function()
        if torch.distributed.is_initialized():  # a recipe has ended it already
            torch.distributed.barrier()  # a process that leaves early aborts the others
            torch.distributed.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        return forked(*(partial(join, rank) for rank in range(2)))
