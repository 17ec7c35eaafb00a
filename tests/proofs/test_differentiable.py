"""Bounds for training are those of ``verify``; their gradients are checked in
training/test_training_step.
"""

import pytest
import torch
from covering import mostly_slow
from proofs.networks import NEURONS, QUICK, SAMPLED, T, classifier, convolutional, in_steps
from proofs.test_verification import MIXED
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust import SpikingClassifier
from sj_robust.core.preserved import full_precision
from sj_robust.proofs import bounds, rounding, verify
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.differentiable import DifferentiableBounds
from sj_robust.proofs.relaxation import Maps
from sj_robust.proofs.verification import bounded_logits, bounded_neurons


def without_rounding(model, x, y, eps):
    """The lead by the intervals of ``verify``, which would itself notice what is left out."""
    run = BoundedRun(bounded_neurons(model), len(x))
    with full_precision(x.device):
        return run.lead(bounded_logits(model, run, x, eps), y)


@pytest.mark.parametrize(("build", "node", "step_mode"), mostly_slow(SAMPLED, quick=QUICK))
def test_they_are_those_of_verify_without_rounding(build, node, step_mode, monkeypatch):
    monkeypatch.setattr(rounding, "_UNIT", 0.0)
    monkeypatch.setattr(bounds, "SLACK", 1.0)
    options = {"mean": [0.5, 0.4], "std": [0.3, 0.2], "step_mode": step_mode}
    model = classifier(build, NEURONS[node], **options).double()
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0])
    differentiable = DifferentiableBounds(model)
    model.train()  # its batch norm has not seen a batch, so that its running statistics count
    label = y.unsqueeze(1)
    for eps in (0.0, 0.02, 0.3):
        lead = differentiable.lead(x, y, eps)
        assert lead.dtype == torch.float64
        assert (lead.gather(1, label) == 0).all()
        expected = without_rounding(model.eval(), x, y, eps).scatter(1, label, 0.0)
        assert_close(lead.detach(), expected, atol=1e-9, rtol=1e-9)
    lead.sum().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_batch_norm_has_the_statistics_of_the_clean_batch(step_mode):
    model = classifier(convolutional, NEURONS["DLIF"], step_mode=step_mode).double().train()
    x = torch.rand(5, 2, 8, 8, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    differentiable = DifferentiableBounds(model)
    for _ in range(2):  # of the batches that it saw, the last one counts
        x = x.flip(0)
        with differentiable.watching():
            logits = model(x)
    with unchanged(model, states=False):
        lead = differentiable.lead(x, y, 0.0)
    assert_close(lead, logits - logits.gather(1, y.unsqueeze(1)))
    assert "forward" not in vars(model.net[1])


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
