"""What an option is, said once: a field of the frozen dataclass ``Options`` of a recipe.

tyro reads its name, type, default and the text below it. The marks here, in ``Annotated``, say the
rest.
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Annotated, Any, Literal, Self, TypeVar, get_type_hints

import docstring_parser
import yaml
from tyro.constructors import PrimitiveConstructorSpec

from sj_robust.core.datasets import check_dataset
from sj_robust.core.eps import eps_text, parse_eps, parse_radii
from sj_robust.core.folders import check_folder

MarkT = TypeVar("MarkT")


@dataclass(frozen=True)
class Often:
    """An option that people change: ``--help`` shows it."""


@dataclass(frozen=True)
class NamesCode:
    """An option that can name code to run; a folder's file alone may not do so."""


@dataclass(frozen=True)
class Decides:
    """An option that weights do not depend on, so that a resumed run may change it.

    ``"figures"``: another value is another run of a sweep; ``"nothing"``: not even that.
    """

    what: Literal["figures", "nothing"]


@dataclass(frozen=True)
class Idle:
    """An option that changes nothing if this is true of all options, which have values where None
    stands for one.
    """

    when: Callable[[Any], bool]


@dataclass(frozen=True)
class Needs:
    """An option for whose value, or each of a tuple, something may have to be installed: ``check``
    raises ModuleNotFoundError then.
    """

    check: Callable[[str], None]


class Radius(float):
    """A radius, parsed where it is typed: a number or a fraction.

    >>> Radius("8/255") == 8 / 255, str(Radius("8/255"))
    (True, '8/255')
    """

    def __new__(cls, written: str | float) -> Self:
        """Parse it; ValueError if it is none."""
        return super().__new__(cls, parse_eps(written))

    def __str__(self) -> str:
        return eps_text(self)


class Radii(tuple[Radius, ...]):
    """One radius or several between commas, in increasing order.

    >>> Radii("8/255,0.01")[1] == 8 / 255, str(Radii("8/255,0.01"))
    (True, '0.01,8/255')
    """

    def __new__(cls, written: str) -> Self:
        """Parse them; ValueError if one is none."""
        return super().__new__(cls, map(Radius, parse_radii(written.split(","))))

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Word(PrimitiveConstructorSpec[Any]):
    """A type whose value is one word, which a function parses or refuses with ValueError."""

    def __init__(
        self, parse: Callable[[str], Any], metavar: str, text: Callable[[Any], str] = str
    ) -> None:
        """The metavar stands for the value in help and errors, the text is that of a default."""
        super().__init__(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: parse(words[0]),
            is_instance=lambda value: value is not None,
            str_from_instance=lambda value: [text(value)],
        )

    def __repr__(self) -> str:
        return self.metavar


class Yaml(Word):
    """A value of these types, written as YAML or JSON in one word."""

    def __init__(self, *kinds: type) -> None:
        """Take the types."""
        self.kinds = kinds
        super().__init__(self._read, "YAML", json.dumps)

    def _read(self, word: str) -> Any:
        try:
            value = yaml.safe_load(word)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
        if not isinstance(value, self.kinds):
            names = " or ".join(kind.__name__ for kind in self.kinds)
            raise ValueError(f"must be a {names} in YAML, got {word}")
        return value


def _at_least(least: int, word: str) -> int:
    if not word.removeprefix("-").isdigit() or int(word) < least:
        raise ValueError(f"must be an integer >= {least}, got {word}")
    return int(word)


def _share(word: str) -> float:
    number = float(word)
    if not 0 < number < 1:
        raise ValueError(f"must be a number > 0 and < 1, got {word}")
    return number


def _dataset(word: str) -> str:
    check_dataset(word)
    return word


def _output(word: str) -> str:
    return str(check_folder("output", word))


PositiveInt = Annotated[int, Word(partial(_at_least, 1), "INT>=1")]
NonNegativeInt = Annotated[int, Word(partial(_at_least, 0), "INT>=0")]
AtLeastTwo = Annotated[int, Word(partial(_at_least, 2), "INT>=2")]
OpenUnitInterval = Annotated[float, Word(_share, "0<FLOAT<1")]
DatasetName = Annotated[str, Word(_dataset, "NAME")]
"""A name that ``load_images`` takes."""
OutputFolder = Annotated[str, Word(_output, "FOLDER")]
"""A folder that is there or can be made, and takes files."""
YamlDict = Annotated[dict[str, Any], Yaml(dict)]


def marked(kind: type[Any], mark: type[MarkT]) -> dict[str, MarkT]:
    """Options that have a mark, by name.

    >>> @dataclass(frozen=True)
    ... class Options:
    ...     T: int = 4
    ...     norm: Annotated[str, Idle(lambda options: options.T == 1)] = "l2"
    >>> list(marked(Options, Idle))
    ['norm']
    """
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for one in getattr(hint, "__metadata__", ()):
            if isinstance(one, mark):
                found[name] = one
    return found


@cache
def texts_of(kind: type[Any]) -> dict[str, str]:
    """Help text of each option by name; lines that begin with a dash stay lines."""
    found = {}
    for one in docstring_parser.parse_from_object(kind).params:
        text = inspect.cleandoc(one.description or "")
        found[one.arg_name] = re.sub(r"\n(?!- )", " ", text)
    return found


def deciding(options: Any) -> dict[str, Any]:
    """Names and values of the options that weights depend on, radii as plain numbers."""
    decided = marked(type(options), Decides)
    values = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in decided:
            values[field.name] = float(value) if isinstance(value, Radius) else value
    return values


def plain(options: Any) -> dict[str, Any]:
    """All options as a file of YAML has them: lists for tuples, and 8/255 as it is written."""
    return {field.name: _plain(getattr(options, field.name)) for field in fields(options)}


def _plain(value: Any) -> Any:
    if isinstance(value, Radii) and len(value) == 1:
        return _plain(value[0])
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Radius):
        return str(value) if "/" in str(value) else float(value)
    return value


def idle(options: Any) -> frozenset[str]:
    """Names of the options that change nothing, given the others, which have values where None
    stands for one.

    An option ``mode`` is a training mode: :data:`sj_robust.training.MODES` says what it leaves
    idle.
    """
    found = {name for name, mark in marked(type(options), Idle).items() if mark.when(options)}
    names = {field.name for field in fields(options)}
    if "mode" in names:
        from sj_robust.training import MODES  # imports torch

        found |= names & set(MODES[options.mode].idle)
    return frozenset(found)


def changed(options: Any) -> list[str]:
    """Names of the options that differ from their defaults, sorted."""
    values, defaults = plain(options), plain(type(options)())
    return sorted(name for name, value in values.items() if value != defaults[name])


def unused(options: Any, complete: Any) -> list[str]:
    """Names of the options that are given and change nothing; ``complete`` are the same ones with
    values where None stands for one.
    """
    without_effect = idle(complete)
    return [name for name in changed(options) if name in without_effect]
