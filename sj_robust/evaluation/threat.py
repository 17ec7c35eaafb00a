"""What an adversary may do."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ThreatModel"]


@dataclass(frozen=True)
class ThreatModel:
    """An adversary who may move an image within a ball, inside [0, 1]. 威胁模型。

    Attributes:
        norm: ``"Linf"``, or ``"L2"`` over all elements of an image.
        eps: Radius in units of [0, 1] images, such as ``8 / 255``.

    Raises:
        ValueError: If the norm is unknown or the radius negative or not finite.

    Example:
        >>> ThreatModel("Linf", 8 / 255)
        ThreatModel(norm='Linf', eps=0.03137254901960784)
    """

    norm: Literal["Linf", "L2"]
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in ("Linf", "L2"):
            raise ValueError(f"norm must be 'Linf' or 'L2', got {self.norm!r}")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps must be >= 0 and finite, got {self.eps}")
