"""What a report says in words: its verdict, what speaks against its figures, and what else to
know.
"""

from collections import Counter

from sj_robust.attacks.threat import ThreatModel, eps_text
from sj_robust.evaluation.intervals import extent
from sj_robust.evaluation.report.levels import levels_verdict
from sj_robust.evaluation.result import Accuracy, Evaluation
from sj_robust.evaluation.run.suites import GRADES

__all__ = ["alarms", "budget", "doubts", "masked", "remarks", "verdict"]

_DEAD = 0.99
"""Share of a layer's neurons that never fire, or always, from which the layer is dead."""


def verdict(report: Evaluation) -> str:
    """In one breath: what share withstands the threat at most and at least, what was tried, what to
    doubt.
    """
    if report.suite in ("stress", "corruptions"):
        return levels_verdict(report)
    if report.suite == "vote":
        return _of_the_vote(report)
    if report.suite == "training":
        return _of_a_training(report)
    most = report.everything
    proved = "" if report.verified is None else f"; at least {report.verified.percent} % is proved"
    count = len(report.attacks)
    grade = f" ({GRADES[report.suite]})" if report.suite in GRADES else ""
    return (
        f"At most {most.percent} % (95 % interval {most.interval_text}) of {most.total} images "
        f"withstand {budget(report.threat)}{proved}. Tried: suite {report.suite}{grade}, {count} "
        f"attack{'' if count == 1 else 's'}. Doubts: {doubts(report)}."
    )


def budget(threat: ThreatModel | None) -> str:
    """Norm and radius, or the number of changes, as a reader sees them."""
    if threat is None:
        return "every attack"
    eps = eps_text(threat.eps)
    plural = "" if eps == "1" else "s"
    if threat.norm == "L0":
        return f"L0, at most {eps} event{plural} added or removed"
    if threat.norm != "moves":
        return f"{threat.norm}, eps {eps}"
    parts = [f"at most {eps} event{plural} moved in time"]
    if threat.largest_shift is not None:
        parts.append(f"by {threat.largest_shift} frames at most")
    if threat.total_shift is not None:
        parts.append(f"by {threat.total_shift} together")
    return ", ".join(parts)


def doubts(report: Evaluation) -> str:
    """What speaks against the figures, in a few words."""
    signs = len(report.findings)
    found = [text.partition(":")[0] for text in alarms(report)]
    failed = [text.removeprefix("CHECK ").partition(":")[0] for text in masked(report)]
    if failed:
        names = ", ".join(failed)
        found.append(f"{len(failed)} of {signs} signs of gradient masking, {names}")
    elif signs:
        found.append(f"none of {signs} signs of gradient masking")
    else:
        found.append("signs of gradient masking were not looked for")
    return "; ".join(found)


def alarms(report: Evaluation) -> tuple[str, ...]:
    """Why the network must not be called robust at all: it is dead, or it guesses; none for one
    that works.
    """
    clean = report.clean
    commonest = max(Counter(report.labels).values()) / len(report.labels)
    chance = max(1 / max(report.classes, 1), commonest)
    guesses = report.classes > 0 and clean.interval[0] <= chance
    found = []
    for row in report.firing:
        if max(row["silent"], row["saturated"]) < _DEAD:
            continue
        never = row["silent"] >= _DEAD
        share = row["silent"] if never else row["saturated"]
        how = "never fires" if never else "fires in every step of every image"
        found.append(
            f"DEAD {'NETWORK' if guesses else 'LAYER'}: {share:.1%} of layer {row['layer']} "
            f"({row['neuron']}) {how}. What does not depend on the image cannot be attacked; that "
            "is not robustness. Train it again before reporting any."
        )
    if guesses:
        found.append(
            f"NOT ROBUST: clean accuracy is {clean.percent} % (95 % interval "
            f"{clean.interval_text}), which cannot be told from always naming one class "
            f"({100 * chance:.1f} %). What a network does not know, no attack can take from it."
        )
    return tuple(found)


def masked(report: Evaluation) -> tuple[str, ...]:
    """Symptoms of masked gradients, which make robust accuracies too high, with number, threshold
    and remedy.

    That another estimator beats the training surrogate is none where the suite has chosen among
    estimators.
    """
    answered = {"other_estimator_stronger"} if report.estimators else set()
    found = []
    for row in report.findings:
        if row["passed"] or row["name"] in answered:
            continue
        value = extent(row["value"], row.get("count"), row.get("total"))
        found.append(
            f"CHECK {row['name']}: {value}; at most {row['threshold']:.3g} passes. "
            f"{row['meaning']} {row['remedy']}"
        )
    return tuple(found)


def remarks(report: Evaluation) -> tuple[str, ...]:
    """What else a reader should know."""
    found = list(report.warnings)
    if report.contradicted:
        found.append(_contradictions(report))
    if report.suite in ("training", "stress", "corruptions", "vote"):
        return tuple(found)
    control, worst = report.control, report.worst_case
    if control is not None and control.correct < worst.correct:
        found.append(
            f"The control leaves {control.percent} %, less than the suite's {worst.percent} %: the "
            "choice of estimators did not pay here. Report the lowest figure."
        )
    beyond = [row.member for row in report.attacks if not report.within(row)]
    if beyond:
        found.append(f"Beyond the threat, and so no part of the worst case: {', '.join(beyond)}.")
    return tuple(found)


def _of_the_vote(report: Evaluation) -> str:
    """The bracket at the radius in the middle."""
    vote = report.network["vote"]
    radii = [row.eps for row in report.rows if row.kind == "proof"]
    radius = radii[len(radii) // 2] or 0.0
    low, high = (f"{end.percent} %" for end in report.bracket_at(radius))
    return (
        f"the vote of {vote['n']} draws with sigma {vote['sigma']:.6g} withstands L2 {radius:.6g} "
        f"on {low} (certified) to {high} (left by the attack) of {len(report.labels)} images"
    )


def _of_a_training(report: Evaluation) -> str:
    parts = []
    for name in report.variants:
        least = min(_alone(report, name), key=lambda one: one.correct).percent
        clean = report.under("clean", variant=name).percent
        parts.append(f"{name}: {clean} % clean, {least} % under the strongest attack")
    return f"{len(report.labels)} images. {'; '.join(parts)}."


def _alone(report: Evaluation, variant: str) -> list[Accuracy]:
    names = [row.member for row in report.of(variant)]
    return [report.under(name, variant=variant) for name in names]


def _contradictions(report: Evaluation) -> str:
    numbers = ", ".join(map(str, report.contradicted))
    alpha = max(row.alpha for row in report.rows)
    return (
        f"Certified and yet broken: {numbers} of {len(report.labels)} images. With probability "
        f"{alpha:.6g} each a certificate or the vote at the perturbed image is wrong; more than "
        "that is a bug."
    )
