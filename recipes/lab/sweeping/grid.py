"""What a sweep is asked for: a grid over options, seeds, cells with names, evaluations."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.command_line import read_file

_TAKEN = ("training", "validation", "options", "run", "output")
"""Names that a run's files, folders and figures have already, up to a dot."""
_OF_THE_RUN = ("checkpoint", "data_root", "device", "name", "output", "resume")
"""Options that the sweep sets for the run that is evaluated."""
_WITHOUT_SUITE = ("compare", "leaderboard", "network", "smooth")
"""Options with which evaluate.py does not run a suite on a checkpoint."""


def expand(grid: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """All combinations of a grid, the last option varying fastest.

    ``"norm,rho"`` in a grid varies two options together.

    Raises:
        ValueError: If an option has no list of values or occurs twice, or a joint value has another
            length.

    Examples:
        >>> expand({"mode": ["at", "rat"], "rho": [0]})
        [{'mode': 'at', 'rho': 0}, {'mode': 'rat', 'rho': 0}]
        >>> expand({"norm,rho": [["l2", 1], ["l1", 3]]})
        [{'norm': 'l2', 'rho': 1}, {'norm': 'l1', 'rho': 3}]
    """
    names = [name for key in grid for name in names_in(key)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"an option may occur once in a grid, {name} occurs twice; join its values in one"
            )
    axes = [_settings(key, values) for key, values in grid.items()]
    combinations = []
    for settings in itertools.product(*axes):
        values = itertools.chain.from_iterable(settings)
        combinations.append(dict(zip(names, values, strict=True)))
    return combinations


def _settings(key: Any, values: Any) -> list[Any]:
    """Values of an entry of a grid: each a list with one for every name in the key."""
    if not isinstance(values, list) or not values:
        raise ValueError(
            f"a grid needs a list of one or more values for every option, got {key}: {values!r}"
        )
    count = len(names_in(key))
    if count == 1:
        return [[value] for value in values]
    for value in values:
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(f"{key} needs {count} values in each of its entries, got {value!r}")
    return values


def names_in(key: Any) -> list[str]:
    """Names of the options in a key such as ``"norm,rho"``."""
    return [name.strip() for name in str(key).split(",")]


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """Seeds 0, 1, ... of a number, or those given.

    Raises:
        ValueError: If there are none, or one occurs twice, is negative or no integer.
    """
    found = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    are_numbers = all(isinstance(seed, int) for seed in found)
    if not found or not are_numbers or len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f"seeds must be a number >= 1 or different integers >= 0, got {seeds}")
    return found


def value_text(value: Any) -> str:
    """A value as a reader sees it: 1.0 is 1.

    Examples:
        >>> value_text(1.0), value_text(0.25), value_text("at"), value_text([8, 8])
        ('1', '0.25', 'at', '[8, 8]')
    """
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class NamedCell:
    """A cell of a sweep.

    Attributes:
        name: Its name, which begins the names of its runs.
        preset: Options of adv_train.py in its preset.
        options: Those that it sets itself, which override those of the whole sweep.
        search: Combinations among which it chooses; a single empty one without a search.
    """

    name: str = ""
    preset: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    search: tuple[dict[str, Any], ...] = ({},)

    def check(self, grid: Iterable[str]) -> None:
        """Raise ValueError if the grid has other values of what the cell sets or searches."""
        for name in grid:
            if name in self.options or name in self.search[0]:
                raise ValueError(
                    f"{name} is in the grid and in cell {self.name}, whose own value would be "
                    "lost; remove it from one of them"
                )


def read_cells(given: Mapping[Any, Any]) -> list[NamedCell]:
    """Cells from their plain form: by name a mapping of ``config`` (a file, or a preset's name),
    ``options`` and ``search``, which are all optional; a sweep without cells has one.

    Raises:
        ValueError: If a cell has another key or no mapping where one is needed, or searches among
            fewer than two values.

    Examples:
        >>> (cell,) = read_cells({"at": {"options": {"mode": "at"}, "search": {"lr": [0.1, 0.2]}}})
        >>> cell.options, cell.search
        ({'mode': 'at'}, ({'lr': 0.1}, {'lr': 0.2}))
    """
    cells = []
    for name, content in given.items():
        parts = mapping(content, f"cell {name}")
        unknown = parts.keys() - {"config", "options", "search"}
        if unknown or not isinstance(name, str):
            raise ValueError(
                "a cell has a name in text, and config, options and search, got "
                f"{[*unknown, name][0]!r} in {name}; options of adv_train.py belong in its options"
            )
        search = tuple(expand(mapping(parts.get("search"), f"search of cell {name}")))
        if "search" in parts and len(search) < 2:
            raise ValueError(
                f"a search needs two values or more, got {parts['search']} in {name}; put a "
                "single one in its options"
            )
        config = parts.get("config")
        preset = {} if config is None else read_file(Path(str(config)))
        own = mapping(parts.get("options"), f"options of cell {name}")
        cells.append(NamedCell(name, preset, own, search))
    return cells or [NamedCell()]


def read_evaluations(
    suites: Sequence[str], shared: Mapping[str, Any], named: Mapping[Any, Any]
) -> dict[str, dict[str, Any]]:
    """Options of evaluate.py by the name of the evaluation, which is its suite unless it says
    another.

    Args:
        suites: Suites with no options of their own.
        shared: Options of all evaluations; a suite is that of the named ones.
        named: Own options of evaluations, by name.

    Raises:
        ValueError: If a name cannot be that of a folder in a run, or an option is the run's.

    Examples:
        >>> read_evaluations(["paper"], {"eps": 0.1}, {"weak": {"suite": "fast", "eps": 0.05}})
        {'paper': {'eps': 0.1, 'suite': 'paper'}, 'weak': {'suite': 'fast', 'eps': 0.05}}
    """
    found = {suite: {**shared, "suite": suite} for suite in suites}
    for name, content in named.items():
        found[name] = {"suite": name, **shared, **mapping(content, f"evaluation {name}")}
    for name, options in found.items():
        text = str(name)
        is_name = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_+.-]*", text) and isinstance(name, str)
        is_taken = text.lower().partition(".")[0] in _TAKEN or text.lower().endswith(".yaml")
        if not is_name or is_taken:
            raise ValueError(
                "the name of an evaluation must be text of letters, digits, _, +, - and ., begin "
                f"with a letter, digit or _, and be none of {', '.join(_TAKEN)} or *.yaml, got "
                f"{name!r}; rename it, and put a number in quotes"
            )
        for option in _OF_THE_RUN:
            if option in options:
                raise ValueError(
                    f"{option} of an evaluation is set by the sweep itself; omit it (data_root and "
                    "device are those of the training, which --options takes)"
                )
    return found


def check_suite_is_run(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if evaluate.py would write no report of attacks, which a sweep tabulates.

    Args:
        name: Name of the evaluation.
        options: All its options.
    """
    refused = [option for option in _WITHOUT_SUITE if options[option] is not None]
    if options["suite"] in ("stress", "corruptions"):
        refused.append("suite")
    for option in refused:
        raise ValueError(
            f"an evaluation of a sweep must be a suite of attacks on the trained network, {name} "
            f"has {option} {options[option]}; use evaluate.py on the networks of the sweep instead"
        )


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A mapping as it stands in a file; nothing, which YAML reads as None, is an empty one.

    Raises:
        ValueError: If it is something else.

    Examples:
        >>> mapping(["mode"], "a cell")
        Traceback (most recent call last):
            ...
        ValueError: a cell must have names with values, such as {mode: at}, got ['mode']
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} must have names with values, such as {{mode: at}}, got {value!r}")
    return value
