"""A report is compared with its network: fingerprint and size, clean predictions, and images that
its own attacks and proofs meet again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, comb, exp
from typing import Any, cast

import torch
from torch import Tensor, nn

from lab.leaderboard.check import Check
from sj_robust.core.environment import environment
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.randomness import SampleSeeds
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import DIGITS
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.draws import gradient_draws, settled_draws
from sj_robust.evaluation.run.identity import identify
from sj_robust.evaluation.run.loop import Asked, Job, run_batch
from sj_robust.evaluation.run.member import Member, refused
from sj_robust.evaluation.run.progress import BatchLog
from sj_robust.evaluation.run.proofs import prove
from sj_robust.evaluation.run.suites import UNSEARCHED, SuiteName, make_suite
from sj_robust.evaluation.run.variant import Variant
from sj_robust.evaluation.subject import Subject, describe_network

__all__ = ["compared", "evaluated_again", "shuffled"]

_INFLATED = 0.05
"""Share of the images that a report calls correct although they fell, which has to be noticed."""
_MISSED = 0.05
"""Probability with which such a report may pass."""
_WRONGED = 0.01
"""Probability with which an honest report may be refused."""
_LEAST = 24
"""Undecided images that all attacks meet at least: fewer take hardly less time."""
_FELL = 0.02
"""Share of honest undecided images that fall where torch rounds in another way, if all attacks meet
them; by the first attack alone, a tenth of it. A second round of ``standard`` with other random
numbers breaks 2.7 % (docs/results/rounds.csv).
"""
_FELL_DRAWN = 0.1
"""The same for a network that draws random numbers."""
_COMPARED = 32
"""Images that fell, of which the first attack makes the adversarial images again."""
_ROUNDED = 0.03
"""Share of clean predictions that may differ by rounding."""
_DRAWN = 0.25
"""Share of clean predictions that may differ if the network draws random numbers."""
_BATCH = 64
_RELEASES = ("python", "torch", "spikingjelly", "sj_robust", "commit")
"""What a fingerprint depends on beside the network."""


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

    The first attack meets all of these images again, and all attacks a sample of them, each image
    with its own seed. The sample follows from the outcome of every image in the report and from
    the secret: who cannot know it cannot change a report until the sample misses what was changed.

    Where the attacks make the adversarial images of the report again, no honest image falls, and
    one that does is enough. Elsewhere some may fall by rounding: then more of them are tried, until
    so few would be unlikely in a report that is inflated by 5 points, or so many in an honest one.
    """
    threat = report.threat
    proved = frozenset() if report.verified is None else report.standing("verified")
    if threat is None or not report.standing("everything"):
        yield Check(None, "attack again: no image is still correct")
        return
    with torch.no_grad():
        classes = network.model(data[0][0][:1]).shape[-1]
    suite = make_suite(
        cast("SuiteName", report.suite),
        threat,
        chosen=[str(row["estimator"]) for row in report.estimators if row.get("chosen")],
        classes=classes,
        eot_samples=gradient_draws(report.draws, threat),
        refused=refused(network.model, UNSEARCHED.get(report.suite, ())),
        batch_size=data.batch_size,
    )
    counted = [member for member in suite.members if Asked(threat).keeps(member)]
    told = {row.member for row in report.attacks if report.within(row)}
    lacking = [member.name for member in counted if member.name not in told]
    yield Check(
        not lacking,
        f"members: {len(counted) - len(lacking)} of {len(counted)} attacks of the suite "
        f"{report.suite}; missing: {', '.join(lacking) or 'none'}",
    )
    again = _Again(report, network, data, counted, secret)
    if not lacking:
        yield again.attacked(sorted(report.undecided), sorted(proved))
    if proved:
        yield again.proved(sorted(proved))


def shuffled(numbers: Sequence[int], report: Report, secret: bytes) -> list[int]:
    """Images in an order that follows from the outcome of every image in the report, and that
    nobody can foresee who does not know the secret, of up to 64 bytes.
    """
    said = repr((report.data, report.budget, report.outcome)).encode()
    key = hashlib.blake2b(said, key=secret).digest()

    def place(number: int) -> bytes:
        return hashlib.blake2b(str(number).encode(), key=key).digest()

    return sorted(numbers, key=place)


