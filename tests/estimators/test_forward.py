"""Inside a context nothing but the gradient is different: spikes, states and everything else to the
bit.
"""

import copy
import io
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from covering import each_in_turn, every_pair
from spikingjelly.activation_based import layer
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier, ops
from sj_robust.core.checks import is_compiled
from sj_robust.core.host import EVAL_MODE_HAS_NO_GRADIENT, functional, neuron, surrogate
from sj_robust.estimators import ESTIMATORS, estimator
from sj_robust.neuron import DLIFNode, fuse

T = 3
NEURONS = {
    "IF": neuron.IFNode,
    "LIF": partial(neuron.LIFNode, tau=1.6, decay_input=False),
    "LIF_decay": partial(neuron.LIFNode, tau=1.6, decay_input=True),
    "PLIF": partial(neuron.ParametricLIFNode, init_tau=1.6),
    "DLIF": partial(DLIFNode, T=T, tau=1.6),
}


def classifier(make, *, step_mode="m", store_v_seq=False, **options):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3),
        layer.BatchNorm2d(4),
        make(store_v_seq=store_v_seq, **options),
        layer.Flatten(),
        layer.Linear(64, 5),
        make(store_v_seq=store_v_seq, **options),
    )
    functional.set_step_mode(net, step_mode)
    nn.init.constant_(net[1].bias, 0.8)
    net[4].weight.data.mul_(4)
    return SpikingClassifier(net, T=T).eval()


def images(n=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 6, 6, generator=generator).to(dtype)


@dataclass
class Run:
    """Logits, spikes and states of one run, and the gradient of a sum of logits that tells classes
    apart.
    """

    values: list[torch.Tensor]
    grad: torch.Tensor

    @classmethod
    def of(cls, model, x):
        values = []

        def keep(module, inputs, output):
            values.append(output.detach().clone())

        neurons = neurons_of(model)
        hooks = [node.register_forward_hook(keep) for node in neurons]
        x = x.clone().requires_grad_()
        logits = model(x)
        for hook in hooks:
            hook.remove()
        for node in neurons:
            values.append(node.v.detach().clone())
            if node.store_v_seq:
                values.append(node.v_seq.detach().clone())
        numbers = torch.arange(1.0, 1 + logits.shape[1], dtype=logits.dtype)
        weighted = logits * numbers**2
        (grad,) = torch.autograd.grad(weighted.sum(), x)
        functional.reset_net(model)
        return cls([logits.detach(), *values], grad)


def neurons_of(model):
    return [module for module in model.modules() if isinstance(module, neuron.BaseNode)]


def fires(spikes):
    """Now and then."""
    return 0.0 < float(spikes.float().mean()) < 1.0


assert_same = partial(assert_close, rtol=0, atol=0, equal_nan=True)


def assert_same_values(model, x, name, *, differs=True):
    before = Run.of(model, x)
    # In 0.0.0.0.14 other code of a neuron, which knows no smooth stand-in for the spike.
    with torch.no_grad():
        without_graph = model(x)
    assert any(fires(value) for value in before.values[1:])
    with estimator(name)(model) as crafting:
        inside = Run.of(crafting, x)
        with torch.no_grad():
            assert torch.equal(crafting(x), without_graph)
    after = Run.of(model, x)
    assert_same(inside.values, before.values)
    assert_same(after.values, before.values)
    assert torch.equal(after.grad, before.grad)
    assert inside.grad.dtype == x.dtype
    assert torch.isfinite(inside.grad).all()
    if name != "training" and differs:
        assert not torch.equal(inside.grad, before.grad)


class Subclass(DLIFNode):
    """A user's neuron, whose dynamics may be other ones."""

    def multi_step_forward(self, x_seq):
        return super().multi_step_forward(x_seq)


UNKNOWN = {
    "subclass": partial(Subclass, T=T, tau=2.0),
    "EIF": partial(neuron.EIFNode, tau=2.0, step_mode="m"),
    "QIF": partial(neuron.QIFNode, tau=2.0, step_mode="m"),
    "Izhikevich": partial(
        neuron.IzhikevichNode,
        tau=2.0,
        v_c=0.8,
        a0=1.0,
        v_threshold=1.0,
        v_rest=0.0,
        v_reset=-0.1,
        tau_w=2.0,
        a=0.2,
        b=0.1,
        step_mode="m",
    ),
}


