"""Wrong use of a recipe, told from a failure of its work."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sj_robust.attacks.threat import parse_eps
from sj_robust.data import DATASETS

__all__ = ["WrongUse", "check_values", "checked"]

_IMAGE_FOLDER = "image_folder:"

_AT_LEAST = {
    "T": 1,
    "accumulate": 1,
    "attack_steps": 1,
    "batch_size": 1,
    "checkpoint_steps": 1,
    "draws": 1,
    "epochs": 1,
    "images": 1,
    "jobs": 1,
    "resamples": 1,
    "rounds": 2,
    "seed": 0,
    "steps": 1,
    "test_limit": 1,
    "threads": 1,
    "train_limit": 1,
    "workers": 0,
}
"""Smallest value of options that are whole numbers, the same in every recipe that has them."""


class WrongUse(ValueError):  # noqa: N818  # the name of what was done, as SystemExit's
    """A recipe was asked for what cannot be: nothing was done, and the exit code is 2. 命令行用法错误。"""


@contextmanager
def checked() -> Iterator[None]:
    """What a ValueError refuses inside is wrong use, since nothing but options is looked at there. 检查选项。

    Raises:
        WrongUse: In place of any other ValueError, with its message.

    Examples:
        >>> with checked():
        ...     int("many")
        Traceback (most recent call last):
            ...
        lab.command_line.wrong_use.WrongUse: invalid literal for int() with base 10: 'many'
    """
    try:
        yield
    except WrongUse:
        raise
    except ValueError as error:
        raise WrongUse(str(error)) from error


def check_values(options: object) -> None:
    """Refuse values that no recipe has a use for, before anything is loaded or written. 检查选项取值。

    Args:
        options: Options of a recipe; null is not looked at.

    Raises:
        WrongUse: If a number is too small, a radius is none, or a data set is not known.

    Examples:
        >>> from types import SimpleNamespace
        >>> check_values(SimpleNamespace(epochs=0))
        Traceback (most recent call last):
            ...
        lab.command_line.wrong_use.WrongUse: epochs must be >= 1, got 0; give --epochs 1 or more
    """
    given: Mapping[str, Any] = {name: value for name, value in vars(options).items() if value is not None}
    for name, least in _AT_LEAST.items():
        if given.get(name, least) < least:
            raise WrongUse(
                f"{name} must be >= {least}, got {given[name]}; give --{name.replace('_', '-')} {least} or more"
            )
    if not 0 < given.get("validation_fraction", 0.5) < 1:
        raise WrongUse(f"validation_fraction must be above 0 and below 1, got {given['validation_fraction']}")
    for name in ("eps", "step_size", "eval_eps"):
        values = given.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            with checked():
                _named(parse_eps, name, value)
    dataset = given.get("dataset", "digits")
    if dataset not in DATASETS and not dataset.startswith(_IMAGE_FOLDER):
        raise WrongUse(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")


def _named(parse: Callable[[Any], object], name: str, value: object) -> None:
    """Parse with the option's own name in the message."""
    try:
        parse(value)
    except ValueError as error:
        raise ValueError(str(error).replace("eps", name, 1)) from error
