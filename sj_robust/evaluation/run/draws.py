"""Whether a network gives the same logits again: it draws no numbers, and carries no state."""

import torch
from torch import Tensor, nn

from sj_robust.core.environment import device_of
from sj_robust.core.preserved import preserved
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.identity import seeded_sources
from sj_robust.evaluation.run.member import scored
from sj_robust.evaluation.run.progress import gathered, rank_and_world_size

__all__ = ["check_draws"]

_REMEDIES = {
    "state": "the network carries state from one forward into the next: on {images} its logits "
    "differ though all random numbers were the same. Reset it before every forward, as "
    "SpikingClassifier(net, T=...) does",
    "numbers": "the network draws random numbers: on {images} its logits differ. One lucky draw "
    "breaks nothing, so say in how many fresh draws an image must be wrong, such as draws=10 "
    "(--draws 10)",
}


def check_draws(model: nn.Module, data: Data) -> None:
    """Every image is asked twice, with other random numbers; the logits must be the same.
    检查网络是否含随机性或残留状态。

    Two forwards of every image, so a small share of what its attacks cost. Several processes share
    the images.

    Args:
        model: The network; its states stay as they were.
        data: The images that will be evaluated.

    Raises:
        ValueError: If logits differ, with the reason: with the same random numbers once more,
            a network that draws repeats itself, and one that carries state does not.

    Examples:
        >>> data = Data.of([(torch.rand(2, 4), torch.tensor([0, 1]))])
        >>> check_draws(nn.Dropout(), data)  # which is not in force in evaluation mode
    """
    rank, processes = rank_and_world_size()
    found: dict[int, str] = {}
    with preserved(model):
        for number in range(rank, len(data), processes):
            x, y = (part.to(device_of(model)) for part in data[number])
            if reason := _reason(model, x, y):
                start = sum(data.sizes[:number])
                images = f"images {start} to {start + len(y) - 1}"
                found[number] = _REMEDIES[reason].format(images=images)
                break
    for message in gathered(found).values():
        raise ValueError(message)


def _reason(model: nn.Module, x: Tensor, y: Tensor) -> str:
    """Why logits differ; empty if they do not."""
    first = _logits(model, x, y, seed=0)
    other = _logits(model, x, y, seed=1)
    if torch.equal(first, other):
        return ""
    again = _logits(model, x, y, seed=1)
    return "numbers" if torch.equal(other, again) else "state"


def _logits(model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
    with seeded_sources(model, seed, x.device):
        return scored(model, x, y, seed=seed)
