"""Files of version 1: the same figures, from each of its four formats; and of version 2."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation.reports import LINF, clean, member, proof, report

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import Report, compare_reports
from sj_robust.evaluation.report import stored
from sj_robust.evaluation.result import Point
from sj_robust.training import modes

FOLDER = Path(__file__).with_name("version_1")
LEADERBOARD = Path(__file__).parents[2] / "docs" / "results" / "leaderboard"
CARD = """\
| fault | level | clean, % | 95 % CI | attacked, % | 95 % CI | draws |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| none |  | 91.0 | 83.8 to 95.2 | 49.0 | 39.4 to 58.7 | 1 |
| lost_spikes | 0.1 | 89.0 | 74.2 to 100.0 | 48.0 | 20.9 to 75.2 | 2 |
| lost_spikes | 0.2 | 83.0 * | 67.7 to 97.1 | 48.0 | 20.9 to 75.2 | 2 |
| weight_bits | 4 | 91.0 | 83.8 to 95.2 | 30.0 * | 21.9 to 39.6 | 1 |
"""
TRAINING = """\
| accuracy, % | dlif at | lif |
| --- | ---: | ---: |
| clean | 97.0 | 33.3 |
| pgd20 | 50.0 |  |
"""
VOTE = """\
| L2 | certified, % | under attack, % |
| --- | ---: | ---: |
| 0 | 66.7 | 83.3 |
| 0.15 | 33.3 | 50.0 |
| 0.25 | 16.7 | 16.7 |

