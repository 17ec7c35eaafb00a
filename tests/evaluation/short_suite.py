"""Suites with all their attacks, but short ones, for tests of what is made of their outcome."""

import contextlib
from dataclasses import replace
from functools import partial

import pytest

from sj_robust.evaluation import EstimatorSearch, make_suite
from sj_robust.evaluation import assess as whole

_LIMITS = {"steps": 10, "tries": 20, "queries": 20, "forwards": 100}


@contextlib.contextmanager
def shortened(change=None):
    """Within it an evaluation takes what ``change`` makes of its suite, None for
    :func:`short_suite`.
    """

    def changed(*arguments, **options):
        return (change or short_suite)(make_suite(*arguments, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "make_suite", changed)
        yield


def short_suite(suite):
    """One that chooses estimators, with few steps, queries and candidates."""
    if suite.search is None:
        return suite
    members, control = (
        tuple(replace(member, attack=_short(member.attack)) for member in group)
        for group in (suite.members, suite.control)
    )
    few = EstimatorSearch(candidates=("pdsg", "atan:2"), images=8, steps=5, count=2)
    return replace(suite, members=members, control=control, search=few)


def _short(attack):
    given = {
        name: min(attack.keywords[name], limit)
        for name, limit in _LIMITS.items()
        if name in attack.keywords
    }
    return partial(
        attack, **given or {"queries": 20, "probes": 4}
    )  # the latter for a search among events
