"""Pages of the documentation and the blocks in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = {"python": "python", "pycon": "pycon", "bash": "shell", "sh": "shell"}
"""Languages that are run, and how."""
KEPT = ("text", "yaml", "toml", "json", "csv", "bibtex", "cpp", "diff", "html", "markdown")
"""Languages that are not run."""
DIRECTIVES = ("add", "add to RECIPE", "options only", "not run")
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[\w+-]*)(?P<rest>.*)$")
FILE_NAME = re.compile(r"# ([\w-]+\.(?:py|ya?ml|toml|json))\n")
"""First line of a block that is saved as a file."""
DIRECTIVE = re.compile(r"^ *<!--\s*example\b:?(?P<text>.*?)(?P<end>-->)?\s*$")


class PageError(ValueError):
    """What is wrong with a page; the text begins with page and line."""


@dataclass(frozen=True)
class Directive:
    """What is to be done with the block below instead of running it as it stands."""

    kind: str
    """add, options only or not run."""
    text: str
    """Options to add, or the reason."""
    recipe: str | None
    """Name of the only recipe that the options are added to, without .py."""
    line: int


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    """Path of the page in the repository."""
    line: int
    """Line of the opening fence, from 1."""
    language: str
    code: str
    directives: tuple[Directive, ...] = ()
    heading: str = ""
    """Of the section that it stands in."""

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def how(self) -> str | None:
        """How it is run: python, pycon, shell, or not at all."""
        return RUN.get(self.language)

    def reason(self, kind: str) -> str | None:
        """Reason of a directive of this kind, if the block has one."""
        return next((directive.text for directive in self.directives if directive.kind == kind), None)


def documentation_pages() -> list[Path]:
    """Every page, whether or not there is a block in it."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md"]
    return [*named, *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Path in the repository, or the name of a page from elsewhere."""
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def blocks_of(page: Path, name: str | None = None) -> list[Block]:
    """Blocks of a page with their directives; everything that is wrong with either is in one error."""
    name, lines = name or name_of(page), page.read_text(encoding="utf-8").splitlines()
    blocks: list[Block] = []
    errors: list[str] = []
    directives: list[Directive] = []
    number, heading = 0, ""
    while number < len(lines):
        line, opening = lines[number], FENCE.match(lines[number])
        number += 1
        if found := DIRECTIVE.match(line):
            try:
                directives.append(directive_in(found, f"{name}:{number}", number))
            except PageError as error:
                errors.append(str(error))
            continue
        if opening is None:
            heading = line.lstrip("#").strip() if line.startswith("#") else heading
            errors += [f"{name}:{one.line}: no block on the line below this directive" for one in directives]
            directives = []
            continue
        start, body = number, []
        closing = re.compile(rf"^ *{opening['ticks'][0]}{{{len(opening['ticks'])},}} *$")
        while number < len(lines) and not closing.match(lines[number]):
            body.append(lines[number].removeprefix(opening["indent"]))
            number += 1
        if number == len(lines):
            errors.append(f"{name}:{start}: this block has no end")
        number += 1
        block = Block(name, start, opening["language"], "".join(f"{one}\n" for one in body), tuple(directives), heading)
        blocks.append(block)
        errors += faults(block)
        directives = []
    errors += [f"{name}:{one.line}: no block on the line below this directive" for one in directives]
    if errors:
        raise PageError("\n".join(errors))
    return blocks


def directive_in(found: re.Match[str], place: str, line: int) -> Directive:
    """The directive in a comment."""
    text = " ".join(found["text"].split())
    if found["end"] is None:
        raise PageError(f"{place}: a directive is one line that ends with -->")
    if added := re.fullmatch(r"add(?: to (\w+)(?:\.py)?:)? (-.*)", text):
        return Directive("add", added[2], added[1], line)
    for kind in ("options only", "not run"):
        if given := re.fullmatch(rf"{kind}(?::\s*(.*))?", text):
            if not given[1]:
                raise PageError(f"{place}: {kind} needs a reason, as in <!-- example: {kind}: needs CIFAR-10 -->")
            return Directive(kind, given[1], None, line)
    raise PageError(f"{place}: unknown directive {text!r}; there are {', '.join(DIRECTIVES)}")


def faults(block: Block) -> list[str]:
    """What is wrong with a block and its directives, before anything is run."""
    kinds = {directive.kind for directive in block.directives}
    if block.language not in RUN and block.language not in KEPT:
        known = ", ".join([*RUN, *KEPT])
        return [f"{block.place}: language {block.language or 'missing'!r} of this block; take one of {known}"]
    if block.directives and block.how is None:
        return [f"{block.place}: a directive above a block of {block.language}, which is not run anyway"]
    if kinds - {"not run"} and block.how != "shell":
        return [f"{block.place}: only 'not run' may stand above a block of {block.language}"]
    if len(kinds) > 1 or (kinds and "add" not in kinds and len(block.directives) > 1):
        return [f"{block.place}: several directives that exclude each other"]
    return []
