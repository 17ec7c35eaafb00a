"""Whether a network is the one that an evaluation was begun with: what it is made of, and its
logits.
"""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sj_robust.core.checks import check_logits
from sj_robust.core.environment import device_of
from sj_robust.core.preserved import generators_of, preserved
from sj_robust.core.randomness import seeded_globals
from sj_robust.core.saved import write_whole
from sj_robust.evaluation.data import Data
from sj_robust.evaluation.fingerprint import fingerprint, parts_of
from sj_robust.evaluation.progress import another_evaluation, gathered, rank_and_world_size, read

__all__ = ["Identity", "identify", "network_key", "seeded_sources"]

_PROBES = 4
"""Images of noise, and of the data, whose logits are compared."""
_TOLERANCE = 1e-3
"""Share of the largest logit by which logits may differ between two machines."""
_LOGITS = "its logits on probe images"


@dataclass(frozen=True)
class Identity:
    """What a network is. 网络的身份。

    Two networks are one if all parts agree that no forward creates or changes, and their logits on
    the probe images: bit for bit on the same device with as many threads, else within a thousandth
    of the largest logit, by which rounding moves them. A network in which another rounding turns a
    spike has other logits, and is not taken for the same on another machine.

    Attributes:
        parts: Digests by name, see :func:`sj_robust.evaluation.fingerprint.parts_of`.
        made: Parts that the first forward creates or changes, such as what a module remembers.
        changing: Parts that other images change, such as counters.
        data: Digest of the images that the probe images come from.
        machine: Device and number of threads.
        noise: Logits on images of noise, [n, classes]; None if a second forward gives others.
        images: Logits on the first images of the data.
    """

    parts: dict[str, str]
    made: tuple[str, ...]
    changing: tuple[str, ...]
    data: str
    machine: str
    noise: list[list[float]] | None
    images: list[list[float]] | None

    @property
    def fingerprint(self) -> str:
        """Digest of the parts."""
        lasting = {name: part for name, part in self.parts.items() if name not in self.changing}
        return fingerprint(lasting)

    def differences(self, now: "Identity") -> list[str]:
        """What says that the network is another one now; nothing for the same one."""
        passing = {*self.made, *self.changing, *now.made, *now.changing}
        names = [name for name in self.parts | now.parts if name not in passing]
        found = [name for name in names if self.parts.get(name) != now.parts.get(name)]
        if not self._gives_logits_of(now):
            found.append(_LOGITS)
            if self.machine != now.machine:
                found[-1] += f", of {self.machine} and now of {now.machine}"
        return found

    def _gives_logits_of(self, now: "Identity") -> bool:
        exact = self.machine == now.machine
        same = _alike(self.noise, now.noise, exact=exact)
        return same and (self.data != now.data or _alike(self.images, now.images, exact=exact))


def identify(model: nn.Module, data: Data) -> Identity:
    """What a network is; it stays as it was. 描述网络的身份。

    It runs three times on a few images, its random numbers seeded: what the first forward creates,
    and what other images change, is no part of it.

    Args:
        model: The network.
        data: Images that it takes.

    Examples:
        >>> data, net = Data.of([(torch.rand(2, 4), torch.tensor([0, 1]))]), nn.Linear(4, 2)
        >>> begun = identify(net, data)
        >>> _ = net.bias.data.add_(1e-3)
        >>> begun.differences(identify(net, data))
        ['network.bias', 'its logits on probe images']
    """
    device = device_of(model)
    images = data[0][0][:_PROBES].to(device)
    noise = _noise_like(images)
    probes = torch.cat((noise, images))
    fresh = parts_of(model, parameters=False)
    logits = _logits(model, probes)
    first = parts_of(model, parameters=False)
    _logits(model, images.flip(0)[:2])
    second = parts_of(model)
    again = _logits(model, probes)
    repeats = torch.equal(logits, again)
    rows = logits.double().tolist() if repeats else None
    return Identity(
        parts=second,
        made=tuple(_changed(fresh, first)),
        changing=tuple(_changed(first, {name: second[name] for name in second if name in first})),
        data=data.fingerprint,
        machine=_machine(device),
        noise=rows and rows[: len(noise)],
        images=rows and rows[len(noise) :],
    )


