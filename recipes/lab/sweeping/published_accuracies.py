"""Accuracies of the paper and of a rerun of it, shown beside what a sweep finds; nothing is
computed from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lab.sweeping.summary import is_within
from sj_robust.training.modes import MODES

_PAPER = "Ding et al. (ICML 2024)"
_RERUN = "rerun in an ICLR 2026 submission"


@dataclass(frozen=True)
class PublishedAccuracy:
    """One published accuracy in per cent, the options that tell its setting, and the column that it
    belongs beside.
    """

    options: dict[str, Any]
    column: str
    percent: float
    source: str = _PAPER


def _of(column: str, percent: float, **options: Any) -> PublishedAccuracy:
    source = options.pop("source", _PAPER)
    return PublishedAccuracy({"dataset": "cifar10"} | options, column, percent, source)


_AT = {"model": "vgg11", "neuron": "dlif", "mode": "at"}
_RERUN_OF = {"source": _RERUN, "model": "vgg11", "mode": "at"}
_MPPD = {"rho": 1.0, "norm": "l2", "indicator": "mppd"}

PUBLISHED = (
    _of("paper/pgd10/last", 29.06, **_AT, rho=0.0),
    _of("paper/apgd_ce", 23.05, **_AT, rho=0.0),
    _of("paper/apgd_dlr", 29.88, **_AT, rho=0.0),
    _of("paper/pgd10/last", 37.55, **_AT, **_MPPD),
    _of("paper/apgd_ce", 33.25, **_AT, **_MPPD),
    _of("paper/apgd_dlr", 39.68, **_AT, **_MPPD),
    _of("paper/pgd7/last", 0.09, model="vgg11", neuron="dlif", mode="none"),
    _of("paper/pgd7/last", 0.03, model="vgg11", neuron="lif", mode="none"),
    _of("paper/pgd7/last", 0.00, model="wrn16_4", neuron="lif", mode="none"),
    _of("paper/pgd7/last", 49.02, model="vgg11", neuron="dlif", mode="rat", **_MPPD),
    _of("paper/pgd7/last", 56.71, model="wrn16_4", neuron="dlif", mode="rat", **_MPPD),
    *(
        _of(
            "paper/pgd7/last",
            percent,
            model="vgg5",
            neuron="dlif",
            mode="at",
            rho=1.0,
            indicator=indicator,
        )
        for indicator, percent in (("mppd", 28.33), ("tasad", 27.80), ("std", 26.82))
    ),
    *(
        _of(column, percent, **_RERUN_OF, **setting)
        for setting, clean, pgd20, autoattack in (
            ({"rho": 0.0}, 85.03, 34.24, 16.39),
            ({"norm": "l2", "indicator": "mppd"}, 85.17, 32.26, 19.75),
            ({"norm": "l1", "indicator": "mppd"}, 86.11, 41.15, 23.04),
        )
        for column, percent in (
            ("clean", clean),
            ("paper/clean", clean),
            ("paper/pgd20/last", pgd20),
            ("autoattack/clean", clean),
            ("autoattack/worst case", autoattack),
        )
    ),
)
"""Accuracies on CIFAR-10 at 8/255 that could be read; PGD's are of the last iterate, as the paper's
code has it.

The rerun does not say which neuron it trained, so its accuracies stand beside each.
"""


def published_accuracy(options: Mapping[str, Any], column: str) -> PublishedAccuracy | None:
    """The published accuracy for a run's setting, whatever its length of training; None if none is
    known.

    The options are those of the run that have an effect.

    Examples:
        >>> setting = {
        ...     "dataset": "cifar10",
        ...     "model": "vgg11",
        ...     "neuron": "dlif",
        ...     "mode": "at",
        ...     "rho": 0.0,
        ... }
        >>> published_accuracy(setting, "paper/apgd_ce").percent
        23.05
    """
    mode = MODES.get(options.get("mode", ""))
    options = {
        name: getattr(mode, name, None) if value is None else value
        for name, value in options.items()
    }
    return next(
        (
            known
            for known in PUBLISHED
            if known.column == column and is_within(known.options, options)
        ),
        None,
    )
