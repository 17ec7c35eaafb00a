"""Linear classifiers whose minimal adversarial distance is known in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor


class LinearOracle(NamedTuple):
    """A linear model, images far from the border of the box, and a radius that some of them
    survive.
    """

    weight: Tensor
    x: Tensor
    y: Tensor
    eps: float
    robust: Tensor  # [N] bool: whether no image within eps is misclassified

    def model(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


def linear_oracle(
    classes: int, norm: str, *, seed: int = 0, samples: int = 60, features: int = 12
) -> LinearOracle:
    """Images of random classes; the distance to class j is (z_y - z_j) / ||w_y - w_j|| in the dual
    norm.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    x = 0.5 + 0.1 * (
        torch.rand(
            samples,
            features,
            generator=generator,
            dtype=torch.float64,
        )
        - 0.5
    )
    logits = (x - 0.5) @ weight.T
    y = logits.argmax(1)
    gaps = weight[y, None] - weight[None]
    dual = gaps.abs().sum(2) if norm == "Linf" else gaps.norm(dim=2)
    leads = logits.gather(1, y[:, None]) - logits
    distances = (leads / dual).scatter(1, y[:, None], torch.inf).amin(1)
    ordered = distances.sort().values[samples // 3 : 2 * samples // 3]
    widest = int(ordered.diff().argmax())
    eps = float(ordered[widest : widest + 2].mean())
    assert (
        float(ordered[widest + 1] / ordered[widest]) > 1 + 1e-4
    )  # no distance so near that rounding would decide
    assert eps < 0.4  # the box is out of reach
    return LinearOracle(weight, x, y, eps, distances > eps)
