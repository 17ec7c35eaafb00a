"""Choice of gradient estimators: which are strong, which add something, and what cannot be
tried.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from evaluation.test_activity import T, images, network
from spikingjelly.activation_based import neuron, surrogate

from sj_robust import SpikingClassifier
from sj_robust.attacks import SampleSeeds, ThreatModel, gaussian
from sj_robust.evaluation import EstimatorSearch, search_estimators

THREAT = ThreatModel("Linf", 0.03)


def search(rows=slice(None), *, alpha=1e4, threat=THREAT, attack=None, **settings):
    """On forty images, every eighth of them labelled wrong, and a network with an arc tangent of
    some width.
    """
    function = surrogate.ATan(alpha=alpha)
    net = network(
        lambda: neuron.LIFNode(tau=2.0, decay_input=False, surrogate_function=function), "s"
    ).double()
    model, x = SpikingClassifier(net, T=T).eval(), images(40).double()
    y = model(x).argmax(1)
    y[::8] = (y[::8] + 1) % 3
    settings = EstimatorSearch(**{"candidates": [], "steps": 5, "finalists": 0} | settings)
    seeds = SampleSeeds(range(40)).rows(torch.arange(40)[rows])
    return search_estimators(
        model, x[rows], y[rows], threat=threat, settings=settings, attack=attack, seeds=seeds
    )


def test_stronger_estimators_come_first_and_are_chosen():
    trials = search(candidates=["triangle:0.5", "hart:1.2", "atan:8"], count=1, images=30)
    order = [trial.estimator for trial in trials if "+" not in trial.estimator]
    assert order == ["atan:8", "triangle:0.5", "training", "hart:1.2"]
    assert [trial.estimator for trial in trials if trial.chosen] == ["atan:8"]
    by_name = {trial.estimator: trial for trial in trials}
    left = [by_name[name].robust_accuracy for name in order]
    assert left == sorted(set(left))
    assert left[-1] == 1
    assert by_name["hart:1.2"].note.startswith("ValueError: hart:1.2 needs all time steps at once")
    assert not by_name["hart:1.2"].chosen


def test_nothing_is_chosen_that_adds_nothing():
    trials = search(alpha=2.0, candidates=["atan:2"], images=30)
    chosen = {trial.estimator for trial in trials if trial.chosen}
    assert chosen == {"training", "training+detach"}  # "atan:2" is the same


def test_every_candidate_is_tried_without_the_gradient_of_its_reset_too():
    names = ["atan:2", "triangle:1+detach", "pdsg"]
    trials = search(alpha=2.0, candidates=names, images=8)
    tried = {trial.estimator for trial in trials}
    both = {"training", "training+detach", "atan:2", "atan:2+detach", "triangle:1+detach", "pdsg"}
    assert both <= tried <= both | {"pdsg+detach"}


def test_the_best_of_the_short_attack_and_the_slow_ones_are_tried_longer():
    names = ["atan:2", "atan:4", "atan:8", "triangle:0.5", "assg"]
    settings = {"alpha": 2.0, "candidates": names, "images": 20}
    short = {trial.estimator: trial for trial in search(**settings)}
    assert {trial.steps for trial in short.values()} == {5}
    both = search(**settings, finalists=2, final_steps=9)
    always = {"training", "assg", "assg+detach"}

    def left(name):
        return short[name].robust_accuracy + short[name].margin

    finalists = [trial for trial in both if trial.steps == 9]
    best = {trial.estimator for trial in finalists} - always
    assert len(finalists) == len(always) + len(best) == 5
    assert max(map(left, best)) <= min(map(left, set(short) - always - best))
    assert list(both[:5]) == finalists
    others = [replace(trial, seconds=0, chosen=False) for trial in both[5:]]
    expected = [replace(short[one.estimator], seconds=0, chosen=False) for one in others]
    assert others == expected
    assert len(both) == len(short)
    assert {trial.estimator for trial in both if trial.chosen} <= always | best
    longest = next(trial for trial in finalists if trial.estimator == "training")
    assert longest.margin < short["training"].margin


def test_only_the_first_correct_images_count_and_the_result_is_repeatable():
    first = torch.tensor([n for n in range(40) if n % 8][:10])
    options = {"candidates": ["atan:20", "atan:2"], "steps": 7}

    def found(*images, **asked):
        trials = search(*images, **options, **asked)
        return [replace(trial, seconds=0, margin=round(trial.margin, 9)) for trial in trials]

    once = found(images=10)
    assert once == found(images=10)
    assert once == found(first)
    assert 0 < once[0].margin < 1


def test_another_attack_and_l2():
    (trial,) = search(attack=partial(gaussian, std=0.0))
    assert (trial.robust_accuracy, trial.margin) == (1, pytest.approx(1))
    trial, *_ = search(alpha=2.0, threat=ThreatModel("L2", 0.5))
    assert trial.margin < 1


def test_images_that_fall_with_one_of_two_estimators_alone_are_counted():
    trials = {
        trial.estimator: trial for trial in search(candidates=["atan:8", "hart:1.2"], images=30)
    }
    usual = trials["training"]
    assert (usual.gained, usual.lost) == (0, 0)
    assert trials["atan:8"].gained > 0
    for trial in trials.values():
        assert trial.images == 30
        more = round(30 * (usual.robust_accuracy - trial.robust_accuracy))
        assert trial.gained - trial.lost == more
    untried = trials["hart:1.2"]
    assert untried.note
    assert untried.gained == 0
