"""Proofs check themselves: a network that does not do what its bounds say is refused, by name."""

import random
from dataclasses import replace

import pytest
import torch
from covering import each_in_turn, mostly_slow
from proofs import fuzz
from proofs.networks import NETWORKS, NEURONS, T, batch, classifier, convolutional
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.core.preserved import full_precision
from sj_robust.proofs import UnsoundBoundsError, joint, rules, soundness, verify
from sj_robust.proofs.differentiable import DifferentiableBounds
from sj_robust.proofs.gains import perturbation_gains
from sj_robust.proofs.gains.operator import input_maps
from sj_robust.proofs.spiking import Interval
from sj_robust.proofs.windows import SpikeTrains

METHODS = ("ibp", "joint", "mip")


class Beside(nn.Module):
    """Spikes and a branch beside them, to logits."""

    def __init__(self, branch, *, whole=False):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.node = neuron.LIFNode(step_mode="m")
        self.last = nn.Linear(6, 3)
        self.beside = nn.Linear(4, 3)
        self.branch = branch
        self.whole = whole

    def forward(self, x):
        if self.whole:
            return self.branch(self._spikes, x)
        return self._spikes(x) + self.branch(self.beside, x)

    def _spikes(self, x):
        return self.last(self.node(self.first(x)))


def beside(branch, **given):
    torch.manual_seed(0)
    return SpikingClassifier(Beside(branch, **given), T).eval()


NAMED = {
    "no_grad": fuzz.without_graph,
    "inference mode": fuzz.in_inference_mode,
    "function": fuzz.in_a_function,
}
REFUSED = {
    "detach": fuzz.detached,
    "data": fuzz.by_data,
    "numpy": fuzz.through_numpy,
    "caught numpy": fuzz.caught(lambda x: x.detach().numpy()),
    "caught tolist": fuzz.caught(lambda x: x.tolist()),
    "caught number": fuzz.caught(lambda x: float(x.sum())),
    "caught truth": fuzz.caught(lambda x: bool((x > 0).all())),
    "caught storage": fuzz.caught(lambda x: x.untyped_storage()),
}


@pytest.mark.parametrize(("method", "branch"), each_in_turn(METHODS, NAMED))
def test_a_branch_that_autograd_does_not_see_is_bounded_as_if_it_did(branch, method):
    x = torch.rand(8, 4)
    plain, hidden = beside(lambda part, x: part(x)), beside(NAMED[branch])
    y = plain(x).argmax(1)
    for eps in (0.02, 0.4):
        seen, found = (
            verify(model, x, y, eps, method=method, time_limit=5.0) for model in (plain, hidden)
        )
        assert found.verified == seen.verified
        torch.testing.assert_close(found.margin, seen.margin)


@pytest.mark.parametrize("branch", REFUSED)
def test_what_leaves_torch_has_no_bounds(branch):
    model = beside(REFUSED[branch])
    with pytest.raises(NotImplementedError, match="no bounds are known for"):
        verify(model, torch.rand(2, 4), torch.tensor([0, 1]), 0.4)


def test_a_potential_that_is_read_is_refused_even_if_the_error_is_caught():
    def with_potential(spikes, x):
        found = spikes(x)
        try:
            return found + spikes.__self__.node.v.sum()
        except NotImplementedError:
            return found

    with pytest.raises(NotImplementedError, match="potential"):
        verify(beside(with_potential, whole=True), torch.rand(2, 4), torch.tensor([0, 1]), 0.4)


def test_training_refuses_what_has_no_graph_and_gains_leave_the_layer_out():
    model = beside(fuzz.without_graph, whole=True)
    x = torch.rand(2, 4)
    y = torch.tensor([0, 1])
    with pytest.raises(NotImplementedError, match="without a graph"):
        DifferentiableBounds(model.train()).lead(x, y, 0.1)
    assert input_maps(model.net, x)["node"].not_covered is not None
    net = changed(neuron.LIFNode, "neuronal_charge", lambda x: None).net
    assert "neuronal_charge" in perturbation_gains(net, x, T=T)["1"].not_covered


