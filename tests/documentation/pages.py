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
        tenth, and a first line ... is anything
"""

import contextlib
import doctest
import io
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest
from documentation.printed import unlike
from documentation.shell import ROOT, CommandError, Shell, check_imports, check_names, logical_lines
from sybil import Document, Example, Lexeme, Region, Sybil
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

RUN = {"python": "python", "pycon": "session", "bash": "shell", "sh": "shell"}
KEPT = ["text", "yaml", "toml", "json", "csv", "bibtex", "cpp", "diff", "html", "markdown"]
KEPT += ["{toctree}", "{eval-rst}"]
"""Languages that are run, and how; and those that are not, with the directives of the site."""
ALLOWED = {
    "shell": {"add", "options only", "not run", "needs", "prints"},
    "python": {"not run", "needs", "prints"},
    "session": {"not run", "needs"},
    None: set(),
}
"""Directives that may stand above a block, by how it is run."""
FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>\{?[\w+-]*\}?).*\n"))
FILE_NAME = re.compile(r"# ([\w-]+\.(?:py|ya?ml|toml|json))\n")
DIRECTIVE = re.compile(
    r" *<!-- example: (?:(?P<add>add)(?: to (?P<recipe>\w+)\.py:)? (?P<options>-.+)"
    r"|(?P<reason>options only|not run): .+|(?P<needs>needs) (?P<package>\w+)"
    r"|(?P<prints>prints)) -->\n"
)
COMMENT = re.compile(r"^ *<!--\s*example\b.*\n", re.MULTILINE)
SESSION = DocTestStringParser(DocTestEvaluator(doctest.NORMALIZE_WHITESPACE))
PAGE = "__page__"


class PageError(ValueError):
    """What is wrong with a page before anything runs; begins with page and line."""


@dataclass(frozen=True)
class Block:
    """A fenced block, and what stands above it."""

    region: Region
    line: int  # of the opening fence, from 1
    how: str | None  # python, session, shell, or not run at all
    code: Lexeme
    above: tuple[re.Match[str], ...]
    printed: str | None = None  # what it has to print, if that is compared

    @property
    def kinds(self) -> set[str]:
        """The directives above it."""
        kinds = set()
        for directive in self.above:
            kinds |= {directive[group] for group in ("add", "reason", "needs", "prints")}
        return kinds - {None}

    @property
    def added(self) -> tuple[tuple[str | None, str], ...]:
        """Recipe, or None for all, and the options that its commands get."""
        adding = [directive for directive in self.above if directive["add"]]
        return tuple((directive["recipe"], directive["options"]) for directive in adding)


def blocks_of(document: Document) -> list[Block]:
    """The blocks of a page; PageError at the first fault of a block or directive."""
    return list(Reader(document).blocks())


class Reader:
    """Reads the blocks of a page, and the comments above them."""

    def __init__(self, document: Document) -> None:
        path = Path(document.path)
        self.page = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        self.text = document.text
        self.fences = outermost(FENCES(document))
        self.comments = {one.end(): one for one in COMMENT.finditer(self.text)}  # by their end
        for fence in self.fences:
            for end in list(self.comments):
                if fence.start < end <= fence.end:  # text of the block
                    del self.comments[end]

    def blocks(self) -> Iterator[Block]:
        for fence, following in zip_longest(self.fences, self.fences[1:]):
            yield self.block(fence, following)
        for comment in self.comments.values():
            self.check(False, comment.start(), "no block on the line below this directive")

    def block(self, fence: Region, following: Region | None) -> Block:
        above = self.directives_above(fence)
        language = fence.lexemes["language"]
        known = [*RUN, *KEPT]
        fault = f"language {language!r} of this block; take one of {', '.join(known)}"
        self.check(language in known, fence.start, fault)
        ended = re.search(r"\n *(`{3,}|~{3,}) *\Z", self.text[fence.start : fence.end])
        self.check(ended, fence.start, "this block has no end")
        block = Block(
            region=fence,
            line=self.line(fence.start),
            how=RUN.get(language),
            code=fence.lexemes["source"],
            above=tuple(above),
        )
        wrong = block.kinds - ALLOWED[block.how]
        self.check(not wrong, fence.start, f"{wrong} above a block of {language}")
        if block.kinds & {"options only", "not run"}:
            self.check(len(above) == 1, fence.start, "directives that exclude each other")
        if "prints" in block.kinds:
            return replace(block, printed=self.printed_below(fence, following))
        return block

    def directives_above(self, fence: Region) -> list[re.Match[str]]:
        """From the first one to the one right above the fence."""
        above: list[re.Match[str]] = []
        start = fence.start
        while start in self.comments:
            comment = self.comments.pop(start)
            start = comment.start()
            directive = DIRECTIVE.fullmatch(comment[0])
            self.check(directive, start, f"no such directive, in one line; see {__name__}")
            above.insert(0, directive)
        return above

    def printed_below(self, fence: Region, following: Region | None) -> str:
        below = following and not self.text[fence.end : following.start].strip()
        shown = below and following.lexemes["language"] == "text"
        self.check(shown, fence.start, "no block of text right below")
        return following.lexemes["source"]

    def line(self, position: int) -> int:
        return 1 + self.text.count("\n", 0, position)

    def check(self, right: object, position: int, fault: str) -> None:
        if not right:
            raise PageError(f"{self.page}:{self.line(position)}: {fault}")


def outermost(found: Iterable[Region]) -> list[Region]:
    """Fences in no other fence, in their order."""
    fences: list[Region] = []
    for fence in sorted(found, key=lambda fence: fence.start):
        if not fences or fence.start >= fences[-1].end:
            fences.append(fence)
    return fences


def examples_in(document: Document) -> Iterator[Region]:
    """What pytest runs of a page, a block or an input of a session each."""
    for block in blocks_of(document):
        region = block.region
        if block.how == "session" and "not run" not in block.kinds:
            for one in SESSION(block.code, document.path):
                one.adjust(region, block.code)
                one.evaluator = partial(evaluate, block)
                yield one
        elif block.how or FILE_NAME.match(block.code):
            yield Region(region.start, region.end, block.code, partial(evaluate, block))


class Page:
    """The folder and the terminal of a page."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.state = tempfile.TemporaryDirectory()
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
    for directive in block.above:
        package = directive["package"]
        if directive["needs"] and find_spec(package) is None:
            pytest.skip(f"{package}, which this block of the page needs, is not installed")
    page: Page = example.namespace[PAGE]
    with page.inside():
        name = FILE_NAME.match(block.code)
        if name:
            Path(name[1]).write_text(block.code, encoding="utf-8")
        if "not run" in block.kinds:
            return names_that_are_not_there(block)
        if block.how == "shell":
            return run_commands(block, page.shell)
        elif block.how == "python":
            return run_code(block, example)
        elif block.how == "session":
            return SESSION.evaluator(example)
    return None


