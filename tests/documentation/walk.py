"""Go through README and quickstart word for word, as on an empty machine, and record it; run by hand, takes an hour.

python tests/documentation/walk.py --release 2.0.0 --output docs/walks/2.0.0.md
python tests/documentation/walk.py --release 0.0.0.0.14 --output docs/walks/0.0.0.0.14.md

The last commit is cloned into a new folder, HOME is an empty one, and what the pages install is installed. Blocks run
in order and unshortened: options that a directive adds for the tests are left out, blocks that are "not run" there are
run here, and those that are "options only" are skipped with their reason. The release is replaced as README says. The
record has every command, what it said (long outputs shortened in the middle, without progress bars, paths and names of
the machine), its exit code and its time. The walk ends at the first command that fails, and leaves no record then.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])  # as pytest has it
from documentation.pages import FILE_NAME, ROOT, Block, blocks_of
from documentation.shell import CommandError, Terminal, logical_lines

PAGES = ("README.md", "docs/quickstart.md")
WRITTEN = "spikingjelly==2.0.0"
LIMIT = 7200
"""Seconds that a command may take."""
HEAD, TAIL = 14, 26
"""Lines of a long output that are kept."""
KEEP = re.compile(
    r"^(PIP_|SSL_|REQUESTS_CA|CURL_CA|GIT_SSL|LANG$|LC_|OMP_|TERM$|https?_proxy$|no_proxy$)", re.IGNORECASE
)
"""Variables of the machine that a newcomer would have as well: where packages come from, threads, language."""
MARK = "\x1e"
DRIVER = f"""
import doctest, json, sys, traceback
namespace = {{"__name__": "__main__"}}
for line in sys.stdin:
    how, code = json.loads(line)
    failed = 0
    try:
        if how == "python":
            exec(compile(code, "block", "exec"), namespace)
        else:
            test = doctest.DocTestParser().get_doctest(code, namespace, "block", "block", 0)
            failed = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, clear_globs=False).failed
            namespace.update(test.globs)
    except BaseException:
        traceback.print_exc()
        failed = 1
    sys.stderr.flush()
    print("{MARK}" + str(int(failed > 0)), flush=True)
