"""Go through README and quickstart word for word, as on an empty machine, and record it; run by hand, takes an hour.

    python tests/documentation/walk.py --release 2.0.0 --output docs/walks/2.0.0.md

The last commit is cloned into a new folder, HOME is an empty one, and what the pages install is installed. Blocks run
in order and unshortened: options that a directive adds for the tests are left out, blocks that are "not run" there are
run here, those that are "options only" and the tests themselves are skipped. The release is replaced as README says.
The record has every command, what it said (long outputs shortened in the middle, without progress bars, paths and
names of the machine), and its time. The walk ends at the first command that fails, and leaves no record then.
"""

import argparse
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])  # as pytest has it
from documentation.pages import FILE_NAME, Block, blocks_of
from documentation.shell import ROOT, CommandError, Terminal, logical_lines
from sybil import Document

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
PYTHON = """
import contextlib, doctest, io, json, sys
namespace = {"__name__": "__main__"}
blocks = json.load(open(sys.argv[1]))
for i, (how, code) in enumerate(blocks, 1):
    with contextlib.nullcontext() if i == len(blocks) else contextlib.redirect_stdout(io.StringIO()):
        if how == "python":
            exec(compile(code, "block", "exec"), namespace)
        else:
            test = doctest.DocTestParser().get_doctest(code, namespace, "block", "block", 0)
            if doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, clear_globs=False).failed:
                sys.exit(1)
            namespace.update(test.globs)
"""
ADDRESS = re.compile(r"https?://(?!(?:arxiv\.org|github\.com)/)[^\s'\"<>)]*/([^\s'\"<>)/#]*)[^\s'\"<>)]*")
MACHINE_PATH = re.compile(
    r"(?<![\w.~:/-])/(?:root|home|tmp|opt|work|var|usr|etc|mnt|srv|nix|private|Users)\b"
    r"(?:[^\s'\":,;)\]]*/)?([^\s'\":,;)\]/]*)"
)
HEAD_OF_RECORD = """\
# A walk with SpikingJelly {release}

Through {pages}, word for word, in a new clone with an empty home folder.

Recorded by

```text
python tests/documentation/walk.py --release {release} --output FILE
```

Commit {commit}; Python {python}; processors {processors}; OMP_NUM_THREADS {threads}; load of the machine before \
{before:.1f}; after {after:.1f}.
"""


class WalkError(Exception):
    """A step failed; the text says which and how."""


def walked(
    clone: Path, page: str, terminal: Terminal, release: str
) -> Iterator[tuple[Block, int, str, str, float | None]]:
    """Block, line, command, what it said and seconds of every step; without seconds it was skipped for a reason."""
    python: list[tuple[str, str]] = []
    for block in blocks_of(Document.parse(str(clone / page))):
        if file := FILE_NAME.match(block.code):
            Path(clone, file[1]).write_text(block.code, encoding="utf-8")
        one_by_one = block.how == "shell" and "options only" not in block.reasons
        commands = logical_lines(block.code) if one_by_one else [(0, block.code.rstrip())]
        for offset, text in commands if block.how else ():
            command, line = text.replace(WRITTEN, f"spikingjelly=={release}"), block.line + 1 + offset
            skipped = "the tests, which take minutes" if "pytest" in command else ""
            if reason := block.reasons.get("options only", skipped):
                yield block, line, command, reason, None
                continue
            start, started = time.perf_counter(), command
            if block.how != "shell":  # the page's blocks so far, of which only the last one is heard
                python.append((block.how, block.code))
                (terminal.state / "blocks").write_text(json.dumps(python), encoding="utf-8")
                started = f"'{clone}/.venv/bin/python' '{terminal.state}/python' '{terminal.state}/blocks'"
            try:
                code, said = terminal.execute(started)
            except CommandError as error:
                code, said = -1, str(error)
            if code != 0:
                raise WalkError(f"{page}:{line}: exit code {code}\n{command}\n\n{said}")
            seconds = time.perf_counter() - start
            print(f"{page}:{line}: {seconds:.0f} s", file=sys.stderr, flush=True)
            yield block, line, command, said, seconds


def environment(home: Path) -> dict[str, str]:
    """An empty machine's: no variable of ours but those that say where packages come from; pip and bars are silent."""
    inside = str(Path(sys.prefix, "bin"))
    path = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder != inside]
    kept = {name: value for name, value in os.environ.items() if KEEP.match(name)}
    kept |= {"HOME": str(home), "PATH": os.pathsep.join([str(Path(sys.base_prefix, "bin")), *path]), "COLUMNS": "100"}
    return kept | {"NO_COLOR": "1", "TQDM_DISABLE": "1", "PIP_QUIET": "1", "PIP_ROOT_USER_ACTION": "ignore"}


