"""The operators in torch's registry: what they are to tracers. Whole networks under every tracer:
tracers.py.
"""

import pytest
import torch
from ops.calls import Seen, assert_equal, laid_out, needs_kernel, random_call, run
from spikingjelly.activation_based import surrogate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sj_robust.neuron import DLIFNode
from sj_robust.ops import Surrogate, dlif_multi_step
from sj_robust.ops.bn_dlif import BatchNorm, batch_norm_dlif_multi_step

pytestmark = [
    needs_kernel,
    # opcheck of torch 2.15 looks at the gradients of copies
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]
BACKENDS = ["cpp", "eager", "reference"]
CONSTANTS = {
    "decay": 0.5,
    "v_threshold": 1.0,
    "v_reset": None,
    "surrogate": "atan",
    "alpha": 2.0,
    "detach_reset": False,
}
OPS = torch.ops.sj_robust


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_torch_finds_no_fault_in_dlif(backend, store):
    (x, gain, v_init), (grad, grad_v, _) = random_call((3, 5), torch.float32)
    leaves = [t.requires_grad_() for t in (x, gain, v_init)]
    constants = {**CONSTANTS, "backend": backend, "threads_per_block": None}
    torch.library.opcheck(OPS.dlif, leaves, {**constants, "store_v_seq": store})
    v_init = v_init.detach() if store else None
    given = grad, grad_v, None, x.detach(), gain.detach(), v_init
    torch.library.opcheck(OPS.dlif_backward, given, {**constants, "needs_v_init": store})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statistics", "channels_last", "steps"),
    [("batch", False, 3), ("running", True, 3), (None, True, 3), ("batch", True, 1)],
)
def test_torch_finds_no_fault_in_batch_norm_and_dlif(statistics, channels_last, steps):
    (x, _, v_init), _ = random_call((steps, 2, 2, 4, 4), torch.float32)
    x = laid_out(x, channels_last)
    gain, weight, bias = (
        torch.tensor([1.0, 0.5, 2.0]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([0.1, 0.2]),
    )
    running = (torch.zeros(2), torch.ones(2)) if statistics == "running" else (None, None)
    norm = (None, None) if statistics is None else (weight.requires_grad_(), bias.requires_grad_())
    leaves = (x.requires_grad_(), gain.requires_grad_(), v_init.requires_grad_(), *norm, *running)
    stage = {
        **CONSTANTS,
        "statistics": statistics,
        "eps": 1e-5,
        "average_pool": True,
        "channels_last": channels_last,
        "backend": "cpp",
    }
    asked = {"store_v_seq": True, "store_current": True}
    torch.library.opcheck(OPS.bn_dlif, leaves, {**stage, **asked})
    with torch.no_grad():
        spikes, v, v_seq, current, moments = OPS.bn_dlif(*leaves, **stage, **asked)
        saved = (
            x.detach(),
            gain.detach(),
            v_init.detach(),
            None if statistics is None else moments,
        )
        given = (spikes, v, v_seq, current, *saved)
        needed = {"needs_x": True, "needs_v_init": True}
        torch.library.opcheck(OPS.bn_dlif_backward, given, {**stage, **needed})


def layer(backend):
    """A function of images with every kind of output, and what belongs to its gradient."""
    (x, gain, v_init), _ = random_call((3, 2, 2, 4, 4), torch.float32)
    norm = BatchNorm(
        torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2]), None, None, use_batch_statistics=True
    )
    fused = {
        "surrogate": Surrogate("sigmoid", 3.0),
        "decay": 0.5,
        "store_v_seq": True,
        "backend": backend,
    }

    def function(x):
        one = batch_norm_dlif_multi_step(
            x, norm, gain, v_init, average_pool=True, store_current=True, **fused
        )
        other = dlif_multi_step(x, gain, v_init, **fused)
        return sum(part.square().sum() for part in (*one, *other))

    return function, x


def value_and_grad(function, x):
    x = x.detach().requires_grad_()
    value = function(x)
    return value, torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_gives_the_numbers_of_other_inputs(backend, mode):
    function, x = layer(backend)
    graph = make_fx(
        lambda x: value_and_grad(function, x), tracing_mode=mode, _allow_non_fake_inputs=True
    )(x)
    names = {str(node.target) for node in graph.graph.nodes}
    alone = {f"sj_robust.{name}.default" for name in ("dlif", "dlif_backward")}
    joined = {f"sj_robust.{name}.default" for name in ("bn_dlif", "bn_dlif_backward")}
    wanted = {"cpp": alone | joined, "eager": alone}.get(backend, set())
    assert ((alone | joined) & names) == wanted
    torch.testing.assert_close(graph(0.5 * x), value_and_grad(function, 0.5 * x))


RECORDED = {
    "make_fx, real": lambda net, x: make_fx(net)(x),
    "make_fx, symbolic": lambda net, x: make_fx(
        net, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(x),
    "torch.export": lambda net, x: torch.export.export(net, (x,), strict=False).module(),
}


class FromReset(torch.nn.Module):
    """A neuron that begins every call anew."""

    def __init__(self, **options):
        super().__init__()
        self.node = DLIFNode(3, tau=2.0, backend="eager", **options)
        torch.nn.init.uniform_(self.node.input_gain, 0.5, 1.5)

    def forward(self, x):
        self.node.reset()
        spikes = self.node(x)
        self.node.reset()
        return spikes


@pytest.mark.parametrize("v_reset", [0.0, 0.3, None])
@pytest.mark.parametrize("how", RECORDED)
def test_a_recorded_neuron_runs_with_gradients_and_without(how, v_reset):
    torch.manual_seed(0)
    net, x, other = FromReset(v_reset=v_reset), torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    with torch.set_grad_enabled(how != "torch.export"):
        graph = RECORDED[how](net, x)
    gain = next(graph.parameters(), net.node.input_gain)
    found, wanted = graph(other), net(other)
    assert torch.equal(found, wanted)
    (grad,) = torch.autograd.grad(found.sum(), gain)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), net.node.input_gain)[0])
    with torch.no_grad():
        assert torch.equal(graph(other), wanted)


