"""Randomised smoothing: a classifier that votes over Gaussian noise, and the L2 radius in which its
vote is proved.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sj_robust._checks import (
    check_count,
    check_function,
    check_images,
    check_logits,
    check_model,
    check_size,
)
from sj_robust._preserved import preserved
from sj_robust.randomness import (
    SampleSeeds,
    check_seeds,
    draw_seed,
    private_generator,
    seeded_globals,
)
from sj_robust.stability._scipy import scipy_module

__all__ = ["SmoothedClassifier", "Smoothing", "smooth"]

ABSTAINED = -1


@dataclass(frozen=True)
class Smoothing:
    """Result of :func:`smooth`. 随机平滑的结果。

    Attributes:
        sigma: Standard deviation of the noise.
        alpha: Probability, per image, that its radius is too large.
        n: Draws behind the radius.
        prediction: Class of the smoothed classifier per image; -1 where it abstains.
        radius: L2 radius, in units of [0, 1] images, in which that class is proved; 0 where it
            abstains.
        count: Draws, of n, that gave the class which the first n0 draws had guessed.
    """

    sigma: float
    alpha: float
    n: int
    prediction: tuple[int, ...]
    radius: tuple[float, ...]
    count: tuple[int, ...]

    @property
    def abstained(self) -> float:
        """Share of images without a prediction."""
        return sum(label == ABSTAINED for label in self.prediction) / len(self.prediction)

    def certified(self, y: Tensor, radius: float = 0.0) -> tuple[bool, ...]:
        """Whether each image is proved to keep its label ``y`` [N] under every perturbation of L2
        norm < ``radius``.

        Radius 0 is the smoothed classifier's own accuracy.

        Raises:
            ValueError: If ``y`` has another length.
        """
        y = torch.as_tensor(y)
        if y.shape != (len(self.prediction),):
            raise ValueError(
                f"y must have shape [N] = [{len(self.prediction)}], got {list(y.shape)}"
            )
        rows = zip(self.prediction, y.tolist(), self.radius, strict=True)
        return tuple(label == right and proved >= radius for label, right, proved in rows)


class SmoothedClassifier(nn.Module):
    """One draw of a smoothed classifier: logits of images with fresh Gaussian noise, for attacks on
    the vote itself.

    随机平滑分类器的单次抽样。

    Equation: ``logits = model(x + sigma * n)``, n ~ N(0, 1) from torch's global generator; the sum
    is not clamped. Attack it as any stochastic network, with ``eot_samples``, which averages the
    gradient over draws.

    Args:
        model: Images to logits.
        sigma: Standard deviation of the noise in units of [0, 1] images, > 0.

    Raises:
        ValueError: If ``sigma`` is not positive and finite.

    Source: Cohen et al. (ICML 2019); attacks through the noise: SmoothAdv, Salman et al. (NeurIPS
        2019).

    Examples:
        >>> SmoothedClassifier(nn.Linear(2, 3), sigma=0.25)(torch.rand(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, sigma: float) -> None:
        """Wrap a network; see the class."""
        super().__init__()
        check_model(model)
        self.model = model
        self.sigma = check_size("sigma", sigma, positive=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of one draw."""
        logits: Tensor = self.model(images + self.sigma * torch.randn_like(images))
        return logits


def smooth(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: float,
    *,
    n0: int = 100,
    n: int = 1000,
    alpha: float = 0.001,
    batch_size: int = 256,
    generator: torch.Generator | SampleSeeds | None = None,
    on_image: Callable[[int], None] | None = None,
) -> Smoothing:
    """Classes by a vote over Gaussian noise, with the L2 radius in which each is proved.
    随机平滑及其可证明的
    L2 半径。

    Equation, with f the network and n ~ N(0, 1) in every element::

        g(x) = argmax_c P(f(x + sigma n) = c)
        radius = sigma * Phi^-1(p),    p <= P(f(x + sigma n) = g(x))

    ``n0`` draws guess the class, ``n`` others give p, the lower Clopper-Pearson bound at level
    ``alpha``; if p <= 1/2 the classifier abstains. The proof is one of g, never of the network f
    alone, and holds with probability 1 - alpha per image. Noisy images are not clamped to [0, 1];
    train with the same noise (``--mode gaussian --eps SIGMA``). What the network draws itself (a
    stochastic encoder) is part of the probability.

    The largest radius that n draws can prove is ``sigma * Phi^-1(alpha^(1/n))``: 2.46 sigma for n =
    1000.

    Args:
        model: Images [N, ...] to logits [N, classes]; an ``nn.Module`` runs in evaluation mode.
        x: Images in [0, 1], floating point.
        sigma: Standard deviation of the noise in units of [0, 1] images, > 0.
        n0: Draws for the guess.
        n: Draws for the bound.
        alpha: Probability of error per image, in (0, 1).
        batch_size: Draws at a time.
        generator: Source of the noise, moved by one number; seeds of the samples make each result
            independent of the others; None is fresh entropy.
        on_image: Called with the number of images done after every image.

    Returns:
        :class:`Smoothing`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If images, a number or the logits are out of range, or seeds do not fit.
        ModuleNotFoundError: If scipy is not installed.

    Source: Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing"
        (ICML 2019), arXiv 1902.02918; Clopper and Pearson (Biometrika, 1934).

    Examples:
        >>> x = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
        >>> result = smooth(
        ...     lambda x: x, x, 0.25, n=1000, generator=torch.Generator().manual_seed(0)
        ... )
        >>> result.prediction, [round(radius, 2) for radius in result.radius]
        ((0, -1), [0.51, 0.0])
    """
    check_model(model)
    check_images(x)
    check_seeds(generator, x)
    sigma = check_size("sigma", sigma, positive=True)
    for name, value in (("n0", n0), ("n", n), ("batch_size", batch_size)):
        check_count(name, value)
    if not 0 < check_size("alpha", alpha) < 1:
        raise ValueError(
            f"alpha must be in (0, 1), got {alpha}; it is the probability of error, such as 0.001"
        )
    check_function("on_image", on_image)
    if isinstance(generator, SampleSeeds):
        seeds = generator
    else:
        device = generator.device if isinstance(generator, torch.Generator) else "cpu"
        seed = draw_seed(private_generator(generator, torch.device(device)))
        seeds = SampleSeeds([SampleSeeds([seed]).derived(row).single() for row in range(len(x))])
    noise, own = (
        seeds.derived("noise").seeds,
        seeds.derived("network").seeds,
    )  # streams that must not be related
    beta = scipy_module("stats", wanted_by="smooth").beta  # slow to import
    predictions, radii, counts = [], [], []
    with torch.no_grad(), preserved(model):
        for row in range(len(x)):
            draws = torch.Generator(device=x.device).manual_seed(noise[row])
            with seeded_globals(own[row], x.device):  # what the network draws itself
                guess = int(_votes(model, x[row], sigma, n0, batch_size, draws).argmax())
                count = int(_votes(model, x[row], sigma, n, batch_size, draws)[guess])
            p = float(beta.ppf(alpha, count, n - count + 1)) if count else 0.0
            proved = p > 0.5
            predictions.append(guess if proved else ABSTAINED)
            radii.append(
                sigma * float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))
                if proved
                else 0.0
            )
            counts.append(count)
            if on_image is not None:
                on_image(row + 1)
    return Smoothing(sigma, float(alpha), n, tuple(predictions), tuple(radii), tuple(counts))


def _votes(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    sigma: float,
    draws: int,
    batch_size: int,
    noise: torch.Generator,
) -> Tensor:
    """How often each class wins among so many noisy copies of an image, [classes]."""
    votes = torch.zeros(0)
    for start in range(0, draws, batch_size):
        shape = (min(batch_size, draws - start), *image.shape)
        noisy = image + sigma * torch.randn(
            shape, generator=noise, dtype=image.dtype, device=image.device
        )
        logits = check_logits(model(noisy), torch.zeros(len(noisy), dtype=torch.int64))
        won = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
        votes = won if start == 0 else votes + won
    return votes
