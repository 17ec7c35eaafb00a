"""Processor time of proofs per image: intervals and joint bounds.

OMP_NUM_THREADS=1 python recipes/studies/proof_times.py --rounds 3

It prints the table of benchmarks/index.md.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import torch
import tyro
from tables import first_images

from sj_robust.core.saved import markdown_table
from sj_robust.models import NetworkSpec, build_classifier, pretrained
from sj_robust.proofs import verify

METHODS: tuple[Literal["ibp", "joint"], ...] = ("ibp", "joint")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    rounds: int = 3
    images: int = 360
    zoo: str = "zoo:spiking_vgg11_bn"


def main(options: Options) -> None:
    """Measure all rows in turns and print them."""
    x, y = first_images("digits", options.images)
    torch.manual_seed(0)
    longer = build_classifier(NetworkSpec(neuron="lif", T=8)).eval()
    trained = pretrained("digits/dlif-at-mppd")
    spec = NetworkSpec(name=options.zoo, neuron="lif", image_shape=(3, 32, 32), T=2)
    zoo = build_classifier(spec).eval()
    one = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        label = zoo(one).argmax(1)
    calls: dict[tuple[str, str], tuple[Callable[[], object], int]] = {}
    for method in METHODS:
        of_trained = partial(verify, trained, x, y, 0.008, method=method)
        calls["dlif-at-mppd, T = 4, eps 0.008", method] = (of_trained, len(y))
        of_longer = partial(verify, longer, x, y, 0.004, method=method)
        calls["untrained LIF, T = 8, eps 0.004", method] = (of_longer, len(y))
    of_zoo = partial(verify, zoo, one, label, 1 / 255, method="ibp")
    calls[f"{options.zoo}, T = 2, eps 1/255", "ibp"] = (of_zoo, 1)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, (call, images) in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(1e3 * (time.process_time() - start) / images)
    cells = []
    for name, found in sorted(seconds.items()):
        spread = f"{min(found):.2f} - {max(found):.2f}"
        cells.append([*name, str(calls[name][1]), f"{median(found):.2f}", spread])
    heads = ["network", "method", "images", "CPU ms per image, median", "least - most"]
    print(markdown_table(heads, cells, words=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Options))