@pytest.mark.parametrize("seed", range(4))
def test_a_random_network_is_refused_when_one_of_its_maps_is_cut(seed):
    assert fuzz.check_cut(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
def test_many_random_networks_are_refused_when_one_of_their_maps_is_cut(seed):
    assert fuzz.check_cut(seed)


@pytest.mark.parametrize("seed", [1, 8])
def test_what_is_proved_of_a_random_network_holds_at_many_points(seed):
    assert fuzz.check(seed, 1024)["inputs"] == 1024


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300, 308))
def test_what_is_proved_of_many_random_networks_holds_at_thousands_of_points(seed):
    assert fuzz.check(seed, 4000)["inputs"] == 4000


class TwoLevels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x >= 0).to(x) + (x >= 0.5).to(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class TwoLevelATan(surrogate.ATan):
    @staticmethod
    def spiking_function(x, alpha):
        return TwoLevels.apply(x)


class Early(surrogate.ATan):
    """A step, but below the threshold."""

    def forward(self, x):
        return (x >= -0.1).to(x)


TYPES = {
    "IF": neuron.IFNode,
    "LIF": neuron.LIFNode,
    "PLIF": neuron.ParametricLIFNode,
    "DLIF": lambda **given: DLIFNode(T=T, **given),
}


def single(node):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), node, nn.Linear(16, 3))
    return SpikingClassifier(net, T).eval()


def changed(kind, method, value):
    node = kind(step_mode="m")
    setattr(node, method, value)
    return single(node)


@pytest.mark.parametrize(("kind", "function"), each_in_turn(TYPES, [TwoLevelATan, Early]))
def test_a_surrogate_whose_forward_is_no_step_is_refused(kind, function):
    model = single(TYPES[kind](surrogate_function=function(), step_mode="m"))
    with pytest.raises(
        UnsoundBoundsError, match="the layer 1 .*forward of its surrogate is not a step"
    ):
        verify(model, torch.rand(2, 4), torch.tensor([0, 1]), 0.01)


@pytest.mark.parametrize("kind", TYPES)
def test_a_neuron_with_methods_of_its_own_is_refused(kind):
    for method in ("neuronal_charge", "neuronal_fire", "neuronal_reset"):
        model = changed(TYPES[kind], method, lambda *arguments: None)
        with pytest.raises(NotImplementedError, match=f"has a {method} of its own"):
            verify(model, torch.rand(2, 4), torch.tensor([0, 1]), 0.01)
    node = TYPES[kind](step_mode="m")
    original = node.multi_step_forward
    node.multi_step_forward = lambda x: original(1.5 * x)
    with pytest.raises(UnsoundBoundsError, match="a method of the neuron was replaced"):
        verify(single(node), torch.rand(2, 4), torch.tensor([0, 1]), 0.01)
    node = TYPES[kind](step_mode="s")
    step = node.single_step_forward
    node.single_step_forward = lambda x: step(1.5 * x)
    with pytest.raises(UnsoundBoundsError, match="a method of the neuron was replaced"):
        verify(single(node), torch.rand(2, 4), torch.tensor([0, 1]), 0.01)


AS_THEY_COME = each_in_turn(NEURONS, ["m", "s"])


@pytest.mark.parametrize(("node", "step_mode"), mostly_slow(AS_THEY_COME, quick=AS_THEY_COME[::3]))
def test_neurons_as_they_come_pass(node, step_mode):
    model = classifier(convolutional, NEURONS[node], step_mode=step_mode)
    x = torch.rand(2, 2, 8, 8)
    verify(model, x, model(x).argmax(1), 0.01)
    verify(model.double(), x.double(), model(x.double()).argmax(1), 0.01)


