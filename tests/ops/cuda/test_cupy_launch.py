"""The launcher's Python, executed with a stand-in for CuPy that runs the CUDA text on the CPU.

The stand-in passes arguments as CuPy does, by width, and refuses what CuPy would silently misread.
"""

import math
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from ops.calls import assert_equal, random_call, run
from ops.cuda import shim

from sj_robust.ops import Surrogate
from sj_robust.ops.dlif import cupy_launch, dispatch
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients

needs_compiler = pytest.mark.skipif(
    shim.missing_tool() is not None, reason=str(shim.missing_tool())
)


CONFIG = DLIFConfig(0.5, 1.0, 0.0, Surrogate(), False)


class FakeCuPy(ModuleType):
    """``cupy`` as far as the launcher uses it; keeps a log of devices, streams, compilations and
    launches.
    """

    def __init__(self, directory, *, has_from_external=True):
        super().__init__("cupy")
        self.__version__ = "0"
        self.directory, self.log, self.count = directory, [], 1
        fake = self

        class Entered:
            def __init__(self, what):
                self.what = what

            def __enter__(self):
                fake.log.append(("enter", self.what))

            def __exit__(self, *error):
                fake.log.append(("exit", self.what))

        class Stream:
            pass

        if has_from_external:
            Stream.from_external = staticmethod(
                lambda obj: Entered(("stream", obj.__cuda_stream__()))
            )

        class RawKernel:
            def __init__(self, code, name, options=()):
                self.code, self.name = code, name
                assert options == ("--std=c++17",)

            def compile(self):
                fake.log.append(("compile", self.name))
                folder = fake.directory / str(len(fake.log))
                folder.mkdir()
                self.library = shim.Library(shim.build(self.code, folder, optimise=False))

            def __call__(self, grid, block, arguments):
                assert all(isinstance(argument, np.generic) for argument in arguments)
                fake.log.append(("launch", self.name, grid, block))
                self.library.launch(self.name, *grid, *block, *arguments)

        self.RawKernel = RawKernel
        self.cuda = SimpleNamespace(
            Device=lambda index: Entered(("device", index)),
            Stream=Stream,
            ExternalStream=lambda pointer: Entered(("external", pointer)),
            runtime=SimpleNamespace(getDeviceCount=lambda: self.count),
        )

    def launches(self):
        return [entry for entry in self.log if entry[0] == "launch"]


@pytest.fixture
def cupy(tmp_path, monkeypatch):
    return _install(FakeCuPy(tmp_path), monkeypatch)


def _install(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0x1234)
    )
    monkeypatch.setattr(cupy_launch, "_TEXTS_TRIED", {})
    _forget()
    return fake


def _forget():
    for cached in (cupy_launch._compiled, cupy_launch._contexts, cupy_launch._cupy_reason):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _forget_kernels():
    yield
    _forget()


# T, M, dtype; whether it starts from a state and stores potentials; vector width forward and
# backward
CASES = {
    "vector": (4, 520, torch.float32, True, True, (4, 4), {}),
    "odd": (
        3,
        133,
        torch.float32,
        False,
        False,
        (1, 1),
        {"v_reset": None, "kind": "atan", "alpha": 2.0},
    ),
    "half": (
        16,
        70,
        torch.float16,
        True,
        False,
        (2, 2),
        {"v_reset": -0.25, "kind": "sigmoid", "alpha": 4.0},
    ),
    "bfloat16": (5, 12, torch.bfloat16, False, True, (4, 4), {"detach_reset": True}),
    "long": (37, 68, torch.float32, True, True, (4, 2), {"v_reset": -0.25, "alpha": 0.8}),
    "longest in registers": (
        32,
        36,
        torch.float32,
        True,
        False,
        (4, 1),
        {"v_reset": None, "detach_reset": True},
    ),
}


@pytest.mark.slow
@pytest.mark.kernels
@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(cupy, monkeypatch, name):
    T, M, dtype, starts, stores, (forward_width, backward_width), options = CASES[name]
    (x, gain, v_init), (grad_spikes, grad_v, grad_v_seq) = random_call((T, M), dtype)
    inputs = x, gain, v_init if starts else None
    grads = grad_spikes, grad_v, grad_v_seq if stores else None
    options = {"decay": 0.9, "v_threshold": 0.8, "store_v_seq": stores, **options}
    expected, expected_gradients = run("reference", inputs, grads, **options)
    monkeypatch.setattr(dispatch, "choose_backend", lambda *arguments: "cupy")
    outputs, gradients = run("cupy", inputs, grads, **options)
    assert_equal(outputs, expected)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for i, (got, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        rtol = tolerance if i == 0 else 1e-5
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=1e-5 * (M if i == 1 else 1))
    threads = cupy_launch.THREADS_PER_BLOCK
    assert [entry[1:] for entry in cupy.launches()] == [
        (name, (math.ceil(M / (width * threads)),), (threads,))
        for name, width in (("dlif_forward", forward_width), ("dlif_backward", backward_width))
    ]


