"""A report: every figure counted from rows by hand, its words, its file and its figures."""

import io
import json
from dataclasses import fields, replace

import pytest
from evaluation.reports import (
    DEAD,
    LINF,
    MEMBERS,
    clean,
    finding,
    member,
    over_eps,
    proof,
    report,
)
from rich.console import Console

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import Report
from sj_robust.evaluation.intervals import wilson_interval
from sj_robust.evaluation.result import Point, Row


def test_figures_counted_by_hand():
    made = report()
    counted = {figure.name: (figure.correct, figure.seconds) for figure in made.accuracies}
    assert counted == {
        "clean": (8, 0.0),
        "gaussian": (7, 1.0),
        "apgd_ce/atan:4/r0": (6, 1.0),
        "apgd_ce/atan:4/r1": (4, 2.0),
        "control/apgd_ce/r0": (6, 1.0),
        "control/apgd_ce/r1": (5, 1.0),
        "control": (5, 2.0),
        "worst case": (4, 3.0),  # without the noise, and without its time
        "everything": (3, 5.0),
    }
    assert {figure.total for figure in made.accuracies} == {10}
    assert made.outcome == (1, 1, 2, 2, -1, -1, 4, -1, -2, -2)
    assert made.standing("worst case") == {4, 5, 6, 7}
    assert made.worst_case.interval == wilson_interval(4, 10)
    assert [made.within(one) for one in made.attacks] == [False, True, True, True, True]
    for name in ("nothing", "verified"):
        with pytest.raises(KeyError, match="it has gaussian"):
            made.under(name)
    with pytest.raises(KeyError, match="no variant 'other' in this report"):
        made.under("clean", variant="other")


def test_a_member_of_larger_radius_has_no_part_in_the_worst_case():
    far = member("pgd@0.2", (4, 5), group="", eps=0.2, outside=(4,))
    made = report(members=(*MEMBERS, far))
    assert made.under("pgd@0.2").correct == 6
    assert made.worst_case.correct == 3  # image 5 was broken within the threat all the same
    assert "pgd@0.2" in made.remarks[-1]


def test_accuracy_over_eps_is_of_its_own_rows_or_of_members_with_other_radii():
    points = report(curve=over_eps()).over_eps
    assert points[0] == Point("0", "clean", 8, 10)
    wanted = [("0", 8), ("0.05", 6), ("0.1", 4), ("0.2", 0)]
    assert [(point.eps, point.correct) for point in points] == wanted
    assert points[1].attack == "apgd20, atan:4"
    levels = [member(f"pgd@{eps}", (0,), group="", eps=eps) for eps in (0.05, 0.2)]
    found = report(members=(*MEMBERS, *levels)).over_eps
    assert [(point.eps, point.attack) for point in found[1:]] == [("0.05", "pgd"), ("0.2", "pgd")]
    assert report(members=(*MEMBERS, levels[0])).over_eps == ()


def trained(name, rows, **more):
    rows = [replace(row, variant=name) for row in rows]
    return Report(name, "digits", "training", (0,) * 10, rows, threat=LINF, **more)


def test_networks_of_a_training_are_variants_that_are_merged():
    record = {"epoch": 1, "validation": {"clean": 0.5, "pgd": 0.25}}
    first = trained("dlif at", [clean(), member("pgd20", (1, 2), group="")], warnings=("a",))
    first = replace(first, curves={"dlif at": [record]})
    both = first.merged(trained("lif", [clean(range(4))], warnings=("b",)))
    assert both.variants == ("dlif at", "lif")
    assert both.warnings == ("a", "b")
    assert both.under("pgd20", variant="dlif at").accuracy == 0.6
    assert both.under("clean", variant="lif").accuracy == 0.4
    assert both.table().splitlines() == [
        "| accuracy, % | dlif at | lif |",
        "| --- | ---: | ---: |",
        "| clean | 80.0 | 40.0 |",
        "| pgd20 | 60.0 |  |",
    ]
    assert "dlif at: 80.0 % clean, 60.0 % under the strongest attack" in both.verdict
    assert Report.from_json(both.to_json()) == both
    bars, curves = both.plot().axes
    assert [bar.get_height() for bar in bars.patches] == [80.0, 60.0, 40.0]
    assert [line.get_label() for line in curves.lines] == ["dlif at, clean", "dlif at, pgd"]
    assert both.merged(both) == replace(both, warnings=("a", "b", "a", "b"))
    again = replace(first, rows=tuple(replace(row, seconds=9.0) for row in first.rows))
    assert first.merged(again).rows == first.rows


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (trained("b", [clean()], data="0123"), "got data '4567' and '0123'$"),
        (
            replace(trained("b", [clean()], data="4567"), threat=None),
            r"got threat Th.*\) and None$",
        ),
        (replace(trained("b", [clean()], data="4567"), labels=(1,) * 10), "got other labels$"),
        (
            replace(trained("b", [clean()], data="0123"), labels=(1,) * 10, threat=None),
            "same threat and images to be merged, got threat .* and None, other labels, data ",
        ),
        (trained("a", [clean(range(4))], data="4567"), "'a' in both with other rows; name one of"),
    ],
)
def test_reports_of_other_images_or_of_two_networks_of_one_name_are_not_merged(other, message):
    mine = trained("a", [clean()], data="4567")
    with pytest.raises(ValueError, match=message):
        mine.merged(other)


