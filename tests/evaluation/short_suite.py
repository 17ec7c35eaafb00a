"""Suites with all their attacks, but short ones, for tests of what is made of their outcome."""

import contextlib
from dataclasses import replace
from functools import partial

import pytest

from sj_robust.attacks import flip_events, move_events
from sj_robust.evaluation import EstimatorSearch, make_suite
from sj_robust.evaluation import assess as whole

_LIMITS = {"steps": 10, "tries": 20, "queries": 20, "forwards": 100}
_LEVEL_STEPS = 3


@contextlib.contextmanager
def shortened(change=None):
    """Within it an evaluation takes what ``change`` makes of its suite, None for
    :func:`short_suite`.
    """

    level = whole._level

    def changed(*arguments, **options):
        return (change or short_suite)(make_suite(*arguments, **options))

    def short_level(*arguments):
        member = _short(level(*arguments))
        steps = min(member.attack.keywords["steps"], _LEVEL_STEPS)
        return replace(member, attack=partial(member.attack, steps=steps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "make_suite", changed)
        patch.setattr(whole, "_level", short_level)
        yield


def short_suite(suite):
    """One with few steps, queries and candidates. Without a choice of estimators, only the attacks
    on the plain copy are shortened.
    """
    plain = tuple(map(_short, suite.plain))
    if suite.search is None:
        return replace(suite, plain=plain)
    few = EstimatorSearch(candidates=("pdsg", "atan:2"), images=8, steps=5, count=2, final_steps=6)
    members = tuple(map(_short, suite.members))
    control = tuple(map(_short, suite.control))
    return replace(suite, members=members, control=control, search=few, plain=plain)


def _short(member):
    if not isinstance(member.attack, partial):  # crafted on another network
        own = _short(replace(member, attack=member.attack.attack))
        return replace(member, attack=replace(member.attack, attack=own.attack))
    given = member.attack.keywords
    shorter = {name: min(given[name], limit) for name, limit in _LIMITS.items() if name in given}
    if member.attack.func in (flip_events, move_events):
        shorter = {"steps": 5, "queries": 5, "probes": 1}
    return replace(member, attack=partial(member.attack, **shorter))
