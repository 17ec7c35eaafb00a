"""Conversion of reports of earlier versions."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sj_robust.attacks.threat import parse_eps
from sj_robust.evaluation.result import OVER_EPS

__all__ = ["translated"]

_Content = dict[str, Any]
_COUNTS = (
    "Read from a file of version 1, which holds counts only: the indices of the broken images are "
    "placeholders."
)
NOISE = "gaussian"
"""Name, in files of every version, of the attack of a training that has no threat."""
_SEARCHLESS = "Measured by an earlier release, whose suite `fast` had no search over spikes."


def translated(text: str) -> str:
    """The text of a report of today: what an earlier version of one of its formats says, anything
    else as it is. 旧版报告转换为当前格式。

    Files of suites of version 1 held what happened to every image. Of accuracy over eps, of stress
    tests and of trainings they held counts: the images of a row are then the first ones, as many as
    fell. Up to version 2 the suite ``standard`` ran what ``gradient`` runs now, and becomes that.
    Up to version 3 no threat said that frames hold counts, and all are those of binary frames.
    Attacks of a training were stored without a threat until late in version 4, and are within that
    of their report, noise excepted.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # which the report of today says in its words
        return text
    if not isinstance(content, dict) or content.get("version") not in (1, 2, 3, 4):
        return text
    version = content["version"]
    if version == 4 and content.get("suite") != "training":
        return text
    formats = _FORMATS if version == 1 else {"sj_robust.report": _with_threats}
    translate = formats.get(str(content.get("format")))
    if translate is None:
        return text
    del content["format"], content["version"]
    try:
        found = translate(content)
        if version < 3:
            found = _named_as_today(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"a field of a report of version {version} is missing or unknown ({error}); the file "
            "is damaged"
        ) from error
    return json.dumps({"format": "sj_robust.report", "version": 4} | found)


def _with_threats(old: _Content) -> _Content:
    """A report whose attacks have a threat if it is of a training."""
    if old["suite"] != "training":
        return old
    rows = []
    for row in old["rows"]:
        is_bounded = row["kind"] == "attack" and row["member"] != NOISE
        if is_bounded and row["threat"] is None:
            row = row | {"threat": old["threat"]}
        rows.append(row)
    return old | {"rows": rows}


def _named_as_today(old: _Content) -> _Content:
    """A report of a time when no suite had a search over spikes."""
    if old["suite"] == "standard":
        configuration = old.get("configuration", {})
        if "suite" in configuration:  # for the command that would run it again
            configuration = configuration | {"suite": "gradient"}
        return old | {"suite": "gradient", "configuration": configuration}
    if old["suite"] == "fast":
        return old | {"warnings": [*old.get("warnings", ()), _SEARCHLESS]}
    return old


def _of_a_suite(old: _Content) -> _Content:
    """``sj_robust.robustness_report``."""
    threat = _threat(old.pop("threat"), parse_eps(old.pop("eps")), old)
    images = range(len(old["labels"]))
    correct = old.pop("correct")
    misclassified = sorted({*images}.difference(correct))
    clean = _row("clean", "clean", images, misclassified)
    if not {*correct} <= {*images}:
        raise ValueError(
            f"numbers of images must be from 0 to {len(images) - 1}, got {max(correct)}"
        )
    rows = [clean]
    for member in old.pop("members"):
        eps = member["eps"]
        group = member["group"]
        row = _row(
            member["name"],
            "control" if group == "control" else "attack",
            member["attacked"],
            member["fooled"],
            outside=member["outside"],
            threat=None if eps is None else threat | {"eps": eps},
            group=group,
            estimator=member["estimator"],
            largest=member["largest"],
            seconds=member["seconds"],
        )
        rows.append(row)
    verified = old.pop("verified")
    seconds = old.pop("verified_seconds")
    if verified is not None:
        left = sorted({*images}.difference(verified))
        rows.append(_row("verify", "proof", images, left, threat=threat, seconds=seconds))
    curve = old.pop("over_eps")
    proved = old.pop("verified_over_eps")
    radii = {row["eps"] for row in curve[1:]}
    if radii <= _radii_of_members(rows):  # then the suite has all of it
        curve = []
    order = _most_robust_first(correct, rows)
    rows += _over_eps(curve, proved, threat, order)
    return old | {"threat": threat, "rows": rows}


def _radii_of_members(rows: Iterable[_Content]) -> set[str]:
    return {row["member"].partition("@")[2] for row in rows}


def _most_robust_first(correct: Sequence[int], rows: Sequence[_Content]) -> list[int]:
    """Images that are proved, then the others, those first that no attack or a larger radius
    breaks; so counts that are given out in this order contradict no row.
    """
    breaks: dict[int, float] = {}
    proved: set[int] = set()
    for row in rows:
        if row["kind"] == "proof":
            proved = {*row["seen"]}.difference(row["fell"])
        elif row["threat"] is not None:
            for number in row["fell"]:
                breaks[number] = min(row["threat"]["eps"], breaks.get(number, math.inf))

    def rank(number: int) -> tuple[bool, float]:
        return number not in proved, -breaks.get(number, math.inf)

    return sorted(correct, key=rank)