"""
PROGRESS = re.compile(r"[━╸╺█▏▎▍▌▋▊▉]{3}.*|^ *\d+%\|.*|^ *-{10,} \d.*(eta|MB).*")
NOISE = re.compile(r"^(Looking in (indexes|links):|\[notice\]|WARNING: Running pip as the 'root' user)")
ADDRESS = re.compile(r"https?://(?!(?:arxiv\.org|github\.com)/)[^\s'\"<>)]*/([^\s'\"<>)/#]*)[^\s'\"<>)]*")
MACHINE_PATH = re.compile(
    r"(?<![\w.~:/-])/(?:root|home|tmp|opt|work|var|usr|etc|mnt|srv|nix|private|Users)(?:/[^\s'\":,;)\]]*)?"
)


class WalkError(Exception):
    """A step failed; the text says which and how."""


@dataclass(frozen=True)
class Step:
    """What was done, and what came of it."""

    block: Block
    line: int
    command: str
    said: str
    seconds: float | None
    """None where a block was skipped; ``said`` is the reason then."""

    @property
    def name(self) -> str:
        """A command by itself, a block of Python by the section that it stands in."""
        return self.command.strip().splitlines()[0] if self.block.how == "shell" else f"Python: {self.block.heading}"


@dataclass
class Walk:
    """A walk through some pages in a new clone."""

    clone: Path
    home: Path
    release: str
    left_out: tuple[str, ...] = ()
    steps: list[Step] = field(default_factory=list)

    def page(self, page: Path, state: Path) -> None:
        """Go through a page; Python blocks run in one process, commands in one terminal."""
        terminal = Terminal(self.clone, state, self.environment(), LIMIT)
        python: subprocess.Popen[str] | None = None
        try:
            for block in blocks_of(page, page.relative_to(self.clone).as_posix()):
                if name := FILE_NAME.match(block.code):
                    Path(self.clone, name[1]).write_text(block.code, encoding="utf-8")
                if block.how is None:
                    continue
                if reason := block.reason("options only"):
                    self.steps.append(Step(block, block.line, block.code.rstrip(), reason, None))
                elif block.how == "shell":
                    self.commands(block, terminal)
                else:
                    python = python or self.interpreter(terminal)
                    self.python(block, python)
        finally:
            if python is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(python.pid, signal.SIGKILL)
                python.communicate()

    def environment(self) -> dict[str, str]:
        """An empty machine's: no variable of ours but those that say where packages come from."""
        base = Path(sys.base_prefix, "bin")
        inside = {str(Path(sys.prefix, "bin"))}
        path = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder not in inside]
        kept = {name: value for name, value in os.environ.items() if KEEP.match(name)}
        return kept | {"HOME": str(self.home), "PATH": os.pathsep.join([str(base), *path]), "COLUMNS": "100"}

    def commands(self, block: Block, terminal: Terminal) -> None:
        """Run the commands of a block."""
        for offset, text in logical_lines(block.code):
            command, line = text.replace(WRITTEN, f"spikingjelly=={self.release}"), block.line + 1 + offset
            if word := next((word for word in self.left_out if word in command), None):
                self.steps.append(Step(block, line, command, f"left out of this walk (--leave-out {word})", None))
                continue
            start = time.perf_counter()
            try:
                code, said = terminal.execute(command)
            except CommandError as error:
                code, said = -1, str(error)
            self.add(Step(block, line, command, said, time.perf_counter() - start), code)

    def interpreter(self, terminal: Terminal) -> subprocess.Popen[str]:
        """The interpreter that the pages have installed."""
        return subprocess.Popen(
            [self.clone / ".venv" / "bin" / "python", "-u", "-c", DRIVER], cwd=self.clone, env=terminal.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip

    def python(self, block: Block, process: subprocess.Popen[str]) -> None:
        """Run a block of Python."""
        assert process.stdin is not None
        assert process.stdout is not None
        start, said, code = time.perf_counter(), "", 1
        process.stdin.write(json.dumps([block.how, block.code]) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            text, mark, number = line.partition(MARK)
            said += text
            if mark:
                code = int(number)
                break
        self.add(Step(block, block.line + 1, block.code.rstrip(), said, time.perf_counter() - start), code)

    def add(self, step: Step, code: int) -> None:
        """Note a step; the walk ends with one that failed."""
        print(f"{step.block.page}:{step.line}: {step.name} ({step.seconds:.0f} s)", file=sys.stderr, flush=True)
        if code != 0:
            raise WalkError(f"{step.block.page}:{step.line}: exit code {code}\n{step.command}\n\n{step.said}")
        self.steps.append(step)


def cleaned(said: str, names: dict[str, str]) -> str:
    """An output without progress bars, addresses of package indexes, paths and names of the machine."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said).replace("\r\n", "\n")
    for name, word in sorted(names.items(), key=lambda item: -len(item[0])):
        text = text.replace(name, word) if "/" in name else re.sub(rf"\b{re.escape(name)}\b", word, text)
    lines = []
    for whole in text.split("\n"):
        line = MACHINE_PATH.sub(shortened_path, ADDRESS.sub(r"\1", whole.rstrip("\r").rpartition("\r")[2])).rstrip()
        if not PROGRESS.search(line) and not NOISE.match(line):
            lines.append(line)
    return shortened("\n".join(lines).strip("\n"))


def shortened_path(found: re.Match[str]) -> str:
    """The last name of a path."""
    return f".../{found[0].rstrip('/').rpartition('/')[2]}"


def shortened(text: str) -> str:
    """A long text without its middle."""
    lines = text.split("\n")
    if len(lines) <= HEAD + TAIL + 5:
        return text
    return "\n".join([*lines[:HEAD], f"[{len(lines) - HEAD - TAIL} lines left out]", *lines[-TAIL:]])


def record(walk: Walk, title: dict[str, str], names: dict[str, str]) -> str:
    """The walk as a page."""
    parts = [f"# A walk with SpikingJelly {walk.release}", ""]
    pages = list(dict.fromkeys(step.block.page for step in walk.steps))
    options = "".join(f" --leave-out {word}" for word in walk.left_out)
    command = f"python tests/documentation/walk.py --release {walk.release}{options} --output FILE"
    parts += [f"Through {' and '.join(pages)}, word for word, in a new clone with an empty home folder.", ""]
    parts += ["Recorded by", "", "```text", command, "```", ""]
    parts += ["; ".join(f"{name} {value}" for name, value in title.items()) + ".", ""]
    for page in pages:
        parts += [f"## {page}", ""]
        heading = ""
        for step in walk.steps:
            if step.block.page == page:
                parts += [f"### {step.block.heading}", ""] if step.block.heading != heading else []
                heading = step.block.heading
                parts += describe(step, names)
    parts += ["## Times", "", "| step | line | minutes |", "|---|---:|---:|"]
    for step in walk.steps:
        command = step.name.replace("|", "\\|").replace("`", "'")
        command = f"{command[:69]}..." if len(command) > 72 else command
        minutes = "skipped" if step.seconds is None else f"{step.seconds / 60:.1f}"
        parts.append(f"| `{command}` | {step.block.page}:{step.line} | {minutes} |")
    total = sum(step.seconds or 0 for step in walk.steps)
    parts += [f"| **total** | | **{total / 60:.1f}** |", ""]
    text = "\n".join(parts)
    if left := [name for name in names if "/" in name and name in text]:
        raise WalkError(f"the record names folders of this machine: {', '.join(left)}")
    return text


def describe(step: Step, names: dict[str, str]) -> list[str]:
    """A step of the record."""
    place = f"Line {step.line}, {'commands' if step.block.how == 'shell' else 'Python'}"
    if step.seconds is None:
        return [f"{place}, skipped: {step.said}", "", *fenced(step.command), ""]
    prompts = ("$ ", "> ") if step.block.how == "shell" else ("", "")
    lines = step.command.splitlines()
    shown = "\n".join([f"{prompts[0]}{lines[0]}", *(f"{prompts[1]}{line}" for line in lines[1:])])
    said = cleaned(step.said, names)
    parts = [f"{place}; exit code 0 after {step.seconds:.1f} s:", "", *fenced(shown), ""]
    return [*parts, *fenced(said), ""] if said else [*parts, "It said nothing.", ""]


def fenced(text: str) -> list[str]:
    """A block of text."""
    ticks = "`" * max(3, *(len(found) + 1 for found in re.findall(r"^ *(`{3,})", text, re.MULTILINE) or [""]))
    return [f"{ticks}text", text, ticks]


def main(arguments: list[str]) -> int:
    """Walk and write the record; returns the exit code."""
    description, _, more = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", required=True, help="release of SpikingJelly")
    parser.add_argument("--output", required=True, type=Path, help="file of the record")
    parser.add_argument("--pages", nargs="+", default=PAGES, metavar="PAGE", help="pages in the repository")
    parser.add_argument("--leave-out", nargs="+", default=(), metavar="WORD", help="skip commands with such a word")
    parser.add_argument("--repository", type=Path, default=ROOT, help="what is cloned")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        clone, home, state = (Path(folder, name) for name in ("sj_robust", "home", "state"))
        subprocess.run(["git", "clone", "--quiet", "--no-local", options.repository, clone], check=True)
        home.mkdir()
        state.mkdir()
        revision = subprocess.run(
            ["git", "-C", clone, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True
        )
        title = {
            "Commit": revision.stdout.strip(),
            "Python": platform.python_version(),
            "processors": str(os.cpu_count()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
            "load of the machine before": f"{os.getloadavg()[0]:.1f}",
        }
        names = {str(clone): "CLONE", str(home): "~", folder: "TEMPORARY", str(ROOT): "REPOSITORY"}
        names |= {sys.base_prefix: "PYTHON", socket.gethostname(): "machine"}
        walk = Walk(clone, home, options.release, tuple(options.leave_out))
        try:
            for page in options.pages:
                walk.page(clone / page, state)
            title["after"] = f"{os.getloadavg()[0]:.1f}"
            text = record(walk, title, names)
        except WalkError as error:
            print(f"FAILED {error}", file=sys.stderr)
            return 1
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    print(f"{len(walk.steps)} steps recorded in {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
