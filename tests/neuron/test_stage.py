"""Stage and fuse: the same network, the same results, fewer passes."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from neuron.staged import (
    Noisy,
    T,
    assert_same,
    both,
    first_parts,
    network,
    sequence,
    step,
)
from ops.calls import needs_kernel
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust.estimators import estimator
from sj_robust.models import NetworkSpec, build_network
from sj_robust.neuron import DLIFNode, Stage, fuse, unfuse
from sj_robust.neuron.fusion import plain_names
from sj_robust.ops.bn_dlif import dispatch
from sj_robust.ops.dlif import cpp


def changed(position, **attributes):
    """Attributes of one of the network's modules that are set before it is fused."""

    def change(net):
        for name, value in attributes.items():
            setattr(net[position], name, value)

    return change


def in_double(net):
    net.double()[2].store_v_seq = True


def without_norms(net):
    net[1] = net[3][1] = nn.Identity()


WITHOUT_STATISTICS = {"track_running_stats": False, "running_mean": None, "running_var": None}
UNCOUNTED = {"num_batches_tracked": None}

NETWORKS = {
    "as it is": (changed(1), 2, 1),
    "plain average": (changed(1, momentum=None), 2, 1),
    "other constants": (changed(1, momentum=0.5, eps=0.1), 2, 1),
    "not affine": (changed(1, weight=None, bias=None), 2, 1),
    "without statistics": (changed(1, **WITHOUT_STATISTICS), 2, 1),
    "statistics that stay": (changed(1, track_running_stats=False), 2, 1),
    "without a counter": (changed(1, **UNCOUNTED), 2, 1),
    "plain average without a counter": (changed(1, **UNCOUNTED, momentum=None), 2, 1),
    "float64 with potentials": (in_double, 2, 1),
    "pooling without batch norm": (without_norms, 0, 1),
    "another backend": (changed(2, backend="eager"), 1, 1),
    "a surrogate without a kernel": (changed(2, surrogate_function=surrogate.LeakyKReLU()), 1, 1),
    "a smooth surrogate": (changed(2, surrogate_function=surrogate.ATan(spiking=False)), 1, 1),
}
"""What is changed before a network is fused; batch norms and poolings of each of its passes that
run with their neuron.
"""


@pytest.mark.parametrize("name", NETWORKS)
def test_results_and_state_are_unchanged(passes, name):
    change, norms, pools = NETWORKS[name]
    plain = network()
    change(plain)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert list(plain_names(fused).values()) == list(plain.state_dict())
    for batch in range(3):
        x = torch.randn(T, 3, 2, 8, 8, generator=torch.Generator().manual_seed(batch))
        for train in (True, False):
            assert_same(step(fused, x, train), step(plain, x, train))
        with torch.no_grad():  # as an optimiser does between two batches
            for parameter in (*plain.parameters(), *fused.parameters()):
                parameter.mul_(1.1)
    runs = 6 if cpp.unavailable_reason() is None else 0
    assert (passes.fused, passes.pooled) == (runs * norms, runs * pools)


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


def test_a_bare_stage_cannot_be_taken_apart_in_place():
    with pytest.raises(ValueError, match=r"wrap it in nn\.Sequential"):
        unfuse(Stage(DLIFNode(T=T)))


