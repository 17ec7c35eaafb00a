"""A report from elsewhere is checked before it enters a leaderboard: what can be computed again is,
and the rest is looked at for contradictions.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab.evaluating import read_once
from lab.leaderboard.entries import Stored, disputes
from lab.leaderboard.tables import FORMATS, read_reports
from sj_robust.attacks import pgd
from sj_robust.core.datasets import DATASETS, EVENT_DATASETS
from sj_robust.core.environment import environment
from sj_robust.core.saved import saved_format
from sj_robust.data import load_images
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import Row
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.identity import identify
from sj_robust.evaluation.run.suites import GRADES
from sj_robust.evaluation.subject import Subject, describe_network, from_checkpoint
from sj_robust.models import pretrained_networks
from sj_robust.models.shipped import pretrained_file

_IMAGES = 16
"""Number of images that are attacked again."""
_STEPS = 20
_DIFFERENT = 0.25
"""Share of them that may fall although the report says that they stand: an attack has other random
numbers here, and a spike may flip by rounding.
"""
_ROUNDED = 0.03
"""Share of clean predictions that may differ by rounding."""
_DRAWN = 0.25
"""Share of clean predictions that may differ if the network draws random numbers."""
_BATCH = 64
_LONGEST = 60
"""Letters of a file's name, of up to 4 bytes each; a system takes 255 bytes."""
_FEW = 50
_RELEASES = ("python", "torch", "spikingjelly", "sj_robust", "commit")
"""What a fingerprint depends on beside the network."""
_MARKS = {True: "[x]", False: "[ ]", None: "[?]"}


@dataclass(frozen=True)
class Check:
    """One point of the checklist.

    Attributes:
        passed: Whether it is in order; None if it could not be checked here.
        text: What was checked, and what was found.
        required: Whether a report that fails is refused.
    """

    passed: bool | None
    text: str
    required: bool = True


