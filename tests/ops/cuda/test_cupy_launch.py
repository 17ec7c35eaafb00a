"""The launcher's Python, executed with a stand-in for CuPy that runs the CUDA text on the CPU; the
numbers of every variant: test_shim.py.
"""

from types import SimpleNamespace

import pytest
import torch
from ops.cuda import shim
from ops.cuda.fake_cupy import FakeCuPy, install

from sj_robust.ops import Surrogate
from sj_robust.ops.dlif import cupy_launch, operator
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients

needs_compiler = pytest.mark.skipif(
    shim.missing_tool() is not None, reason=str(shim.missing_tool())
)
CONFIG = DLIFConfig(0.5, 1.0, 0.0, Surrogate(), False)
CPU = torch.device("cpu")


@pytest.fixture
def cupy(tmp_path, monkeypatch):
    yield install(FakeCuPy(tmp_path), monkeypatch)
    cupy_launch._compiled.cache_clear()


def layer(T=2, M=8, dtype=torch.float32):
    return Inputs(torch.rand(T, M).to(dtype), torch.ones(T), None, CONFIG)


def backward(launcher, inputs):
    grads = OutputGradients(torch.ones_like(inputs.x_seq))
    return operator.backward(launcher, inputs, grads, needs_v_init=False)


@pytest.mark.slow
@needs_compiler
def test_a_kernel_is_compiled_once_and_runs_in_blocks_of_the_chosen_size_on_torchs_stream(cupy):
    """More than one block, so that the partial sums of the gain's gradient are really added up."""
    inputs = layer(2, 500)
    small = cupy_launch.Launcher(threads_per_block=64)
    found = [backward(launcher, inputs) for launcher in (small, small, cupy_launch)]
    torch.testing.assert_close(found[0], found[2])
    device = ("device", None)
    stream = ("stream", (0, 0x1234))
    entered = [("enter", *device), ("enter", *stream)]
    left = [("exit", *stream), ("exit", *device)]
    compiled = ("compile", "dlif_backward")
    wanted = []
    for new, grid, block in (([compiled], 2, 64), ([], 2, 64), ([compiled], 1, 128)):
        launch = ("launch", "dlif_backward", (grid,), (block,))
        wanted += [*entered, *new, launch, *left]
    assert cupy.log == wanted


@pytest.mark.parametrize(
    ("is_new", "stream"), [(True, ("stream", (0, 7))), (False, ("external", 7))]
)
def test_device_and_stream_of_the_tensor_are_entered_and_left_on_errors(
    monkeypatch, is_new, stream
):
    fake = install(FakeCuPy(None, has_from_external=is_new), monkeypatch)
    asked = []
    streams = {torch.device("cuda", 1): SimpleNamespace(cuda_stream=7)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    monkeypatch.setattr(cupy_launch, "_compiled", lambda *call: asked.append(call) or 1 / 0)

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 1)

    inputs = layer()
    inputs = inputs._replace(x_seq=inputs.x_seq.as_subclass(Elsewhere))
    variant = cupy_launch.Variant(
        threads=128,
        io="float",
        steps=2,
        is_long=False,
        vec=4,
        reset="RESET_TO_ZERO",
        v_seq=False,
    )
    absent = dict.fromkeys(("spike_seq", "v_last", "v_seq"))
    with pytest.raises(ZeroDivisionError):
        cupy_launch._launch(variant, inputs, **absent)
    assert asked == [(variant, torch.device("cuda", 1))]
    device = ("device", 1)
    around = [("enter", *device), ("enter", *stream), ("exit", *stream), ("exit", *device)]
    assert fake.log == around


@pytest.mark.parametrize(
    ("T", "M", "dtype", "forward", "of_backward"),
    [  # steps of a segment, whether there are more of them, neurons of a thread
        (4, 520, torch.float32, (4, False, 4), (4, False, 4)),
        (3, 133, torch.float32, (3, False, 1), (3, False, 1)),
        (16, 70, torch.float16, (16, False, 2), (16, False, 2)),
        (16, 72, torch.bfloat16, (16, False, 4), (16, False, 2)),
        (32, 36, torch.float32, (32, False, 4), (32, False, 1)),
        (33, 68, torch.float32, (1, True, 4), (16, True, 2)),
    ],
)
def test_variant_of_a_call(monkeypatch, T, M, dtype, forward, of_backward):
    launched = []
    monkeypatch.setattr(cupy_launch, "_launch", lambda variant, *_, **__: launched.append(variant))
    inputs = layer(T, M, dtype)
    operator.forward(cupy_launch, inputs, store_v_seq=False)
    backward(cupy_launch, inputs)
    found = [(v.steps, v.is_long, v.vec) for v in launched]
    assert found == [forward, of_backward]
    assert [v.surrogate for v in launched] == [None, "PiecewiseQuadratic"]


