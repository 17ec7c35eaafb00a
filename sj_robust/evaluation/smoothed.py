"""The bracket of a smoothed classifier: what its vote certifies in L2, and what attacks on the vote
itself leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from sj_robust.attacks.gradient import pgd
from sj_robust.core.checks import check_count, check_labels, check_size
from sj_robust.core.saved import SavedResult, markdown_table
from sj_robust.core.shown import Shown, new_figure, write_figure
from sj_robust.proofs.smoothing import ABSTAINED, SmoothedClassifier, Smoothing, smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SmoothedBracket", "smoothed_bracket"]


@dataclass(frozen=True, repr=False)
class SmoothedBracket(
    Shown,
    SavedResult,
    what="a bracket of a smoothed classifier",
    format="sj_robust.smoothed_bracket",
    version=1,
):
    """Where the robust accuracy of a smoothed classifier lies at some L2 radii.
    随机平滑分类器鲁棒精度的上下界。

    Attributes:
        radii: L2 radii, rising.
        certified: At each of them, the numbers of the images whose class is certified and right,
            without those that are broken there.
        broken: At each of them, the numbers of the images for which an image within the radius is
            known that the vote gives another class.
        contradicted: Numbers of the images that are certified at a radius at which they are broken.
            Each of the two votes is wrong with probability ``alpha``, so this happens to an image
            with 2 ``alpha`` at most in every attack; more is a bug of one of the two.
        total: Number of images.
        alpha: Probability of error of a vote.
        sigma: Standard deviation of the noise.
        n: Draws of a vote.
    """

    radii: tuple[float, ...]
    certified: tuple[tuple[int, ...], ...]
    broken: tuple[tuple[int, ...], ...]
    contradicted: tuple[int, ...]
    total: int
    alpha: float
    sigma: float
    n: int

    @property
    def verdict(self) -> str:
        """The bracket at the radius in the middle."""
        radius = self.radii[len(self.radii) // 2]
        low, high = (f"{100 * end:.1f} %" for end in self.bracket(radius))
        return (
            f"the vote of {self.n} draws with sigma {self.sigma:.6g} withstands L2 {radius:.6g} "
            f"on {low} (certified) to {high} (left by the attack) of {self.total} images"
        )

    def bracket(self, radius: float) -> tuple[float, float]:
        """Share of the images that is certified at one of the radii, and the share that is left by
        the attack.
        """
        at = self.radii.index(radius)
        return len(self.certified[at]) / self.total, (
            self.total - len(self.broken[at])
        ) / self.total

    def table(self) -> str:
        """Markdown: a row per radius, and the images that are contradicted."""
        shares = [
            (f"{radius:.6g}", *(f"{100 * end:.1f}" for end in self.bracket(radius)))
            for radius in self.radii
        ]
        table = markdown_table(["L2", "certified, %", "left by the attack, %"], shares)
        if not self.contradicted:
            return table
        numbers = ", ".join(map(str, self.contradicted))
        return (
            f"{table}\n\nCertified and yet broken: {numbers} of {self.total} images. With "
            f"probability {self.alpha:.6g} each a certificate or the vote at the perturbed image "
            "is wrong; more than that is a bug."
        )

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Both ends over the radius; it needs matplotlib (extra ``recipes``). 绘制上下界。

        Args:
            path: File to write as well; its ending says which format, ``.pdf`` and ``.png`` among
                others.
        """
        low, high = (
            [100 * share for share in ends]
            for ends in zip(*map(self.bracket, self.radii), strict=True)
        )
        figure = new_figure(4.6, 3.4)
        axes = figure.subplots()
        axes.plot(
            self.radii,
            high,
            "o-",
            color="#0072b2",
            markersize=4,
            label="left by the attack on the vote",
        )
        axes.plot(self.radii, low, "v--", color="#767676", markersize=4, label="certified")
        axes.fill_between(
            self.radii, low, high, facecolor="none", edgecolor="#767676", hatch="///", linewidth=0
        )
        axes.set_xlabel("eps, L2")
        axes.set_ylabel(f"accuracy of the vote, sigma {self.sigma:.6g}, %")
        axes.set_xlim(left=0)
        axes.set_ylim(-2, 102)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        if path is not None:
            write_figure(figure, path)
        return figure

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write JSON and plots into a folder; their names. 写入全部文件。"""
        self.save(folder / "smoothed.json")
        figure = self.plot()
        for ending in ("png", "pdf"):
            write_figure(figure, folder / f"smoothed.{ending}")
        return "smoothed.json", "smoothed.png", "smoothed.pdf"

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Self:
        for name in ("radii", "contradicted"):
            content[name] = tuple(content[name])
        for name in ("certified", "broken"):
            content[name] = tuple(map(tuple, content[name]))
        return cls(**content)


def smoothed_bracket(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    smoothing: Smoothing,
    radii: Sequence[float],
    *,
    steps: int = 20,
    eot_samples: int = 16,
    n0: int = 100,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> SmoothedBracket:
    """Attack the smoothed classifier itself; what is left stands beside what it certifies.
    平滑分类器的上下界。

    At each radius PGD in L2 climbs the cross entropy averaged over ``eot_samples`` noisy copies of
    every image that is not broken yet, the certified ones included. Its last image counts as broken
    if the smoothed classifier, asked again with ``smoothing.n`` fresh draws, votes for another
    class; where it abstains nothing is known. Neither end says anything of the network without the
    vote.

    Args:
        model: The network that was smoothed.
        x: The images that were.
        y: Labels [N] int64.
        smoothing: What :func:`sj_robust.proofs.smooth` found for them.
        radii: L2 radii, >= 0.
        steps: Steps of PGD, each of 2.5 radii / steps.
        eot_samples: Noisy copies that a gradient is averaged over.
        n0: Draws for the guess of a vote.
        batch_size: Images attacked at a time.
        generator: Source of all noise; None is fresh entropy.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If images, labels, smoothing or a number do not fit.

    Source: attacks through the noise as in SmoothAdv, Salman et al. (NeurIPS 2019).

    Examples:
        >>> x, y = torch.tensor([[0.8, 0.2], [0.55, 0.45]]), torch.tensor([0, 0])
        >>> net, draws = nn.Linear(2, 2, bias=False), torch.Generator().manual_seed(0)
        >>> _ = net.weight.data.copy_(torch.eye(2))
        >>> certified = smooth(net, x, 0.25, generator=draws)
        >>> found = smoothed_bracket(net, x, y, certified, [0.0, 0.2], generator=draws)
        >>> found.bracket(0.0), found.bracket(0.2)
        ((1.0, 1.0), (0.5, 0.5))
    """
    check_labels(y, x)
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    if not radii:
        raise ValueError("radii must hold an L2 radius or more, got none")
    ordered = sorted({check_size("radii", radius) for radius in radii})
    noisy = SmoothedClassifier(model, smoothing.sigma)
    right = smoothing.certified(y)
    broken = {
        i for i, label in enumerate(smoothing.prediction) if not right[i] and label != ABSTAINED
    }
    certified, fallen, contradicted = [], [], set[int]()
    for radius in ordered:
        standing = [i for i in range(len(y)) if i not in broken] if radius > 0 else []
        for start in range(0, len(standing), batch_size):
            rows = standing[start : start + batch_size]
            x_adv = pgd(
                noisy,
                x[rows],
                y[rows],
                eps=radius,
                norm="L2",
                step_size=2.5 * radius / steps,
                steps=steps,
                eot_samples=eot_samples,
                keep_best=False,
                generator=generator,
            )  # the best of noisy draws would be a lucky one
            vote = smooth(
                model,
                x_adv,
                smoothing.sigma,
                n0=n0,
                n=smoothing.n,
                alpha=smoothing.alpha,
                generator=generator,
            )
            answers = zip(rows, vote.prediction, y[rows].tolist(), strict=True)
            broken |= {i for i, label, true in answers if label not in (true, ABSTAINED)}
        proved = {i for i, holds in enumerate(smoothing.certified(y, radius)) if holds}
        contradicted |= proved & broken
        certified.append(tuple(sorted(proved - broken)))
        fallen.append(tuple(sorted(broken)))
    return SmoothedBracket(
        tuple(ordered),
        tuple(certified),
        tuple(fallen),
        tuple(sorted(contradicted)),
        len(y),
        smoothing.alpha,
        smoothing.sigma,
        smoothing.n,
    )