NOISE = member("gaussian", range(6), group="", eps=None, largest=0.0)
"""A row of a training in which no distance was measured."""
PGD = member("pgd20", (1, 2), group="", largest=0.1)
FARTHER = member("pgd20@0.3", range(7), group="", eps=0.3, largest=0.0)


@pytest.mark.parametrize(
    ("rows", "left", "verdict"),
    [
        ((NOISE, PGD), 6, "60.0 % under the strongest attack, 30.0 % proved"),
        ((FARTHER, NOISE, PGD), 6, "60.0 % under the strongest attack, 30.0 % proved"),
        ((replace(NOISE, largest=0.4, outside=range(1, 6)), PGD), 5, "60.0 % under the strongest"),
        ((replace(NOISE, largest=0.4, outside=range(1, 6)),), 7, "70.0 % under the strongest"),
        ((replace(NOISE, largest=0.4, outside=range(6)),), 8, "no attack within the threat"),
        ((NOISE,), 8, "a: 80.0 % clean, no attack within the threat, 30.0 % proved"),
        ((), 8, "a: 80.0 % clean, no attack within the threat, 30.0 % proved"),
    ],
)
def test_noise_breaks_the_images_that_were_measured_within_the_threat(rows, left, verdict):
    """Of the noise with measured images one is within the threat, 0; without, none counts."""
    proved = proof((5, 6, 7), eps=0.1)
    made = trained("a", [clean(), *rows, replace(proved, member="verified")])
    assert made.everything.correct == made.worst_case.correct == left
    assert [one.correct for one in made.bracket] == [3, left]
    assert sum(number == -1 for number in made.outcome) == left
    assert verdict in made.verdict
    assert Report.from_json(made.to_json()) == made
    for row in rows:
        assert made.under(row.member).correct == 8 - len(row.fell)


def test_without_a_threat_every_attack_counts():
    rows = [clean(), member("own", (3,), eps=None, group="")]
    assert replace(trained("a", rows), threat=None).everything.correct == 7
    assert "70.0 % under the strongest attack" in replace(trained("a", rows), threat=None).verdict


def test_a_proof_at_another_radius_is_no_end_of_the_bracket():
    made = report(rows=(*report().rows, proof((4, 5), eps=0.01)))
    assert made.verified is None
    assert made.bracket is None
    assert made.undecided == made.standing("everything")
    assert "verified" not in [one.name for one in made.accuracies]
    assert made.verdict.startswith("Robust accuracy is at most 30.0 %")
    assert "Nothing is proved at Linf 0.1: the proofs are at Linf 0.01." in made.remarks
    both = report(rows=(*made.rows, proof((4,), eps=0.1)))
    assert both.verified.correct == 1
    assert not any("Nothing is proved" in text for text in both.remarks)
    row = replace(proof((4, 5), eps=0.01), member="verified")
    training = trained("a", [clean(), PGD, row])
    assert "proved" not in training.verdict
    assert "verified" not in training.table()
    assert "verified" not in training.to_csv()
    assert [bar.get_height() for bar in training.plot().axes[0].patches] == [80.0, 60.0]