class WithShortcut(nn.Module):
    """A network that adds its input between the members of a sequence."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Sequential(layer.BatchNorm2d(3), DLIFNode(T=T))
        self.body = nn.Sequential(layer.BatchNorm2d(3), DLIFNode(T=T))
        functional.set_step_mode(self, "m")

    def forward(self, x):
        x = self.whole(x)
        return self.body[1](self.body[:1](x) + x)


def test_a_sequence_that_is_not_run_as_a_whole_stays_as_it_is():
    net = WithShortcut().eval()
    x = 2 * torch.rand(T, 2, 3, 4, 4)
    before = net(x)

    def run():
        functional.reset_net(net)
        net(x)

    report = fuse(net.train(), run=run)
    assert not net.whole[0].norm.running_mean.any()
    net.eval()
    assert report.stages == {"whole.0": ("whole.0", "whole.1")}
    assert report.skipped == {
        "body.0": "is in an nn.Sequential that the network does not run as a whole"
    }
    functional.reset_net(net)
    assert_close(net(x), before)
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_sequences_that_share_a_member_run_as_a_whole():
    shared = layer.AvgPool2d(2, step_mode="m")
    pooled = nn.Sequential()
    for _ in range(2):
        part = nn.Sequential(DLIFNode(T=T), shared)
        pooled.append(part)
    x = torch.rand(T, 2, 3, 4, 4)
    assert list(fuse(pooled, run=lambda: pooled(x)).stages) == ["0.0", "1.0"]
    assert pooled[0][0].node.time_step == 0


def test_where_nothing_could_be_joined_the_run_is_no_reason():
    net = nn.Sequential(layer.BatchNorm2d(3, step_mode="m"), nn.ReLU())
    reasons = fuse(net, run=lambda: net[0](torch.rand(T, 2, 3, 4, 4))).skipped
    assert reasons == {"0": "is followed by ReLU, not by a DLIFNode"}


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


def images(steps=T, samples=3):
    """What :func:`network` takes."""
    return sequence(steps, samples, 2, 8, 8)


def spoiled(net, part, name, value):
    """The network with another attribute of its first batch norm (0) or neuron (1)."""
    setattr(first_parts(net)[part], name, value)
    return net


def twice_differentiated(net):
    x = images().requires_grad_()
    torch.autograd.grad(net(x).sum(), x, create_graph=True)


def batch_of_gradients(net):
    spikes = net(images())
    batch = torch.ones(2, *spikes.shape)
    torch.autograd.grad(spikes, next(net.parameters()), batch, is_grads_batched=True)


MISTAKES = {
    "too many steps": lambda net: net(images(steps=T + 1)),
    "more steps than are left": lambda net: [net(images(steps=3)) for _ in range(2)],
    "another batch size": lambda net: [net(images(1, samples)) for samples in (3, 5)],
    "no reset": lambda net: twice(net, reset=False),
    "second derivative": twice_differentiated,
    "batch of gradients": batch_of_gradients,
    "another number of channels": lambda net: net[1:](sequence(T, 3, 5, 8, 8)),
    "no time": lambda net: net[1:](sequence(3, 6, 8, 8)),
    "one value a channel": lambda net: net[1:3](sequence(1, 1, 6, 1, 1)),
    "no place to pool": lambda net: net[3:](sequence(T, 3, 6, 2, 5)),
    "integers": lambda net: net[1:3](torch.ones(T, 3, 6, 8, 8, dtype=torch.int64)),
    "mean without variance": lambda net: spoiled(net, 0, "running_var", None)(images()),
    "variance alone": lambda net: spoiled(net.eval(), 0, "running_mean", None)(images()),
    "no step mode": lambda net: spoiled(net, 1, "step_mode", "x")(images()),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_the_answer_of_the_plain_network(mistake):
    answers = []
    for net in both():
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as caught:
            MISTAKES[mistake](net)
        answers.append((caught.type, str(caught.value)))
    assert answers[0] == answers[1]


@needs_kernel
def test_a_call_that_is_refused_moves_no_statistics():
    _, net = both()
    with pytest.raises(RuntimeError, match=f"T={T}"):
        net(images(steps=T + 1))
    assert not first_parts(net)[0].running_mean.any()


@needs_kernel
@pytest.mark.parametrize("count", [5, 7])
def test_a_parameter_of_another_shape_is_refused(count):
    _, net = both()
    spoiled(net, 0, "weight", nn.Parameter(torch.ones(count)))
    with pytest.raises(RuntimeError, match="weight"):  # torch's own
        net.eval()(images())


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
        run = getattr(dispatch, function)
        monkeypatch.setattr(
            dispatch, function, lambda *given, run=run: ran.append(run.__name__) or run(*given)
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