def run_code(block: Block, example: Example) -> str | None:
    """Run a block of Python; with short attacks, unless the page shows what it prints."""
    from evaluation.short_suite import shortened

    short = contextlib.nullcontext() if block.printed else shortened()
    with contextlib.redirect_stdout(io.StringIO()) as said, without_cause(), short:
        PythonEvaluator()(example)
    return unlike(said.getvalue(), block.printed)


def names_that_are_not_there(block: Block) -> str | None:
    """What is wrong with a block that is not run."""
    check = {"shell": check_names, "python": check_imports}.get(block.how, str)
    try:
        check(block.code)
    except (CommandError, SyntaxError) as error:
        return f"in a block that is not run: {error}"
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
        cause = error.__cause__ or error.__context__
        if cause is not None:
            error.add_note(f"while handling {type(cause).__name__}: {cause}")
        raise error from None


def run_commands(block: Block, shell: Shell) -> str | None:
    """Run the commands of a block one after the other, or let the recipes check their options
    alone.
    """
    recipes = []
    said = ""
    only_options = "options only" in block.kinds
    here = block.printed is None  # a page that shows what is printed is followed word for word
    commands = logical_lines(block.code)
    if not commands:
        return "no command in this block"
    for offset, command in commands:
        try:
            recipes += shell.run(command, block.added, only_options=only_options, here=here)
        except CommandError as error:
            return f"line {block.line + 1 + offset}: {command}\n{error}"
        said += shell.said
    if only_options and not recipes:
        return "no command in this block of a recipe"
    for recipe, options in block.added:
        meant = recipes if recipe is None else [recipe]
        if not set(meant) & set(recipes):
            return f"'add' finds no command of its recipe in the block: {options}"
    return unlike(said, block.printed)


PAGES = Sybil(
    [examples_in],
    path=str(ROOT),
    patterns=["*.md"],
    exclude="quickstart_zh.md",
    setup=lambda namespace: namespace.update({"__name__": "example", PAGE: Page()}),
    teardown=lambda namespace: namespace[PAGE].close(),
)
SLOW = {"README", "distributed", "event_attacks", "faq"}
SLOW |= {"gradient_masking", "stability", "verified", "verified_events"}
SLOW |= {"compare", "joint", "spikes_not_surrogates"}


@cache
def is_slow(document: Document) -> bool:
    """Whether the page takes more than seconds, since it runs recipes or for its own sake."""
    blocks = [block for block in blocks_of(document) if block.how == "shell"]
    run = [block.code for block in blocks if not block.kinds & {"options only", "not run"}]
    recipes = re.search(r"\brecipes/\w+\.py\b|\bsj-robust [a-z]", "\n".join(run))
    return Path(document.path).stem in SLOW or recipes is not None
