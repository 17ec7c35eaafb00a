"""Two reports side by side: pairs of images, single attacks, and what cannot be compared."""

import io
from dataclasses import replace
from itertools import permutations, product

import pytest
from evaluation.reports import DEAD, LINF, clean, member, report, stress_report
from rich.console import Console

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import Report, compare_reports
from sj_robust.evaluation.intervals import paired_difference_interval
from sj_robust.evaluation.report.terminal import show_comparison, show_report


def differences(first, second):
    return {row.first.name: row for row in compare_reports(first, second).differences}


def test_on_the_same_images():
    first = report()
    members = (member("apgd_ce/atan:4/r0", (0,)), member("new", (1, 5)))
    better = report(name="other", members=members)
    comparison = compare_reports(first, better)
    found = differences(first, better)
    assert list(found) == ["clean", "apgd_ce/atan:4/r0", "worst case", "everything"]
    worst = found["worst case"]
    assert worst.value == pytest.approx(0.5 - 0.4)
    assert worst.interval == paired_difference_interval(2, 1, 10)  # 2 and 3 gained, 5 lost
    assert not worst.clear
    assert not any(note.startswith("DIFFERENT") for note in comparison.notes)
    assert any("same network" in note for note in comparison.notes)
    assert "| worst case | 40.0 | 50.0 | +10.0 |" in comparison.table()
    console = Console(file=io.StringIO(), width=100, soft_wrap=True)
    show_comparison(comparison, console)
    assert "+10.0" in console.file.getvalue()


def in_order(names, **changes):
    """A report of a suite in some order; alone, its attacks fool 0, 1 and 1, 2 and none."""
    fools = {"a": {0, 1}, "b": {1, 2}, "c": set()}
    left, members = set(range(8)), []
    for name in names:
        fallen = sorted(left & fools[name])
        members.append(member(name, fallen, seen=sorted(left)))
        left -= fools[name]
    return report(members=tuple(members), **changes)


def test_a_report_differs_nowhere_from_itself_in_another_order():
    orders = [in_order(names) for names in permutations("abc")]
    for first, second in product(orders, orders):
        found = differences(first, second)
        assert [row.value for row in found.values()] == [0.0] * 6
        assert found.keys() > {"a", "b", "c"}
    found = differences(orders[0], in_order("ba"))
    assert (found["a"].first.correct, found["a"].first.total) == (5, 6)  # without 1 and 2
    assert found["a"].cells()[0] == "a (6 images)"


def test_attacks_that_met_no_image_in_both_reports_are_left_out_and_named():
    first, second = in_order("ab"), in_order("ba")
    met_none = report(members=(member("a", seen=()),))
    for one, other in (
        (first, met_none),
        (first, replace(second, data="other")),  # b met other images after a
    ):
        comparison = compare_reports(one, other)
        names = [row.first.name for row in comparison.differences]
        assert not {"a", "b"}.intersection(names)
        assert any("no image was attacked in both" in note for note in comparison.notes)
    proved = in_order("ab", verified=(5, 6, 7))
    alone = report(members=(member("b", (1, 2), seen=range(5)),), verified=(5, 6, 7))
    row = differences(alone, alone)["b"]
    assert (row.first.correct, row.first.total) == (6, 10)  # proved images stand
    assert differences(proved, proved)["a"].value == 0.0


def test_what_cannot_be_compared_is_said():
    other = report(
        threat=ThreatModel("L2", 0.5),
        members=(),
        dataset="fashion_mnist",
        suite="standard",
        data="other",
        network={},
    )
    notes = compare_reports(report(), other).notes
    wanted = ["DIFFERENT norm", "DIFFERENT eps", "DIFFERENT data set", "DIFFERENT suite"]
    assert [note.partition(":")[0] for note in notes[:4]] == wanted
    assert "The images differ" in notes[4]
    dead = report(name="dead", firing=(DEAD,), right=(0,), members=())
    notes = compare_reports(report(), dead).notes
    assert any(note.startswith("dead: DEAD NETWORK") for note in notes)


def test_a_suite_that_has_got_a_search_over_spikes_is_another_one():
    search = member("spike_search/training/r0", (4,))
    notes = compare_reports(report(), report(members=(search,))).notes
    assert "DIFFERENT search over spikes: no and yes; the attacks differ." in notes
    assert not [note for note in compare_reports(report(), report()).notes if "DIFF" in note]


def test_images_are_paired_only_if_they_are_known_to_be_the_same():
    def compared(first, **changes):
        return compare_reports(first, replace(first, **changes)).notes

    by_hand = replace(report(), data="")
    differ = "The images differ (10 and 10)"
    assert not any(differ in text for text in compared(by_hand))
    assert any(differ in text for text in compared(by_hand, dataset="cifar10"))


def test_votes_of_other_draws_are_named():
    vote = {"sigma": 0.5, "n": 100, "alpha": 0.001}
    first = replace(report(), suite="vote", network={"vote": vote})
    fewer = replace(first, network={"vote": vote | {"n": 40}})
    said = "DIFFERENT n of the vote: 100 and 40; other certificates."
    assert said in compare_reports(first, fewer).notes
    assert said not in compare_reports(first, first).notes


@pytest.mark.parametrize("name", ["net[/v2]", "net[v2]"])
def test_brackets_in_names_are_text_on_a_terminal(name):
    console = Console(file=io.StringIO(), width=200)
    one = report(name=name, dataset=name, members=(member(name),))
    show_report(one, console)
    show_comparison(compare_reports(one, one), console)
    assert console.file.getvalue().count(name) >= 5


