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
from sj_robust.evaluation import Report
from sj_robust.evaluation import assess as whole
from sj_robust.evaluation.run.proofs import Proofs, has_proofs
from sj_robust.proofs import verify

T = 2


def network():
    torch.manual_seed(3)
    node = neuron.LIFNode(tau=2.0, v_threshold=0.3, decay_input=False)
    net = nn.Sequential(layer.Conv2d(2, 4, 2), node, layer.Flatten(), layer.Linear(16, 3))
    for part in (net[0], net[3]):
        part.weight.data *= 0.7
    functional.set_step_mode(net, "m")
    return SpikingEventClassifier(net, T=T).eval()


def samples(model, count=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, (count, T, 2, 3, 3), generator=generator).float()
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
    found = verify(model, x, y, 1, norm="L0")
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
def test_a_false_proof_is_noticed(monkeypatch):
    model = network()
    x, y = samples(model)

    def false(model, batches, radii, norm):
        assert norm == "L0"
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
    assert [has_proofs(threat) for threat in threats] == [True, True, False, False]
