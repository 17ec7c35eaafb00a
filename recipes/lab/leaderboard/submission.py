"""A report from elsewhere is checked before it enters a leaderboard: what can be computed again is,
and the rest is looked at for contradictions.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, comb, exp, log
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lab.evaluating import read_once
from lab.leaderboard.tables import (
    FORMATS,
    Stored,
    check_fields,
    disputes,
    has_digests,
    read_reports,
)
from sj_robust.attacks import ThreatModel
from sj_robust.attacks.call import Attack
from sj_robust.attacks.logits import margin
from sj_robust.core.datasets import DATASETS, EVENT_DATASETS
from sj_robust.core.environment import environment
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.saved import saved_format, write_whole
from sj_robust.data import load_images
from sj_robust.evaluation import Report, diagnose, worst_case
from sj_robust.evaluation.assess import DIAGNOSED, Softened
from sj_robust.evaluation.result import DIGITS, Row
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.draws import gradient_draws, settled_draws
from sj_robust.evaluation.run.identity import identify
from sj_robust.evaluation.run.loop import Asked
from sj_robust.evaluation.run.member import Member, refused, scored
from sj_robust.evaluation.run.proofs import prove
from sj_robust.evaluation.run.suites import GRADES, UNSEARCHED, SuiteName, allowed_by, make_suite
from sj_robust.evaluation.subject import Subject, describe_network, from_checkpoint
from sj_robust.models import pretrained_networks
from sj_robust.models.foreign import reason
from sj_robust.models.rates import rate_twin
from sj_robust.models.shipped import pretrained_file

__all__ = [
    "Check",
    "Met",
    "Rerun",
    "check_report",
    "checklist",
    "compared",
    "evaluated_again",
    "refusing",
    "shuffled",
    "take",
]

_MARKS = {True: "[x]", False: "[ ]", None: "[?]"}
_LONGEST = 60
"""Letters of a file's name, of up to 4 bytes each; a system takes 255 bytes."""
_FEW = 50
_INFLATED = 0.05
"""Share of the images that are said to be proved and are not, which has to be noticed."""
_NOTICED = 0.95
"""Probability with which it is."""
_WRONGED = 0.01
"""Probability with which an honest report may be refused."""
_MET = 128
"""Undecided images that the first attack meets, at most."""
_CLOSEST = 6
_OTHERS = 2
"""Undecided images that all attacks meet at once: those whose label leads the least, and others."""
_AT_ONCE = 8
"""Images of a sequential test that all attacks meet at once."""
_STAGES = 3
"""Stages of a search over spikes that are run again at first, of seven, of up to ``_MET`` images;
three of 64 have fallen in the later ones (recipes/studies/forgeries.py).
"""
_SHORT = 2000
"""Forwards of a search that does not end early."""
_COMPARED = 32
"""Images that the first attack broke, whose adversarial images it makes again, at most."""
_ALIKE = 8
"""Adversarial images that have to be made again, and all of them, for a machine to be taken for one
that rounds as that of the report.
"""
_OTHER = 0.15
"""Share of adversarial images that are others where torch rounds in another way; 12 % without AVX
and oneDNN.
"""
_FELL = 0.003
"""Share of honest undecided images that fall there: a second round of ``standard`` with other
random numbers breaks 2.7 % (docs/results/rounds.csv), of which ``_OTHER`` meet others.
"""
_FELL_ELSEWHERE = 0.027
"""The same where all meet others, as in a report from a GPU."""
_FELL_DRAWN = 0.1
"""The same for a network that draws random numbers."""
_ROUNDED = 0.03
"""Share of clean predictions that may differ by rounding."""
_DRAWN = 0.25
"""Share of clean predictions that may differ if the network draws random numbers."""
_BATCH = 64
_RELEASES = ("python", "torch", "spikingjelly", "sj_robust", "commit")
"""What a fingerprint depends on beside the network."""


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


class Met(NamedTuple):
    """What an attack makes of an image: its digest where it fools, and the lead of the label."""

    digest: str
    lead: float


def checklist(checks: list[Check]) -> str:
    """The checks as a list of Markdown: [x] in order, [ ] not, [?] could not be checked here."""
    return "\n".join(f"- {_MARKS[check.passed]} {check.text}" for check in checks)


def refusing(checks: list[Check]) -> list[Check]:
    """Those for which a report is refused."""
    return [check for check in checks if check.required and check.passed is False]


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
    except (TypeError, ValueError) as error:
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


