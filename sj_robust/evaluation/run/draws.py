"""Number of forwards by which a network is judged: one if deterministic, otherwise several."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sj_robust.attacks.logits import differ, differing
from sj_robust.core.broadcast import along, beside
from sj_robust.core.environment import device_of
from sj_robust.core.preserved import draws_numbers, preserved, seeded_network
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.member import scored
from sj_robust.evaluation.run.progress import gathered, rank_and_world_size

__all__ = ["BESIDE", "DRAWS", "changed_by_others", "gradient_draws", "settled_draws"]

DRAWS = 10
"""Forwards that a network which draws random numbers is judged in if nobody says how many."""

BESIDE = 16
"""Images of a forward that judges, or tells whether they depend on each other, if there are so
many.
"""

_REMEDIES = {
    "state": "the network carries state from one forward into the next: on {images} its logits "
    "differ though all random numbers were the same. Reset it before every forward, as "
    "SpikingClassifier(net, T=...) does; and if it draws from a generator of its own, keep this as "
    "an attribute of a module, where it can be seeded",
    "rows": "the logits of an image depend on the other images of its batch, or on its place. Let "
    "the network answer for each image alone, without statistics of a batch: batch norm needs "
    "track_running_stats=True and evaluation mode",
    "numbers": "the network draws random numbers: on {images} its logits differ. A single lucky "
    "draw does not count, so omit draws, or set the number of draws that judge an image, such as "
    "draws=10 (--draws 10)",
    "hidden numbers": "the network draws random numbers, though on {images} its logits agree. On "
    "attacked images they may differ, so omit draws, or set the number of draws that judge an "
    "image, such as draws=10 (--draws 10)",
}
_FEW = 4
"""Images of the forward in which random numbers are looked for that logits do not show."""
_AWAY = (0.0, 0.03, 0.1, 0.3)
"""How far copies of one image are from it, which stand beside each other."""


def settled_draws(model: nn.Module, data: Data, draws: int | None, *, shared: bool = True) -> int:
    """Number of forwards by which a network is judged. 确定随机网络的判定次数。

    Every image is asked twice, with other random numbers: two forwards of every image, so a small
    share of what its attacks cost. Where no logits differ, a forward of a few images is watched:
    noise that turns no spike there may do so on attacked images. Of a network that draws nothing,
    the first images are run again together with others, since attacks change the images of a batch;
    what a network draws may itself depend on the images before. Several processes share the images.

    Args:
        model: The network; its states stay as they were.
        data: The images that will be evaluated.
        draws: How many; None finds out: 1 for a network that gives the same logits again,
            :data:`DRAWS` for one that draws random numbers.
        shared: Whether all processes ask; False where one of them asks alone.

    Raises:
        ValueError: If logits differ because the network carries state from one forward into the
            next, or because they depend on the other images of a batch, or if it draws though one
            draw was asked for. With the same random numbers once more, a network that draws repeats
            itself, and one that carries state does not.

    Examples:
        >>> data = Data.of([(torch.rand(2, 4), torch.tensor([0, 1]))])
        >>> settled_draws(nn.Dropout(), data, None)  # which is not in force in evaluation mode
        1
    """
    rank, processes = rank_and_world_size() if shared else (0, 1)
    found: dict[int, tuple[str, str]] = {}
    with preserved(model):
        for number in range(rank, len(data), processes):
            x, y = (part.to(device_of(model)) for part in data[number])
            if reason := _reason(model, x, y):
                start = sum(data.sizes[:number])
                images = f"images {start} to {start + len(y) - 1}"
                found[number] = reason, _REMEDIES[reason].format(images=images)
                break
        if rank == 0 and not found:
            x, y = (part.to(device_of(model)) for part in data[0])
            if _draws(model, x[:_FEW]):
                reason = "hidden numbers"
                found[0] = reason, _REMEDIES[reason].format(images="the images")
            elif _depends_on_others(model, x[:BESIDE], y[:BESIDE]):
                found[0] = "rows", _REMEDIES["rows"]
    differing = (gathered(found) if shared else found).values()
    for reason, message in differing:
        if reason in ("state", "rows") or draws == 1:
            raise ValueError(message)
    if draws is None:
        return DRAWS if differing else 1
    return draws


def gradient_draws(draws: int, threat: ThreatModel) -> int:
    """Number of forwards that a gradient averages over, for a network that is judged by ``draws``:
    a third of them, at least two. 梯度平均的前向次数。

    An attack of many steps that goes on after a first success averages over its steps as well, so
    that more forwards in each step find little more
    (``docs/results/defences/gradient_draws.csv``). Attacks on events stop at the first lead that is
    large enough, and average over all draws.

    Examples:
        >>> threat = ThreatModel("Linf", 0.1)
        >>> [gradient_draws(draws, threat) for draws in (1, 2, 10, 50)]
        [1, 2, 3, 16]
        >>> gradient_draws(10, ThreatModel("L0", 5))
        10
    """
    if draws == 1 or threat.of_events:
        return draws
    return max(2, draws // 3)


def changed_by_others(
    answer: Callable[[Tensor], Tensor], x: Tensor, logits: Tensor, *, alone: int
) -> dict[str, Tensor]:
    """Which images have other logits than ``logits`` in another order of their batch, [N] bool, and
    which of the first ``alone`` ones beside nothing but a copy. 结果依赖批次的图像。
    """
    pairs = [torch.cat((image, image)) for image in torch.split(x[:alone], 1)]
    found = torch.cat([answer(pair)[:1] for pair in pairs])
    return {
        "in another order": differing(logits, answer(x.flip(0)).flip(0)),
        "alone": differing(logits[: len(found)], found),
    }


def _reason(model: nn.Module, x: Tensor, y: Tensor) -> str:
    """Why logits differ; empty if they do not."""
    first = _logits(model, x, y, seed=0)
    other = _logits(model, x, y, seed=1)
    if not differ(first, other):
        return ""
    again = _logits(model, x, y, seed=1)
    return "state" if differ(other, again) else "numbers"


def _depends_on_others(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether logits of an image change with the images beside it: others, or copies of itself
    that differ a little, as attacks make them.

    Every image keeps its place in the batch. With its place, another rounding may turn a spike, so
    that only what changes for most images counts.
    """
    if len(x) == 1:
        x, y = x.repeat(2, *[1] * (x.ndim - 1)), y.repeat(2)
    logits = _logits(model, x, y, seed=0)
    others = x.roll(1, 0)
    same = (others == x).flatten(1).all(1)
    others = torch.where(along(same, 0, x.ndim), x / 2, others)
    for kept, mixed in beside(x, others):
        found = _logits(model, mixed, y, seed=0)
        if differ(logits[kept], found[kept]):
            return True
    place = torch.arange(len(x), device=x.device)
    version = place % len(_AWAY)
    first = place - version
    strangers = x[(first + 1 + place % (len(_AWAY) - 1)).clamp(max=len(x) - 1)]
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    away = along(torch.tensor(_AWAY, device=x.device)[version], 0, x.ndim).to(x)
    copies = torch.lerp(x[first], uniform, away)
    together = _logits(model, copies, y, seed=0)
    for number in range(len(_AWAY)):
        kept = version == number
        mixed = torch.where(along(kept, 0, x.ndim), copies, strangers)
        apart = _logits(model, mixed, y, seed=0)
        if differ(apart[kept], together[kept]):
            return True
    answer = partial(_answer, model, y)
    for moved in changed_by_others(answer, x, logits, alone=_FEW).values():
        if float(moved.double().mean()) > 0.5:
            return True
    return False


def _answer(model: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return _logits(model, x, y[: len(x)], seed=0)


def _draws(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward draws random numbers, and goes on with others in the next one."""
    with seeded_network(model, 0, x.device), torch.no_grad():
        model(x)
        return draws_numbers(model, x)


def _logits(model: nn.Module, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
    with seeded_network(model, seed, x.device):
        return scored(model, x, y, seed=seed)
