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
        self.environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "MPLBACKEND": "Agg"}
        self.environment |= {"PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT)}
        self.environment |= {"COLUMNS": "100"}
        self.environment.pop("PYTEST_CURRENT_TEST", None)
        self.where, self.state, self.first_environment = folder, state, self.environment
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
        changed = {name for name, _ in self.environment.items() - self.first_environment.items()}
        exported = changed - {"_", "PWD", "OLDPWD", "SHLVL"}
        if here and not (only_options or exported) and ALONE.fullmatch(command):
            words = shlex.split(command, comments=True)
            self.said, recipe = run_here(self.where, words, added)
            return [recipe]
        asked = json.dumps([added, only_options, MODULES])
        (self.state / "asked").write_text(asked, encoding="utf-8")
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
                self.said = process.communicate(timeout=LIMIT)[0]
            except subprocess.TimeoutExpired as error:
                raise CommandError(f"took longer than {LIMIT} s") from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what a command left running, too
        if process.returncode != 0:
            raise CommandError(f"exit code {process.returncode}\n{self.said}")
        words = (self.state / "environment").read_bytes().decode().split("\0")
        self.environment = dict(word.split("=", 1) for word in words if "=" in word)
        self.where = Path((self.state / "folder").read_text().rstrip("\n"))
        calls = [json.loads(line) for line in (self.state / "calls").read_text().splitlines()]
        if only_options:
            return [
                run_here(Path(where), [program, *words], added, "--print_config")[1]
                for _, where, program, words in calls
            ]
        return [name for name, *_ in calls if name]


def run_here(
    where: Path, command: list[str], added: tuple[tuple[str | None, str], ...], *last: str
) -> tuple[str, str]:
    """Run the recipe of a command in this folder and process; returns what it said, and its
    name.
    """
    import launch  # imports torch, which has to find OMP_NUM_THREADS as conftest.py sets it

    program, *words = command
    said = io.StringIO()
    outputs = contextlib.redirect_stdout(said), contextlib.redirect_stderr(said)
    with contextlib.chdir(where), outputs[0], outputs[1]:
        try:
            if program in LAUNCHERS:
                _, parser, first = LAUNCHERS[program]
                if words[: len(first)] == first:
                    given = pkgutil.resolve_name(parser)().parse_args(words[len(first) :])
                    words = [given.training_script, *given.training_script_args]
            recipe = re.fullmatch(r"(?:\./)?recipes/(\w+)\.py", words[0] if words else "")
            if recipe is None or not Path(words[0]).exists():
                raise CommandError(f"no command of a file of recipes/: {shlex.join(command)}")
            for one, text in added:
                words += shlex.split(text) if one in (None, recipe[1]) else []
            launch.in_process(recipe[1], ".", *words[1:], *last)
        except SystemExit as stop:
            if stop.code:
                raise CommandError(f"exit code {stop.code}\n{said.getvalue()}") from stop
        except (ValueError, OSError) as error:
            raise CommandError(f"{shlex.join(command)}\n{error}") from error
    return said.getvalue(), recipe[1]


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
