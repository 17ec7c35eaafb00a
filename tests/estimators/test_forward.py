"""Inside a context nothing but the gradient is different: spikes, states and everything else to the
bit.
"""

import copy
import io
from functools import partial
from itertools import product

import pytest
import torch
from attacks.table import PerStep
from spikingjelly.activation_based import layer
from spikingjelly.activation_based.model import sew_resnet, spiking_vgg
from torch import nn

from sj_robust import SpikingClassifier, ops
from sj_robust.attacks import pgd
from sj_robust.core.host import EVAL_MODE_HAS_NO_GRADIENT, functional, neuron, surrogate
from sj_robust.estimators import ESTIMATORS, estimator
from sj_robust.neuron import DLIFNode, Stage, fuse

T = 3
SAME_VALUES = [name for name in ESTIMATORS if name != "cba"]
NEURONS = {
    "IF": neuron.IFNode,
    "LIF": partial(neuron.LIFNode, tau=1.6, decay_input=False),
    "LIF_decay": partial(neuron.LIFNode, tau=1.6, decay_input=True),
    "PLIF": partial(neuron.ParametricLIFNode, init_tau=1.6),
    "DLIF": partial(DLIFNode, T=T, tau=1.6),
}


def classifier(make, *, step_mode="m", store_v_seq=False, **options):
    torch.manual_seed(0)
    first, last = (make(store_v_seq=store_v_seq, **options) for _ in range(2))
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3),
        layer.BatchNorm2d(4),
        first,
        layer.Flatten(),
        layer.Linear(64, 5),
        last,
    )
    functional.set_step_mode(net, step_mode)
    nn.init.constant_(net[1].bias, 0.8)
    net[4].weight.data.mul_(4)
    return SpikingClassifier(net, T=T).eval()


def images(n=4, dtype=torch.float32):
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def everything(model, x):
    """Logits, what every neuron put out, its states, and the gradient of a sum of logits that tells
    classes apart.
    """
    found = []
    neurons = [m for m in model.modules() if isinstance(m, neuron.BaseNode)]
    hooks = [
        m.register_forward_hook(lambda m, inputs, out: found.append(out.detach().clone()))
        for m in neurons
    ]
    x = x.clone().requires_grad_()
    logits = model(x)
    for hook in hooks:
        hook.remove()
    for m in neurons:
        found.append(m.v.detach().clone())
        if m.store_v_seq:
            found.append(m.v_seq.detach().clone())
    weights = torch.arange(1.0, 1 + logits.shape[1], dtype=logits.dtype) ** 2
    (grad,) = torch.autograd.grad((logits * weights).sum(), x)
    functional.reset_net(model)
    return [logits.detach(), *found], grad


def assert_same_values(model, x, name, *, differs=True):
    before, own = everything(model, x)
    with (
        torch.no_grad()
    ):  # in 0.0.0.0.14 other code of a neuron, which knows no smooth stand-in for the spike
        without_graph = model(x)
    assert any(0.0 < float(value.float().mean()) < 1.0 for value in before[1:]), "no spikes"
    with estimator(name)(model) as crafting:
        inside, grad = everything(crafting, x)
        with torch.no_grad():
            assert torch.equal(crafting(x), without_graph)
    after, own_again = everything(model, x)
    for value, exact, again in zip(inside, before, after, strict=True):
        assert torch.equal(value, exact)
        assert value.dtype == exact.dtype
        assert torch.equal(again, exact)
    assert torch.equal(own, own_again)
    assert grad.dtype == x.dtype
    assert torch.isfinite(grad).all()
    if name != "training" and differs:
        assert not torch.equal(grad, own)


ATAN = {"surrogate_function": surrogate.ATan()}
RESETS = [{"v_reset": None}, {"v_reset": -0.2}, {"v_threshold": 0.7, "detach_reset": True}]
OWN = [
    surrogate.ATan(spiking=False),
    lambda z: (z >= 0).to(z) + 0 * z,
]  # surrogates of a user's own
SETTINGS = {  # estimators, neurons, options of the classifier
    "as it is": (SAME_VALUES, NEURONS, [ATAN]),
    "resets": (
        SAME_VALUES,
        ("LIF", "LIF_decay", "DLIF"),
        [{**ATAN, "store_v_seq": True, **reset} for reset in RESETS],
    ),
    "other dtypes": (
        SAME_VALUES,
        ("LIF", "DLIF"),
        [{"dtype": dtype} for dtype in (torch.float64, torch.float16, torch.bfloat16)],
    ),
    "step by step": (
        ("triangle:0.5", "rectangle:1", "assg", "pdsg", "straight_through+detach"),
        NEURONS,
        [{"step_mode": "s"}],
    ),
    "own surrogates": (
        ("atan:4", "rectangle:1", "assg", "hart_mixed:1.2"),
        ("LIF", "DLIF"),
        [{"surrogate_function": function} for function in OWN],
    ),
}


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        pytest.param(*case, id=f"{what}-{'-'.join(case[:2])}")
        for what in SETTINGS
        for case in product(*SETTINGS[what])
    ],
)
def test_values_are_the_same_bits(name, kind, options):
    step_mode, dtype = options.get("step_mode"), options.get("dtype", torch.float32)
    options = {"store_v_seq": step_mode == "s" and kind == "DLIF"} | options
    options.pop("dtype", None)
    differs = dtype == torch.float32 and not (options.get("detach_reset") and "+detach" in name)
    assert_same_values(
        classifier(NEURONS[kind], **options).to(dtype), images(dtype=dtype), name, differs=differs
    )