def compared(report: Report, network: Subject, data: Data) -> Iterator[Check]:
    """Whether the network is that of the report, as far as it can be seen without an attack."""
    model = network.model
    yield _same_network(report, model, data)
    yield _built_alike(report, model)
    try:
        draws = settled_draws(model, data, None)
    except ValueError as error:
        yield Check(False, f"draws: {error}")
        return
    found = "draws random numbers" if draws > 1 else "draws no random numbers"
    yield Check(
        draws == 1 or report.draws >= draws,
        f"draws: the network {found}; in the report, an image is judged by {report.draws}",
    )
    yield _clean(report, model, data, _ROUNDED if draws == 1 else _DRAWN)


def evaluated_again(
    report: Report, network: Subject, data: Data, secret: bytes = b""
) -> Iterator[Check]:
    """The attacks of the report on images that it leaves correct, and proofs that it tells of.

    Each image has its own seed, so an attack comes to the same where torch rounds alike. The first
    attack makes adversarial images of the report again, of which most have to be the same, and
    meets up to ``_MET`` undecided images. All attacks then meet a few of those, most of them images
    whose label leads the least; a long search over spikes ends early if the report is of few
    images. If one falls, they meet twice as many and go on to the end. Where every adversarial
    image was the same, none may fall; elsewhere no more than rounding explains. Where most are
    others, as on a GPU, a sequential test chooses how many images meet all attacks. Which images
    are met follows from the outcome of every image in the report and from the secret.

    A network that shows signs of gradient masking here has to show them in the report, which then
    holds attacks on its plain copy.
    """
    if report.threat is None or not report.standing("everything"):
        yield Check(None, "attack again: no image is still correct")
        return
    rerun = Rerun.of(report, network, data)
    told = {row.member for row in report.attacks if report.within(row)}
    names = [member.name for member in (*rerun.members, *rerun.plain)]
    lacking = [name for name in names if name not in told]
    yield Check(
        not lacking,
        f"members: {len(names) - len(lacking)} of {len(names)} attacks of the suite "
        f"{report.suite}; missing: {', '.join(lacking) or 'none'}",
    )
    if lacking:
        return
    if report.undecided:
        found = rerun.few_fall(secret)
        yield found
        if found.passed and not report.masked and not report.threat.of_events:
            signs = ", ".join(rerun.signs())
            yield Check(not signs, f"masking: signs that the report hides: {signs or 'none'}")
    if report.verified is not None and report.standing("verified"):
        yield rerun.proved(shuffled(report.standing("verified"), report, secret))