@pytest.mark.parametrize("how", RECORDED)
def test_a_surrogate_of_ones_own_is_refused_before_a_graph_is_made(how):
    net = FromReset(surrogate_function=surrogate.LeakyKReLU())
    with pytest.raises(ValueError, match="backend='eager' .* surrogate is a Python function"):
        RECORDED[how](net, torch.randn(3, 2, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_without_memory(backend):
    function, x = layer(backend)
    value, grad = value_and_grad(function, x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = value_and_grad(function, mode.from_tensor(x))
    assert [(t.shape, t.stride()) for t in found] == [(t.shape, t.stride()) for t in (value, grad)]
    for odd in (torch._efficientzerotensor(x.shape), torch._neg_view(torch.zeros_like(x))):
        leaf = x.clone().requires_grad_()
        spikes, _, _ = dlif_multi_step(leaf, torch.ones(3), decay=0.5, backend=backend)
        assert not torch.autograd.grad(spikes, leaf, odd)[0].any()
    torch.testing.assert_close(torch._neg_view(-x) + 0, x)
    torch.testing.assert_close(value_and_grad(function, torch._neg_view(-x)), (value, grad))


def test_a_mode_sees_the_kernel_and_changes_nothing():
    function, x = layer("cpp")
    wanted = value_and_grad(function, x)
    with Seen() as seen:
        found = value_and_grad(function, x)
    assert_equal(found, wanted)
    assert [name for name in seen.names if name.startswith("sj_robust")] == [
        "sj_robust::bn_dlif",
        "sj_robust::dlif",
        "sj_robust::dlif_backward",
        "sj_robust::bn_dlif_backward",
    ]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_vmap_over_inputs_and_gains(backend):
    (x, gain, v_init), _ = random_call((3, 5), torch.float32)

    def function(x, gain, v_init):
        spikes, v, _ = dlif_multi_step(x, gain, v_init, decay=0.5, backend=backend)
        return spikes, v

    xs, gains = torch.stack([x, -x, 2 * x], 1), torch.stack([gain, 2 * gain, 0.5 * gain])
    for dims, arguments in (
        ((1, None, None), (xs, gain, v_init)),
        ((1, 0, None), (xs, gains, v_init)),
    ):
        found = torch.func.vmap(function, dims)(*arguments)
        each = [function(xs[:, i], gains[i] if dims[1] == 0 else gain, v_init) for i in range(3)]
        torch.testing.assert_close(
            found, tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        )


def test_functional_gradient_runs_in_plain_torch_or_says_that_it_has_to():
    (x, gain, _), _ = random_call((3, 5), torch.float32)

    def function(x, backend):
        return dlif_multi_step(x, gain, decay=0.5, backend=backend)[1].square().sum()

    wanted = value_and_grad(lambda x: function(x, "cpp"), x)[1]
    torch.testing.assert_close(torch.func.grad(function)(x, "auto"), wanted)
    per_sample = torch.func.vmap(torch.func.grad(function), (0, None))(torch.stack([x, x]), "auto")
    torch.testing.assert_close(per_sample, torch.stack([wanted, wanted]))
    for backend in ("cpp", "eager"):
        with pytest.raises(ValueError, match=r"torch\.func\.grad.*backend='reference'"):
            torch.func.grad(function)(x, backend)


def test_a_surrogate_of_ones_own_is_traced_in_plain_torch():
    surrogate = Surrogate("custom", function=torch.sigmoid)
    x = torch.randn(3, 5)

    def function(x):
        return dlif_multi_step(x, torch.ones(3), decay=0.5, surrogate=surrogate)[0]

    torch.testing.assert_close(
        torch.func.vmap(function)(torch.stack([x, 2 * x])),
        torch.stack([function(x), function(2 * x)]),
    )
    with pytest.raises(ValueError, match="a Python function.*backend='reference'"):
        torch.func.vmap(
            lambda x: dlif_multi_step(
                x, torch.ones(3), decay=0.5, surrogate=surrogate, backend="eager"
            )[0]
        )(x[None])


def test_a_graph_refuses_tensors_that_its_kernel_would_misread():
    x, gain = torch.zeros(3, 5), torch.ones(3)
    call = {**CONSTANTS, "store_v_seq": False, "backend": "cpp", "threads_per_block": None}
    with pytest.raises(ValueError, match="must be torch.float32 there, got torch.float64"):
        OPS.dlif(x, gain.double(), None, **call)
    with pytest.raises(ValueError, match="one value per step"):
        OPS.dlif(x, gain[:2], None, **call)
    with pytest.raises(ValueError, match="backend='cpp', which cannot run this call"):
        OPS.dlif(x.to(torch.float8_e4m3fn), gain, None, **call)


def test_autocast_leaves_potentials_in_float32():
    inputs, grads = random_call((3, 5), torch.bfloat16)
    plain = run("cpp", inputs, grads, decay=0.5)
    with torch.autocast("cpu", torch.bfloat16), Seen():
        traced = run("cpp", inputs, grads, decay=0.5)
    assert_equal(traced, plain)
    assert traced[0][1].dtype == torch.float32
