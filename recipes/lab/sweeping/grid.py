"""A grid over options: its combinations, seeds and values."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Options = Mapping[str, Any]


def expand(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
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
    combinations = []
    for settings in itertools.product(*map(_settings, grid.items())):
        combination: dict[str, Any] = {}
        for setting in settings:
            for name in combination.keys() & setting.keys():
                raise ValueError(
                    f"an option may occur once in a grid, {name} occurs twice; join its values "
                    "in one"
                )
            combination |= setting
        combinations.append(combination)
    return combinations


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


def values_in(many: Iterable[Options]) -> dict[str, list[Any]]:
    """Every option with its different values, in the order in which they appear.

    Examples:
        >>> values_in([{"mode": "at", "rho": 0}, {"mode": "at", "rho": 1}])
        {'mode': ['at'], 'rho': [0, 1]}
    """
    found: dict[str, list[Any]] = {}
    for options in many:
        for name, value in options.items():
            values = found.setdefault(name, [])
            if value not in values:
                values.append(value)
    return found


def names_in(key: str) -> list[str]:
    """Names of the options in a key such as ``"norm,rho"``."""
    return [name.strip() for name in key.split(",")]


def by_name(value: Any, what: str, example: str) -> dict[str, Any]:
    """A mapping as it stands in a file; nothing, which YAML reads as None, is an empty one.

    Args:
        value: What the file holds.
        what: What it is, for the message.
        example: How it is written, for the message.

    Raises:
        ValueError: If it is something else.

    Examples:
        >>> by_name(["mode"], "a cell", "{mode: at}")
        Traceback (most recent call last):
            ...
        ValueError: a cell must have names with values, such as {mode: at}, got ['mode']
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} must have names with values, such as {example}, got {value!r}")
    return value


def value_text(value: Any) -> str:
    """A value as a reader sees it: 1.0 is 1.

    Examples:
        >>> value_text(1.0), value_text(0.25), value_text("at"), value_text([8, 8])
        ('1', '0.25', 'at', '[8, 8]')
    """
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _settings(entry: tuple[str, Any]) -> list[dict[str, Any]]:
    """What an entry of a grid offers: values of its one option, or of several together."""
    key, values = entry
    if not isinstance(key, str):
        raise ValueError(f"a grid needs names of options, got {key!r}; write the name as text")
    if not isinstance(values, list) or not values:
        remedy = "give one or more" if values == [] else f"write [{values}]"
        raise ValueError(
            f"a grid needs a list of values for every option, got {key}: {values!r}; {remedy}"
        )
    names = names_in(key)
    if len(names) == 1:
        return [{key: value} for value in values]
    for value in values:
        if not isinstance(value, list) or len(value) != len(names):
            raise ValueError(
                f"{key} needs {len(names)} values in each of its entries, got {value!r}"
            )
    return [dict(zip(names, value, strict=True)) for value in values]