def _over_eps(
    curve: Sequence[_Content], proved: Sequence[_Content], threat: _Content, order: Sequence[int]
) -> list[_Content]:
    """Rows of accuracy over eps, of which counts are known: those of the correct images
    that come last in the order fall.
    """
    if not curve and not proved:
        return []
    total = (curve or proved)[0]["total"]
    right = [number for number in order if number < total]
    given: _Content = {"variant": OVER_EPS}
    wrong = sorted({*range(total)}.difference(right))
    rows = [_row("clean", "clean", range(total), wrong, **given)]
    left = right
    for point in curve[1:]:
        attack, _, estimator = point["attack"].partition(", ")
        row = _row(
            f"{attack}@{point['eps']}",
            "attack",
            left,
            left[point["correct"] :],
            threat=threat | {"eps": parse_eps(point["eps"])},
            group="over_eps",
            estimator=estimator or "training",
            **given,
        )
        rows.append(row)
        left = left[: point["correct"]]
    for point in proved:
        rest = [*wrong, *right[point["verified"] :]]
        at = threat | {"eps": parse_eps(point["eps"])}
        rows.append(_row("verify", "proof", range(total), rest, threat=at, **given))
    return rows


def _of_a_stress_test(old: _Content) -> _Content:
    """``sj_robust.stress_card``."""
    images = old.pop("images")
    threat = old["threat"]
    rows: list[_Content] = []
    for level in (old.pop("intact"), *old.pop("rows")):
        name = level["kind"]
        if name != "none":
            name = f"{name}:{level['level']}"
        draws = len(level["clean"])
        for draw, right in enumerate(level["clean"]):
            variant = name if draws == 1 else f"{name}/draw{draw}"
            rows.append(_counted("clean", "clean", images, right, variant))
            attacked = level["attacked"][draw]
            row = _counted("short", "attack", right, attacked, variant)
            rows.append(row | {"threat": threat})
    for what in ("clean", "attacked"):
        old.pop(f"fall_{what}", None)
    warnings = [*old.pop("warnings", ()), _COUNTS]
    description = old.pop("attack")
    return old | {
        "labels": [-1] * images,
        "rows": rows,
        "description": description,
        "warnings": warnings,
    }


def _of_a_training(old: _Content) -> _Content:
    """``sj_robust.report``."""
    warnings = [*old.pop("notes"), _COUNTS]
    scores = old.pop("scores")
    clean = {score["network"]: score["total"] for score in scores}
    for score in scores:
        if score["attack"] == "clean":
            clean[score["network"]] = score["correct"]
    rows: list[_Content] = []
    for network, right in clean.items():
        own = [score for score in scores if score["network"] == network]
        total = own[0]["total"]
        rows.append(_counted("clean", "clean", total, right, network))
        for score in own:
            if score["attack"] == "clean":
                continue
            if score["correct"] > right:
                warnings.append(
                    f"{network}: {score['correct']} images are correct under {score['attack']}; "
                    f"only the {right} that are also correct without it are counted."
                )
            left = min(score["correct"], right)
            rows.append(_counted(score["attack"], "attack", right, left, network))
    totals = [score["total"] for score in scores]
    total = max(totals, default=1)
    found = {
        "name": next(iter(clean), ""),
        "dataset": str(old["configuration"].get("dataset", "")),
        "suite": "training",
        "labels": [-1] * total,
        "rows": rows,
        "warnings": warnings,
    }
    return _with_threats(old | found)


def _of_a_vote(old: _Content) -> _Content:
    """``sj_robust.smoothed_bracket``."""
    images = range(old["total"])
    unnamed: Mapping[str, float | None] = {"largest_shift": None, "total_shift": None}
    contradicted = {*old["contradicted"]}
    variant = {"variant": f"vote:{old['sigma']:g}"}
    rows: list[_Content] = []
    proofs = []
    before: set[int] = set()
    levels = zip(old["radii"], old["certified"], old["broken"], strict=True)
    for radius, certified, broken in levels:
        threat = {"norm": "L2", "eps": radius, **unnamed}
        fallen = {*broken}
        if not rows:
            misclassified = broken if radius == 0 else []
            rows.append(_row("clean", "clean", images, misclassified, **variant))
            before = fallen if radius == 0 else set()
        if radius > 0:
            seen = sorted({*images} - before)
            new = sorted(fallen - before)
            more = {"threat": threat, "group": "vote"}
            rows.append(_row(f"pgd@{radius:g}", "attack", seen, new, **more, **variant))
        proved = {*certified} | (contradicted & (fallen - before))
        rest = sorted({*images} - proved)
        more = {"threat": threat, "alpha": old["alpha"]}
        proofs.append(_row("smooth", "proof", images, rest, **more, **variant))
        before = fallen
    middle = old["radii"][len(old["radii"]) // 2]
    return {
        "name": "vote",
        "dataset": "images",
        "suite": "vote",
        "labels": [-1] * len(images),
        "threat": {"norm": "L2", "eps": middle, **unnamed},
        "rows": [*rows, *proofs],
        "network": {"vote": {name: old[name] for name in ("sigma", "n", "alpha")}},
    }


_FORMATS: dict[str, Callable[[_Content], _Content]] = {
    "sj_robust.robustness_report": _of_a_suite,
    "sj_robust.stress_card": _of_a_stress_test,
    "sj_robust.report": _of_a_training,
    "sj_robust.smoothed_bracket": _of_a_vote,
}


def _threat(norm: str, eps: float, old: _Content) -> _Content:
    shifts = {name: old.pop(name, None) for name in ("largest_shift", "total_shift")}
    return {"norm": norm, "eps": eps, **shifts}


def _row(member: str, kind: str, seen: Iterable[int], fell: Iterable[int], **more: Any) -> _Content:
    row = {
        "member": member,
        "kind": kind,
        "seen": list(seen),
        "fell": list(fell),
        "threat": None,
    }
    return row | more


def _counted(member: str, kind: str, seen: int, right: int, variant: str) -> _Content:
    """A row of which counts are known: the last images fell."""
    return _row(member, kind, range(seen), range(right, seen), variant=variant)
