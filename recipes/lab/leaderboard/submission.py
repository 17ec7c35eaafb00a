"""A report from elsewhere is checked before it enters a leaderboard: what can be computed again is,
and the rest is looked at for contradictions.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

import torch

from lab.evaluating import read_once
from lab.leaderboard.again import compared, evaluated_again
from lab.leaderboard.check import Check, refusing
from lab.leaderboard.entries import Stored, disputes
from lab.leaderboard.tables import FORMATS, check_fields, read_reports
from sj_robust.core.datasets import DATASETS, EVENT_DATASETS
from sj_robust.core.saved import saved_format, write_whole
from sj_robust.data import load_images
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import Row
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.suites import GRADES
from sj_robust.evaluation.subject import Subject, from_checkpoint
from sj_robust.models import pretrained_networks
from sj_robust.models.foreign import reason
from sj_robust.models.shipped import pretrained_file

_LONGEST = 60
"""Letters of a file's name, of up to 4 bytes each; a system takes 255 bytes."""
_FEW = 50


def check_report(
    path: Path,
    network: Subject | None = None,
    data_root: str = "data",
    secret: bytes | None = None,
) -> list[Check]:
    """Everything that can be said of a report without making all of it again.

    Args:
        path: The report, or its folder.
        network: The network that it is of. None: the shipped network or checkpoint of this machine
            that its configuration names; code that it names is never run.
        data_root: Folder of the data sets.
        secret: What the choice of images that are attacked again follows from, beside the report;
            None: that of this machine, made once and kept.

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
        check_fields(report)
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
    network.model.cpu().eval()
    said = "does not take the images of the report"
    try:
        with torch.no_grad():
            network.model(data[0][0][:1])
        said = "cannot be evaluated"
        checks += list(compared(report, network, data))
        if refusing(checks):
            return [*checks, Check(None, "attack again: not done, the report is refused anyway")]
        secret = _own_secret() if secret is None else secret
        return [*checks, *evaluated_again(report, network, data, secret)]
    except Exception as error:  # foreign code raises anything
        return [*checks, Check(False, f"network: it {said} ({reason(error)})")]


def _own_secret() -> bytes:
    """A random number of this machine, made once."""
    path = Path(torch.hub.get_dir(), "sj_robust", "leaderboard.secret")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, token_hex(16))
    return path.read_bytes()


def take(path: Path, checks: list[Check], board: Path) -> Path:
    """Copy a report that passed into the folder of a leaderboard; returns the copy.

    Raises:
        ValueError: If a required check failed, or another report has its name.
    """
    failed = [check.text for check in refusing(checks)]
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
    both = len(disputes([report]))
    also = f"; {both} images are proved and broken" if both else ""
    yield Check(shares == sorted(shares) and not both, f"bracket: {said}, {bracket} %{also}")
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
