"""A report from elsewhere is checked before it enters a leaderboard: what can be computed again is,
and the rest is looked at for contradictions.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.evaluating import read_once
from lab.leaderboard.tables import FORMATS
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
from sj_robust.evaluation.subject import Subject, from_checkpoint
from sj_robust.models import pretrained_networks
from sj_robust.models.shipped import pretrained_file

_IMAGES = 16
"""Number of images that are attacked again."""
_STEPS = 20
_DIFFERENT = 0.25
"""Share of them that may fall although the report says that they stand: an attack has other random
numbers here, and a spike may flip by rounding.
"""
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
    except ValueError as error:
        return [Check(False, f"schema: {error}")]
    checks = [Check(True, "schema: figures follow from the outcome of every image")]
    checks += _plausible(report)
    data = _data(report, data_root)
    checks.append(_same_images(report, data))
    try:
        network = network or _named(report)
    except ValueError as error:
        return [*checks, Check(False, f"network: {error}")]
    if network is None or data is None:
        said = "give its checkpoint, or --network module:function" if data else "no images"
        return [*checks, Check(None, f"network: not attacked again ({said})")]
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
    target = board / f"{re.sub(r'[^A-Za-z0-9.]+', '-', '-'.join(parts)).strip('-')}.json"
    if target.is_file() and target.read_bytes() != path.read_bytes():
        raise ValueError(
            f"{target} holds another report of this name; give the network another name "
            "(evaluate --name)"
        )
    board.mkdir(parents=True, exist_ok=True)
    if not target.is_file():
        shutil.copyfile(path, target)
    return target


def _plausible(report: Report) -> Iterator[Check]:
    """Contradictions, and what a reader has to know."""
    graded = report.suite in GRADES and report.threat is not None
    yield Check(graded, f"suite: {report.suite} under {report.budget or 'no threat'}")
    if not graded:
        return
    yield Check(not report.alarms, f"network alive: {'; '.join(report.alarms) or 'yes'}")
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
    masked = ", ".join(report.masked) or "none"
    yield Check(not report.masked, f"signs of gradient masking: {masked}", required=False)
    known = bool(report.network.get("fingerprint"))
    yield Check(known, "fingerprint of the network is in the report")


def _exceeds(row: Row, radius: float) -> bool:
    return row.largest > radius * (1 + 1e-4) + 1e-6


def _data(report: Report, root: str) -> Data | None:
    """The images of the report, where this machine has them."""
    known = report.dataset in DATASETS or ":" in report.dataset
    if not known or report.dataset in EVENT_DATASETS:
        return None
    try:
        splits = load_images(report.dataset, root=root, test_limit=len(report.labels))
    except (FileNotFoundError, ValueError):
        return None
    return read_once(splits.test, 256)


def _same_images(report: Report, data: Data | None) -> Check:
    """Whether the fingerprint is that of the test images here."""
    if data is None:
        return Check(None, f"images: {report.dataset} is not on this machine")
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
    """The network itself: its fingerprint, its clean predictions, and PGD on images that stand."""
    model = network.model.eval()
    found = identify(model, data).fingerprint
    told = str(report.network.get("fingerprint", ""))
    here = environment()
    as_there = all(here[name] == report.environment.get(name) for name in _RELEASES)
    said = "" if as_there else " (other releases of Python, torch, SpikingJelly or sj_robust)"
    yield Check(
        found == told, f"network: fingerprint {told}, here {found}{said}", required=as_there
    )
    x, y = data.first(_IMAGES).tensors(torch.device("cpu"))
    with torch.no_grad():
        right = model(x).argmax(-1) == y
    clean = report.standing("clean")
    agreeing = sum(bool(here) == (number in clean) for number, here in enumerate(right.tolist()))
    enough = agreeing >= (1 - _DIFFERENT) * len(y)
    yield Check(enough, f"clean predictions: {agreeing} of {len(y)} as the report has them")
    if report.threat is None or report.threat.norm != "Linf":
        yield Check(None, f"attack again: not for {report.budget}")
        return
    standing = report.standing("everything")
    numbers = [number for number in range(len(y)) if number in standing]
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
        fell = int((model(moved).argmax(-1) != labels).sum())
    yield Check(
        fell <= _DIFFERENT * len(numbers),
        f"attack again: PGD-{_STEPS} breaks {fell} of {len(numbers)} images that were correct",
    )
