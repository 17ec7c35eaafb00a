"""Names of estimators as values that can be compared and hashed."""

import math
from dataclasses import dataclass
from typing import Self

__all__ = ["ESTIMATORS", "EstimatorName"]

_DEFAULT_NUMBER: dict[str, float | None] = {
    "training": None,
    "triangle": 1.0,
    "atan": 2.0,
    "sigmoid": 4.0,
    "rectangle": 1.0,
    "exponential": 2.0,
    "straight_through": None,
    "pdsg": None,
    "assg": 0.85,
    "bptr": None,
    "rga": None,
    "hart": 1.2,
    "hart_mixed": 1.2,
    "cba": None,
    "mixed": None,
}
_WITHOUT_RESET = ("bptr", "rga", "hart", "cba")
_ASSG_SHAPES = ("atan", "triangle", "sigmoid", "gaussian", "rectangle")
_DETACH = "+detach"

ESTIMATORS: tuple[str, ...] = (
    "training",
    "triangle:0.5",
    "atan:4",
    "sigmoid:4",
    "rectangle:1",
    "exponential:2",
    "straight_through",
    "bptr",
    "rga",
    "pdsg",
    "assg",
    "assg:triangle",
    "hart:1.2",
    "hart_mixed:1.2",
    "cba",
    "mixed",
    "atan:4+detach",
)
"""Example names, one per family and one with the reset detached."""


@dataclass(frozen=True, repr=False)
class EstimatorName:
    """What the name of an estimator says; see :class:`Estimator`, which can be applied."""

    family: str
    number: float | None = None
    shape: str | None = None
    detach_reset: bool = False

    def __post_init__(self) -> None:
        """Check that the parts go together."""
        if self.family not in _DEFAULT_NUMBER:
            raise ValueError(
                f"an estimator must begin with one of {tuple(_DEFAULT_NUMBER)}, got {self.family!r}"
            )
        default = _DEFAULT_NUMBER[self.family]
        if default is None and self.number is not None:
            raise ValueError(
                f"{self.family} takes no number, got {self.number}; write {self.family!r}"
            )
        if self.number is None:
            object.__setattr__(self, "number", default)
        elif not (math.isfinite(self.number) and self.number > 0):
            raise ValueError(
                f"the number of {self.family} must be finite and > 0, got {self.number}"
            )
        if self.family == "assg":
            self._check_assg()
        elif self.shape is not None:
            raise ValueError(f"only assg takes a shape, got {self.family} with {self.shape!r}")
        if self.detach_reset and self.family in _WITHOUT_RESET:
            raise ValueError(
                f"{self.family} has no reset in its backward pass to detach; omit {_DETACH!r}"
            )

    @property
    def name(self) -> str:
        """Canonical text: ``estimator(e.name) == e``."""
        parts = [self.family]
        default_assg = self.family == "assg" and self.number == _DEFAULT_NUMBER["assg"]
        if self.shape is not None and not (default_assg and self.shape == "atan"):
            parts.append(self.shape)
        if self.number is not None and not default_assg:
            parts.append(repr(float(self.number)).removesuffix(".0"))
        detach = _DETACH if self.detach_reset else ""
        return ":".join(parts) + detach

    @property
    def per_sample(self) -> bool:
        """Whether the gradient of an image is free of its neighbours in the batch; PDSG's is
        not.
        """
        return self.family != "pdsg"

    @classmethod
    def parse(cls, text: str) -> Self:
        """What ``text`` names; see :func:`estimator`."""
        if not isinstance(text, str):
            raise TypeError(f"name must be text such as 'atan:4', got {type(text).__name__}")
        family, *options = text.removesuffix(_DETACH).split(":")
        shape = None
        if family == "assg" and options and not _is_number(options[0]):
            shape = options.pop(0)
        if len(options) > 1 or (options and not _is_number(options[0])):
            raise ValueError(
                f"{text!r} is not the name of an estimator; write it like one of {ESTIMATORS}"
            )
        number = float(options[0]) if options else None
        return cls(family, number, shape, text.endswith(_DETACH))

    def _check_assg(self) -> None:
        if self.shape is None:
            object.__setattr__(self, "shape", "atan")
        if self.shape not in _ASSG_SHAPES:
            raise ValueError(f"the shape of assg must be one of {_ASSG_SHAPES}, got {self.shape!r}")
        if self.number is not None and self.number >= 1:
            raise ValueError(f"the share of assg must be in (0, 1), got {self.number}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
