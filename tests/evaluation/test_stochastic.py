"""Networks that draw random numbers: neither a lucky draw of the attack nor one of the network
decides.
"""

import random
import warnings
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from evaluation.short_suite import short_suite, shortened
from evaluation.suite_run import THREAT, Net, batches, classifier, images, suite_outcome
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust import SpikingClassifier, evaluate
from sj_robust.attacks import ThreatModel
from sj_robust.classifier import PoissonEncoder
from sj_robust.evaluation import Member, make_suite, worst_case
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.draws import DRAWS, settled_draws
from sj_robust.evaluation.run.progress import Watch
from sj_robust.evaluation.subject import Subject


def test_gradient_attacks_average_and_go_on():
    for name in ("fast", "standard", "gradient", "gradients"):
        suite = make_suite(name, THREAT, classes=10, eot_samples=4)
        attacks = [
            member.attack
            for member in (*suite.members, *suite.control)
            if "square" not in member.name
        ]
        assert attacks
        assert all(attack.keywords["eot_samples"] == 4 for attack in attacks)
        assert not any(attack.keywords["keep_best"] for attack in attacks)
        plain = make_suite(name, THREAT, classes=10)
        assert not any("eot_samples" in member.attack.keywords for member in plain.members)
    paper = make_suite("paper", THREAT, classes=10, eot_samples=4).members
    assert {
        m.attack.keywords["eot_samples"] for m in paper if m.name.startswith(("pgd", "apgd"))
    } == {4}
    (whole,) = make_suite("autoattack", THREAT, classes=10, eot_samples=4).members
    assert whole.attack.keywords["version"] == "rand"
    events = make_suite("events", ThreatModel("L0", 5), classes=4, eot_samples=4).members
    assert all(m.attack.keywords["confidence"] > 0 for m in events if m.name.startswith("flips"))
    with pytest.raises(ValueError, match="eot_samples must be >= 1, got 0"):
        make_suite("fast", THREAT, classes=10, eot_samples=0)


@pytest.mark.slow
def test_a_network_that_draws_gets_several_draws_and_averaged_gradients():
    subject = Subject("mine", SpikingClassifier(Net(), 3, PoissonEncoder()), "one layer")
    said = []
    asked = Request("fast", THREAT, "noise", 3, control=False, watch=Watch(said.append))
    with shortened():
        assert assess(subject, batches(12, 12), replace(asked, draws=3)).draws == 3
    with pytest.raises(ValueError, match=r"draws random numbers.*omit draws.*--draws 10"):
        assess(subject, batches(12, 12), replace(asked, draws=1))
    with shortened(), patch_suites() as made:
        found = assess(subject, batches(12, 12), asked)
    assert found.draws == DRAWS
    assert made == [3, 3]
    (random,) = [one for one in found.findings if one["name"] == "random_outputs"]
    assert "average over 3" in random["meaning"]
    assert any("draws random numbers: 10 forwards judge an image" in text for text in said)


@contextmanager
def patch_suites():
    """What every suite that is made averages over."""
    averaged = []

    def noted(*arguments, eot_samples, **options):
        averaged.append(eot_samples)
        return short_suite(make_suite(*arguments, eot_samples=eot_samples, **options))

    with patch("sj_robust.evaluation.assess.make_suite", noted):
        yield averaged


class OnSome(nn.Module):
    """A network with something of its own on the images of one batch, those of label 2."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.last = nn.Linear(16, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        sources = {
            "noise": lambda: torch.rand(()),
            "noise of numpy": lambda: float(np.random.rand()),  # noqa: NPY002  as users draw
            "noise of python": random.random,
            "state": lambda: self.calls,
            "nothing": lambda: 0,
        }
        drawn = sources[self.what]()
        marked = (x[:, 0, 3, 3] == 1).float().unsqueeze(1)
        return self.last(x.flatten(1)) + marked * drawn * torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("noise", "draws random numbers: on images 24 to 29 .*draws=10"),
        ("noise of numpy", "draws random numbers: on images 24 to 29 .*draws=10"),
        ("noise of python", "draws random numbers: on images 24 to 29 .*draws=10"),
        ("state", r"carries state .* on images 24 to 29 .*SpikingClassifier\(net, T=...\)"),
    ],
)
def test_noise_and_state_on_later_images_are_found_and_told_apart(what, message):
    marked = batches(6, 36)
    marked[4][0][:, 0, 3, 3] = 1
    with pytest.raises(ValueError, match=message):
        evaluate(OnSome(what), marked, eps=0.1, suite="fast", draws=1, progress=False)
    assert settled_draws(OnSome("nothing"), Data.of(marked), None) == 1
    unmarked = Data.of(marked[:4])
    assert settled_draws(OnSome(what), unmarked, None) == (1 if what == "state" else DRAWS)
    if what != "state":
        with pytest.raises(ValueError, match=r"draws random numbers, though .* agree.*draws=10"):
            settled_draws(OnSome(what), unmarked, 1)
    assert settled_draws(OnSome(what), Data.of(marked), 4) == 4
    if what == "state":
        with pytest.raises(ValueError, match=message):
            settled_draws(OnSome(what), Data.of(marked), None)
    else:
        assert settled_draws(OnSome(what), Data.of(marked), None) == DRAWS


def test_numbers_that_repeat_in_every_forward_are_no_noise():
    class SeededAnew(OnSome):
        def forward(self, x):
            torch.manual_seed(0)
            return super().forward(x)

    assert settled_draws(SeededAnew("noise"), Data.of(batches(6, 12)), None) == 1
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 3))
    assert settled_draws(dropout.train(), Data.of(batches(6, 12)), None) == 1


def test_neurons_that_are_never_reset_are_told_to_carry_state():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), neuron.LIFNode(v_threshold=5.0))
    net.append(nn.Linear(3, 3))
    net[1].weight.data.fill_(1.0)
    with pytest.raises(ValueError, match="carries state from one forward into the next"):
        settled_draws(net, Data.of(batches(6, 12)), None)
    assert net[2].v == 0.0


def test_averaging_finds_what_lasts():
    """An image that one lucky draw breaks is right again in the next; averaged gradients find ones
    that stay broken.
    """
    model, (x, y) = SpikingClassifier(Net(), 3, PoissonEncoder()), images(60)
    broken, threat = [], ThreatModel("Linf", 0.2)
    for samples in (1, 5):
        member = make_suite("fast", threat, classes=10, eot_samples=samples).members[0]
        found = worst_case(model, x, y, [member], threat=threat, draws=5)
        broken.append(len(found.attacks[0].fell))
    assert broken[1] > broken[0] + 5


def test_warnings_of_an_attack_are_kept(tmp_path):
    def loud(model, x, y, *, generator):
        warnings.warn(f"only {len(x)} images", UserWarning, stacklevel=1)
        return x

    for _ in range(2):  # the second time from the progress
        suite = [Member("loud", loud)]
        outcome = suite_outcome(classifier(), batches(6, 8), suite, folder=tmp_path)
        model = classifier()
        right = [int((model(x).argmax(1) == y).sum()) for x, y in batches(6, 8)]
        assert outcome.warnings == tuple(
            sorted({f"only {count} images" for count in right if count})
        )
        assert outcome.warnings