@pytest.mark.slow
@needs_compiler
def test_several_blocks_and_a_chosen_block_size(cupy):
    """More than one block, so that the partial sums of the gain's gradient are really added up."""
    x, gain = torch.rand(2, 500), torch.tensor([1.0, 0.5])
    call = Inputs(x, gain, None, CONFIG), OutputGradients(torch.ones_like(x)), False
    _, grad_gain, _ = cupy_launch.Launcher(threads_per_block=64).backward(*call)
    _, expected, _ = cupy_launch.backward(*call)
    assert [entry[2:] for entry in cupy.launches()] == [((2,), (64,)), ((1,), (128,))]
    torch.testing.assert_close(grad_gain, expected)
    h = x[0] * gain[0]
    gate = (1 - (0.5 * h * (h < 1) + gain[1] * x[1] - 1).abs()).clamp(min=0)
    torch.testing.assert_close(grad_gain[1], (gate * x[1]).sum())


@pytest.mark.slow
@needs_compiler
def test_kernel_is_compiled_once_and_runs_on_torchs_stream(cupy):
    for _ in range(2):
        cupy_launch.forward(Inputs(torch.rand(2, 8), torch.ones(2), None, CONFIG), False)
    launch = ("launch", "dlif_forward", (1,), (128,))
    around = [("enter", ("device", None)), ("enter", ("stream", (0, 0x1234)))]
    after = [("exit", ("stream", (0, 0x1234))), ("exit", ("device", None))]
    assert cupy.log == [
        *around,
        ("compile", "dlif_forward"),
        launch,
        *after,
        *around,
        launch,
        *after,
    ]


@pytest.mark.parametrize(
    ("of_cupy", "stream"), [("new", ("stream", (0, 7))), ("old", ("external", 7))]
)
def test_enters_the_device_and_stream_of_the_tensor_and_restores_them_on_errors(
    tmp_path, monkeypatch, of_cupy, stream
):
    fake, asked = _install(FakeCuPy(tmp_path, has_from_external=of_cupy == "new"), monkeypatch), []
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: asked.append(device) or SimpleNamespace(cuda_stream=7),
    )
    monkeypatch.setattr(cupy_launch, "_compiled", lambda *_: {}["no kernel"])
    x, device = torch.zeros(2, 4), torch.device("cuda", 1)
    elsewhere = SimpleNamespace(device=device, shape=x.shape, numel=x.numel)
    variant = cupy_launch.Variant(128, "float", 2, False, 4, "RESET_TO_ZERO", False)
    with pytest.raises(KeyError, match="no kernel"):
        cupy_launch._launch(variant, elsewhere, (x,), CONFIG)
    assert asked == [device]
    assert fake.log == [
        ("enter", ("device", 1)),
        ("enter", stream),
        ("exit", stream),
        ("exit", ("device", 1)),
    ]


def test_vector_width_follows_the_row_length_and_the_alignment():
    for neurons, at_most, width in ((8, 4, 4), (6, 4, 2), (7, 4, 1), (8, 2, 2), (8, 1, 1)):
        assert cupy_launch._vector_width(neurons, at_most, torch.zeros(neurons)) == width
    base = torch.zeros(64)
    assert base.data_ptr() % 16 == 0
    for offset, width in ((0, 4), (2, 2), (1, 1)):
        assert (
            cupy_launch._vector_width(8, 4, torch.zeros(8), None, base[offset : offset + 8])
            == width
        )


def test_32_steps_stay_in_registers(monkeypatch):
    launched = []
    monkeypatch.setattr(
        cupy_launch,
        "_launch",
        lambda variant, *_: launched.append((variant.steps, variant.is_long)),
    )
    for T in (32, 33):
        inputs = Inputs(torch.zeros(T, 4), torch.ones(T), None, CONFIG)
        cupy_launch.forward(inputs, store_v_seq=False)
        cupy_launch.backward(inputs, OutputGradients(torch.ones(T, 4)), False)
    assert launched == [(32, False), (32, False), (1, True), (16, True)]


@pytest.mark.parametrize("threads", [0, 16, 100, 1056, -32])
def test_block_size_is_checked(threads):
    with pytest.raises(ValueError, match=f"multiple of 32 from 32 to 1024, got {threads}"):
        cupy_launch.Launcher(threads_per_block=threads)


@pytest.mark.parametrize("name", ["input_gain", "v_init"])
def test_tensor_of_another_device_is_refused(name):
    tensors = {"input_gain": torch.ones(2), "v_init": torch.zeros(4)}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on the device of x_seq, cpu, got meta"):
        cupy_launch.forward(Inputs(torch.zeros(2, 4), **tensors, config=CONFIG), False)


# ---- surrogates with a CUDA text of their own ----


class Ramp(torch.nn.Module):
    """Surrogate with ``cuda_codes`` in the manner of SpikingJelly 0.0.0.0.14, text given by the
    test.
    """

    spiking = True

    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, z):
        return Surrogate("triangle", 2.0).spike(z)

    def cuda_codes(self, y, x, dtype):
        assert dtype == "float"
        return self.text.format(y=y, x=x)


