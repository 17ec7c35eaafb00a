"""Evaluations of a sweep: each has a name, a suite and options of evaluate.py."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lab.sweeping.grid import by_name

_TAKEN = ("training", "validation", "options", "run", "output")
"""Names that a run's files, folders and figures have already, up to a dot."""
_OF_THE_RUN = ("checkpoint", "data_root", "device", "name", "output", "resume")
"""Options that the sweep sets for the run that is evaluated."""
_WITHOUT_SUITE = ("compare", "leaderboard", "network", "smooth")
"""Options with which evaluate.py does not run a suite on a checkpoint."""


def read_evaluations(
    suites: Sequence[str], shared: Mapping[str, Any], named: Mapping[str, Any]
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
        own = by_name(content, f"evaluation {name}", "{suite: fast, eps: 4/255}")
        found[name] = {"suite": name, **shared, **own}
    for name, options in found.items():
        _check_name(name)
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


def _check_name(name: Any) -> None:
    """Raise ValueError if a name cannot be that of a folder and a file beside those of a run."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_+.-]*", name):
        raise ValueError(
            "the name of an evaluation must be text of letters, digits, _, +, - and ., and begin "
            f"with a letter, digit or _, got {name!r}; rename it, and put a number in quotes"
        )
    is_taken = name.lower().partition(".")[0] in _TAKEN or name.lower().endswith(".yaml")
    if is_taken:
        raise ValueError(
            f"the name of an evaluation must not be one that a run's files or figures have already "
            f"({', '.join(_TAKEN)}, or any with .yaml), got {name!r}; rename it"
        )