@dataclass(frozen=True)
class Rerun:
    """The attacks and proofs of a report on some of its images.

    Attributes:
        report: The report.
        network: Its network.
        x: Its images.
        y: Their labels.
        members: The attacks of its suite within the threat, in their order.
        plain: Those on a plain copy of the network, if the report tells of gradient masking.
        draws: Whether the network draws random numbers.
    """

    report: Report
    network: Subject
    x: Tensor
    y: Tensor
    members: Sequence[Member]
    plain: Sequence[Member]
    draws: bool

    @classmethod
    def of(cls, report: Report, network: Subject, data: Data) -> "Rerun":
        """That of a report with a threat."""
        x, y = data.tensors(torch.device("cpu"))
        threat = cast("ThreatModel", report.threat)
        with torch.no_grad():
            classes = network.model(x[:1]).shape[-1]
        suite = make_suite(
            cast("SuiteName", report.suite),
            threat,
            chosen=[str(row["estimator"]) for row in report.estimators if row.get("chosen")],
            classes=classes,
            eot_samples=gradient_draws(report.draws, threat),
            refused=refused(network.model, UNSEARCHED.get(report.suite, ())),
            batch_size=data.batch_size,
            surrogate_model=rate_twin(network.model),
        )
        members = [member for member in suite.members if Asked(threat).keeps(member)]
        plain = allowed_by(network.plain, suite.plain, x) if report.masked else []
        draws = settled_draws(network.model, data, None) > 1
        return cls(report, network, x, y, members, plain, draws)

    def signs(self) -> tuple[str, ...]:
        """Signs of gradient masking that the network shows here."""
        report = self.report
        threat = cast("ThreatModel", report.threat)
        found = diagnose(
            self.network.model,
            self.x[:DIAGNOSED],
            self.y[:DIAGNOSED],
            threat=threat,
            seed=report.seed,
            estimators=None if report.estimators else (),
            plain=self.network.plain,
            eot_samples=gradient_draws(report.draws, threat),
        )
        return tuple(finding.name for finding in found if not finding.passed)

    def few_fall(self, secret: bytes) -> Check:
        """Whether adversarial images of the report can be made again, and undecided images stay
        correct.
        """
        report = self.report
        rows = {row.member: row for row in report.attacks}
        told = _digests(rows[self.members[0].name])
        sample = shuffled(told, report, secret)[:_COMPARED]
        undecided = shuffled(report.undecided, report, secret)[:_MET]
        found = self.met([*sample, *undecided])
        same = sum(found[one].digest == told[one] for one in sample if one in found)
        others = len(sample) - same
        made_again = self.draws or _at_least(others, _OTHER * len(sample)) >= _WRONGED
        if not made_again:
            return self.from_elsewhere(secret, same)
        rate = _FELL_DRAWN if self.draws else _FELL
        expected = rate * len(undecided) if others or same < _ALIKE else 0.0
        left = [number for number in undecided if number in found]
        left.sort(key=lambda number: found[number].lead)
        fell = {number for number in left if found[number].digest}
        tried: set[int] = set()
        for more in (1, 2):
            if _at_least(len(fell), expected) < _WRONGED or (more > 1 and not fell):
                break
            closest = [number for number in left if number not in fell][: more * _CLOSEST]
            rest = shuffled(set(left).difference(fell, closest), report, secret)
            batch = [*closest, *rest[: more * _OTHERS]]
            tried.update(batch)
            fell |= self.broken(batch, more > 1)
        return Check(
            _at_least(len(fell), expected) >= _WRONGED,
            f"attack again: of {len(sample)} adversarial images of the report, {same} were made "
            f"again; of {len(report.undecided)} undecided images, the first attack met "
            f"{len(undecided)} and the others {len(tried)}, and {len(fell)} fell",
        )

    def from_elsewhere(self, secret: bytes, same: int) -> Check:
        """Whether undecided images stay correct where adversarial images are others: all attacks
        meet them until Wald's test decides between the share that other random numbers break and
        that of a forgery; a report that has too few of them for a decision is refused.
        """
        report = self.report
        forged = ceil(_INFLATED * len(report.labels)) / len(report.undecided)
        forged = min(max(forged, 2 * _FELL_ELSEWHERE), 0.5)
        falls = log(forged / _FELL_ELSEWHERE)
        stands = log((1 - forged) / (1 - _FELL_ELSEWHERE))
        honest, refused = log(1 - _NOTICED), log(_NOTICED / _WRONGED)
        evidence = 0.0
        fell: set[int] = set()
        left = shuffled(report.undecided, report, secret)
        met = 0
        while met < len(left) and honest < evidence < refused:
            batch = left[met : met + _AT_ONCE]
            broken = self.broken(batch, True)
            fell |= broken
            met += len(batch)
            evidence += falls * len(broken) + stands * (len(batch) - len(broken))
        few = met == len(left) and honest < evidence < refused
        remedy = "; evaluate more images, or on a CPU with the releases here" if few else ""
        return Check(
            evidence <= honest,
            f"attack again: {same} adversarial images of the report were made again, as where "
            f"torch rounds in another way; of {len(left)} undecided images, all attacks met {met}, "
            f"and {len(fell)} fell{remedy}",
        )

    def met(self, numbers: Sequence[int]) -> dict[int, Met]:
        """What the first attack, and the first one on a plain copy, make of the images that are
        classified correctly here.
        """
        model = self.network.model
        found: dict[int, Met] = {}
        for members, attacked in self._in_turn():
            fell = {number for number, one in found.items() if one.digest}
            left = [number for number in numbers if number not in fell]
            if not left:
                break
            kept = _Kept(members[0].attack)
            (row,) = self._run(left, [replace(members[0], attack=kept)], attacked).attacks
            made = _digests(row)
            labels = self.y[left][list(row.seen)]
            logits = scored(model, kept.images, labels, seed=self.report.seed)
            for place, lead in zip(row.seen, margin(logits, labels).tolist(), strict=True):
                found[left[place]] = Met(made.get(place, ""), lead)
        return found

    def broken(self, numbers: Sequence[int], to_the_end: bool) -> set[int]:
        """Those of the images that any attack breaks; its search over spikes may end early."""
        fell: set[int] = set()
        for members, attacked in self._in_turn():
            left = [number for number in numbers if number not in fell]
            if not left:
                break
            if not to_the_end and len(self.y) <= _MET:
                members = list(map(_shortened, members))
            found = self._run(left, members, attacked)
            places = found.standing("clean") - found.standing("everything")
            fell.update(left[place] for place in places)
        return fell

    def _in_turn(self) -> Iterator[tuple[Sequence[Member], nn.Module]]:
        """The attacks on the network, and those on its plain copy, if there are any."""
        yield self.members, self.network.model
        if self.plain:
            yield self.plain, Softened(self.network.plain or self.network.model)

    def proved(self, proved: Sequence[int]) -> Check:
        """Whether the proofs of the report can be made here, but for one lost by rounding."""
        inflated = ceil(_INFLATED * len(self.report.labels))
        tried = proved[: _enough(len(proved), inflated)]
        threat = cast("ThreatModel", self.report.threat)  # or nothing would be proved
        some = Data.of_tensors(self.x[tried], self.y[tried], _BATCH)
        (made,) = prove(self.network.model, some, [threat.eps], threat).verified.values()
        return Check(
            len(made) >= len(tried) - 1,
            f"proofs again: {len(made)} of {len(tried)} images that the report proves are proved "
            "here",
        )

    def _run(self, numbers: Sequence[int], members: Sequence[Member], model: nn.Module) -> Report:
        """Members on images, each with the seed that it had."""
        return worst_case(
            model,
            self.x[numbers],
            self.y[numbers],
            members,
            threat=self.report.threat,
            draws=self.report.draws,
            seeds=SampleSeeds(numbers).derived("image", self.report.seed),
            plain=self.network.plain,
        )


