"""How a network answers: alike in every forward or drawn at random, alone or depending on others,
and on what was asked before.
"""

import copy
import json
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
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
from sj_robust.evaluation.run.plain import Plain
from sj_robust.evaluation.run.progress import gathered, rank_and_world_size

__all__ = [
    "BESIDE",
    "DRAWS",
    "changed_by_others",
    "check_history",
    "gradient_draws",
    "settled_draws",
]

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


_IMAGES = 4
_NEAR = (0.003, 0.01, 0.03, 0.1)
"""How far images are asked from those that were asked before."""
_ROUNDS = 4
"""How often these were asked before."""
_SECONDS = 60.0
_SILENT = f"no answer within {_SECONDS:.0f} seconds"


def check_history(plain: Plain, data: Data) -> list[str]:
    """Raise ValueError where an answer depends on what was asked before, and a copy of the network
    does not stop it: what it remembers lies in a file, the environment, a module or a cache.

    Two copies of this process, which forget all that they do and can open no file, are asked for
    the same images, one of them after images nearby; all of these are noise over images of the
    data, which nobody has asked yet. What another process keeps for the network is not found, and
    on systems other than Linux nothing is asked. Returns remarks for the report.
    """
    if sys.platform != "linux":
        return []
    device = torch.device("cpu")
    images, _ = data.first(_IMAGES).tensors(device)
    network = plain if device_of(plain) == device else copy.deepcopy(plain).to(device)
    before, near = _asked_images(images)

    def answer(*asked: Tensor) -> Tensor:
        for x in asked:
            with torch.no_grad(), seeded_network(network, 0, device):
                found: Tensor = network(x)
        return found

    with suppress(Exception):  # which a copy of this process tells
        answer(images)  # and imports what the first forward needs
    alone = _forgotten(partial(answer, near))
    after = _forgotten(partial(answer, *before, near))
    if isinstance(alone, Tensor) and isinstance(after, Tensor):
        if differ(alone, after):
            raise ValueError(
                "the logits of an image must not depend on images that were asked before, got "
                "others after images nearby: keep nothing of an image in a file, in a module or in "
                "a cache"
            )
        return []
    reason = after if isinstance(alone, Tensor) else alone
    if reason != _SILENT and isinstance(_forgotten(partial(answer, near), opens=True), Tensor):
        raise ValueError(
            f"a forward must open no file, got {reason} where it cannot; read files when the "
            "network is built"
        )
    return [f"Whether the network keeps images outside of itself was not found out: {reason}."]


def _asked_images(images: Tensor) -> tuple[list[Tensor], Tensor]:
    """What is asked before, again and again, and images near the first of it."""
    draw = torch.Generator().manual_seed(0)

    def uniform() -> Tensor:
        return torch.rand(images.shape, generator=draw).to(images)

    sizes = torch.tensor(_NEAR)[torch.arange(len(images)) % len(_NEAR)]
    away = along(sizes, 0, images.ndim).to(images)
    if bool((images == images.round()).all()):  # events, of which some are others
        fresh = torch.where(uniform() < 0.5, images, 1 - images.clamp(max=1))
        moved = [
            torch.where(uniform() < away, 1 - fresh.clamp(max=1), fresh) for _ in range(_ROUNDS)
        ]
    else:
        fresh = torch.lerp(images, uniform(), 0.5)
        moved = [torch.lerp(fresh, uniform(), away) for _ in range(_ROUNDS)]
    return [fresh, *moved[1:]], moved[0]


def _forgotten(ask: Callable[[], Tensor], *, opens: bool = False) -> Tensor | str:
    """What is answered in a copy of this process, of which nothing else remains; or why not."""
    source, target = os.pipe()
    with warnings.catch_warnings():
        # of threads, which the copy has not: it computes in one of its own
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _tell(ask, target, opens=opens)
    os.close(target)
    said = ""
    with os.fdopen(source) as file:
        if select.select([file], [], [], _SECONDS)[0]:
            said = file.read()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = json.loads(said) if said else _SILENT
    return torch.tensor(found, dtype=torch.float64) if isinstance(found, list) else str(found)


def _tell(ask: Callable[[], Tensor], target: int, *, opens: bool) -> None:
    """Write the answer, or the error, into a pipe, and end this process."""
    import resource  # which Windows has not

    try:
        for shown in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), shown)
        if not opens:  # nor writes to what is open
            for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
                resource.setrlimit(limit, (0, 0))
        torch.set_num_threads(1)
        said: list[list[float]] | str
        try:
            said = ask().double().tolist()
        except Exception as error:  # of foreign code
            said = f"{type(error).__name__}: {error}"
        os.write(target, json.dumps(said).encode())
    finally:
        os._exit(0)
