"""Stage and fuse: the same network, the same results, fewer passes; and nobody misses a call."""

import copy
import io
from collections import OrderedDict
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from covering import every_pair
from ops.calls import needs_kernel
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from sj_robust.estimators import estimator
from sj_robust.models import NetworkSpec, build_network
from sj_robust.neuron import DLIFNode, Stage, fuse, stage, unfuse
from sj_robust.neuron.fusion import plain_names
from sj_robust.neuron.watching import Wants, watch
from sj_robust.ops.bn_dlif import one_pass
from sj_robust.ops.dlif import cpp
from sj_robust.perturbation import MPPDMonitor

T = 4


def network(**norm):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1),
        layer.BatchNorm2d(6, **norm),
        DLIFNode(T=T, v_reset=None),
        nn.Sequential(
            layer.Conv2d(6, 5, 2),
            layer.BatchNorm2d(5, **norm),
            DLIFNode(T=T, surrogate_function=surrogate.ATan()),
            layer.AvgPool2d(2),
        ),
        layer.Flatten(),
        layer.Linear(45, 8),
        DLIFNode(T=T),
    )
    functional.set_step_mode(net, "m")
    for module in net.modules():
        if isinstance(module, DLIFNode):
            nn.init.uniform_(module.input_gain, 0.5, 1.5)
    return net


class Noisy(DLIFNode):
    """A neuron of somebody's own."""

    def forward(self, x_seq):
        return 0.5 * super().forward(x_seq)


def both(**norm):
    """The same network plain and fused."""
    plain = network(**norm)
    fused = copy.deepcopy(plain)
    assert fuse(fused).stages == {"1": ("1", "2"), "3.1": ("3.1", "3.2", "3.3")}
    return plain, fused


def parts(net):
    """Batch norm, neuron and pooling of the second stage of :func:`network`, in stages or not."""
    inner = net[3]
    if isinstance(inner[1], Stage):
        return inner[1].norm, inner[1].node, inner[1].pool
    return inner[1], inner[2], inner[3]


def first_parts(net):
    """Batch norm and neuron of the first stage."""
    if isinstance(net[1], Stage):
        return (net[1].norm, net[1].node)
    return (net[1], net[2])


@pytest.fixture
def passes(monkeypatch):
    """Counts the batch norms and the poolings that ran in one pass with their neuron."""
    count = SimpleNamespace(fused=0, pooled=0)
    operator = stage.in_one_pass

    def counting(x_seq, norm, *args, **kwargs):
        count.fused += norm is not None
        count.pooled += kwargs["average_pool"]
        return operator(x_seq, norm, *args, **kwargs)

    monkeypatch.setattr(stage, "in_one_pass", counting)
    return count


