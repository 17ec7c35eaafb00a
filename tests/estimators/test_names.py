"""Names of estimators, and which neurons they change."""

import pickle
import re

import pytest
import torch
from attacks.table import linear_model
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.core.host import base, neuron, surrogate
from sj_robust.estimators import ESTIMATORS, estimator
from sj_robust.estimators.applied import Estimator
from sj_robust.neuron import DLIFNode

MORE = (
    "hart",
    "assg:rectangle",
    "assg:atan:0.7",
    "assg:0.9+detach",
    "triangle:0.123456789",
    "pdsg+detach",
    "atan:1e-3",
)


@pytest.mark.parametrize("name", ESTIMATORS + MORE)
def test_names_parse_back(name):
    chosen = estimator(name)
    assert estimator(chosen.name) == chosen
    assert hash(estimator(chosen.name)) == hash(chosen)
    assert repr(chosen) == f"estimator({chosen.name!r})"
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert name not in ESTIMATORS or chosen.name == name


def test_defaults_are_part_of_the_name():
    full = {
        "atan": "atan:2",
        "triangle": "triangle:1",
        "hart": "hart:1.2",
        "assg:atan": "assg",
        "assg:0.7": "assg:atan:0.7",
        "assg:atan:0.85": "assg",
    }
    for short, name in full.items():
        assert estimator(short).name == name
    assert Estimator("assg") == estimator("assg")
    assert Estimator("atan", 4) == estimator("atan:4.0")
    assert not estimator("pdsg").per_sample
    assert estimator("assg").per_sample


def same(x):
    return x


def test_training_changes_nothing_of_anything():
    for model in (linear_model(4), same, spiking()):
        with estimator("training")(model) as crafting:
            assert crafting is model


def test_a_readout_of_potentials_is_no_spiking_neuron():
    readout = nn.Sequential(nn.Linear(2, 2), NonSpikingBaseNode())
    with pytest.raises(ValueError, match="'training'"), estimator("atan:4")(readout):
        pass


class NonSpikingBaseNode(base.MemoryModule):
    """An integrator that puts out potentials, as SpikingJelly 2.x has them."""

    def single_step_forward(self, x):
        return x


def spiking(step_mode="m", **options):
    node = neuron.LIFNode(step_mode=step_mode, **options)
    return nn.Sequential(nn.Linear(3, 2), node)


@pytest.mark.parametrize("name", ["bptr", "rga", "hart", "hart_mixed"])
def test_time_averages_need_the_sequence_at_once(name):
    message = "keep step_mode='m'"
    with estimator(name)(spiking()) as crafting:
        crafting[1].step_mode = "s"
        with pytest.raises(RuntimeError, match=message):
            crafting(torch.ones(1, 3))


@pytest.mark.parametrize("inner", ["atan:4", "training", "training+detach", "bptr", "cba"])
@pytest.mark.parametrize("outer", ["sigmoid:4", "assg", "training+detach"])
def test_one_estimator_at_a_time(outer, inner):
    net = spiking()
    model = SpikingClassifier(net, T=2)
    message = f"{re.escape(outer)} is already active on this network"
    with estimator(outer)(net) as crafting:
        with pytest.raises(RuntimeError, match=message), estimator(inner)(model):
            pass
        assert crafting is net
    with estimator(inner)(model):
        pass


def test_a_context_is_entered_once_at_a_time():
    applied = estimator("atan:4")(spiking())
    with applied, pytest.raises(RuntimeError, match="already entered"), applied:
        pass
    with applied:  # and again after it was left
        pass


def attributes(net):
    return [dict(vars(module)) for module in net.modules()]


def test_a_failed_entry_changes_nothing():
    class Bare(base.MemoryModule):
        """Spikes, and has no reset to detach."""

        def __init__(self):
            super().__init__()
            self.surrogate_function = surrogate.ATan()

        def single_step_forward(self, x):
            return self.surrogate_function(x)

    net = nn.Sequential(*spiking(), Bare())
    before = attributes(net)
    message = r"atan:4\+detach: neuron '2' \(Bare\) has no detach_reset"
    with pytest.raises(ValueError, match=message), estimator("atan:4+detach")(net):
        pass
    assert attributes(net) == before
    with estimator("atan:4")(net):
        assert net[1].surrogate_function.alpha == 4
        assert net[2].surrogate_function.alpha == 4


