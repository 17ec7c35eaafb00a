"""What can be measured: groups of methods that do the same work, and the peer their ratios refer
to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lab.benchmarking.layers import BATCH_NORM_LAYERS, INSTRUCTION_SETS, LAYERS, STAGES
from lab.benchmarking.networks import network_tasks
from lab.benchmarking.proving import PROVING
from lab.benchmarking.steps import STEP_PEERS, TRAINING_STEPS, adversarial_steps
from lab.benchmarking.task import Task
from sj_robust.ops.dlif import cpp


@dataclass(frozen=True)
class Benchmark:
    """Methods that do the same work.

    Attributes:
        methods: Makes the task of a method from the shape; raises ImportError or RuntimeError where
            it cannot run.
        peer: Method that ratios refer to; where each method has one of its own, what those are
            called together.
        shapes: Shapes of the documentation, [T, N, C, H, W].
        is_layer: Whether the bandwidth of the memory bounds it.
        has_one_graph: Whether the forward pass builds one graph, so that what it saves can be
            weighed; an attack builds others.
        peers: Methods that ratios refer to, by method, where they differ.
        variables: Environment variables of a method's process.
    """

    methods: Mapping[str, Callable[[Sequence[int]], Task]]
    peer: str
    shapes: tuple[tuple[int, ...], ...]
    is_layer: bool = False
    has_one_graph: bool = True
    peers: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def peer_of(self, method: str) -> str:
        """Method that the ratios of ``method`` refer to; a peer of several is its own."""
        return self.peers.get(method, method if self.peers else self.peer)


_LARGE = ((8, 64, 64, 32, 32), (8, 128, 256, 8, 8), (4, 64, 128, 8, 8))
_IMAGES = ((8, 16, 3, 32, 32),)

BENCHMARKS: dict[str, Benchmark] = {
    "neuron": Benchmark(LAYERS, "SpikingJelly LIFNode", _LARGE, is_layer=True),
    "batch_norm": Benchmark(BATCH_NORM_LAYERS, "batch norm, LIFNode", _LARGE, is_layer=True),
    "stage": Benchmark(STAGES, "batch norm, LIFNode, pooling", _LARGE, is_layer=True),
    "instruction_sets": Benchmark(
        INSTRUCTION_SETS,
        "avx512",
        _LARGE,
        is_layer=True,
        variables={name: {cpp.INSTRUCTION_SET_VARIABLE: name} for name in INSTRUCTION_SETS},
    ),
    "scaling": Benchmark(
        {name: LAYERS[name] for name in ("DLIF cpp", "DLIF eager")},
        "DLIF eager",
        (
            *((T, 32, 8192) for T in (1, 2, 4, 8, 16, 32, 64)),
            *((8, N, 8192) for N in (8, 16, 64, 128)),
        ),
        is_layer=True,
    ),
    "conv4": Benchmark(network_tasks("conv4"), "ReLU", _IMAGES),
    "vgg5": Benchmark(network_tasks("vgg5"), "ReLU", _IMAGES),
    **{
        f"{name}_adversarial": Benchmark(
            adversarial_steps(name), "published loop", shapes, has_one_graph=False
        )
        for name, shapes in (
            ("conv4", _IMAGES),
            ("vgg5", _IMAGES),
            ("small", ((4, 64, 3, 32, 32),)),
        )
    },
    "training_step": Benchmark(
        TRAINING_STEPS,
        "textbook loop",
        ((4, 64, 1, 28, 28),),
        has_one_graph=False,
        peers=STEP_PEERS,
    ),
    "verify": Benchmark(PROVING, "PGD-20", ((4, 1000, 1, 8, 8),), has_one_graph=False),
}
"""``neuron``, ``batch_norm`` and ``stage`` are single layers, ``instruction_sets`` and ``scaling``
are the neuron on each of them and over T and N; ``conv4`` (four stages) and ``vgg5`` are training
steps of networks on clean images, ``..._adversarial`` steps of adversarial training;
``training_step`` is the step of every training mode on a small network, each beside a textbook loop
with SpikingJelly's LIFNode, but for ``certified``, which has none; ``verify`` is a proof of every
image beside PGD on them.
"""


def check_instruction_set(name: str | None) -> None:
    """Raise ValueError for an instruction set that this processor does not run; None is the best
    one.
    """
    known = cpp.instruction_sets()
    if name is not None and name not in known:
        raise ValueError(
            f"--instruction-set must be one of {', '.join(known)} on this processor, got {name}"
        )
