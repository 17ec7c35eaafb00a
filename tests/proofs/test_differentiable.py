"""What bounds for training leave out, count once and refuse; their values are checked in
test_differentiable_joint, their gradients in training/test_training_step.
"""

import pytest
import torch
from proofs.networks import T, in_steps
from proofs.test_verification import MIXED
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.proofs import verify
from sj_robust.proofs.differentiable import DifferentiableBounds
from sj_robust.proofs.relaxation import Maps
from sj_robust.proofs.spiking import RealSpiking


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