def sequence(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def step(net, x, train=True):
    """Outputs, gradients and state of a pass over one batch."""
    functional.reset_net(net)
    net.train(train).zero_grad()
    x = x.clone().requires_grad_()
    out = net(x)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    names = plain_names(net)
    return {
        "out": out.detach(),
        "x": x.grad,
        **{names[name]: p.grad for name, p in net.named_parameters()},
        **{f"state {names[name]}": b.clone() for name, b in net.named_buffers()},
    }


def monitored(net, monitor, x, x_perturbed):
    """Outputs of the second of two passes that a monitor compares, each from a reset."""
    for context, images in ((monitor.clean(), x), (monitor.perturbed(), x_perturbed)):
        functional.reset_net(net)
        with context:
            out = net(images)
    return out


def assert_same(actual, wanted):
    assert actual.keys() == wanted.keys()
    assert torch.equal(actual["out"], wanted["out"])
    for name, tensor in wanted.items():
        assert_close(
            actual[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@needs_kernel
@pytest.mark.parametrize(
    "norm",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": 0.5, "eps": 0.1},
    ],
    ids=str,
)
def test_results_and_state_are_unchanged(passes, norm):
    plain, fused = both(**norm)
    assert list(plain_names(fused).values()) == list(plain.state_dict())
    for batch in range(3):
        x = torch.randn(T, 3, 2, 8, 8, generator=torch.Generator().manual_seed(batch))
        for train in (True, False):
            assert_same(step(fused, x, train), step(plain, x, train))
        with torch.no_grad():  # as an optimiser does between two batches
            for parameter in (*plain.parameters(), *fused.parameters()):
                parameter.mul_(1.1)
    assert (passes.fused, passes.pooled) == (3 * 2 * 2, 3 * 2)


@needs_kernel
def test_float64_potentials_are_those_of_the_plain_network(passes):
    plain = network().double()
    fused = copy.deepcopy(plain)
    fuse(fused)
    nodes = [first_parts(net)[1] for net in (fused, plain)]
    for node in nodes:
        node.store_v_seq = True
    x = torch.randn(T, 3, 2, 8, 8, dtype=torch.float64)
    assert_same(step(fused, x), step(plain, x))
    assert_close(nodes[0].v_seq, nodes[1].v_seq, rtol=0, atol=1e-12)
    assert_close(nodes[0].v, nodes[1].v, rtol=0, atol=1e-12)
    assert nodes[0].time_step == nodes[1].time_step == T
    assert passes.fused == 2


@needs_kernel
def test_chunks_and_single_steps_go_on_where_the_last_stopped(passes):
    plain, fused = (net.eval() for net in both())
    x = torch.randn(T, 3, 2, 8, 8)
    with torch.no_grad():
        expected = plain(x)
        found = torch.cat([fused(x[:1]), fused(x[1:3]), fused(x[3:])])
        assert torch.equal(found, expected)
        assert passes.fused == 6
        functional.reset_net(fused)
        functional.set_step_mode(fused, "s")
        found = torch.stack([fused(x_t) for x_t in x])
        assert torch.equal(found, expected)
    assert passes.fused == 6


def named(*modules):
    """Modules with names of their own."""
    names = ("conv", "bn", "sn", "pool", "flat")
    return nn.Sequential(OrderedDict(zip(names, modules, strict=True)))


@pytest.mark.parametrize("build", [nn.Sequential, named])
def test_taken_out_again_everything_is_where_it_was(build):
    norm = layer.BatchNorm2d(4)
    node = DLIFNode(T=T)
    pool = layer.AvgPool2d(2)
    net = build(layer.Conv2d(2, 4, 3), norm, node, pool, layer.Flatten())
    keys = list(net.state_dict())
    modules = dict(net.named_modules())
    names = list(dict(net.named_children()))
    report = fuse(net)
    expected = {names[1]: tuple(names[1:4])}
    assert report.stages == expected
    found = net.get_submodule(names[1])
    assert type(found) is Stage
    seen = [part for _, part in found.parts()]
    assert seen == [norm, node, pool]
    assert list(dict(net.named_children())) == names  # whatever picks a module by its name finds it
    assert list(net)[4] is modules[names[4]]
    seen = [report.renamed.get(key, key) for key in keys]
    assert seen == list(net.state_dict())
    assert list(plain_names(net).values()) == keys
    assert fuse(net).stages == {}
    unfuse(net)
    assert list(net.state_dict()) == keys
    assert dict(net.named_modules()) == modules


def test_stages_that_a_network_was_built_with_are_taken_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Stage(DLIFNode(T=T), norm=layer.BatchNorm2d(3))
            self.rest = nn.Sequential(
                Stage(DLIFNode(T=T), pool=layer.AvgPool2d(2)), layer.Flatten(), layer.Linear(12, 2)
            )

        def forward(self, x):
            return self.rest(self.first(x))

    net = Block()
    functional.set_step_mode(net, "m")
    x = sequence(T, 2, 3, 4, 4)
    wanted = net(x)
    plain = list(plain_names(net).values())
    unfuse(net)
    assert list(net.state_dict()) == plain
    assert plain[0] == "first.0.weight"
    assert plain[-3:] == ["rest.0.input_gain", "rest.3.weight", "rest.3.bias"]
    functional.reset_net(net)
    assert_close(net(x), wanted)
    for module in net.modules():
        assert not isinstance(module, Stage)


@needs_kernel
def test_a_network_that_is_built_without_one_pass_has_the_same_weights(passes):
    fast, slow = (build_network(NetworkSpec(fused=fused)) for fused in (True, False))
    slow.load_state_dict(fast.state_dict())
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fast.eval()(x), slow.eval()(x))
    assert passes.fused == passes.pooled == 2


def test_says_what_it_leaves_alone():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = layer.BatchNorm2d(4)
            self.sn = DLIFNode(T=T)

    net = nn.Sequential(
        layer.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm3d(4),
        DLIFNode(T=T),
        nn.SyncBatchNorm(4),
        DLIFNode(T=T),
        layer.BatchNorm2d(4),
        neuron.LIFNode(),
        Residual(),
        layer.BatchNorm2d(4),
        Noisy(T=T),
        layer.BatchNorm2d(4),
    )
    report = fuse(net)
    assert report.stages == {}
    assert report.renamed == {}
    for module in net.modules():
        assert not isinstance(module, Stage)
    for name, reason in {
        "0": "followed by ReLU",
        "2": "not a BatchNorm of SpikingJelly",
        "4": "SyncBatchNorm is not",
        "6": "followed by LIFNode",
        "8.bn": "is in a Residual",
        "9": "followed by Noisy",
        "11": "followed by nothing",
    }.items():
        assert reason in report.skipped[name]
    assert len(report.skipped) == 7


@pytest.mark.parametrize(
    "prevent",
    [
        lambda node: setattr(node, "backend", "eager"),
        lambda node: setattr(node, "surrogate_function", surrogate.LeakyKReLU()),
        lambda node: setattr(node, "surrogate_function", surrogate.ATan(spiking=False)),
    ],
    ids=["backend", "surrogate", "smooth surrogate"],
)
def test_runs_one_after_the_other_where_there_is_no_kernel(passes, prevent):
    plain, fused = both()
    for net in (plain, fused):
        prevent(first_parts(net)[1])
    x = sequence(T, 3, 2, 8, 8)
    assert_same(step(fused, x), step(plain, x))
    assert passes.fused == (cpp.unavailable_reason() is None)  # the other pair


def three(build):
    """Batch norm, neuron and pooling of the same weights, in a stage or in ``nn.Sequential``."""
    torch.manual_seed(0)
    norm = layer.BatchNorm2d(3)
    node = DLIFNode(T=2)
    pool = layer.AvgPool2d(2)
    nn.init.uniform_(node.input_gain, 0.5, 1.5)
    return finished(build, norm, node, pool)


def finished(build, norm, node, pool):
    net = Stage(node, norm=norm, pool=pool) if build is Stage else nn.Sequential(norm, node, pool)
    functional.set_step_mode(net, "m")
    return net, {"norm": norm, "node": node, "pool": pool}


def forward_and_backward(net):
    """Output and gradients."""
    functional.reset_net(net)
    x = sequence(2, 2, 3, 4, 4).requires_grad_()
    out = net(x)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    found = [out.detach(), x.grad, *[p.grad for p in net.parameters()]]
    net.zero_grad()
    return found


class Owner:
    """Whose method a hook is; its attributes mean nothing to a stage."""

    def __init__(self, log, label):
        self.log = log
        self.label = label

    def look(self, module, *values):
        flat = [v.detach() for v in tree_leaves(values) if isinstance(v, torch.Tensor)]
        self.log.append((*self.label, flat))


VALUES = {
    "none": (),
    "True": (True,),
    "False": (False,),
    "0": (0,),
    "None": (None,),
    "tensor": (torch.zeros(2),),
}
KINDS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
CHILDREN = ("norm", "node", "pool")
CHOICES = {"kind": KINDS, "child": CHILDREN, "active": VALUES, "needs_output": VALUES}
HOOKS = every_pair(CHOICES)


def heard(net, children, hooks):
    """What hooks see of a pass forth and back, in the order of their calls."""
    log = []
    handles = []
    for kind, child, active, needs_output in hooks:
        owner = Owner(log, (kind, child, active, needs_output))
        for name, value in (("active", active), ("needs_output", needs_output)):
            for given in VALUES[value]:
                setattr(owner, name, given)
        handles.append(getattr(children[child], kind)(owner.look))
    forward_and_backward(net)
    for handle in handles:
        handle.remove()
    return log


def assert_heard(actual, wanted):
    """The same calls in the same order, with the same values."""
    for (*_, found), (*_, expected) in zip(actual, wanted, strict=True):
        assert all(map(torch.equal, found, expected))
        assert len(found) == len(expected)


def test_every_hook_is_called_as_in_a_sequential_whoever_owns_it():
    fused = three(Stage)
    plain = three(nn.Sequential)
    wanted = {}
    for kind, child in product(KINDS, CHILDREN):
        wanted[kind, child] = heard(*plain, [(kind, child, "none", "none")])
    for hook in HOOKS:
        found = heard(*fused, [hook])
        assert [tuple(label) for *label, _ in found] == [hook]
        assert_heard(found, wanted[hook[:2]])
    for order in (HOOKS, HOOKS[::-1]):
        found = heard(*fused, order)
        expected = heard(*plain, order)
        assert len(found) == len(HOOKS)
        assert [label for *label, _ in found] == [label for *label, _ in expected]
        assert_heard(found, expected)


@needs_kernel
@pytest.mark.parametrize(
    "register",
    [
        modules.register_module_forward_hook,
        modules.register_module_forward_pre_hook,
        modules.register_module_full_backward_hook,
        modules.register_module_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_hooks_on_all_modules_see_the_children_of_a_stage(passes, register):
    called = []
    for build in (Stage, nn.Sequential):
        net, _ = three(build)
        seen = []
        handle = register(lambda module, *_, seen=seen: seen.append(type(module).__name__))
        try:
            forward_and_backward(net)
        finally:
            handle.remove()
        called.append([name for name in seen if name not in ("Stage", "Sequential")])
        forward_and_backward(net)
    assert called[0] == called[1]
    assert {"BatchNorm2d", "DLIFNode", "AvgPool2d"} <= set(called[0])
    assert (passes.fused, passes.pooled) == (1, 1)  # without the hook


def half(method):
    """A method of a class whose result is halved."""
    return lambda self, *args: 0.5 * method(self, *args)


def in_instance(name):
    def patch(module, monkeypatch):
        method = getattr(module, name)
        setattr(module, name, lambda *args: 0.5 * method(*args))

    return patch


def in_class(name, depth=0):
    def patch(module, monkeypatch):
        kind = type(module).__mro__[depth]
        monkeypatch.setattr(kind, name, half(getattr(kind, name)))

    return patch


def in_torch(owner, name):
    def patch(module, monkeypatch):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: 0.5 * function(*args, **options))

    return patch


def compiled_by_itself(module, monkeypatch):
    module._compiled_call_impl = lambda *args: 0.5 * module._call_impl(*args)


def check_of_the_input(module, monkeypatch):
    module._check_input_dim = lambda x: module.weight.data.mul_(0.5)


PATCHES = {
    "forward of the instance": (in_instance("forward"), ("norm", "node", "pool")),
    "forward of the class": (in_class("forward"), ("norm", "node", "pool")),
    "__call__ of the class": (in_class("__call__"), ("norm", "node", "pool")),
    "multi_step_forward of the instance": (in_instance("multi_step_forward"), ("node",)),
    "multi_step_forward of the class": (in_class("multi_step_forward"), ("node",)),
    "forward of torch's class": (in_class("forward", 1), ("norm", "pool")),
    "compile() of the child": (compiled_by_itself, ("norm", "node", "pool")),
    "_call_impl of the instance": (in_instance("_call_impl"), ("norm", "node", "pool")),
    "_call_impl of torch's class": (in_torch(nn.Module, "_call_impl"), ("norm", "node", "pool")),
    "_check_input_dim of the instance": (check_of_the_input, ("norm",)),
    "batch_norm of the class F": (in_torch(F, "batch_norm"), ("norm",)),
    "batch_norm of the class torch": (in_torch(torch, "batch_norm"), ("norm",)),
    "avg_pool2d of the class F": (in_torch(F, "avg_pool2d"), ("pool",)),
    "seq_to_ann_forward of the class functional": (
        in_torch(functional, "seq_to_ann_forward"),
        ("pool",),
    ),
}


PATCHED = []
for name, (_, children_of_it) in PATCHES.items():
    PATCHED += [(name, child) for child in children_of_it]


@needs_kernel
@pytest.mark.parametrize(("patch", "child"), PATCHED)
def test_whatever_is_patched_runs(passes, patch, child):
    unpatched = forward_and_backward(three(Stage)[0])
    passes.fused = 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        results = []
        for build in (Stage, nn.Sequential):
            net, children = three(build)
            if "class" not in patch or build is Stage:
                PATCHES[patch][0](children[child], monkeypatch)
            results.append(forward_and_backward(net))
        assert all(map(torch.equal, *results))
    assert not torch.equal(results[0][0], unpatched[0])
    assert passes.fused == 0


class Halving(TorchFunctionMode):
    """Halves what batch norm gives."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        return 0.5 * result if function is F.batch_norm else result


class Halved(torch.Tensor):
    """Halves what batch norm gives of it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 0.5 * result if function is F.batch_norm else result


def under_a_mode(net, x):
    with Halving():
        return net(x)


def on_a_default_device(net, x):
    with torch.device("cpu"):
        return net(x)


def of_a_class_on_a_default_device(net, x):
    return on_a_default_device(net, x.as_subclass(Halved))


@needs_kernel
@pytest.mark.parametrize(
    ("call", "fused"),
    [
        (under_a_mode, 0),
        (lambda net, x: net(x.as_subclass(Halved)), 0),
        (of_a_class_on_a_default_device, 0),
        (on_a_default_device, 1),
        (lambda net, x: net(nn.Parameter(x)), 1),
    ],
    ids=["mode", "class", "class on a device", "device", "parameter"],
)
def test_whoever_is_told_of_the_functions_of_torch_is_told_in_a_stage(passes, call, fused):
    stage_net = three(Stage)[0]
    plain = three(nn.Sequential)[0]
    x = sequence(2, 2, 3, 4, 4)
    results = [call(net, x).as_subclass(torch.Tensor) for net in (stage_net, plain)]
    assert torch.equal(*results)
    assert passes.fused == fused
    functional.reset_net(plain)
    assert torch.equal(plain(x), results[1]) == bool(fused)


@needs_kernel
@pytest.mark.parametrize("child", ["norm", "node", "pool"])
@pytest.mark.parametrize("wants", Wants)
def test_a_watcher_of_any_child_is_told_as_in_a_sequential(child, wants):
    told = []
    for build in (Stage, nn.Sequential):
        net, children = three(build)
        names = {module: name for name, module in net.named_modules()}
        watcher = Told(wants)
        with watch(net, watcher, [names[children[child]]]):
            net(sequence(2, 2, 3, 4, 4))
        told.append([type(call.node) for call in watcher.calls])
    assert told[0] == told[1]
    assert len(told[0]) == 1


def subclass(base):
    return type("Noisy", (base,), {"forward": half(base.forward)})


@needs_kernel
@pytest.mark.parametrize("child", ["norm", "node", "pool"])
def test_a_subclass_runs_its_own_forward(passes, child):
    results = []
    for build in (Stage, nn.Sequential):
        torch.manual_seed(0)
        kinds = {"norm": layer.BatchNorm2d, "node": DLIFNode, "pool": layer.AvgPool2d}
        kinds[child] = subclass(kinds[child])
        net, _ = finished(build, kinds["norm"](3), kinds["node"](T=2), kinds["pool"](2))
        results.append(forward_and_backward(net))
    assert all(map(torch.equal, *results))
    assert passes.fused == 0
    net = nn.Sequential(Noisy(T=1), layer.AvgPool2d(2))
    functional.set_step_mode(net, "m")
    fuse(net)
    found = net(torch.full((1, 1, 1, 2, 2), 2.0))
    expected = torch.full((1, 1, 1, 1, 1), 0.5)
    assert torch.equal(found, expected)


@needs_kernel
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("attribute", ["num_batches_tracked", "track_running_stats"])
def test_a_batch_norm_without_a_counter_counts_nothing(passes, attribute, momentum):
    results = []
    for build in (Stage, nn.Sequential):
        net, children = three(build)
        norm = children["norm"]
        norm.momentum = momentum
        setattr(norm, attribute, None if attribute == "num_batches_tracked" else False)
        results.append([*forward_and_backward(net), norm.running_mean, norm.running_var])
        counted = norm.num_batches_tracked
        assert counted is None if attribute == "num_batches_tracked" else counted == 0
    assert_close(*results)
    assert passes.fused == 1


@needs_kernel
def test_pooling_without_a_batch_norm(passes):
    torch.manual_seed(0)
    plain = nn.Sequential(
        layer.Conv2d(2, 6, 3),
        DLIFNode(T=T),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(54, 8),
    )
    functional.set_step_mode(plain, "m")
    fused = copy.deepcopy(plain)
    assert fuse(fused).stages == {"1": ("1", "2")}
    x = sequence(T, 3, 2, 9, 9)
    assert_same(step(fused, x), step(plain, x))
    assert (passes.fused, passes.pooled) == (0, 1)


@pytest.mark.parametrize(
    "pool",
    [
        layer.AvgPool2d(3),
        layer.AvgPool2d((2, 1)),
        layer.AvgPool2d(2, stride=1),
        layer.AvgPool2d(2, padding=1),
        layer.AvgPool2d(2, ceil_mode=True),
        layer.AvgPool2d(2, divisor_override=3),
        layer.MaxPool2d(2),
        nn.AvgPool2d(2),
    ],
    ids=str,
)
def test_other_windows_run_apart(pool):
    net = nn.Sequential(DLIFNode(T=T), pool)
    assert fuse(net).stages == {}
    assert type(net[0]) is DLIFNode


def test_a_plane_that_is_too_small_to_pool_gets_the_answer_of_torch():
    net = nn.Sequential(layer.BatchNorm2d(2), DLIFNode(T=T), layer.AvgPool2d(2))
    functional.set_step_mode(net, "m")
    fuse(net)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        net(sequence(T, 3, 2, 1, 5))


@needs_kernel
@pytest.mark.parametrize("channels_last", [False, True])
def test_autocast_runs_in_one_pass_with_halves_in_and_out(passes, channels_last):
    """The convolution's bfloat16 goes in as it is; the rest is the float32 network on those
    numbers.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3), layer.BatchNorm2d(6), DLIFNode(T=T), layer.AvgPool2d(2)
    )
    functional.set_step_mode(net, "m")
    x = sequence(T * 3, 2, 8, 8)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        net = net.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(net)
    fuse(net)
    with torch.autocast("cpu", torch.bfloat16):
        convolved = net[0](x.unflatten(0, (T, 3)))
        pooled = net(x.unflatten(0, (T, 3)))
    assert convolved.dtype == pooled.dtype == torch.bfloat16
    assert net[1].node.v.dtype == torch.float32
    assert (passes.fused, passes.pooled) == (1, 1)
    if channels_last:
        assert pooled.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    expected = plain[1:](convolved.float())
    assert torch.equal(pooled.float(), expected)
    assert_close(net[1].norm.running_mean, plain[1].running_mean)
    assert_close(net[1].norm.running_var, plain[1].running_var)
    pooled.float().square().sum().backward()
    for p in net.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


@needs_kernel
@pytest.mark.parametrize("keep", ["loss", "statistics"])
@pytest.mark.parametrize("train", [True, False])
def test_a_monitor_that_needs_the_current_alone_leaves_the_layer_in_one_pass(passes, keep, train):
    results = []
    x = sequence(T, 3, 2, 8, 8).double()
    x_perturbed = sequence(T, 3, 2, 8, 8).double().flip(-1)
    for net in both():
        net.double().train(train)
        watched = layers_of(net)[1]
        monitor = MPPDMonitor(net, layers=[watched], keep=keep)
        with torch.no_grad():  # a sequence without a pair, as at the start of a training
            net(x)
        passes.fused = passes.pooled = 0
        out = monitored(net, monitor, x, x_perturbed)
        loss = monitor.loss([watched])
        (loss + out.square().sum()).backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        results.append(
            [loss.detach(), out.detach(), *gradients, *(b.clone() for b in net.buffers())]
        )
    assert (passes.fused, passes.pooled) == ((4, 2) if keep == "loss" else (2, 0))
    assert_close(*results, rtol=1e-9, atol=1e-12)


def layers_of(net):
    """Names of the three spiking layers."""
    return [name for name, module in net.named_modules() if isinstance(module, DLIFNode)]


class Told:
    """A watcher that keeps what it is told."""

    def __init__(self, wants):
        self.wanted = wants
        self.calls = []

    def wants(self, name):
        return self.wanted

    def called(self, call):
        self.calls.append(call)


@needs_kernel
@pytest.mark.parametrize(("wants", "fused"), [("NOTHING", 2), ("INPUT", 2), ("SPIKES", 0)])
@pytest.mark.parametrize("train", [True, False])
def test_a_watcher_is_told_of_every_call_what_it_wants(passes, wants, fused, train):
    told = []
    x = sequence(T, 3, 2, 8, 8)
    for net in both():
        net.train(train)
        watcher = Told(Wants[wants])
        with watch(net, watcher):
            functional.reset_net(net)
            net(x[:1])
            net(x[1:])
        told.append(watcher.calls)
        for node in net.modules():
            assert not node._forward_hooks
    assert passes.fused == 2 * fused
    found = [call.name for call in told[1]]
    assert found == ["1.node", "3.1.node", "6"] * 2
    found = [call.time_step for call in told[1]]
    assert found == [0, 0, 0, 1, 1, 1]
    for plain_call, call in zip(*told, strict=True):
        assert isinstance(call.node, DLIFNode)
        assert_close(call.v_before, plain_call.v_before)
        if call.input is not None or wants != "NOTHING":
            assert_close(call.input, plain_call.input)
        if call.spikes is not None or wants == "SPIKES":
            assert torch.equal(call.spikes, plain_call.spikes)


def test_a_copy_made_while_watched_tells_nobody():
    _, net = both()
    watcher = Told(Wants.SPIKES)
    with watch(net, watcher):
        twin = copy.deepcopy(net)
        file = io.BytesIO()
        torch.save(net, file)
    file.seek(0)
    x = sequence(T, 3, 2, 8, 8)
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(other(x), net(x))
        functional.reset_net(net)
    assert watcher.calls == []


@needs_kernel
def test_survives_saving_copying_and_slicing(passes):
    net = network().eval()
    fuse(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    x = torch.randn(T, 3, 2, 8, 8)
    copied = copy.deepcopy(net)
    expected = net(x)
    for other in (torch.load(file, weights_only=False), copied):
        assert torch.equal(other(x), expected)
    functional.reset_net(net)
    assert torch.equal(net[:2](x), network().eval()[:3](x))  # a slice holds a whole stage
    assert passes.fused == 7


def twice(net, *, reset):
    """Two backward passes in a row."""
    for _ in range(2):
        if reset:
            functional.reset_net(net)
        net(sequence(2, 3, 2, 8, 8)).sum().backward()


def second_derivative(net):
    x = sequence(T, 3, 2, 8, 8).requires_grad_()
    torch.autograd.grad(net(x).sum(), x, create_graph=True)


MISTAKES = {
    "longer than T": (
        lambda net: net(sequence(T + 1, 3, 2, 8, 8)),
        f"T={T} time steps, but its input .* has 5",
    ),
    "goes on beyond T": (
        lambda net: [net(sequence(3, 3, 2, 8, 8)) for _ in range(2)],
        r"step 6 .*3 taken .*reset_net",
    ),
    "another batch size": (
        lambda net: [net(sequence(1, n, 2, 8, 8)) for n in (3, 5)],
        r"state has shape .*reset_net",
    ),
    "no reset": (
        lambda net: twice(net, reset=False),
        r"reset_net\(net\) before every new sequence",
    ),
    "second derivative": (second_derivative, "differentiable once.*backend='reference'"),
    "channels": (
        lambda net: net[1:](sequence(T, 3, 5, 8, 8)),
        "running_mean should contain 5 elements",
    ),
    "no time": (
        lambda net: net[1:](sequence(3, 6, 8, 8)),
        r"expected x with shape \[T, N, C, H, W\]",
    ),
    "one value": (
        lambda net: net[1:3](sequence(1, 1, 6, 1, 1)),
        "Expected more than 1 value per channel",
    ),
    "half of the statistics": (
        lambda net: [
            setattr(first_parts(net)[0], "running_var", None),
            net(sequence(T, 3, 2, 8, 8)),
        ],
        "running_mean and running_var must either both be None or neither",
    ),
    "half of the statistics in evaluation": (
        lambda net: [
            setattr(first_parts(net.eval())[0], "running_mean", None),
            net(sequence(T, 3, 2, 8, 8)),
        ],
        "running_mean must be defined in evaluation mode",
    ),
    "integers": (
        lambda net: net[1:3](torch.ones(T, 3, 6, 8, 8, dtype=torch.int64)),
        "not implemented for 'Long'",
    ),
    "step mode": (
        lambda net: [
            setattr(first_parts(net)[1], "step_mode", "x"),
            net(sequence(T, 3, 2, 8, 8)),
        ],
        "x",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_the_answer_of_the_plain_network(mistake):
    make, message = MISTAKES[mistake]
    answers = []
    for apply in (lambda net: None, fuse):
        net = network()
        apply(net)
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        with pytest.raises(
            (RuntimeError, ValueError, NotImplementedError), match=message
        ) as caught:
            make(net)
        answers.append((caught.type, str(caught.value)))
        if mistake == "longer than T" and apply is fuse and cpp.unavailable_reason() is None:
            for name, buffer in net.named_buffers():
                assert torch.equal(buffer, before[name])
    assert answers[0] == answers[1]


@needs_kernel
def test_whether_one_pass_can_run_is_asked_once_per_call(passes, monkeypatch):
    asked = []
    reason = one_pass.unsupported_reason

    def counted(*arguments):
        asked.append(arguments)
        return reason(*arguments)

    monkeypatch.setattr(one_pass, "unsupported_reason", counted)
    _, net = both()
    step(net, sequence(T, 3, 2, 8, 8))
    assert len(asked) == passes.fused == 2


@needs_kernel
@pytest.mark.parametrize("shape", [(5,), (7,)])
def test_a_parameter_of_another_shape_is_refused(shape):
    _, net = both()
    norm, _ = first_parts(net.eval())
    norm.weight = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=r"weight must be \[C\] = \[6\]"):
        net(sequence(T, 3, 2, 8, 8))


@needs_kernel
@pytest.mark.parametrize("train", [True, False])
def test_not_a_number_goes_where_it_goes_in_the_plain_network(passes, train):
    plain, fused = both()
    x = sequence(T, 3, 2, 8, 8)
    x[1, 2, 0, 3, 3] = float("nan")
    actual = step(fused, x, train)
    wanted = step(plain, x, train)
    for name, tensor in wanted.items():
        # the bias in front of a batch norm has no gradient but rounding
        assert_close(actual[name], tensor, rtol=1e-4, atol=5e-4, equal_nan=True)
    assert passes.fused == 2
    twice(fused, reset=True)  # and with a reset nothing is wrong


def fill_statistics(net):
    """Running statistics that show whether they are used."""
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.linspace(0.2, 0.7, len(buffer)))


@needs_kernel
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["assg", "rectangle:1", "bptr"])
def test_under_an_estimator_results_and_gradients_are_those_of_the_plain_network(
    passes, monkeypatch, train, name
):
    plain, fused = both()
    ran = []
    for function in ("normalise", "pool"):
        run = getattr(stage.apart, function)
        monkeypatch.setattr(
            stage.apart, function, lambda *given, run=run: ran.append(run.__name__) or run(*given)
        )
    results = []
    for net in (plain, fused):
        fill_statistics(net)
        with estimator(name)(net):
            results.append(step(net, sequence(T, 3, 2, 8, 8), train))
    assert_same(results[1], results[0])
    assert ran == ["normalise", "normalise", "pool"]
    assert (passes.fused, passes.pooled) == (2, 0)


@needs_kernel
def test_a_plain_and_a_fused_pass_share_one_graph(passes):
    """As where a hook looks at one pass of a training step and not at the other."""
    net = network()
    fuse(net)
    hook = net[1].node.register_forward_hook(lambda *_: None)
    x = torch.randn(T, 3, 2, 8, 8)
    total = net(x).sum()
    hook.remove()
    functional.reset_net(net)
    (total + net(x).sum()).backward()
    assert passes.fused == 3


@needs_kernel
@pytest.mark.parametrize(
    ("layers", "fused_passes"),
    [("all", 0), ("last", 4), ("first", 2), ("third", 4)],
)
def test_a_monitor_keeps_apart_only_the_pairs_it_looks_at(passes, layers, fused_passes):
    plain, fused = (net.eval() for net in both())
    x = torch.randn(T, 3, 2, 8, 8)
    x_perturbed = torch.randn(T, 3, 2, 8, 8)
    losses = []
    for net in (plain, fused):
        names = layers_of(net)
        chosen = {"first": names[:1], "third": names[2:]}.get(layers, layers)
        with MPPDMonitor(net, layers=chosen) as monitor:
            for _ in range(2):  # the first run finds out which layer is the last
                passes.fused = 0
                monitored(net, monitor, x, x_perturbed)
                order = monitor.execution_order
            functional.reset_net(net)
            losses.append(monitor.loss(names[2:] if layers == "all" else chosen))
            assert order == tuple(names)
            assert passes.fused == (fused_passes if net is fused else 0)
            net(x)  # outside its contexts the monitor looks at nothing
            assert passes.fused == (fused_passes + 2 if net is fused else 0)
    assert_close(*losses)


@needs_kernel
def test_a_monitor_of_the_last_layer_says_when_another_one_became_the_last():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(layer.BatchNorm2d(2), DLIFNode(T=T))
            self.b = nn.Sequential(layer.BatchNorm2d(2), DLIFNode(T=T))
            self.swapped = False

        def forward(self, x):
            if self.swapped:
                return self.a(self.b(x))
            return self.b(self.a(x))

    net = Routed()
    functional.set_step_mode(net, "m")
    fuse(net)
    monitor = MPPDMonitor(net, layers="last")
    x = torch.randn(T, 3, 2, 4, 4)
    with monitor.clean():
        net(x)
    assert monitor.execution_order == ("a.0.node", "b.0.node")
    net.swapped = True
    functional.reset_net(net)
    with (
        pytest.raises(RuntimeError, match=r"last was 'b\.0\.node' and is 'a\.0\.node' now: name"),
        monitor.clean(),
    ):
        net(x)
    functional.reset_net(net)
    with monitor.clean():  # found out anew
        net(x)
    assert monitor.execution_order == ("b.0.node", "a.0.node")