@pytest.mark.parametrize("backend", ["auto", "reference", "eager", "cpp", "spikingjelly"])
@pytest.mark.parametrize("name", ["atan:4", "rectangle:1", "bptr", "hart_mixed:1.2", "assg"])
def test_backends_of_dlif(name, backend):
    if backend == "spikingjelly" and EVAL_MODE_HAS_NO_GRADIENT:
        pytest.skip("SpikingJelly 0.0.0.0.14 has no LIF operator")
    if ops.available_backends().get(backend, "available") != "available":
        pytest.skip(f"{backend} is not built here")
    model = classifier(partial(NEURONS["DLIF"], backend=backend))
    assert_same_values(model, images(), name)
    applied = estimator(name)(model)
    with applied:
        assert {m.backend for m in model.modules() if isinstance(m, DLIFNode)} == {backend}
        assert applied.moved == ({} if name == "atan:4" else {"net.2": "torch", "net.5": "torch"})


def batch_norm(net):
    """The batch norm in front of the first neuron, in a stage or not."""
    return net[1].norm if isinstance(net[1], Stage) else net[1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SAME_VALUES)
def test_fused_batch_norm(name, training):
    net = classifier(NEURONS["DLIF"]).net[:-1]
    plain = copy.deepcopy(net).train(training)
    fuse(net)
    fused = net.train(training)
    x, weights = images(), torch.randn(T, 4, 5)
    results = []
    for model in (plain, fused):
        with estimator(name)(model):
            leaf = x.clone().requires_grad_()
            out = model(leaf.expand(T, *leaf.shape))
            (grad,) = torch.autograd.grad((out * weights).sum(), leaf)
            results.append(
                (
                    out.detach(),
                    grad,
                    batch_norm(model).running_mean.clone(),
                    batch_norm(model).num_batches_tracked.clone(),
                )
            )
        functional.reset_net(model)
    reference = copy.deepcopy(net).train(training)
    batch_norm(reference).running_mean.zero_()
    batch_norm(reference).running_var.fill_(1)
    assert torch.equal(
        results[1][0], reference(x.expand(T, *x.shape)).detach()
    )  # to the bit with the fused pass
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2])
    assert results[0][3] == results[1][3] == int(training)


@pytest.mark.parametrize("name", ["atan:4", "rectangle:1", "bptr", "assg"])
def test_model_zoo(name):
    torch.manual_seed(0)
    options = {"spiking_neuron": neuron.LIFNode, "tau": 1.5, "surrogate_function": surrogate.ATan()}
    assert_same_values_of_zoo(
        sew_resnet.sew_resnet18(num_classes=10, cnf="ADD", **options), (2, 3, 16, 16), name
    )


@pytest.mark.slow
def test_model_zoo_vgg():
    torch.manual_seed(0)
    net = spiking_vgg.spiking_vgg11_bn(
        num_classes=10, init_weights=False, spiking_neuron=DLIFNode, T=2, tau=3.0
    )
    net.classifier = PerStep(
        nn.Flatten(), nn.Linear(512 * 49, 10)
    )  # in place of 120 million weights
    assert_same_values_of_zoo(net, (1, 3, 32, 32), "rectangle:1")


def assert_same_values_of_zoo(net, shape, name):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that neurons fire
            nn.init.constant_(module.weight, 2.0)
            nn.init.constant_(module.bias, 0.5)
    functional.set_step_mode(net, "m")
    assert_same_values(SpikingClassifier(net, T=2).eval(), torch.rand(shape), name)


class Subclass(DLIFNode):
    """A user's neuron, whose dynamics may be other ones."""


