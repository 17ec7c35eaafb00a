"""The examples of README and docs are tests: a page is a script, whose blocks run in order in one
temporary folder.

``python -m pytest docs/faq.md`` runs one page; the Sybil below hands every block to pytest. The
folder has links to recipes and docs. Blocks of python and pycon share a namespace, blocks of bash
and sh a terminal. A block whose first line is a comment with a file's name alone (# mynet.py, #
mine.yaml) is saved under that name first, so that later commands find it. Above a fence may stand

    <!-- example: add --epochs 1 -->
        options behind every recipe's command: it takes seconds then
    <!-- example: add to evaluate.py: --suite fast -->
        the same for one recipe; several such lines may stand together
    <!-- example: options only: needs CIFAR-10 -->
        the recipes' parsers check the options, nothing is run
    <!-- example: not run: installs packages -->
        only files, extras and imports that the block names are checked
    <!-- example: needs pyautoattack -->
        skipped where this package is missing
    <!-- example: prints -->
        what the block prints is the block of text below it: words are equal, numbers within a
        tenth, and ... is anything
"""

import contextlib
import doctest
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest
from documentation.shell import ROOT, CommandError, Shell, check_imports, check_names, logical_lines
from sybil import Document, Example, Lexeme, Region, Sybil
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

RUN = {"python": "python", "pycon": "session", "bash": "shell", "sh": "shell"}
"""Languages that are run, and how."""
KEPT = (
    "text",
    "yaml",
    "toml",
    "json",
    "csv",
    "bibtex",
    "cpp",
    "diff",
    "html",
    "markdown",
    "mermaid",
)
"""Languages that are not run."""
FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[\w+-]*).*\n"))
FILE_NAME = re.compile(r"# ([\w-]+\.(?:py|ya?ml|toml|json))\n")
DIRECTIVE = re.compile(
    r"^ *<!-- example: (?:add(?: to (?P<recipe>\w+)\.py:)? (?P<options>-.+)"
    r"|(?P<kind>options only|not run): (?P<reason>.+)|needs (?P<package>\w+)"
    r"|(?P<prints>prints)) -->\n",
    re.MULTILINE,
)
LOOKS_LIKE_ONE = re.compile(r"^ *<!--\s*example\b", re.MULTILINE)
WORD = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?|[^\W\d]+|[^\w\s]")
CLOSED = re.compile(r"\n *(`{3,}|~{3,}) *\Z")
SESSION = DocTestStringParser(DocTestEvaluator(doctest.NORMALIZE_WHITESPACE))


class PageError(ValueError):
    """What is wrong with a page before anything runs; begins with page and line."""


@dataclass(frozen=True)
class Block:
    """A fenced block, and what stands above it."""

    region: Region
    line: int  # of the opening fence, from 1
    how: str | None  # python, session, shell, or not run at all
    code: Lexeme
    added: tuple[
        tuple[str | None, str], ...
    ]  # recipe, or None for all, and the options to add to its commands
    reasons: dict[str, str]  # why it is "options only" or "not run"
    printed: str | None = None  # what it has to print, if that is compared
    packages: tuple[str, ...] = ()  # what it is skipped without


def documentation_pages() -> list[Path]:
    """Every page, whether or not there is a block in it."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md"]
    return [*named, *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Path in the repository, or the name of a page from elsewhere."""
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def blocks_of(document: Document) -> list[Block]:
    """The blocks of a page; PageError at the first one or directive with which something is
    wrong.
    """
    text, page, blocks = document.text, name_of(Path(document.path)), []

    def line_of(position: int) -> int:
        return 1 + text.count("\n", 0, position)

    def check(right: object, position: int, fault: str) -> None:
        if not right:
            raise PageError(f"{page}:{line_of(position)}: {fault}")

    found = list(FENCES(document))
    fences = [
        one for one in found if not any(other.start < one.start < other.end for other in found)
    ]
    directives = {one.end(): one for one in DIRECTIVE.finditer(text)}
    for one in LOOKS_LIKE_ONE.finditer(text):
        if not any(fence.start < one.start() < fence.end for fence in fences):
            known = DIRECTIVE.match(text, one.start())
            check(
                known,
                one.start(),
                "no such directive, in one line; see the top of tests/documentation/pages.py",
            )
            starts = {fence.start for fence in fences} | {
                other.start() for other in directives.values()
            }
            check(known.end() in starts, one.start(), "no block on the line below this directive")
    fences.sort(key=lambda fence: fence.start)
    for fence, following in zip_longest(fences, fences[1:]):
        above, start = [], fence.start
        while start in directives:
            above.append(directives[start])
            start = directives[start].start()
        language, code = fence.lexemes["language"], fence.lexemes["source"]
        added = tuple((one["recipe"], one["options"]) for one in reversed(above) if one["options"])
        reasons = {one["kind"]: one["reason"] for one in above if one["kind"]}
        packages = tuple(one["package"] for one in above if one["package"])
        how, known = RUN.get(language), ", ".join([*RUN, *KEPT])
        printed = None
        if any(one["prints"] for one in above):
            shown = following is not None and following.lexemes["language"] == "text"
            check(
                shown and not text[fence.end : following.start].strip(),
                fence.start,
                "no block of text right below",
            )
            printed = following.lexemes["source"]
        check(CLOSED.search(text, fence.start, fence.end), fence.start, "this block has no end")
        check(
            how or language in KEPT,
            fence.start,
            f"language {language!r} of this block; take one of {known}",
        )
        check(
            how or not above,
            fence.start,
            f"a directive above a block of {language}, which is not run anyway",
        )
        only_shell = (how in ("shell", "python") or printed is None) and (
            how == "shell" or not (added or "options only" in reasons)
        )
        check(only_shell, fence.start, f"only 'not run' may stand above a block of {language}")
        check(
            not reasons or len(above) == 1,
            fence.start,
            "several directives that exclude each other",
        )
        check(how != "session" or ">>>" in code, fence.start, "no >>> in this block")
        line = line_of(fence.start)
        blocks.append(Block(fence, line, how, code, added, reasons, printed, packages))
    return blocks