def own_spike(z):
    """A surrogate of a user's own."""
    return (z >= 0).to(z) + 0 * z


WAYS = ["atan:4", "rectangle:1", "bptr", "hart_mixed:1.2", "assg"]
"""One name of every way in which an estimator puts its gradient in place of another."""
STEPWISE = ["triangle:0.5", "rectangle:1", "assg", "pdsg", "straight_through+detach"]
SURROGATES = ["triangle:0.5", "atan:3", "rectangle:1", "exponential:2", "straight_through"]
BACKENDS = ["auto", "reference", "eager", "cpp", "spikingjelly"]
ATAN = {"surrogate_function": surrogate.ATan()}
RESETS = [
    {"v_reset": None},
    {"v_reset": -0.2},
    {"v_threshold": 0.7, "detach_reset": True},
]
OWN = {
    "name": WAYS,
    "kind": ["LIF", "DLIF"],
    "function": [surrogate.ATan(spiking=False), own_spike],
}


class Row(NamedTuple):
    """An estimator on a classifier of some neurons with options."""

    name: str
    kind: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    differs: bool = True

    def __str__(self):
        return f"{self.name} {self.kind} {self.dtype} {sorted(self.options)}"

    def check(self):
        model = classifier((NEURONS | UNKNOWN)[self.kind], **self.options).to(self.dtype)
        x = images(dtype=self.dtype)
        assert_same_values(model, x, self.name, differs=self.differs)
        return model


