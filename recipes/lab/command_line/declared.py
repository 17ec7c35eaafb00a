"""What an option is, said once: where it stands in the frozen dataclass ``Options`` of a recipe.

The type of the field is the type and the range of the option. Parser, help, messages, resumed runs,
sweeps and docs/options read the rest from :func:`option`.
"""

import re
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from sj_robust.core.datasets import check_dataset
from sj_robust.core.eps import parse_eps
from sj_robust.core.folders import check_folder

if TYPE_CHECKING:  # jsonargparse makes its types at run time, which type checkers do not follow
    AtLeastTwo = int
    NonNegativeInt = int
    PositiveInt = int
    OpenUnitInterval = float
else:
    from jsonargparse.typing import (
        NonNegativeInt,
        OpenUnitInterval,
        PositiveInt,
        restricted_number_type,
    )

    AtLeastTwo = restricted_number_type(
        "AtLeastTwo", int, (">=", 2), docstring="int restricted to be ≥2"
    )

__all__ = [
    "AtLeastTwo",
    "DatasetName",
    "NonNegativeInt",
    "OpenUnitInterval",
    "Option",
    "OutputFolder",
    "PositiveInt",
    "Radius",
    "deciding",
    "idle",
    "often",
    "option",
    "options_of",
]

Radius = Annotated[float | str, parse_eps]
"""A number, or a fraction such as 8/255; the option keeps what was written."""
DatasetName = Annotated[str, check_dataset]
"""A name that ``load_images`` takes."""
OutputFolder = Annotated[str, partial(check_folder, "output")]
"""A folder that is there or can be made, and takes files."""
Decides = Literal["result", "figures", "nothing"]

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Option:
    """One option of a recipe: its name, type and default value, what it means, and the following.

    Attributes:
        group: Title of the group of options that begins here; empty in the middle of one.
        metavar: What stands for its value in the help, where its type does not say it.
        decides: What changes with it. ``"result"``: a resumed run must keep it, and another value
            is another run of a sweep; ``"figures"``: another run, but weights do not depend on it,
            so a resumed run may change it; ``"nothing"``: neither.
        idle: Whether it changes nothing, given all options; None if it always changes something.
        positional: Whether a bare word of the command line is its value.
        runs_code: Whether it can name code to run, which is taken from the command line alone, not
            from a folder.
        needs: Asked with the value, or each one of a list, for what has to be installed; raises
            ModuleNotFoundError. None asks for nothing.
        in_short_help: Whether it is one of those that people change; where some are, ``--help``
            shows these alone.
    """

    name: str
    kind: Any
    default: Any
    words: str = ""
    group: str = ""
    metavar: str = ""
    decides: Decides = "result"
    idle: Callable[[Any], bool] | None = None
    positional: bool = False
    runs_code: bool = False
    needs: Callable[[Any], object] | None = None
    in_short_help: bool = False

    @property
    def flag(self) -> str:
        """The option on the command line, such as ``--data-root``."""
        return "--" + self.name.replace("_", "-")

    @property
    def takes_a_list(self) -> bool:
        """Whether several words may follow it."""
        return (
            any(get_origin(part) in (list, tuple) for part in _parts(self.kind))
            and len(_parts(self.kind)) == 1
        )

    @property
    def value(self) -> tuple[str, tuple[str, ...]]:
        """What stands for its value in the help, empty for a switch; and the words to choose from,
        if it is those.
        """
        if self.kind is bool and self.default is False:
            return "", ()
        return _value(self.kind, self.metavar or self.name.rpartition("_")[2].upper(), self.metavar)

    def check(self, value: object) -> None:
        """Raise ValueError, with the option's name, for a value that its type refuses; null is not
        looked at.
        """
        for part in value if isinstance(value, list) else [value]:
            for refuse in _checks(self.kind) if part is not None else ():
                try:
                    refuse(part)
                except ValueError as error:
                    raise ValueError(re.sub(r"^eps\b", self.name, str(error))) from error

    def check_installed(self, value: object) -> None:
        """Raise ModuleNotFoundError if something that a value needs is missing."""
        if self.needs is not None:
            for part in value if isinstance(value, list) else [value]:
                self.needs(part)


