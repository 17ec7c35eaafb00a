import io
import json
from dataclasses import fields, replace
from itertools import permutations, product

import pytest
from evaluation.reports import DEAD, finding, member, report
from rich.console import Console

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation.comparison import compare_reports
from sj_robust.evaluation.drawings import plot_robustness
from sj_robust.evaluation.intervals import paired_difference_interval, wilson_interval
from sj_robust.evaluation.progress import Position
from sj_robust.evaluation.robustness_report import RobustnessReport
from sj_robust.evaluation.terminal import Display, show_comparison, show_report


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
    with pytest.raises(KeyError, match="it has gaussian"):
        made.under("nothing")
    assert [made.within(one) for one in made.members] == [False, True, True, True, True]


def test_a_member_of_larger_radius_has_no_part_in_the_worst_case():
    far = member("pgd@0.2", (4, 5), group="", eps=0.2, outside=(4,))
    made = report(members=(*report().members, far))
    assert made.under("pgd@0.2").correct == 6
    assert made.worst_case.correct == 3  # image 5 was broken within the threat all the same
    assert "pgd@0.2" in made.remarks[-1]


def test_names_of_robustbench():
    content = json.loads(report().to_json())
    wanted = {
        "name": "dlif_at",
        "dataset": "digits",
        "architecture": "small, dlif",
        "threat": "Linf",
        "eps": "0.1",
        "clean_acc": "80.00",
        "autoattack_acc": None,
        "external": "30.00",
        "unreliable": False,
        "footnote": "",
    }
    assert {name: content[name] for name in wanted} == wanted
    assert (content["format"], content["version"]) == ("sj_robust.robustness_report", 1)
    assert json.loads(report(suite="autoattack").to_json())["autoattack_acc"] == "40.00"
    figure = next(row for row in content["figures"] if row["name"] == "worst case")
    assert (figure["accuracy"], figure["interval"]) == (0.4, list(wilson_interval(4, 10)))
    assert content["outcome"] == list(report().outcome)
    assert {field.name for field in fields(RobustnessReport)} < content.keys()
    fields_of_members = "name estimator group eps attacked fooled outside largest seconds"
    assert [*content["members"][2]] == fields_of_members.split()


