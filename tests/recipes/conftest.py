import importlib
import sys

import pytest
from accelerate.state import AcceleratorState
from evaluation.recipe_run import working_folder
from lab.command_line import run_recipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A working folder with a run of two small networks in it, and a module with networks of
    somebody's own.
    """
    folder = tmp_path_factory.mktemp("work")
    working_folder(folder)
    return folder


@pytest.fixture
def ended(tmp_path, monkeypatch, capsys):
    """A function that runs a recipe as its script does, and returns exit code, stdout and
    stderr.
    """
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        code = 0
        try:
            run_recipe(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code
        finally:
            AcceleratorState._reset_state(True)
        out, err = capsys.readouterr()
        if isinstance(code, str):  # which Python prints, and ends with 1
            code, err = 1, err + code + "\n"
        return code, out, err

    return call
