"""Few cases in which every pair of choices occurs, in place of all combinations; and of many cases
those that are quick.
"""

import itertools
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import astuple
from typing import Any

import pytest


def pairs(case: Any) -> set[Any]:
    """Every pair of its choices."""
    values = case if isinstance(case, tuple) else astuple(case)
    return set(itertools.combinations(enumerate(values), 2))


def pairwise(first: list[Any], at_random: Callable[[random.Random], Any], offers: int) -> list[Any]:
    """Cases in which every pair of choices that is offered occurs, behind the first those with most
    new ones.
    """
    draw = random.Random(1)
    offered = {at_random(draw): set() for _ in range(offers)}
    for case in offered:
        offered[case] = pairs(case)
    missing = set().union(*offered.values()).difference(*map(pairs, first))
    chosen = list(first)
    while missing:
        case = max(offered, key=lambda offer: len(offered[offer] & missing))
        chosen.append(case)
        missing -= offered.pop(case)
    return chosen


def every_pair(choices: Mapping[str, Iterable[Any]]) -> list[tuple[Any, ...]]:
    """Every pair of values of different choices, which are hashable, in few cases; the same ones
    every time.
    """
    values = [list(several) for several in choices.values()]
    numbers = [range(len(several)) for several in values]

    def at_random(draw: random.Random) -> tuple[int, ...]:
        return tuple(draw.choice(several) for several in numbers)

    offers = 20 * max(a * b for a, b in itertools.combinations(map(len, values), 2))
    cases = []
    for row in pairwise([], at_random, offers):
        chosen = zip(values, row, strict=True)
        cases.append(tuple(several[i] for several, i in chosen))
    return cases


def mostly_slow(cases: Iterable[Any], *, quick: Collection[Any]) -> list[Any]:
    """Parameters of a test, single values or tuples; all but the quick ones run with the slow
    tests.
    """
    parameters = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if case in quick else pytest.mark.slow
        parameters.append(pytest.param(*values, marks=marks))
    return parameters


def each_in_turn(*choices: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every value of every choice, in as many cases as the longest has values."""
    several = [list(values) for values in choices]
    longest = max(map(len, several))
    endless = map(itertools.cycle, several)
    return list(itertools.islice(zip(*endless, strict=True), longest))