def test_saved_and_loaded_is_equal(tmp_path):
    made = report(
        warnings=('a "quoted" [\n 1,\n 2\n] text',),
        configuration={
            "tau": float("inf"),
            "none": None,
            "text": "[ 1, 2 ]",
            "deep": {"list": (1, [2.5, -1e-9])},
        },
    )
    made.save(tmp_path / "report.json")
    assert RobustnessReport.load(tmp_path / "report.json") == made
    text = (tmp_path / "report.json").read_text()
    assert '"labels": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],' in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(external="99.00"), "external .* does not follow"),
        (lambda content: content["members"][1]["fooled"].pop(), "does not follow"),
        (lambda content: content["correct"].pop(), "must fool images that it attacked"),
        (lambda content: content["correct"].append(10), "from 0 to 9, got 10"),
        (lambda content: content["members"][0].pop("eps"), "missing or unknown"),
        (lambda content: content.update(eps="8/"), "eps must be"),
        (lambda content: content.update(labels=[]), "at least one image"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    content = json.loads(report().to_json())
    change(content)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        RobustnessReport.load(path)
    assert str(path) in str(error.value)


def test_a_dead_network_is_not_called_robust():
    dead = report(firing=(*report().firing, DEAD), correct=(0, 5), members=())
    alarm, guessing = dead.alarms
    assert alarm.startswith("DEAD NETWORK: 100.0% of layer net.5 (LIFNode) never fires")
    assert guessing.startswith("NOT ROBUST")
    assert dead.unreliable
    assert dead.footnote == alarm
    (alarm,) = report(firing=(DEAD,)).alarms  # a layer that others lead around
    assert alarm.startswith("DEAD LAYER: 100.0% of layer net.5 (LIFNode) never fires")
    (alarm,) = report(firing=({**DEAD, "silent": 0.0, "saturated": 1.0},)).alarms
    assert "fires in every step" in alarm
    shown = terminal(dead)
    assert shown.index("DEAD NETWORK") < shown.index("95 % interval ┃")
    assert "before reporting any." in " ".join(shown.replace("│", " ").split())  # to the end
    assert "DEAD" not in terminal(report())
    assert RobustnessReport.from_json(dead.to_json()) == dead


def test_guessing_is_not_called_robust():
    """A constant answer is right for one class of five, and no attack changes it."""
    constant = report(correct=(0, 5), members=(member("apgd_ce", attacked=(0, 5)),))
    assert constant.worst_case.accuracy == constant.clean.accuracy == 0.2
    (alarm,) = constant.alarms
    assert alarm.startswith("NOT ROBUST: clean accuracy is 20.0 %")
    skewed = report(labels=(0,) * 8 + (1, 2), members=(), correct=tuple(range(8)))
    assert "one class (80.0 %)" in skewed.alarms[0]
    assert report().alarms == ()


def test_masking_findings():
    failed = report(findings=(finding("zero_gradients", passed=False), finding("flat_loss")))
    (text,) = failed.masked
    assert text == "CHECK zero_gradients: 0.9; at most 0.5 passes. It was measured. Do something."
    counted = finding("flat_loss", passed=False) | {"count": 9, "total": 10}
    (text,) = report(findings=(counted,)).masked
    assert text.startswith(
        "CHECK flat_loss: 0.9, 9 of 10 images, 95 % 0.596 to 0.982; at most 0.5 passes."
    )
    assert failed.unreliable
    assert "CHECK zero_gradients" in terminal(failed)
    stronger = (finding("other_estimator_stronger", passed=False),)
    assert report(findings=stronger).masked == ()  # that is what the sweep is for
    assert len(report(findings=stronger, estimators=()).masked) == 1


def test_a_control_that_wins_is_named():
    weak = replace(report(), members=report().members[3:])
    assert weak.worst_case.correct == 8
    assert "The control leaves 50.0 %, less than the suite's 80.0 %" in weak.remarks[0]
    assert not any("control leaves" in text for text in report().remarks)


def terminal(made, show=show_report):
    console = Console(file=io.StringIO(), width=100, soft_wrap=True)  # as a journal's
    show(made, console)
    return console.file.getvalue()


def test_terminal_and_markdown_tables():
    shown = terminal(report())
    assert shown.startswith(
        "At most 30.0 % (95 % interval 10.8 to 60.3) of 10 images withstand Linf, eps 0.1. Tried: "
    )
    assert shown.count("30.0") == 2, "the sentence and the table"
    assert "dlif_at on digits: Linf, eps 0.1, suite fast" in shown
    row = next(line for line in shown.splitlines() if "worst case" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "worst case",
        "40.0",
        "16.8 to 68.7",
        "4/10",
        "3.0",
    ]
    lines = report().table().splitlines()
    assert "| worst case | 40.0 | 16.8 to 68.7 | 10 | 3.0 |" in lines
    assert len(lines) == 2 + 9


def test_comparison_on_the_same_images():
    first = report()
    better = report(
        name="other", members=(member("apgd_ce/atan:4/r0", (0,)), member("new", (1, 5)))
    )
    comparison = compare_reports(first, better)
    found = {row.first.name: row for row in comparison.differences}
    assert list(found) == ["clean", "apgd_ce/atan:4/r0", "worst case", "everything"]
    worst = found["worst case"]
    assert worst.value == pytest.approx(0.5 - 0.4)
    assert worst.interval == paired_difference_interval(2, 1, 10)  # 2 and 3 gained, 5 lost
    assert not worst.clear
    assert not any(note.startswith("DIFFERENT") for note in comparison.notes)
    assert any("same network" in note for note in comparison.notes)
    assert "+10.0" in terminal(comparison, show_comparison)
    assert "| worst case | 40.0 | 50.0 | +10.0 |" in comparison.table()


def in_order(names, **changes):
    """A report of a suite in some order; alone, its attacks fool 0, 1 and 1, 2 and none."""
    fools = {"a": {0, 1}, "b": {1, 2}, "c": set()}
    left, members = set(range(8)), []
    for name in names:
        fallen = sorted(left & fools[name])
        members.append(member(name, fallen, attacked=sorted(left)))
        left -= fools[name]
    return report(members=tuple(members), **changes)


def test_a_report_differs_nowhere_from_itself_in_another_order():
    orders = [in_order(names) for names in permutations("abc")]
    for first, second in product(orders, orders):
        comparison = compare_reports(first, second)
        assert [row.value for row in comparison.differences] == [0.0] * 6
        assert {row.first.name for row in comparison.differences} > {"a", "b", "c"}
    found = {row.first.name: row for row in compare_reports(orders[0], in_order("ba")).differences}
    assert (found["a"].first.correct, found["a"].first.total) == (5, 6)  # without 1 and 2
    assert found["a"].cells()[0] == "a (6 images)"


def test_attacks_that_met_no_image_in_both_reports_are_left_out_and_named():
    first, second = in_order("ab"), in_order("ba")
    met_none = report(members=(member("a", attacked=()),))
    for one, other in (
        (first, met_none),
        (first, replace(second, data="other")),  # b met other images after a
    ):
        comparison = compare_reports(one, other)
        names = [row.first.name for row in comparison.differences]
        assert not {"a", "b"}.intersection(names)
        assert any("met in both reports, and left out" in note for note in comparison.notes)
    proved = in_order("ab", verified=(5, 6, 7))
    alone = report(members=(member("b", (1, 2), attacked=range(5)),), verified=(5, 6, 7))
    found = {row.first.name: row for row in compare_reports(alone, alone).differences}
    assert (found["b"].first.correct, found["b"].first.total) == (6, 10)  # proved images stand
    assert compare_reports(proved, proved).differences[1].value == 0.0


def test_comparison_of_what_cannot_be_compared():
    other = report(
        threat=ThreatModel("L2", 0.5),
        dataset="fashion_mnist",
        suite="standard",
        data="other",
        network={},
    )
    notes = compare_reports(report(), other).notes
    assert [note.partition(":")[0] for note in notes[:4]] == [
        "DIFFERENT norm",
        "DIFFERENT eps",
        "DIFFERENT data set",
        "DIFFERENT suite",
    ]
    assert "The images differ" in notes[4]
    dead = compare_reports(
        report(), report(name="dead", firing=(DEAD,), correct=(0,), members=())
    ).notes
    assert any(note.startswith("dead: DEAD NETWORK") for note in dead)


def test_a_clear_difference_is_marked():
    many = {"labels": tuple(range(5)) * 40, "correct": tuple(range(200))}
    broken = member("apgd", range(100), attacked=range(200))
    first, second = (
        report(members=members, **many) for members in ((broken,), (member("apgd", attacked=()),))
    )
    row = next(
        row for row in compare_reports(first, second).differences if row.first.name == "worst case"
    )
    assert row.clear
    assert row.value == 0.5
    assert "+50.0 *" in compare_reports(first, second).table()


@pytest.mark.slow
def test_plots_from_the_saved_report_alone(tmp_path):
    report().save(tmp_path / "report.json")
    loaded = RobustnessReport.load(tmp_path / "report.json")
    paths = plot_robustness(loaded, tmp_path)
    names = {
        f"{name}.{ending}"
        for name in ("accuracy_over_eps", "attacks", "potential")
        for ending in ("png", "pdf")
    }
    assert {path.name for path in paths} == names
    for path in paths:
        assert path.read_bytes()[:4] == (b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
    again = tmp_path / "again"
    again.mkdir()
    plot_robustness(loaded, again)
    for path in paths:
        assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_potential_that_nothing_moves_is_drawn(tmp_path):
    still = report(
        potential=({"member": "a", "samples": 1, "layers": {"one": [0.0], "two": [0.0, 0.0]}},)
    )
    assert len(plot_robustness(still, tmp_path)) == 6


def test_progress_without_a_terminal_is_plain(monkeypatch):
    console = Console(file=io.StringIO(), width=100)
    monkeypatch.setattr("sj_robust.evaluation.terminal.PAUSE", -1.0)
    with Display(console) as display:
        display.on_step(Position(0, 4, "apgd_ce/[atan]", 3, 12, 3723.0))
    assert console.file.getvalue() == "25 % done, 1 h 2 min left, batch 1/4, apgd_ce/[atan]\n"
    bar = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Display(bar) as display:
        display.on_step(Position(0, 4, "apgd_ce", 3, 12, 83.0))
    assert "1 min 23 s left" in bar.file.getvalue()
