"""Networks that draw random numbers: neither a lucky draw of the attack nor one of the network
decides.
"""

import random
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from evaluation.short_suite import short_suite, shortened
from evaluation.suite_run import THREAT, Net, batches, classifier, images, suite_outcome
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust import SpikingClassifier, evaluate
from sj_robust.attacks import SampleSeeds, ThreatModel, random_flips, square
from sj_robust.classifier import PoissonEncoder
from sj_robust.evaluation import Fault, Member, make_suite, worst_case
from sj_robust.evaluation.assess import assess, stress_network
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.draws import DRAWS, settled_draws
from sj_robust.evaluation.run.estimator_search import short_attack
from sj_robust.evaluation.run.loop import Asked, alone, run
from sj_robust.evaluation.run.member import Variant, scored
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
    if what == "state":
        for draws in (None, 4):
            with pytest.raises(ValueError, match=message):
                settled_draws(OnSome(what), Data.of(marked), draws)
    else:
        assert settled_draws(OnSome(what), Data.of(marked), 4) == 4
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


class Noisy(nn.Module):
    """Logits of a network with noise, from torch's generator or one of its own."""

    def __init__(self, std, generator=None):
        super().__init__()
        self.std = std
        self.generator = generator
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False))
        rows = torch.linspace(-1, 1, 16) * torch.tensor([[3.0], [0.0], [-3.0]])
        self.net[1].weight.data.copy_(rows)

    def forward(self, x):
        logits = self.net(x)
        return logits + self.std * torch.randn(logits.shape, generator=self.generator)


def of_the_network(net, size):
    """Random images with the labels that the network gives without its noise."""
    x = torch.rand(size, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    return x, net.net(x).argmax(1)


def idle(model, x, y, *, generator):
    return x


def test_attacks_that_change_nothing_break_nothing():
    """Each would else be one more lottery ticket: of these images many are close to even."""
    net = Noisy(1.5)
    x, y = of_the_network(net, 80)
    members = [Member(f"idle{number}", idle, threat=THREAT) for number in range(12)]
    found = worst_case(net, x, y, members, threat=THREAT, draws=DRAWS)
    often = torch.stack([net(x).argmax(1) == y for _ in range(400)]).double().mean(0)
    close = ((often > 0.3) & (often < 0.7)).sum()
    assert close > 8
    assert not any(row.fell for row in found.attacks)
    assert abs(found.clean.correct - int((often > 0.5).sum())) <= close // 2


def test_so_do_they_in_the_validation_of_a_training_and_under_noisy_faults():
    net = Noisy(1.5)
    x, y = of_the_network(net, 80)
    seeds = SampleSeeds(range(80))
    right = alone(net, x, y, {"idle": idle, "other": idle}, seeds=seeds)
    assert right["clean"] == right["idle"] == right["other"] < 80
    quiet = Noisy(0.0)
    quiet.net[0] = nn.Flatten(2)
    net = SpikingClassifier(nn.Sequential(quiet.net, neuron.IFNode(step_mode="m")), 4)
    label = net(x).argmax(1)
    fault = Fault("lost_spikes", 0.3)
    request = Request("stress", THREAT, "noise", 3, faults=[fault])
    member = Member("idle", idle, threat=THREAT)
    with patch("sj_robust.evaluation.assess._attack", lambda *_, **__: member):
        report = stress_network(Subject("mine", net, "one layer"), [(x, label)], request)
    rows = [row for row in report.rows if row.variant == "lost_spikes:0.3"]
    clean, attacked = rows
    assert clean.fell
    assert not attacked.fell


def test_generators_of_one_network_stay_apart():
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.Generator(), torch.Generator()

        def forward(self, x):
            drawn = [torch.randn(x.shape, generator=one) for one in (self.first, self.second)]
            return x + drawn[0] - drawn[1]

    logits = scored(Difference(), torch.zeros(500, 3), torch.zeros(500).long(), seed=4)
    assert 1.2 < logits.std() < 1.6


def test_an_attack_that_has_nothing_left_asks_nothing():
    net = Noisy(0.1)
    x, y = of_the_network(net, 10)
    asked = []
    net.register_forward_hook(lambda *_: asked.append(1))

    def all_wrong(model, x, y, *, generator):
        return 1 - x

    members = [Member(f"wrong{number}", all_wrong) for number in range(4)]
    worst_case(net, x, y, members, threat=None, draws=3)
    assert len(asked) <= 12  # by the network and by the copy that judges


def test_a_generator_of_the_network_repeats_and_stays_as_it_was():
    generator = torch.Generator().manual_seed(1)
    net = SpikingClassifier(Net(), 3, PoissonEncoder(generator))
    x, y = images(30)
    member = make_suite("fast", THREAT, classes=10, eot_samples=3).members[0]
    close = replace(member, attack=lambda model, x, y, *, generator: (x + 1e-7).clamp(0, 1))
    before = generator.get_state()
    rows = []
    for _ in range(2):
        found = evaluation_of(net, x, y, [member, replace(close, name="close", group="own")])
        rows.append([(row.member, row.seen, row.fell) for row in found.rows])
        of_close = found.potential[1]["layers"].values()
        assert max(map(max, of_close)) < 1e-6  # both runs have the same spikes at the input
    assert rows[0] == rows[1]
    assert torch.equal(generator.get_state(), before)


def evaluation_of(net, x, y, members):
    """Outcome of members on one batch."""
    variant = Variant(members)
    asked = Asked(THREAT, DRAWS)
    return run(net, Data.of([(x, y)]), [variant], asked=asked, network="net", shared=False)


@pytest.mark.parametrize("attack", ["square", "flips"])
def test_attacks_without_gradient_do_not_stop_at_a_lucky_forward(attack):
    broken = []
    for std, samples in ((0.0, 1), (0.6, 1), (0.6, 3)):
        net = Noisy(std)
        x, y = of_the_network(net, 60)
        threat = ThreatModel("Linf", 0.15)
        own = partial(square, eps=0.15, queries=60, eot_samples=samples)
        if attack == "flips":
            x = (x > 0.5).float()
            x, y = x.reshape(60, 2, 2, 2, 2), net.net(x).argmax(1)
            threat = ThreatModel("L0", 3)
            own = partial(random_flips, eps=3, tries=60, eot_samples=max(1, 4 * (samples - 1)))
        found = worst_case(
            net, x, y, [Member("own", own, threat=threat)], threat=threat, draws=DRAWS
        )
        broken.append(len(found.attacks[0].fell))
    without_noise, lucky, averaged = broken
    assert averaged > lucky + 3
    assert averaged > 0.6 * without_noise


def test_a_stress_test_averages_where_the_network_draws():
    net = Noisy(0.8)
    x, y = of_the_network(net, 40)
    faults = [Fault("weight_bits", 8)]
    said = []
    request = Request("stress", THREAT, "noise", 3, faults=faults, watch=Watch(said.append))
    subject = Subject("mine", net, "one layer")
    with patch("sj_robust.evaluation.assess.short_attack", wraps=short_attack) as made:
        report = stress_network(subject, [(x, y)], request)
    assert {call.kwargs["draws"] for call in made.call_args_list} == {3}
    assert any("draws random numbers: 10 forwards" in text for text in said)
    assert report.variants == ("none", "weight_bits:8")
    with pytest.raises(ValueError, match="carries state"):
        stress_network(Subject("mine", OnSome("state"), "one layer"), marked_batches(), request)


def marked_batches():
    marked = batches(6, 12)
    marked[0][0][:, 0, 3, 3] = 1
    return marked


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
