"""Randomised smoothing: a classifier that votes over Gaussian noise, and the L2 radius in which its
vote is proved.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sj_robust._checks import check_count, check_images, check_logits, check_model, check_size
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

        g(x) = argmax_c P(f(x + sigma n) = c),    radius = sigma * Phi^-1(p),    p <= P(f(x + sigma n) = g(x))

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
    beta = scipy_module("stats", wanted_by="smooth").beta  # slow to import
    check_model(model)
    check_images(x)
    check_seeds(generator, x)
    sigma = check_size("sigma", sigma, positive=True)
    for name, value in (("n0", n0), ("n", n), ("batch_size", batch_size)):
        check_count(name, value)
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha must be in (0, 1), got {alpha}; it is the probability of error, such as 0.001"
        )
    if isinstance(generator, SampleSeeds):
        seeds = generator
    else:
        seed = draw_seed(
            private_generator(
                generator, torch.device("cpu") if generator is None else generator.device
            )
        )
        seeds = SampleSeeds([SampleSeeds([seed]).derived(row).single() for row in range(len(x))])
    predictions, radii, counts = [], [], []
    with torch.no_grad(), preserved(model):
        for row in range(len(x)):
            one = _Draws(model, x[row], sigma, batch_size, seeds.seeds[row])
            guess = int(one.votes("guess", n0).argmax())
            count = int(one.votes("count", n)[guess])
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


@dataclass
class _Draws:
    """Noisy copies of one image, and what a network makes of them.

    Each draw has its noise, and what the network draws itself, from a seed of its own, so that
    nothing hangs on how many draws run together. A network may run on many of them at once only if
    it draws nothing and treats the rows of a batch apart; else it runs on one after the other.

    Attributes:
        model: Images to logits.
        image: The image [*].
        sigma: Standard deviation of the noise.
        batch_size: Draws at a time.
        seed: Of the image.
        apart: Whether the network runs on one draw after the other.
    """

    model: Callable[[Tensor], Tensor]
    image: Tensor
    sigma: float
    batch_size: int
    seed: int
    apart: bool = False

    def votes(self, use: str, draws: int) -> Tensor:
        """How often each class wins among so many noisy copies, [classes]."""
        seeds = SampleSeeds([self.seed]).derived(use)
        noise = torch.Generator(device=self.image.device)
        noise.manual_seed(seeds.derived("noise").single())
        own = seeds.derived("network")
        votes = torch.zeros(1, dtype=torch.int64, device=self.image.device)
        for start in range(0, draws, self.batch_size):
            count = min(self.batch_size, draws - start)
            noisy = torch.stack([self._noisy(noise) for _ in range(count)])
            won = self._classes(noisy, [own.derived(start + i).single() for i in range(count)])
            found = torch.bincount(won)
            size = max(len(votes), len(found))
            votes = _padded(votes, size) + _padded(found, size)
        return votes

    def _noisy(self, noise: torch.Generator) -> Tensor:
        image = self.image
        drawn = torch.randn(
            image.shape, generator=noise, dtype=image.dtype, device=image.device
        )  # one by one: a larger draw takes the generator's numbers in another order
        return image + self.sigma * drawn

    def _classes(self, noisy: Tensor, seeds: list[int]) -> Tensor:
        """Classes [draws] of noisy images."""
        if not self.apart:
            logits, drew = self._run(noisy, seeds[0])
            self.apart = drew or not self._rows_are_apart(noisy, seeds[0], logits)
        if not self.apart:
            return logits.argmax(1)
        alone = [self._run(noisy[i : i + 1], seed)[0] for i, seed in enumerate(seeds)]
        return torch.cat(alone).argmax(1)

    def _run(self, noisy: Tensor, seed: int) -> tuple[Tensor, bool]:
        """Logits, and whether the network moved a generator."""
        own = generators_of(self.model)
        with seeded_globals(seed, noisy.device):
            for generator in own:
                generator.manual_seed(seed)
            watched = [*own, *global_generators(noisy.device)]
            states = [generator.get_state() for generator in watched]
            labels = torch.zeros(len(noisy), dtype=torch.int64)
            logits = check_logits(self.model(noisy), labels)
            moved = [
                not torch.equal(generator.get_state(), state)
                for generator, state in zip(watched, states, strict=True)
            ]
        return logits, any(moved)

    def _rows_are_apart(self, noisy: Tensor, seed: int, logits: Tensor) -> bool:
        """Whether the first half of a batch stays as it is when the other half is another one."""
        half = len(noisy) // 2
        if half == 0:
            return True
        other = torch.cat((noisy[:half], 1.0 - noisy[half:]))
        return torch.equal(self._run(other, seed)[0][:half], logits[:half])


def _padded(votes: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(votes, (0, size - len(votes)))
