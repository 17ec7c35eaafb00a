"""Every way in which torch traces a network, with every backend: the numbers of the plain call, or
a clear refusal.

python -m ops.tracers                     # in tests/: the table, every cell in a process of its own
python -m ops.tracers torch.compile cpp   # one cell: what it gives, or the error in full
"""

import os
import subprocess
import sys
import tempfile

import torch
from ops.calls import Seen
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from sj_robust.core.host import functional, layer
from sj_robust.neuron import DLIFNode, fuse

BACKENDS = ("auto", "cpp", "eager", "reference", "fused")
T = 3
WANTED = "equal"


class Network(nn.Module):
    """Convolution, batch norm, DLIF, pooling, of a batch of images; no state before or after a
    call.
    """

    def __init__(self, backend: str) -> None:
        super().__init__()
        neuron = DLIFNode(T, tau=2.0, backend="auto" if backend == "fused" else backend)
        self.layers = nn.Sequential(
            layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), neuron, layer.AvgPool2d(2)
        )
        functional.set_step_mode(self, "m")
        nn.init.uniform_(neuron.input_gain, 0.5, 1.5)
        if backend == "fused":
            fuse(self)

    def forward(self, images: Tensor) -> Tensor:
        functional.reset_net(self)
        spikes = self.layers(images.expand(T, *images.shape))
        functional.reset_net(self)
        return spikes.mean(0)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(count))


def trained(net: nn.Module, call, x: Tensor) -> list[Tensor]:
    """Outputs and every gradient."""
    x = x.clone().requires_grad_()
    out = call(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *net.parameters()])]


def compare(net: nn.Module, call, count: int = 4) -> None:
    for _ in range(2):
        found = trained(net, call, images(count))
        expected = trained(net, net, images(count))
        assert_close(found, expected)


def evaluated(net: nn.Module, call) -> None:
    assert_close(call(images()), net(images()))


def compile(net, **options):
    compare(net, torch.compile(net, **options))
    evaluated(net.eval(), torch.compile(net, **options))


def dynamic(net):
    compiled = torch.compile(net, fullgraph=True)

    def call(x):
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(x)

    for count in (4, 6):
        compare(net, call, count)


def export(net, strict):
    net.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    for count in (4, 6):
        with torch.no_grad():
            found = program.module()(images(count))
            assert_close(found, net(images(count)))


def aot_inductor(net):
    net.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(net, (images(),))
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/net.pt2")
        torch.save((images(), net(images())), f"{folder}/wanted.pt")
        code = (
            "import torch, sj_robust.ops; x, wanted = torch.load(f'{f}/wanted.pt')\n"
            "torch.testing.assert_close(torch._inductor.aoti_load_package(p)(x), wanted)"
        )
        subprocess.run(
            [sys.executable, "-c", f"f, p = {folder!r}, {str(path)!r}\n{code}"], check=True
        )


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
        expected = (real.shape, real.dtype, real.stride())
        assert seen == expected


def vmap(net):
    net.eval()
    several = torch.stack([images(), 2 * images(), images() - 0.5])
    found = torch.func.vmap(net)(several)
    assert_close(found, torch.stack([net(x) for x in several]))


def func_grad(net):
    net.eval()
    found = torch.func.grad(lambda x: net(x).square().sum())(images())
    x = images().requires_grad_()
    expected = torch.autograd.grad(net(x).square().sum(), x)[0]
    assert_close(found, expected)


def jacobian(net):
    net.eval()
    found = torch.func.jacrev(lambda x: net(x)[0, 0])(images(1))
    expected = torch.autograd.functional.jacobian(lambda x: net(x)[0, 0], images(1))
    assert_close(found, expected)


def twice(net):
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    assert grad.requires_grad


def zeros(net):
    x = images().requires_grad_()
    out = net(x)
    (grad,) = torch.autograd.grad(out, x, torch._efficientzerotensor(out.shape))
    assert not grad.any()


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


TRACERS = {
    "torch.compile": compile,
    "torch.compile(fullgraph=True)": lambda net: compile(net, fullgraph=True),
    "torch.compile, any batch": dynamic,
    'torch.compile(backend="aot_eager")': lambda net: compile(net, backend="aot_eager"),
    "torch.export, strict": lambda net: export(net, True),
    "torch.export": lambda net: export(net, False),
    "AOTInductor, loaded by a new process": aot_inductor,
    "make_fx, real": lambda net: fx(net, "real"),
    "make_fx, fake": lambda net: fx(net, "fake"),
    "make_fx, symbolic": lambda net: fx(net, "symbolic"),
    "FakeTensorMode": fake,
    "torch.func.vmap": vmap,
    "torch.func.grad": func_grad,
    "torch.func.jacrev": jacobian,
    "create_graph=True": twice,
    "zero tensor as gradient": zeros,
    "a dispatch mode": mode,
    "torch.jit.trace": jit,
}


def cell(tracer: str, backend: str) -> str:
    """What one process says of one cell; forked, since most of its time would be that of importing
    torch.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            run(tracer, backend)
        except BaseException as error:
            lines = str(error).strip().splitlines() or [""]
            os.write(write, f"{type(error).__name__}: {lines[0]}".encode()[:400])
            os._exit(1)
        os._exit(0)
    os.close(write)
    said = os.fdopen(read).read().replace("|", "/")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: WANTED, 1: said}.get(code, f"crash, code {code}")


def run(tracer: str, backend: str) -> None:
    torch.manual_seed(0)
    TRACERS[tracer](Network(backend))


def main() -> None:
    chosen = sys.argv[1:]
    if len(chosen) == 2:
        run(*chosen)
        return
    print("| tracer |", " | ".join(BACKENDS), "|\n|---|" + "---|" * len(BACKENDS))
    for tracer in TRACERS:
        print(
            f"| `{tracer}` |",
            " | ".join(cell(tracer, backend) for backend in BACKENDS),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main()
