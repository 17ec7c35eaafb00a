"""Whoever looks at a stage sees what runs in it: hooks, patches, watchers and monitors get the same
as in a plain network.
"""

import copy
import io
from itertools import product

import pytest
import torch
from neuron.staged import (
    T,
    both,
    forward_and_backward,
    layers_of,
    sequence,
    three,
)
from ops.calls import needs_kernel
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from sj_robust.neuron import DLIFNode, Stage, fuse
from sj_robust.neuron.watching import Wants, watch
from sj_robust.perturbation import MPPDMonitor

KINDS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)

CHILDREN = ("norm", "node", "pool")


HOOKS = list(product(KINDS, CHILDREN))


def heard(build, hooks):
    """What hooks get in a pass forth and back, in the order of their calls."""
    net, children = three(build)
    log = []
    for hook in hooks:
        kind, child = hook

        def look(module, *values, hook=hook):
            tensors = [v.detach() for v in tree_leaves(values) if isinstance(v, torch.Tensor)]
            log.append((hook, tensors))

        getattr(children[child], kind)(look)
    forward_and_backward(net)
    return log


@pytest.mark.parametrize("hooks", [*([hook] for hook in HOOKS), HOOKS, HOOKS[::-1]], ids=str)
def test_every_hook_is_called_as_in_a_sequential(hooks):
    found, wanted = (heard(build, hooks) for build in (Stage, nn.Sequential))
    assert len(found) == len(hooks)
    for call, expected in zip(found, wanted, strict=True):
        assert call[0] == expected[0]
        assert_close(call[1], expected[1], rtol=0, atol=0)


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


def in_instance(name):
    def patch(module):
        method = getattr(module, name)
        setattr(module, name, lambda *args: 0.5 * method(*args))

    return patch


def compiled_by_itself(module):
    module._compiled_call_impl = lambda *args: 0.5 * module._call_impl(*args)


def check_of_the_input(module):
    module._check_input_dim = lambda x: module.weight.data.mul_(0.5)


def subclass(module):
    base = type(module)
    forward = {"forward": lambda self, x: 0.5 * base.forward(self, x)}
    module.__class__ = type("Noisy", (base,), forward)


PATCHES = {
    "subclass": (subclass, CHILDREN),
    "forward": (in_instance("forward"), CHILDREN),
    "multi_step_forward": (in_instance("multi_step_forward"), ("node",)),
    "compile()": (compiled_by_itself, CHILDREN),
    "_call_impl": (in_instance("_call_impl"), CHILDREN),
    "_check_input_dim": (check_of_the_input, ("norm",)),
}
"""Ways to replace what a child of a stage does, and the children that have it."""

PATCHED = []
for name, (patch, children) in PATCHES.items():
    PATCHED += [pytest.param(patch, child, id=f"{name} of {child}") for child in children]


@needs_kernel
@pytest.mark.parametrize(("patch", "child"), PATCHED)
def test_whatever_is_patched_runs(passes, patch, child):
    unpatched = forward_and_backward(three(Stage)[0])
    passes.fused = 0
    results = []
    for build in (Stage, nn.Sequential):
        net, children = three(build)
        patch(children[child])
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


def monitored(net, monitor, x, x_perturbed):
    """Outputs of the second of two passes that a monitor compares, each from a reset."""
    for context, images in ((monitor.clean(), x), (monitor.perturbed(), x_perturbed)):
        functional.reset_net(net)
        with context:
            out = net(images)
    return out


@needs_kernel
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("layers", "keep", "fused", "pooled"),
    [
        ("all", "loss", 4, 2),
        ("all", "statistics", 0, 0),
        ("last", "statistics", 4, 2),
        ([0], "statistics", 2, 2),
        ([1], "statistics", 2, 0),
        ([1], "loss", 4, 2),
        ([2], "statistics", 4, 2),
    ],
)
def test_a_monitor_keeps_apart_only_what_it_has_to_see_apart(
    passes, layers, keep, fused, pooled, train
):
    results = []
    x = sequence(T, 3, 2, 8, 8).double()
    for net in both():
        net.double().train(train)
        names = layers_of(net)
        chosen = layers if isinstance(layers, str) else [names[index] for index in layers]
        with MPPDMonitor(net, layers=chosen, keep=keep) as monitor:
            for _ in range(2):  # the first run finds out which layer is the last
                passes.fused = passes.pooled = 0
                out = monitored(net, monitor, x, x.flip(-1))
            assert monitor.execution_order == tuple(names)
            counted = passes.fused, passes.pooled
            loss = monitor.loss(names if layers == "all" else chosen)
            (loss + out.square().sum()).backward()
            functional.reset_net(net)
            net(x)  # outside its contexts the monitor looks at nothing
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        results.append([loss.detach(), out.detach(), *gradients, *net.buffers()])
    assert counted == (fused, pooled)
    assert passes.fused == fused + 2
    assert_close(*results, rtol=1e-9, atol=1e-12)


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