Certified, but broken by an attack: image 3 (of 6)."""
SUITE = """\
| accuracy | % | 95 % CI | images | seconds |
| --- | ---: | ---: | ---: | ---: |
| clean | 80.0 | 49.0 to 94.3 | 10 | 0.0 |
| gaussian | 70.0 | 39.7 to 89.2 | 10 | 1.0 |
| apgd_ce/atan:4/r0 | 60.0 | 31.3 to 83.2 | 10 | 1.0 |
| apgd_ce/atan:4/r1 | 40.0 | 16.8 to 68.7 | 10 | 2.0 |
| control/apgd_ce/r0 | 60.0 | 31.3 to 83.2 | 10 | 1.0 |
| control/apgd_ce/r1 | 50.0 | 23.7 to 76.3 | 10 | 1.0 |
| control | 50.0 | 23.7 to 76.3 | 10 | 2.0 |
| worst case | 40.0 | 16.8 to 68.7 | 10 | 3.0 |
| everything | 30.0 | 10.8 to 60.3 | 10 | 5.0 |
| verified | 20.0 | 5.7 to 51.0 | 10 | 0.5 |"""
VERDICTS = {
    "report": "Robust accuracy is between 20.0 % (proved) and 30.0 % (95 % CI 10.8 to 60.3; 10 "
    "images, Linf 0.1). Quick check: 5 attacks of suite `fast`. No sign of gradient masking (2 "
    "checks).",
    "card": "100 images, APGD-CE 20 at Linf 0.2. clean: 91.0 % without faults, 5 points lower at "
    "lost_spikes 0.2, never 5 points lower under weight_bits; attacked: 49.0 % without faults, 5 "
    "points lower at weight_bits 4, never 5 points lower under lost_spikes.",
    "smoothed": "Robust accuracy of the smoothed classifier at L2 0.15 is between 33.3 % "
    "(certified) and 50.0 % (under attack); 6 images, sigma 0.25, votes of 4000 samples.",
}


@pytest.mark.parametrize(
    ("name", "table"),
    [("report", SUITE), ("card", CARD), ("training", TRAINING), ("smoothed", VOTE)],
)
def test_figures_and_words_are_as_they_were(name, table):
    found = Report.load(FOLDER / f"{name}.json")
    assert found.table().startswith(table.rstrip("\n"))
    assert VERDICTS.get(name, found.verdict) == found.verdict
    assert Report.from_json(found.to_json()) == found
    found.plot()


def test_of_a_suite_every_image_is_known_and_of_the_others_the_reader_is_told():
    found = Report.load(FOLDER / "report.json")
    assert found.attacks == report().attacks
    assert found.outcome == report().outcome
    assert found.standing("verified") == {4, 5}
    points = [(point.eps, point.correct, point.verified.correct) for point in found.over_eps]
    assert points == [("0", 8, 8), ("0.05", 6, 3), ("0.1", 4, 2), ("0.2", 0, 0)]
    assert found.over_eps[0] == Point("0", "clean", 8, 10, found.over_eps[0].verified)
    for name in ("card", "training"):
        counted = Report.load(FOLDER / f"{name}.json")
        assert counted.warnings[-1].startswith("Read from a file of version 1, which holds counts")
    vote = Report.load(FOLDER / "smoothed.json")
    assert vote.contradicted == (3,)
    training = Report.load(FOLDER / "training.json")
    assert "dlif at: 97.0 % clean, 50.0 % under the strongest attack" in training.verdict
    assert training.curves["dlif at"][0]["validation"]["pgd"] == 0.1 + 0.2
    assert training.warnings[0] == "扰动"


def test_classes_that_are_not_known_are_not_all_one_class():
    content = json.loads((FOLDER / "card.json").read_text()) | {"classes": 10}
    assert Report.from_json(json.dumps(content)).alarms == ()


def test_noise_in_a_training_of_version_1_is_no_attack_within_its_threat():
    content = json.loads((FOLDER / "training.json").read_text())
    noise = content["scores"][1] | {"attack": "gaussian", "correct": 40}
    content["scores"].insert(1, noise)
    found = Report.from_json(json.dumps(content))
    assert found.everything.correct == 50
    assert found.under("gaussian").correct == 40
    assert "dlif at: 97.0 % clean, 50.0 % under the strongest attack" in found.verdict


@pytest.mark.parametrize("version", [2, 3, 4])
def test_attacks_of_a_training_are_within_its_threat_where_none_was_stored(version):
    """As written until late in version 4: no attack has a threat, nor measured distances."""
    alone = {"group": "", "eps": None, "largest": 0.0, "variant": "a"}
    attacks = [member("gaussian", (3,), **alone), member("fgsm", (1, 2), **alone)]
    rows = [clean(variant="a"), *attacks, proof((4, 5), variant="a")]
    written = Report("a", "digits", "training", (0,) * 10, rows, threat=LINF)
    content = json.loads(written.to_json()) | {"version": version}
    found = Report.from_json(json.dumps(content))
    assert "a: 80.0 % clean, 60.0 % under the strongest attack" in found.verdict
    assert found.everything.correct == found.worst_case.correct == 6
    assert [row.threat for row in found.attacks] == [None, LINF]
    assert [one.correct for one in found.bracket] == [2, 6]
    today = replace(written, rows=found.rows)
    assert Report.from_json(today.to_json()) == today == found
    comparison = compare_reports(found, today)
    assert [row.value for row in comparison.differences] == [0.0] * len(comparison.differences)


def test_noise_is_stored_under_the_name_that_is_read_back():
    assert stored.NOISE == modes.NOISE


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("named", "suite", "warned"),
    [("standard", "gradient", False), ("fast", "fast", True), ("paper", "paper", False)],
)
def test_suites_of_before_the_search_over_spikes_are_told_apart(version, named, suite, warned):
    content = json.loads(report().to_json())
    if version == 1:
        content = json.loads((FOLDER / "report.json").read_text())
    content |= {"version": version, "suite": named, "configuration": {"suite": named}}
    found = Report.from_json(json.dumps(content))
    assert (found.suite, found.configuration["suite"]) == (suite, suite)
    assert any("had no search over spikes" in text for text in found.remarks) == warned
    assert Report.from_json(found.to_json()) == found
    today = report(suite=named)
    assert Report.from_json(today.to_json()) == today


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("suite", ["standard", "fast"])
def test_an_old_suite_may_lack_what_has_a_default(version, suite):
    content = json.loads(report().to_json())
    if version == 1:
        content = json.loads((FOLDER / "report.json").read_text())
    content |= {"version": version, "suite": suite}
    del content["warnings"], content["configuration"]
    found = Report.from_json(json.dumps(content))
    assert found.attacks == report().attacks
    assert found.configuration == {}


def test_threats_of_version_3_are_of_binary_frames():
    today = report()
    content = json.loads(today.to_json()) | {"version": 3}
    del content["threat"]["counts"]
    for row in content["rows"]:
        if row["threat"]:
            del row["threat"]["counts"]
    assert Report.from_json(json.dumps(content)) == today
    counted = report(members=(), threat=ThreatModel("L0", 2, counts=True))
    assert Report.from_json(counted.to_json()) == counted
    later = json.dumps(json.loads(counted.to_json()) | {"version": 5})
    with pytest.raises(ValueError, match="version must be 4, got 5; update sj_robust"):
        Report.from_json(later)


def test_old_and_new_reports_are_compared():
    old = Report.load(FOLDER / "report.json")
    new = report(name="other", members=(member("apgd_ce/atan:4/r0", (0,)),))
    assert compare_reports(old, new).table().splitlines()[2:] == [
        "| clean | 80.0 | 80.0 | +0.0 | -16.3 to +16.3 |",
        "| apgd_ce/atan:4/r0 | 60.0 | 70.0 | +10.0 | -14.3 to +30.9 |",
        "| worst case | 40.0 | 70.0 | +30.0 | -4.4 to +54.4 |",
        "| everything | 30.0 | 70.0 | +40.0 * | +2.1 to +64.6 |",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(external="99.00"), "external .* does not follow"),
        (lambda content: content["members"][1]["fooled"].pop(), "does not follow"),
        (lambda content: content["correct"].append(10), "from 0 to 9, got 10"),
        (lambda content: content["members"][0].pop("eps"), r"missing or unknown \('eps'\)"),
        (lambda content: content.update(eps="8/"), "eps must be"),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(tmp_path, change, message):
    content = json.loads((FOLDER / "report.json").read_text())
    change(content)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        Report.load(path)
    assert str(path) in str(error.value)


def test_reports_of_the_docs_load_with_their_figures():
    paths = sorted(LEADERBOARD.rglob("*.json"))
    assert len(paths) > 20
    first_format = 0
    for path in paths:
        content = json.loads(path.read_text())
        found = Report.load(path)
        assert f"{100 * found.everything.accuracy:.2f}" == content["external"]
        if content["version"] > 1:
            continue
        first_format += 1
        points = [point.correct for point in found.over_eps]
        assert points == [row["correct"] for row in content["over_eps"]]
        proved = [point.verified.correct for point in found.over_eps if point.verified]
        assert proved == [row["verified"] for row in content["verified_over_eps"]]
    assert first_format > 10
