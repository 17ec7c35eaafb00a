"""Faults of deployment: their levels are exact, and the network is as it was."""

import pytest
import torch
from covering import every_pair
from evaluation.suite_run import classifier, images
from spikingjelly.activation_based import neuron
from torch import nn
from unchanged import unchanged

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.evaluation import Fault, faulty
from sj_robust.evaluation.run.faults import FAULTS, default_faults

T = 5
NODES = {
    "dlif": lambda **o: DLIFNode(T=T, **o),
    "lif": lambda **o: neuron.LIFNode(**o),
    "lif_no_decay": lambda **o: neuron.LIFNode(decay_input=False, **o),
    "plif": lambda **o: neuron.ParametricLIFNode(**o),
    "if": lambda **o: neuron.IFNode(**o),
}


class Steps(nn.Module):
    """Keeps every sequence that comes by."""

    def forward(self, x_seq):
        self.seen = x_seq.detach().clone()
        return x_seq


def chain():
    """A classifier that notes what each of its layers sees."""
    generator = torch.Generator().manual_seed(0)
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
    weight = faulty(nn.Conv2d(3, 4, 9), Fault("weight_bits", bits)).weight.flatten(1)
    for row in weight:
        assert len(row.unique()) <= 2**bits - 1
        steps = row / row.abs().max() * (2 ** (bits - 1) - 1)
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    net = nn.Linear(50, 2)
    exact = faulty(net, Fault("weight_bits", bits)).weight
    step = net.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((exact - net.weight).abs() <= step / 2 + 1e-6).all()


@pytest.mark.parametrize("share", [0.0, 0.013, 0.5, 1.0])
def test_the_share_of_stuck_weights_is_as_asked(share):
    net = nn.Sequential(nn.Linear(37, 11), nn.Linear(11, 3))
    for kind in ("stuck_at_zero", "stuck_at_largest"):
        damaged = faulty(net, Fault(kind, share), seed=3)
        stuck = sum(
            int((new == (0.0 if kind == "stuck_at_zero" else old.max())).sum())
            for old, new in ((net[i].weight, damaged[i].weight) for i in (0, 1))
        )
        largest = 0 if kind == "stuck_at_zero" else 2  # which may be stuck or not
        assert round(share * 440) <= stuck <= round(share * 440) + largest
        assert torch.equal(damaged[0].bias, net[0].bias)
    milder, other = (
        faulty(net, Fault("stuck_at_zero", 0.1), seed=seed)[0].weight == 0 for seed in (3, 4)
    )
    severe = faulty(net, Fault("stuck_at_zero", 0.4), seed=3)[0].weight == 0
    assert (severe | ~milder).all()
    assert not torch.equal(milder, other)


NEURONS = {"name": NODES, "reset": [0.0, None, 0.1], "mode": ["m", "s"]}


@pytest.mark.parametrize(tuple(NEURONS), every_pair(NEURONS))
def test_without_a_drift_a_neuron_spikes_as_before(name, reset, mode):
    x = 1.5 * torch.rand(T, 4, 3, 7, generator=torch.Generator().manual_seed(1))
    node = NODES[name](v_reset=reset, step_mode=mode).eval()
    for kind in ("threshold_drift", "tau_drift"):
        still = faulty(node, Fault(kind, 0.0))
        outputs = []
        for one in (node, still):
            one.reset()
            spikes = one(x) if mode == "m" else torch.stack([one(step) for step in x])
            outputs.append(spikes.detach())
        assert 0.05 < float(outputs[0].mean()) < 0.95
        assert (
            int((outputs[0] != outputs[1]).sum()) <= 1
        )  # a potential at the threshold may be rounded
        node.reset()


