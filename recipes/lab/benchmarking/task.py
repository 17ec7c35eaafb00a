"""What is timed."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

Shape = Sequence[int]
"""[T, N, *] of a layer's input currents, [T, N, C, H, W] of images that are shown for T steps."""


class Task:
    """One method at one shape, ready to run.

    Attributes:
        has_one_graph: Whether the forward pass builds one graph, so that what it saves can be
            weighed; an attack builds others.
        inputs: Tensors that are there before the forward pass.
    """

    has_one_graph: ClassVar[bool] = False
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
