"""Randomised smoothing: a vote over Gaussian noise and its certified L2 radius."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sj_robust.core.broadcast import beside
from sj_robust.core.checks import (
    check_count,
    check_function,
    check_images,
    check_logits,
    check_model,
    check_size,
)
from sj_robust.core.preserved import (
    RandomNumbers,
    Snapshot,
    generators_of,
    preserved,
    seeded_network,
)
from sj_robust.core.randomness import (
    SampleSeeds,
    check_seeds,
    draw_seed,
    private_generator,
)
from sj_robust.proofs._scipy import scipy_module
from sj_robust.proofs.soundness import check_kept, check_unchanged

__all__ = ["SmoothedClassifier", "Smoothing", "smooth"]

ABSTAINED = -1


@dataclass(frozen=True)
class Smoothing:
    """Result of :func:`smooth`. 随机平滑的结果。

    Attributes:
        sigma: Standard deviation of the noise.
        alpha: Probability, per image, that its radius is too large.
        n: Number of draws for the radius.
        prediction: Class of the smoothed classifier per image; -1 if it abstains.
        radius: L2 radius, in units of [0, 1] images, within which that class is proved; 0 if it
            abstains.
        count: Number of the n draws that gave the class guessed by the first n0 draws.
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
    """One draw of a smoothed classifier: the logits of images with fresh Gaussian noise, for
    attacks on the vote itself.

    随机平滑分类器的单次抽样。

    Equation: ``logits = model(x + sigma * n)``, n ~ N(0, 1) from torch's global generator; the sum
    is not clamped. Attack it like any stochastic network, with ``eot_samples``, which averages the
    gradient over draws.

    Args:
        model: Images to logits.
        sigma: Standard deviation of the noise in units of [0, 1] images, > 0.

    Raises:
        ValueError: If ``sigma`` is not positive and finite.

    Source: Cohen et al. (ICML 2019); attacks that average over the noise: SmoothAdv, Salman et al.
        (NeurIPS 2019).

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
    """Classify by a vote over Gaussian noise, with the L2 radius within which each class is proved.
    随机平滑及其可证明的 L2 半径。

    Equation, with f the network and n ~ N(0, 1) in every element::

        g(x) = argmax_c P(f(x + sigma n) = c)
        radius = sigma * Phi^-1(p),    p <= P(f(x + sigma n) = g(x))

    ``n0`` draws guess the class, and ``n`` further draws give p, the lower Clopper-Pearson bound at
    level ``alpha``; if p <= 1/2 the classifier abstains. The proof concerns g, never the network f
    alone, and holds with probability 1 - alpha per image. Noisy images are not clamped to [0, 1];
    train with the same noise (``--mode gaussian --eps SIGMA``). Random numbers of the network
    itself (a stochastic encoder) are part of the probability.

    The bound needs independent draws. A network that draws random numbers itself runs on one draw
    after the other. Any other network runs on batches if it treats their rows independently,
    otherwise also on one draw after the other. This is tested on the first batch of every size:
    each row must keep its logits, bit by bit, when all other rows are replaced by other images, and
    its class when it runs alone (where rounding changes that, its logits among copies of itself).
    In every later batch, the last row must keep its class when it runs alone. A network that mixes
    rows and passes this test goes unnoticed; ``batch_size=1`` needs no such test. The noise does
    not depend on ``batch_size``.

    The largest radius that n draws can prove is ``sigma * Phi^-1(alpha^(1/n))``: 2.46 sigma for n =
    1000.

    Args:
        model: Images [N, ...] to logits [N, classes]; an ``nn.Module`` runs in evaluation mode.
        x: Images in [0, 1], floating point.
        sigma: Standard deviation of the noise in units of [0, 1] images, > 0.
        n0: Number of draws for the guess.
        n: Number of draws for the bound.
        alpha: Probability of error per image, in (0, 1).
        batch_size: Largest number of draws at a time.
        generator: Source of the noise, from which one number is drawn; with seeds per sample, each
            result is independent of the others; None uses fresh entropy.
        on_image: Called after every image with the number of images done so far.

    Returns:
        :class:`Smoothing`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If images, a number or the logits are out of range, seeds do not fit, or the
            network keeps a state from forward to forward, changes its parameters or buffers, or
            draws from a source other than torch.
        ModuleNotFoundError: If scipy is not installed.

    Source: Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing"
        (ICML 2019), arXiv 1902.02918; Clopper and Pearson (Biometrika, 1934).

    Examples:
        >>> x = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
        >>> result = smooth(
        ...     lambda x: x, x, 0.25, n=1000, generator=torch.Generator().manual_seed(0)
        ... )
        >>> result.prediction, [round(radius, 2) for radius in result.radius]
        ((0, -1), [0.5, 0.0])
    """
    check_model(model)
    check_images(x)
    if len(x) == 0:
        raise ValueError("x must contain at least one image, got none")
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
        of_all = SampleSeeds([seed])
        seeds = SampleSeeds([of_all.derived(row).single() for row in range(len(x))])
    seeds_of_guesses = seeds.derived("guess").seeds
    seeds_of_counts = seeds.derived("count").seeds
    beta = scipy_module("stats", wanted_by="smooth").beta  # slow to import
    predictions = []
    radii = []
    counts = []
    with torch.no_grad(), preserved(model):
        draws = _Draws(model, sigma, batch_size)
        for row in range(len(x)):
            votes = draws.votes(x[row], n0, seeds_of_guesses[row])
            guess = int(votes.argmax())
            votes = draws.votes(x[row], n, seeds_of_counts[row])
            count = int(votes[guess])
            p = float(beta.ppf(alpha, count, n - count + 1)) if count else 0.0
            if p > 0.5:
                quantile = torch.special.ndtri(torch.tensor(p, dtype=torch.float64))
                predictions.append(guess)
                radii.append(sigma * float(quantile))
            else:
                predictions.append(ABSTAINED)
                radii.append(0.0)
            counts.append(count)
            draws.check_kept()
            if on_image is not None:
                on_image(row + 1)
    return Smoothing(
        sigma=sigma,
        alpha=float(alpha),
        n=n,
        prediction=tuple(predictions),
        radius=tuple(radii),
        count=tuple(counts),
    )


class _Draws:
    """Noisy copies of an image, and the classes that a network gives them.

    A draw's noise, and what the network draws itself, do not depend on how many run together. A
    network may run on many at once only if it draws nothing and treats the rows of a batch apart;
    else it runs on one after the other, since draws that share a coin are not independent.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], sigma: float, batch_size: int) -> None:
        """Nothing is known of the network yet."""
        self.model = model
        self.sigma = sigma
        self.batch_size = batch_size
        self.one_by_one = batch_size == 1
        self._tested: set[int] = set()  # sizes of batches; 1 if draws run one by one
        self._kept: Snapshot | None = None

    def votes(self, image: Tensor, draws: int, seed: int) -> Tensor:
        """How often each class wins among so many noisy copies of an image [*], [classes]."""
        seeds = SampleSeeds([seed])
        noise = torch.Generator(device=image.device)
        noise.manual_seed(seeds.derived("noise").single())
        own = seeds.derived("network")  # streams that must not be related
        votes = []
        start = 0
        for count in _sizes(draws, self.batch_size):
            # One by one: a larger draw takes the generator's numbers in another order.
            drawn = [_noise(image, noise) for _ in range(count)]
            noisy = image + self.sigma * torch.stack(drawn)
            logits = self._logits(noisy, own, start)
            winners = logits.argmax(1)
            votes.append(torch.bincount(winners, minlength=logits.shape[1]))
            start += count
        return torch.stack(votes).sum(0)

    def check_kept(self) -> None:
        """Raise ValueError if a forward has changed what the network's modules hold."""
        if self._kept is not None:
            check_unchanged(self.model, self._kept)

    def _logits(self, noisy: Tensor, own: SampleSeeds, start: int) -> Tensor:
        """Logits [draws, classes] of noisy images, the first of which is draw ``start``."""
        if self._kept is None:
            with _from_seed(self.model, own.single(), noisy.device):
                self._kept = check_kept(self.model, noisy)
        if not self.one_by_one:
            with _from_seed(self.model, own.single(), noisy.device):
                numbers = RandomNumbers(self.model, noisy.device)
                logits = self._forward(noisy)
                drew = numbers.drawn()
            self.one_by_one = drew or not self._rows_are_apart(noisy, own.single(), logits)
            if not self.one_by_one:
                return logits
        seeds = [own.derived(start + row).single() for row in range(len(noisy))]
        alone = self._alone(noisy, seeds)
        if self._is_first(1):
            from_last = self._alone(noisy.flip(0), seeds[::-1])
            again = from_last.flip(0)
            _check_same(again, alone)
        return alone

    def _run(self, noisy: Tensor, seed: int) -> Tensor:
        """Logits of one forward, the random numbers of which have a seed."""
        with _from_seed(self.model, seed, noisy.device):
            return self._forward(noisy)

    def _forward(self, noisy: Tensor) -> Tensor:
        labels = torch.zeros(len(noisy), dtype=torch.int64)
        return check_logits(self.model(noisy.clone()), labels)

    def _alone(self, noisy: Tensor, seeds: Sequence[int]) -> Tensor:
        """Logits of a forward per row."""
        rows = zip(noisy.unsqueeze(1), seeds, strict=True)
        return torch.cat([self._run(row, seed) for row, seed in rows])

    def _is_first(self, size: int) -> bool:
        """Whether this is the first batch of its size."""
        first = size not in self._tested
        self._tested.add(size)
        return first

    def _rows_are_apart(self, noisy: Tensor, seed: int, logits: Tensor) -> bool:
        """Whether no row of a batch depends on the others: all rows of the first batch of a size
        are tested, later the last one.
        """
        size = len(noisy)
        if not self._is_first(size):
            return self._votes_alone(noisy, seed, logits, first=size - 1)
        apart = self._withstands_others(noisy, seed, logits)
        apart = apart and self._votes_alone(noisy, seed, logits, first=0)
        _check_same(self._run(noisy, seed), logits)
        return apart

    def _withstands_others(self, noisy: Tensor, seed: int, logits: Tensor) -> bool:
        """Whether each row keeps its logits while all rows beside it are other images."""
        for kept, mixed in beside(noisy, 1.0 - noisy):
            found = self._run(mixed, seed)
            if not torch.equal(found[kept], logits[kept]):
                return False
        return True

    def _votes_alone(self, noisy: Tensor, seed: int, logits: Tensor, *, first: int) -> bool:
        """Whether each row from the first on has its class when it runs alone.

        A sum may be rounded otherwise there, and a spike at its threshold flip, which moves no
        other row: such a row must keep its logits, in a batch of the same size, among copies of it.
        """
        with _from_seed(self.model, seed, noisy.device):  # of a network that draws nothing
            rows = noisy[first:].unsqueeze(1)
            alone = torch.cat([self._forward(row) for row in rows])
        changed = alone.argmax(1) != logits[first:].argmax(1)
        rows = first + changed.nonzero().flatten()
        for row in rows.tolist():
            copies = noisy[row].expand_as(noisy)
            found = self._run(copies, seed)
            if not torch.equal(found[row], logits[row]):
                return False
        return True


def _sizes(draws: int, batch_size: int) -> list[int]:
    """Sizes of the fewest batches, which differ by one at most."""
    batches = -(-draws // batch_size)
    size, larger = divmod(draws, batches)
    return [size + 1] * larger + [size] * (batches - larger)


def _check_same(again: Tensor, logits: Tensor) -> None:
    """Raise ValueError if the same images and seeds have given other logits."""
    if not torch.equal(again, logits):
        raise ValueError(
            "model must give the same logits for the same images and seed, got one that keeps "
            "a state or draws from another source than torch; wrap a spiking network in "
            "SpikingClassifier, which resets it, and draw with torch.rand"
        )


@contextmanager
def _from_seed(model: object, seed: int, device: torch.device) -> Iterator[None]:
    """All generators that a network may draw from, with one seed."""
    with seeded_network(model, seed, device):
        for generator in generators_of(model):
            generator.manual_seed(seed)
        yield


def _noise(image: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(image.shape, generator=generator, dtype=image.dtype, device=image.device)
