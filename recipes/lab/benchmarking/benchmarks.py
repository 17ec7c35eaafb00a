"""What can be measured: groups of methods that do the same work, and the peer their ratios refer
to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from lab.benchmarking.layers import (
    Layer,
    Shape,
    Task,
    dlif,
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
    LIF_ON_GPU,
    NOTHING,
    PRECISIONS,
    NetworkTask,
    Precision,
)
from lab.benchmarking.steps import adversarial_steps, joint_steps, mode_steps


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
        cpu_time: Whether times are those of the processor, on one thread, which other processes of
            a busy machine hardly change.
        variables: Environment variables of a method's process.
    """

    methods: Mapping[str, Callable[[Shape], Task]]
    peer: str
    shapes: tuple[tuple[int, ...], ...]
    passes: int = 0
    element_bytes: int = 4
    cpu_time: bool = False
    variables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def peer_of(self, method: str) -> str:
        """Method that the ratios of ``method`` refer to; one without a peer is its own."""
        own = f"{method}, {self.peer}"
        if own in self.methods:
            return own
        return self.peer if self.peer in self.methods else method


_CPP = partial(dlif, backend="cpp")
_EAGER = partial(dlif, backend="eager")
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


_FUSED_STAGE = Layer(_CPP, norm=True, pools=True, one_pass=True)
_RELU_STAGE = Layer(relu, norm=True, pools=True, check="nothing")


def _ways_to_store(name: str, layer: Layer) -> dict[str, Layer]:
    """A stage by how its currents are stored, float32 and channels first if nothing is said."""
    half = replace(layer, dtype=torch.bfloat16)
    return {
        name: layer,
        f"{name}, channels last": replace(layer, channels_last=True),
        f"{name}, bf16": half,
        f"{name}, bf16, channels last": replace(half, channels_last=True),
    }


_STAGE = {
    **_ways_to_store("batch norm + DLIF + pooling, one pass", _FUSED_STAGE),
    **_ways_to_store("batch norm, ReLU, pooling", _RELU_STAGE),
    "batch norm, LIFNode, pooling": Layer(lif_node, norm=True, pools=True),
    "batch norm, textbook loop, pooling": Layer(textbook_loop, norm=True, pools=True),
}


def _network(architecture: str) -> Benchmark:
    """Training steps on clean images, some of them also in bfloat16."""
    make = partial(NetworkTask, architecture)
    methods = {}
    for name in ("ReLU", FUSED, "DLIF cpp", "DLIF eager", _LIF, "textbook loop", NOTHING):
        methods[name] = partial(make, name, Precision())
    for name in (FUSED, "ReLU", NOTHING):
        for added, precision in PRECISIONS.items():
            methods[name + added] = partial(make, name, precision)
    return Benchmark(methods, peer="ReLU", shapes=(_IMAGES,))


def _adversarial(architecture: str) -> Benchmark:
    return Benchmark(adversarial_steps(architecture), peer="published loop", shapes=(_IMAGES,))


_LARGE = (
    (8, 64, 64, 32, 32),
    (8, 128, 256, 8, 8),
    (4, 64, 128, 8, 8),
)
_IMAGES = (8, 16, 3, 32, 32)