def test_thresholds_and_time_constants_are_those_of_each_neuron():
    """The potential that a neuron needs, and what it keeps, are read off its spikes."""
    z = torch.randn(
        1000, generator=torch.Generator().manual_seed(2**20), dtype=torch.float64
    ).float()
    node = faulty(neuron.IFNode(step_mode="m"), Fault("threshold_drift", 0.1), seed=0)
    x = torch.linspace(0.5, 1.5, 101)[None, :, None].expand(1, 101, 1000)
    found = 0.5 + (1 - node(x)[0]).sum(0) / 100
    expected = (0.1 * z).exp()
    torch.testing.assert_close(found, expected, atol=0.0101, rtol=0)
    node = faulty(
        neuron.LIFNode(tau=4.0, decay_input=False, step_mode="m"), Fault("tau_drift", 0.1), seed=0
    )
    kept = 1 - 0.25 * (-0.1 * z).exp()
    first = torch.full((101, 1000), 0.9)
    second = torch.linspace(0.1, 1.1, 101)[:, None].expand(101, 1000)
    spikes = node(torch.stack((first, second)))[1]
    found = 0.1 + (1 - spikes).sum(0) / 100
    torch.testing.assert_close(found, 1 - 0.9 * kept, atol=0.0101, rtol=0)


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lost_step_is_seen_by_no_layer(lost):
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    model = chain()
    damaged = faulty(model, Fault("lost_steps", lost), seed=1)
    damaged(x)
    found = [len(module.seen) for module in damaged.modules() if isinstance(module, Steps)]
    assert found == ([T - lost] * 3)
    gains = damaged.net[3].input_gain.tolist()
    assert gains == sorted(set(gains))
    expected = set(model.net[3].input_gain.tolist())
    assert set(gains) < expected

    frames = torch.rand(6, T, 1, 4, 4).round()
    events = SpikingEventClassifier(model.net, T=T)
    damaged = faulty(events, Fault("lost_steps", lost), seed=1)
    damaged(frames)
    kept = [t for t in range(T) if model.net[3].input_gain[t].item() in gains]
    expected = frames[:, kept].transpose(0, 1).flatten(2)
    assert torch.equal(damaged.net[1].seen, expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_answer_after_the_first_steps(steps):
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    model = chain()
    model(x)
    found = faulty(model, Fault("first_steps", steps))(x)
    expected = model.net[6].seen[:steps].mean(0)
    torch.testing.assert_close(found, expected)


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


def test_jitter_of_images_and_frames():
    seen = Steps()
    x = torch.full((4, 1, 8, 8), 0.5).requires_grad_()
    model = faulty(SpikingClassifier(nn.Sequential(seen, nn.Flatten(2)), T=1), Fault("jitter", 0.1))
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    noisy = model.net[0].seen[0]
    found = float((noisy - 0.5).std())
    assert found == pytest.approx(0.1, abs=0.02)
    strong = Fault("jitter", 0.5)
    model = faulty(SpikingClassifier(nn.Sequential(seen, nn.Flatten(2)), T=1), strong)
    model(x)
    assert model.net[0].seen.aminmax() == (0.0, 1.0)  # still images
    frames = (torch.rand(3, T, 2, 4, 4) < 0.2).float()
    model = faulty(
        SpikingEventClassifier(nn.Sequential(seen, nn.Flatten(2)), T=T), Fault("jitter", 1)
    )
    model(frames)
    moved = model.net[0].seen.transpose(0, 1)
    assert torch.equal(moved.sum(1), frames.sum(1))
    assert not torch.equal(moved, frames)


@pytest.mark.parametrize("kind", FAULTS)
def test_the_network_is_as_it_was_and_its_copy_can_be_attacked(kind):
    from sj_robust.attacks import pgd

    model = classifier()
    x, y = images(6)
    before = model(x)
    level = {"first_steps": 2, "lost_steps": 1}.get(kind, FAULTS[kind][-1])
    with unchanged(model):
        damaged = faulty(model, Fault(kind, level), seed=5)
        x_adv = pgd(
            damaged,
            x,
            y,
            eps=0.3,
            step_size=0.1,
            steps=3,
            generator=torch.Generator().manual_seed(0),
        )
    assert not torch.equal(x_adv, x)
    assert torch.equal(model(x), before)


def test_wrong_use():
    for arguments, match in (
        (("rust", 1), "kind must be one of weight_bits, .*, got 'rust'"),
        (("weight_bits", 1), "level of weight_bits must be an integer >= 2 and <= 32, got 1"),
        (("weight_bits", 2.5), "must be an integer"),
        (("stuck_at_zero", 1.1), "must be a number >= 0 and <= 1, got 1.1"),
        (("lost_steps", True), "must be an integer >= 1, got True"),
        (("first_steps", 0), "first_steps must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=match):
            Fault(*arguments)
    for model, fault, match in (
        (nn.Flatten(), Fault("weight_bits", 4), "needs a network with some"),
        (nn.Linear(2, 2), Fault("lost_spikes", 0.1), "needs SpikingJelly neurons, got a Linear"),
        (nn.Linear(2, 2), Fault("lost_steps", 1), "need a SpikingClassifier"),
        (neuron.QIFNode(), Fault("tau_drift", 0.1), r"tau of  \(QIFNode\) cannot drift"),
        (classifier().train(), Fault("first_steps", 3), "steps must be < T = 3, got 3"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=match):
            faulty(model, fault)
    levels = [fault.level for fault in default_faults(chain()) if fault.kind == "first_steps"]
    assert levels == [4, 3, 2, 1]
