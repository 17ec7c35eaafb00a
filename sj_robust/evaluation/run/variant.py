"""A network and its images, or a variant of one of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from sj_robust.attacks.call import Model
from sj_robust.core.randomness import SampleSeeds
from sj_robust.evaluation.run.member import Member, fooled

__all__ = ["Judge", "Variant"]


class Judge(Protocol):
    """Says which images a network gets wrong, [N] bool."""

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, draws: int, seeds: SampleSeeds
    ) -> Tensor:
        """Whether each image is wrong."""


def as_it_is(network: nn.Module) -> nn.Module:
    """The network itself."""
    return network


def as_they_are(x: Tensor, start: int) -> Tensor:
    """The images themselves."""
    return x


@dataclass(frozen=True)
class Variant:
    """A network and images, one of them changed, and who attacks them; nothing is changed by
    default. 被评估的变体。

    Attributes:
        members: Attacks, in their order.
        name: Name, such as ``"weight_bits:3"`` or ``"lost_spikes:0.1/draw1"``.
        seed: Random seed.
        network: What becomes of the network, as for faults.
        images: What becomes of images, given the number of the first one, as for corruptions.
        judge: Says which images are wrong, as a vote does.
        may_draw: Whether the network draws random numbers, as one with noisy faults does.
        wrong: Numbers of the images that are known to be wrong without an attack; None asks the
            judge.
    """

    members: Sequence[Member]
    name: str = ""
    seed: int = 0
    network: Callable[[nn.Module], nn.Module] = as_it_is
    images: Callable[[Tensor, int], Tensor] = as_they_are
    judge: Judge = fooled
    may_draw: bool = False
    wrong: frozenset[int] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether network and images are as they are."""
        return self.keeps_network and self.images is as_they_are

    @property
    def keeps_network(self) -> bool:
        """Whether the network is as it is."""
        return self.network is as_it_is

    def check_names(self) -> None:
        """Raise ValueError if two members have one name, which is part of their randomness."""
        names = [member.name for member in self.members]
        if len(set(names)) < len(names) or "clean" in names:
            raise ValueError(
                f"members must have names of their own, and none may be 'clean', got {names}; add "
                "the restart"
            )
