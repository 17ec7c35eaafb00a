"""STOD: an orthogonal kernel per time step before the network."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from sj_robust.core.checks import check_count, check_switch
from sj_robust.core.host import base
from sj_robust.defences.penalty import ForwardPasses, Penalty

__all__ = ["OrthogonalEncoder", "TemporalOrthogonality", "temporal_similarity"]

_CENTRE = 0.5


class OrthogonalEncoder(base.MemoryModule):
    """Structured temporal orthogonal decorrelation: patches of the image are multiplied by an
    orthogonal kernel for each time step. 逐时间步的正交核编码。

    Equation, where P cuts an image into patches of ``patch`` x ``patch`` pixels, rows of d = C *
    patch^2 numbers::

        frame[t] = c + P^-1(P(x - c) O[t]),          O[t] O[t]^T = I,   c = 0.5
        O[t] = O0[t] (I - A[t]) (I + A[t])^-1,       A[t] = S[t] - S[t]^T

    S is learned and starts at zero, so the kernels start at O0: the identity in the first step,
    then products of Householder reflections ``I - 2 e_j e_j^T`` over those j at which a Walsh
    function of t is negative. Where d is a multiple of the power of two at or above T, these are
    mutually orthogonal, ``<O0[i], O0[j]> = 0``. The distance of an image from grey does not change:
    ``||frame[t] - c|| = ||x - c||``.

    Differences from the paper and open points: the paper learns the kernels by Riemannian SGD,
    while here the Cayley transform keeps them orthogonal under any optimizer; the index of its
    reflections is ambiguous; it does not say whether images are normalised first, while here they
    are transformed around grey, 0.5. Its main table evaluates without the kernels (``kept=False``),
    without which a network may fail.

    Args:
        image_shape: (C, H, W) of an image.
        T: Number of kernels; later time steps start again with the first one.
        patch: Height and width of a patch, which must divide those of the image; the paper finds
            that 8 is best for CIFAR-10.
        kept: Whether the kernels are also used in evaluation mode; False uses direct encoding
            there, also for the attacks of adversarial training.

    Shapes: images [N, C, H, W] to one frame of the same shape; a classifier calls it once per time
    step.

    Raises:
        TypeError, ValueError: If an argument is out of range or does not fit the image.

    Source: "Breaking Gradient Temporal Collinearity for Robust Spiking Neural Networks" (ICLR
        2026), patchwise feature diversification; only reviews and notes of the paper were
        available.

    Examples:
        >>> encoder = OrthogonalEncoder((1, 4, 4), T=4, patch=2)
        >>> x = torch.rand(3, 1, 4, 4)
        >>> first, second = encoder(x), encoder(x)
        >>> torch.equal(first, x), torch.equal(second, x)
        (True, False)
    """

    t: int
    start: Tensor

    def __init__(
        self, image_shape: Sequence[int], T: int, *, patch: int = 4, kept: bool = True
    ) -> None:
        """Build the kernels; see the class."""
        super().__init__()
        channels, height, width = image_shape
        check_count("T", T)
        check_count("patch", patch)
        check_switch("kept", kept)
        if height % patch or width % patch:
            raise ValueError(
                f"patch must divide height and width of the image, {height}x{width}, got {patch}; "
                "use 4"
            )
        size = channels * patch**2
        self.patch = patch
        self.kept = kept
        self.skew = nn.Parameter(torch.zeros(T, size, size))
        self.register_buffer("start", _walsh_signs(T, size), persistent=False)
        self.register_memory("t", 0)

    def kernel(self, t: int) -> Tensor:
        """O[t], [d, d]."""
        # linear systems are not solved in half precision
        precise = torch.promote_types(self.skew.dtype, torch.float32)
        matrix = self.skew[t].to(precise)
        skew = matrix - matrix.T
        one = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
        turned: Tensor = torch.linalg.solve(one + skew, one - skew)  # the factors commute
        kernel = self.start[t].unsqueeze(1) * turned
        return kernel.to(self.skew.dtype)

    def turned(self, images: Tensor, t: int) -> Tensor:
        """The difference of an image from grey under the kernel of a step, ``frame[t] - c``."""
        patches, sizes = self._cut(images - _CENTRE)
        kernel = self.kernel(t).to(patches.dtype)
        return self._joined(patches @ kernel, sizes)

    def forward(self, images: Tensor) -> Tensor:
        """The frame of one time step."""
        t = self.t % len(self.skew)
        self.t = self.t + 1
        if not (self.training or self.kept):
            return images
        return _CENTRE + self.turned(images, t)

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        return f"kernels={len(self.skew)}, patch={self.patch}, kept={self.kept}"

    def _cut(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Patches [N, rows, columns, d], and the sizes by which they become images again."""
        n, channels, height, width = images.shape
        p = self.patch
        sizes = (n, channels, height // p, p, width // p, p)
        by_place = images.reshape(sizes).permute(0, 2, 4, 1, 3, 5)
        return by_place.flatten(3), sizes

    def _joined(self, patches: Tensor, sizes: tuple[int, ...]) -> Tensor:
        n, channels, rows, p, columns, _ = sizes
        by_place = patches.reshape(n, rows, columns, channels, p, p)
        by_row = by_place.permute(0, 3, 1, 4, 2, 5)
        return by_row.reshape(n, channels, rows * p, columns * p)


def temporal_similarity(frames: Tensor) -> Tensor:
    """Squared cosine between the frames of every two time steps, summed; mean over the images.
    时间步之间的余弦相似度平方和。

    Equation: ``sum over i < j of cos(frame[i], frame[j])^2``.

    Args:
        frames: [T, N, ...].

    Returns:
        A scalar; 0 where no two steps are similar.

    Source: global orthogonal regularisation of "Breaking Gradient Temporal Collinearity for Robust
        Spiking Neural Networks" (ICLR 2026).

    Examples:
        >>> temporal_similarity(torch.eye(2).unsqueeze(1)), temporal_similarity(torch.ones(2, 1, 4))
        (tensor(0.), tensor(1.))
    """
    flat = nn.functional.normalize(frames.flatten(2), dim=2)
    pairs = combinations(range(len(flat)), 2)
    cosines = [(flat[i] * flat[j]).sum(1) for i, j in pairs]
    if not cosines:
        return frames.new_zeros(())
    return torch.stack(cosines).square().sum(0).mean()


def _walsh_signs(T: int, size: int) -> Tensor:
    """Diagonals of the first T Walsh functions on ``size`` points, [T, size], the first all one."""
    points = torch.arange(size)
    signs = torch.ones(T, size)
    bits = max(T - 1, 1).bit_length()
    for t in range(T):
        for bit in range(bits):
            if t >> bit & 1:
                is_set = points >> bit & 1
                signs[t] *= 1.0 - 2.0 * is_set
    return signs


class TemporalOrthogonality(Penalty):
    """Decorrelates the frames that an orthogonal encoder makes from an image.
    时间步编码的正交正则。

    Equation, with the difference f[t] of the frame of step t from grey::

        value = mean over the images of the sum over i < j of cos(f[i], f[j])^2

    It only changes the kernels of :class:`sj_robust.defences.OrthogonalEncoder`.

    Args:
        weight: Weight in the objective.

    Raises:
        ValueError: If the weight is out of range.
        TypeError: When evaluated, if the classifier has another encoder.

    Source: global orthogonal regularisation of "Breaking Gradient Temporal Collinearity for Robust
        Spiking Neural Networks" (ICLR 2026); its weight is not in the text that was available.

    Examples:
        >>> TemporalOrthogonality(weight=0.1).name
        'temporal_orthogonality'
    """

    name = "temporal_orthogonality"

    def value(self, passes: ForwardPasses) -> Tensor:
        """Mean over the batch; see the class."""
        encoder = passes.classifier.encoder
        if not isinstance(encoder, OrthogonalEncoder):
            raise TypeError(
                "temporal_orthogonality needs an OrthogonalEncoder, got "
                f"{type(encoder).__name__}; use the encoder stod"
            )
        images = passes.first[0].detach()
        frames = [encoder.turned(images, t) for t in range(len(encoder.skew))]
        return temporal_similarity(torch.stack(frames))
