"""Random noise, the weakest attacks and the yardstick of the others."""

from collections.abc import Callable

import torch
from torch import Tensor

from sj_robust.attacks.checks import check_images, check_labels, check_model, check_size
from sj_robust.attacks.projection import linf_bounds
from sj_robust.randomness import SampleSeeds, check_seeds, private_generator, rand, randn

__all__ = ["gaussian", "salt_and_pepper", "uniform"]


@torch.no_grad()
def gaussian(
    model: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    std: float,
    clamp: bool = True,
    generator: torch.Generator | SampleSeeds | None = None,
) -> Tensor:
    """Gaussian noise of standard deviation ``std``.

    高斯噪声。

    Equation: ``x_adv = clamp(x + std * n, 0, 1)`` with ``n ~ N(0, 1)`` in every element.

    Args:
        model: Not used (None is allowed); there so that all attacks are called alike.
        x: Images [N, ...] in [0, 1], floating point.
        y: Not used; labels [N] if given.
        std: Standard deviation in units of [0, 1] images, such as ``8 / 255``.
        clamp: Whether to clamp to [0, 1]; False for Gaussian training, whose inputs may leave the box.
        generator: Seeds the noise, per sample if it is ``SampleSeeds``; None draws fresh numbers without touching the
            global generators.

    Returns:
        The noisy images, in shape, dtype and device of ``x``.

    Raises:
        TypeError: If an argument has the wrong type or ``x`` is not floating point.
        ValueError: If ``x`` is not finite or leaves [0, 1], or ``std`` is not in [0, 1].

    Source: Ding et al. (ICML 2024), section 5, sigma = 8/255; the published training code does not clamp.

    Examples:
        >>> x = torch.full((2, 1, 4, 4), 0.5)
        >>> gaussian(None, x, std=8 / 255, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 4, 4])
    """
    _check_call(model, x, y, generator)
    std = check_size("std", std, at_most=1.0)
    private = private_generator(generator, x.device)
    x_adv = x + std * randn(x.shape, private, dtype=x.dtype, device=x.device)
    return x_adv.clamp(0, 1) if clamp else x_adv


@torch.no_grad()
def uniform(
    model: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float,
    generator: torch.Generator | SampleSeeds | None = None,
) -> Tensor:
    """Uniform noise in the Linf ball.

    均匀噪声。

    Equation: ``x_adv = clamp(x + eps * u, 0, 1)`` with ``u ~ U(-1, 1)`` in every element.

    Args:
        model: Not used (None is allowed); there so that all attacks are called alike.
        x: Images [N, ...] in [0, 1], floating point.
        y: Not used; labels [N] if given.
        eps: Linf radius in units of [0, 1] images, such as ``8 / 255``; never exceeded, see ``linf_bounds``.
        generator: Seeds the noise, per sample if it is ``SampleSeeds``; None draws fresh numbers without touching the
            global generators.

    Returns:
        The noisy images, in shape, dtype and device of ``x``.

    Raises:
        TypeError: If an argument has the wrong type or ``x`` is not floating point.
        ValueError: If ``x`` is not finite or leaves [0, 1], or ``eps`` is not in [0, 1].

    Source: the random start of PGD, Madry et al. (ICLR 2018), without a step after it.

    Examples:
        >>> x = torch.full((2, 1, 4, 4), 0.5)
        >>> bool((uniform(None, x, eps=8 / 255) - x).abs().max() <= 8 / 255)
        True
    """
    _check_call(model, x, y, generator)
    eps = check_size("eps", eps, at_most=1.0)
    private = private_generator(generator, x.device)
    noise = 2 * rand(x.shape, private, dtype=x.dtype, device=x.device) - 1
    return (x + eps * noise).clamp(*linf_bounds(x, eps=eps))


@torch.no_grad()
def salt_and_pepper(
    model: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    amount: float,
    generator: torch.Generator | SampleSeeds | None = None,
) -> Tensor:
    """Salt-and-pepper noise: elements become black or white.

    椒盐噪声。

    Equation: every element is 0 with probability ``amount / 2``, 1 with probability ``amount / 2`` and as in ``x``
    otherwise, the channels of a pixel independently.

    Args:
        model: Not used (None is allowed); there so that all attacks are called alike.
        x: Images [N, ...] in [0, 1], floating point.
        y: Not used; labels [N] if given.
        amount: Expected share of replaced elements, in [0, 1].
        generator: Seeds the noise, per sample if it is ``SampleSeeds``; None draws fresh numbers without touching the
            global generators.

    Returns:
        The noisy images, in shape, dtype and device of ``x``.

    Raises:
        TypeError: If an argument has the wrong type or ``x`` is not floating point.
        ValueError: If ``x`` is not finite or leaves [0, 1], or ``amount`` is not in [0, 1].

    Source: impulse noise, Gonzalez and Woods, Digital Image Processing, section 5.2.

    Examples:
        >>> salt_and_pepper(None, torch.full((1, 10000), 0.5), amount=1.0).unique()
        tensor([0., 1.])
    """
    _check_call(model, x, y, generator)
    amount = check_size("amount", amount, at_most=1.0)
    private = private_generator(generator, x.device)
    chance = rand(x.shape, private, dtype=torch.float64, device=x.device)  # half precision is too coarse for a share
    x_adv = x.masked_fill(chance < amount / 2, 0.0)
    return x_adv.masked_fill(chance >= 1 - amount / 2, 1.0)


def _check_call(model: object, x: Tensor, y: Tensor | None, generator: torch.Generator | SampleSeeds | None) -> None:
    """Entry check of all noises."""
    if model is not None:
        check_model(model)
    check_images(x)
    if y is not None:
        check_labels(y, x)
    check_seeds(generator, x)
