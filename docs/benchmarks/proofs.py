"""Processor time of proofs per image: intervals and joint bounds.

Examples:
    OMP_NUM_THREADS=1 python docs/benchmarks/proofs.py
    OMP_NUM_THREADS=1 python docs/benchmarks/proofs.py --rounds 3 --images 360
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.saved import markdown_table
from sj_robust.data import image_loader, load_images
from sj_robust.models import NetworkSpec, build_classifier, pretrained
from sj_robust.proofs import verify
from sj_robust.proofs.batches import Method


@dataclass(frozen=True)
class Row:
    """A call of ``verify`` on some images."""

    network: str
    method: Method
    call: Callable[[], object]
    images: int


def main() -> None:
    """Measure all rows in turns and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each row")
    parser.add_argument("--images", type=int, default=360, help="test images of the digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*digits(options.images), vgg()]
    seconds: list[list[float]] = [[] for _ in rows]
    for _ in range(options.rounds):
        for row, times in zip(rows, seconds, strict=True):
            start = time.process_time()
            row.call()
            times.append((time.process_time() - start) / row.images)
    lines = []
    for row, times in zip(rows, seconds, strict=True):
        found = [1e3 * each for each in times]
        median = f"{statistics.median(found):.2f}"
        spread = f"{min(found):.2f} - {max(found):.2f}"
        lines.append([row.network, row.method, str(row.images), median, spread])
    heads = ["network", "method", "images", "CPU ms per image, median", "least - most"]
    print(f"torch {torch.__version__}, one thread, {options.rounds} calls each")
    print(markdown_table(heads, lines, words=2))


def digits(number: int) -> list[Row]:
    """Networks of the digits, on the first test images."""
    trained = pretrained("digits/dlif-at-mppd").eval()
    torch.manual_seed(0)
    longer = build_classifier(NetworkSpec(neuron="lif", T=8)).eval()
    of_trained = partial(verified, "dlif-at-mppd, T = 4, eps 0.008", trained, 0.008)
    of_longer = partial(verified, "untrained LIF, T = 8, eps 0.004", longer, 0.004)
    return [
        of_trained("ibp", number),
        of_trained("joint", number),
        of_longer("ibp", number),
        of_longer("joint", number),
    ]


def verified(
    network: str, model: SpikingClassifier, eps: float, method: Method, number: int
) -> Row:
    """One call of ``verify`` on so many test images."""
    test = load_images("digits").test
    x, y = next(iter(image_loader(test, number)))
    call = partial(verify, model, x, y, eps, method=method)
    return Row(network, method, call, number)


def vgg() -> Row:
    """Intervals of one image of 3x32x32 through a network of SpikingJelly's model zoo."""
    torch.manual_seed(0)
    spec = NetworkSpec(name="zoo:spiking_vgg11_bn", neuron="lif", image_shape=(3, 32, 32), T=2)
    model = build_classifier(spec).eval()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        y = model(x).argmax(1)
    call = partial(verify, model, x, y, 1 / 255, method="ibp")
    return Row("spiking_vgg11_bn, T = 2, eps 1/255", "ibp", call, 1)


if __name__ == "__main__":
    main()