class OtherInPlain(nn.Module):
    """Its input, which counts double in a plain call."""

    def forward(self, x):
        if type(x) is torch.Tensor:
            return x + x
        return x + 0.0


class OtherWithoutGraph(nn.Module):
    def forward(self, x):
        return x + 0.0 if torch.is_grad_enabled() else x + x


@pytest.mark.parametrize("part", [OtherInPlain, OtherWithoutGraph])
@pytest.mark.parametrize(
    ("place", "message"), [(0, "an input current of the layer 2"), (3, "a logit of the output")]
)
def test_a_network_that_does_something_else_in_a_plain_call_is_refused(part, place, message):
    torch.manual_seed(0)
    parts = [nn.Linear(4, 16), neuron.LIFNode(step_mode="m"), nn.Linear(16, 3)]
    model = SpikingClassifier(nn.Sequential(*parts[:place], part(), *parts[place:]), T).eval()
    with pytest.raises(UnsoundBoundsError, match=message):
        verify(model, torch.rand(2, 4), torch.tensor([0, 1]), 0.01)


class Lowered(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 16)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return 1.0 * self.linear(x).float()


def test_a_network_that_switches_autocast_on_itself_is_refused():
    """Rounding to bfloat16 moves its currents by more than bounds of float32 count with."""
    net = nn.Sequential(Lowered(), neuron.LIFNode(step_mode="m"), nn.Linear(16, 3))
    model = SpikingClassifier(net, T).eval()
    with pytest.raises(UnsoundBoundsError, match="the network switches autocast on"):
        verify(model, torch.rand(2, 4), torch.tensor([0, 1]), 0.3)


@pytest.mark.parametrize(
    ("part", "end", "what"),
    [
        ("current", "low", "an input current"),
        ("spikes", "low", "a spike"),
        ("v", "low", "a membrane potential"),
        ("v", "high", "a membrane potential"),
    ],
)
def test_every_bound_is_held_against_the_run(monkeypatch, part, end, what):
    model = classifier(convolutional, NEURONS["LIF"])
    call = soundness._Call
    shift = -9.0 if end == "high" else 9.0

    def wrong(*values):
        made = call(*values)
        interval = getattr(made, part)
        moved = replace(interval, **{end: getattr(interval, end) + shift})
        return replace(made, **{part: moved})

    monkeypatch.setattr(soundness, "_Call", wrong)
    x, y = batch(model, 2)
    with pytest.raises(UnsoundBoundsError, match=f"{what} of the layer 2 is outside its bounds"):
        verify(model, x, y, 0.01)


def test_sums_over_time_are_held_against_the_run(monkeypatch):
    model = classifier(convolutional, NEURONS["LIF"])
    bounds = SpikeTrains.bounds
    monkeypatch.setattr(joint, "_SUMS", sums := 7)  # as many as no layer asks for

    def wrong(trains, weights):
        found = bounds(trains, weights)
        if len(weights) == sums:
            return Interval(found.low, found.low - 1)
        return found

    monkeypatch.setattr(SpikeTrains, "bounds", wrong)
    x, y = batch(model, 2)
    with pytest.raises(UnsoundBoundsError, match="a sum over time of spikes of the layer 2 is out"):
        verify(model, x, y, 0.01)


@pytest.mark.parametrize("build", NETWORKS)
def test_an_error_of_a_rule_is_found_at_a_point(build, monkeypatch):
    rule = rules.RULES["linear"]

    def wrong(*arguments):
        found = rule(*arguments)
        return rules.Bounds(1.01 * found.centre, found.radius, found.error, found.run)

    monkeypatch.setitem(rules.RULES, "linear", wrong)
    model = classifier(build, NEURONS["LIF"])
    x, y = batch(model, 2)
    with pytest.raises(UnsoundBoundsError, match="is outside its bounds"):
        verify(model, x, y, 0.001)


