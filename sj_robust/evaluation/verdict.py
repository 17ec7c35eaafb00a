"""What stands above the figures of a robustness report: reasons not to believe them."""

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sj_robust.evaluation.robustness_report import RobustnessReport

__all__ = ["alarms", "masked", "remarks"]

_DEAD = 0.99


def alarms(report: "RobustnessReport") -> tuple[str, ...]:
    """Why the network must not be called robust at all: it is dead, or it guesses. 致命问题。

    Args:
        report: The report.

    Returns:
        Sentences; none for a network that works.

    Examples:
        >>> from sj_robust.evaluation.robustness_report import RobustnessReport
        >>> report = RobustnessReport("mine", "digits", "Linf", "0.1", "fast", 2, (0, 1), (0,), ())
        >>> print(alarms(report)[0])
        NOT ROBUST: clean accuracy is 50.0 % (95 % interval 9.5 to 90.5), which cannot be told from always naming one
        class (50.0 %). What a network does not know, no attack can take from it.
    """
    clean = report.clean
    low, high = clean.interval
    chance = max(1 / report.classes, max(Counter(report.labels).values()) / len(report.labels))
    guesses = low <= chance
    found = []
    for row in report.firing:
        if max(row["silent"], row["saturated"]) >= _DEAD:
            never = row["silent"] >= _DEAD
            found.append(
                f"DEAD {'NETWORK' if guesses else 'LAYER'}: {row['silent' if never else 'saturated']:.1%} of layer "
                f"{row['layer']} ({row['neuron']}) {'never fires' if never else 'fires in every step of every image'}. "
                "What does not depend on the image cannot be attacked; that is not robustness. Train it again before "
                "reporting any."
            )
    if guesses:
        found.append(
            f"NOT ROBUST: clean accuracy is {100 * clean.accuracy:.1f} % (95 % interval {100 * low:.1f} to "
            f"{100 * high:.1f}), which cannot be told from always naming one class ({100 * chance:.1f} %). What a "
            "network does not know, no attack can take from it."
        )
    return tuple(found)


def masked(report: "RobustnessReport") -> tuple[str, ...]:
    """Symptoms of masked gradients, which make robust accuracies too high. 梯度掩蔽的迹象。

    That another estimator beats the training surrogate is none where the suite has swept estimators: it is what the
    sweep is for.

    Args:
        report: The report.

    Returns:
        Sentences with number, threshold and remedy.

    Examples:
        >>> from sj_robust.evaluation.robustness_report import RobustnessReport
        >>> masked(RobustnessReport("mine", "digits", "Linf", "0.1", "fast", 2, (0, 1), (0,), ()))
        ()
    """
    answered = {"other_estimator_stronger"} if report.estimators else set()
    return tuple(
        f"CHECK {row['name']}: {row['value']:.3g} where at most {row['threshold']:.3g} passes. {row['meaning']} "
        f"{row['remedy']}"
        for row in report.findings
        if not row["passed"] and row["name"] not in answered
    )


def remarks(report: "RobustnessReport") -> tuple[str, ...]:
    """What else a reader should know. 其他说明。

    Args:
        report: The report.

    Returns:
        Sentences.

    Examples:
        >>> from sj_robust.evaluation.robustness_report import RobustnessReport
        >>> remarks(RobustnessReport("mine", "digits", "Linf", "0.1", "fast", 2, (0, 1), (0,), (), warnings=("old",)))
        ('old',)
    """
    found = list(report.warnings)
    control, worst = report.control, report.worst_case
    if control is not None and control.correct < worst.correct:
        found.append(
            f"The control leaves {100 * control.accuracy:.1f} %, less than the suite's {100 * worst.accuracy:.1f} %: "
            "the choice of estimators did not pay here. Report the lowest figure."
        )
    beyond = [member.name for member in report.members if not report.within(member)]
    if beyond:
        found.append(f"Beyond the threat, and so no part of the worst case: {', '.join(beyond)}.")
    return tuple(found)
