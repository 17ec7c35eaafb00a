"""Checks that a network is the one with which an evaluation was started."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sj_robust.core.checks import check_logits
from sj_robust.core.digest import fingerprint, parts_of
from sj_robust.core.environment import device_of, machine
from sj_robust.core.preserved import preserved, seeded_network
from sj_robust.core.saved import write_whole
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.progress import (
    another_evaluation,
    gathered,
    rank_and_world_size,
    read,
)

__all__ = ["Answers", "Identity", "identify", "network_key"]

_PROBES = 4
"""Images of noise, and of the data, whose logits are compared."""
_TOLERANCE = 1e-3
"""Share of the largest value by which logits, or gradients, may differ between two machines."""
_LOGITS = "its logits on probe images"
_GRADIENTS = "its gradients on probe images"
_MEANS = 64
"""Means over parts of an image that stand for its gradient, at most."""

_EXACT = "cpu "
"""What the machine is called on which gradients repeat bit for bit."""

_Rows = list[list[float]] | None


@dataclass(frozen=True)
class Answers:
    """Outputs of a network on probe images; None where a second forward gives others.
    网络对探测图像的输出与梯度。

    Attributes:
        logits: [n, classes].
        gradients: Means over parts of the gradient with respect to each image, [n, parts]; None
            also where there is no gradient.
    """

    logits: _Rows
    gradients: _Rows


@dataclass(frozen=True)
class Identity:
    """Description of a network for comparison. 网络的身份。

    Two networks are one if all parts agree that no forward creates or changes, and their logits on
    the probe images, and the gradients of these: bit for bit on the same processor with as many
    threads, else within a thousandth of the largest one, by which rounding moves them. Gradients of
    a GPU are compared within a thousandth always, as its sums have no fixed order. A network in
    which another rounding turns a spike has other logits, and is not taken for the same on another
    machine.

    Attributes:
        parts: Digests by name, see :func:`sj_robust.core.digest.parts_of`.
        made: Parts that the first forward creates or changes, such as what a module remembers.
        changing: Parts that other images change, such as counters.
        data: Digest of the images that the probe images come from.
        sizes: Number of images in every batch.
        machine: Device and number of threads.
        noise: What the network answers on images of noise.
        images: What it answers on the first images of the data.
    """

    parts: dict[str, str]
    made: tuple[str, ...]
    changing: tuple[str, ...]
    data: str
    sizes: tuple[int, ...]
    machine: str
    noise: Answers
    images: Answers

    @property
    def fingerprint(self) -> str:
        """Digest of the parts."""
        lasting = {name: part for name, part in self.parts.items() if name not in self.changing}
        return fingerprint(lasting)

    def save(self, path: Path) -> None:
        """Write it to a file. 保存。"""
        write_whole(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """Read it from a file; ValueError if it is damaged. 读取。"""
        content = read(path)
        try:
            noise, images = Answers(**content["noise"]), Answers(**content["images"])
            typed = {"noise": noise, "images": images, "sizes": tuple(content["sizes"])}
            return cls(**{**content, **typed})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} describes no network; it is damaged: evaluate into another folder"
            ) from error

    def differences(self, now: "Identity") -> list[str]:
        """What says that the network is another one now; nothing for the same one."""
        passing = {*self.made, *self.changing, *now.made, *now.changing}
        names = [name for name in self.parts | now.parts if name not in passing]
        found = [name for name in names if self.parts.get(name) != now.parts.get(name)]
        exact = self.machine == now.machine
        where = "" if exact else f", of {self.machine} and now of {now.machine}"
        probes = [(self.noise, now.noise)]
        if self.data == now.data:
            probes.append((self.images, now.images))
        repeats = exact and self.machine.startswith(_EXACT)
        logits = gradients = True
        for one, other in probes:
            logits &= _alike(one.logits, other.logits, exact=exact)
            gradients &= _alike(one.gradients, other.gradients, exact=repeats)
        if not logits:
            found.append(_LOGITS + where)
        if not gradients:
            found.append(_GRADIENTS + where)
        return found


def identify(model: nn.Module, data: Data) -> Identity:
    """Identify a network, which is not changed. 描述网络的身份。

    It runs four times on a few images, its random numbers seeded: what the first forward creates,
    and what other images change, is no part of it. The images are the same ones whatever the batch
    size.

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
    images, _ = data.first(_PROBES).tensors(device)
    noise = _noise_like(images)
    probes = torch.cat((noise, images))
    fresh = parts_of(model, parameters=False)
    answers = _answers(model, probes)
    first = parts_of(model, parameters=False)
    few = images.flip(0)[:2]
    _logits(model, few)
    again = _answers(model, probes)
    _logits(model, few)  # what the network remembers of it has no graph
    second = parts_of(model)
    logits, gradients = map(_repeated, answers, again)
    kept = {name: second[name] for name in second if name in first}
    of_noise, of_images = slice(0, len(noise)), slice(len(noise), None)
    return Identity(
        parts=second,
        made=tuple(_changed(fresh, first)),
        changing=tuple(_changed(first, kept)),
        data=data.fingerprint,
        sizes=data.sizes,
        machine=machine(device),
        noise=Answers(logits and logits[of_noise], gradients and gradients[of_noise]),
        images=Answers(logits and logits[of_images], gradients and gradients[of_images]),
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
    first = everybody[0]
    for other in everybody.values():
        differing = [*_data_differs(first, other), *first.differences(other)]
        if differing:
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


def _kept(folder: Path | None, identity: Identity) -> tuple[str, str]:
    """The fingerprint used by the progress in the folder, and the differences from it."""
    if folder is None:
        return identity.fingerprint, ""
    path = folder / "network.json"
    folder.mkdir(parents=True, exist_ok=True)
    begun_already = any(other != path for other in folder.iterdir())
    if not begun_already or not path.is_file():
        identity.save(path)
        return identity.fingerprint, ""
    begun = Identity.load(path)
    if begun.data == identity.data and begun.sizes != identity.sizes:
        return "", another_evaluation(folder, "batch sizes changed")
    differing = begun.differences(identity)
    if not differing:
        return begun.fingerprint, ""
    names = ", ".join(differing[:3])
    if len(differing) > 3:
        names += " ..."
    return "", another_evaluation(folder, f"network changed: {names}")


def _data_differs(one: Identity, other: Identity) -> list[str]:
    if one.data != other.data:
        return ["images or labels"]
    return [] if one.sizes == other.sizes else ["batch sizes"]


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _repeated(one: Tensor | None, other: Tensor | None) -> _Rows:
    """The rows of what came out twice alike; None where it did not."""
    if one is None or other is None or not torch.equal(one, other):
        return None
    rows: list[list[float]] = one.double().tolist()
    return rows


def _alike(one: _Rows, other: _Rows, *, exact: bool) -> bool:
    if one is None or other is None:
        return True
    first, second = torch.tensor(one).double(), torch.tensor(other).double()
    if exact or first.shape != second.shape:
        return one == other
    largest = float(torch.maximum(first.abs(), second.abs()).max())
    return float((first - second).abs().max()) <= _TOLERANCE * largest


def _noise_like(images: Tensor, seed: int = 0) -> Tensor:
    """Uniform noise in the shape of the images; where these are binary, it is binary as well."""
    shape = (_PROBES, *images.shape[1:])
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    if bool(((images == 0) | (images == 1)).all()):
        noise = noise.round()
    return noise.to(images)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with preserved(model), torch.no_grad(), seeded_network(model, 0, images.device):
        return _checked(model, images)


def _answers(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, and the gradient of their sum, weighted by 1, 2, ..., in means over its parts."""
    with (
        preserved(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        seeded_network(model, 0, images.device),
    ):
        leaf = images.detach().clone().requires_grad_()
        logits = _checked(model, leaf)
        weights = torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)
        try:
            (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf)
        except Exception:  # it has none: attacks that need one say so
            return logits.detach(), None
    flat = torch.nan_to_num(gradient.flatten(1)).double()
    means = nn.functional.adaptive_avg_pool1d(flat[:, None], min(_MEANS, flat.shape[1]))
    return logits.detach(), means[:, 0]


def _checked(model: nn.Module, images: Tensor) -> Tensor:
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return check_logits(model(images), labels)