def examples_in(document: Document) -> Iterator[Region]:
    """What pytest runs of a page, a block or an input of a session each."""
    for block in blocks_of(document):
        region = block.region
        if block.how == "session" and not block.reasons:
            for one in SESSION(block.code, document.path):
                one.adjust(region, block.code)
                one.evaluator = partial(evaluate, block)
                yield one
        elif block.how or FILE_NAME.match(block.code):
            yield Region(region.start, region.end, block.code, partial(evaluate, block))


class Page:
    """The folder and the terminal of a page."""

    def __init__(self) -> None:
        self.folder, self.state = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory()
        self.shell = Shell(Path(self.folder.name), Path(self.state.name))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Be in the folder as a script there is."""
        with contextlib.chdir(self.folder.name):
            sys.path.insert(0, self.folder.name)
            try:
                yield
            finally:
                sys.path.remove(self.folder.name)

    def close(self) -> None:
        """Leave the process as it was."""
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(f"{self.folder.name}/"):
                del sys.modules[name]
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
        self.folder.cleanup()
        self.state.cleanup()


def evaluate(block: Block, example: Example) -> str | None:
    """Run a block in the folder of its page, or do what its directive says instead."""
    for package in block.packages:
        if find_spec(package) is None:
            pytest.skip(f"{package}, which this block of the page needs, is not installed")
    page: Page = example.namespace[PAGE]
    with page.inside():
        if name := FILE_NAME.match(block.code):
            Path(name[1]).write_text(block.code, encoding="utf-8")
        if "not run" in block.reasons:
            try:
                {"shell": check_names, "python": check_imports}.get(block.how, str)(block.code)
            except (CommandError, SyntaxError) as error:
                return f"in a block that is not run: {error}"
        elif block.how == "shell":
            return run_commands(block, page.shell)
        elif block.how == "python":
            with contextlib.redirect_stdout(io.StringIO()) as said, without_cause():
                PythonEvaluator()(example)
            return unlike(said.getvalue(), block.printed)
        elif block.how == "session":
            return SESSION.evaluator(example)
    return None


@contextlib.contextmanager
def without_cause() -> Iterator[None]:
    """What is raised inside loses its cause, which it names in a note.

    Sybil looks for its own frame in every error of a chain; in a cause there is none, and instead
    of the error pytest would report one of its own, and end.
    """
    try:
        yield
    except Exception as error:
        if (cause := error.__cause__ or error.__context__) is not None:
            error.add_note(f"while handling {type(cause).__name__}: {cause}")
        raise error from None


def run_commands(block: Block, shell: Shell) -> str | None:
    """Run the commands of a block one after the other, or let the recipes check their options
    alone.
    """
    recipes, said, only_options = [], "", "options only" in block.reasons
    commands = logical_lines(block.code)
    for offset, command in commands:
        try:
            here = (
                block.printed is None
            )  # a page that shows what is printed is followed word for word
            recipes += shell.run(command, block.added, only_options=only_options, here=here)
            said += shell.said
        except CommandError as error:
            return f"line {block.line + 1 + offset}: {command}\n{error}"
    if not commands:
        return "no command in this block"
    if only_options and not recipes:
        return "'options only' above a block without a recipe's command"
    unused = [
        (one, options)
        for one, options in block.added
        if one not in recipes and (one or not recipes)
    ]
    if unused:
        return f"'add' finds no command of its recipe in the block: {unused}"
    return unlike(said, block.printed)


def unlike(said: str, printed: str | None) -> str | None:
    """What is wrong with the printed text of a page, where a block really said something."""
    if printed is None:
        return None
    words = WORD.findall(said)
    first, *parts = ([*WORD.findall(part)] for part in printed.split("..."))
    place = 0
    for number, part in enumerate((first, *parts)):
        starts = range(place, len(words) - len(part) + 1)
        starts = starts[:1] if number == 0 else starts[-1:] if number == len(parts) else starts
        found = next((start for start in starts if all(map(same, words[start:], part))), None)
        if found is None or (not parts and len(words) > len(part)):
            return (
                f"the page shows\n{printed}and the block printed\n{said}, which differs at "
                f"{' '.join(part[:8])!r}"
            )
        place = found + len(part)
    return None


def same(word: str, shown: str) -> bool:
    """Whether two words are equal, or numbers within a tenth."""
    try:
        return abs(float(word) - float(shown)) <= 0.1 * abs(float(shown))
    except ValueError:
        return word == shown


PAGE = "__page__"
PAGES = Sybil(
    [examples_in],
    path=str(ROOT),
    patterns=["*.md"],
    exclude="quickstart_zh.md",
    setup=lambda namespace: namespace.update({"__name__": "example", PAGE: Page()}),
    teardown=lambda namespace: namespace[PAGE].close(),
)


_SLOW = {
    "README.md",
    "distributed.md",
    "event_attacks.md",
    "faq.md",
    "gradient_masking.md",
    "stability.md",
    "verified.md",
}


@cache
def is_slow(document: Document) -> bool:
    """Whether the page takes more than seconds, since it runs recipes or for its own sake."""
    if Path(document.path).name in _SLOW:
        return True
    shown = (block for block in blocks_of(document) if block.how == "shell" and not block.reasons)
    return any(re.search(r"\brecipes/\w+\.py\b", block.code) for block in shown)
