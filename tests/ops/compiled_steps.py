"""A training step compiled against the same step uncompiled, in turn, on the CPU.

    OMP_NUM_THREADS=1 PYTHONPATH=../recipes python -m ops.compiled_steps small 32 11   # in tests/

The arguments are the network, the number of images and that of repetitions.

Times are those of the process, which other jobs of the machine disturb little, so one thread is
meant.
"""

import statistics
import sys
import time

import torch
from lab.benchmarking.networks import FUSED, convolutional_network
from torch import Tensor, nn

from sj_robust import SpikingClassifier
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.ops import keep_heap
from sj_robust.training.processes import compiled


def classifier(name: str, count: int) -> SpikingClassifier:
    torch.manual_seed(0)
    if name == "small":
        return build_classifier(NetworkSpec(image_shape=(3, 32, 32), channels=(32, 64, 128)))
    return SpikingClassifier(convolutional_network(name, FUSED, (4, count, 3, 32, 32)), T=4)


def step(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(x), y)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def main(name: str, count: int, repetitions: int) -> None:
    keep_heap()
    models = classifier(name, count), classifier(name, count)
    x = torch.rand(count, 3, 32, 32)
    y = torch.arange(count) % 10
    spent: tuple[list[float], list[float]] = [], []
    with compiled(models[1].net):
        start = time.perf_counter()
        first = step(models[1], x, y)
        print(f"first compiled step {time.perf_counter() - start:.0f} s")
        torch.testing.assert_close(first, step(models[0], x, y))
        for _ in range(repetitions):
            for model, times in zip(models, spent, strict=True):
                start = time.process_time()
                step(model, x, y)
                times.append(1e3 * (time.process_time() - start))
    plain, other = (statistics.median(times) for times in spent)
    print(
        f"{name}, {count} images: {plain:.1f} ms, compiled {other:.1f} ms, ratio "
        f"{other / plain:.3f}"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