class Counts(nn.Module):
    """Turns its sign from the twelfth forward on, which a value that it holds counts."""

    def __init__(self, kind):
        super().__init__()
        if kind == "buffer":
            self.register_buffer("count", torch.zeros(()))
        elif kind == "parameter":
            self.count = nn.Parameter(torch.zeros(()), requires_grad=False)
        else:
            self.count = torch.zeros(()) if kind == "tensor" else 0

    def forward(self, x):
        self.count += 1
        return x * (1.0 if self.count < 12 else -1.0)


def counting(kind):
    torch.manual_seed(2)
    layers = [nn.Linear(4, 6), neuron.IFNode(step_mode="m"), nn.Linear(6, 3), Counts(kind)]
    return SpikingClassifier(nn.Sequential(*layers), T=3).eval()


CHANGES = r"must not change during a forward pass in evaluation mode, but one changes net\.3\.count"


@pytest.mark.parametrize("kind", ["buffer", "parameter", "tensor", "number"])
def test_a_network_whose_forward_changes_what_it_holds_is_refused(kind):
    x = torch.rand(2, 4)
    for method in METHODS:
        with pytest.raises(ValueError, match=CHANGES):
            verify(counting(kind), x, torch.tensor([0, 1]), 0.05, method=method)
    with pytest.raises(ValueError, match=CHANGES):
        DifferentiableBounds(counting(kind)).lead(x, torch.tensor([0, 1]), 0.05)


def test_values_that_a_forward_sets_again_as_they_were_are_no_change():
    """Weight norm computes its weight in every forward; a neuron that keeps v_seq is reset."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    node = neuron.LIFNode(step_mode="m", store_v_seq=True)
    model = SpikingClassifier(nn.Sequential(first, node, nn.Linear(6, 3)), T=3).eval()
    x = torch.rand(3, 4)
    soundness.check_kept(model, x).check()


class Flags(nn.Module):
    """Notes how torch computes when it runs."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, x):
        self.note(precision())
        return 1.0 * x


def precision():
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
        products = torch.backends.mkldnn.matmul.fp32_precision
        on_cuda = torch.backends.cuda.matmul.fp32_precision
    else:
        products = torch.get_float32_matmul_precision()
        on_cuda = torch.backends.cuda.matmul.allow_tf32
    return {
        "cudnn": torch.backends.cudnn.enabled,
        "cudnn TF32": torch.backends.cudnn.allow_tf32,
        "matrix products": products,
        "matrix products on CUDA": on_cuda,
        "NNPACK": torch._C._get_nnpack_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def test_the_network_runs_on_sums_of_products_in_float32():
    """cuDNN and NNPACK may take Winograd's or the FFT algorithm, whose error is another one."""
    noted = []
    flags = Flags(noted.append)
    model = SpikingClassifier(
        nn.Sequential(nn.Linear(4, 3), flags, neuron.IFNode(step_mode="m")), T
    ).eval()
    model.find_convention(torch.rand(2, 4))  # by forwards as the caller computes
    noted.clear()
    torch.set_float32_matmul_precision("medium")
    try:
        before = precision()
        with torch.autocast("cpu"):
            verify(model, torch.rand(2, 4), torch.tensor([0, 1]), 0.01)
        assert precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    wanted = {"cudnn": False, "cudnn TF32": False, "NNPACK": False, "autocast": False}
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        wanted |= {"matrix products": "ieee", "matrix products on CUDA": "ieee"}
    else:
        wanted |= {"matrix products": "highest", "matrix products on CUDA": False}
    assert noted
    for seen in noted:
        assert seen == wanted
    with full_precision(torch.device("cpu")):
        assert not precision()["cudnn TF32"]


def test_checks_leave_the_callers_generators_alone():
    model = classifier(convolutional, NEURONS["LIF"])
    x, y = batch(model, 2)
    state = torch.get_rng_state()
    python = random.getstate()
    verify(model, x, y, 0.01)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
