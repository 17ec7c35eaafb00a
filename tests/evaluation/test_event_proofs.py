"""Proofs of event frames in an evaluation: the bracket of changed events."""

from dataclasses import replace

import pytest
import torch
from evaluation.short_suite import shortened
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import evaluate
from sj_robust.attacks import ThreatModel
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.evaluation import Fault, Report, stress
from sj_robust.evaluation import assess as whole
from sj_robust.evaluation.run.proofs import Proofs, has_proofs
from sj_robust.proofs import verify

T = 2


def network(T=T):
    torch.manual_seed(3)
    node = neuron.LIFNode(tau=2.0, v_threshold=0.3, decay_input=False)
    net = nn.Sequential(layer.Conv2d(2, 4, 2), node, layer.Flatten(), layer.Linear(16, 3))
    for part in (net[0], net[3]):
        part.weight.data *= 0.7
    functional.set_step_mode(net, "m")
    return SpikingEventClassifier(net, T=T).eval()


def samples(model, count=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, (count, model.T, 2, 3, 3), generator=generator).float()
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 3  # one that is wrong
    return x, y


def report_of(model, x, y, **options):
    return evaluate(model, x, y, eps=1, suite="events", progress=False, **options)


def two_members(suite):
    return replace(suite, members=suite.members[:2], control=(), search=None)


@pytest.fixture(scope="module")
def proved():
    model = network()
    with shortened(two_members):
        return report_of(model, *samples(model))


@pytest.mark.slow
def test_the_bracket_of_changed_events_is_that_of_verify(proved):
    model = network()
    x, y = samples(model)
    found = verify(model, x, y, ThreatModel("L0", 1))
    verified = {number for number, one in enumerate(found.verified) if one}
    assert proved.standing("verified") == verified
    assert 0 < len(verified) < 11
    low, high = proved.bracket
    assert low.correct == len(verified)
    assert low.correct <= high.correct
    clean, *points = proved.over_eps
    assert clean.verified is None  # a threat changes an event or more
    counts = [point.verified.correct for point in points]
    assert counts[0] == low.correct
    assert counts == sorted(counts, reverse=True)
    assert "(proved)" in proved.verdict
    assert Report.from_json(proved.to_json()) == proved


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2])
def test_the_bracket_of_moved_events_is_that_of_verify(most):
    model = network()
    x, y = samples(model)
    if most == 2:
        x *= 1 + (torch.arange(x.shape[-1]) % 2)
        y = model(x).argmax(1)
    with shortened(two_members):
        report = evaluate(
            model,
            x,
            y,
            eps=ThreatModel("moves", 2, largest_shift=1, counts=most == 2),
            suite="events",
            progress=False,
        )
    found = verify(model, x, y, report.threat)
    verified = {number for number, one in enumerate(found.verified) if one}
    assert report.standing("verified") == verified
    assert len(verified) > 0
    low, high = report.bracket
    assert low.correct == len(verified)
    assert low.correct <= high.correct
    assert "moved in time" in report.verdict
    assert Report.from_json(report.to_json()) == report


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["L0", "moves"])
def test_an_evaluation_of_counts_does_not_depend_on_the_batches(norm):
    """A sample whose events are 0 or 1 stands or falls alone as it does beside counts."""
    model = network()
    x = samples(model)[0][:6]
    x[::2] *= 3
    y = model(x).argmax(1)
    threat = ThreatModel(norm, 2, counts=True)
    given = {"eps": threat, "suite": "events", "progress": False}
    with shortened(two_members):
        reports = [evaluate(model, x, y, batch_size=size, **given) for size in (6, 1)]
    names = ["verified", *(row.member for row in reports[0].attacks)]
    assert len(names) > 2
    for name in names:
        assert reports[0].standing(name) == reports[1].standing(name)
    assert reports[0].threat == threat
    assert "in frames of event counts" in reports[0].verdict
    assert Report.from_json(reports[0].to_json()) == reports[0]
    low, high = reports[0].bracket
    assert 0 < low.correct <= high.correct


@pytest.mark.slow
def test_stress_of_counts_attacks_counts():
    model = network()
    x, _ = samples(model)
    x *= 3
    y = model(x).argmax(1)
    faults = [Fault("jitter", 1)]
    given = {"faults": faults, "draws": 1, "steps": 3, "progress": False}
    with pytest.raises(ValueError, match="for numbers of events pass counts=True"):
        stress(model, x, y, eps=3, **given)
    threat = ThreatModel("L0", 3, counts=True)
    report = stress(model, x, y, eps=threat, **given)
    assert report.variants == ("none", "jitter:1")
    assert report.threat == threat


def test_later_batches_are_checked_too():
    model = network()
    x, y = samples(model)
    x[-1, 0, 0, 0, 0] = 2.0
    with pytest.raises(ValueError, match="for numbers of events pass counts=True"):
        evaluate(model, x, y, eps=1, batch_size=4, progress=False)


def test_a_total_shift_limits_moves_and_how_far_each_goes():
    model = network(T=4)
    x, y = samples(model)
    threat = ThreatModel("moves", 5, total_shift=1)
    T = x.shape[1]
    for limited, as_good_as in (
        (threat, ThreatModel("moves", 1, largest_shift=1)),
        (replace(threat, total_shift=T), ThreatModel("moves", T)),
        (replace(threat, eps=1, total_shift=9), ThreatModel("moves", 1)),
        (ThreatModel("moves", 1, largest_shift=9), ThreatModel("moves", 1)),
    ):
        found = verify(model, x, y, limited)
        assert replace(found, threat=as_good_as) == verify(model, x, y, as_good_as)


@pytest.mark.slow
def test_a_false_proof_is_noticed(monkeypatch):
    model = network()
    x, y = samples(model)

    def false(model, batches, radii, threat):
        assert threat.norm == "L0"
        every = tuple(range(1, len(y)))
        return Proofs({"1": every}, len(y), {})

    monkeypatch.setattr(whole, "prove", false)
    with (
        shortened(two_members),
        pytest.raises(ValueError, match="proof or attack has a bug"),
    ):
        report_of(model, x, y)


def test_of_which_threats_there_are_proofs():
    threats = [ThreatModel(norm, 1) for norm in ("Linf", "L0", "L2", "moves")]
    assert [has_proofs(threat) for threat in threats] == [True, True, False, True]