ROWS = [
    *(Row(name, kind, ATAN) for name, kind in product(WAYS, NEURONS)),
    *(Row(name, kind, ATAN) for name, kind in each_in_turn(ESTIMATORS, NEURONS)),
    *(
        Row(
            name,
            kind,
            {"store_v_seq": True, **ATAN, **reset},
            differs="detach_reset" not in reset or "+detach" not in name,
        )
        for name, reset, kind in each_in_turn(ESTIMATORS, RESETS, ["LIF", "LIF_decay", "DLIF"])
    ),
    *(
        Row(name, kind, {}, dtype, differs=False)
        for name, dtype, kind in each_in_turn(
            ESTIMATORS, [torch.float64, torch.float16, torch.bfloat16], ["LIF", "DLIF", "DLIF"]
        )
    ),
    *(
        Row(name, kind, {"step_mode": "s", "store_v_seq": kind == "DLIF"})
        for name, kind in each_in_turn(STEPWISE, NEURONS)
    ),
    *(
        Row(name, kind, {"surrogate_function": function})
        for name, kind, function in every_pair(OWN)
    ),
    *(Row(name, kind, {}) for name, kind in each_in_turn(SURROGATES, UNKNOWN)),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_values_are_the_same_bits(row):
    row.check()


@pytest.mark.parametrize(
    ("name", "backend"), [*each_in_turn(WAYS, BACKENDS), *each_in_turn(["atan:4"], BACKENDS[1:])]
)
def test_backends_of_dlif(name, backend):
    if backend == "spikingjelly" and EVAL_MODE_HAS_NO_GRADIENT:
        pytest.skip("SpikingJelly 0.0.0.0.14 has no LIF operator")
    if ops.available_backends().get(backend, "available") != "available":
        pytest.skip(f"{backend} is not built here")
    model = Row(name, "DLIF", {"backend": backend}).check()
    applied = estimator(name)(model)
    moved = {"net.2": "torch", "net.5": "torch"}
    with applied:
        assert model.net[2].backend == backend
        assert model.net[5].backend == backend
        assert applied.moved == ({} if name == "atan:4" else moved)


@pytest.mark.parametrize(("name", "training"), each_in_turn(ESTIMATORS, [False, True]))
def test_fused_batch_norm(name, training):
    plain = classifier(NEURONS["DLIF"]).train(training)
    fused = copy.deepcopy(plain)
    fuse(fused.net)
    expected = copy.deepcopy(fused)(images())
    runs = []
    for model in (plain, fused):
        with estimator(name)(model) as crafting:
            runs.append(Run.of(crafting, images()))
    assert torch.equal(runs[1].values[0], expected)  # to the bit with the fused pass
    assert_close(runs[1].grad, runs[0].grad, rtol=1e-4, atol=1e-5)
    norms = [plain.net[1], fused.net[1].norm]
    assert_close(norms[1].running_mean, norms[0].running_mean)
    assert norms[0].num_batches_tracked == norms[1].num_batches_tracked == int(training)


@pytest.mark.parametrize("name", ["bptr", "rga", "pdsg", "assg", "hart", "hart_mixed"])
@pytest.mark.parametrize("kind", ["EIF", "subclass"])
def test_neurons_of_unknown_dynamics_are_named(name, kind):
    net = nn.Sequential(nn.Linear(3, 2), UNKNOWN[kind]())
    with pytest.raises(ValueError, match="dynamics .* '1'"), estimator(name)(net):
        pass
    assert "multi_step_forward" not in vars(net[1])


@pytest.mark.parametrize(("name", "kind"), each_in_turn(ESTIMATORS, NEURONS))
def test_silent_layers_and_zero_gradients_give_no_nan(name, kind):
    model = classifier(NEURONS[kind])
    with torch.no_grad():
        for parameter in model.net[:2].parameters():
            parameter.zero_()
    x = images().requires_grad_()
    with estimator(name)(model) as crafting:
        for factor in (1.0, 0.0):
            total = crafting(x).sum()
            (grad,) = torch.autograd.grad(factor * total, x)
            assert torch.isfinite(grad).all()
        assert not grad.any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradient_of_an_image_and_its_neighbours(name):
    model = classifier(NEURONS["DLIF"]).double()
    x = images(6, torch.float64)

    def gradients(batch):
        leaf = batch.clone().requires_grad_()
        with estimator(name)(model) as crafting:
            weighted = crafting(leaf) * torch.arange(5.0)
            (grad,) = torch.autograd.grad(weighted.sum(), leaf)
        return grad

    among_others = gradients(x)[2:4]
    alone = gradients(x[2:4])
    alike = torch.allclose(among_others, alone, rtol=1e-9, atol=1e-12)
    assert alike == estimator(name).per_sample


def attributes(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_everything_is_put_back(name):
    model = classifier(NEURONS["LIF"], detach_reset=False, surrogate_function=surrogate.ATan())
    node = model.net[2]
    override = partial(neuron.LIFNode.multi_step_forward, node)
    node.multi_step_forward = override
    values = Run.of(model, images()).values
    before = attributes(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    keys = list(model.state_dict())

    def use():
        with estimator(name)(model) as crafting:
            assert list(model.state_dict()) == keys
            for path, module in model.named_modules(remove_duplicate=False):
                assert module is modules[path] or path.endswith(".surrogate_function")
                assert module.training == modules[path].training
            crafting(images())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert attributes(model) == before
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    assert node.multi_step_forward is override
    assert node.detach_reset is False
    assert not model._forward_pre_hooks
    assert_same(Run.of(model, images()).values, values)


class LearnedSlope(nn.Module):
    """A surrogate of a user's own with a parameter."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(2.0))

    def forward(self, z):
        return (z >= 0).to(z) + 0 * self.slope * z


def test_parameters_of_a_surrogate_stay_the_networks():
    net = nn.Sequential(UNKNOWN["EIF"](surrogate_function=LearnedSlope()))
    state = net.state_dict()
    parameters = dict(net.named_parameters())
    with estimator("atan:4")(net):
        assert_same(net.state_dict(), state)
        assert dict(net.named_parameters()) == parameters


def compiled_whole(net):
    return torch.compile(net, backend="eager")


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def compiled_neurons(net):
    for node in neurons_of(net):
        node.compile(backend="eager")
    return net


def sequence_gradient(net, call):
    """Gradient of a network's input, where ``call`` runs the network."""
    functional.reset_net(net)
    x_seq = images().repeat(T, 1, 1, 1, 1).requires_grad_()
    logits = call(x_seq)
    return torch.autograd.grad(logits[..., 0].sum(), x_seq)[0]


of_compiler = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


COMPILED = {
    "compiled": [compiled_whole, compiled_in_place, compiled_neurons],
    "name": ["atan:4", "rectangle:1", "sigmoid:4+detach"],
    "first": ["training", "estimator"],
}


@of_compiler
@pytest.mark.parametrize(tuple(COMPILED), every_pair(COMPILED))
def test_compiled_networks_have_the_gradient_of_uncompiled_ones(compiled, name, first):
    torch.compiler.reset()
    plain = classifier(NEURONS["DLIF"], **ATAN).net
    own = sequence_gradient(plain, plain)
    with estimator(name)(plain):
        wanted = sequence_gradient(plain, plain)
    assert not torch.allclose(own, wanted)
    net = compiled(classifier(NEURONS["DLIF"], **ATAN).net)
    if first == "training":
        assert_close(sequence_gradient(net, net), own)
    with estimator(name)(net) as crafting:
        assert torch.equal(sequence_gradient(net, crafting), wanted)
    assert_close(sequence_gradient(net, net), own)
    assert is_compiled(net)


@of_compiler
@pytest.mark.parametrize("first", ["training", "estimator"])
def test_a_graph_that_was_compiled_outside_follows_the_estimator(first):
    torch.compiler.reset()
    net = classifier(NEURONS["DLIF"], **ATAN).net
    run = torch.compile(lambda x_seq: net(x_seq), backend="eager")
    own = sequence_gradient(net, net)
    if first == "training":
        assert_close(sequence_gradient(net, run), own)
    with estimator("atan:4")(net):
        inside = sequence_gradient(net, run)
        assert_close(inside, sequence_gradient(net, net))
    assert not torch.allclose(inside, own)
    assert_close(sequence_gradient(net, run), own)


@pytest.mark.parametrize("name", ["atan:4+detach", "rectangle:1", "assg"])
def test_copies_and_pickles_made_inside_are_without_the_estimator(name):
    model = classifier(NEURONS["DLIF"])
    own = Run.of(model, images()).grad
    functional.reset_net(model)
    file = io.BytesIO()
    with estimator(name)(model):
        twin = copy.deepcopy(model)
        torch.save(model, file)
        inside = Run.of(model, images())
        assert not torch.equal(inside.grad, own)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        outside = Run.of(other, images())
        assert torch.equal(outside.grad, own)
        for module in other.modules():
            assert "gradient" not in vars(module)
        with estimator(name)(other):
            pass


def test_cba_leaves_the_network_alone():
    model = classifier(NEURONS["LIF"])
    weights = copy.deepcopy(model.state_dict())
    model(images().requires_grad_())  # leaves a state with a graph, which has no copy
    with estimator("cba")(model) as crafting:
        logits = crafting(images().requires_grad_())
        logits.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None
    assert_same(model.state_dict(), weights)


class Forgetful(nn.Module):
    """Drops inputs at random in evaluation mode too, by two sources."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        own = torch.rand(x.shape, generator=self.generator)
        return x * (torch.rand_like(x) < 0.5) * (own < 0.5)


def test_cba_draws_once_for_values_and_gradient():
    model = SpikingClassifier(nn.Sequential(Forgetful(), DLIFNode(T=T)), T=T)
    x = torch.ones(1, 50).requires_grad_()

    def logits(network):
        torch.manual_seed(0)
        model.net[0].generator.manual_seed(0)
        return [network(x) for _ in range(2)]

    with estimator("cba")(model) as crafting:
        crafted = logits(crafting)
    for found, expected in zip(crafted, logits(model), strict=True):
        assert torch.equal(found, expected)
        (grad,) = torch.autograd.grad(found.sum(), x)
        assert torch.equal(grad > 0, expected > 0)  # what was dropped reaches neither


def test_cba_of_a_network_that_goes_step_by_step():
    runs = []
    for step_mode in ("m", "s"):
        model = classifier(NEURONS["LIF"], step_mode=step_mode)
        with estimator("cba")(model) as crafting:
            runs.append(Run.of(crafting, images()))
    assert_close(runs[0].values[0], runs[1].values[0])
    assert_close(runs[0].grad, runs[1].grad)
