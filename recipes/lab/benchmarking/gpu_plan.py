"""What the first hour on a GPU measures: parts, their methods, and the cases of each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lab.benchmarking.layers import (
    Build,
    LayerTask,
    alone,
    behind_batch_norm,
    dlif,
    lif_node,
    lif_node_for_gpu,
)
from lab.benchmarking.networks import FUSED_AUTO, PRECISIONS, NetworkTask
from lab.benchmarking.task import Task
from sj_robust.ops import Surrogate
from sj_robust.ops.bn_dlif import BatchNorm, can_fuse

COPY = "copy"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SJ_TRITON = {
    "SJ_LIF_CUDA_IMPLEMENTATION": "triton"
}  # which SpikingJelly 2.x reads when it is imported

Cases = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Part:
    """Methods that do the same work.

    Attributes:
        make: Makes the task of a method, a precision and a shape.
        methods: Names of the methods.
        cases: Precisions, names in :data:`DTYPES` or of a network's, and shapes [T, N, C, H, W] of
            currents or images, in the order in which they are measured.
        peers: Methods that times are compared with.
        passes: Times that the tensor of the part has to move in a forward and a backward pass; NaN
            for networks.
        variables: Environment variables of a method's process.
    """

    make: Callable[[str, str, Sequence[int]], Task]
    methods: tuple[str, ...]
    cases: Cases
    peers: tuple[str, ...]
    passes: float = math.nan
    variables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class CopyTask(Task):
    """A copy of the tensor, which reads and writes it once: the speed of the memory."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Make both tensors on torch's default device."""
        self._source, self._target = (
            torch.ones(tuple(shape), dtype=dtype),
            torch.zeros(tuple(shape), dtype=dtype),
        )
        self.tensor_bytes = self._source.nbytes
        self.inputs = [self._source]

    def forward(self) -> Tensor:
        """The copy."""
        return self._target.copy_(self._source)


_DLIF: dict[str, Callable[[int], nn.Module]] = {
    "DLIF cupy": partial(dlif, backend="cupy"),
    "DLIF triton": partial(dlif, backend="triton"),
    "DLIF eager": partial(dlif, backend="eager"),
    "textbook loop": partial(dlif, backend="reference"),
}
_HOST = {
    "SpikingJelly LIFNode, GPU": lif_node_for_gpu,
    "SpikingJelly LIFNode, its choice": lif_node,
}
_LAYERS: dict[str, Build] = {name: alone(node) for name, node in (_DLIF | _HOST).items()}
_BEHIND = "batch norm, "
_ONE_PASS = "batch norm + DLIF, one pass"
_BEHIND_BATCH_NORM: dict[str, Build] = {
    _ONE_PASS: behind_batch_norm(partial(dlif, backend="auto"), fused=True),
    "batch norm, DLIF auto": behind_batch_norm(partial(dlif, backend="auto")),
    "batch norm, ReLU": behind_batch_norm(lambda T: nn.ReLU()),
    **{_BEHIND + name: behind_batch_norm(node) for name, node in _HOST.items()},
    "batch norm, textbook loop": behind_batch_norm(partial(dlif, backend="reference")),
}


def _check_one_pass(shape: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse what would run apart without a word."""
    norm = BatchNorm(
        torch.ones(shape[2]), torch.zeros(shape[2]), None, None, use_batch_statistics=True
    )
    if not can_fuse(torch.empty(shape[0], 2, *shape[2:], dtype=dtype), norm, Surrogate()):
        device = torch.get_default_device()
        raise NotImplementedError(
            f"batch norm and DLIF do not run in one pass on {device} in {dtype} here"
        )


def _layer(
    layers: Mapping[str, Build], textbook: str, method: str, precision: str, shape: Sequence[int]
) -> Task:
    dtype = DTYPES[precision]
    if method == COPY:
        return CopyTask(shape, dtype)
    if method == _ONE_PASS:
        _check_one_pass(shape, dtype)
    # SpikingJelly's neuron rounds its potential to half precision, so its spikes are others there
    unlike = "ReLU" in method or ("SpikingJelly" in method and dtype != torch.float32)
    reference, rounds = None if unlike else layers[textbook], method != _ONE_PASS
    task = LayerTask(method, layers[method], reference, shape, dtype=dtype, rounds=rounds)
    task.tensor_bytes = math.prod(shape) * dtype.itemsize
    return task


def _network(architecture: str, method: str, precision: str, shape: Sequence[int]) -> Task:
    if method == FUSED_AUTO:
        _check_one_pass(
            (shape[0], 1, 64, *shape[3:]),
            torch.float32 if precision == "float32" else torch.bfloat16,
        )
    added = precision.removeprefix("float32").replace("bfloat16", ", bf16")
    return NetworkTask(architecture, method, shape, **PRECISIONS[added])


def network_part(architecture: str, shape: tuple[int, ...]) -> Part:
    """Training steps of a network, which are bound by its convolutions: ReLU tells by how much."""
    return Part(
        partial(_network, architecture),
        (FUSED_AUTO, "DLIF auto", "ReLU", *_HOST, "DLIF eager", "textbook loop"),
        tuple(
            (precision, shape) for precision in ("float32", "bfloat16", "bfloat16, channels last")
        ),
        peers=("SpikingJelly LIFNode, GPU", "textbook loop", "ReLU"),
        variables={"SpikingJelly LIFNode, GPU": _SJ_TRITON},
    )


def layer_parts(cases: Cases) -> dict[str, Part]:
    """The neuron alone, and behind a batch norm in training mode.

    A layer reads the currents and writes the spikes, and back it reads both and writes a gradient:
    5 passes. Batch norm reads its input once more for the statistics, and input and gradient once
    more on the way back: 8.
    """
    return {
        "layer": Part(
            partial(_layer, _LAYERS, "textbook loop"),
            (COPY, *_LAYERS),
            cases,
            peers=("SpikingJelly LIFNode, GPU", "DLIF eager", "textbook loop"),
            passes=5,
            variables={"SpikingJelly LIFNode, GPU": _SJ_TRITON},
        ),
        "batch norm + layer": Part(
            partial(_layer, _BEHIND_BATCH_NORM, "batch norm, textbook loop"),
            (COPY, *_BEHIND_BATCH_NORM),
            cases,
            peers=("batch norm, SpikingJelly LIFNode, GPU", "batch norm, textbook loop"),
            passes=8,
            variables={"batch norm, SpikingJelly LIFNode, GPU": _SJ_TRITON},
        ),
    }


_LARGE = (8, 128, 128, 32, 32)  # 134 M currents, 0.5 GB in float32

PLAN: dict[str, Part] = {
    **layer_parts(
        (
            *((precision, _LARGE) for precision in DTYPES),
            ("float32", (4, 64, 128, 8, 8)),  # 2 M currents: the time to launch shows
            ("float32", (32, 32, 64, 32, 32)),
        )
    ),
    "VGG-11 training step": network_part("vgg11", (4, 64, 3, 32, 32)),
}
"""The parts in the order in which they are measured."""
