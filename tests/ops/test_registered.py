"""The operators in torch's registry: one path for calls with a tracer and without."""

import gc

import pytest
import torch
from covering import each_in_turn
from ops import tracers
from ops.calls import BF16, F32, Case, Drawn, Seen, assert_equal, needs_kernel, results
from spikingjelly.activation_based import surrogate
from torch.testing import assert_close

from sj_robust.neuron import DLIFNode
from sj_robust.ops import Surrogate, dlif_multi_step
from sj_robust.ops.dlif.config import _CUSTOM, DLIFConfig
from sj_robust.ops.dlif.operator import Operator, check_call

pytestmark = [
    needs_kernel,
    # opcheck of torch 2.15 looks at the gradients of copies
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]
OPS = torch.ops.sj_robust
ALONE = Case(3, (5,), v_reset=None, surrogate=("atan", 2.0))
STAGE = Case(3, (2, 2, 4, 4), layout="channels_last", stage="batch", pool=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["cpp", "eager", "reference", "fused"])
@pytest.mark.parametrize("tracer", tracers.QUICK)
def test_a_network_under_a_tracer_gives_the_numbers_of_the_plain_call(tracer, backend):
    torch.manual_seed(0)
    net = tracers.Network(backend)
    if (tracer, backend) in tracers.REFUSED:
        error, message = tracers.REFUSED[tracer, backend]
        with pytest.raises(error, match=message):
            tracers.QUICK[tracer](net)
    else:
        tracers.QUICK[tracer](net)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # of torch, by itself
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize(
    ("tracer", "backend"),
    [
        *each_in_turn(tracers.SLOW, ["fused", "cpp", "eager"]),
        *(
            pytest.param(*case, marks=pytest.mark.kernels)
            for case in each_in_turn(tracers.BY_A_COMPILER, ["cpp", "fused"])
        ),
    ],
)
def test_a_compiled_network_gives_the_numbers_of_the_plain_call(tracer, backend):
    torch.manual_seed(0)
    torch.compiler.reset()
    gc.collect()  # torch guards the order of the networks that SpikingJelly's reset_net has seen
    (tracers.SLOW | tracers.BY_A_COMPILER)[tracer](tracers.Network(backend))


@pytest.fixture
def asked(monkeypatch):
    """Calls of operators, which all go through torch's registry."""
    calls = []

    def ask(operator, *tensors, **constants):
        calls.append((operator.overload, tensors, constants))
        return operator.overload(*tensors, **constants)

    monkeypatch.setattr(Operator, "__call__", ask)
    return calls


@pytest.mark.parametrize(
    ("backend", "case"), [("cpp", ALONE), ("eager", ALONE), ("cpp", STAGE)], ids=str
)
def test_a_call_that_torch_is_asked_about_gives_the_same_bits(backend, case, asked, monkeypatch):
    found = results(backend, case)
    assert len(asked) == 2
    monkeypatch.undo()
    assert_equal(found.listed(), results(backend, case).listed())


OTHERS = [Case(3, (2, 2, 4, 4), layout="channels_last", stage="running", pool=True)]
OTHERS += [Case(3, (2, 2, 4, 4), stage="none", pool=True), Case(3, (5,), starts=False)]
OTHERS += [Case(3, (2, 2, 4, 4), stage="batch", repeated=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "case"), [("cpp", ALONE), ("eager", ALONE), *[("cpp", c) for c in (STAGE, *OTHERS)]]
)
def test_torch_finds_no_fault(backend, case, asked):
    """In the call of an operator and that of its gradient."""
    results(backend, case)
    assert len(asked) == 2
    for overload, tensors, constants in list(asked):
        given = [None if t is None else t.detach() for t in tensors]
        if not overload.name().endswith("backward"):
            for tensor, one in zip(tensors, given, strict=True):
                if one is not None:
                    one.requires_grad_(tensor.requires_grad)
        torch.library.opcheck(overload, given, constants)


def test_a_mode_sees_the_operators_with_every_output():
    found = []
    for mode in (Seen(), None):
        with mode or torch.enable_grad():
            found.append([*results("cpp", ALONE).listed(), *results("cpp", STAGE).listed()])
        if mode is not None:
            names = [name for name in mode.names if name.startswith("sj_robust")]
    assert_equal(*found)
    order = ["dlif", "dlif_backward", "bn_dlif", "bn_dlif_backward"]
    assert names == [f"sj_robust::{name}" for name in order]


def test_autocast_leaves_potentials_in_float32():
    case = Case(3, (5,), BF16)
    with torch.autocast("cpu", BF16), Seen():
        traced = results("cpp", case)
    assert_equal(traced.listed(), results("cpp", case).listed())
    assert traced.outputs["v"].dtype == F32