def check_report(
    path: Path, network: Subject | None = None, data_root: str = "data"
) -> list[Check]:
    """Everything that can be said of a report without making it again.

    Args:
        path: The report, or its folder.
        network: The network that it is of. None: the shipped network or checkpoint of this machine
            that its configuration names; code that it names is never run.
        data_root: Folder of the data sets.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the report.json of an evaluation")
    try:
        if saved_format(path.read_text(encoding="utf-8")) not in FORMATS:
            raise ValueError("it is not a report of sj_robust")
        report = Report.load(path)
        _check_fields(report)
    except ValueError as error:
        return [Check(False, f"schema: {error}")]
    checks = [Check(True, "schema: figures follow from the outcome of every image")]
    checks += _plausible(report)
    T = getattr(network.model, "T", None) if network is not None else None
    data = _data(report, data_root, T)
    checks.append(_same_images(report, data))
    try:
        network = network or _named(report)
    except ValueError as error:
        return [*checks, Check(False, f"network: {error}")]
    if network is None or data is None:
        said = "give its checkpoint, or --network module:function" if data else "no images"
        return [*checks, Check(None, f"network: not attacked again ({said})")]
    try:
        with torch.no_grad():
            network.model.eval()(data[0][0][:1])
    except (ValueError, RuntimeError) as error:
        said = f"network: it does not take the images of the report ({error})"
        return [*checks, Check(False, said)]
    return [*checks, *_attacked_again(report, network, data)]


def checklist(checks: list[Check]) -> str:
    """The checks as a list of Markdown: [x] in order, [ ] not, [?] could not be checked here."""
    return "\n".join(f"- {_MARKS[check.passed]} {check.text}" for check in checks)


def take(path: Path, checks: list[Check], board: Path) -> Path:
    """Copy a report that passed into the folder of a leaderboard; returns the copy.

    Raises:
        ValueError: If a required check failed, or another report has its name.
    """
    failed = [check.text for check in checks if check.required and check.passed is False]
    if failed:
        raise ValueError(f"{path} is refused: {'; '.join(failed)}; evaluate the network again")
    path = path / "report.json" if path.is_dir() else path
    report = Report.load(path)
    parts = [report.dataset, report.name, report.budget, report.suite]
    name = re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-")
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    target = board / f"{name}.json"
    if target.is_file() and target.read_bytes() != path.read_bytes():
        raise ValueError(
            f"{target} holds another report of this name; give the network another name "
            "(evaluate --name)"
        )
    _check_no_dispute(path, report, board)
    board.mkdir(parents=True, exist_ok=True)
    if not target.is_file():
        shutil.copyfile(path, target)
    return target


def _check_fields(report: Report) -> None:
    """Raise ValueError if a field that is read here or in a table is of another type."""
    texts = {"name": report.name, "dataset": report.dataset, "suite": report.suite}
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} must be text, got {value!r}; the file was changed")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{name} must be text in UTF-8, got {value!r}; the file was changed"
            ) from None
    if not isinstance(report.data, str):
        raise ValueError(f"data must be text, got {report.data!r}; the file was changed")
    objects = {
        "configuration": report.configuration,
        "environment": report.environment,
        "network": report.network,
    }
    for name, held in objects.items():
        if not isinstance(held, dict):
            raise ValueError(f"{name} must be an object, got {held!r}; the file was changed")
    layers = report.network.get("layers", [])
    if not isinstance(layers, list) or not all(isinstance(row, dict) for row in layers):
        raise ValueError(f"layers must be a list of objects, got {layers!r}; the file was changed")
    if type(report.draws) is not int or report.draws < 1:
        raise ValueError(
            f"draws must be an integer >= 1, got {report.draws!r}; the file was changed"
        )
    for row in report.rows:
        for what, number in (("largest", row.largest), ("seconds", row.seconds)):
            if not isinstance(number, int | float) or not 0 <= number < float("inf"):
                raise ValueError(
                    f"{what} of {row.member} must be a finite number >= 0, got {number!r}; the "
                    "file was changed"
                )


def _check_no_dispute(path: Path, report: Report, board: Path) -> None:
    """Raise ValueError if a report about the same network on the board contradicts this one."""
    if not board.is_dir():
        return
    own = Stored(path.as_posix(), "", "", report).network
    for other in read_reports([str(board)], {}, may_be_empty=True):
        if other.network != own:
            continue
        images = disputes([report, other.report])
        if images:
            raise ValueError(
                f"{path} and {other.path} are about the same network, and one proves "
                f"{len(images)} images that the other breaks, such as image {min(images)}; "
                "evaluate the network again, and remove the report that is wrong"
            )


def _plausible(report: Report) -> Iterator[Check]:
    """Contradictions, and what a reader has to know."""
    graded = report.suite in GRADES and report.threat is not None
    yield Check(graded, f"suite: {report.suite} under {report.budget or 'no threat'}")
    if not graded:
        return
    yield _alive(report)
    yield _all_attacked(report)
    ends = [report.everything, report.clean]
    said = f"nothing proved at {report.budget}; at most <= clean"
    if report.verified is not None:
        ends.insert(0, report.verified)
        said = "proved <= at most <= clean"
    shares = [one.accuracy for one in ends]
    bracket = " <= ".join(one.percent for one in ends)
    yield Check(shares == sorted(shares), f"bracket: {said}, {bracket} %")
    radius = report.threat.eps if report.threat else 0.0
    beyond = [row.member for row in report.attacks if report.within(row) and _exceeds(row, radius)]
    yield Check(
        not beyond, f"budget: attacks stay within {report.budget} {', '.join(beyond)}".strip()
    )
    count = len(report.labels)
    yield Check(
        count >= _FEW, f"size: {count} images ({_FEW} or more make a figure)", required=False
    )
    has_control = report.control is not None
    yield Check(has_control, "control: the training gradient at the same cost", required=False)
    looked_for = bool(report.findings)
    masked = ", ".join(report.masked) or ("none" if looked_for else "not looked for")
    no_signs = not report.masked if looked_for else None
    yield Check(no_signs, f"signs of gradient masking: {masked}", required=False)
    known = bool(report.network.get("fingerprint"))
    yield Check(known, "fingerprint of the network is in the report")


def _alive(report: Report) -> Check:
    """Whether neurons fire, and the network does not guess."""
    if report.alarms:
        return Check(False, f"network alive: {'; '.join(report.alarms)}")
    if not report.firing:
        return Check(None, "network alive: firing rates were not measured")
    return Check(True, "network alive: yes")


def _all_attacked(report: Report) -> Check:
    """Whether the images that stand were attacked at the radius of the report, or are proved."""
    met = set() if report.verified is None else set(report.standing("verified"))
    attacks = [row for row in report.attacks if row.threat == report.threat]
    for row in attacks:
        met.update(row.seen)
    standing = report.standing("everything")
    missed = len(standing - met)
    return Check(
        bool(attacks) and missed == 0,
        f"attacks: {len(attacks)} at {report.budget}; {missed} of {len(standing)} images that "
        "stay correct were neither attacked there nor proved",
    )


def _exceeds(row: Row, radius: float) -> bool:
    return row.largest > radius * (1 + 1e-4) + 1e-6


def _data(report: Report, root: str, T: int | None) -> Data | None:
    """The images of the report, or its event frames for T time steps, where this machine has them.

    Frames are only made for the T of a network that is given, since they are kept on disk.
    """
    if report.dataset not in DATASETS and ":" not in report.dataset:
        return None
    if report.dataset not in EVENT_DATASETS:
        T = None
    elif T is None:
        return None
    counts = report.threat is not None and report.threat.counts
    try:
        splits = load_images(
            report.dataset, root=root, test_limit=len(report.labels), T=T, counts=counts
        )
    except (ImportError, OSError, ValueError):
        return None
    return read_once(splits.test, 256)


def _same_images(report: Report, data: Data | None) -> Check:
    """Whether the fingerprint is that of the test images here."""
    if data is None:
        where = "is not on this machine"
        if report.dataset in EVENT_DATASETS:
            where = "is not on this machine, or no network is given whose T its frames need"
        return Check(None, f"images: {report.dataset} {where}")
    same = data.fingerprint == report.data and data.labels == tuple(report.labels)
    return Check(
        same,
        f"images: fingerprint {report.data} of the first {len(data.labels)} of "
        f"{report.dataset}, here {data.fingerprint}",
    )


def _named(report: Report) -> Subject | None:
    """The network of the package that the report names, at its number of time steps; a folder of
    that name here may hold another network, and is only used if it is given.

    Raises:
        ValueError: If the report names it by something else than text, or that number is none.
    """
    checkpoint = report.configuration.get("checkpoint")
    if checkpoint is not None and not isinstance(checkpoint, str):
        raise ValueError(
            f"the checkpoint of a report must be text, got {checkpoint!r}; evaluate the network "
            "again"
        )
    for name in (checkpoint, report.name):
        if name in pretrained_networks():
            return from_checkpoint(pretrained_file(str(name)), report.network.get("T"))
    return None


def _attacked_again(report: Report, network: Subject, data: Data) -> Iterator[Check]:
    """The network itself: what it is, its clean predictions, and PGD on images that stand."""
    model = network.model.eval()
    yield _same_network(report, model, data)
    yield _built_alike(report, model)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        right = torch.cat([model(images).argmax(-1) for images in torch.split(x, _BATCH)]) == y
    clean = report.standing("clean")
    agreeing = sum(bool(here) == (number in clean) for number, here in enumerate(right.tolist()))
    least = 1 - (_DRAWN if report.draws > 1 else _ROUNDED)
    yield Check(
        agreeing >= least * len(y),
        f"clean predictions: {agreeing} of {len(y)} as the report has them",
    )
    if report.threat is None or report.threat.norm != "Linf":
        yield Check(None, f"attack again: not for {report.budget}")
        return
    standing = report.standing("everything")
    numbers = [number for number in range(min(_IMAGES, len(y))) if number in standing]
    if not numbers:
        yield Check(None, "attack again: none of the first images is still correct")
        return
    eps = report.threat.eps
    images, labels = x[numbers], y[numbers]
    generator = torch.Generator().manual_seed(0)
    moved = pgd(
        model, images, labels, eps=eps, step_size=eps / 4, steps=_STEPS, generator=generator
    )
    with torch.no_grad():
        broken = (model(moved).argmax(-1) != labels).tolist()
    proved = set() if report.verified is None else report.standing("verified")
    fell = [number for number, fooled in zip(numbers, broken, strict=True) if fooled]
    of_proved = sum(number in proved for number in fell)
    said = f", {of_proved} of them proved" if of_proved else ""
    yield Check(
        len(fell) <= _DIFFERENT * len(numbers) and not of_proved,
        f"attack again: PGD-{_STEPS} breaks {len(fell)} of {len(numbers)} images that were "
        f"correct{said}",
    )


def _same_network(report: Report, model: nn.Module, data: Data) -> Check:
    """Whether the fingerprint is that of the network here, where the releases are the same."""
    found = identify(model, data).fingerprint
    told = str(report.network.get("fingerprint", ""))
    here = environment()
    others = [name for name in _RELEASES if here[name] != report.environment.get(name)]
    text = f"network: fingerprint {told}, here {found}"
    if found != told and others:
        return Check(None, f"{text} (cannot be compared: other {', '.join(others)})")
    return Check(found == told, text)


def _built_alike(report: Report, model: nn.Module) -> Check:
    """Whether time steps, number of parameters and neurons are those of the report."""
    here, there = describe_network(model), report.network
    differ = [name for name in ("T", "parameters") if there.get(name) != here[name]]
    if _neurons(there.get("layers", [])) != _neurons(here["layers"]):
        differ.append("neurons")
    said = f"other {' and '.join(differ)}" if differ else "as in the report"
    return Check(not differ, f"T, number of parameters, neurons: {said}")


def _neurons(layers: list[dict[str, Any]]) -> list[str]:
    """Classes of the neurons; their names are others in other releases."""
    return [str(row.get("neuron")) for row in layers]
