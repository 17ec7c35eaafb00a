"""What an adversary may do."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ThreatModel"]


@dataclass(frozen=True)
class ThreatModel:
    """An adversary who may move an image within a ball, inside [0, 1], or change a few events. 威胁模型。

    Attributes:
        norm: ``"Linf"``, or ``"L2"`` over all elements of an image; ``"L0"`` for binary event frames.
        eps: Radius in units of [0, 1] images, such as ``8 / 255``; for ``"L0"`` the number of elements that may be
            changed per sample, an integer >= 1.

    Raises:
        ValueError: If the norm is unknown, the radius negative or not finite, or the number no integer >= 1.

    Examples:
        >>> ThreatModel("Linf", 8 / 255)
        ThreatModel(norm='Linf', eps=0.03137254901960784)
        >>> ThreatModel("L0", 20)
        ThreatModel(norm='L0', eps=20)
    """

    norm: Literal["Linf", "L2", "L0"]
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in ("Linf", "L2", "L0"):
            raise ValueError(f"norm must be 'Linf', 'L2' or 'L0', got {self.norm!r}")
        if self.norm == "L0":
            if isinstance(self.eps, bool) or self.eps < 1 or self.eps % 1 != 0:
                raise ValueError(
                    f"eps must be an integer >= 1 for L0, the number of changed elements, got {self.eps!r}; for a "
                    "distance of values use 'Linf' or 'L2'"
                )
            object.__setattr__(self, "eps", int(self.eps))
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps must be >= 0 and finite, got {self.eps}")

    @property
    def ball(self) -> Literal["Linf", "L2"]:
        """The norm, for attacks that move values.

        Raises:
            ValueError: If it is L0, where values cannot move.
        """
        if self.norm == "L0":
            raise ValueError("norm must be 'Linf' or 'L2' to move values, got 'L0'; use the suite 'events'")
        return self.norm
