"""Run the examples of the documentation.

python tests/documentation/examples.py                      # every page with blocks
python tests/documentation/examples.py README.md docs/concepts/stability.md

A page is a script: its blocks of python, pycon, bash and sh run in order, in one temporary folder with links to recipes
and docs. Blocks of Python share a namespace, commands a terminal. A block whose first line is a comment with a file's
name alone (# mynet.py, # mine.yaml) is saved under that name first, so that later commands find it. Warnings are errors
in Python blocks, as pyproject.toml has it. Above a fence may stand:

<!-- example: add --epochs 1 --train-limit 200 -->    options behind every recipe's command, so that it takes seconds
<!-- example: add to evaluate.py: --suite fast -->    the same for one recipe; several such lines may follow each other
<!-- example: options only: needs CIFAR-10 -->        the recipes' parsers check the options, nothing is run
<!-- example: not run: installs packages -->          only files and extras that the block names are checked
"""

import argparse
import builtins
import contextlib
import doctest
import io
import os
import re
import sys
import tempfile
import tomllib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])  # as pytest has it
from documentation.pages import FILE_NAME, ROOT, Block, PageError, blocks_of, documentation_pages, name_of
from documentation.shell import CommandError, Shell, check_imports, check_names, logical_lines, with_options


class ExampleError(AssertionError):
    """A block that does not do what the page says; the text begins with page and line."""


def pages_with_blocks() -> list[Path]:
    """Pages on which there is something to run or to check; those that only include other files have none."""
    return [page for page in documentation_pages() if re.search(r"^ *(```|~~~|<!-- example)", page.read_text(), re.M)]


def run_page(page: Path) -> None:
    """Run a page from top to bottom; raises PageError or ExampleError at what is wrong first."""
    blocks = blocks_of(page)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as state, in_folder(Path(folder)):
        shell = Shell(Path(folder), Path(state))
        namespace: dict[str, Any] = {"__name__": "example"}
        for block in blocks:
            if name := FILE_NAME.match(block.code):
                Path(folder, name[1]).write_text(block.code, encoding="utf-8")
            if block.how is not None and block.reason("not run") is not None:
                check(block)
            elif block.how == "shell":
                run_commands(block, shell)
            elif block.how is not None:
                (run_python if block.how == "python" else run_session)(block, namespace)


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Be in a folder as a script there is, with pyproject's warnings; leave the process as it was."""
    path, modules = list(sys.path), set(sys.modules)
    with contextlib.chdir(folder), warnings.catch_warnings():
        set_warnings()
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path[:] = path
            for name in set(sys.modules) - modules:
                if str(getattr(sys.modules[name], "__file__", None)).startswith(f"{folder}/"):
                    del sys.modules[name]
            if "matplotlib.pyplot" in sys.modules:
                sys.modules["matplotlib.pyplot"].close("all")


def set_warnings() -> None:
    """Filters in pyproject.toml, in its order: the later one wins."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    for text in options["filterwarnings"]:
        action, message, category = [*text.split(":"), "", ""][:3]
        warnings.filterwarnings(action, message, getattr(builtins, category, Warning))


def check(block: Block) -> None:
    """Check what can be checked in a block that is not run: files and extras, or syntax and imports."""
    try:
        if block.how == "shell":
            check_names(block.code)
        elif block.how == "python":
            check_imports(block.code)
    except (CommandError, SyntaxError) as error:
        raise ExampleError(f"{block.place}: in a block that is not run: {error}") from error


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block of Python; lines in errors are those of the page."""
    said = io.StringIO()
    try:
        code = compile("\n" * block.line + block.code, block.page, "exec")
        with contextlib.redirect_stdout(said):
            exec(code, namespace)
    except SyntaxError as error:
        raise ExampleError(f"{block.page}:{error.lineno}: {error}") from error
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == block.page]
        line = frames[-1].lineno if frames else block.line
        text = "".join(traceback.format_exception(error)).rstrip()
        statement = (block.code.splitlines()[(line or 0) - block.line - 1 :] or [""])[0].strip()
        raise ExampleError(
            f"{block.page}:{line}: in the python block at line {block.line}: {statement}\n{said.getvalue()}{text}"
        ) from error


def run_session(block: Block, namespace: dict[str, Any]) -> None:
    """Check a session as doctest does, spaces aside."""
    test = doctest.DocTestParser().get_doctest(block.code, namespace, "session", block.page, block.line)
    if not test.examples:
        raise ExampleError(f"{block.place}: no >>> in this pycon block")
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST)
    if runner.run(test, out=said.write, clear_globs=False).failed:
        text = said.getvalue()
        line = re.search(r"^File .*, line (\d+)", text, re.MULTILINE)
        place = f"{block.page}:{line[1] if line else block.line}"
        raise ExampleError(f"{place}: in the pycon block at line {block.line}:\n{text}")
    namespace.update(test.globs)


def run_commands(block: Block, shell: Shell) -> None:
    """Run the commands of a block one after the other, or do what its directive says instead."""
    commands = logical_lines(block.code)
    if not commands:
        raise ExampleError(f"{block.place}: no command in this block")
    added = {directive: 0 for directive in block.directives if directive.kind == "add"}
    parsed = 0
    for offset, command in commands:
        place = f"{block.page}:{block.line + 1 + offset}"
        try:
            if block.reason("options only") is not None:
                parsed += shell.parse(command)
                continue
            for directive in added:
                added[directive] += with_options(command, (directive,)) != command
            command = with_options(command, block.directives)
            shell.run(command)
        except CommandError as error:
            raise ExampleError(f"{place}: in the block at line {block.line}: {command}\n{error}") from error
    if block.reason("options only") is not None and not parsed:
        raise ExampleError(f"{block.place}: 'options only' above a block without a recipe's command")
    for directive, times in added.items():
        if not times:
            raise ExampleError(f"{block.page}:{directive.line}: 'add' finds no command of its recipe in the block")


def main(arguments: list[str]) -> int:
    """Run pages and say which fail; returns the exit code."""
    description, _, more = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="Markdown files; without any, all")
    pages = [page.resolve() for page in parser.parse_args(arguments).pages] or pages_with_blocks()
    failed = 0
    for page in pages:
        start, fault = sum(os.times()[:4]), None
        try:
            run_page(page)
        except (PageError, ExampleError) as error:
            fault = error
            failed += 1
        print(f"{'FAILED' if fault else 'passed'} {name_of(page)} ({sum(os.times()[:4]) - start:.1f} s)", flush=True)
        if fault:
            print(fault, flush=True)
    print(f"{len(pages) - failed} of {len(pages)} pages passed; times are of the processor")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
