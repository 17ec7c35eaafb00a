"""The result of an evaluation: the images that every attack broke."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from sj_robust.core.eps import eps_text, parse_eps
from sj_robust.core.saved import plain
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.intervals import wilson_interval

__all__ = ["DIGITS", "OVER_EPS", "Accuracy", "Evaluation", "Kind", "Point", "Row"]

Kind = Literal["clean", "attack", "control", "proof"]

OVER_EPS = "over eps"
"""The variant of rows that are about the first images alone, at several radii."""
DIGITS = 8
"""Digits of the fingerprint of an adversarial image."""
_SUMMARIES = ("clean", "control", "worst case", "everything", "verified")
_OF_ROWS = ("estimators", "firing", "findings", "potential")
_OF_NAMES = ("network", "curves", "configuration", "environment")


@dataclass(frozen=True)
class Row:
    """The result of one member of an evaluation, image by image. 评估中一项的逐图像结果。

    Attributes:
        member: Name of the member, such as ``"clean"``, ``"apgd_ce/atan:4/r0"`` or ``"verify"``.
        kind: ``"clean"`` without an attack, ``"attack"``, ``"control"`` for the training surrogate
            at the same cost, ``"proof"``.
        seen: Indices of the images that it was run on.
        fell: Indices of those that are misclassified afterwards, or (proof) not proved.
        outside: Indices of those in ``fell`` whose image exceeds the threat of the evaluation, if
            distances were measured.
        digests: Of every image in ``fell`` that an attack made, 8 hexadecimal digits of its
            fingerprint, one after another; ``""`` where they were not kept. An attack that is
            run again with the seed of the evaluation makes the same images, where torch rounds
            alike.
        variant: Variant of the network or the images.
        threat: Threat model of the member; None if there is none, as for Gaussian noise.
        group: Members of one group attack only images that the earlier ones did not break; those
            of group ``""`` attack all images.
        estimator: Gradient estimator of the attack.
        largest: Largest distance of an image from its clean image, in the norm of the evaluation; 0
            if distances were not measured.
        alpha: Probability with which the proof of an image is wrong; 0 for bounds.
        seconds: Time for crafting and scoring, summed over processes.

    Examples:
        >>> Row("pgd", "attack", (0, 1, 2), (1, 2), outside=(2,)).broken
        (1,)
    """

    member: str
    kind: Kind
    seen: tuple[int, ...]
    fell: tuple[int, ...]
    outside: tuple[int, ...] = ()
    digests: str = ""
    variant: str = ""
    threat: ThreatModel | None = None
    group: str = ""
    estimator: str = "training"
    largest: float = 0.0
    alpha: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seen", "fell", "outside"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def eps(self) -> float | None:
        """Radius of the threat model; None if there is none."""
        return None if self.threat is None else self.threat.eps

    @property
    def broken(self) -> tuple[int, ...]:
        """Those in ``fell`` whose image was not found to exceed the threat of the evaluation."""
        outside = frozenset(self.outside)
        return tuple(number for number in self.fell if number not in outside)

    @property
    def stood(self) -> frozenset[int]:
        """Images that it was run on and did not break."""
        return frozenset(self.seen).difference(self.fell)

    def covers(self, attack: "Row") -> bool:
        """Whether a proof is of all that an attack may do."""
        if self.threat is None or attack.threat is None:
            return False
        return self.threat.includes(attack.threat)

    @property
    def measured(self) -> bool:
        """Whether one of its images was measured to differ from its clean image; an attack that
        changes no image looks as if nothing was measured.
        """
        return bool(self.outside) or self.largest > 0

    @property
    def attacks(self) -> bool:
        """Whether it is an attack, of the control or not."""
        return self.kind in ("attack", "control")


@dataclass(frozen=True)
class Accuracy:
    """One accuracy, counted from rows. 一项准确率。

    Attributes:
        name: Name of the attack or summary.
        kind: ``"member"`` for one attack, otherwise the name of a summary.
        correct: Images classified correctly.
        total: Images.
        seconds: Total time.

    Examples:
        >>> clean = Accuracy("clean", "clean", 9, 10, 0.1)
        >>> clean.accuracy, clean.interval_text
        (0.9, '59.6 to 98.2')
    """

    name: str
    kind: str
    correct: int
    total: int
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share in [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % CI of the share."""
        return wilson_interval(self.correct, self.total)

    @property
    def percent(self) -> str:
        """The share in per cent, as tables show it."""
        return f"{100 * self.accuracy:.1f}"

    @property
    def interval_text(self) -> str:
        """The interval in per cent, as tables show it."""
        low, high = (100 * end for end in self.interval)
        return f"{low:.1f} to {high:.1f}"