def cleaned(said: str, names: dict[str, str]) -> str:
    """An output without overwritten text, addresses of package indexes, paths and names of the machine, and middle."""
    for name, word in sorted(names.items(), key=lambda item: -len(item[0])):
        said = said.replace(name, word) if "/" in name else re.sub(rf"\b{re.escape(name)}\b", word, said)
    lines = [whole.rstrip("\r").rpartition("\r")[2] for whole in said.strip("\n").split("\n")]
    lines = [MACHINE_PATH.sub(r".../\1", ADDRESS.sub(r"\1", line)).rstrip() for line in lines]
    if len(lines) > HEAD + TAIL + 5:
        lines[HEAD:-TAIL] = [f"[{len(lines) - HEAD - TAIL} lines left out]"]
    return "\n".join(lines)


def described(step: tuple[Block, int, str, str, float | None], names: dict[str, str]) -> str:
    """A step of the record."""
    block, line, command, said, seconds = step
    shell = block.how == "shell"
    place = f"Line {line}, {'commands' if shell else 'Python'}"
    if seconds is None:
        return f"{place}, skipped: {said}\n\n{fenced(command)}\n"
    said = cleaned(said, names)
    shown = "$ " + command.replace("\n", "\n> ") if shell else command
    said = fenced(said) if said else "It said nothing."
    return f"{place}; exit code 0 after {seconds:.1f} s:\n\n{fenced(shown)}\n\n{said}\n"


def fenced(text: str) -> str:
    """A block of text, which may have fences in it."""
    ticks = "`" * max(3, *(len(found) + 1 for found in re.findall(r"^ *(`{3,})", text, re.MULTILINE) or [""]))
    return f"{ticks}text\n{text}\n{ticks}"


def main(arguments: list[str]) -> int:
    """Walk and write the record; returns the exit code."""
    description, _, more = str(__doc__).partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=more, formatter_class=form)
    parser.add_argument("--release", required=True, help="release of SpikingJelly")
    parser.add_argument("--output", required=True, type=Path, help="file of the record")
    parser.add_argument("--pages", nargs="+", default=PAGES, metavar="PAGE", help="pages in the repository")
    parser.add_argument("--repository", type=Path, default=ROOT, help="what is cloned")
    options = parser.parse_args(arguments)
    output, before = options.output.resolve(), os.getloadavg()[0]
    parts, table, total = [], ["## Times\n", "| line | minutes |", "|---|---:|"], 0.0
    with tempfile.TemporaryDirectory() as folder:
        clone, home, state = (Path(folder, name) for name in ("sj_robust", "home", "state"))
        subprocess.run(["git", "clone", "--quiet", "--no-local", options.repository, clone], check=True)
        home.mkdir()
        state.mkdir()
        (state / "python").write_text(PYTHON, encoding="utf-8")
        commit = subprocess.run(["git", "-C", clone, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        names = {str(clone): "CLONE", str(home): "~", folder: "TEMPORARY", str(ROOT): "REPOSITORY"}
        names |= {sys.base_prefix: "PYTHON", socket.gethostname(): "machine"}
        try:
            for page in options.pages:
                parts.append(f"## {page}\n")
                heading = ""
                for step in walked(clone, page, Terminal(clone, state, environment(home), LIMIT), options.release):
                    parts += [f"### {step[0].heading}\n"] if step[0].heading != heading else []
                    parts.append(described(step, names))
                    heading, total = step[0].heading, total + (step[4] or 0)
                    table.append(f"| {page}:{step[1]} | {'skipped' if step[4] is None else f'{step[4] / 60:.1f}'} |")
        except WalkError as error:
            print(f"FAILED {error}", file=sys.stderr)
            return 1
    head = HEAD_OF_RECORD.format(
        release=options.release, pages=" and ".join(options.pages), commit=commit.stdout.strip(),
        python=platform.python_version(), processors=os.cpu_count(), before=before, after=os.getloadavg()[0],
        threads=os.environ.get("OMP_NUM_THREADS", "not set"),
    )  # fmt: skip
    text = "\n".join([head, *parts, *table, f"| **total** | **{total / 60:.1f}** |\n"])
    if left := [name for name in names if "/" in name and name in text]:
        raise WalkError(f"the record names folders of this machine: {', '.join(left)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(f"{len(table) - 3} steps recorded in {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
