"""What is timed, and what its passes come to."""

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Task:
    """One method at one shape, ready to run.

    Attributes:
        tensor_bytes: Size of what memory is compared with: the input currents of a layer, the
            frames of a network.
        inputs: Tensors that are there before the forward pass.
    """

    tensor_bytes: int
    inputs: list[Tensor]

    def forward(self) -> Any:
        """Forward pass; what it returns keeps the graph."""
        raise NotImplementedError

    def backward(self, result: Any) -> None:
        """Backward pass of what :meth:`forward` returned, and the step of the optimizer, if there
        are any.
        """

    def check(self) -> None:
        """Raise ValueError if the method is wrong; one that there is nothing to compare with is
        right.
        """


def times_of(passes: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Median, quartiles and best of forward plus backward, and the medians of both, from pairs of
    them.
    """
    totals = [forward + backward for forward, backward in passes]
    quartile1, median, quartile3 = statistics.quantiles(totals, method="inclusive")
    forward, backward = (statistics.median(times) for times in zip(*passes, strict=True))
    return {
        "median": median,
        "quartile1": quartile1,
        "quartile3": quartile3,
        "best": min(totals),
        "forward": forward,
        "backward": backward,
    }