def option(
    default: ValueT,
    words: str,
    *,
    group: str = "",
    metavar: str = "",
    decides: Decides = "result",
    idle: Callable[[Any], bool] | None = None,
    positional: bool = False,
    runs_code: bool = False,
    needs: Callable[[Any], object] | None = None,
    in_short_help: bool = False,
) -> ValueT:
    """A field of a recipe's ``Options``, which type checkers see as its default value; see
    :class:`Option`.

    >>> @dataclass(frozen=True)
    ... class Options:
    ...     epochs: PositiveInt = option(15, "Passes over the training images.", group="training")
    >>> Options().epochs, options_of(Options)[0].words
    (15, 'Passes over the training images.')
    """
    said = {"words": words, "group": group, "metavar": metavar, "decides": decides}
    metadata = said | {
        "idle": idle,
        "positional": positional,
        "runs_code": runs_code,
        "needs": needs,
        "in_short_help": in_short_help,
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def often(default: ValueT, words: str, **said: Any) -> ValueT:
    """An :func:`option` that people change, and ``--help`` shows."""
    return option(default, words, in_short_help=True, **said)


def options_of(options_type: type[Any]) -> tuple[Option, ...]:
    """The options of a dataclass, whose fields all have defaults; of a plain field nothing is
    said.
    """
    kinds, usual = get_type_hints(options_type, include_extras=True), vars(options_type())
    return tuple(
        Option(one.name, kinds[one.name], usual[one.name], **one.metadata)
        for one in fields(options_type)
    )


def deciding(options: Any, *what: Decides) -> dict[str, Any]:
    """Names and values of the options that decide ``what``; see :class:`Option`."""
    names = {one.name for one in options_of(type(options)) if one.decides in what}
    return {name: value for name, value in asdict(options).items() if name in names}


def idle(options: Any) -> frozenset[str]:
    """Names of the options that change nothing, given the others, which have values where null
    stands for one.

    An option ``mode`` is a training mode: :data:`sj_robust.training.MODES` says what it leaves
    idle.
    """
    known = options_of(type(options))
    found = {one.name for one in known if one.idle is not None and one.idle(options)}
    if any(one.name == "mode" for one in known):
        from sj_robust.training import MODES  # imports torch

        found |= {one.name for one in known} & set(MODES[options.mode].idle)
    return frozenset(found)


def _parts(kind: Any) -> list[Any]:
    """The types of a union without null, or the one type."""
    is_union = get_origin(kind) in (Union, UnionType)
    return [part for part in get_args(kind) if part is not NoneType] if is_union else [kind]


def _value(kind: Any, name: str, metavar: str) -> tuple[str, tuple[str, ...]]:
    parts = _parts(kind)
    if len(parts) > 1:
        return "VALUE", ()
    if parts != [kind]:
        takes, choices = _value(parts[0], name, metavar)
        return takes, (*choices, "null") if choices else ()
    if kind is Radius:
        return "X", ()
    origin = get_origin(kind)
    if origin is Annotated:
        return _value(get_args(kind)[0], name, metavar)
    if origin is Literal:
        return name, tuple(map(str, get_args(kind)))
    if origin in (list, tuple):
        inner, choices = _value(get_args(kind)[0], name, metavar)
        return f"[{inner},...]", choices
    if origin is dict:
        return "{NAME: VALUE,...}", ()
    if kind is bool:
        return "BOOL", ("true", "false")
    names = {int: "N", float: "X", str: metavar or "TEXT"}
    return next((names[base] for base in names if issubclass(kind, base)), "VALUE"), ()


def _checks(kind: Any) -> Iterator[Callable[[Any], object]]:
    """What an annotation lets a value pass through."""
    if get_origin(kind) is Annotated:
        yield kind.__metadata__[0]
    for part in get_args(kind):
        yield from _checks(part)
