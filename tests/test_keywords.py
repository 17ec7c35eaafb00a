"""A network that calls its layers by keyword is treated as one that does not."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier, compare_potentials, perturbation_gains, verify
from sj_robust.attacks import spike_search
from sj_robust.core.host import functional, layer, neuron
from sj_robust.core.preserved import uncompiled
from sj_robust.evaluation import Fault, firing
from sj_robust.evaluation.run.faults import faulty
from sj_robust.neuron import DLIFNode
from sj_robust.proofs import no_flip_radius
from sj_robust.proofs.differentiable import DifferentiableBounds

T = 3


class Network(nn.Module):
    """Two spiking layers with batch norm, called with or without names."""

    def __init__(self, mode, *, named):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = layer.Conv2d(1, 4, 3)
            self.norm = layer.BatchNorm2d(4)
            self.node = neuron.LIFNode(v_threshold=0.3)
            self.middle = layer.Linear(64, 5)
            self.last_node = DLIFNode(T=T, v_threshold=0.3)
            self.last = layer.Linear(5, 3)
        self.named = named
        functional.set_step_mode(self, mode)

    def spikes(self, node, x):
        if not self.named:
            return node(x)
        return node(x_seq=x) if node.step_mode == "m" else node(x=x)

    def forward(self, x):
        x = self.first(x)
        x = self.norm(x=x) if self.named else self.norm(x)
        x = self.spikes(self.node, x)
        x = self.spikes(self.last_node, self.middle(x.flatten(-3)))
        return self.last(x)


def images():
    return torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def asked(question, mode):
    """The answer for a network that names its arguments, and for one that does not."""
    answers = []
    for named in (True, False):
        model = SpikingClassifier(Network(mode, named=named), T=T).eval()
        x = images()
        answers.append(question(model, x, model(x).argmax(1)))
    return answers


def certified(model, x, y):
    """Bounds that are trained, from the statistics of the batch."""
    bounds = DifferentiableBounds(model.train())
    with bounds.watching():
        model(x)
    return bounds.lead(x, y, 0.01)


def drifted(model, x, y):
    return faulty(model, Fault("tau_drift", 0.5))(x)


QUESTIONS = {
    "logits": lambda model, x, y: model(x),
    "monitor": lambda model, x, y: torch.stack(
        [stats.full_ms_mppd for stats in compare_potentials(model, x, x + 0.05).values()]
    ),
    "gains": lambda model, x, y: torch.tensor(
        [
            [bound.norm, bound.measured_peak]
            for bound in perturbation_gains(model, x, x_perturbed=0.9 * x).layers
        ]
    ),
    "ibp": lambda model, x, y: torch.tensor(verify(model, x, y, 0.004, method="ibp").verified),
    "joint": lambda model, x, y: torch.tensor(verify(model, x, y, 0.01, method="joint").verified),
    "no_flip_radius": lambda model, x, y: no_flip_radius(model, x),
    "spike_search": lambda model, x, y: spike_search(
        model, x, y, eps=0.1, forwards=30, generator=torch.Generator().manual_seed(0)
    ),
    "firing": lambda model, x, y: torch.tensor([found.rate for found in firing(model, x)]),
    "faults": drifted,
    "certified": certified,
}


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_names_make_no_difference(question, mode):
    named, placed = asked(QUESTIONS[question], mode)
    assert_close(named, placed)


class Scaled(nn.Module):
    """A module of two arguments, one of which must be named."""

    def forward(self, x, *, scale):
        return scale * x


def test_compiled_parts_get_their_arguments_as_the_network_gives_them():
    net = torch.compile(Scaled(), backend="eager")
    x = images()
    with uncompiled(net):
        assert torch.equal(net(scale=3.0, x=x), 3 * x)