def test_vector_width_follows_the_alignment_too():
    base = torch.zeros(64)
    assert base.data_ptr() % 16 == 0
    for offset, width in ((0, 4), (2, 2), (1, 1)):
        tensors = base[:8], None, base[offset : offset + 8]
        assert cupy_launch._vector_width(8, 4, *tensors) == width


@pytest.mark.parametrize("threads", [0, 16, 100, 1056, -32])
def test_block_size_is_checked(threads):
    with pytest.raises(ValueError, match=f"multiple of 32 from 32 to 1024, got {threads}"):
        cupy_launch.Launcher(threads_per_block=threads)


# ---- surrogates with a CUDA text of their own ----


class Ramp(torch.nn.Module):
    """Surrogate with ``cuda_codes`` in the manner of SpikingJelly 0.0.0.0.14."""

    spiking = True

    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, z):
        return Surrogate("triangle", 2.0).spike(z)

    def cuda_codes(self, y, x, dtype):
        if not self.text:
            raise NotImplementedError
        return self.text.format(y=y, x=x)


RIGHT = "const float h = (2f) - (2f) * (2.0f) * fabsf({x});{y} = max(h, 0.0f);"


def reason(function):
    surrogate = Surrogate("custom", function=function)
    return cupy_launch._unusable_surrogate_reason(surrogate, CPU)


@pytest.mark.slow
@needs_compiler
def test_own_text_of_a_surrogate_is_spliced_in_if_it_is_right(cupy):
    ramp = Ramp(RIGHT)
    assert reason(ramp) is None
    assert reason(ramp) is None
    assert cupy.log.count(("compile", "dlif_backward")) == 1  # tried once, then remembered
    assert "disagrees with its gradient" in reason(Ramp(RIGHT.replace("fabsf({x})", "{x}")))
    assert "does not compile" in reason(Ramp("{y} = const float mask;"))


def test_surrogates_without_a_usable_text_are_refused():
    smooth = Ramp(RIGHT)
    trainable = Ramp(RIGHT)
    smooth.spiking = False
    trainable.width = torch.nn.Parameter(torch.ones(()))
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    for function, message in (
        (torch.sigmoid, "no CUDA code"),
        (Ramp(""), "no CUDA code"),
        (smooth, "spiking=False"),
        (trainable, "trainable"),
    ):
        surrogate = Surrogate("custom", function=function)
        assert message in cupy_launch.unsupported_reason(x, surrogate)


@pytest.mark.slow
@needs_compiler
def test_every_cuda_text_of_spikingjelly_equals_its_gradient(cupy):
    host = pytest.importorskip("spikingjelly.activation_based.surrogate")
    if not hasattr(host, "_has_cuda_"):
        pytest.skip("this SpikingJelly release has no cuda_codes")
    functions = [cls() for cls in host._has_cuda_]
    functions += [host.ATan(alpha=2), host.PiecewiseLeakyReLU(w=2, c=0.1)]
    assert [reason(function) for function in functions] == [None] * len(functions)
    assert "does not compile" in reason(host.LogTailedReLU())


def test_integer_literals_alone_are_repaired():
    text = cupy_launch.spliced_struct("a = (2f) * 1e-05f + 3.5f - x2f; b = .5f + 1e+2f * 10f;")
    assert "a = (2.0f) * 1e-05f + 3.5f - x2f; b = .5f + 1e+2f * 10.0f;" in text


# ---- what is missing, told apart ----


def test_what_is_missing_is_told_from_what_is_there(gpu, cupy, import_that_raises, monkeypatch):
    def missing():
        cupy_launch._cupy_reason.cache_clear()
        return cupy_launch.unavailable_reason()

    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver")

    assert missing() is None
    cupy.count = 0
    assert "sees no GPU" in missing()
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fail)
    assert "cudaErrorInsufficientDriver" in missing()
    import_that_raises(cupy_launch, ModuleNotFoundError("No module named 'cupy'", name="cupy"))
    assert missing() == 'CuPy is not installed; pip install "cupy-cuda13x[ctk]"'
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in missing()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in missing()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in missing()


def test_missing_compiler_library_says_what_to_install(cupy, monkeypatch):
    def fail(self):
        raise OSError("libnvrtc.so.12: cannot open shared object file")

    monkeypatch.setattr("ops.cuda.fake_cupy.Kernel.compile", fail)
    with pytest.raises(RuntimeError, match=r"(?s)libnvrtc\.so\.12.*cupy-cuda\d+x\[ctk\]"):
        operator.forward(cupy_launch, layer(), store_v_seq=False)


def test_unsupported_tensors():
    on_gpu = torch.device("cuda", 0)
    for x, message in (
        (torch.zeros(2, 2), "must be on a CUDA device, got cpu"),
        (SimpleNamespace(device=on_gpu, dtype=torch.float64), "got torch.float64"),
    ):
        assert message in cupy_launch.unsupported_reason(x, Surrogate())
    x = SimpleNamespace(device=on_gpu, dtype=torch.bfloat16)
    assert cupy_launch.unsupported_reason(x, Surrogate()) is None
