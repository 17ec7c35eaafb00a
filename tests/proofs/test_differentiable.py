"""What bounds for training leave out, count once and refuse; their values are checked in
test_differentiable_joint, their gradients in training/test_training_step.
"""

import pytest
import torch
import torch.nn.functional as F
from proofs.networks import T, in_steps
from proofs.test_verification import MIXED
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.testing import assert_close
from training import small_run

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.proofs import verify
from sj_robust.proofs.bounds import bounded_neurons
from sj_robust.proofs.changes import Flips
from sj_robust.proofs.differentiable import DifferentiableBounds, batch_statistics
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.spiking import Interval, LayerBounds, RealSpiking


def test_how_a_network_that_brings_its_steps_is_called_is_asked_in_the_first_batch_alone(
    monkeypatch,
):
    model = build_classifier(NetworkSpec(T=2, channels=(2, 2))).train()
    bounds = DifferentiableBounds(model)
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    first = bounds.lead(x, y, 0.1)
    asked = []
    monkeypatch.setattr("sj_robust.classifier.find_convention", asked.append)
    assert_close(bounds.lead(x, y, 0.1), first)
    assert model.convention.takes == "images"
    assert not asked


def test_gradient_of_a_soft_reset_at_a_potential_of_exactly_zero():
    """Without a charge, the low end lies exactly at the limit, and its gradient passes."""
    node = neuron.IFNode(step_mode="m", v_reset=None)
    model = SpikingClassifier(nn.Sequential(nn.Linear(2, 3), node), T=2)
    (found,) = bounded_neurons(model).values()
    spiking = RealSpiking(found, LayerBounds())
    low = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    undecided = Interval(torch.zeros(3), torch.ones(3))
    v = spiking.reset(Interval(low, torch.full((3,), 1.5)), undecided)
    assert v.low.tolist() == [-0.5, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(v.low.sum(), low)
    assert gradient.tolist() == [1.0, 1.0, 0.0]


def test_dropout_is_left_out_and_what_feeds_a_neuron_twice_is_bounded_once():
    """The gradient of the last map stops at the spikes: it does not go on through the neuron's
    surrogate.
    """

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            inner = (layer.Dropout(0.5), layer.Linear(6, 6), neuron.LIFNode())
            self.node = neuron.LIFNode()
            self.inner = nn.Sequential(*inner)
            self.head = layer.Linear(6, 2)

        def forward(self, x):
            spikes = self.node(x)
            return self.head(self.inner(spikes) + spikes)

    torch.manual_seed(0)
    net = Twice()
    functional.set_step_mode(net, "m")
    model = SpikingClassifier(net, 3).double().train()
    x = torch.rand(1, 6, dtype=torch.float64)  # fewer images than classes
    y = torch.tensor([1])
    lead = DifferentiableBounds(model).lead(x, y, 0.3)
    margin = verify(model.eval(), x, y, 0.3).margin[0]
    assert float(lead.detach()[0, 0]) == pytest.approx(-margin, abs=1e-6, rel=1e-6)


def test_a_network_that_mixes_samples_is_refused_at_the_first_batch_and_looked_at_once(monkeypatch):
    x = torch.rand(3, 2, 1, 1)
    y = torch.tensor([0, 1, 0])
    mixed = SpikingClassifier(MIXED["mean"], T)
    with pytest.raises(NotImplementedError, match="mixes the samples of a batch"):
        DifferentiableBounds(mixed).lead(x, y, 0.1)
    model = in_steps(nn.Flatten(2), nn.Linear(2, 2), neuron.LIFNode()).train()
    differentiable = DifferentiableBounds(model)
    state = torch.get_rng_state()
    first = differentiable.lead(x, y, 0.1)
    monkeypatch.delattr(Maps, "check_samples")
    assert torch.equal(differentiable.lead(x, y, 0.1), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_the_reset_of_the_last_step_is_not_worked_out(step_mode, monkeypatch):
    resets = []

    def counted(self, h, spikes, reset=RealSpiking.reset):
        resets.append(self.neuron.name)
        return reset(self, h, spikes)

    monkeypatch.setattr(RealSpiking, "reset", counted)
    net = nn.Sequential(layer.Linear(4, 3), neuron.LIFNode(), layer.Linear(3, 2))
    functional.set_step_mode(net, step_mode)
    differentiable = DifferentiableBounds(SpikingClassifier(net, T=4).train())
    x = torch.rand(2, 4)
    y = torch.tensor([0, 1])
    differentiable.lead(x, y, 0.1)  # and looks at the network
    resets.clear()
    differentiable.lead(x, y, 0.1)
    assert len(resets) == 3


def bias_free():
    """As residual networks are: convolutions without bias, a sum of two branches, and logits that
    are converted.
    """

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = layer.Conv2d(1, 6, 3, padding=1, bias=False)
            self.branch = nn.Sequential(
                layer.BatchNorm2d(6), DLIFNode(T=3), layer.Conv2d(6, 6, 3, padding=1, bias=False)
            )
            self.head = nn.Sequential(DLIFNode(T=3), layer.Flatten(), layer.Linear(96, 3))

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.branch(x)).float()

    return Residual()


def spiking_output():
    linear = layer.Linear(16, 3, bias=False)
    linear.weight.data *= 8  # so that it fires
    return nn.Sequential(layer.Flatten(), linear, neuron.LIFNode())


@pytest.mark.parametrize("build", [small_run.batch_norm_net, bias_free, spiking_output])
@pytest.mark.parametrize(
    ("method", "ball", "follows"),
    [("ibp", 0.02, True), ("joint", 0.02, False), ("ibp", Flips(1), False)],
    ids=["ibp", "joint", "flips"],
)
def test_bounds_by_intervals_follow_autocast(build, method, ball, follows):
    """Of the same clean pass, so that nothing else is rounded."""
    torch.manual_seed(0)
    model = in_steps(build(), T=3).train()
    bounds = DifferentiableBounds(model, method=method)
    x = torch.rand(32, 1, 4, 4).round() if isinstance(ball, Flips) else torch.rand(32, 1, 4, 4)
    y = torch.arange(32) % 3
    with bounds.watching():
        model(x)

    def found(*, rounded):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            lead = bounds.lead(x, y, ball)
            value = F.cross_entropy(lead, y)
        assert lead.dtype == torch.float32
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        return lead.detach(), torch.cat([part.flatten() for part in gradients])

    lead, gradient = found(rounded=False)
    rounded, rounded_gradient = found(rounded=True)
    assert torch.equal(rounded, lead) != follows
    assert_close(rounded, lead, atol=0.1, rtol=0.1)
    assert torch.cosine_similarity(rounded_gradient, gradient, dim=0) > 0.9


def test_batch_statistics_are_not_rounded_to_bfloat16():
    x = (30 + torch.randn(16, 3, 5, 5)).bfloat16()
    mean, variance = batch_statistics(None, x)
    assert mean.dtype == variance.dtype == torch.float32
    assert_close(mean, x.double().mean((0, 2, 3)).float())
    assert_close(variance, x.double().var((0, 2, 3), correction=0).float())
