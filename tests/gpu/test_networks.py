"""Neurons in the hands of torch: mixed precision, compiler, CUDA graphs, huge tensors.

What needs no GPU is tried on the CPU as well, so that an error of the test itself is found there.
"""

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.testing import assert_close

from sj_robust.neuron import DLIFNode, fuse
from sj_robust.ops import dlif_multi_step
from sj_robust.ops.dlif import operator

T = 4
CUDA = [("cuda", "cupy"), ("cuda", "triton")]


def usable(device, backend):
    """The pair, if it can run."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    reason = operator.failing_reason(backend)
    if reason is not None:
        pytest.skip(f"backend={backend!r}: {reason}")
    return device, backend


@pytest.fixture(params=[("cpu", "cpp"), *CUDA], ids="-".join)
def place(request):
    """Device and backend."""
    return usable(*request.param)


def currents(device, shape=(T, 3, 8, 6, 6), dtype=torch.float32):
    """Currents on a grid of quarters, where sums are exact and the threshold is met."""
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randint(-4, 9, shape, generator=generator) / 4).to(device, dtype)


def trained(net, x_seq, call=None):
    """Spikes, and the gradients of the currents and all parameters."""
    functional.reset_net(net)
    x_seq = x_seq.detach().requires_grad_()
    spikes = (call or net)(x_seq)
    weights = torch.linspace(-1, 1, spikes.numel(), device=spikes.device).view(spikes.shape)
    gradients = torch.autograd.grad(spikes, [x_seq, *net.parameters()], weights)
    return spikes.detach(), *gradients


def network(place, fused):
    device, backend = place
    torch.manual_seed(0)
    node = DLIFNode(T, tau=2.0, backend=backend)
    layers = [
        layer.Conv2d(2, 8, 3, padding=1),
        layer.BatchNorm2d(8),
        node,
        layer.AvgPool2d(2),
        layer.Flatten(),
    ]
    net = nn.Sequential(*layers, layer.Linear(128, 5)).to(device)
    functional.set_step_mode(net, "m")
    if fused:
        fuse(net)
    return net


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_with_a_scaler_trains_as_float32_does(place, fused):
    device, _ = place
    half = torch.float16 if device == "cuda" else torch.bfloat16
    x = currents(device, (T, 16, 2, 8, 8))
    y = torch.arange(16, device=device) % 5
    losses = []
    for enabled in (False, True):
        net = network(place, fused)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=256.0, enabled=enabled)
        of_run = []
        for _ in range(4):
            functional.reset_net(net)
            with torch.autocast(device, half, enabled=enabled):
                loss = F.cross_entropy(net(x).mean(0).float(), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            for p in net.parameters():
                assert torch.isfinite(p.grad).all()
            scaler.step(optimizer)
            scaler.update()
            of_run.append(loss.item())
        (node,) = [module for module in net.modules() if isinstance(module, DLIFNode)]
        assert node.v.dtype == torch.float32
        losses.append(of_run)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.slow
def test_a_stage_that_runs_in_one_pass_is_compiled_whole(place):
    device, _ = place
    net = nn.Sequential(*list(network(place, fused=False))[1:4])  # batch norm, neurons, pooling
    fuse(net)
    torch.compiler.reset()
    compiled = torch.compile(
        net, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    x = currents(device)
    for given, wanted in zip(trained(net, x, compiled), trained(net, x), strict=True):
        assert_close(given, wanted)


@pytest.mark.parametrize(("device", "backend"), CUDA)
def test_a_cuda_graph_replays_forward_and_backward(device, backend):
    usable(device, backend)
    node = DLIFNode(T, tau=2.0, backend=backend).to(device)
    nn.init.uniform_(node.input_gain, 0.5, 2.0)
    x = currents(device)
    static = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, x.numel(), device=device).view(x.shape)

    def step():
        functional.reset_net(node)
        spikes = node(static)
        return spikes, *torch.autograd.grad(spikes, [static, node.input_gain], weights)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for scale in (1.0, 0.5, -1.0):
        with torch.no_grad():
            static.copy_(x * scale)
        graph.replay()
        for given, wanted in zip(outputs, trained(node, x * scale), strict=True):
            assert_close(given, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(2, (1 << 30) + 8), (1, (1 << 31) + 8)], ids=["steps", "neurons"]
)
@pytest.mark.parametrize(("device", "backend"), CUDA)
def test_more_elements_than_an_int32_counts(device, backend, shape):
    usable(device, backend)
    torch.cuda.empty_cache()
    free_gb = torch.cuda.mem_get_info()[0] / 1e9
    if free_gb < 45:
        pytest.skip(f"needs 45 GB of free GPU memory, has {free_gb:.0f}")
    # spikes, state and gradients where the few currents are, and zero everywhere else
    steps, neurons = shape
    places = torch.tensor(
        [0, 1, neurons // 2 - 1, neurons // 2, neurons - 8, neurons - 1], device=device
    )
    few = torch.full(
        (steps, len(places)), 1.25, dtype=torch.bfloat16, device=device
    ).requires_grad_()
    gain = torch.ones(steps, device=device, requires_grad=True)
    x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    x[:, places] = few.detach()
    x.requires_grad_()
    results = []
    for currents, name in ((x, backend), (few, "reference")):
        spikes, v, _ = dlif_multi_step(currents, gain, decay=0.5, backend=name)
        grads = torch.autograd.grad(spikes.sum(dtype=torch.float32), [currents, gain])
        results.append((spikes.detach(), v.detach(), *grads))
    (spikes, v, grad_x, grad_gain), (few_spikes, few_v, few_grad, few_gain) = results
    for whole, part in ((spikes, few_spikes), (v, few_v), (grad_x, few_grad)):
        assert torch.equal(whole[..., places], part)
        assert int(whole.count_nonzero()) == int(part.count_nonzero())
    assert int(few_spikes.sum()) == few.numel()
    assert_close(grad_gain, few_gain)
