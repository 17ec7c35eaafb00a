"""What is timed."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

Shape = Sequence[int]
"""[T, N, *] of a layer's input currents, [T, N, C, H, W] of images that are shown for T steps."""


class Task:
    """One method at one shape, ready to run.

    Attributes:
        has_one_graph: Whether the forward pass builds a single graph, so that the memory it saves
            for the backward pass can be measured; an attack in it builds several.
        inputs: Tensors that are there before the forward pass.
    """

    has_one_graph: ClassVar[bool] = False
    inputs: list[Tensor]

    def forward(self) -> Any:
        """Forward pass; the result keeps the graph alive."""
        raise NotImplementedError

    def backward(self, result: Any) -> None:
        """Backward pass from the result of :meth:`forward`, and the step of the optimizer; nothing
        if the method has neither.
        """

    def check(self) -> None:
        """Raise ValueError if the results differ from those of a reference; nothing if there is no
        reference.
        """
