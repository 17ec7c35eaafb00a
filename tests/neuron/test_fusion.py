"""fuse: the same network, the same results, fewer passes."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from ops.calls import needs_kernel
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from sj_robust.estimators import estimator
from sj_robust.neuron import DLIFNode, FusedSequential, fuse, fusion, unfuse
from sj_robust.ops import dlif_multi_step
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


def both(**norm):
    """The same network plain and fused."""
    plain = network(**norm)
    fused = copy.deepcopy(plain)
    assert fuse(fused).fused == {"1": "2", "3.1": "3.2"}
    assert fuse(fused).pooled == {"3.2": "3.3"}
    return plain, fused


@pytest.fixture
def passes(monkeypatch):
    """Counts the batch norms and the poolings that ran in one pass with their neuron."""
    count = SimpleNamespace(fused=0, pooled=0)
    operator = fusion.batch_norm_dlif_multi_step

    def counting(x_seq, norm, *args, **kwargs):
        count.fused += norm is not None
        count.pooled += kwargs["average_pool"]
        return operator(x_seq, norm, *args, **kwargs)

    monkeypatch.setattr(fusion, "batch_norm_dlif_multi_step", counting)
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
    return {
        "out": out.detach(),
        "x": x.grad,
        **{name: p.grad for name, p in net.named_parameters()},
        **{f"state {name}": b.clone() for name, b in net.named_buffers()},
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
        torch.testing.assert_close(
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
    assert list(fused.state_dict()) == list(plain.state_dict())
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
    for net in (plain, fused):
        net[2].store_v_seq = True
    x = torch.randn(T, 3, 2, 8, 8, dtype=torch.float64)
    assert_same(step(fused, x), step(plain, x))
    torch.testing.assert_close(fused[2].v_seq, plain[2].v_seq, rtol=0, atol=1e-12)
    torch.testing.assert_close(fused[2].v, plain[2].v, rtol=0, atol=1e-12)
    assert fused[2].time_step == plain[2].time_step == T
    assert passes.fused == 2


@needs_kernel
def test_chunks_and_single_steps_go_on_where_the_last_stopped(passes):
    plain, fused = (net.eval() for net in both())
    x = torch.randn(T, 3, 2, 8, 8)
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(torch.cat([fused(x[:1]), fused(x[1:3]), fused(x[3:])]), expected)
        assert passes.fused == 6
        functional.reset_net(fused)
        functional.set_step_mode(fused, "s")
        assert torch.equal(torch.stack([fused(x_t) for x_t in x]), expected)
    assert passes.fused == 6


def test_taken_out_again():
    net = network()
    keys = list(net.state_dict())
    modules = dict(net.named_modules())
    fuse(net)
    assert fuse(net).pooled == {"3.2": "3.3"}
    assert type(net) is type(net[3]) is FusedSequential
    assert dict(net.named_modules()) == modules
    unfuse(net)
    assert type(net) is type(net[3]) is nn.Sequential
    assert list(net.state_dict()) == keys


def test_says_what_it_leaves_alone():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.sn = layer.BatchNorm2d(4), DLIFNode(T=T)

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
    )
    report = fuse(net)
    assert report.fused == {}
    assert type(net) is nn.Sequential
    for name, reason in {
        "0": "followed by ReLU",
        "2": "not a BatchNorm of SpikingJelly",
        "4": "SyncBatchNorm is not",
        "6": "followed by LIFNode",
        "8.bn": "stands in a Residual",
        "9": "followed by nothing",
    }.items():
        assert reason in report.skipped[name]
    assert len(report.skipped) == 6


@pytest.mark.parametrize(
    "prevent",
    [
        lambda net: net[1].register_forward_hook(lambda *_: None),
        lambda net: net[2].register_forward_pre_hook(lambda *_: None),
        lambda net: net[2].register_full_backward_hook(lambda *_: None),
        lambda net: setattr(net[2], "backend", "eager"),
        lambda net: setattr(net[2], "surrogate_function", surrogate.LeakyKReLU()),
        lambda net: setattr(net[2], "surrogate_function", surrogate.ATan(spiking=False)),
    ],
    ids=[
        "hook on batch norm",
        "hook on neuron",
        "backward hook",
        "backend",
        "surrogate",
        "smooth surrogate",
    ],
)
def test_runs_one_after_the_other_where_it_has_to(passes, prevent):
    plain, fused = both()
    prevent(plain)
    prevent(fused)
    x = sequence(T, 3, 2, 8, 8)
    assert_same(step(fused, x), step(plain, x))
    assert passes.fused == (cpp.unavailable_reason() is None)  # the other pair


@needs_kernel
@pytest.mark.parametrize(
    ("watch", "fused", "pooled"),
    [
        (lambda stage, look: stage[3].register_forward_hook(look), 2, 0),
        (lambda stage, look: stage[2].register_forward_hook(look), 1, 0),
        (
            lambda stage, look: stage[2].register_full_backward_hook(
                lambda *gradients: look(*gradients)
            ),
            1,
            0,
        ),
        (
            lambda stage, look: stage[2].register_forward_pre_hook(lambda *inputs: look(*inputs)),
            1,
            1,
        ),
        (lambda stage, look: stage[1].register_forward_hook(look), 1, 1),
    ],
    ids=["pooling", "neuron", "neuron, backward", "neuron, input alone", "batch norm"],
)
def test_whoever_watches_a_stage_with_pooling_sees_what_it_saw(passes, watch, fused, pooled):
    seen = []
    for net in both():
        watch(
            net[3],
            lambda *values: seen.append(
                [v.detach() for group in values[1:] for v in _tensors(group)]
            ),
        )
        step(net, sequence(T, 3, 2, 8, 8))
    assert (passes.fused, passes.pooled) == (fused, pooled)
    torch.testing.assert_close(*seen)


def _tensors(group):
    return [group] if isinstance(group, torch.Tensor) else [v for v in group if v is not None]


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
    assert fuse(fused).pooled == {"1": "2"}
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
    assert fuse(net).pooled == {}
    assert type(net) is nn.Sequential


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
        x, net = (
            x.contiguous(memory_format=torch.channels_last),
            net.to(memory_format=torch.channels_last),
        )
    plain = copy.deepcopy(net)
    fuse(net)
    with torch.autocast("cpu", torch.bfloat16):
        convolved = net[0](x.unflatten(0, (T, 3)))
        pooled = net(x.unflatten(0, (T, 3)))
    assert convolved.dtype == pooled.dtype == torch.bfloat16
    assert net[2].v.dtype == torch.float32
    assert (passes.fused, passes.pooled) == (1, 1)
    if channels_last:
        assert pooled.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pooled.float(), plain[1:](convolved.float()))
    torch.testing.assert_close(net[1].running_mean, plain[1].running_mean)
    torch.testing.assert_close(net[1].running_var, plain[1].running_var)
    pooled.float().square().sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in net.parameters()
    )


@needs_kernel
@pytest.mark.parametrize("keep", ["loss", "statistics"])
@pytest.mark.parametrize("train", [True, False])
def test_a_monitor_that_needs_the_current_alone_leaves_the_layer_in_one_pass(passes, keep, train):
    results = []
    x, x_perturbed = sequence(T, 3, 2, 8, 8).double(), sequence(T, 3, 2, 8, 8).double().flip(-1)
    for net in both():
        net.double().train(train)
        monitor = MPPDMonitor(net, layers=["3.2"], keep=keep)
        with torch.no_grad():  # a sequence without a pair, as at the start of a training
            net(x)
        passes.fused = passes.pooled = 0
        out = monitored(net, monitor, x, x_perturbed)
        loss = monitor.loss(["3.2"])
        (loss + out.square().sum()).backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        results.append(
            [loss.detach(), out.detach(), *gradients, *(b.clone() for b in net.buffers())]
        )
    assert (passes.fused, passes.pooled) == ((4, 2) if keep == "loss" else (2, 0))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


class Watcher:
    """A hook that looks at what the neuron gets while it is active."""

    def __init__(self, active):
        self.active, self.seen = active, []

    def look(self, module, inputs):
        self.seen.append(inputs[0].detach())


@needs_kernel
def test_a_hook_sees_what_it_would_see_in_the_plain_network_while_it_is_active(passes):
    plain, fused = both()
    watchers = []
    for net, active in ((plain, True), (fused, True), (fused, False)):
        watchers.append(Watcher(active))
        handle = net[2].register_forward_pre_hook(watchers[-1].look)
        functional.reset_net(net)
        net(torch.ones(T, 3, 2, 8, 8))
        handle.remove()
    assert torch.equal(watchers[0].seen[0], watchers[1].seen[0])
    assert watchers[2].seen == []
    assert passes.fused == 1 + 2


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
    head = net[:2]
    assert torch.equal(
        head(x), network().eval()[:2](x)
    )  # without the neuron, batch norm is just batch norm
    assert passes.fused == 6


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
    "integers": (
        lambda net: net[1:3](torch.ones(T, 3, 6, 8, 8, dtype=torch.int64)),
        "not implemented for 'Long'",
    ),
    "step mode": (
        lambda net: [setattr(net[2], "step_mode", "x"), net(sequence(T, 3, 2, 8, 8))],
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
            assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert answers[0] == answers[1]


@needs_kernel
@pytest.mark.parametrize("train", [True, False])
def test_not_a_number_goes_where_it_goes_in_the_plain_network(passes, train):
    plain, fused = both()
    x = sequence(T, 3, 2, 8, 8)
    x[1, 2, 0, 3, 3] = float("nan")
    actual, wanted = step(fused, x, train), step(plain, x, train)
    for name, tensor in wanted.items():
        # the bias in front of a batch norm has no gradient but rounding
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=5e-4, equal_nan=True)
    assert passes.fused == 2
    twice(fused, reset=True)  # and with a reset nothing is wrong


@needs_kernel
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("keeps_its_own", [True, False])
def test_what_stands_in_for_the_neurons_forward_gets_its_currents(passes, train, keeps_its_own):
    """As a gradient estimator does, which calls the forward that it stands in for; another function
    may not.
    """
    plain, fused = both()
    seen = []
    for net in (plain, fused):

        def stand_in(x_seq, own=net[2].multi_step_forward):
            seen.append(x_seq.detach())
            return own(x_seq) if keeps_its_own else (x_seq > 0).float()

        net[2].multi_step_forward = stand_in
    x = sequence(T, 3, 2, 8, 8)
    with torch.no_grad():
        for net in (plain, fused):
            fill_statistics(net)
        outputs = [net.train(train)(x) for net in (plain, fused)]
    torch.testing.assert_close(seen[0], seen[1])
    assert torch.equal(*outputs)
    torch.testing.assert_close(list(fused.buffers()), list(plain.buffers()))
    assert passes.fused == 1 + keeps_its_own
    assert fused[2]._operator is dlif_multi_step


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
        run = getattr(fusion.apart, function)
        monkeypatch.setattr(
            fusion.apart, function, lambda *given, run=run: ran.append(run.__name__) or run(*given)
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
def test_functorch_goes_through_what_stands_in_for_a_neuron():
    _, net = both()
    fill_statistics(net.eval())
    for node in (net[2], net[3][2]):
        node.multi_step_forward = torch.sigmoid
    x = sequence(T, 3, 2, 8, 8)
    wanted = net(x)
    mapped = torch.vmap(lambda one: net(one.unsqueeze(1)).squeeze(1), in_dims=1, out_dims=1)
    torch.testing.assert_close(reset(net, mapped, x), wanted)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reset(net, net, leaf).sum(), leaf)
    torch.testing.assert_close(
        torch.func.grad(lambda given: reset(net, net, given).sum())(x), gradient
    )


def reset(net, run, x):
    functional.reset_net(net)
    return run(x)


@needs_kernel
def test_a_plain_and_a_fused_pass_share_one_graph(passes):
    """As where a hook looks at one pass of a training step and not at the other."""
    net = network()
    fuse(net)
    hook = net[2].register_forward_hook(lambda *_: None)
    x = torch.randn(T, 3, 2, 8, 8)
    total = net(x).sum()
    hook.remove()
    functional.reset_net(net)
    (total + net(x).sum()).backward()
    assert passes.fused == 3


@needs_kernel
@pytest.mark.parametrize(
    ("layers", "fused_passes"),
    [("all", 0), ("last", 4), (["2"], 2), (["6"], 4)],
    ids=str,
)
def test_a_monitor_keeps_apart_only_the_pairs_it_looks_at(passes, layers, fused_passes):
    plain, fused = (net.eval() for net in both())
    x, x_perturbed = torch.randn(T, 3, 2, 8, 8), torch.randn(T, 3, 2, 8, 8)
    losses = []
    for net in (plain, fused):
        with MPPDMonitor(net, layers=layers) as monitor:
            for _ in range(2):  # the first run finds out which layer is the last
                passes.fused = 0
                monitored(net, monitor, x, x_perturbed)
                order = monitor.execution_order
            functional.reset_net(net)
            losses.append(
                monitor.loss(
                    "last" if layers == "last" else [*order][-1:] if layers == "all" else layers
                )
            )
            assert order == ("2", "3.2", "6")
            assert passes.fused == (fused_passes if net is fused else 0)
            net(x)  # outside its contexts the monitor looks at nothing
            assert passes.fused == (fused_passes + 2 if net is fused else 0)
    torch.testing.assert_close(*losses)


@needs_kernel
def test_a_monitor_of_the_last_layer_says_when_another_one_became_the_last():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(layer.BatchNorm2d(2), DLIFNode(T=T))
            self.b = nn.Sequential(layer.BatchNorm2d(2), DLIFNode(T=T))
            self.swapped = False

        def forward(self, x):
            return self.a(self.b(x)) if self.swapped else self.b(self.a(x))

    net = Routed()
    functional.set_step_mode(net, "m")
    fuse(net)
    monitor = MPPDMonitor(net, layers="last")
    x = torch.randn(T, 3, 2, 4, 4)
    with monitor.clean():
        net(x)
    assert monitor.execution_order == ("a.1", "b.1")
    net.swapped = True
    functional.reset_net(net)
    with (
        pytest.raises(RuntimeError, match=r"last was 'b\.1' and is 'a\.1' now: name the layers"),
        monitor.clean(),
    ):
        net(x)
    functional.reset_net(net)
    with monitor.clean():  # found out anew
        net(x)
    assert monitor.execution_order == ("b.1", "a.1")