class Noisy(neuron.BaseNode):
    """A user's neuron that draws noise, and counts its calls."""

    calls = 0

    def spike(self, z):
        return self.surrogate_function(z)

    def single_step_forward(self, x):
        self.calls += 1
        h = x + 0.1 * torch.randn_like(x) + self.v
        spike = self.spike(h - self.v_threshold)
        self.v = h * (1 - spike)
        return spike

    def multi_step_forward(self, x_seq):
        return torch.stack([self.single_step_forward(x) for x in x_seq])


class OwnSpike(Noisy):
    """It does not spike through ``surrogate_function``."""

    def __init__(self, **options):
        super().__init__(**options)
        self.own = surrogate.ATan()

    def spike(self, z):
        return self.own(z)


SHAPED = ["atan:4", "triangle", "rectangle", "straight_through"]


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("name", SHAPED)
def test_a_neuron_that_does_not_spike_through_its_surrogate_is_refused(name, step_mode):
    net = nn.Sequential(nn.Linear(3, 2), OwnSpike(step_mode=step_mode))
    before = attributes(net)
    message = r"would change nothing: neuron '1' \(OwnSpike\) does not spike through its surr"
    with pytest.raises(ValueError, match=message), estimator(name)(net):
        pass
    assert attributes(net) == before


class ThroughTheReset(Noisy):
    """Its surrogate decides the reset alone, as in SpikingJelly's LIAF neuron."""

    def single_step_forward(self, x):
        self.v_float_to_tensor(x)
        h = x + self.v
        self.v = h * (1 - self.surrogate_function(h - self.v_threshold))
        return h.relu()


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_neuron_whose_surrogate_acts_in_later_steps_is_changed(step_mode):
    net = nn.Sequential(ThroughTheReset(step_mode=step_mode))
    with estimator("atan:4")(net):
        assert net[0].surrogate_function.alpha == 4.0


def test_a_learned_threshold_is_read_without_a_warning(recwarn):
    node = OwnSpike(step_mode="m")
    node.v_threshold = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="would change nothing"), estimator("atan:4")(node):
        pass
    assert not recwarn


def test_the_question_whether_it_does_leaves_the_neuron_and_the_generators_alone():
    net = nn.Sequential(nn.Linear(3, 2), Noisy(step_mode="m", surrogate_function=surrogate.ATan()))
    net[1].register_forward_hook(lambda module, inputs, output: pytest.fail("hook was called"))
    net[1].v = torch.rand(1, 2, requires_grad=True) * 2
    before = attributes(net)
    generator = torch.get_rng_state()
    with estimator("atan:4")(net):
        pass
    assert attributes(net) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_widths_are_in_units_of_the_threshold():
    low = DLIFNode(T=2, v_threshold=0.5)
    high = DLIFNode(T=2, v_threshold=2.0)
    net = nn.Sequential(low, high)
    with estimator("triangle:0.5")(net):
        assert low.surrogate_function.alpha == 4.0
        assert high.surrogate_function.alpha == 1.0
    with estimator("atan:3")(net):
        assert low.surrogate_function.alpha == 3.0
        assert high.surrogate_function.alpha == 3.0


def test_a_neuron_by_itself_and_one_used_twice():
    node = neuron.IFNode(step_mode="m", surrogate_function=surrogate.ATan())
    x = torch.full((2, 1), 0.4, requires_grad=True)
    with estimator("straight_through")(node) as crafting:
        (grad,) = torch.autograd.grad(crafting(x).sum(), x)
    expected = [pytest.approx(2 - 0.4), 1.0]
    assert grad.flatten().tolist() == expected
    node.reset()
    with estimator("straight_through")(nn.Sequential(node, node)) as crafting:
        (grad,) = torch.autograd.grad(crafting(x).sum(), x)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", ["rectangle:1", "assg", "bptr"])
def test_differentiable_once(name):
    x = torch.rand(2, 3, 3, requires_grad=True)
    message = "differentiable once: create_graph=True would silently lose"
    with estimator(name)(spiking()) as crafting:
        total = crafting(x).sum()
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(total, x, create_graph=True)