def test_a_surrogate_of_ones_own_lives_as_long_as_its_graph():
    x = torch.randn(3, 5, requires_grad=True)
    gc.collect()  # what other tests left
    known = len(_CUSTOM)
    own = Surrogate("custom", function=torch.sigmoid)
    spikes, _, _ = dlif_multi_step(x, torch.ones(3), decay=0.5, surrogate=own, backend="eager")
    del own
    spikes.sum().backward()
    del spikes
    gc.collect()
    assert x.grad.any()
    assert len(_CUSTOM) == known


def test_an_input_that_was_changed_in_place_is_noticed():
    x = torch.randn(3, 4, requires_grad=True)
    spikes, _, _ = dlif_multi_step(x, torch.ones(3), decay=0.9, backend="cpp")
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()


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


RECORDED = {
    "make_fx, real": lambda net, x: tracers.make_fx(net)(x),
    "make_fx, symbolic": lambda net, x: tracers.make_fx(
        net, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(x),
    "torch.export": lambda net, x: torch.export.export(net, (x,), strict=False).module(),
}


@pytest.mark.parametrize(("how", "v_reset"), each_in_turn(RECORDED, [0.0, 0.3, None]))
def test_a_recorded_neuron_runs_with_gradients_and_without(how, v_reset):
    torch.manual_seed(0)
    net = FromReset(v_reset=v_reset)
    other = torch.randn(3, 2, 4)
    with torch.set_grad_enabled(how != "torch.export"):
        graph = RECORDED[how](net, torch.randn(3, 2, 4))
    gain = next(graph.parameters(), net.node.input_gain)
    found = graph(other)
    wanted = net(other)
    assert torch.equal(found, wanted)
    (grad,) = torch.autograd.grad(found.sum(), gain)
    assert_close(grad, torch.autograd.grad(wanted.sum(), net.node.input_gain)[0])
    with torch.no_grad():
        assert torch.equal(graph(other), wanted)


@pytest.mark.parametrize("how", RECORDED)
def test_a_surrogate_of_ones_own_is_refused_before_a_graph_is_made(how):
    net = FromReset(surrogate_function=surrogate.LeakyKReLU())
    with pytest.raises(ValueError, match="backend='eager' .* surrogate is a Python function"):
        RECORDED[how](net, torch.randn(3, 2, 4))


def test_vmap_over_inputs_and_gains_and_with_a_surrogate_of_ones_own():
    own = Surrogate("custom", function=torch.sigmoid)
    leaves = Drawn(ALONE).leaves
    x, gain = leaves["x"].detach(), leaves["gain"].detach()
    xs = torch.stack([x, -x, 2 * x], 1)
    gains = torch.stack([gain, 2 * gain, 0.5 * gain])
    for backend, slope in (("cpp", None), ("eager", None), ("auto", own)):

        def spikes(x, gain, backend=backend, slope=slope):
            return dlif_multi_step(x, gain, decay=0.5, surrogate=slope, backend=backend)[0]

        each = [spikes(xs[:, i], gains[i]) for i in range(3)]
        assert_close(torch.func.vmap(spikes, (1, 0))(xs, gains), torch.stack(each))
    with pytest.raises(ValueError, match="a Python function.*backend='reference'"):
        torch.func.vmap(lambda x: spikes(x, gain, "eager", own))(x[None])


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_odd_tensors_are_made_plain(backend):
    """Zeros without memory, and numbers that are negated when they are read."""
    x = torch.randn(3, 5, requires_grad=True)
    call = {"decay": 0.5, "backend": backend}
    for odd in (torch._efficientzerotensor(x.shape), torch._neg_view(torch.zeros_like(x))):
        spikes, _, _ = dlif_multi_step(x, torch.ones(3), **call)
        assert not torch.autograd.grad(spikes, x, odd)[0].any()
    found = dlif_multi_step(torch._neg_view(-x.detach()), torch.ones(3), **call)
    assert_equal(found, dlif_multi_step(x.detach(), torch.ones(3), **call))


def test_a_graph_refuses_tensors_that_its_kernel_would_misread():
    x = torch.zeros(3, 5)
    gain = torch.ones(3)
    neuron = DLIFConfig(0.5, 1.0, None, Surrogate("atan", 2.0), detach_reset=False)
    call = {**neuron.arguments, "backend": "cpp", "store_v_seq": False}
    with pytest.raises(ValueError, match=r"must be torch.float32 there, got torch.float64"):
        OPS.dlif(x, gain.double(), None, **call)
    with pytest.raises(ValueError, match="there, got torch.float32 on meta"):
        check_call("cpp", neuron.surrogate, x, gain.to("meta"))
    with pytest.raises(ValueError, match="one value per step"):
        OPS.dlif(x, gain[:2], None, **call)
    with pytest.raises(ValueError, match="backend='cpp', which cannot run this call"):
        OPS.dlif(x.to(torch.float8_e4m3fn), gain, None, **call)