@dataclass(frozen=True)
class Point:
    """Accuracy at one radius. 某一半径下的准确率。

    Attributes:
        eps: The radius as text.
        attack: Name of the attack.
        correct: Images classified correctly.
        total: Images.
        verified: Proved images, out of those for which a proof was tried; None without proofs.
    """

    eps: str
    attack: str
    correct: int
    total: int
    verified: Accuracy | None = None


@dataclass(frozen=True)
class Evaluation:
    """A network under a suite of attacks, image by image. 逐图像的评估结果。

    Every accuracy is computed from the rows. With proofs, the true robust accuracy lies in a
    bracket between the verified accuracy and that under all attacks. An attack that breaks an
    image which a proof (without error probability) covers is an error.

    An image counts as broken if an attack fools the network with a change that the threat allows
    (:meth:`broken`). Members beyond it (other radii, Gaussian noise) have their own figures; in the
    worst case they count only on the images whose measured distance is within the threat.

    Attributes:
        name: Name of the network.
        dataset: Name of the data set.
        suite: Name of the suite; ``"training"`` for the report of a training, ``"vote"`` for that
            of a smoothed classifier.
        labels: Class of every image.
        rows: Result of every member.
        threat: Norm and radius of the adversary; None if there is none.
        classes: Number of classes; 0 if it is not known.
        description: What was run, in a few words.
        seed: Seed of the run.
        draws: Number of forwards; a stochastic network must be wrong in more than half of
            them.
        network: Architecture, ``T``, number of parameters, ``fingerprint``, and per spiking layer
            the ``neuron`` and the ``surrogate`` it was trained with.
        data: Fingerprint of images and labels.
        estimators: Trials of the search over gradient estimators.
        firing: Rows of :func:`sj_robust.evaluation.firing`.
        findings: Rows of :func:`sj_robust.evaluation.diagnose`.
        potential: MS-MPPD per layer and step under each attack, and with proofs the mean square of
            the distance between the bounds of the potential; rows with ``member``, ``samples``,
            ``layers``.
        curves: Per network of a training, one record per epoch.
        configuration: Options of the run as plain data.
        environment: Versions, device, commit.
        warnings: Further remarks for the reader.

    Raises:
        ValueError: If there are no images, a variant has no row of the clean images, that of the
            first one is not of all images, rows contradict each other, an index does not belong to
            an image, or an error probability is not in [0, 1).
    """

    name: str
    dataset: str
    suite: str
    labels: tuple[int, ...]
    rows: tuple[Row, ...]
    threat: ThreatModel | None = None
    classes: int = 0
    description: str = ""
    seed: int = 0
    draws: int = 1
    network: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    estimators: tuple[dict[str, Any], ...] = ()
    firing: tuple[dict[str, Any], ...] = ()
    findings: tuple[dict[str, Any], ...] = ()
    potential: tuple[dict[str, Any], ...] = ()
    curves: dict[str, Any] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("labels", "rows", "warnings"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in _OF_ROWS:
            values = map(plain, getattr(self, name))
            object.__setattr__(self, name, tuple(values))
        for name in _OF_NAMES:
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not self.labels:
            raise ValueError("a report needs at least one image, got none")
        for variant in self.variants or ("",):
            self._check_clean(variant)
        for row in self.rows:
            self._check_row(row)
        for variant in self.variants:
            self._check_proofs(variant)

    @property
    def eps(self) -> str:
        """Radius as a string, such as ``"8/255"``; in L0 the number of changed elements, such as
        ``"20"``; empty without a threat.
        """
        return "" if self.threat is None else eps_text(self.threat.eps)

    @property
    def architecture(self) -> str:
        """Architecture of the network."""
        return str(self.network.get("architecture", "unknown"))

    # Images, by what they withstand

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants of the network or the images, in order."""
        return tuple(dict.fromkeys(row.variant for row in self.rows))

    @property
    def main(self) -> str:
        """The first variant, which figures refer to by default."""
        return self.rows[0].variant

    @property
    def of_levels(self) -> bool:
        """Whether its variants are levels of faults or corruptions."""
        return self.suite in ("stress", "corruptions")

    @property
    def is_suite(self) -> bool:
        """Whether it is of a suite of attacks, so that a worst case over its members counts."""
        return self.suite not in ("training", "vote", "stress", "corruptions")

    def of(self, variant: str) -> tuple[Row, ...]:
        """Rows of a variant."""
        return tuple(row for row in self.rows if row.variant == variant)

    @property
    def attacks(self) -> tuple[Row, ...]:
        """Attacks on the first variant, including those of the control, in order."""
        return tuple(row for row in self.of(self.main) if row.attacks)

    def within(self, row: Row) -> bool:
        """Whether an attack has a threat of its own that stays within the threat model, so that
        all that it breaks is part of the worst case.
        """
        if row.threat is None or row.outside:
            return False
        return self.threat is None or self.threat.includes(row.threat)

    def broken(self, row: Row) -> frozenset[int]:
        """Images that an attack breaks within the threat model: all that fall to one within it, and
        of any other one those whose measured distance is within it; without a threat model, all.
        """
        if self.threat is None or self.within(row) or row.measured:
            return frozenset(row.broken)
        return frozenset()

    def standing(self, name: str, *, variant: str | None = None) -> frozenset[int]:
        """Indices of the images that are still correct under the attack or summary of this name.

        For a member of a group, these are the images that neither it nor the earlier members broke.

        Raises:
            KeyError: If there is no such attack or summary.
        """
        place = self.main if variant is None else variant
        counted = self._counted(name, place)
        if name == "verified":
            return counted[0].stood
        clean = self._clean(place).stood
        if name in _SUMMARIES:
            return clean.difference(*map(self.broken, counted))
        return clean.difference(*(row.fell for row in counted))

    def under(self, name: str, *, variant: str | None = None) -> Accuracy:
        """One accuracy by name; seconds are those of the members within the threat.

        Raises:
            KeyError: As for :meth:`standing`.
        """
        place = self.main if variant is None else variant
        counted = self._counted(name, place)
        kind = name if name in _SUMMARIES else "member"
        if kind == "member":
            seconds = counted[-1].seconds
        else:
            spent = [row for row in counted if row.kind == "proof" or self.within(row)]
            seconds = sum(row.seconds for row in spent)
        left = self.standing(name, variant=place)
        total = len(self._clean(place).seen)
        return Accuracy(
            name=name,
            kind=kind,
            correct=len(left),
            total=total,
            seconds=float(seconds),
        )

    # Figures

    @property
    def clean(self) -> Accuracy:
        """Accuracy without an attack."""
        return self.under("clean")

    @property
    def worst_case(self) -> Accuracy:
        """Worst case per image over all members of the suite, without the control."""
        return self.under("worst case")

    @property
    def control(self) -> Accuracy | None:
        """Worst case per image over the control: the training surrogate with restarts at the same
        cost.
        """
        if any(row.kind == "control" for row in self.attacks):
            return self.under("control")
        return None

    @property
    def everything(self) -> Accuracy:
        """Worst case per image over suite and control together."""
        return self.under("everything")

    @property
    def verified(self) -> Accuracy | None:
        """Share of images that are proved robust within the threat; None without such proofs."""
        return self.under("verified") if self._proofs(self.main) else None

    @property
    def accuracies(self) -> tuple[Accuracy, ...]:
        """All accuracies: clean, under each member, control, worst case, everything, verified."""
        return self.accuracies_of(self.main)

    def accuracies_of(self, variant: str) -> tuple[Accuracy, ...]:
        """All accuracies of a variant, in the same order."""
        attacks = [row for row in self.of(variant) if row.attacks]
        names = ["clean", *(row.member for row in attacks)]
        if any(row.kind == "control" for row in attacks):
            names.append("control")
        names += ["worst case", "everything"]
        if self._proofs(variant):
            names.append("verified")
        return tuple(self.under(name, variant=variant) for name in names)

    def single_accuracies(self, variant: str) -> tuple[Accuracy, ...]:
        """Those of a variant that are not over several members: clean, under each, verified."""
        kinds = ("clean", "member", "verified")
        return tuple(one for one in self.accuracies_of(variant) if one.kind in kinds)

    @property
    def bracket(self) -> tuple[Accuracy, Accuracy] | None:
        """Lower and upper bound of the true robust accuracy: ``verified`` and ``everything``; None
        without proofs.
        """
        return None if self.verified is None else (self.verified, self.everything)

    @property
    def undecided(self) -> frozenset[int]:
        """Images that no attack breaks and that are not verified."""
        proved = self.standing("verified") if self.verified else frozenset()
        return self.standing("everything") - proved

    @property
    def outcome(self) -> tuple[int, ...]:
        """For every image, the index of the first attack that broke it (those of the suite first),
        -1 for none, -2 if it is misclassified without an attack.
        """
        broken_by = dict.fromkeys(self.standing("clean"), -1)
        from_last = list(enumerate(self.attacks))[::-1]
        for kind in ("control", "attack"):  # what comes later here counts
            for index, row in from_last:
                if row.kind == kind:
                    broken_by |= dict.fromkeys(self.broken(row), index)
        images = range(len(self.labels))
        return tuple(broken_by.get(number, -2) for number in images)

    @property
    def over_eps(self) -> tuple[Point, ...]:
        """Accuracy over the radius, from rows made for it, or from members of the suite with other
        radii than the threat, such as the paper's.
        """
        levels = [row for row in self.of(OVER_EPS) if row.attacks]
        made_for_it = bool(levels)
        variant = OVER_EPS if made_for_it else self.main
        if not made_for_it:
            levels = [row for row in self.attacks if "@" in row.member and row.eps is not None]
            others = {row.eps for row in levels if row.threat != self.threat}
            if len(others) < 2:
                return ()
        proved = {}
        for row in self.of(OVER_EPS):
            if row.kind == "proof":
                counted = Accuracy(
                    name="verified", kind="verified", correct=len(row.stood), total=len(row.seen)
                )
                proved[eps_text(row.eps or 0.0)] = counted
        clean = self.under("clean", variant=variant)
        points = [
            Point(
                eps="0",
                attack="clean",
                correct=clean.correct,
                total=clean.total,
                verified=proved.get("0"),
            )
        ]
        for row in levels:
            left = self.under(row.member, variant=variant)
            eps = eps_text(row.eps or 0.0)
            attack = row.member.partition("@")[0]
            attack += f", {row.estimator}" if made_for_it else ""
            point = Point(
                eps=eps,
                attack=attack,
                correct=left.correct,
                total=left.total,
                verified=proved.get(eps),
            )
            points.append(point)
        return tuple(points)

    def bracket_at(self, eps: float | str) -> tuple[Accuracy, Accuracy]:
        """Share of images that are proved and not broken at one radius, and share that is still
        correct after the attacks up to it.

        Raises:
            KeyError: If nothing is proved at this radius.
        """
        radius = parse_eps(eps)
        proofs = [row for row in self.of(self.main) if row.kind == "proof" and row.eps == radius]
        if not proofs:
            raise KeyError(f"nothing is proved at {eps_text(radius)}")
        proof = proofs[0]
        left = self.standing("clean")
        for row in self.attacks:
            if proof.covers(row):
                left = left.difference(self._by_its_own_threat(row))
        both = proof.stood & left
        total = len(self.labels)
        lower = Accuracy(name="verified", kind="verified", correct=len(both), total=total)
        upper = Accuracy(name="everything", kind="everything", correct=len(left), total=total)
        return lower, upper

    @property
    def contradicted(self) -> tuple[int, ...]:
        """Images that are proved robust but broken by an attack within the same threat model: each
        is possible with the error probability ``alpha`` of the proof; more than that is a bug.
        """
        found: set[int] = set()
        for proof in self.rows:
            if proof.kind == "proof":
                for _, numbers in self._contradictions(proof):
                    found |= numbers
        return tuple(sorted(found))

    def merged(self, other: Self) -> Self:
        """This report with the rows, curves and warnings of another report on the same images;
        variants that both have must have the same rows.

        Raises:
            ValueError: If threats or images differ, or, apart from the time, two variants of one
                name.
        """
        differ = []
        if self.threat != other.threat:
            differ.append(f"threat {self.threat} and {other.threat}")
        if self.labels != other.labels:
            differ.append("other labels")
        if self.data != other.data:
            differ.append(f"data {self.data!r} and {other.data!r}")
        if differ:
            raise ValueError(
                "reports must have the same threat and images to be merged, got "
                f"{', '.join(differ)}"
            )
        new = [variant for variant in other.variants if variant not in self.variants]
        for variant in other.variants:
            if variant not in new and _timeless(self, variant) != _timeless(other, variant):
                raise ValueError(
                    f"networks must have names of their own to be merged, got {variant!r} in both "
                    "with other rows; name one of them anew"
                )
        return replace(
            self,
            rows=(*self.rows, *(row for row in other.rows if row.variant in new)),
            curves=self.curves | other.curves,
            warnings=self.warnings + other.warnings,
        )

    def _clean(self, variant: str) -> Row:
        for row in self.rows:
            if row.kind == "clean" and row.variant == variant:
                return row
        raise KeyError(f"no variant {variant!r} in this report; it has {', '.join(self.variants)}")

    def _counted(self, name: str, variant: str) -> Sequence[Row]:
        """The rows that a figure is counted over."""
        rows = self.of(variant)
        attacks = [row for row in rows if row.attacks]
        match name:
            case "clean":
                return []
            case "verified":
                proofs = self._proofs(variant)
                if proofs:
                    return proofs[:1]
            case "everything":
                return attacks
            case "control":
                return [row for row in attacks if row.kind == "control"]
            case "worst case":
                return [row for row in attacks if row.kind == "attack"]
        for index, row in enumerate(attacks):
            if row.member == name:
                before = attacks[:index] if row.group else []
                return [*(one for one in before if one.group == row.group), row]
        known = ", ".join(row.member for row in attacks)
        raise KeyError(f"no figure {name!r} in this report; it has {known}")

    def _proofs(self, variant: str) -> list[Row]:
        """Proofs of a variant within the threat itself; one at another radius is no end of the
        bracket.
        """
        proofs = [row for row in self.of(variant) if row.kind == "proof"]
        return [row for row in proofs if row.threat == self.threat]

    def _check_clean(self, variant: str) -> None:
        clean = [row for row in self.of(variant) if row.kind == "clean"]
        if not clean:
            network = f" of {variant!r}" if variant else ""
            raise ValueError(
                f"a report needs a row of the clean images{network}, of kind 'clean', got none"
            )
        seen, total = len({*clean[0].seen}), len(self.labels)
        if seen == 0 or (seen < total and variant == self.main):
            raise ValueError(
                f"the row of the clean images must be of all {total} images, got {seen}; evaluate "
                "the network on all of them"
            )

    def _check_row(self, row: Row) -> None:
        total = len(self.labels)
        if row.seen and not (min(row.seen) >= 0 and max(row.seen) < total):
            raise ValueError(
                f"numbers of images must be from 0 to {total - 1}, got {max(row.seen)}"
            )
        if not isinstance(row.alpha, int | float) or not 0 <= row.alpha < 1:
            raise ValueError(
                f"alpha of {row.member!r} must be in [0, 1), got {row.alpha!r}; it is the "
                "probability of an error"
            )
        if not frozenset(row.outside) <= frozenset(row.fell) <= frozenset(row.seen):
            raise ValueError(f"{row.member!r} must fool images that it attacked")
        if row.digests and len(row.digests) != DIGITS * len(row.fell):
            raise ValueError(
                f"digests of {row.member!r} must be {DIGITS} digits for each of {len(row.fell)} "
                f"images that fell, got {len(row.digests)}; the file is damaged"
            )
        if row.kind == "clean":
            return
        right = self._clean(row.variant).stood
        if row.attacks and not frozenset(row.seen) <= right:
            raise ValueError(
                f"{row.member!r} must fool images that it attacked, of those classified correctly"
            )
        if row.kind == "proof" and not row.alpha and not row.stood <= right:
            raise ValueError("verified images must be among those classified correctly")

    def _check_proofs(self, variant: str) -> None:
        for proof in self.of(variant):
            if proof.kind != "proof" or proof.alpha:
                continue
            for member, numbers in self._contradictions(proof):
                raise ValueError(
                    f"image {min(numbers)} is verified at eps {eps_text(proof.eps or 0.0)} and "
                    f"broken by {member!r}: proof or attack has a bug; no report is made, please "
                    "report it with the network"
                )

    def _contradictions(self, proof: Row) -> Iterable[tuple[str, set[int]]]:
        """Attacks within the threat of a proof that break proved images, and these images."""
        same_network = {self.main, OVER_EPS}
        variants = same_network if proof.variant in same_network else {proof.variant}
        for row in self.rows:
            if row.variant not in variants or not row.attacks:
                continue
            both = proof.stood & self._by_its_own_threat(row)
            if both and proof.covers(row):
                yield row.member, set(both)

    def _by_its_own_threat(self, row: Row) -> frozenset[int]:
        """Images that an attack breaks with a change that its own threat allows: not those that
        exceed even that of the evaluation, if the attack promised to stay within it.
        """
        narrower = self.threat and row.threat and self.threat.includes(row.threat)
        return frozenset(row.broken if narrower else row.fell)


def _timeless(report: Evaluation, variant: str) -> list[Row]:
    """Rows of a variant, whatever time they took."""
    return [replace(row, seconds=0.0) for row in report.of(variant)]