def test_a_proof_in_the_report_of_a_training_is_no_attack():
    threat = ThreatModel("Linf", 0.1)
    attack = member("pgd20", (1, 2), group="", threat=threat)
    proof = Row("verified", "proof", range(10), range(1, 10), variant="a", threat=threat)
    proved = trained("a", [clean(), attack, proof])
    wanted = "a: 80.0 % clean, 60.0 % under the strongest attack, 10.0 % proved"
    assert wanted in proved.verdict
    assert "| verified | 10.0 |" in proved.table()
    bars = proved.plot().axes[0].patches
    assert [bool(bar.get_hatch()) for bar in bars] == [False, False, True]
    wrong = replace(proof, fell=range(2, 10))
    with pytest.raises(ValueError, match="image 1 is verified at eps 0.1 and broken by 'pgd20'"):
        trained("a", [clean(), attack, wrong])


def test_a_training_has_no_page():
    with pytest.raises(ValueError, match=r"not for 'training'; use table\(\) and plot\(\)"):
        trained("a", [clean()]).page()


def test_names_of_robustbench():
    content = json.loads(report().to_json())
    wanted = {
        "name": "dlif_at",
        "dataset": "digits",
        "architecture": "small, dlif",
        "norm": "Linf",
        "eps": "0.1",
        "clean_acc": "80.00",
        "autoattack_acc": None,
        "external": "30.00",
        "unreliable": False,
        "footnote": "",
    }
    assert {name: content[name] for name in wanted} == wanted
    assert (content["format"], content["version"]) == ("sj_robust.report", 4)
    assert json.loads(report(suite="autoattack").to_json())["autoattack_acc"] == "40.00"
    figure = next(row for row in content["figures"] if row["name"] == "worst case")
    assert (figure["accuracy"], figure["interval"]) == (0.4, list(wilson_interval(4, 10)))
    assert content["outcome"] == list(report().outcome)
    assert {field.name for field in fields(Report)} < content.keys()


def test_saved_and_loaded_is_equal(tmp_path):
    odd = {
        "tau": float("inf"),
        "none": None,
        "text": "[ 1, 2 ]",
        "deep": {"list": (1, [2.5, -1e-9])},
    }
    made = report(warnings=('a "quoted" [\n 1,\n 2\n] 扰动',), configuration=odd)
    made.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == made
    text = (tmp_path / "report.json").read_text()
    assert '"labels": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],' in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(TypeError, match="plain data only, got object"):
        report(configuration={"x": object()})


