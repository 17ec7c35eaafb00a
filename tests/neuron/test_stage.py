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
    forward_and_backward,
    network,
    sequence,
    step,
    three,
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


def too_many_steps(net):
    net(images(steps=T + 1))


def more_steps_than_are_left(net):
    net(images(steps=3))
    net(images(steps=3))


def another_batch_size(net):
    net(images(steps=1, samples=3))
    net(images(steps=1, samples=5))


def no_reset(net):
    twice(net, reset=False)


def second_derivative(net):
    x = images().requires_grad_()
    torch.autograd.grad(net(x).sum(), x, create_graph=True)


def another_number_of_channels(net):
    net[1:](sequence(T, 3, 5, 8, 8))


def no_time(net):
    net[1:](sequence(3, 6, 8, 8))


def one_value_a_channel(net):
    net[1:3](sequence(1, 1, 6, 1, 1))


def mean_without_variance(net):
    first_parts(net)[0].running_var = None
    net(images())


def variance_without_mean_in_evaluation(net):
    net.eval()
    first_parts(net)[0].running_mean = None
    net(images())


def integers(net):
    net[1:3](torch.ones(T, 3, 6, 8, 8, dtype=torch.int64))


def no_step_mode(net):
    first_parts(net)[1].step_mode = "x"
    net(images())


def batch_of_gradients(net):
    spikes = net(images())
    weight = next(net.parameters())
    batch = torch.ones(2, *spikes.shape)
    torch.autograd.grad(spikes, weight, batch, is_grads_batched=True)


MISTAKES = {
    batch_of_gradients: "no batch of gradients .*backend='reference'",
    too_many_steps: f"T={T} time steps, but its input .* has 5",
    more_steps_than_are_left: r"step 6 .*3 taken .*reset_net",
    another_batch_size: r"state has shape .*reset_net",
    no_reset: r"reset_net\(net\) before every new sequence",
    second_derivative: "differentiable once.*backend='reference'",
    another_number_of_channels: "running_mean should contain 5 elements",
    no_time: r"expected x with shape \[T, N, C, H, W\]",
    one_value_a_channel: "Expected more than 1 value per channel",
    mean_without_variance: "running_mean and running_var must either both be None or neither",
    variance_without_mean_in_evaluation: "running_mean must be defined in evaluation mode",
    integers: "not implemented for 'Long'",
    no_step_mode: "x",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_gets_the_answer_of_the_plain_network(mistake):
    plain = network()
    fused = copy.deepcopy(plain)
    fuse(fused)
    before = {name: buffer.clone() for name, buffer in fused.named_buffers()}
    assert answer(mistake, fused) == answer(mistake, plain)
    if mistake is too_many_steps and cpp.unavailable_reason() is None:
        for name, buffer in fused.named_buffers():
            assert torch.equal(buffer, before[name])


def answer(mistake, net):
    """Type and text of the error."""
    errors = (RuntimeError, ValueError, NotImplementedError)
    with pytest.raises(errors, match=MISTAKES[mistake]) as caught:
        mistake(net)
    return caught.type, str(caught.value)


@needs_kernel
def test_whether_one_pass_can_run_is_asked_once_per_call(passes, monkeypatch):
    asked = []
    reason = dispatch.unsupported_reason

    def counted(*arguments):
        asked.append(arguments)
        return reason(*arguments)

    monkeypatch.setattr(dispatch, "unsupported_reason", counted)
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
