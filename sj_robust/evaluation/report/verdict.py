"""A report in words: verdict, caveats and remarks."""

from collections import Counter

from sj_robust.core.eps import eps_text
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.intervals import extent
from sj_robust.evaluation.report.levels import levels_verdict
from sj_robust.evaluation.result import Accuracy, Evaluation
from sj_robust.evaluation.run.suites import GRADES

__all__ = ["alarms", "budget", "caveats", "masked", "remarks", "verdict"]

_DEAD = 0.99
"""Share of a layer's neurons that never fire, or always, from which the layer is dead."""


def verdict(report: Evaluation) -> str:
    """Bounds of the robust accuracy, the attacks that were run, and caveats."""
    if report.of_levels:
        return levels_verdict(report)
    if report.suite == "vote":
        return _of_the_vote(report)
    if report.suite == "training":
        return _of_a_training(report)
    most = report.everything
    proved = report.verified
    known = "at most" if proved is None else f"between {proved.percent} % (proved) and"
    count = len(report.attacks)
    attacks = "1 attack" if count == 1 else f"{count} attacks"
    found = caveats(report)
    return (
        f"Robust accuracy is {known} {most.percent} % (95 % CI {most.interval_text}; {most.total} "
        f"images, {budget(report.threat)}). {GRADES.get(report.suite, 'Evaluation')}: {attacks} of "
        f"suite `{report.suite}`. {found[0].upper()}{found[1:]}."
    )


def budget(threat: ThreatModel | None) -> str:
    """Norm and radius, or the number of changes, as a reader sees them."""
    if threat is None:
        return "no threat model"
    eps = eps_text(threat.eps)
    plural = "" if eps == "1" else "s"
    counted = ["in frames of event counts"] if threat.counts else []
    if threat.norm == "L0":
        return ", ".join([f"at most {eps} event{plural} added or removed", *counted])
    if threat.norm != "moves":
        return f"{threat.norm} {eps}"
    parts = [f"at most {eps} event{plural} moved in time"]
    if threat.largest_shift is not None:
        frames = "frame" if threat.largest_shift == 1 else "frames"
        parts.append(f"each by at most {threat.largest_shift} {frames}")
    if threat.total_shift is not None:
        parts.append(f"by {threat.total_shift} frames in total")
    return ", ".join([*parts, *counted])


def caveats(report: Evaluation) -> str:
    """Reasons to distrust the figures, in a few words."""
    signs = len(report.findings)
    found = [text.partition(":")[0] for text in alarms(report)]
    failed = [text.removeprefix("CHECK ").partition(":")[0] for text in masked(report)]
    if failed:
        names = ", ".join(failed)
        found.append(f"signs of gradient masking: {names} ({len(failed)} of {signs} checks)")
    elif signs:
        found.append(f"no sign of gradient masking ({signs} checks)")
    else:
        found.append("gradient masking was not checked")
    return "; ".join(found)


def alarms(report: Evaluation) -> tuple[str, ...]:
    """Reasons why the network must not be called robust: dead layers, or accuracy at chance."""
    clean = report.clean
    counts = Counter(report.labels)
    # where all images are of one class, a network that is right looks like one that guesses
    commonest = max(counts.values()) / len(report.labels) if len(counts) > 1 else 0.0
    chance = max(1 / max(report.classes, 1), commonest)
    guesses = report.classes > 0 and clean.interval[0] <= chance
    found = []
    for row in report.firing:
        if max(row["silent"], row["saturated"]) < _DEAD:
            continue
        never = row["silent"] >= _DEAD
        share = row["silent"] if never else row["saturated"]
        how = "never fire" if never else "fire in every step of every image"
        found.append(
            f"DEAD {'NETWORK' if guesses else 'LAYER'}: {share:.1%} of the neurons in layer "
            f"{row['layer']} ({row['neuron']}) {how}. Output that does not depend on the image "
            "cannot be attacked; that is not robustness. Retrain the network before reporting it."
        )
    if guesses:
        found.append(
            f"NOT ROBUST: clean accuracy is {clean.percent} % (95 % CI {clean.interval_text}), "
            f"no better than always predicting one class ({100 * chance:.1f} %). A network that "
            "guesses has no accuracy to lose."
        )
    return tuple(found)