@dataclass(frozen=True)
class _Again:
    """The attacks and proofs of a report on some of its images.

    Attributes:
        report: The report.
        network: Its network.
        data: Its images.
        members: The attacks of its suite within the threat, in their order.
        secret: What the choice of images follows from, beside the report.
    """

    report: Report
    network: Subject
    data: Data
    members: Sequence[Member]
    secret: bytes

    def attacked(self, undecided: Sequence[int], proved: Sequence[int]) -> Check:
        """Whether few of the undecided images fall, and none of the proved ones."""
        same, compared = self._same_images()
        others = 1.0 - same / compared if compared else 1.0
        rate = others * (_FELL if self.report.draws == 1 else _FELL_DRAWN)
        order = shuffled(undecided, self.report, self.secret)
        fell = self._fell([*order, *self._sample(proved, allowed=0)], self.members[:1])
        false = fell.intersection(proved)
        tried = 0
        while True:
            expected = rate * (tried + len(order) / 10)
            honest = not false and _at_least(len(fell), expected) >= _WRONGED
            wanted = max(_LEAST, _enough(len(order), self._inflated, allowed=len(fell)))
            batch = order[tried : min(wanted, tried + _BATCH)]
            if not honest or not batch:
                break
            fell |= self._fell(batch, self.members)
            tried += len(batch)
        said = f", {len(false)} of them proved" if false else ""
        return Check(
            honest,
            f"attack again: of {len(order)} undecided images, the first attack of the report met "
            f"all and the others {tried}; {len(fell)} fell{said}; of {compared} adversarial images "
            f"of the report, {same} were made again",
        )

    def proved(self, proved: Sequence[int]) -> Check:
        """Whether the proofs of the report can be made here."""
        tried = self._sample(proved, allowed=1)
        x, y = self._images(tried)
        threat = self.report.threat
        assert threat is not None  # or nothing would be proved
        found = prove(self.network.model, Data.of_tensors(x, y, _BATCH), [threat.eps], threat)
        (made,) = map(len, found.verified.values())
        return Check(
            len(tried) - made <= 1,  # which may be lost by rounding
            f"proofs again: {made} of {len(tried)} images that the report proves are proved here",
        )

    @property
    def _inflated(self) -> int:
        return ceil(_INFLATED * len(self.report.labels))

    def _sample(self, numbers: Sequence[int], *, allowed: int) -> list[int]:
        """As many as it takes to meet more than ``allowed`` of those that inflate a report."""
        count = _enough(len(numbers), self._inflated, allowed=allowed)
        return shuffled(numbers, self.report, self.secret)[:count]

    def _same_images(self) -> tuple[int, int]:
        """How many adversarial images the first attack makes as in the report, and of how many."""
        (row,) = (row for row in self.report.attacks if row.member == self.members[0].name)
        digests = dict(zip(row.fell, _parts(row.digests), strict=False))
        compared = shuffled(list(digests), self.report, self.secret)[:_COMPARED]
        found: dict[int, str] = {}
        self._fell(compared, self.members[:1], found)
        return sum(found.get(number) == digests[number] for number in compared), len(compared)

    def _fell(
        self,
        numbers: Sequence[int],
        members: Sequence[Member],
        digests: dict[int, str] | None = None,
    ) -> set[int]:
        """Those of the images that the attacks break, each with the seed that it had."""
        fell: set[int] = set()
        variant = Variant(members, seed=self.report.seed)
        asked = Asked(self.report.threat, self.report.draws)
        for start in range(0, len(numbers), _BATCH):
            batch = numbers[start : start + _BATCH]
            x, y = self._images(batch)
            seeds = SampleSeeds(batch).derived("image", self.report.seed)
            model = self.network.model
            job = Job(variant, model, x, y, 0, seeds, asked, plain=self.network.plain)
            with evaluation_mode(model):
                _, *steps = run_batch(job, BatchLog())
            for step in steps:
                broken = [batch[row] for row in step.fell]
                fell.update(broken)
                if digests is not None:
                    digests |= zip(broken, _parts(step.digests), strict=True)
        return fell

    @cached_property
    def _all_images(self) -> tuple[Tensor, Tensor]:
        return self.data.tensors(torch.device("cpu"))

    def _images(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        x, y = self._all_images
        return x[list(numbers)], y[list(numbers)]


def _parts(digests: str) -> list[str]:
    """The digest of every image."""
    return [digests[start : start + DIGITS] for start in range(0, len(digests), DIGITS)]


def _enough(total: int, forged: int, *, allowed: int) -> int:
    """The least number of images, out of a total, that hold more than ``allowed`` of the forged
    ones with a probability of 95 %; all of them if no number does.
    """
    forged = min(forged, total)
    honest = total - forged
    for count in range(allowed + 1, total + 1):
        few = range(min(allowed, forged) + 1)
        missed = sum(comb(forged, hit) * comb(honest, count - hit) for hit in few)
        if missed <= _MISSED * comb(total, count):
            return count
    return total


def _at_least(count: int, expected: float) -> float:
    """Probability of as many events or more where so many are expected (Poisson)."""
    term, fewer = exp(-expected), 0.0
    for number in range(count):
        fewer += term
        term *= expected / (number + 1)
    return 1 - fewer


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
