"""Random noise, as a baseline for attacks.

``model`` and ``y`` only give all attacks the same signature; the noises use neither and allow
None.
"""

import torch
from torch import Tensor

from sj_robust.attacks.call import Model, Randomness
from sj_robust.core.checks import check_images, check_labels, check_model, check_size, is_checked
from sj_robust.core.randomness import Private, check_seeds, private_generator, rand, randn
from sj_robust.core.threat import Threat, as_threat, random_point

__all__ = ["gaussian", "salt_and_pepper", "uniform"]


@torch.no_grad()
def gaussian(
    model: Model | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    std: float,
    clamp: bool = True,
    generator: Randomness = None,
) -> Tensor:
    """Gaussian noise of standard deviation ``std``; ``model`` and ``y`` are not used.

    高斯噪声。

    Equation: ``x_adv = clamp(x + std * n, 0, 1)`` with ``n ~ N(0, 1)`` in every element.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`.

    Args:
        std: Standard deviation in units of [0, 1] images, such as ``8 / 255``, in [0, 1].
        clamp: Whether to clamp to [0, 1]; False for Gaussian training, whose inputs may leave the
            box.

    Source: Ding et al. (ICML 2024), section 5, sigma = 8/255; the published training code does not
        clamp.

    Examples:
        >>> x = torch.full((2, 1, 4, 4), 0.5)
        >>> gaussian(None, x, std=8 / 255, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 4, 4])
    """
    std, private = check_size("std", std, at_most=1.0), _checked(model, x, y, generator)
    x_adv = x + std * randn(x.shape, private, dtype=x.dtype, device=x.device)
    return x_adv.clamp(0, 1) if clamp else x_adv


@torch.no_grad()
def uniform(
    model: Model | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: Threat,
    generator: Randomness = None,
) -> Tensor:
    """Uniform noise in the Linf ball; ``model`` and ``y`` are not used.

    均匀噪声。

    Equation: ``x_adv = clamp(x + eps * u, 0, 1)`` with ``u ~ U(-1, 1)`` in every element.

    All arguments, result and errors are those of :mod:`sj_robust.attacks`.

    Source: the random start of PGD, Madry et al. (ICLR 2018), without a step after it.

    Examples:
        >>> x = torch.full((2, 1, 4, 4), 0.5)
        >>> bool((uniform(None, x, eps=8 / 255) - x).abs().max() <= 8 / 255)
        True
    """
    threat, private = as_threat(eps, "Linf"), _checked(model, x, y, generator)
    return random_point(x, threat, private)


@torch.no_grad()
def salt_and_pepper(
    model: Model | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    amount: float,
    generator: Randomness = None,
) -> Tensor:
    """Salt-and-pepper noise: elements become black or white; ``model`` and ``y`` are not used.

    椒盐噪声。

    Equation: every element is 0 with probability ``amount / 2``, 1 with probability ``amount / 2``
    and as in ``x`` otherwise, the channels of a pixel independently.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`.

    Args:
        amount: Expected share of replaced elements, in [0, 1].

    Source: impulse noise, Gonzalez and Woods, Digital Image Processing, section 5.2.

    Examples:
        >>> salt_and_pepper(None, torch.full((1, 10000), 0.5), amount=1.0).unique()
        tensor([0., 1.])
    """
    amount, private = check_size("amount", amount, at_most=1.0), _checked(model, x, y, generator)
    chance = rand(
        x.shape, private, dtype=torch.float64, device=x.device
    )  # half precision is too coarse for a share
    x_adv = x.masked_fill(chance < amount / 2, 0.0)
    return x_adv.masked_fill(chance >= 1 - amount / 2, 1.0)


def _checked(model: object, x: Tensor, y: Tensor | None, generator: Randomness) -> Private:
    """Checks of all noises, and their random source."""
    if not is_checked():
        if model is not None:
            check_model(model)
        check_images(x)
        if y is not None:
            check_labels(y, x)
    check_seeds(generator, x)
    return private_generator(generator, x.device)
