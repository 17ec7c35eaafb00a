"""What can be measured: groups of methods that do the same work, and the peer their ratios refer
to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from lab.benchmarking.layers import (
    Layer,
    dlif,
    dlif_on,
    lif_node,
    lif_node_for_gpu,
    norse_cell,
    parametric_lif_node,
    relu,
    snntorch_leaky,
    textbook_loop,
)
from lab.benchmarking.networks import (
    FUSED,
    FUSED_ON_GPU,
    LIF_ON_GPU,
    NOTHING,
    PRECISIONS,
    NetworkTask,
    Precision,
)
from lab.benchmarking.steps import ProvingTask, adversarial_steps, mode_steps
from lab.benchmarking.task import Task
from sj_robust.ops.dlif import cpp


@dataclass(frozen=True)
class Benchmark:
    """Methods that do the same work.

    Attributes:
        methods: Makes the task of a method from the shape; raises ImportError where something is
            not installed.
        peer: Method that ratios refer to; where each method has one of its own, what those are
            called behind its name.
        shapes: Shapes of the documentation, [T, N, C, H, W] of currents or images.
        passes: Times that the tensor of that shape moves in a forward and a backward pass, if the
            memory bounds it; otherwise 0.
        element_bytes: Size of an element of that tensor.
        variables: Environment variables of a method's process.
    """

    methods: Mapping[str, Callable[[Sequence[int]], Task]]
    peer: str
    shapes: tuple[tuple[int, ...], ...]
    passes: int = 0
    element_bytes: int = 4
    variables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def peer_of(self, method: str) -> str:
        """Method that the ratios of ``method`` refer to; one without a peer is its own."""
        own = f"{method}, {self.peer}"
        if own in self.methods:
            return own
        return self.peer if self.peer in self.methods else method


_CPP, _EAGER, _AUTO = (partial(dlif, backend=name) for name in ("cpp", "eager", "auto"))
_LIF = "SpikingJelly LIFNode"

_NEURON = {
    "DLIF cpp": Layer(_CPP),
    "DLIF eager": Layer(_EAGER),
    "textbook loop": Layer(textbook_loop),
    _LIF: Layer(lif_node),
    "SpikingJelly ParametricLIFNode": Layer(parametric_lif_node),
    "snnTorch Leaky": Layer(snntorch_leaky, check="spikes"),  # these reset a step later
    "Norse LIFBoxCell": Layer(norse_cell, check="spikes"),
}
_BATCH_NORM = {
    "batch norm + DLIF, one pass": Layer(_CPP, norm=True, one_pass=True),
    "batch norm, DLIF cpp": Layer(_CPP, norm=True),
    "batch norm, ReLU": Layer(relu, norm=True, check="nothing"),
    "batch norm, LIFNode": Layer(lif_node, norm=True),
    "batch norm, textbook loop": Layer(textbook_loop, norm=True),
}


def _stages() -> dict[str, Layer]:
    """Stages by how their currents are stored, float32 and channels first if nothing is said."""
    stages: dict[str, Layer] = {}
    for name, layer in {
        "batch norm + DLIF + pooling, one pass": Layer(_CPP, norm=True, pools=True, one_pass=True),
        "batch norm, ReLU, pooling": Layer(relu, norm=True, pools=True, check="nothing"),
    }.items():
        stages[name] = layer
        stages[f"{name}, channels last"] = replace(layer, channels_last=True)
        half = replace(layer, dtype=torch.bfloat16)
        stages[f"{name}, bf16"] = half
        stages[f"{name}, bf16, channels last"] = replace(half, channels_last=True)
    stages["batch norm, LIFNode, pooling"] = Layer(lif_node, norm=True, pools=True)
    stages["batch norm, textbook loop, pooling"] = Layer(textbook_loop, norm=True, pools=True)
    return stages


def _network(architecture: str) -> Benchmark:
    """Training steps on clean images; those that need no compiler also in bfloat16."""
    plain = ("ReLU", FUSED, "DLIF cpp", "DLIF eager", _LIF, "textbook loop", NOTHING)
    methods = {name: partial(NetworkTask, architecture, name, Precision()) for name in plain}
    for name in (FUSED, "ReLU", NOTHING):
        for added, precision in PRECISIONS.items():
            methods[name + added] = partial(NetworkTask, architecture, name, precision)
    return Benchmark(methods, "ReLU", _IMAGES)


def _adversarial(architecture: str, shapes: tuple[tuple[int, ...], ...]) -> Benchmark:
    return Benchmark(adversarial_steps(architecture), "published loop", shapes)


_LARGE = ((8, 64, 64, 32, 32), (8, 128, 256, 8, 8), (4, 64, 128, 8, 8))
_IMAGES = ((8, 16, 3, 32, 32),)
_SCALES = (
    *((T, 32, 8192) for T in (1, 2, 4, 8, 16, 32, 64)),
    *((8, N, 8192) for N in (8, 16, 64, 128)),
)
_SETS = tuple(reversed(cpp.INSTRUCTION_SETS))

BENCHMARKS: dict[str, Benchmark] = {
    "neuron": Benchmark(_NEURON, _LIF, _LARGE, passes=5),
    "batch_norm": Benchmark(_BATCH_NORM, "batch norm, LIFNode", _LARGE, passes=5),
    "stage": Benchmark(_stages(), "batch norm, LIFNode, pooling", _LARGE, passes=5),
    "instruction_sets": Benchmark(
        {name: Layer(partial(dlif_on, instruction_set=name)) for name in _SETS},
        "avx512",
        _LARGE,
        passes=5,
        variables={name: {cpp.INSTRUCTION_SET_VARIABLE: name} for name in _SETS},
    ),
    "scaling": Benchmark(
        {name: _NEURON[name] for name in ("DLIF cpp", "DLIF eager")},
        "DLIF eager",
        _SCALES,
        passes=5,
    ),
    "conv4": _network("conv4"),
    "vgg5": _network("vgg5"),
    "conv4_adversarial": _adversarial("conv4", _IMAGES),
    "vgg5_adversarial": _adversarial("vgg5", _IMAGES),
    "small_adversarial": _adversarial("small", ((4, 64, 3, 32, 32),)),
    "training_step": Benchmark(mode_steps(), "textbook loop", ((4, 64, 1, 28, 28),)),
    "verify": Benchmark(
        {"verify": partial(ProvingTask, True), "PGD-20": partial(ProvingTask, False)},
        "PGD-20",
        ((4, 1000, 1, 8, 8),),
    ),
}
"""``neuron``, ``batch_norm`` and ``stage`` are single layers, ``instruction_sets`` and ``scaling``
are the neuron on each of them and over T and N; ``conv4`` (four stages) and ``vgg5`` are training
steps of networks on clean images, ``..._adversarial`` steps of adversarial training;
``training_step`` is the step of every training mode on a small network, each beside a textbook loop
with SpikingJelly's LIFNode, but for ``certified``, which has none; ``verify`` is a proof of every
image beside PGD on them.
"""

_GPU_LAYERS = {
    "DLIF cupy": Layer(partial(dlif, backend="cupy")),
    "DLIF triton": Layer(partial(dlif, backend="triton")),
    "DLIF eager": Layer(_EAGER),
    "textbook loop": Layer(textbook_loop),
    LIF_ON_GPU: Layer(lif_node_for_gpu),
    _LIF: Layer(lif_node),
}
_GPU_BATCH_NORM = {
    "batch norm + DLIF, one pass": Layer(partial(dlif, backend="triton"), norm=True, one_pass=True),
    "batch norm, DLIF auto": Layer(_AUTO, norm=True),
    "batch norm, ReLU": Layer(relu, norm=True, check="nothing"),
    f"batch norm, {LIF_ON_GPU}": Layer(lif_node_for_gpu, norm=True),
    f"batch norm, {_LIF}": Layer(lif_node, norm=True),
    "batch norm, textbook loop": Layer(textbook_loop, norm=True),
}
_GPU_NEURONS = (FUSED_ON_GPU, "DLIF auto", "ReLU", LIF_ON_GPU, _LIF, "DLIF eager", "textbook loop")
_LARGE_ON_GPU = (8, 64, 128, 32, 32)  # 67 M currents, 0.27 GB in float32
_TRITON = {"SJ_LIF_CUDA_IMPLEMENTATION": "triton"}  # which SpikingJelly 2.x reads when imported


def gpu_benchmarks() -> dict[str, Benchmark]:
    """What is measured on a GPU, by name: a layer, a batch norm with a layer, a training step of
    VGG-11.

    A layer reads the currents and writes the spikes, and back it reads both and writes a gradient:
    5 passes. Batch norm reads its input once more for the statistics, and input and gradient once
    more on the way back: 8.
    """
    found: dict[str, Benchmark] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        added = "" if dtype == torch.float32 else f"_{dtype}".replace("torch.", "")
        small = () if added else ((4, 64, 128, 8, 8), (32, 32, 64, 32, 32))
        for name, layers, peer, passes in (
            ("gpu_layer", _GPU_LAYERS, LIF_ON_GPU, 5),
            ("gpu_batch_norm", _GPU_BATCH_NORM, f"batch norm, {LIF_ON_GPU}", 8),
        ):
            found[name + added] = Benchmark(
                {method: _stored(layer, dtype) for method, layer in layers.items()},
                peer,
                (_LARGE_ON_GPU, *small),
                passes=passes,
                element_bytes=dtype.itemsize,
                variables={peer: _TRITON},
            )
    for added, precision in PRECISIONS.items():
        name = "gpu_vgg11" + added.replace(", ", "_").replace(" ", "_")
        found[name] = Benchmark(
            {neuron: partial(NetworkTask, "vgg11", neuron, precision) for neuron in _GPU_NEURONS},
            LIF_ON_GPU,
            ((4, 64, 3, 32, 32),),
            variables={LIF_ON_GPU: _TRITON},
        )
    return found


def _stored(layer: Layer, dtype: torch.dtype) -> Layer:
    """SpikingJelly's neurons round their potential to half precision, so their spikes are others
    there.
    """
    from_host = layer.node in (lif_node, lif_node_for_gpu)
    if from_host and dtype != torch.float32:
        return replace(layer, dtype=dtype, check="spikes")
    return replace(layer, dtype=dtype)


GPU_BENCHMARKS = gpu_benchmarks()
