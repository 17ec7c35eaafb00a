"""Every way in which torch traces a network, with every backend: the numbers of the plain call, or
a clear refusal.
"""

import gc
import subprocess
import sys
import tempfile

import torch
from ops.calls import Seen
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from sj_robust.core.host import functional, layer
from sj_robust.neuron import DLIFNode, fuse

T = 3


class Network(nn.Module):
    """Convolution, batch norm, DLIF, pooling, of a batch of images; no state before or after a
    call.
    """

    def __init__(self, backend):
        super().__init__()
        neuron = DLIFNode(T, tau=2.0, backend="auto" if backend == "fused" else backend)
        self.layers = nn.Sequential(
            layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), neuron, layer.AvgPool2d(2)
        )
        functional.set_step_mode(self, "m")
        nn.init.uniform_(neuron.input_gain, 0.5, 1.5)
        if backend == "fused":
            fuse(self)

    def forward(self, images):
        functional.reset_net(self)
        spikes = self.layers(images.expand(T, *images.shape))
        functional.reset_net(self)
        return spikes.mean(0)


def images(count=4):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(count))


def trained(net, call, x):
    """Outputs and every gradient."""
    x = x.clone().requires_grad_()
    out = call(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *net.parameters()])]


def compare(net, call, count=4):
    for _ in range(2):
        assert_close(trained(net, call, images(count)), trained(net, net, images(count)))


def compiled(net, **options):
    gc.collect()  # torch's guards count SpikingJelly's weak references to networks of other tests
    compare(net, torch.compile(net, **options))
    net.eval()
    assert_close(torch.compile(net, **options)(images()), net(images()))


def dynamic(net):
    whole = torch.compile(net, fullgraph=True)

    def call(x):
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return whole(x)

    for count in (4, 6):
        compare(net, call, count)


def export(net, strict):
    net.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    for count in (4, 6):
        with torch.no_grad():
            assert_close(program.module()(images(count)), net(images(count)))


LOADED = """
import sys, torch, sj_robust.ops
x, wanted = torch.load(sys.argv[1] + ".pt")
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(x), wanted)
"""


def aot_inductor(net):
    net.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(net, (images(),))
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/net.pt2")
        torch.save((images(), net(images())), f"{path}.pt")
        subprocess.run([sys.executable, "-c", LOADED, path], check=True)


def fx(net, mode):
    graph = make_fx(lambda x: trained(net, net, x), tracing_mode=mode, _allow_non_fake_inputs=True)(
        images()
    )
    other = images() * 0.7
    with torch.no_grad():  # the graph has its backward pass inside
        found = graph(other)
    assert_close(found, trained(net, net, other))


def fake(net):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = trained(net, net, mode.from_tensor(images()))
    for ours, real in zip(found, trained(net, net, images()), strict=True):
        seen = (ours.shape, ours.dtype, ours.stride())
        assert seen == (real.shape, real.dtype, real.stride())


def vmap(net):
    net.eval()
    several = torch.stack([images(), 2 * images(), images() - 0.5])
    assert_close(torch.func.vmap(net)(several), torch.stack([net(x) for x in several]))


def func_grad(net):
    net.eval()
    found = torch.func.grad(lambda x: net(x).square().sum())(images())
    x = images().requires_grad_()
    assert_close(found, torch.autograd.grad(net(x).square().sum(), x)[0])


def batch_of_gradients(net):
    def call(x):
        return net(x)[0, 0]

    found = torch.autograd.functional.jacobian(call, images(), vectorize=True)
    assert_close(found, torch.autograd.functional.jacobian(call, images()))


def twice(net):
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    assert grad.requires_grad


def mode(net):
    def call(x):
        with Seen():
            return net(x)

    compare(net, call)
    with Seen():
        trained(net, net, images())


def jit(net):
    net.eval()
    graph = torch.jit.trace(net, images(), check_trace=False)
    other = images() * 0.7
    assert_close(graph(other), net(other))


QUICK = {
    "make_fx, real": lambda net: fx(net, "real"),
    "make_fx, fake": lambda net: fx(net, "fake"),
    "make_fx, symbolic": lambda net: fx(net, "symbolic"),
    "FakeTensorMode": fake,
    "torch.func.vmap": vmap,
    "torch.func.grad": func_grad,
    "is_grads_batched": batch_of_gradients,
    "create_graph=True": twice,
    "a dispatch mode": mode,
    "torch.jit.trace": jit,
    "torch.export": lambda net: export(net, False),
}
SLOW = {
    "torch.compile(fullgraph=True)": lambda net: compiled(net, fullgraph=True),
    "torch.compile, any batch": dynamic,
    'torch.compile(backend="aot_eager")': lambda net: compiled(net, backend="aot_eager"),
    "torch.export, strict": lambda net: export(net, True),
}
BY_A_COMPILER = {"AOTInductor, loaded by a new process": aot_inductor}
TWICE = (RuntimeError, "differentiable once.*backend='reference'")
BATCH = (RuntimeError, "no batch of gradients .*backend='reference'")
FUNCTORCH = (ValueError, r"torch\.func\.grad.*backend='reference'")
REFUSED = {
    ("torch.func.grad", "cpp"): FUNCTORCH,
    ("torch.func.grad", "eager"): FUNCTORCH,
}
for backend in ("cpp", "eager", "fused"):
    REFUSED["create_graph=True", backend] = TWICE
    REFUSED["is_grads_batched", backend] = BATCH
