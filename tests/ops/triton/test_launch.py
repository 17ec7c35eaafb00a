"""The launcher's Python without a GPU: what is missing is told, what works is chosen, work is cut
as it should be.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch

from sj_robust import doctor
from sj_robust.neuron import DLIFNode
from sj_robust.ops import Surrogate, available_backends
from sj_robust.ops.dlif import cupy_launch, operator, triton_launch
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients
from sj_robust.ops.dlif.operator import check_backend, choose_backend

CONFIG = DLIFConfig(0.5, 1.0, 0.0, Surrogate(), False)
F32 = torch.float32
BF16 = torch.bfloat16
X = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)


def test_without_triton_the_named_backend_gives_one_error_with_its_remedy(gpu, import_that_raises):
    import_that_raises(
        triton_launch, ModuleNotFoundError("No module named 'triton'", name="triton")
    )
    with pytest.raises(
        RuntimeError,
        match=r"backend='triton' is not available: Triton is not installed.*pip install",
    ):
        DLIFNode(4, backend="triton")
    gpu.setattr(
        torch.version, "cuda", None
    )  # then this is what is wrong, since CUDA builds bring Triton
    with pytest.raises(
        RuntimeError,
        match="built without CUDA; install a CUDA build of torch; or use backend='auto'",
    ):
        check_backend("triton")


@pytest.mark.parametrize(
    ("launcher", "package"), [(triton_launch, "Triton"), (cupy_launch, "CuPy")]
)
@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'x'", name="x"),
        OSError("libtriton.so: undefined symbol"),
        AttributeError("module 'numpy' has no attribute 'int'"),
    ],
)
def test_import_that_fails_is_not_called_not_installed(
    gpu, import_that_raises, launcher, package, error
):
    import_that_raises(launcher, error)
    reason = launcher.unavailable_reason()
    assert f"{package} is installed, but importing it failed" in reason
    assert str(error) in reason
    assert ("cupy-cuda13x[ctk]" in reason) == (package == "CuPy")


def test_a_cpu_gets_the_kernels_from_the_interpreter_alone():
    assert triton_launch.unavailable_reason() is not None or torch.cuda.is_available()
    found = triton_launch.unsupported_reason(torch.zeros(2, 3), Surrogate())
    assert found is not None


def test_what_the_kernel_does_not_know_is_refused():
    assert triton_launch.unsupported_reason(X, Surrogate()) is None
    wide = SimpleNamespace(device=X.device, dtype=torch.float64)
    assert "must be float32, float16 or bfloat16" in triton_launch.unsupported_reason(
        wide, Surrogate()
    )
    own = Surrogate("custom", function=torch.sigmoid)
    assert "got 'custom'" in triton_launch.unsupported_reason(X, own)


def spikes_as(found):
    def forward(inputs, outputs):
        if isinstance(found, Exception):
            raise found
        outputs.spike_seq.copy_(torch.tensor(found))

    return forward


@pytest.fixture
def kernels(gpu):
    """What a first call of CuPy and of Triton gives, and what ``auto`` chooses then."""
    gpu.setattr(torch, "tensor", lambda *args, make=torch.tensor, **kwargs: make(*args))
    gpu.setattr(torch, "ones", lambda *args, make=torch.ones, **kwargs: make(*args))

    def chosen(cupy, triton, surrogate=Surrogate()):  # noqa: B008  # it cannot be changed
        for module, found in ((cupy_launch, cupy), (triton_launch, triton)):
            gpu.setattr(
                module,
                "unavailable_reason",
                lambda found=found: found if isinstance(found, str) else None,
            )
            gpu.setattr(module, "forward", spikes_as(found))
        operator._failure.cache_clear()
        return choose_backend("auto", X, surrogate)

    return chosen


RIGHT = [[0.0], [1.0]]
WRONG = [[0.0], [0.0]]


def test_auto_takes_cupy_and_then_triton_where_they_work(kernels):
    assert kernels(RIGHT, RIGHT) == "cupy"
    assert kernels("CuPy is not installed", RIGHT) == "triton"
    assert kernels(OSError("libnvrtc.so.12: cannot open shared object file"), RIGHT) == "triton"
    assert "a first call failed with OSError: libnvrtc.so.12" in available_backends()["cupy"]
    assert kernels(WRONG, RIGHT) == "triton"
    assert "gave the spikes [0.0, 0.0] instead of [0.0, 1.0]" in available_backends()["cupy"]


def test_auto_warns_once_where_no_kernel_works(kernels):
    with pytest.warns(
        RuntimeWarning, match=r"backend='eager', which is slow.*pip install \"cupy.*C compiler"
    ):
        assert (
            kernels('CuPy is not installed; pip install "cupy-x"', RuntimeError("no C compiler"))
            == "eager"
        )
    assert choose_backend("auto", X, Surrogate()) == "eager"  # a warning would be an error here
    assert "backend triton: a first call failed" in "\n".join(
        doctor._remedies(available_backends(), {})
    ) or (torch.cuda.device_count() == 0)


def test_a_call_that_no_kernel_runs_is_not_warned_of(kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels("none", RIGHT, Surrogate("custom", function=torch.sigmoid)) == "eager"


def test_memory_that_is_short_says_nothing_of_a_kernel(kernels):
    with pytest.raises(torch.OutOfMemoryError):
        kernels(torch.OutOfMemoryError("CUDA out of memory"), RIGHT)


def test_nothing_is_tried_while_a_cuda_graph_is_captured(kernels, gpu):
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    broken = RuntimeError("operation not permitted when stream is capturing")
    assert kernels(broken, RIGHT) == "cupy"
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose_backend("auto", X, Surrogate()) == "triton"


@pytest.mark.parametrize(("steps", "dtype"), [(1, F32), (16, BF16), (17, BF16), (100, F32)])
def test_segments_cover_the_sequence_and_threads_move_at_most_16_bytes(steps, dtype):
    for make in (triton_launch.forward_plan, triton_launch.backward_plan):
        plan = make(dtype, steps, CONFIG)
        assert steps == plan.FIRST + plan.LATER * plan.SEGMENT
        assert (plan.LATER == 0) == (steps <= triton_launch.LONGEST_SEQUENCE_IN_REGISTERS)
        assert plan.BLOCK // (32 * plan.warps) * dtype.itemsize in (4, 8, 16)
        assert plan.programs(3 * plan.BLOCK + 1) == 4


@pytest.mark.parametrize("launcher", [triton_launch, cupy_launch])
def test_no_neurons_no_launch(launcher, import_that_raises):
    import_that_raises(launcher, AssertionError("a kernel is asked for"))
    inputs = Inputs(torch.zeros(3, 0), torch.ones(3), None, CONFIG)
    spikes, v, v_seq = operator.forward(launcher, inputs, True)
    assert (spikes.shape, v.shape, v_seq.shape) == ((3, 0), (0,), (3, 0))
    grads = operator.backward(launcher, inputs, OutputGradients(inputs.x_seq), True)
    found = [tuple(grad.shape) for grad in grads]
    assert found == [(3, 0), (3,), (0,)]
    assert torch.equal(grads[1], torch.zeros(3))


def test_a_variant_that_spills_gets_more_registers_from_its_next_launch_on(monkeypatch):
    monkeypatch.setattr(triton_launch, "_register_limits", {})
    given = []

    class Kernel:
        def __getitem__(self, grid):
            return self.launch

        def launch(self, x, *, STEPS, num_warps, enable_fp_fusion, maxnreg):
            given.append((x.dtype, STEPS, maxnreg))
            needed = 100 if STEPS == 8 and x.dtype == F32 else 40
            registers = min(needed, maxnreg or 72)
            return SimpleNamespace(n_regs=registers, n_spills=needed - registers)

    kernel = Kernel()
    for dtype, steps in [
        (F32, 8),
        (F32, 4),
        (BF16, 8),
        (F32, 8),
        (F32, 8),
        (F32, 8),
        (F32, 4),
        (BF16, 8),
    ]:
        x = torch.zeros(2, dtype=dtype)
        triton_launch.launch(kernel, 3, constants={"STEPS": steps}, warps=1, x=x)
    found = [limit for dtype, steps, limit in given if (dtype, steps) == (F32, 8)]
    assert found == [
        None,
        88,
        104,
        104,
    ]
    found = {limit for dtype, steps, limit in given if (dtype, steps) != (F32, 8)}
    assert found == {None}
    assert triton_launch.limit_above(250) == 255


def test_a_neuron_of_a_named_backend_is_built_without_touching_a_gpu(gpu):
    gpu.setattr(operator, "_failure", lambda name: pytest.fail("a GPU was touched"))
    for module in (cupy_launch, triton_launch):
        gpu.setattr(module, "unavailable_reason", lambda: None)
    found = [DLIFNode(4, backend=name).backend for name in ("cupy", "triton")]
    assert found == ["cupy", "triton"]
