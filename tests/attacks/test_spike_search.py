"""Spike search: the table of the first layer against the network, every move, starts, the quicker
copy, and images that are verified.
"""

import sys
import warnings
from itertools import pairwise

import pytest
import torch
from attacks.table import (
    Recorder,
    assert_within,
    linear_model,
    predicted,
    seeded,
    two_classes,
)
from spikingjelly.activation_based import encoding, layer, neuron
from torch import Tensor, nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import SampleSeeds, ThreatModel, spike_search
from sj_robust.attacks._first_spikes import first_spikes
from sj_robust.attacks._moves import MOVES, Moves, Place
from sj_robust.attacks._spike_walk import Plan
from sj_robust.attacks.call import quicker
from sj_robust.attacks.spike_search import searched
from sj_robust.classifier import PoissonEncoder, SpikingEventClassifier
from sj_robust.core.host import functional
from sj_robust.defences import HomeostaticNode
from sj_robust.models import NetworkSpec, build_classifier

EPS = {"Linf": 0.2, "L2": 0.6}


def spiking(*layers: nn.Module, step_mode: str = "m", T: int = 4, **options) -> SpikingClassifier:
    torch.manual_seed(0)
    net = nn.Sequential(*layers)
    functional.set_step_mode(net, step_mode)
    return SpikingClassifier(net, T=T, **options).eval()


def uneven(node: DLIFNode) -> DLIFNode:
    """A gain of its own in every step."""
    with torch.no_grad():
        node.input_gain.copy_(torch.tensor([1.0, 0.5, 1.5, 0.8]))
    return node


def small(node: nn.Module, **options) -> SpikingClassifier:
    """Two channels of 5 x 4 pixels, strided convolution, batch norm that does something."""
    norm = layer.BatchNorm2d(3)
    torch.manual_seed(1)
    norm.running_mean.uniform_(-0.3, 0.3)
    norm.running_var.uniform_(0.1, 0.6)
    convolution = layer.Conv2d(2, 3, 3, stride=2, padding=1)
    head = [layer.Flatten(), layer.Linear(18, 4)]
    return spiking(convolution, norm, node, *head, **options)


AFFINE = {
    "dlif": lambda: small(uneven(DLIFNode(T=4, tau=3.0))),
    "lif": lambda: small(neuron.LIFNode(tau=2.0, v_threshold=0.4)),
    "soft reset, normalised": lambda: small(
        neuron.IFNode(v_reset=None), mean=[0.4, 0.5], std=[0.3, 0.2]
    ),
    "single steps": lambda: small(neuron.LIFNode(v_threshold=0.3), step_mode="s"),
    "package": lambda: build_classifier(
        NetworkSpec(image_shape=(2, 5, 4), classes=4, T=4, channels=(3,))
    ).eval(),
}