def masked(report: Evaluation) -> tuple[str, ...]:
    """Signs of gradient masking, which inflates robust accuracy: value, limit and remedy of each.

    A stronger estimator is not reported if the suite has already chosen among estimators.
    """
    answered = {"other_estimator_stronger"} if report.estimators else set()
    found = []
    for row in report.findings:
        if row["passed"] or row["name"] in answered:
            continue
        value = extent(row["value"], row.get("count"), row.get("total"))
        found.append(
            f"CHECK {row['name']}: {value}, above the limit of {row['threshold']:.3g}. "
            f"{row['meaning']} {row['remedy']}"
        )
    return tuple(found)


def remarks(report: Evaluation) -> tuple[str, ...]:
    """What else a reader should know."""
    found = list(report.warnings)
    if report.contradicted:
        found.append(_contradictions(report))
    if not report.is_suite:
        return tuple(found)
    proofs = [row.threat for row in report.of(report.main) if row.kind == "proof"]
    if proofs and report.threat is not None and report.verified is None:
        radii = ", ".join(map(budget, proofs))
        found.append(f"Nothing is proved at {budget(report.threat)}: the proofs are at {radii}.")
    control, worst = report.control, report.worst_case
    if control is not None and control.correct < worst.correct:
        found.append(
            f"Accuracy is lower under the control ({control.percent} %) than under the suite "
            f"({worst.percent} %): choosing estimators did not help here. Report the lower figure."
        )
    beyond = [row.member for row in report.attacks if not report.within(row)]
    if beyond:
        names = ", ".join(beyond)
        found.append(f"Outside the threat model, so not part of the worst case: {names}.")
    return tuple(found)


def _of_the_vote(report: Evaluation) -> str:
    """The bracket at the radius in the middle."""
    vote = report.network["vote"]
    radii = [row.eps for row in report.rows if row.kind == "proof"]
    radius = radii[len(radii) // 2] or 0.0
    low, high = (f"{end.percent} %" for end in report.bracket_at(radius))
    return (
        f"Robust accuracy of the smoothed classifier at L2 {radius:.6g} is between {low} "
        f"(certified) and {high} (under attack); {len(report.labels)} images, sigma "
        f"{vote['sigma']:.6g}, votes of {vote['n']} samples."
    )


def _of_a_training(report: Evaluation) -> str:
    parts = []
    for name in report.variants:
        clean = report.under("clean", variant=name).percent
        text = f"{name}: {clean} % clean, {_strongest(report, name)}"
        for one in report.single_accuracies(name):
            if one.kind == "verified":
                text += f", {one.percent} % proved"
        parts.append(text)
    return f"{len(report.labels)} images. {'; '.join(parts)}."


def _strongest(report: Evaluation, variant: str) -> str:
    """What is left of a variant by the attack that breaks most images within the threat."""
    right = report.standing("clean", variant=variant)
    left = []
    for row in report.of(variant):
        broken = report.broken(row)
        if row.attacks and (broken or report.threat is None or report.within(row)):
            left.append(len(right - broken))
    if not left:
        return "no attack within the threat"
    total = report.under("clean", variant=variant).total
    lowest = Accuracy("", "member", min(left), total)
    return f"{lowest.percent} % under the strongest attack"


def _contradictions(report: Evaluation) -> str:
    numbers = ", ".join(map(str, report.contradicted))
    alpha = max(row.alpha for row in report.rows)
    return (
        f"Certified, but broken by an attack: image {numbers} (of {len(report.labels)}). Each "
        f"certificate, and each vote on a perturbed image, is wrong with probability {alpha:.6g}; "
        "more errors than that indicate a bug."
    )