def _shortened(member: Member) -> Member:
    """A member, whose search over spikes ends early if it is long."""
    attack = member.attack
    if not isinstance(attack, partial) or attack.keywords.get("forwards", 0) <= _SHORT:
        return member
    return replace(member, attack=partial(attack, stages=_STAGES))


class _Kept:
    """An attack that keeps the images that it makes."""

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self.images = torch.empty(0)

    def __call__(self, *images: Any, **options: Any) -> Tensor:
        self.images = self.attack(*images, **options)
        return self.images


def shuffled(numbers: Iterable[int], report: Report, secret: bytes) -> list[int]:
    """Images in an order that follows from the outcome of every image in the report, and that
    nobody can foresee who does not know the secret, of up to 64 bytes.
    """
    said = repr((report.data, report.budget, report.outcome)).encode()
    key = hashlib.blake2b(said, key=secret).digest()

    def place(number: int) -> bytes:
        return hashlib.blake2b(str(number).encode(), key=key).digest()

    return sorted(numbers, key=place)


def _digests(row: Row) -> dict[int, str]:
    """The digest of every adversarial image of an attack, by number; none where it has none."""
    starts = range(0, len(row.digests), DIGITS)
    parts = [row.digests[start : start + DIGITS] for start in starts]
    return dict(zip(row.fell, parts, strict=False))


def _enough(total: int, forged: int) -> int:
    """The least number of images, out of a total, that hold two or more of the forged ones with a
    probability of 95 %; all of them if no number does.
    """
    forged = min(forged, total)
    honest = total - forged
    for count in range(2, total + 1):
        none = comb(honest, count)
        one = forged * comb(honest, count - 1)
        if none + one <= (1 - _NOTICED) * comb(total, count):
            return count
    return total


def _at_least(count: int, expected: float) -> float:
    """Probability of as many events or more where so many are expected (Poisson)."""
    term, fewer = exp(-expected), 0.0
    for number in range(count):
        fewer += term
        term *= expected / (number + 1)
    return 1 - fewer


def _own_secret() -> bytes:
    """A random number of this machine, made once."""
    path = Path(torch.hub.get_dir(), "sj_robust", "leaderboard.secret")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, token_hex(16))
    return path.read_bytes()


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
    yield Check(has_digests(report), "digests of adversarial images are in the report")


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


def _clean(report: Report, model: nn.Module, data: Data, tolerance: float) -> Check:
    """Whether the network is right and wrong where the report has it so."""
    x, y = data.tensors(torch.device("cpu"))
    with torch.no_grad():
        right = torch.cat([model(images).argmax(-1) for images in torch.split(x, _BATCH)]) == y
    clean = report.standing("clean")
    agreeing = sum(bool(here) == (number in clean) for number, here in enumerate(right.tolist()))
    return Check(
        agreeing >= (1 - tolerance) * len(y),
        f"clean predictions: {agreeing} of {len(y)} as the report has them",
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
