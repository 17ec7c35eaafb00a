"""Mean logits of a stochastic network, for attacks without gradients."""

import torch
from torch import Tensor, nn

from sj_robust.attacks.call import Model

__all__ = ["AveragedLogits", "averaged"]


class AveragedLogits(nn.Module):
    """A model whose logits are means over several forwards.

    Args:
        model: Images to logits.
        draws: Number of forwards, >= 1.

    Examples:
        >>> noisy = AveragedLogits(lambda x: x + torch.randn_like(x), 400)
        >>> bool((noisy(torch.zeros(2, 3)).abs() < 0.5).all())
        True
    """

    def __init__(self, model: Model, draws: int) -> None:
        """Keep both."""
        super().__init__()
        self.model = model
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        """Mean over the forwards."""
        return torch.stack([self.model(x) for _ in range(self.draws)]).mean(0)


def averaged(model: Model, draws: int) -> Model:
    """The model itself for one draw, else :class:`AveragedLogits`."""
    return model if draws == 1 else AveragedLogits(model, draws)
