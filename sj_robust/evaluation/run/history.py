"""Whether a network keeps what it was asked outside of itself, as in a file or a module."""

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
from torch import Tensor

from sj_robust.attacks.logits import differ
from sj_robust.core.broadcast import along
from sj_robust.core.environment import device_of
from sj_robust.core.preserved import seeded_network
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.plain import Plain

__all__ = ["check_history"]

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
        _answer(ask, target, opens=opens)
    os.close(target)
    said = ""
    with os.fdopen(source) as file:
        if select.select([file], [], [], _SECONDS)[0]:
            said = file.read()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = json.loads(said) if said else _SILENT
    return torch.tensor(found, dtype=torch.float64) if isinstance(found, list) else str(found)


def _answer(ask: Callable[[], Tensor], target: int, *, opens: bool) -> None:
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