BENCHMARKS: dict[str, Benchmark] = {
    "neuron": Benchmark(_NEURON, peer=_LIF, shapes=_LARGE, passes=5),
    "batch_norm": Benchmark(_BATCH_NORM, peer="batch norm, LIFNode", shapes=_LARGE, passes=5),
    "stage": Benchmark(_STAGE, peer="batch norm, LIFNode, pooling", shapes=_LARGE, passes=5),
    "conv4": _network("conv4"),
    "vgg5": _network("vgg5"),
    "conv4_adversarial": _adversarial("conv4"),
    "vgg5_adversarial": _adversarial("vgg5"),
    "training_step": Benchmark(mode_steps(), peer="textbook loop", shapes=((4, 64, 1, 28, 28),)),
    "joint_step": Benchmark(
        joint_steps(),
        peer="adversarial",
        shapes=((4, 64, 1, 8, 8), (8, 64, 1, 8, 8)),
        cpu_time=True,
    ),
}
"""``neuron``, ``batch_norm`` and ``stage`` are single layers; ``conv4`` (four stages) and ``vgg5``
are training steps of networks on clean images, ``..._adversarial`` steps of adversarial training;
``training_step`` is the step of every training mode on a small network, each beside a textbook loop
with SpikingJelly's LIFNode, but for ``certified``, which has none; ``joint_step`` is the step of
the preset ``digits_joint`` beside adversarial ones, in processor time.
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
    "batch norm, DLIF auto": Layer(partial(dlif, backend="auto"), norm=True),
    "batch norm, ReLU": Layer(relu, norm=True, check="nothing"),
    f"batch norm, {LIF_ON_GPU}": Layer(lif_node_for_gpu, norm=True),
    f"batch norm, {_LIF}": Layer(lif_node, norm=True),
    "batch norm, textbook loop": Layer(textbook_loop, norm=True),
}
_GPU_NEURONS = ("DLIF auto", "ReLU", LIF_ON_GPU, _LIF, "DLIF eager", "textbook loop")
_GPU_SHAPES = (
    (8, 64, 128, 32, 32),  # 67 M currents, 0.27 GB in float32
    (4, 64, 128, 8, 8),  # 2 M: the time to launch shows
    (32, 32, 64, 32, 32),
)
_IN_TRITON = {"SJ_LIF_CUDA_IMPLEMENTATION": "triton"}  # which SpikingJelly 2.x reads


def _gpu_layers(
    layers: Mapping[str, Layer], peer: str, passes: int, dtype: torch.dtype = torch.float32
) -> Benchmark:
    """Layers whose currents are stored in a dtype."""
    return Benchmark(
        methods={name: _stored(layer, dtype) for name, layer in layers.items()},
        peer=peer,
        shapes=_GPU_SHAPES,
        passes=passes,
        element_bytes=dtype.itemsize,
        variables={peer: _IN_TRITON},
    )


_gpu_layer = partial(_gpu_layers, _GPU_LAYERS, LIF_ON_GPU, 5)
"""A layer reads the currents and writes the spikes, and back it reads both and writes a gradient: 5
passes.
"""
_gpu_batch_norm = partial(_gpu_layers, _GPU_BATCH_NORM, f"batch norm, {LIF_ON_GPU}", 8)
"""Batch norm reads its input once more for the statistics, and input and gradient once more on the
way back: 8 passes.
"""


def _stored(layer: Layer, dtype: torch.dtype) -> Layer:
    """SpikingJelly's neurons round their potential to half precision, so their spikes are others
    there.
    """
    if dtype != torch.float32 and layer.node in (lif_node, lif_node_for_gpu):
        return replace(layer, dtype=dtype, check="spikes")
    return replace(layer, dtype=dtype)


def _gpu_network(added: str) -> Benchmark:
    make = partial(NetworkTask, "vgg11", precision=PRECISIONS[added])
    return Benchmark(
        methods={neuron: partial(make, neuron) for neuron in _GPU_NEURONS},
        peer=LIF_ON_GPU,
        shapes=((4, 64, 3, 32, 32),),
        variables={LIF_ON_GPU: _IN_TRITON},
    )


GPU_BENCHMARKS: dict[str, Benchmark] = {
    "gpu_layer": _gpu_layer(),
    "gpu_layer_fp16": _gpu_layer(torch.float16),
    "gpu_layer_bf16": _gpu_layer(torch.bfloat16),
    "gpu_batch_norm": _gpu_batch_norm(),
    "gpu_batch_norm_fp16": _gpu_batch_norm(torch.float16),
    "gpu_batch_norm_bf16": _gpu_batch_norm(torch.bfloat16),
    "gpu_vgg11": _gpu_network(""),
    "gpu_vgg11_bf16": _gpu_network(", bf16"),
    "gpu_vgg11_bf16_channels_last": _gpu_network(", bf16, channels last"),
}
"""What is measured on a GPU, in this order: a layer, a batch norm with a layer, a training step."""
