"""Which subclasses of a neuron are their base: by what they override, in every call."""

import itertools
import warnings

import pytest
import torch
from evaluation.short_suite import shortened
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust import MPPDMonitor, SpikingClassifier, evaluate, finetune, replace_neurons
from sj_robust.proofs import UnsoundBoundsError, verify

T = 4


def lif(**overrides):
    """A subclass of LIF with a constructor of its own and these attributes."""

    def build(self, tau=2.0):
        neuron.LIFNode.__init__(self, tau=tau, step_mode="m")

    return type("MyLIF", (neuron.LIFNode,), {"__init__": build} | overrides)


def early_charge(self, x):
    self.v = 0.5 * self.v + x


def early_fire(self):
    return self.surrogate_function(self.v - 0.5 * self.v_threshold)


def late_reset(self, spike):
    self.v = self.v - 0.5 * spike


def twice(name):
    """A method that puts out what its base does, of currents twice as large."""

    def method(self, x, *args, **kwargs):
        return getattr(neuron.LIFNode, name)(self, 2 * x, *args, **kwargs)

    return {name: method}


def a_step(self, inputs, states, **kwargs):
    v = 0.5 * states[0] + inputs[0]
    spike = self.surrogate_function(v - 0.5 * self.v_threshold)
    return (spike,), (v * (1 - spike), *states[1:])


def patched(self):
    neuron.LIFNode.__init__(self, tau=2.0, step_mode="m")
    self.neuronal_fire = lambda: early_fire(self)


HARMLESS = {
    "a constructor": lif(),
    "a text": lif(__repr__=lambda self: "mine", extra_repr=lambda self: "mine"),
    "a method and a constant of its own": lif(rate=lambda self: 1 / self.tau, level=3),
    "a subclass of such a one": type("Mine", (lif(),), {"__doc__": "Mine."}),
}
CHANGED = {
    "neuronal_charge": lif(neuronal_charge=early_charge),
    "neuronal_fire": lif(neuronal_fire=early_fire),
    "neuronal_reset": lif(neuronal_reset=late_reset),
    "single_step_forward": lif(**twice("single_step_forward")),
    "multi_step_forward": lif(**twice("multi_step_forward")),
    "forward": lif(**twice("forward")),
    "single_step_functional_forward": lif(single_step_functional_forward=a_step),
    "v_threshold": lif(v_threshold=property(lambda self: 0.5, lambda self, value: None)),
    "neuronal_fire of its own": lif(__init__=patched),
}
SUBCLASSES = HARMLESS | CHANGED


class Leaky(neuron.BaseNode):
    """A user's neuron that runs on either release: decay 0.6, gain 0.5."""

    def __init__(self):
        super().__init__(step_mode="m")

    def single_step_forward(self, x):
        v = self.v if isinstance(self.v, torch.Tensor) else torch.full_like(x, self.v)
        h = 0.6 * v + 0.5 * x
        spike = self.surrogate_function(h - self.v_threshold)
        self.v = h * (1 - spike)
        return spike

    def multi_step_forward(self, x_seq):
        return torch.stack([self.single_step_forward(x) for x in x_seq])


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(2), nn.Linear(4, 8), kind(), nn.Linear(8, 3))


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 2, 2, generator=generator), torch.arange(12) % 3


def monitored(kind, **given):
    net = network(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with MPPDMonitor(net, **given) as monitor:
            return bool(monitor.monitored_layers), " ".join(str(w.message) for w in caught)


def replaced(kind):
    report = replace_neurons(network(kind), T)
    return bool(report.replaced), " ".join(report.skipped.values())


def proved(kind, **given):
    x, _ = images()
    model = SpikingClassifier(network(kind), T=T)
    try:
        result = verify(model, x, model(x).argmax(1), 1e-4, **given)
    except NotImplementedError as refusal:
        return False, str(refusal)
    return any(result.verified), ""


def evaluated(kind, **given):
    options = {"eps": 0.05, "T": T, "suite": "fast", "progress": False} | given
    x, y = images()
    with shortened():
        report = evaluate(network(kind), x[:3], y[:3], **options)
    return any(part["layers"] for part in report.potential), " ".join(report.warnings)


def finetuned(kind, **given):
    options = {"eps": 0.05, "T": T, "epochs": 1, "batch_size": 4, "progress": False} | given
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the monitor, which the error repeats
            finetune(network(kind), images(), **options)
    except ValueError as refusal:
        return False, str(refusal)
    return True, ""


QUESTIONS = [
    *itertools.product(SUBCLASSES, (monitored, replaced, proved)),
    *itertools.product(("a constructor", "neuronal_fire"), (evaluated, finetuned)),
]


@pytest.mark.parametrize(("change", "call"), QUESTIONS)
def test_a_subclass_is_its_base_unless_it_changes_what_runs(change, call):
    works, said = call(SUBCLASSES[change])
    assert works == (change in HARMLESS)
    if change in CHANGED:
        assert change in said


@pytest.mark.parametrize("call", [monitored, proved, evaluated, finetuned])
def test_a_decay_and_a_gain_are_the_same_in_every_call(call):
    works, said = call(Leaky, decay={Leaky: 0.6}, gain={Leaky: 0.5})
    assert works, said


def test_a_proof_does_not_believe_a_wrong_decay():
    model = SpikingClassifier(network(Leaky), T=T)
    with pytest.raises(UnsoundBoundsError):
        verify(model, *images(), 1e-4, decay={Leaky: 0.9}, gain={Leaky: 0.5})
    assert "charging" not in vars(model.net[2])
