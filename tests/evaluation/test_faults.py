"""Faults of deployment: their levels are exact, and the network is as it was."""

from functools import partial

import pytest
import torch
from covering import every_pair
from evaluation.suite_run import classifier, images
from spikingjelly.activation_based import layer, neuron
from spikingjelly.activation_based.encoding import LatencyEncoder
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import pgd
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.weights import weights
from sj_robust.defences import FrequencyEncoder, OrthogonalEncoder
from sj_robust.evaluation import Fault, faulty
from sj_robust.evaluation.run.faults import FAULTS, default_faults
from sj_robust.models import NetworkSpec, build_classifier

T = 5
NODES = {
    "dlif": partial(DLIFNode, T=T),
    "lif": neuron.LIFNode,
    "lif_no_decay": partial(neuron.LIFNode, decay_input=False),
    "plif": neuron.ParametricLIFNode,
    "if": neuron.IFNode,
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Steps(nn.Module):
    """Keeps every sequence that comes by."""

    def forward(self, x_seq):
        self.seen = x_seq.detach().clone()
        return x_seq


def chain():
    """A classifier that notes what each of its layers sees."""
    generator = seeded(0)
    net = nn.Sequential(
        nn.Flatten(2),
        Steps(),
        nn.Linear(16, 12),
        DLIFNode(T=T, tau=2.0),
        Steps(),
        nn.Linear(12, 3),
        Steps(),
    )
    with torch.no_grad():
        for layer in (net[2], net[5]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        net[3].input_gain.copy_(1 + torch.arange(float(T)) / 4)
    return SpikingClassifier(net, T=T).eval()


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_quantised_weight_takes_at_most_2_to_the_bits_values(bits):
    fault = Fault("weight_bits", bits)
    levels = 2 ** (bits - 1) - 1  # on either side of zero
    weight = faulty(nn.Conv2d(3, 4, 9), fault).weight
    for row in weight.flatten(1):
        assert len(row.unique()) <= 2**bits - 1
        steps = row / row.abs().max() * levels
        assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    net = nn.Linear(50, 2)
    moved = faulty(net, fault).weight - net.weight
    step = net.weight.abs().amax(1, keepdim=True) / levels
    assert (moved.abs() <= step / 2 + 1e-6).all()


@pytest.mark.parametrize("kind", ["stuck_at_zero", "stuck_at_largest"])
@pytest.mark.parametrize("share", [0.0, 0.013, 0.5, 1.0])
def test_the_share_of_stuck_weights_is_as_asked(share, kind):
    net = nn.Sequential(nn.Linear(37, 11), nn.Linear(11, 3))
    damaged = faulty(net, Fault(kind, share), seed=3)
    stuck = 0
    for old, new in zip(net, damaged, strict=True):
        value = 0.0 if kind == "stuck_at_zero" else old.weight.max()
        stuck += int((new.weight == value).sum())
    asked = round(share * 440)
    largest = 0 if kind == "stuck_at_zero" else 2  # which may be stuck or not
    assert asked <= stuck <= asked + largest
    assert torch.equal(damaged[0].bias, net[0].bias)


def test_stuck_weights_hang_on_the_seed_and_a_larger_share_holds_a_smaller_one():
    net = nn.Linear(37, 11)

    def at_zero(share, seed):
        return faulty(net, Fault("stuck_at_zero", share), seed=seed).weight == 0

    milder = at_zero(0.1, seed=3)
    severe = at_zero(0.4, seed=3)
    assert (severe | ~milder).all()
    assert not torch.equal(milder, at_zero(0.1, seed=4))


@pytest.mark.parametrize("kind", ["feel", "stog", "hosnn"])
def test_leaks_and_gates_are_no_weights(kind):
    torch.manual_seed(0)
    model = build_classifier(NetworkSpec("small", neuron=kind, T=4)).eval()
    model(torch.rand(2, 1, 8, 8))
    damaged = faulty(model, Fault("stuck_at_zero", 0.1))
    stuck = 0
    for (name, old), new in zip(model.named_parameters(), damaged.parameters(), strict=True):
        changed = int((old != new).sum())
        stuck += changed
        assert not changed or name.endswith("weight"), name
    total = sum(weight.numel() for weight in weights(model))
    assert stuck == round(0.1 * total)


def test_the_kernels_of_an_encoder_are_no_weights():
    encoder = OrthogonalEncoder((1, 8, 8), T=2)
    model = SpikingClassifier(nn.Sequential(nn.Flatten(2), nn.Linear(64, 3)), 2, encoder=encoder)
    damaged = faulty(model, Fault("stuck_at_largest", 1.0))
    assert torch.equal(damaged.encoder.skew, encoder.skew)
    assert len(damaged.net[1].weight.unique()) == 1


def test_layers_that_compute_their_weights_are_refused():
    computing = [parametrizations.weight_norm(nn.Linear(4, 4))]
    if hasattr(layer, "WSConv2d"):  # of SpikingJelly 2
        computing.append(layer.WSConv2d(1, 4, 3))
    for computed in computing:
        for fault in (Fault("stuck_at_zero", 0.1), Fault("weight_bits", 4)):
            with pytest.raises(ValueError, match=r"1 \(.*\) computes its weights"):
                faulty(nn.Sequential(nn.Linear(4, 4), computed), fault)


def test_time_constants_drift_where_something_leaks():
    perfect = nn.Sequential(nn.Flatten(2), nn.Linear(16, 3), neuron.IFNode(step_mode="m"))
    model = SpikingClassifier(perfect, T=2)
    assert "tau_drift" not in {fault.kind for fault in default_faults(model)}
    with pytest.raises(ValueError, match="a drift of tau needs a neuron that leaks"):
        faulty(model, Fault("tau_drift", 0.5))
    perfect.append(neuron.LIFNode(step_mode="m"))
    assert "tau_drift" in {fault.kind for fault in default_faults(model)}
    faulty(model, Fault("tau_drift", 0.5))


NEURONS = {
    "name": NODES,
    "reset": [0.0, None, 0.1],
    "mode": ["m", "s"],
}


def spikes_of(node, x):
    """A sequence through a neuron without a past, in whichever step mode."""
    node.reset()
    if node.step_mode == "m":
        return node(x).detach()
    return torch.stack([node(step).detach() for step in x])


@pytest.mark.parametrize(tuple(NEURONS), every_pair(NEURONS))
def test_without_a_drift_a_neuron_spikes_as_before(name, reset, mode):
    x = 1.5 * torch.rand(T, 4, 3, 7, generator=seeded(1))
    node = NODES[name](v_reset=reset, step_mode=mode).eval()
    for kind in ("threshold_drift", "tau_drift") if name != "if" else ("threshold_drift",):
        usual = spikes_of(node, x)
        still = faulty(node, Fault(kind, 0.0))
        moved = spikes_of(still, x) != usual
        assert 0.05 < float(usual.mean()) < 0.95
        # a potential at the threshold may be rounded
        assert int(moved.sum()) <= 1
        node.reset()


LINE = torch.linspace(0.0, 1.0, 101)
"""Potentials, a hundredth apart."""


def first_spike(spikes):
    """At which value of the line each neuron begins to fire, from spikes [101, neurons]."""
    return (1 - spikes).sum(0) / 100


def drawn_for_each_neuron():
    """What the drifts of the first thousand neurons are drawn from, at seed 0."""
    return torch.randn(1000, generator=seeded(2**20), dtype=torch.float64).float()


def test_thresholds_are_those_of_each_neuron():
    """The potential that a neuron needs is read off its spikes."""
    node = faulty(neuron.IFNode(step_mode="m"), Fault("threshold_drift", 0.1), seed=0)
    x = (0.5 + LINE).view(1, 101, 1).expand(1, 101, 1000)
    found = 0.5 + first_spike(node(x)[0])
    expected = (0.1 * drawn_for_each_neuron()).exp()
    assert_close(found, expected, atol=0.0101, rtol=0)


def test_time_constants_are_those_of_each_neuron():
    """What a neuron keeps of 0.9 is read off what it needs to fire in the next step."""
    node = neuron.LIFNode(tau=4.0, decay_input=False, step_mode="m")
    node = faulty(node, Fault("tau_drift", 0.1), seed=0)
    first = torch.full((101, 1000), 0.9)
    second = (0.1 + LINE).view(101, 1).expand(101, 1000)
    spikes = node(torch.stack((first, second)))
    found = 0.1 + first_spike(spikes[1])
    kept = 1 - 0.25 * (-0.1 * drawn_for_each_neuron()).exp()
    assert_close(found, 1 - 0.9 * kept, atol=0.0101, rtol=0)


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lost_step_is_seen_by_no_layer(lost):
    x = torch.rand(6, 1, 4, 4, generator=seeded(4))
    model = chain()
    damaged = faulty(model, Fault("lost_steps", lost), seed=1)
    damaged(x)
    for module in damaged.modules():
        if isinstance(module, Steps):
            assert len(module.seen) == T - lost
    gains = damaged.net[3].input_gain.tolist()
    usual = model.net[3].input_gain.tolist()
    assert gains == sorted(set(gains))
    assert set(gains) < set(usual)

    frames = torch.rand(6, T, 1, 4, 4).round()
    events = SpikingEventClassifier(model.net, T=T)
    damaged = faulty(events, Fault("lost_steps", lost), seed=1)
    damaged(frames)
    kept = [t for t in range(T) if usual[t] in gains]
    expected = frames[:, kept].transpose(0, 1).flatten(2)
    assert torch.equal(damaged.net[1].seen, expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_answer_after_the_first_steps(steps):
    x = torch.rand(6, 1, 4, 4, generator=seeded(4))
    model = chain()
    model(x)
    early = faulty(model, Fault("first_steps", steps))
    expected = model.net[6].seen[:steps].mean(0)
    assert_close(early(x), expected)


class Repeating(nn.Module):
    """Brings its own time steps, or only says so."""

    def __init__(self, steps, *, follows):
        super().__init__()
        self.T = self.steps = steps
        self.follows = follows
        self.layers = nn.Sequential(nn.Flatten(2), nn.Linear(16, 3), neuron.IFNode(step_mode="m"))

    def forward(self, images):
        steps = self.T if self.follows else self.steps
        return self.layers(images.expand(steps, *images.shape)).mean(0)


@pytest.mark.parametrize("kind", ["first_steps", "lost_steps"])
def test_a_network_runs_the_steps_that_are_left_or_is_refused(kind):
    x = torch.rand(6, 1, 4, 4, generator=seeded(4))
    for given in (None, 8):
        model = SpikingClassifier(Repeating(8, follows=True), T=given).eval()
        model(x)
        damaged = faulty(model, Fault(kind, 3))
        damaged(images=x)
        assert damaged.T == damaged.net.T == (3 if kind == "first_steps" else 5)
        deaf = SpikingClassifier(Repeating(8, follows=False), T=given).eval()
        deaf(x)
        with pytest.raises(ValueError, match=r"8 (time )?steps (instead of|itself, got)"):
            faulty(deaf, Fault(kind, 3))(x)


@pytest.mark.parametrize("encoder", [FrequencyEncoder(0.15), LatencyEncoder(6)])
def test_an_encoder_that_follows_the_steps_loses_those_that_are_drawn(encoder):
    x = torch.rand(6, 1, 4, 4, generator=seeded(4))
    net = nn.Sequential(nn.Flatten(2), Steps())
    model = SpikingClassifier(net, T=6, encoder=encoder)
    model(x)
    usual = net[1].seen
    for seed in range(3):
        damaged = faulty(model, Fault("lost_steps", 4), seed=seed)
        kept = sorted(torch.randperm(6, generator=seeded(seed)).tolist()[4:])
        for _ in range(2):  # from a reset
            damaged(x)
            assert torch.equal(damaged.net[1].seen, usual[kept])
        early = faulty(model, Fault("first_steps", 2), seed=seed)
        early(x)
        assert torch.equal(early.net[1].seen, usual[:2])


@pytest.mark.parametrize(("kind", "was"), [("lost_spikes", 1.0), ("added_spikes", 0.0)])
def test_the_share_of_lost_and_added_spikes(kind, was):
    node = faulty(neuron.IFNode(step_mode="m"), Fault(kind, 0.1))
    x = torch.full((1, 50, 1000), 2.0 * was)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = node(x)
        node.reset()
        assert not torch.equal(first, node(x))  # drawn anew
    found = float((first != was).float().mean())
    assert found == pytest.approx(0.1, abs=0.005)
    assert set(first.unique().tolist()) == {0.0, 1.0}


def watched():
    """A network that keeps what it is given."""
    return nn.Sequential(Steps(), nn.Flatten(2))


def test_jitter_of_images_is_noise_of_its_level_and_leaves_images():
    x = torch.full((4, 1, 8, 8), 0.5).requires_grad_()
    plain = SpikingClassifier(watched(), T=1)
    model = faulty(plain, Fault("jitter", 0.1))
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    noise = model.net[0].seen[0] - 0.5
    assert float(noise.std()) == pytest.approx(0.1, abs=0.02)
    strong = faulty(plain, Fault("jitter", 0.5))
    strong(x)
    assert strong.net[0].seen.aminmax() == (0.0, 1.0)


def test_jitter_of_frames_moves_events_in_time():
    frames = (torch.rand(3, T, 2, 4, 4) < 0.2).float()
    model = faulty(SpikingEventClassifier(watched(), T=T), Fault("jitter", 1))
    model(frames)
    moved = model.net[0].seen.transpose(0, 1)
    assert torch.equal(moved.sum(1), frames.sum(1))
    assert not torch.equal(moved, frames)


def test_jitter_of_counts_is_told_what_frames_hold():
    frames = (torch.rand(3, T, 2, 4, 4) < 0.9).float()
    plain = SpikingEventClassifier(watched(), T=T)
    torch.manual_seed(0)
    model = faulty(plain, Fault("jitter", 1), counts=True)
    model(frames)
    moved = model.net[0].seen.transpose(0, 1)
    assert torch.equal(moved.sum(1), frames.sum(1))
    assert float(moved.max()) > 1  # several events meet, though each frame held one
    with pytest.raises(ValueError, match="for numbers of events pass counts=True"):
        faulty(plain, Fault("jitter", 1))(2 * frames)


@pytest.mark.parametrize("kind", FAULTS)
def test_the_network_is_as_it_was_and_its_copy_can_be_attacked(kind):
    model = classifier()
    x, y = images(6)
    before = model(x)
    level = {"first_steps": 2, "lost_steps": 1}.get(kind, FAULTS[kind][-1])
    with unchanged(model):
        damaged = faulty(model, Fault(kind, level), seed=5)
        x_adv = pgd(damaged, x, y, eps=0.3, step_size=0.1, steps=3, generator=seeded(0))
    assert not torch.equal(x_adv, x)
    assert torch.equal(model(x), before)


def test_answers_after_fewer_steps_are_among_the_default_faults():
    faults = default_faults(chain())
    levels = [fault.level for fault in faults if fault.kind == "first_steps"]
    assert levels == [4, 3, 2, 1]
