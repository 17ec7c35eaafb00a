"""What is refused, what is missing, and what ``auto`` chooses, on this machine and on one with a
GPU.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from ops.calls import needs_kernel
from torch import nn

from sj_robust import doctor
from sj_robust.neuron import DLIFNode
from sj_robust.ops import Surrogate, available_backends, dlif_multi_step
from sj_robust.ops.bn_dlif.config import BatchNorm
from sj_robust.ops.bn_dlif.dispatch import batch_norm_dlif_multi_step
from sj_robust.ops.dlif import cpp, cupy_launch, operator, triton_launch
from sj_robust.ops.dlif.operator import check_backend, choose_backend

X = torch.zeros(3, 2)
STEPS = torch.ones(3)
CURRENTS = torch.zeros(3, 4, 5)  # of a stage
NORM = BatchNorm(None, None, None, None, use_batch_statistics=True)
OF_FOUR = BatchNorm(torch.ones(4), None, None, None, use_batch_statistics=True)
CUSTOM = Surrogate("custom", function=torch.sigmoid)
ON_GPU = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
F64_ON_GPU = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float64)


def dlif(*tensors, **options):
    return dlif_multi_step(*tensors, **{"decay": 0.9, **options})


def stage(*tensors, **options):
    return batch_norm_dlif_multi_step(*tensors, decay=0.9, **options)


def elsewhere(tensor):
    return tensor.to("meta")


PLACES = []
for name in ("auto", "reference", "eager", "cpp"):
    PLACES.append(("input_gain .* got meta", dlif, (X, elsewhere(STEPS)), {"backend": name}))
    PLACES.append(("v_init .* got meta", dlif, (X, STEPS, elsewhere(X[0])), {"backend": name}))


@pytest.mark.parametrize(
    ("message", "call", "tensors", "options"),
    [
        ("T >= 1", dlif, (X[:0], STEPS[:0]), {}),
        ("T >= 1", dlif, (X[0, 0], STEPS[:1]), {}),
        ("one value per step", dlif, (X, STEPS[:2]), {}),
        ("shape of one step", dlif, (X, STEPS, STEPS), {}),
        ("backend must be one of", dlif, (X, STEPS), {"backend": "numpy"}),
        *PLACES,
        (r"x_seq must be \[T, N, C, \*\]", stage, (X, NORM, STEPS), {}),
        (r"\[T\] = \[3\], got \(2,\)", stage, (CURRENTS, NORM, STEPS[:2]), {}),
        ("v_init must have the shape", stage, (CURRENTS, NORM, STEPS, STEPS), {}),
        ("input_gain .* got meta", stage, (CURRENTS, NORM, elsewhere(STEPS)), {}),
        ("more than one value per", stage, (CURRENTS[:1, :1], NORM, STEPS[:1]), {}),
        (r"weight must be \[C\] = \[5\]", stage, (CURRENTS, OF_FOUR, STEPS), {}),
        (r"average_pool .* \(3, 4, 5\)", stage, (CURRENTS, NORM, STEPS), {"average_pool": True}),
        ("must be given when use_batch", BatchNorm, (None, None, None, None, False), {}),
        ("kind must be one of", Surrogate, ("tanh",), {}),
        ("alpha must be finite and > 0", Surrogate, ("atan", 0.0), {}),
        ("alpha must be finite and > 0", Surrogate, ("atan", float("inf")), {}),
        ("alpha must be finite and > 0", Surrogate, ("atan", float("nan")), {}),
        ("function must be given", Surrogate, ("custom",), {}),
        ("function must be given", Surrogate, ("atan", 1.0, torch.sigmoid), {}),
    ],
)
def test_what_does_not_belong_together_is_refused(message, call, tensors, options):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(*tensors, **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x_seq must be floating point"):
        dlif(X.long(), STEPS)


@pytest.mark.parametrize(
    ("backend", "x", "surrogate", "message"),
    [
        (cpp, elsewhere(X), Surrogate(), "on meta"),
        (cpp, X.to(torch.float8_e5m2), Surrogate(), "float8"),
        (cpp, X, CUSTOM, "supports the surrogates"),
        (cpp, X, Surrogate("atan"), None),
        (triton_launch, X, Surrogate(), "CUDA device"),
        (triton_launch, F64_ON_GPU, Surrogate(), "got torch.float64"),
        (triton_launch, ON_GPU, CUSTOM, "got 'custom'"),
        (triton_launch, ON_GPU, Surrogate(), None),
        (cupy_launch, X, Surrogate(), "CUDA device"),
        (cupy_launch, F64_ON_GPU, Surrogate(), "got torch.float64"),
        (cupy_launch, ON_GPU, CUSTOM, "supports the surrogates"),
        (cupy_launch, ON_GPU, Surrogate(), None),
    ],
)
def test_what_a_kernel_does_not_know(backend, x, surrogate, message):
    found = backend.unsupported_reason(x, surrogate)
    assert found is None if message is None else message in found


def test_a_named_backend_that_cannot_run_says_what_to_do_and_auto_takes_another(monkeypatch):
    for name, surrogate, other in (
        ("eager", Surrogate("custom", function=nn.PReLU()), "reference"),
        ("cpp", CUSTOM, "eager"),
    ):
        if available_backends()[name] == "available":
            with pytest.raises(ValueError, match=f"backend='{name}' cannot .*backend='auto'"):
                dlif(X, STEPS, surrogate=surrogate, backend=name)
            assert choose_backend("auto", X, surrogate) == other
    fastest = choose_backend("auto", X, Surrogate())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose_backend("auto", X, Surrogate()) == fastest
    assert choose_backend("auto", X, CUSTOM) == "reference"


@needs_kernel
def test_one_pass_needs_steps_without_gaps():
    strided = torch.zeros(3, 4, 6, 5).transpose(2, 3)
    with pytest.raises(ValueError, match="contiguous or channels last"):
        stage(strided, NORM, STEPS, backend="cpp")


# ---- the compiled library ----


@needs_kernel
def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, "altivec")
    with pytest.raises(ValueError, match="must be one of .*'baseline'.* got 'altivec'"):
        dlif(X, STEPS, backend="cpp")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "was not built"),
        (b"built for another system", "cannot be loaded"),
        (b"", "cannot be"),
        pytest.param("interface", "another version", marks=needs_kernel),
    ],
)
def test_without_a_library_that_fits_another_backend_runs(tmp_path, monkeypatch, content, reason):
    if content == "interface":
        monkeypatch.setattr(cpp, "_INTERFACE", -1)
    else:
        monkeypatch.setattr(cpp, "__file__", str(tmp_path / "cpp.py"))
        if content is not None:
            (tmp_path / cpp._LIBRARY_NAME).write_bytes(content)
    cpp._load.cache_clear()
    try:
        assert reason in available_backends()["cpp"]
        assert "install" in available_backends()["cpp"]
        assert cpp.instruction_sets() == ()
        assert choose_backend("auto", X, Surrogate()) == "eager"
        with pytest.raises(RuntimeError, match=reason):
            dlif(X, STEPS, backend="cpp")
    finally:
        monkeypatch.undo()
        cpp._load.cache_clear()


# ---- a machine with a GPU ----


def test_missing_backends_say_what_is_missing():
    for name, state in available_backends().items():
        if state != "available":
            with pytest.raises(RuntimeError, match=f"'{name}' is not available: .*backend='auto'"):
                check_backend(name)


MISSING = [ModuleNotFoundError("No module named 'triton'", name="triton")]
MISSING += [ModuleNotFoundError("No module named 'cupy'", name="cupy")]
BROKEN = [ModuleNotFoundError("No module named 'x'", name="x"), OSError("undefined symbol")]
BROKEN += [AttributeError("module 'numpy' has no attribute 'int'")]


@pytest.mark.parametrize("launcher", [triton_launch, cupy_launch])
@pytest.mark.parametrize("error", [*MISSING, *BROKEN], ids=str)
def test_an_import_that_fails_is_told_from_a_package_that_is_missing(gpu, launcher, error):
    def import_module(name):
        raise error

    gpu.setattr(launcher, "importlib", SimpleNamespace(import_module=import_module))
    reason = launcher.unavailable_reason()
    package = "Triton" if launcher is triton_launch else "CuPy"
    is_missing = getattr(error, "name", None) == package.lower()
    assert (f"{package} is not installed" in reason) == is_missing
    assert (str(error) in reason) != is_missing
    assert "install" in reason
    assert ("cupy-cuda13x[ctk]" in reason) == (package == "CuPy")


def test_what_keeps_cupy_from_a_gpu(gpu):
    runtime = SimpleNamespace(getDeviceCount=lambda: 1)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), __version__="0")
    gpu.setattr(cupy_launch, "importlib", SimpleNamespace(import_module=lambda name: cupy))

    def reason():
        cupy_launch._cupy_reason.cache_clear()
        return cupy_launch.unavailable_reason()

    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver")

    assert reason() is None
    runtime.getDeviceCount = lambda: 0
    assert "sees no GPU" in reason()
    runtime.getDeviceCount = fail
    assert "cudaErrorInsufficientDriver" in reason()
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in reason()
    gpu.setattr(torch.version, "cuda", None)
    assert "without CUDA" in reason()
    gpu.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in reason()


@pytest.fixture
def kernels(gpu):
    """What a first call of CuPy and of Triton gives, and what ``auto`` chooses then."""
    gpu.setattr(torch, "tensor", lambda *args, make=torch.tensor, **kwargs: make(*args))
    gpu.setattr(torch, "ones", lambda *args, make=torch.ones, **kwargs: make(*args))

    def forward(found, inputs, outputs):
        if isinstance(found, Exception):
            raise found
        outputs.spike_seq.copy_(torch.tensor(found))

    def chosen(cupy, triton, surrogate=Surrogate()):  # noqa: B008  # it cannot be changed
        for module, found in ((cupy_launch, cupy), (triton_launch, triton)):
            reason = found if isinstance(found, str) else None
            gpu.setattr(module, "unavailable_reason", lambda reason=reason: reason)
            gpu.setattr(module, "forward", lambda *call, found=found: forward(found, *call))
        operator._failure.cache_clear()
        return choose_backend("auto", ON_GPU, surrogate)

    return chosen


RIGHT = [[0.0], [1.0]]
WRONG = [[0.0], [0.0]]


def test_auto_takes_cupy_and_then_triton_where_they_work(kernels):
    assert kernels(RIGHT, RIGHT) == "cupy"
    assert kernels("CuPy is not installed", RIGHT) == "triton"
    assert kernels(OSError("libnvrtc.so.12: cannot open"), RIGHT) == "triton"
    assert "a first call failed with OSError: libnvrtc.so.12" in available_backends()["cupy"]
    assert kernels(WRONG, RIGHT) == "triton"
    assert "gave the spikes [0.0, 0.0] instead of [0.0, 1.0]" in available_backends()["cupy"]


@needs_kernel
def test_what_a_gpu_kernel_is_tried_with_spikes_once_in_a_right_one():
    assert operator._spikes_of_one_neuron("cpp", torch.device("cpu")) == [0.0, 1.0]


def test_auto_warns_once_where_no_kernel_works_and_not_of_a_call_that_none_runs(kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels("none", RIGHT, CUSTOM) == "eager"
    with pytest.warns(RuntimeWarning, match=r"backend='eager'.*pip install cupy.*C compiler"):
        assert kernels("pip install cupy", RuntimeError("no C compiler")) == "eager"
    assert choose_backend("auto", ON_GPU, Surrogate()) == "eager"  # a warning would be an error
    told = "\n".join(doctor._remedies(available_backends(), {}))
    assert "backend triton: a first call failed" in told or not torch.cuda.device_count()


def test_memory_that_is_short_says_nothing_of_a_kernel(kernels):
    with pytest.raises(torch.OutOfMemoryError):
        kernels(torch.OutOfMemoryError("CUDA out of memory"), RIGHT)


def test_nothing_is_tried_while_a_cuda_graph_is_captured(kernels, gpu):
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernels(RuntimeError("not permitted when stream is capturing"), RIGHT) == "cupy"
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose_backend("auto", ON_GPU, Surrogate()) == "triton"


def test_a_neuron_of_a_named_backend_is_built_without_touching_a_gpu(gpu):
    gpu.setattr(operator, "_failure", lambda name: pytest.fail("a GPU was touched"))
    for module in (cupy_launch, triton_launch):
        gpu.setattr(module, "unavailable_reason", lambda: None)
    for name in ("cupy", "triton"):
        assert DLIFNode(4, backend=name).backend == name