def test_a_clear_difference_is_marked():
    broken = member("apgd", range(100), seen=range(200))
    made = [
        report(members=members, right=range(200), total=200)
        for members in ((broken,), (member("apgd", seen=()),))
    ]
    row = differences(*made)["worst case"]
    assert row.clear
    assert row.value == 0.5
    assert "+50.0 *" in compare_reports(*made).table()


MOVES = ThreatModel("moves", 3, largest_shift=1)


@pytest.mark.parametrize(
    ("threats", "notes"),
    [
        ((MOVES, replace(MOVES, largest_shift=2)), ["largest shift: 1 and 2"]),
        ((MOVES, replace(MOVES, total_shift=5)), ["total shift: none and 5"]),
        ((MOVES, replace(MOVES, counts=True)), ["counts: no and yes"]),
        ((MOVES, replace(MOVES, eps=4, counts=True)), ["eps: 3 and 4", "counts: no and yes"]),
        ((None, ThreatModel("Linf", 0.1)), ["norm: none and Linf", "eps: none and 0.1"]),
        ((MOVES, MOVES), []),
    ],
)
def test_threats_are_compared_as_a_whole(threats, notes):
    first, second = (report(members=(), threat=threat) for threat in threats)
    found = compare_reports(first, second).notes
    harm = "; robust accuracies are not comparable."
    assert [note for note in found if note.endswith(harm)] == [
        f"DIFFERENT {note}{harm}" for note in notes
    ]


def test_other_numbers_of_draws_are_named():
    notes = compare_reports(report(), report(draws=10)).notes
    assert "DIFFERENT draws: 1 and 10; other images count as broken." in notes


def training(*networks, **more):
    """A report of a training: by network, its images that are right and those that PGD breaks."""
    rows = []
    for name, right, fell in networks:
        rows += [clean(right, variant=name), pgd(name, right, fell)]
    return Report(networks[0][0], "digits", "training", (0,) * 10, rows, threat=LINF, **more)


def pgd(name, right, fell):
    return member("pgd20", fell, seen=right, group="", variant=name)


BEFORE = ("before", range(8), range(8))


def test_every_network_that_two_trainings_have_is_compared():
    first = training(BEFORE, ("after", range(8), (0, 1)))
    second = training(BEFORE, ("after", range(8), (0,)))
    found = differences(first, second)
    names = ["clean", "pgd20"]
    assert list(found) == [f"{name}: {one}" for name in ("before", "after") for one in names]
    assert [row.value for row in found.values()] == pytest.approx([0.0] * 3 + [0.1])
    after = found["after: pgd20"]
    assert (after.first.correct, after.second.correct) == (6, 7)
    assert after.interval == paired_difference_interval(1, 0, 10)
    assert not any("Omitted" in note for note in compare_reports(first, second).notes)


A, B, C = ("a", range(8), (0,)), ("b", range(8), (1, 2)), ("c", range(6), (3,))
FIRST, SECOND = "which only the first report has.", "which only the second report has."


@pytest.mark.parametrize(
    ("networks", "compared", "omitted"),
    [
        (((A, C), (B, C)), ["a and b", "c"], []),
        (((A,), (B,)), [""], []),
        (((A, B), (B, A)), ["a", "b"], []),
        (((A, B), (A, C)), ["a"], [f"network b, {FIRST}", f"network c, {SECOND}"]),
        (((A, B, C), (B,)), ["b"], [f"networks a, c, {FIRST}"]),
    ],
)
def test_networks_of_other_names_are_compared_or_named(networks, compared, omitted):
    comparison = compare_reports(*(training(*own) for own in networks))
    names = [row.first.name.rpartition(": ")[0] for row in comparison.differences]
    assert list(dict.fromkeys(names)) == compared
    found = [note for note in comparison.notes if note.startswith("Omitted: network")]
    assert found == [f"Omitted: {text}" for text in omitted]


def test_a_suite_is_compared_with_the_first_network_of_a_training():
    suite = report(members=(pgd("", range(8), (0, 1)),))
    comparison = compare_reports(suite, training(BEFORE, ("after", range(8), (0,))))
    names = [row.first.name for row in comparison.differences]
    assert names == ["before: clean", "before: pgd20"]
    assert f"Omitted: network after, {SECOND}" in comparison.notes


@pytest.mark.parametrize("suite", ["stress", "corruptions"])
def test_of_two_stress_tests_the_networks_without_faults_are_compared(suite):
    first = stress_report(suite)
    rows = [row for row in first.rows if row.variant == "none"]
    for second in (first, replace(first, draws=5), replace(first, rows=tuple(rows))):
        comparison = compare_reports(first, second)
        found = {row.first.name: row.first.correct for row in comparison.differences}
        assert found == {"clean": 91, "short": 49}
        assert comparison.notes == (
            "Levels of faults or corruptions are not compared; the table of each report has them.",
        )


def test_a_stress_test_is_compared_with_a_suite():
    suite = report(members=(member("short", (0,)),), total=100, draws=3)
    comparison = compare_reports(stress_report(), suite)
    names = [row.first.name for row in comparison.differences]
    assert names == ["clean", "short"]
    assert not any("draws" in note or "does not have" in note for note in comparison.notes)
