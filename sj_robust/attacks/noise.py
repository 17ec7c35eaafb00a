"""Random noise, the weakest attack and the yardstick of the others."""

from collections.abc import Callable

import torch
from torch import Tensor

from sj_robust.attacks.checks import check_images, check_labels, check_model, check_size
from sj_robust.attacks.randomness import SampleSeeds, check_seeds, private_generator, randn

__all__ = ["gaussian"]


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

    Example:
        >>> x = torch.full((2, 1, 4, 4), 0.5)
        >>> gaussian(None, x, std=8 / 255, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 4, 4])
    """
    if model is not None:
        check_model(model)
    check_images(x)
    if y is not None:
        check_labels(y, x)
    std = check_size("std", std, at_most=1.0)
    check_seeds(generator, x)
    private = private_generator(generator, x.device)
    x_adv = x + std * randn(x.shape, private, dtype=x.dtype, device=x.device)
    return x_adv.clamp(0, 1) if clamp else x_adv
