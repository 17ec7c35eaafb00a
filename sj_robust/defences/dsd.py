"""DSD: removes the largest singular component of every gradient before the optimizer's step."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["deflate_"]


@torch.no_grad()
def deflate_(parameters: Iterable[Tensor]) -> None:
    """Remove the largest singular component from the gradient of every weight, in place.
    去除梯度的主奇异分量。

    Equation, for a gradient G as a matrix [out, everything else] with singular values s and
    singular vectors u and v, the largest first::

        G <- G - s_1 u_1 v_1^T

    The remainder is orthogonal to the removed part, so a small step still lowers the loss:
    ``<G, G - s_1 u_1 v_1^T> = s_2^2 + s_3^2 + ...``. Gradients of biases, of batch norm and of
    DLIF's input gains, which are no matrices, stay as they are. A gradient of rank one, such as
    that of a layer with one output, vanishes.

    Call it with the weights of convolutions and linear layers, between the backward pass and the
    step of the optimizer. Other parameters of two dimensions or more, such as the leaks of a
    neuron, would be deflated too. Learning rate, momentum and weight decay are not part of the
    method.

    What the paper leaves open: it is stated for direct encoding, and its code trains with the mean
    cross entropy of the single time steps, where this package uses that of the mean logits. Its
    robustness was measured with FGSM and PGD on the surrogate of the training, without a stronger
    evaluation. A full singular value decomposition of every weight at every step costs time that
    the paper does not count.

    Args:
        parameters: Parameters whose gradients are changed; those without a gradient, or with one
            that is not finite, are not changed.

    Source: Zhang, Hu and Min, "Robustify Spiking Neural Networks via Dominant Singular Deflation
        under Heterogeneous Training Vulnerability" (ICLR 2026), and its code (which parameters, and
        how they become matrices); no hyperparameters.

    Examples:
        >>> weight = torch.nn.Parameter(torch.eye(2))
        >>> weight.grad = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> deflate_([weight])
        >>> weight.grad
        tensor([[0., 0.],
                [0., 1.]])
    """
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and grad.ndim > 1 and bool(grad.isfinite().all()):
            grad.sub_(_largest_component(grad.flatten(1)).view_as(grad))


def _largest_component(matrix: Tensor) -> Tensor:
    """The best approximation of rank one of a matrix."""
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    outer = torch.outer(u[:, 0], vh[0])
    largest: Tensor = s[0] * outer
    return largest.to(matrix.dtype)
