"""CPU time of an evaluation, and where it goes: forwards and backwards of its attacks, proofs, and
all else.

Examples:
    python docs/benchmarks/evaluation.py
    python docs/benchmarks/evaluation.py --suite standard --images 120 --keep-heap
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import Report, evaluate
from sj_robust.evaluation.run import proofs
from sj_robust.models import pretrained
from sj_robust.ops import keep_heap


@dataclass
class Part:
    """Calls of one kind, and CPU seconds spent in them."""

    calls: int = 0
    seconds: float = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are counted and timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls += 1
                self.seconds += time.process_time() - start

        return run


@dataclass
class Parts:
    """What an evaluation spends its time on."""

    forwards: Part = field(default_factory=Part)
    backwards: Part = field(default_factory=Part)
    proofs: Part = field(default_factory=Part)

    @contextmanager
    def measured(self, network: nn.Module) -> Iterator[None]:
        """Context in which calls of a network, of ``torch.autograd.grad`` and of ``verify`` are
        timed.

        What proofs call belongs to the proofs.
        """
        grad, verify, forward = torch.autograd.grad, proofs.verify, network.forward
        network.forward = self.forwards.timed(forward)
        torch.autograd.grad = self.backwards.timed(grad)

        def alone(*args: Any, **kwargs: Any) -> Any:
            network.forward, torch.autograd.grad = forward, grad
            try:
                return verify(*args, **kwargs)
            finally:
                network.forward = self.forwards.timed(forward)
                torch.autograd.grad = self.backwards.timed(grad)

        proofs.verify = self.proofs.timed(alone)
        try:
            yield
        finally:
            torch.autograd.grad, proofs.verify = grad, verify
            del network.forward


def images_of(dataset: str, count: int) -> tuple[Tensor, Tensor]:
    """The first test images and their labels."""
    test = load_images(dataset, test_limit=count).test
    x, y = next(iter(image_loader(test, count)))
    return x, y


def evaluated(network: nn.Module, arguments: argparse.Namespace) -> Report:
    """The report on the first images."""
    x, y = images_of("digits", arguments.images)
    return evaluate(network, x, y, eps=arguments.eps, suite=arguments.suite, progress=False)


def main() -> None:
    """Evaluate once and print a table."""
    imported = time.process_time()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="digits/dlif-at-mppd")
    parser.add_argument("--suite", default="fast")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--keep-heap", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.keep_heap:
        keep_heap()
    network = pretrained(arguments.network)
    parts = Parts()
    start = time.process_time()
    with parts.measured(network):
        report = evaluated(network, arguments)
    seconds = time.process_time() - start
    of_parts = parts.forwards.seconds + parts.backwards.seconds + parts.proofs.seconds
    print("| part | calls | CPU seconds |\n|---|---|---|")
    print(f"| imports | | {imported:.2f} |")
    for name, part in vars(parts).items():
        print(f"| {name} | {part.calls} | {part.seconds:.2f} |")
    print(f"| all else of `evaluate` | | {seconds - of_parts:.2f} |")
    print(f"| `evaluate` | | {seconds:.2f} |")
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"\nprocess: {used.ru_utime:.2f} s user, {used.ru_stime:.2f} s system")
    print(report.verdict)


if __name__ == "__main__":
    main()
