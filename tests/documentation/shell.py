"""Commands of the documentation: run in bash, or parsed by the recipes' own parsers."""

import ast
import contextlib
import io
import json
import os
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from sj_robust.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
LIMIT = 600
"""Seconds that a command may take."""
STARTS = """
import json, os, pathlib, re, shlex, sys

state, program, *words = sys.argv[1:]
asked = json.loads(pathlib.Path(state, "asked").read_text())
added, only_options, modules, commands = asked
recipe = next((word for word in words if re.fullmatch(r"(\\./)?recipes/\\w+\\.py", word)), None)
if program == "sj-robust":
    recipe = commands.get(words[0])
name = recipe and pathlib.Path(recipe).stem
print(json.dumps([name, os.getcwd(), program, words]), file=open(pathlib.Path(state, "calls"), "a"))
if recipe:
    words += [word for one, text in added if one in (None, name) for word in shlex.split(text)]
if not only_options:
    os.execv(sys.executable, [sys.executable, *modules[program], *words])
"""
"""What stands for python and for what starts several of them: notes the call, and adds options to a
recipe's.
"""


@dataclass(frozen=True)
class Launcher:
    """A program that starts recipes: its module, its parser, and the words in front of what that
    parses.
    """

    module: str
    parser: str
    first: list[str]


LAUNCHERS = {
    "torchrun": Launcher(
        module="torch.distributed.run",
        parser="torch.distributed.run.get_args_parser",
        first=[],
    ),
    "accelerate": Launcher(
        module="accelerate.commands.accelerate_cli",
        parser="accelerate.commands.launch.launch_command_parser",
        first=["launch"],
    ),
}
MODULES = {"python": [], "python3": [], "sj-robust": ["-m", "sj_robust"]}
MODULES |= {name: ["-m", launcher.module] for name, launcher in LAUNCHERS.items()}

ALONE = re.compile(
    r"""(python3? (\./)?recipes/\w+\.py|sj-robust \w+)"""
    r"""( +([\w./:=,+-]+|'[^'#\n]*'|"[^"#$`\\\n]*"))*( +#.*)?"""
)
"""A recipe with its options in one line, all of them words that bash and shlex read alike."""


class CommandError(Exception):
    """A command that failed; the text says how."""


def logical_lines(code: str) -> list[tuple[int, str]]:
    """Commands with the offset of their first line: continued lines, loops and here-documents are
    one command.
    """
    commands: list[tuple[int, str]] = []
    lines = code.splitlines()
    parts: list[str] = []
    for number, line in enumerate(lines, 1):
        if not parts and (not line.strip() or line.lstrip().startswith("#")):
            continue
        parts.append(line)
        if number == len(lines) or complete("\n".join(parts)):
            commands.append((number - len(parts), "\n".join(parts)))
            parts = []
    return commands


def complete(text: str) -> bool:
    """Whether bash would not wait for a further line."""
    if text.endswith("\\"):
        return False
    command = ["env", "LC_ALL=C", "bash", "-n"]
    checked = subprocess.run(command, input=f"{text}\n", capture_output=True, text=True)
    return not re.search(r"unexpected end of file|unexpected EOF|here-document", checked.stderr)


