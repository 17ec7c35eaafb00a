"""RSC: Gaussian noise on the image as an encoding."""

import torch
from torch import Tensor

from sj_robust.core.checks import check_generator, check_size, check_switch
from sj_robust.core.host import base

__all__ = ["SmoothingEncoder"]


class SmoothingEncoder(base.MemoryModule):
    """Randomised smoothing coding: every time step sees the image under fresh Gaussian noise.
    随机平滑编码。

    Equation::

        frame[t] = x + std * n[t],    n[t] ~ N(0, 1)            (RSC-II)
        frame[t] = x + std * n,       n ~ N(0, 1)               (RSC-I, ``shared``)

    Both have the mean of Poisson coding and also hide small perturbations under noise. The noise is
    active in training and in evaluation, and nothing is clamped. The gradient with respect to the
    image is one, so attacks that average over draws are not misled by it.

    Open points: the text that was available distinguishes RSC-I and RSC-II, but does not give the
    standard deviations of its tables (0.125 is this package's choice); the noise is drawn again in
    every forward of an attack, yet no attack of the paper averages over it. Its training E-RSCT
    (distillation from an ordinary network, with a loss on the input of neurons) is not part of this
    encoder.

    Args:
        std: Standard deviation in units of [0, 1] images, >= 0.
        shared: Whether all time steps see the same noise.
        generator: Source of the noise; None uses torch's global generator, which attacks and
            evaluations seed.

    Shapes: images [N, ...] to one frame of the same shape; a classifier calls it once per time
    step.

    Raises:
        TypeError, ValueError: If an argument is out of range.
        RuntimeError: If shared noise would be added to images of another shape.

    Source: Wu et al., "RSC-SNN: Exploring the Trade-off Between Adversarial Robustness and Accuracy
        in Spiking Neural Networks via Randomized Smoothing Coding" (ACM MM 2024, arXiv 2407.20099),
        section 4.

    Examples:
        >>> encoder = SmoothingEncoder(0.5, generator=torch.Generator().manual_seed(0))
        >>> first, second = (encoder(torch.zeros(1000)) for _ in range(2))
        >>> bool((first - second).std() > 0.6)
        True
    """

    noise: Tensor | None

    def __init__(
        self,
        std: float = 0.125,
        *,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Keep the options; see the class."""
        super().__init__()
        self.std = check_size("std", std)
        check_switch("shared", shared)
        check_generator(generator)
        self.shared = shared
        self.generator = generator
        self.register_memory("noise", None)

    def forward(self, images: Tensor) -> Tensor:
        """The frame of one time step."""
        noise = self.noise
        if noise is not None and noise.shape != images.shape:
            raise RuntimeError(
                f"the noise of this sequence has shape {tuple(noise.shape)}, but the images have "
                f"{tuple(images.shape)}: call functional.reset_net(net) before another batch"
            )
        if noise is None or not self.shared:
            # torch.randn with generator=None does not compile for shapes that change
            noise = images.new_empty(images.shape).normal_(generator=self.generator)
        if self.shared:
            self.noise = noise
        return images + self.std * noise

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        return f"std={self.std}, shared={self.shared}"
