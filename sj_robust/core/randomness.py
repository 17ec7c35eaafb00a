"""Private random numbers, independent of the caller's generators."""

import operator
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

__all__ = [
    "Private",
    "SampleDraws",
    "SampleSeeds",
    "check_seeds",
    "draw_seed",
    "private_generator",
    "rand",
    "randn",
]

_SEEDS = (
    2**62
)  # seeds lie below it, so that every torch.Generator and every int64 tensor can hold them
_WORD = 2**64 - 1


class SampleSeeds:
    """One seed per sample: an attack's random numbers for a sample depend neither on the other
    samples nor on the batch size.

    每个样本一个种子，攻击结果与批大小无关。

    Equation: sample n draws from a CPU generator seeded with ``mix(seeds[n], draw)``, where ``mix``
    is splitmix64; the numbers are then moved to the device of the images, so that every device sees
    the same ones.

    Args:
        seeds: N integers in [0, 2**62), as a sequence or an integer tensor [N].

    Raises:
        TypeError: If a seed is not an integer.
        ValueError: If a seed is out of range or the tensor is not one-dimensional.

    Source: splitmix64 of Steele, Lea and Flood (OOPSLA 2014), its finaliser.

    Examples:
        >>> seeds = SampleSeeds([7, 8, 9])
        >>> seeds.rows(torch.tensor([True, False, True]))
        SampleSeeds([7, 9])
        >>> seeds.derived("apgd", 1).rows(torch.tensor([2])) == SampleSeeds([9]).derived("apgd", 1)
        True
    """

    __slots__ = ("seeds",)

    seeds: tuple[int, ...]
    """The seeds themselves, [N]."""

    def __init__(self, seeds: Sequence[int] | Tensor) -> None:
        """Check and keep the seeds; see the class."""
        if isinstance(seeds, Tensor):
            if seeds.ndim != 1 or seeds.is_floating_point() or seeds.dtype == torch.bool:
                raise TypeError(
                    f"seeds must be an integer tensor [N], got {seeds.dtype} of shape "
                    f"{list(seeds.shape)}"
                )
            seeds = seeds.tolist()
        self.seeds = tuple(_checked_seed(seed) for seed in seeds)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.seeds)

    def __eq__(self, other: object) -> bool:
        """Whether the seeds are the same."""
        return self.seeds == other.seeds if isinstance(other, SampleSeeds) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.seeds)

    def __repr__(self) -> str:
        return f"SampleSeeds({list(self.seeds)})"

    def rows(self, rows: Tensor) -> "SampleSeeds":
        """Seeds of a selection of the samples: a mask [N] bool or indices."""
        return SampleSeeds(torch.tensor(self.seeds, dtype=torch.int64)[rows.cpu()])

    def derived(self, *labels: int | str) -> "SampleSeeds":
        """Different seeds, computed from the seeds and the labels alone, so that they are the same
        in every run and with every version of Python.
        """
        words = [_word(label) for label in labels]
        return SampleSeeds([_folded(seed, words) for seed in self.seeds])

    def single(self) -> int:
        """One number computed from all seeds in their order, for randomness that is not per sample
        (a network's own draws from global generators).
        """
        return _folded(len(self), self.seeds)


class SampleDraws:
    """Successive draws from :class:`SampleSeeds`: the n-th draw of a sample does not depend on the
    other samples.
    """

    def __init__(self, seeds: SampleSeeds) -> None:
        """Start at draw 0."""
        self.seeds = seeds
        self.count = 0

    def next(self) -> SampleSeeds:
        """Seeds of the next draw."""
        self.count += 1
        return self.seeds.derived("draw", self.count)


Private = torch.Generator | SampleDraws
"""Source of the randomness of one call: :func:`rand`, :func:`randn` and :func:`draw_seed` draw from
it.
"""


def private_generator(
    generator: torch.Generator | SampleSeeds | None, device: torch.device
) -> Private:
    """Source seeded by one number of ``generator``, by the seeds of the samples or, without both,
    by fresh entropy.
    """
    if isinstance(generator, SampleSeeds):
        return SampleDraws(generator)
    private = torch.Generator(device=device)
    if generator is None:
        private.seed()
    elif isinstance(generator, torch.Generator):
        private.manual_seed(draw_seed(generator))
    else:
        raise TypeError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; "
            "use torch.Generator().manual_seed(seed), or SampleSeeds for a seed per sample"
        )
    return private


def rand(
    shape: Sequence[int], private: Private, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uniform numbers in [0, 1) of shape [N, ...]."""
    if isinstance(private, torch.Generator):
        return torch.rand(tuple(shape), generator=private, dtype=dtype, device=device)
    return _drawn(Tensor.uniform_, torch.empty(tuple(shape), dtype=dtype), private).to(device)


def randn(
    shape: Sequence[int], private: Private, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Normal numbers of shape [N, ...]."""
    if isinstance(private, torch.Generator):
        return torch.randn(tuple(shape), generator=private, dtype=dtype, device=device)
    return _drawn(Tensor.normal_, torch.empty(tuple(shape), dtype=dtype), private).to(device)


def check_seeds(generator: torch.Generator | SampleSeeds | None, x: Tensor) -> None:
    """Seeds of samples, if given, are as many as the images."""
    if isinstance(generator, SampleSeeds) and len(generator) != len(x):
        raise ValueError(
            f"SampleSeeds must hold one seed per image, {len(x)}, got {len(generator)}; "
            "select those of the images with seeds.rows(rows)"
        )


def draw_seed(generator: Private) -> int:
    """A number that seeds another generator."""
    if isinstance(generator, SampleDraws):
        return generator.next().single()
    return int(torch.randint(_SEEDS, (), generator=generator, device=generator.device))


def _drawn(fill: Callable[..., Tensor], numbers: Tensor, draws: SampleDraws) -> Tensor:
    """``numbers`` [N, ...], the part of every sample filled by a generator of its own."""
    seeds = draws.next().seeds
    if len(seeds) != len(numbers):
        raise ValueError(
            f"SampleSeeds of {len(seeds)} samples cannot draw for {len(numbers)}; use "
            "seeds.rows(rows)"
        )
    generator = torch.Generator()
    for seed, row in zip(seeds, numbers, strict=True):
        fill(row, generator=generator.manual_seed(seed))
    return numbers


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool):
        raise TypeError("seeds must be integers, got bool")
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(
            f"seeds must be integers, got {type(seed).__name__}; use int(seed)"
        ) from None
    if not 0 <= number < _SEEDS:
        raise ValueError(f"seeds must lie in [0, 2**62), got {number}; use seed % 2**62")
    return number


def _folded(seed: int, words: Sequence[int]) -> int:
    """A seed from a seed and words; the order of the words counts."""
    state = _splitmix64(seed)
    for word in words:
        state = _splitmix64(state ^ _splitmix64(word + 1))
    return state >> 2


def _splitmix64(number: int) -> int:
    """Finaliser of splitmix64 after one step of its counter: a bijection of 64-bit words that mixes
    all bits.
    """
    word = (number + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _word(label: int | str) -> int:
    """64 bits of a label; Python's own hash of text differs from run to run."""
    text = f"{type(label).__name__}:{label}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
