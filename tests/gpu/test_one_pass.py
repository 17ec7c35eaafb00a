"""Batch norm, DLIF and pooling in one pass on a real GPU, by Triton."""

import pytest
import torch
from ops.triton import stage_cases
from torch import nn
from torch.testing import assert_close

from sj_robust.core.host import functional, layer
from sj_robust.neuron import DLIFNode, fuse
from sj_robust.ops.bn_dlif.dispatch import batch_norm_dlif_multi_step
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.dlif import backends

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and backends.failing_reason("triton") is not None,
        reason=f"backend='triton': {backends.failing_reason('triton')}",
    ),
]
LAST = [False, True]


@pytest.mark.parametrize("case", stage_cases.cases(), ids=str)
def test_equals_the_reference(case):
    """The calls of the interpreter's tests: few, since Triton takes seconds to compile each."""
    stage_cases.check(case, "cuda")


def stage(x, training=True, **options):
    """Outputs and gradients of one call."""
    generator = torch.Generator("cuda").manual_seed(0)
    T = x.shape[0]
    C = x.shape[2]
    leaves = [
        x.detach().requires_grad_(),
        *(
            torch.rand(size, device="cuda", generator=generator).add_(0.5).requires_grad_()
            for size in (T, C, C)
        ),
    ]
    x, gain, weight, bias = leaves
    running = torch.zeros(C, device="cuda"), torch.ones(C, device="cuda")
    norm = BatchNorm(weight, bias, *running, use_batch_statistics=training)
    spikes, v, _ = batch_norm_dlif_multi_step(
        x, norm, gain, decay=0.9, average_pool=True, **options
    )
    weights = torch.linspace(-1, 1, spikes.shape[-1], device="cuda", dtype=spikes.dtype)
    return [
        spikes.detach(),
        v.detach(),
        *torch.autograd.grad(spikes, leaves, weights.expand_as(spikes)),
        *running,
    ]


def normal(*shape, channels_last=False, dtype=torch.float32):
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(
        dtype
    )
    return stage_cases.laid_out(x, channels_last)


@pytest.mark.parametrize("channels_last", LAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_of_a_layer_repeat_bit_by_bit(channels_last, dtype):
    x = normal(4, 16, 64, 32, 32, channels_last=channels_last, dtype=dtype)
    for a, b in zip(stage(x, backend="triton"), stage(x, backend="triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("channels_last", LAST)
def test_a_layer_equals_its_parts(channels_last):
    x = normal(4, 16, 64, 32, 32, channels_last=channels_last)
    found = stage(x, backend="auto")
    wanted = stage(x, backend="reference")
    same = (found[0] == wanted[0]).all(0)  # windows that rounding did not flip
    assert same.float().mean() > 0.999
    neurons = same.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert_close(found[1][neurons], wanted[1][neurons], rtol=1e-4, atol=1e-4)
    assert_close(found[2][:, neurons], wanted[2][:, neurons], rtol=1e-2, atol=1e-3)
    for a, b in zip(found[3:], wanted[3:], strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6)


def test_inputs_off_their_alignment():
    x = normal(4 * 2 * 3 * 8 * 8 + 1)[1:].view(4, 2, 3, 8, 8)
    for a, b in zip(stage(x, backend="triton"), stage(x.clone(), backend="triton"), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("training", [False, True])
def test_a_cuda_graph_of_a_network_in_one_pass_gives_the_numbers_of_the_call(training):
    layers = (
        layer.Conv2d(3, 16, 3, padding=1),
        layer.BatchNorm2d(16),
        DLIFNode(4),
        layer.AvgPool2d(2),
    )
    net = nn.Sequential(*layers).cuda().train(training)
    functional.set_step_mode(net, "m")
    fuse(net)
    x = normal(4, 8, 3, 16, 16)

    def call():
        functional.reset_net(net)
        with torch.set_grad_enabled(training):
            spikes = net(x)
        grads = torch.autograd.grad(spikes.sum(), list(net.parameters())) if training else ()
        return [spikes.detach(), *grads]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), stage_cases.launched() as names:
        for _ in range(1 + 2 * training):  # a backward pass needs more than one
            call()
    assert "bn_dlif_forward" in names
    assert ("bn_dlif_backward" in names) == training
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    x.neg_()
    graph.replay()
    replayed = [output.clone() for output in outputs]
    assert_close(replayed, call())


def test_more_than_2_to_the_31_numbers():
    free_gb = torch.cuda.mem_get_info()[0] / 1e9
    if free_gb < 30:
        pytest.skip(f"needs 30 GB of free GPU memory, has {free_gb:.0f}")
    x = torch.empty(33, 64, 64, 128, 128, device="cuda", dtype=torch.bfloat16).normal_()
    found = stage(x, training=False, backend="triton")
    wanted = stage(x[:, -1:].contiguous(), training=False, backend="triton")
    for i, dim in enumerate((1, 0, 1)):
        seen = found[i].narrow(dim, 63, 1)
        assert torch.equal(seen, wanted[i])