def network_key(model: nn.Module, data: Data, folder: Path | None) -> str:
    """The fingerprint of a network, after a check that the folder belongs to it.
    校验并返回网络指纹。

    Its identity is written to ``folder/network.json`` when an evaluation begins. Where several
    processes share the evaluation, all of them have to have the same network.

    Raises:
        ValueError: If the folder holds the progress of another network, or processes have
            different ones.
    """
    identity = identify(model, data)
    rank, _ = rank_and_world_size()
    everybody = gathered({rank: identity})
    for other in everybody.values():
        if differing := [*_data_differs(everybody[0], other), *everybody[0].differences(other)]:
            raise ValueError(
                f"all processes must evaluate the same network on the same images, got different "
                f"ones ({', '.join(differing[:3])} differ); seed what builds them, and load the "
                "same weights"
            )
    mine: dict[int, tuple[str, str]] = {}
    if rank == 0:
        mine[0] = _kept(folder, everybody[0])
    key, error = gathered(mine)[0]
    if error:
        raise ValueError(error)
    return key


@contextmanager
def seeded_sources(model: object, seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed: torch's, those of generators that modules keep, numpy's and
    Python's; all of them are as before afterwards.
    """
    generators = [(generator, generator.get_state()) for generator in generators_of(model)]
    of_numpy = np.random.get_state()  # noqa: NPY002  the global one, which a network may draw from
    of_python = random.getstate()
    try:
        for generator, _ in generators:
            generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  as above
        random.seed(seed)
        with seeded_globals(seed, device):
            yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        np.random.set_state(of_numpy)  # noqa: NPY002  as above
        random.setstate(of_python)


def _kept(folder: Path | None, identity: Identity) -> tuple[str, str]:
    """The fingerprint that the folder's progress goes by, and what speaks against it."""
    if folder is None:
        return identity.fingerprint, ""
    path = folder / "network.json"
    folder.mkdir(parents=True, exist_ok=True)
    begun_already = any(other != path for other in folder.iterdir())
    if not begun_already or not path.is_file():
        write_whole(path, json.dumps(asdict(identity)) + "\n")
        return identity.fingerprint, ""
    begun = _from_content(read(path), path)
    differing = begun.differences(identity)
    if not differing:
        return begun.fingerprint, ""
    names = ", ".join(differing[:3]) + (" ..." if len(differing) > 3 else "")
    return "", another_evaluation(folder, f"network changed: {names}")


def _from_content(content: Mapping[str, Any], path: Path) -> Identity:
    try:
        return Identity(**content)
    except TypeError as error:
        raise ValueError(
            f"{path} describes no network; it is damaged: evaluate into another folder"
        ) from error


def _data_differs(one: Identity, other: Identity) -> list[str]:
    return [] if one.data == other.data else ["images or labels"]


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _alike(one: list[list[float]] | None, other: list[list[float]] | None, *, exact: bool) -> bool:
    if one is None or other is None:
        return True
    first, second = torch.tensor(one).double(), torch.tensor(other).double()
    if exact or first.shape != second.shape:
        return one == other
    largest = float(torch.maximum(first.abs(), second.abs()).max())
    return float((first - second).abs().max()) <= _TOLERANCE * largest


def _noise_like(images: Tensor) -> Tensor:
    """Uniform noise in the shape of the images; where these are binary, it is binary as well."""
    shape = (_PROBES, *images.shape[1:])
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    if bool(((images == 0) | (images == 1)).all()):
        noise = noise.round()
    return noise.to(images)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with preserved(model), torch.no_grad(), seeded_sources(model, 0, images.device):
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return check_logits(model(images), labels)


def _machine(device: torch.device) -> str:
    """What rounding depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    return f"{device.type} {kind}, {torch.get_num_threads()} threads"