UNKNOWN = {
    "subclass": lambda: Subclass(T=T, tau=2.0),
    "EIF": lambda: neuron.EIFNode(tau=2.0, step_mode="m"),
    "QIF": lambda: neuron.QIFNode(tau=2.0, step_mode="m"),
    "Izhikevich": lambda: neuron.IzhikevichNode(
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


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize(
    "name",
    ["triangle:0.5", "atan:3", "rectangle:1", "exponential:2", "straight_through", "training"],
)
def test_neurons_of_unknown_dynamics_take_other_surrogates(name, kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        PerStep(nn.Flatten(), nn.Linear(36, 64)), UNKNOWN[kind](), PerStep(nn.Linear(64, 5))
    )
    net[0].layers[1].weight.data.mul_(3)
    assert_same_values(SpikingClassifier(net, T=T), images(), name)


@pytest.mark.parametrize("name", ["bptr", "rga", "pdsg", "assg", "hart", "hart_mixed"])
@pytest.mark.parametrize("kind", ["EIF", "subclass"])
def test_neurons_of_unknown_dynamics_are_named(name, kind):
    net = nn.Sequential(nn.Linear(3, 2), UNKNOWN[kind]())
    with pytest.raises(
        ValueError, match=r"dynamics .* '1' \((EIFNode|Subclass)\); use a surrogate"
    ):
        estimator(name)(net).__enter__()
    assert "multi_step_forward" not in vars(net[1])


@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_silent_layers_and_zero_gradients_give_no_nan(name, kind):
    model = classifier(NEURONS[kind])
    with torch.no_grad():
        for parameter in model.net[:2].parameters():
            parameter.zero_()
    x = images().requires_grad_()
    with estimator(name)(model) as crafting:
        for factor in (1.0, 0.0):
            (grad,) = torch.autograd.grad((factor * crafting(x)).sum(), x)
            assert torch.isfinite(grad).all()
        assert not grad.any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradient_of_an_image_and_its_neighbours(name):
    model, x = classifier(NEURONS["DLIF"]).double(), images(6, torch.float64)

    def gradients(batch):
        with estimator(name)(model) as crafting:
            leaf = batch.clone().requires_grad_()
            logits = crafting(leaf)
            return torch.autograd.grad((logits * torch.arange(5.0)).sum(), leaf)[0]

    alike = torch.allclose(gradients(x)[2:4], gradients(x[2:4]), rtol=1e-9, atol=1e-12)
    assert alike == estimator(name).per_sample


def _state(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_everything_is_put_back(name):
    model = classifier(NEURONS["LIF"], detach_reset=False, surrogate_function=surrogate.ATan())
    model.net[2].multi_step_forward = functional_override = partial(
        neuron.LIFNode.multi_step_forward, model.net[2]
    )
    values = everything(model, images())
    before = _state(model)
    modules = [id(m) for m in model.modules()]
    keys = list(model.state_dict())

    def use():
        with estimator(name)(model) as crafting:
            assert list(model.state_dict()) == keys
            assert [id(m) for m in model.modules()] == modules
            crafting(images())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert _state(model) == before
    assert model.net[2].multi_step_forward is functional_override
    assert model.net[2].detach_reset is False
    assert not model._forward_pre_hooks
    assert all(
        torch.equal(a, b) for a, b in zip(everything(model, images())[0], values[0], strict=True)
    )


@pytest.mark.parametrize("name", ["atan:4+detach", "rectangle:1", "assg"])
def test_copies_and_pickles_made_inside_are_without_the_estimator(name):
    model, x = classifier(NEURONS["DLIF"]), images()
    _, own = everything(model, x)
    functional.reset_net(model)
    with estimator(name)(model):
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        assert not torch.equal(everything(model, x)[1], own)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(everything(other, x)[1], own)
        assert not any("gradient" in vars(m) for m in other.modules())
        with estimator(name)(other):
            pass


def test_cba_leaves_the_network_alone():
    model = classifier(NEURONS["LIF"])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model(images().requires_grad_())  # leaves a state with a graph, which has no copy
    with estimator("cba")(model) as crafting:
        crafting.train()
        crafting(images().requires_grad_()).sum().backward()
        assert not any(isinstance(m, neuron.BaseNode) for m in crafting.modules())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_cba_of_a_network_that_goes_step_by_step():
    crafted = []
    for step_mode in ("m", "s"):
        with estimator("cba")(classifier(NEURONS["LIF"], step_mode=step_mode)) as crafting:
            crafted.append(crafting(images()))
    torch.testing.assert_close(*crafted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_pgd_crafts_inside(name, trained):
    model, x, y = trained.model, trained.x[:24], trained.y[:24]
    with estimator(name)(model) as crafting:
        x_adv = pgd(
            crafting,
            x,
            y,
            eps=0.2,
            step_size=0.05,
            steps=10,
            generator=torch.Generator().manual_seed(0),
        )
    assert (x_adv - x).abs().max() <= 0.2
    clean, robust = (float((model(a).argmax(1) == y).float().mean()) for a in (x, x_adv))
    assert robust < clean - 0.2, f"{clean} -> {robust}"
