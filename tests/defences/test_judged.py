"""Networks with random codes under `evaluate`: it notices them, and more draws change nothing."""

from dataclasses import replace

import pytest
from evaluation.short_suite import short_suite, shortened
from evaluation.suite_run import Net, images

from sj_robust import SpikingClassifier, evaluate
from sj_robust.classifier import PoissonEncoder
from sj_robust.defences import SmoothingEncoder

CODES = {
    "poisson": PoissonEncoder,
    "rsc": lambda: SmoothingEncoder(0.15),
}


def two_attacks(suite):
    short = short_suite(suite)
    return replace(short, members=short.members[:2], control=())


def judged(name, **options):
    x, y = images(30)
    model = SpikingClassifier(Net(), 3, CODES[name]())
    with shortened(two_attacks):
        return evaluate(model, x, y, eps=0.1, suite="fast", progress=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODES)
def test_the_worst_case_with_10_draws_is_that_with_30(name):
    few = judged(name)
    many = judged(name, draws=30)
    assert few.draws == 10
    low, high = few.worst_case.interval
    assert low <= many.worst_case.accuracy <= high
    assert few.worst_case.accuracy < few.clean.accuracy - 0.05
    assert few.worst_case.accuracy > 0.05
