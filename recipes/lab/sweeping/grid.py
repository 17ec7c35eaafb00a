"""A grid over options: its axes, combinations and seeds."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

Options = Mapping[str, Any]


def axes_of(grid: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The single options that a grid varies, with their values in order; ``"norm,rho"`` varies two
    together.

    Raises:
        ValueError: If an option has no list of values, occurs twice, or a joint value has another
            length.

    Examples:
        >>> axes_of({"mode": ["at"], "norm,rho": [["l2", 1], ["l1", 3]]})
        {'mode': ['at'], 'norm': ['l2', 'l1'], 'rho': [1, 3]}
    """
    axes: dict[str, list[Any]] = {}
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(
                f"a grid needs a list of values for every option, got {key}: {values!r}; write "
                f"[{values}]"
            )
        for name, column in zip(
            _names(key), zip(*(_joint(key, value) for value in values), strict=True), strict=True
        ):
            if name in axes:
                raise ValueError(
                    f"an option may occur once in a grid, {name} occurs twice; join its values "
                    "in one"
                )
            axes[name] = [
                value for number, value in enumerate(column) if value not in column[:number]
            ]
    return axes


def expand(
    grid: Mapping[str, Sequence[Any]], *, fixed: Options | None = None, skip: Sequence[Options] = ()
) -> list[dict[str, Any]]:
    """All combinations of a grid, the last option varying fastest, but those that have all values
    of an entry of skip.

    Each of these is a value or a list of them, and may be of an option beside the grid, one of
    ``fixed``.

    Raises:
        ValueError: As :func:`axes_of`; also if an entry of ``skip`` is empty.

    Examples:
        >>> expand({"mode": ["at", "rat"], "rho": [0, 1]}, skip=[{"mode": "rat", "rho": [0]}])
        [{'mode': 'at', 'rho': 0}, {'mode': 'at', 'rho': 1}, {'mode': 'rat', 'rho': 1}]
    """
    axes_of(grid)
    if not all(skip):
        raise ValueError(
            "an entry of skip needs at least one option, got an empty one, which would skip "
            "everything"
        )
    combinations = []
    for values in itertools.product(*grid.values()):
        pairs = zip(grid, values, strict=True)
        found = {
            name: part
            for key, value in pairs
            for name, part in zip(_names(key), _joint(key, value), strict=True)
        }
        if not any(_matches({**(fixed or {}), **found}, entry) for entry in skip):
            combinations.append(found)
    return combinations


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """Seeds 0, 1, ... of a number, or those given.

    Raises:
        ValueError: If there are none, or one occurs twice or is negative.
    """
    found = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f"seeds must be a number >= 1 or different integers >= 0, got {seeds}")
    return found


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of an option are the same: 1 and 1.0 are, 1 and True are not.

    Examples:
        >>> same_value(1, 1.0), same_value(1, True), same_value((8, 8), [8, 8])
        (True, False, True)
    """
    return _comparable(one) == _comparable(other)


def value_text(value: Any) -> str:
    """A value as a reader sees it: 1.0 is 1.

    Examples:
        >>> value_text(1.0), value_text(0.25), value_text("at"), value_text([8, 8])
        ('1', '0.25', 'at', '[8, 8]')
    """
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _comparable(value: Any) -> str:
    return json.dumps(
        float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    )


def _names(key: str) -> list[str]:
    return [name.strip() for name in key.split(",")]


def _joint(key: str, value: Any) -> Sequence[Any]:
    count = len(_names(key))
    if count == 1:
        return (value,)
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"{key} needs {count} values in each of its entries, got {value!r}")
    return value


def _matches(options: Options, entry: Options) -> bool:
    wanted = {name: value if isinstance(value, list) else [value] for name, value in entry.items()}
    return all(
        name in options and any(same_value(options[name], value) for value in values)
        for name, values in wanted.items()
    )
