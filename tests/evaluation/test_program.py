"""The program as an attack: what it finds, what it leaves alone, and what it never breaks."""

import json
from pathlib import Path

import pytest
import torch
from attacks.oracle import linear_oracle
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel
from sj_robust.data import load_images
from sj_robust.evaluation import from_checkpoint
from sj_robust.evaluation.run import proofs as module
from sj_robust.evaluation.run.proofs import program
from sj_robust.models import pretrained

KNOWN = Path(__file__).parents[1] / "attacks" / "ground_truth"
TWO_LAYERS = KNOWN / "dlif-T2-two-layers.pt"
EPS = 0.05
HARD = [31, 115]
"""Images of which the search over spikes ends far from the other side."""


def two_layers(numbers):
    """The network with two spiking layers, and some of its images and labels."""
    test = load_images("digits", test_limit=128).test
    x, y = (torch.stack(part) for part in zip(*(test[i] for i in numbers), strict=True))
    return from_checkpoint(TWO_LAYERS).model, x, y


def wrong(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) != y).tolist()


def test_it_breaks_what_the_search_does_not_and_nothing_that_is_verified():
    verdicts = json.loads(TWO_LAYERS.with_suffix(".json").read_text(encoding="utf-8"))[str(EPS)]
    verified = verdicts.index("v")
    model, x, y = two_layers([*HARD, verified])
    before = x.clone()
    state = torch.get_rng_state()
    x_adv = program(model, x, y, eps=EPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert wrong(model, x_adv, y) == [True, True, False]
    assert torch.equal(x_adv[2], x[2])
    assert bool(ThreatModel("Linf", EPS).contains(x, x_adv).all())
    assert not any(module._forward_hooks for module in model.modules())
    alone = program(model, x[1:2], y[1:2], eps=EPS)
    assert torch.equal(alone[0], x_adv[1])


@pytest.mark.parametrize("limit", ["_SPIKES", "nodes"])
def test_its_work_is_limited(limit, monkeypatch):
    model, x, y = two_layers(HARD[:1])
    if limit == "_SPIKES":
        monkeypatch.setattr(module, "_SPIKES", 2 * (2 * 64 + 4 * 16) - 1)
        assert torch.equal(program(model, x, y, eps=EPS), x)
        monkeypatch.setattr(module, "_SPIKES", 2 * (2 * 64 + 4 * 16))
        assert wrong(model, program(model, x, y, eps=EPS), y) == [True]
    else:
        model, x, y = two_layers([20])
        monkeypatch.setattr("sj_robust.proofs.mip._OPEN", 3)
        assert torch.equal(program(model, x, y, eps=0.1), x)


def test_what_no_program_is_known_of_comes_back_as_it_is():
    oracle = linear_oracle(3, "Linf")
    x = oracle.x.view(60, 1, 3, 4)
    assert torch.equal(program(oracle.model, x, oracle.y, eps=oracle.eps), x)
    images = torch.rand(2, 1, 8, 8)
    labels = torch.tensor([0, 1])
    large = pretrained("digits/lif-at")
    assert torch.equal(program(large, images, labels, eps=0.1), images)
    for hidden in (nn.ReLU(), nn.PReLU()):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), hidden, nn.Linear(16, 10), LIFNode())
        unknown = SpikingClassifier(net, T=2).eval()
        answers = unknown(images).argmax(1)
        assert torch.equal(program(unknown, images, answers, eps=0.1), images)
    small = two_layers([0])[0].train()  # of which nothing is known in this mode
    assert torch.equal(program(small, images, labels, eps=0.0), images)
