"""What the attacks of a set did to every image."""

from dataclasses import dataclass
from typing import Any

__all__ = ["MemberOutcome", "SuiteOutcome"]


@dataclass(frozen=True)
class MemberOutcome:
    """What one attack did to the images. 单项攻击的结果。

    Attributes:
        name: Name of the member.
        estimator: Gradient estimator it crafted with.
        group: Members of one group attack what the earlier ones left standing; each of group ``""``
            all images.
        eps: Radius it was allowed; None where it has no ball, as Gaussian noise.
        attacked: Numbers of the images it was run on.
        fooled: Numbers of those that the network gets wrong afterwards.
        outside: Numbers of those of ``fooled`` whose image is further from the clean one than a
            suite's threat allows.
        largest: Largest distance of an image from its clean one, in the norm of the suite's threat,
            else of the member's own; NaN where there is neither.
        seconds: Time for crafting and scoring, summed over processes.

    Examples:
        >>> MemberOutcome("pgd", "training", "", 0.1, (0, 1, 2), (1, 2), (2,), 0.2, 1.5).broken
        (1,)
    """

    name: str
    estimator: str
    group: str
    eps: float | None
    attacked: tuple[int, ...]
    fooled: tuple[int, ...]
    outside: tuple[int, ...]
    largest: float
    seconds: float

    def __post_init__(self) -> None:
        for name in ("attacked", "fooled", "outside"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def broken(self) -> tuple[int, ...]:
        """Images that the member fools within the budget."""
        outside = set(self.outside)
        return tuple(number for number in self.fooled if number not in outside)


@dataclass(frozen=True)
class SuiteOutcome:
    """Result of :func:`run_suite`. 攻击套件的结果。

    Attributes:
        labels: Class of every image.
        correct: Numbers of the images that the network gets right without an attack.
        members: One outcome per member, in their order.
        potential: MS-MPPD per layer and step under each member, on the first batch: rows with the
            keys ``member``, ``samples``, and ``layers``, whose values are lists over time steps.
        warnings: What attacks and network warned of, each text once.
    """

    labels: tuple[int, ...]
    correct: tuple[int, ...]
    members: tuple[MemberOutcome, ...]
    potential: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...] = ()
