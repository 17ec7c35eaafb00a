"""What a whole evaluation looks at: at which radii, and on how many images."""

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from evaluation.short_suite import short_suite, shortened
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import assess as assessment
from sj_robust.evaluation import diagnose
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.progress import Watch
from sj_robust.evaluation.subject import Subject


def without_attacks(suite):
    return replace(suite, search=None, members=suite.members[:1], control=(), plain=())


def one_of_each(suite):
    """Of the members that attack alike, the first."""
    short = short_suite(suite)
    members = {member.attack.func: member for member in reversed(short.members)}
    return replace(short, members=tuple(reversed(members.values())), control=(), plain=())


def assessed(threat, sizes=(3,), *, is_sorted=False, **more):
    """A report on batches of so many images for a linear network, and what was said meanwhile."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    labels = (torch.arange(sum(sizes)) % 3).split(list(sizes))
    if is_sorted:
        labels = torch.cat(labels).sort().values.split(list(sizes))
    batches = [(torch.rand(len(y), 1, 2, 2), y) for y in labels]
    said: list[str] = []
    quick = partial(diagnose, steps=2)
    with shortened(without_attacks), patch.object(assessment, "diagnose", quick):
        watch = Watch(said.append)
        request = Request("fast", threat, "made up", 3, proofs=False, watch=watch, **more)
        report = assessment.assess(Subject("mine", net, "one layer"), batches, request)
    return report, said


@pytest.mark.parametrize(
    ("norm", "eps", "radii"),
    [
        ("Linf", 0.01, [0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04]),
        ("Linf", 0.4, [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1]),  # all of [0, 1] is within reach
        ("L2", 0.4, [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.6]),
    ],
)
def test_accuracy_over_eps_goes_from_a_quarter_of_the_radius_to_four_times_it(norm, eps, radii):
    report, _ = assessed(ThreatModel(norm, eps))
    assert [float(point.eps) for point in report.over_eps] == radii


def test_accuracy_over_eps_has_the_radii_that_are_asked_for():
    report, _ = assessed(ThreatModel("Linf", 0.2), radii=(0.05, 0.2))
    assert [float(point.eps) for point in report.over_eps] == [0, 0.05, 0.2]


def test_firing_and_accuracy_over_eps_are_of_the_first_256_images_and_attacks_of_all():
    report, said = assessed(ThreatModel("L2", 0.1), sizes=(200, 60), radii=(0.1,))
    assert said[0] == "firing rates on 256 images"
    assert {point.total for point in report.over_eps} == {256}
    assert len(report.labels) == 260
    assert not report.warnings


@pytest.mark.parametrize("images", [1, 3])
def test_without_checks_there_are_the_attacks_alone(images):
    checked, _ = assessed(ThreatModel("Linf", 0.1), sizes=(images,))
    assert checked.findings
    report, said = assessed(ThreatModel("Linf", 0.1), sizes=(images,), checks=False)
    assert report.outcome == checked.outcome
    assert report.over_eps == ()
    assert report.findings == ()
    assert "checks for gradient masking" not in said


def test_figures_of_the_first_images_are_doubted_where_these_are_of_one_class():
    report, _ = assessed(ThreatModel("Linf", 0.1), sizes=(400, 400), is_sorted=True, checks=False)
    (warning,) = report.warnings
    assert warning.startswith("The first 256 images")
    assert warning.endswith("hold 1 of 3 classes: shuffle the images.")
    thousand = torch.randint(1000, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert assessment._of_few_classes(thousand, thousand[:256]) == []
    assert assessment._of_few_classes(sorted(thousand), sorted(thousand)[:256])


@pytest.mark.parametrize(("suite", "sizes"), [("fast", (8, 22)), ("standard", (8,))])
def test_no_forward_sees_more_images_than_a_batch_or_than_the_diagnosis(suite, sizes, monkeypatch):
    """Whoever takes small batches has little memory."""
    monkeypatch.setattr(assessment, "DIAGNOSED", 20)
    torch.manual_seed(0)
    nodes = [neuron.IFNode(step_mode="m") for _ in range(2)]
    net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 4), nodes[0], nn.Linear(4, 3), nodes[1])
    model = SpikingClassifier(net, T=2)
    x = torch.rand(22, 1, 2, 2)
    with torch.no_grad():
        y = model(x).argmax(1)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = []
    for size in sizes:
        seen.clear()
        parts = list(zip(x.split(size), y.split(size), strict=True))
        request = Request(
            suite, ThreatModel("Linf", 0.05), "made up", 3, proofs=False, radii=(0.05,)
        )
        with shortened(one_of_each):
            report = assessment.assess(Subject("mine", model, "two layers"), parts, request)
        assert size == 22 or max(seen) <= assessment.DIAGNOSED
        chosen = [(row["estimator"], row["chosen"]) for row in report.estimators]
        found.append((chosen, report.firing))
    assert found[0] == found[-1]
