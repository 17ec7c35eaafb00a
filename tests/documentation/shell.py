"""Commands of the documentation: run in bash, or parsed by the recipes' own parsers."""

import ast
import contextlib
import importlib
import importlib.util
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
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 600
"""Seconds that a command may take."""
STARTS = """
import json, os, pathlib, re, shlex, sys

state, program, *words = sys.argv[1:]
added, only_options, modules = json.loads(pathlib.Path(state, "asked").read_text())
recipe = next((word for word in words if re.fullmatch(r"(\\./)?recipes/\\w+\\.py", word)), None)
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

LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "torch.distributed.run.get_args_parser", []),
    "accelerate": (
        "accelerate.commands.accelerate_cli",
        "accelerate.commands.launch.launch_command_parser",
        ["launch"],
    ),
}
"""Programs that start recipes: their modules, parsers, and the words in front of what those
parse.
"""
MODULES = {"python": [], "python3": []} | {
    name: ["-m", module] for name, (module, _, _) in LAUNCHERS.items()
}

ALONE = re.compile(
    r"""python3? (\./)?recipes/\w+\.py( +([\w./:=,+-]+|'[^'#\n]*'|"[^"#$`\\\n]*"))*( +#.*)?"""
)
"""A recipe with its options in one line, all of them words that bash and shlex read alike."""


class CommandError(Exception):
    """A command that failed; the text says how."""


def logical_lines(code: str) -> list[tuple[int, str]]:
    """Commands with the offset of their first line: continued lines, loops and here-documents are
    one command.
    """
    commands: list[tuple[int, str]] = []
    lines, parts = code.splitlines(), []
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
    asked = {
        "input": text + "\n",
        "env": os.environ | {"LC_ALL": "C"},
        "capture_output": True,
        "text": True,
    }
    checked = subprocess.run(["bash", "-n"], check=False, **asked)
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
        for name in MODULES:
            script(
                programs / name,
                f'exec "{sys.executable}" -IS "{state}/starts.py" "{state}" {name} "$@"',
            )
        refusal = (
            "an example installs nothing; put <!-- example: not run: installs packages --> above"
        )
        script(programs / "pip", f"echo '{refusal}' >&2; exit 1")
        path = os.pathsep.join(
            [str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        )
        environment = os.environ | {
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "MPLBACKEND": "Agg",
            "COLUMNS": "100",
        }
        environment.setdefault(
            "OMP_WAIT_POLICY", "passive"
        )  # with several threads on a busy machine
        environment.pop("PYTEST_CURRENT_TEST", None)
        self.where, self.state, self.environment = folder, state, environment
        self.first_environment = environment

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
        changed = {name for name, _ in self.environment.items() - self.first_environment.items()}
        exported = changed - {"_", "PWD", "OLDPWD", "SHLVL"}
        if here and not (only_options or exported) and ALONE.fullmatch(command):
            program, *words = shlex.split(command, comments=True)
            self.said, recipe = run_here(self.where, program, words, added)
            return [recipe]
        (self.state / "asked").write_text(
            json.dumps([added, only_options, MODULES]), encoding="utf-8"
        )
        (self.state / "calls").write_text("")
        first = "set -e\n" if only_options else ""
        left = f"env -0 > '{self.state}/environment'\npwd > '{self.state}/folder'"
        with subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", f"{first}{command}\ncode=$?\n{left}\nexit $code"],
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
                said = process.communicate(timeout=LIMIT)[0]
            except subprocess.TimeoutExpired as error:
                raise CommandError(f"took longer than {LIMIT} s") from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what a command left running, too
        self.said = said
        if process.returncode != 0:
            raise CommandError(f"exit code {process.returncode}\n{said}")
        words = (self.state / "environment").read_bytes().decode().split("\0")
        self.environment = dict(word.split("=", 1) for word in words if "=" in word)
        self.where = Path((self.state / "folder").read_text().rstrip("\n"))
        calls = [json.loads(line) for line in (self.state / "calls").read_text().splitlines()]
        if only_options:
            return [
                run_here(Path(where), *call, added, "--print_config")[1]
                for _, where, *call in calls
            ]
        return [name for name, *_ in calls if name]


def run_here(
    where: Path,
    program: str,
    words: list[str],
    added: tuple[tuple[str | None, str], ...],
    *last: str,
) -> tuple[str, str]:
    """Run the recipe of a command in this folder and process; returns what it said, and its
    name.
    """
    import launch  # imports torch, which has to find OMP_NUM_THREADS as conftest.py sets it

    command = shlex.join([program, *words])
    unknown = CommandError(f"'options only' takes commands of recipes/*.py, got {command}")
    with (
        contextlib.chdir(where),
        contextlib.redirect_stdout(said := io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        try:
            if program in LAUNCHERS:
                _, parser, first = LAUNCHERS[program]
                if words[: len(first)] != first:
                    raise unknown
                given = pkgutil.resolve_name(parser)().parse_args(words[len(first) :])
                words = [given.training_script, *given.training_script_args]
            recipe = re.fullmatch(r"(?:\./)?(recipes/(\w+)\.py)", words[0]) if words else None
            if recipe is None:
                raise unknown
            if not Path(recipe[1]).exists():
                raise CommandError(f"{recipe[1]} does not exist")
            words += [
                word
                for one, text in added
                if one in (None, recipe[2])
                for word in shlex.split(text)
            ]
            launch.in_process(recipe[2], ".", *words[1:], *last)
        except SystemExit as stop:
            if stop.code:
                raise CommandError(f"exit code {stop.code}\n{said.getvalue()}") from stop
        except (ValueError, OSError) as error:
            raise CommandError(f"{command}\n{error}") from error
    return said.getvalue(), recipe[2]


def script(path: Path, text: str) -> None:
    """Write a program."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def check_names(code: str) -> None:
    """What a block that is not run names must exist: files of the repository, and extras in
    brackets.
    """
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for names in re.findall(r"(?:\.|sj_robust)\[([\w, -]+)\]", code):
        for name in names.split(","):
            if name.strip() not in extras:
                raise CommandError(
                    f"there is no extra {name.strip()!r} in pyproject.toml, only "
                    f"{', '.join(extras)}"
                )
    for path in re.findall(r"(?<![\w/.-])(?:recipes|tests)/[\w./-]*\w\.(?:py|ya?ml|md)\b", code):
        if not (ROOT / path).exists():
            raise CommandError(f"{path} does not exist")


def check_imports(code: str) -> None:
    """What a block of Python that is not run imports from the package must exist."""
    for statement in ast.walk(ast.parse(code)):
        if (
            isinstance(statement, ast.ImportFrom)
            and str(statement.module).split(".")[0] == "sj_robust"
        ):
            module = importlib.import_module(str(statement.module))
            for name in statement.names:
                submodule = f"{statement.module}.{name.name}"
                if not hasattr(module, name.name) and importlib.util.find_spec(submodule) is None:
                    raise CommandError(f"{statement.module} has no {name.name}")