RIGHT = (
    "const float ramp__height = (2f) - (2f) * (2.0f) * fabsf({x});{y} = max(ramp__height, 0.0f);"
)


def reason(surrogate):
    return cupy_launch._unusable_surrogate_reason(surrogate, torch.device("cpu"))


@pytest.mark.slow
@needs_compiler
def test_own_text_of_a_surrogate_is_spliced_in(cupy):
    surrogate = Surrogate("custom", function=Ramp(RIGHT))
    assert reason(surrogate) is None
    assert reason(surrogate) is None
    assert cupy.log.count(("compile", "dlif_backward")) == 1  # tried once, then remembered
    x, gain = torch.randn(4, 8), torch.ones(4)
    configs = [
        DLIFConfig(0.9, 1.0, 0.0, kind, False) for kind in (surrogate, Surrogate("triangle", 2.0))
    ]
    calls = [
        (Inputs(x, gain, None, config), OutputGradients(torch.ones_like(x)), False)
        for config in configs
    ]
    results = [cupy_launch.backward(*call)[0] for call in calls]
    torch.testing.assert_close(*results)


@pytest.mark.slow
@needs_compiler
def test_wrong_or_broken_text_is_refused(cupy):
    wrong = Surrogate("custom", function=Ramp(RIGHT.replace("fabsf({x})", "{x}")))
    assert "disagrees with its gradient in torch" in reason(wrong)
    broken = Surrogate("custom", function=Ramp("{y} = const float mask;"))
    assert "does not compile" in reason(broken)


def test_surrogates_without_a_usable_text_are_refused():
    class Unwritten(Ramp):
        def cuda_codes(self, y, x, dtype):
            raise NotImplementedError

    smooth, trainable = Ramp(RIGHT), Ramp(RIGHT)
    smooth.spiking = False
    trainable.width = torch.nn.Parameter(torch.ones(()))
    for function, message in (
        (torch.sigmoid, "no CUDA code"),
        (Unwritten(""), "no CUDA code"),
        (smooth, "spiking=False"),
        (trainable, "trainable"),
    ):
        surrogate = Surrogate("custom", function=function)
        assert message in reason(surrogate)
        x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
        assert message in cupy_launch.unsupported_reason(x, surrogate)


@pytest.mark.slow
@needs_compiler
def test_every_cuda_text_of_spikingjelly_equals_its_gradient(cupy):
    host = pytest.importorskip("spikingjelly.activation_based.surrogate")
    if not hasattr(host, "_has_cuda_"):
        pytest.skip("this SpikingJelly release has no cuda_codes")
    functions = [cls() for cls in host._has_cuda_] + [
        host.ATan(alpha=2),
        host.PiecewiseLeakyReLU(w=2, c=0.1),
    ]
    for function in functions:
        assert reason(Surrogate("custom", function=function)) is None, type(function).__name__
    assert "does not compile" in reason(Surrogate("custom", function=host.LogTailedReLU()))


def test_integer_literals_alone_are_repaired():
    text = cupy_launch.spliced_struct("a = (2f) * 1e-05f + 3.5f - x2f; b = .5f + 1e+2f * 10f;")
    assert "a = (2.0f) * 1e-05f + 3.5f - x2f; b = .5f + 1e+2f * 10.0f;" in text


# ---- what is missing, told apart ----


def test_what_is_missing_is_told_from_what_is_there(gpu, cupy, import_that_raises, monkeypatch):
    def reason():
        cupy_launch._cupy_reason.cache_clear()
        return cupy_launch.unavailable_reason()

    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver")

    assert reason() is None
    cupy.count = 0
    assert "sees no GPU" in reason()
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fail)
    assert "cudaErrorInsufficientDriver" in reason()
    import_that_raises(cupy_launch, ModuleNotFoundError("No module named 'cupy'", name="cupy"))
    assert reason() == 'CuPy is not installed; pip install "cupy-cuda13x[ctk]"'
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in reason()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in reason()
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in reason()


def test_missing_compiler_library_says_what_to_install(cupy, monkeypatch):
    def fail(self):
        raise OSError("libnvrtc.so.12: cannot open shared object file")

    monkeypatch.setattr(cupy.RawKernel, "compile", fail)
    with pytest.raises(RuntimeError, match=r"(?s)libnvrtc\.so\.12.*cupy-cuda\d+x\[ctk\]"):
        cupy_launch.forward(Inputs(torch.rand(2, 8), torch.ones(2), None, CONFIG), False)


def test_unsupported_tensors():
    on_gpu = partial(SimpleNamespace, device=torch.device("cuda", 0))
    assert "must be on a CUDA device, got cpu" in cupy_launch.unsupported_reason(
        torch.zeros(2, 2), Surrogate()
    )
    assert "got torch.float64" in cupy_launch.unsupported_reason(
        on_gpu(dtype=torch.float64), Surrogate()
    )
    assert cupy_launch.unsupported_reason(on_gpu(dtype=torch.bfloat16), Surrogate()) is None