class Shell:
    """The terminal of a page: in its folder are recipes and docs, and ``.venv/bin`` with the
    running interpreter.

    The folder that a command changes to and what it exports are kept for the next.
    """

    def __init__(self, folder: Path, state: Path) -> None:
        """Make the folder ready; ``state`` is another one, for notes."""
        for name in ("recipes", "docs"):
            (folder / name).symlink_to(ROOT / name)
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        (state / "starts.py").write_text(STARTS, encoding="utf-8")
        starts = f'exec "{sys.executable}" -IS "{state}/starts.py" "{state}"'
        texts = {name: f'{starts} {name} "$@"' for name in MODULES}
        refusal = "an example installs nothing; say above <!-- example: not run: installs -->"
        texts["pip"] = f"echo '{refusal}' >&2; exit 1"
        for name, text in texts.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
        path = [str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        # with several threads on a busy machine, waiting must not take their time
        self.environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
        self.environment |= {"PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT)}
        self.environment |= {"MPLBACKEND": "Agg", "COLUMNS": "100"}
        self.environment.pop("PYTEST_CURRENT_TEST", None)
        self.first_environment = self.environment
        self.where = folder
        self.state = state
        self.said = ""

    def run(
        self,
        command: str,
        added: tuple[tuple[str | None, str], ...] = (),
        *,
        only_options: bool = False,
        here: bool = False,
    ) -> list[str]:
        """Run a command that has to end well; returns the names of the recipes that it ran.

        They get the options of ``added`` that are meant for them, None for every one. Where only
        options are looked at, bash says what would run, and the recipes' parsers read it in this
        process. With ``here`` a command that is nothing but a recipe runs in this process, which
        has imported already what takes seconds, unless the commands before it have exported
        something.
        """
        if here and not only_options and not self.exported and ALONE.fullmatch(command):
            words = shlex.split(command, comments=True)
            self.said, recipe = run_here(self.where, words, added)
            return [recipe]
        commands = {name: command.recipe for name, command in COMMANDS.items()}
        asked = json.dumps([added, only_options, MODULES, commands])
        (self.state / "asked").write_text(asked, encoding="utf-8")
        (self.state / "calls").write_text("")
        self.run_in_bash(f"set -e\n{command}" if only_options else command)
        calls = [json.loads(line) for line in (self.state / "calls").read_text().splitlines()]
        recipes = []
        for recipe, where, program, words in calls:
            if only_options:
                _, recipe = run_here(Path(where), [program, *words], added, "--print_config")
            if recipe:
                recipes.append(recipe)
        return recipes

    @property
    def exported(self) -> set[str]:
        """Variables that commands have set."""
        changed = self.environment.items() - self.first_environment.items()
        return {name for name, _ in changed} - {"_", "PWD", "OLDPWD", "SHLVL"}

    def run_in_bash(self, command: str) -> None:
        """Run a command that has to end well, and keep what it leaves for the next."""
        left = f"env -0 > '{self.state}/environment'\npwd > '{self.state}/folder'"
        script = f"{command}\ncode=$?\n{left}\nexit $code"
        with subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", script],
            cwd=self.where,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                self.said = process.communicate(timeout=LIMIT)[0]
            except subprocess.TimeoutExpired as error:
                raise CommandError(f"took longer than {LIMIT} s") from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what a command left running, too
        if process.returncode != 0:
            raise CommandError(f"exit code {process.returncode}\n{self.said}")
        variables = (self.state / "environment").read_bytes().decode().split("\0")
        self.environment = dict(text.split("=", 1) for text in variables if "=" in text)
        self.where = Path((self.state / "folder").read_text().rstrip("\n"))


def run_here(
    where: Path, command: list[str], added: tuple[tuple[str | None, str], ...], *last: str
) -> tuple[str, str]:
    """Run the recipe of a command in this folder and process; returns what it said, and its
    name.
    """
    import launch  # imports torch, which has to find OMP_NUM_THREADS as conftest.py sets it

    said = io.StringIO()
    told = contextlib.redirect_stdout(said)
    warned = contextlib.redirect_stderr(said)
    with contextlib.chdir(where), told, warned:
        try:
            script, *words = without_launcher(command) or [""]
            recipe = re.fullmatch(r"(?:\./)?recipes/(\w+)\.py", script)
            if recipe is None or not Path(script).exists():
                raise CommandError(f"no command of a file of recipes/: {shlex.join(command)}")
            for name, options in added:
                if name in (None, recipe[1]):
                    words += shlex.split(options)
            launch.in_process(recipe[1], ".", *words, *last)
        except SystemExit as stop:
            if stop.code:
                raise CommandError(f"exit code {stop.code}\n{said.getvalue()}") from stop
        except (ValueError, OSError) as error:
            raise CommandError(f"{shlex.join(command)}\n{error}") from error
    return said.getvalue(), recipe[1]


def without_launcher(command: list[str]) -> list[str]:
    """A script and its options, without python or what starts several of them."""
    program, *words = command
    if program == "sj-robust" and words[:1] and words[0] in COMMANDS:
        meant = COMMANDS[words[0]]
        return [f"recipes/{meant.recipe}.py", *meant.words, *words[1:]]
    launcher = LAUNCHERS.get(program)
    if launcher is None or words[: len(launcher.first)] != launcher.first:
        return words
    parser = pkgutil.resolve_name(launcher.parser)()
    given = parser.parse_args(words[len(launcher.first) :])
    return [given.training_script, *given.training_script_args]


def check_names(code: str) -> None:
    """What a block that is not run names must exist: files of the repository, and extras in
    brackets.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for names in re.findall(r"(?:\.|sj_robust)\[([\w, -]+)\]", code):
        unknown = set(re.split(r", *", names)) - set(project["optional-dependencies"])
        if unknown:
            raise CommandError(f"there is no extra {unknown} in pyproject.toml")
    for path in re.findall(r"(?<![\w/.-])(?:recipes|tests)/[\w./-]*\w\.(?:py|ya?ml|md)\b", code):
        if not (ROOT / path).exists():
            raise CommandError(f"{path} does not exist")


def check_imports(code: str) -> None:
    """What a block of Python that is not run imports from the package must exist."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "sj_robust":
            try:
                exec(ast.unparse(node), {})
            except ImportError as error:
                raise CommandError(str(error)) from error
