"""Names of estimators: text to a value that can be compared, hashed, printed and applied."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from sj_robust.estimators.applied import Applied

__all__ = ["ESTIMATORS", "Estimator", "estimator"]

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
    "atan:4+detach",
)
"""Example names, one per family and one with the reset detached."""


@dataclass(frozen=True, repr=False)
class Estimator:
    """A gradient estimator; call it on a network for a context in which the network has this backward pass.

    梯度估计器：仅替换脉冲神经元的反向传播，前向保持逐位一致。

    Equation: see the table of :mod:`sj_robust.estimators`.

    Args:
        family: What comes first in the name, such as ``"atan"``.
        number: Width or sharpness: half width in units of the threshold for ``triangle``, ``rectangle``, ``hart`` and
            ``hart_mixed``; alpha for ``atan``, ``sigmoid`` and ``exponential``; for ``assg`` the share of the
            surrogate's area kept around |z|, in (0, 1); None for the others.
        shape: Shape of ``assg``, None for all others.
        detach_reset: Whether the reset is left out of the gradient.

    Raises:
        ValueError: If the family is unknown or the rest does not go with it.

    Source: straight-through: Bengio et al. (2013); BPTR: Ding et al., "SNN-RAT" (NeurIPS 2022); CBA: Sharmin et al.
        (ECCV 2020); RGA: Bu et al., "Rate Gradient Approximation Attack" (CVPR 2023); HART: Hao et al. (ICLR 2024);
        PDSG: Lun et al. (CVPR 2025); ASSG: Wang et al. (arXiv 2512.22522).

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> net = nn.Sequential(nn.Linear(3, 2), DLIFNode(T=4))
        >>> with Estimator("atan", 4.0)(net) as crafting:
        ...     crafting is net, net[1].surrogate_function.alpha
        (True, 4.0)
        >>> type(net[1].surrogate_function).__name__
        'PiecewiseQuadratic'
    """

    family: str
    number: float | None = None
    shape: str | None = None
    detach_reset: bool = False

    def __post_init__(self) -> None:
        """Check that the parts go together."""
        if self.family not in _DEFAULT_NUMBER:
            raise ValueError(f"an estimator must begin with one of {tuple(_DEFAULT_NUMBER)}, got {self.family!r}")
        default = _DEFAULT_NUMBER[self.family]
        if default is None and self.number is not None:
            raise ValueError(f"{self.family} takes no number, got {self.number}; write {self.family!r}")
        if self.number is None:
            object.__setattr__(self, "number", default)
        elif not (math.isfinite(self.number) and self.number > 0):
            raise ValueError(f"the number of {self.family} must be finite and > 0, got {self.number}")
        if self.family == "assg":
            self._check_assg()
        elif self.shape is not None:
            raise ValueError(f"only assg takes a shape, got {self.family} with {self.shape!r}")
        if self.detach_reset and self.family in _WITHOUT_RESET:
            raise ValueError(f"{self.family} has no reset in its backward pass to detach; leave {_DETACH!r} out")

    @property
    def name(self) -> str:
        """Canonical text: ``estimator(e.name) == e``."""
        parts = [self.family]
        if self.shape is not None and (self.shape != "atan" or self.number != _DEFAULT_NUMBER["assg"]):
            parts.append(self.shape)
        if self.number is not None and (self.family != "assg" or self.number != _DEFAULT_NUMBER["assg"]):
            parts.append(repr(float(self.number)).removesuffix(".0"))
        return ":".join(parts) + (_DETACH if self.detach_reset else "")

    @property
    def per_sample(self) -> bool:
        """Whether the gradient of an image is free of its neighbours in the batch; PDSG's is not."""
        return self.family != "pdsg"

    def __call__(self, model: nn.Module | Callable[[Tensor], Tensor]) -> Applied:
        """Context whose value has this backward pass: ``model`` itself, for ``cba`` a crafting network.

        Args:
            model: A network with SpikingJelly neurons, bare or inside a ``SpikingClassifier``; for ``training`` any
                callable.

        Returns:
            The context; ``Applied.moved`` tells which neurons compute their backward pass elsewhere.

        Raises:
            TypeError: On entry, if ``model`` is not a module.
            ValueError: On entry, if there is no spiking neuron, or one that this estimator does not work for.
            RuntimeError: On entry, if an estimator is in force already.
        """
        return Applied(self, model)

    def __repr__(self) -> str:
        return f"estimator({self.name!r})"

    def _check_assg(self) -> None:
        if self.shape is None:
            object.__setattr__(self, "shape", "atan")
        if self.shape not in _ASSG_SHAPES:
            raise ValueError(f"the shape of assg must be one of {_ASSG_SHAPES}, got {self.shape!r}")
        if self.number is not None and self.number >= 1:
            raise ValueError(f"the share of assg must be in (0, 1), got {self.number}")


def estimator(name: str) -> Estimator:
    """The estimator of a name such as ``"atan:4"``, ``"assg:triangle"`` or ``"training+detach"``.

    Equation: see the table of :mod:`sj_robust.estimators`.

    Args:
        name: Family, then after colons what it takes (a number, for ``assg`` a shape and a number), then ``+detach``
            or nothing. What is left out has its default.

    Returns:
        The estimator.

    Raises:
        TypeError: If ``name`` is not text.
        ValueError: If it is not the name of an estimator.

    Source: see :class:`Estimator`.

    Examples:
        >>> estimator("atan:4"), estimator("triangle").name, estimator("assg:sigmoid:0.9+detach").name
        (estimator('atan:4'), 'triangle:1', 'assg:sigmoid:0.9+detach')
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be text such as 'atan:4', got {type(name).__name__}")
    family, *options = name.removesuffix(_DETACH).split(":")
    shape = options.pop(0) if family == "assg" and options and not _is_number(options[0]) else None
    if len(options) > 1 or (options and not _is_number(options[0])):
        raise ValueError(f"{name!r} is not the name of an estimator; write it like one of {ESTIMATORS}")
    number = float(options[0]) if options else None
    return Estimator(family, number, shape, name.endswith(_DETACH))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