def first_layer(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Currents of the first step and spikes of the first layer, [N, D] and [T, N, D]."""
    node = next(m for m in model.modules() if hasattr(m, "v_threshold"))
    currents = []
    spikes = []

    def called(module, args, output):
        seen = node.step_mode == "m"
        currents.append(args[0][0] if seen else args[0])
        spikes.append(output if seen else output[None])

    hook = node.register_forward_hook(called)
    with torch.no_grad():
        model(x)
    hook.remove()
    return currents[0].flatten(1), torch.cat(spikes).flatten(2)


def current_of(spikes, x: Tensor) -> Tensor:
    """Currents of the neurons that pixels [N, D] drive."""
    return (x[:, spikes.index] * spikes.weight).sum(2) + spikes.bias


@pytest.mark.parametrize("name", AFFINE)
@torch.no_grad()
def test_currents_and_spike_trains_of_the_first_layer_are_those_of_the_network(name):
    model = AFFINE[name]()
    x = torch.rand(200, 2, 5, 4, generator=seeded())
    spikes = first_spikes(model, x)
    currents, trains = first_layer(model, x)
    found = current_of(spikes, x.flatten(1))
    torch.testing.assert_close(found, currents, rtol=1e-4, atol=1e-5)
    interval = torch.bucketize(found, spikes.thresholds, right=True)
    near = (found[..., None] - spikes.thresholds).abs().amin(2) < 1e-5
    assert near.double().mean() < 0.01
    power = 2.0 ** torch.arange(len(trains))
    code = torch.tensordot(power, trains, 1)[~near]
    interval = interval[~near]
    of_interval = {number: code[interval == number].unique() for number in interval.unique()}
    assert all(len(codes) == 1 for codes in of_interval.values())  # one train in every interval
    neighbours = list(of_interval.items())
    assert len(neighbours) > 2
    for (a, codes), (b, others) in pairwise(neighbours):
        assert b != a + 1 or codes != others  # and another one in the next


class Voting(nn.Module):
    """A vote over an image and a shifted copy of it, in one batch."""

    def __init__(self):
        super().__init__()
        self.model = spiking(
            layer.Flatten(), layer.Linear(16, 5), neuron.IFNode(), layer.Linear(5, 3)
        )

    def forward(self, x):
        return self.model(torch.cat([x, x.roll(1, -1)])).view(2, len(x), -1).mean(0)


NOT_AFFINE = {
    "no spikes": (linear_model(16), torch.rand(2, 1, 4, 4)),
    "a function": (lambda x: x.flatten(1), torch.rand(2, 1, 4, 4)),
    "max pooling": (
        spiking(layer.MaxPool2d(2), layer.Flatten(), neuron.IFNode(), layer.Linear(4, 3)),
        torch.rand(2, 1, 4, 4),
    ),
    "latency": (
        spiking(
            layer.Flatten(),
            layer.Linear(16, 5),
            neuron.IFNode(v_threshold=0.1),
            layer.Linear(5, 3),
            encoder=encoding.LatencyEncoder(4),
        ),
        torch.rand(2, 1, 4, 4),
    ),
    "values of their own": (
        spiking(layer.Flatten(), layer.Linear(16, 5), HomeostaticNode(4), layer.Linear(5, 3)),
        torch.rand(2, 1, 4, 4),
    ),
    "a batch enlarged inside": (Voting().eval(), torch.rand(2, 1, 4, 4)),
    "event frames": (
        SpikingEventClassifier(
            nn.Sequential(nn.Flatten(2), nn.Linear(32, 3), DLIFNode(T=4)), T=4
        ).eval(),
        torch.randint(2, (2, 4, 2, 4, 4)).float(),
    ),
}


@pytest.mark.parametrize("name", NOT_AFFINE)
@torch.no_grad()
def test_nothing_is_said_of_spikes_that_are_no_function_of_one_affine_current(name):
    model, x = NOT_AFFINE[name]
    assert first_spikes(model, x) is None


@pytest.mark.parametrize("name", ["max pooling", "latency", "a batch enlarged inside"])
def test_spikes_that_cannot_be_flipped_are_told_and_the_other_moves_remain(name):
    model, x = NOT_AFFINE[name]
    y = predicted(model, x)
    options = {"eps": 0.1, "starts": [x], "forwards": 60, "generator": seeded()}
    with pytest.warns(UserWarning, match="flips no spikes of this network"):
        x_adv = spike_search(model, x, y, **options)
    assert_within(x_adv, x, "Linf", 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spike_search(model, x, y, moves=["elements", "patch"], **options)
        spike_search(lambda images: model(images), x, y, **options)


class Twice(nn.Module):
    """A neuron in two places."""

    def __init__(self):
        super().__init__()
        self.node = neuron.LIFNode(v_threshold=0.4, step_mode="m")
        self.last = nn.Linear(40, 4)

    def forward(self, x_seq):
        return self.last(self.node(self.node(x_seq.flatten(2))))


def test_a_neuron_that_runs_twice_has_no_quicker_copy():
    model = SpikingClassifier(Twice(), T=4).eval()
    x = torch.rand(5, 2, 5, 4, generator=seeded())
    assert quicker(model, x, model(x)) is model
    y = predicted(model, x)
    spike_search(model, x, y, eps=0.1, starts=[x], moves=["patch"], forwards=20)


@pytest.mark.parametrize("kind", ["lif", "plif", "dlif", "own", "steps"])
def test_slower_neurons_have_a_copy_with_the_same_logits(kind):
    class Own(neuron.LIFNode):
        def neuronal_fire(self):
            return super().neuronal_fire()

    nodes = {
        "lif": neuron.LIFNode(tau=2.0, v_threshold=0.4),
        "plif": neuron.ParametricLIFNode(init_tau=2.0, v_threshold=0.4),
        "dlif": DLIFNode(T=4, tau=3.0),
        "own": Own(v_threshold=0.4),
        "steps": neuron.LIFNode(v_threshold=0.4),
    }
    model = small(nodes[kind], step_mode="s" if kind == "steps" else "m")
    x = torch.rand(50, 2, 5, 4, generator=seeded())
    with torch.no_grad():
        logits = model(x)
        copy = quicker(model, x, logits)
        assert (copy is model) == (kind not in ("lif", "plif"))
        torch.testing.assert_close(copy(x), logits)
        assert quicker(model, x, logits + 1) is model
    assert quicker(model.net, x, logits) is model.net


def test_what_breaks_the_copy_counts_only_if_it_breaks_the_network(monkeypatch):
    model = small(neuron.LIFNode(tau=2.0, v_threshold=0.4))
    x = torch.rand(6, 2, 5, 4, generator=seeded())
    y = predicted(model, x)
    recorder = Recorder(lambda images: model(images).roll(1, 1))  # wrong of every image
    monkeypatch.setattr(sys.modules[spike_search.__module__], "quicker", lambda *given: recorder)
    x_adv = spike_search(model, x, y, eps=1e-6, starts=[x], forwards=100, generator=seeded())
    assert torch.equal(predicted(model, x_adv), y)
    assert len(recorder.seen) > 5


def place(moves: Moves, n: int = 300) -> Place:
    generator = seeded(3)
    x = 0.3 + 0.4 * torch.rand(n, 40, generator=generator)
    pool = (x[:4] + 0.05).view(2, 2, 40)
    return Place(
        x=x,
        low=x - 0.1 * torch.rand(n, 40, generator=generator),
        high=x + 0.1 * torch.rand(n, 40, generator=generator),
        slope=torch.randn(n, 40, generator=generator),
        rows=torch.arange(n) % 2,
        pool=pool,
    )


def moved(kind: str) -> tuple[Moves, Place, Tensor]:
    """Proposals of a kind for images of the small network."""
    with torch.no_grad():
        moves = Moves((2, 5, 4), first_spikes(AFFINE["dlif"](), torch.rand(1, 2, 5, 4)))
    here = place(moves)
    numbers = torch.rand(len(here.x), moves.numbers(kind), generator=seeded(4))
    before = here.x.clone()
    proposal = moves.propose(kind, here, numbers)
    assert torch.equal(here.x, before)
    assert proposal.shape == before.shape
    return moves, here, proposal


@pytest.mark.parametrize("kind", MOVES)
def test_a_move_changes_something_and_stays_in_the_box(kind):
    _, here, proposal = moved(kind)
    if kind != "cross":  # whose images are those of the pool
        assert bool((proposal >= here.low - 1e-6).all())
        assert bool((proposal <= here.high + 1e-6).all())
    assert (proposal != here.x).any(1).double().mean() > 0.6


def test_elements_are_one_to_three_half_of_them_at_the_ends():
    _, here, proposal = moved("elements")
    changed = (proposal != here.x).sum(1)
    assert changed.unique().tolist() == [1, 2, 3]
    at_end = (proposal - here.low).abs() < 1e-6
    at_end |= (proposal - here.high).abs() < 1e-6
    extreme = (at_end | (proposal == here.x)).all(1)
    assert 0.4 < extreme.double().mean() < 0.6


def test_a_patch_is_a_square_of_one_share_per_channel():
    _, here, proposal = moved("patch")
    changed = (proposal != here.x).view(-1, 2, 5, 4)
    share = ((proposal - here.low) / (here.high - here.low)).view(-1, 2, 5, 4)
    sizes = set()
    for mask, value in zip(changed, share, strict=True):
        for channel, values in zip(mask, value, strict=True):
            places = channel.nonzero()
            if len(places) == 0:
                continue
            side = (places.amax(0) - places.amin(0) + 1).tolist()
            assert side[0] == side[1]
            assert len(places) == side[0] ** 2
            assert values[channel].max() - values[channel].min() < 1e-4
            sizes.add(side[0])
    assert sizes == {1, 2}


def test_a_cross_takes_a_square_of_an_image_of_the_same_sample():
    _, here, proposal = moved("cross")
    changed = proposal != here.x
    own = here.pool[here.rows]
    taken = (proposal[:, None] == own) | ~changed[:, None]
    assert bool(taken.all(2).any(1).all())
    assert changed.sum(1).unique().tolist() == [2, 8, 18]


@pytest.mark.parametrize("kind", ["flip", "guided_flip"])
def test_a_flip_carries_a_neuron_just_across_its_next_threshold(kind):
    moves, here, proposal = moved(kind)
    spikes = moves.spikes

    def interval_of(current: Tensor) -> Tensor:
        return torch.bucketize(current, spikes.thresholds, right=True)

    after = current_of(spikes, proposal)
    before = interval_of(current_of(spikes, here.x))
    interval = interval_of(after)
    below = spikes.thresholds[interval - 1]
    above = spikes.thresholds[interval]
    threshold = torch.where(interval > before, below, above)
    neighbours = (interval - before).abs() == 1
    just = neighbours & ((after - threshold).abs() < 2e-5)
    assert just.any(1).double().mean() > 0.5  # the box does not allow every one
    if kind == "guided_flip":
        assert ((proposal - here.x) * here.slope).sum(1).mean() < -0.01


def hidden(x: Tensor) -> Tensor:
    """Steps without a gradient that leads anywhere: each of 16 bright pixels is worth a tenth."""
    steps = (x.flatten(1) > 0.55).to(x.dtype).sum(1) / 10
    return 1.05 - steps + 0 * x.sum((1, 2, 3))


@pytest.mark.parametrize("norm", EPS)
def test_it_breaks_what_no_gradient_leads_to(norm):
    x = torch.full((3, 1, 4, 4), 0.5)
    y = torch.ones(3, dtype=torch.int64)
    model = two_classes(hidden)
    x_adv = spike_search(
        model, x, y, eps=ThreatModel(norm, EPS[norm]), forwards=4800, generator=seeded()
    )
    assert predicted(model, x_adv).tolist() == [0, 0, 0]
    assert_within(x_adv, x, norm, EPS[norm])


def with_a_decoy(x: Tensor) -> Tensor:
    """Class 1 stays just behind class 0; class 2 passes it when 33 of 36 pixels are bright."""
    bright = (x.flatten(1) > 0.55).to(x.dtype).sum(1)
    label = torch.zeros_like(bright)
    return torch.stack([label, label - 0.1, (bright - 32.5) / 10], 1)


@pytest.mark.parametrize("rivals", [1, 2])
def test_chains_head_for_other_rivals_than_the_nearest_one(rivals):
    x = torch.full((3, 1, 6, 6), 0.5)
    y = torch.zeros(3, dtype=torch.int64)
    plan = Plan(("elements",), forwards=4_000, rivals=rivals)
    seeds = SampleSeeds(range(3))
    x_adv = searched(with_a_decoy, x, y, x[None], ThreatModel("Linf", 0.1), plan, seeds)
    assert predicted(with_a_decoy, x_adv).tolist() == [0 if rivals == 1 else 2] * 3


@pytest.mark.parametrize(("lead", "goes_on"), [(0.8, True), (2.0, False)])
def test_a_sample_goes_on_if_few_typical_changes_are_missing(lead, goes_on):
    model = Recorder(two_classes(lambda x: lead - 0.25 * (x[:, 0, 0, 0] > 0.55).to(x.dtype)))
    x = torch.full((1, 1, 2, 2), 0.5)
    y = torch.ones(1, dtype=torch.int64)
    plan = Plan(("elements",), forwards=20_000)
    searched(model, x, y, x[None], ThreatModel("Linf", 0.1), plan, SampleSeeds([0]))
    first, second = (stage.chains * plan.turns(stage) for stage in plan.stages[:2])
    assert first < sum(model.sizes) < first + 10 + goes_on * second
    assert (sum(model.sizes) > second) == goes_on


def test_a_start_that_fools_is_the_result_and_one_outside_the_ball_is_projected():
    x = torch.full((2, 1, 4, 4), 0.5)
    y = torch.ones(2, dtype=torch.int64)
    model = Recorder(two_classes(hidden))
    start = torch.full_like(x, 0.56)
    found = spike_search(model, x, y, eps=0.1, starts=[x, start], generator=seeded())
    assert torch.equal(found, start)
    assert len(model.seen) <= 5
    far = torch.ones(1, *x.shape)
    assert_within(spike_search(model, x, y, eps=0.1, starts=far, forwards=48), x, "Linf", 0.1)


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
def test_the_size_of_its_batches_changes_no_result(batch_size):
    x = torch.rand(9, 1, 6, 6, generator=seeded(5)).double()
    model = linear_model(36, torch.float64)
    y = predicted(model, x)
    options = {"eps": 0.03, "forwards": 480, "generator": SampleSeeds(range(9))}
    wanted = spike_search(model, x, y, **options)
    recorder = Recorder(model)
    found = spike_search(recorder, x, y, **options, batch_size=batch_size)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert max(recorder.sizes) <= max(batch_size, 18)


def test_a_network_that_draws_is_refused():
    torch.manual_seed(0)
    linear = nn.Linear(36, 5)
    linear.weight.data *= 10  # so that many neurons spike, and not always
    net = nn.Sequential(nn.Flatten(2), linear, DLIFNode(T=4))
    model = SpikingClassifier(net, T=4, encoder=PoissonEncoder())
    with pytest.raises(ValueError, match="must give the same logits for the same.*eot_samples"):
        spike_search(model, torch.rand(4, 1, 6, 6), torch.zeros(4, dtype=torch.int64), eps=0.1)


class Quiet(nn.Module):
    """Draws numbers that change no logit here."""

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.generator = torch.Generator()
        self.linear = linear_model(36)

    def forward(self, x):
        if self.source == "seeded anew":
            self.generator.manual_seed(0)
        sources = {
            "torch": lambda: torch.rand(3),
            "its generator": lambda: torch.rand(3, generator=self.generator),
            "seeded anew": lambda: torch.rand(3, generator=self.generator),
            "dropout": lambda: nn.functional.dropout(x, training=self.training),
        }
        sources[self.source]()
        return self.linear(x)


@pytest.mark.parametrize("source", ["torch", "its generator"])
def test_a_network_that_draws_is_refused_where_its_logits_agree(source):
    x = torch.rand(3, 1, 6, 6, generator=seeded())
    model = Quiet(source)
    with pytest.raises(ValueError, match="got one that draws random numbers; .*eot_samples"):
        spike_search(model, x, predicted(model, x), eps=0.1)


@pytest.mark.parametrize("source", ["seeded anew", "dropout"])
def test_a_network_that_repeats_its_numbers_is_searched(source):
    x = torch.rand(3, 1, 6, 6, generator=seeded())
    model = Quiet(source)
    spike_search(model, x, predicted(model, x), eps=0.1, starts=[x], forwards=50, moves=["patch"])