def changed(change):
    content = json.loads(report().to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "must be JSON"),
        (changed(lambda content: content["rows"][0]["seen"].pop()), "must be of all 10 images"),
        ("[1]", "not a report"),
        ('{"format": "other"}', "not a report"),
        (changed(lambda content: content.update(version=9)), "version must be 4, got 9"),
        (changed(lambda content: content.update(external="99.00")), "external .* does not follow"),
        (changed(lambda content: content["rows"][2]["fell"].pop()), "does not follow"),
        (changed(lambda content: content["rows"][0]["fell"].append(1)), "must fool images that it"),
        (changed(lambda content: content["rows"][1].pop("threat")), r"unknown \('threat'\)"),
        (changed(lambda content: content["rows"][1].update(eps=1)), "missing or unknown"),
        (changed(lambda content: content.update(labels=[])), "at least one image"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Report.load(path)
    assert str(path) in str(error.value)


def test_a_dead_network_is_not_called_robust():
    dead = report(firing=(*report().firing, DEAD), right=(0, 5), members=())
    alarm, guessing = dead.alarms
    assert alarm.startswith(
        "DEAD NETWORK: 100.0% of the neurons in layer net.5 (LIFNode) never fire"
    )
    assert guessing.startswith("NOT ROBUST")
    assert dead.footnote == alarm
    assert json.loads(dead.to_json())["unreliable"]
    (alarm,) = report(firing=(DEAD,)).alarms  # a layer that others lead around
    assert alarm.startswith(
        "DEAD LAYER: 100.0% of the neurons in layer net.5 (LIFNode) never fire."
    )
    (alarm,) = report(firing=({**DEAD, "silent": 0.0, "saturated": 1.0},)).alarms
    assert "fire in every step" in alarm
    shown = terminal(dead)
    assert shown.index("DEAD NETWORK") < shown.index("95 % CI ┃")
    assert "before reporting it." in " ".join(shown.replace("│", " ").split())  # to the end
    assert "DEAD" not in terminal(report())


def test_guessing_is_not_called_robust():
    """A constant answer is right for one class of five, and no attack changes it."""
    constant = report(right=(0, 5), members=(member("apgd_ce", seen=(0, 5)),))
    assert constant.worst_case.accuracy == constant.clean.accuracy == 0.2
    (alarm,) = constant.alarms
    assert alarm.startswith("NOT ROBUST: clean accuracy is 20.0 %")
    skewed = report(labels=(0,) * 8 + (1, 2), members=())
    assert "one class (80.0 %)" in skewed.alarms[0]
    assert report().alarms == ()


def test_images_of_one_class_do_not_tell_a_guess():
    right = report(labels=(3,) * 10, right=range(10), members=())
    assert right.clean.accuracy == 1.0
    assert right.alarms == ()
    wrong = report(labels=(3,) * 10, right=(0, 1), members=())
    assert "no better than always predicting one class" in wrong.alarms[0]


def test_masking_findings():
    failed = report(findings=(finding("zero_gradients", passed=False), finding("flat_loss")))
    (text,) = failed.masked
    assert text == (
        "CHECK zero_gradients: 0.9, above the limit of 0.5. It was measured. Do something."
    )
    counted = finding("flat_loss", passed=False) | {"count": 9, "total": 10}
    (text,) = report(findings=(counted,)).masked
    assert text.startswith(
        "CHECK flat_loss: 0.9, 9 of 10 images, 95 % CI 0.596 to 0.982, above the limit of 0.5."
    )
    assert failed.footnote
    assert "CHECK zero_gradients" in terminal(failed)
    stronger = (finding("other_estimator_stronger", passed=False),)
    assert report(findings=stronger).masked == ()  # that is what the sweep is for
    assert len(report(findings=stronger, estimators=()).masked) == 1


def test_a_control_that_wins_is_named():
    weak = report(members=MEMBERS[3:])
    assert weak.worst_case.correct == 8
    assert "lower under the control (50.0 %) than under the suite (80.0 %)" in weak.remarks[0]
    assert not any("under the control" in text for text in report().remarks)


def terminal(made):
    console = Console(file=io.StringIO(), width=100, soft_wrap=True)  # as a journal's
    made.show(console)
    return console.file.getvalue()


def test_terminal_and_markdown_tables():
    shown = terminal(report())
    assert shown.startswith(
        "Robust accuracy is at most 30.0 % (95 % CI 10.8 to 60.3; 10 images, Linf 0.1). Quick "
    )
    assert shown.count("30.0") == 2, "the sentence and the table"
    assert "dlif_at on digits: Linf 0.1, suite fast" in shown
    row = next(line for line in shown.splitlines() if "worst case" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["worst case", "40.0", "16.8 to 68.7", "4/10", "3.0"]
    lines = report().table().splitlines()
    assert "| worst case | 40.0 | 16.8 to 68.7 | 10 | 3.0 |" in lines
    assert len(lines) == 2 + 9


def test_budgets_in_words():
    for threat, words in (
        (ThreatModel("L0", 1), "at most 1 event added or removed"),
        (ThreatModel("moves", 3, 1), "at most 3 events moved in time, each by at most 1 frame"),
        (ThreatModel("moves", 3, None, 9), "at most 3 events moved in time, by 9 frames in total"),
        (ThreatModel("Linf", 8 / 255), "Linf 8/255"),
        (None, "no threat model"),
    ):
        assert report(threat=threat, members=()).budget == words


@pytest.mark.slow
def test_figures_from_the_saved_report_alone(tmp_path):
    report(curve=over_eps()).save(tmp_path / "report.json")
    loaded = Report.load(tmp_path / "report.json")
    names = loaded.write(tmp_path)
    drawn = []
    for name in loaded.figures():
        drawn += [f"{name}.png", f"{name}.pdf"]
    assert list(names) == ["report.json", "report.html", *drawn]
    assert list(loaded.figures()) == ["accuracy_over_eps", "attacks", "potential"]
    again = tmp_path / "again"
    again.mkdir()
    loaded.write(again)
    for name in names:
        content = (tmp_path / name).read_bytes()
        starts = {"png": b"\x89PNG", "pdf": b"%PDF", "json": b"{", "html": b"<!DO"}
        assert content.startswith(starts[name.rpartition(".")[2]])
        assert (again / name).read_bytes() == content


@pytest.mark.slow
def test_a_potential_that_nothing_moves_is_drawn():
    still = {"member": "a", "samples": 1, "layers": {"one": [0.0], "two": [0.0, 0.0]}}
    assert list(report(potential=(still,)).figures()) == ["attacks", "potential"]
