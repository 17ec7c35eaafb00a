"""Tables, contrasts and figure of a sweep from records that were made up."""

import csv
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from lab.sweeping import plot
from lab.sweeping.plot import plot_effect
from lab.sweeping.published_accuracies import PUBLISHED, published_accuracy
from lab.sweeping.record import RunRecord
from lab.sweeping.report import contrast_table, results_csv, results_tables, write_report
from lab.sweeping.summary import Statistic, axes_in, cells_of, columns_of, contrasts
from rich.console import Console
from scipy import stats

from sj_robust.core.environment import CODE_KEY

GRID = {"mode": ["none", "at"], "rho": [0, 1]}
KNOWN = {
    "dataset": "cifar10",
    "model": "vgg11",
    "neuron": "dlif",
    "mode": "at",
    "rho": 1.0,
    "norm": "l2",
    "indicator": "mppd",
}
WITHOUT_EFFECT = {
    "none": {"rho", "norm", "indicator"},
    0.0: {"norm", "indicator"},
}


def record(pgd, suites=(), **options):
    """A run with so many of 100 images right under PGD-20, as ``load_records`` gives it."""
    everything = KNOWN | {"seed": 0} | options
    idle = set()
    for name in ("mode", "rho"):
        idle |= WITHOUT_EFFECT.get(everything[name], set())
    result = {
        "figures": {},
        "alarm": "",
        "options": {},
    }
    for name in ("clean", "pgd10", "pgd10/last", "pgd10@10/255", "control", "everything"):
        result["figures"][name] = {"correct": pgd, "total": 200}
    return RunRecord(
        name=str(options),
        options={name: value for name, value in everything.items() if name not in idle},
        training={
            "clean": {"correct": 9, "total": 10},
            "pgd20": {"correct": pgd, "total": 100},
        },
        evaluations=dict.fromkeys(suites, result),
    )


@pytest.fixture
def records():
    """All runs of a grid but some, as a sweep that was stopped leaves them."""
    rng = random.Random(0)
    settings = [
        {"mode": "none", "rho": 0.0},
        {"mode": "at", "rho": 0.0},
        {"mode": "at", "rho": 1.0},
        {"mode": "at", "rho": 1.0, "norm": "l1"},
        {"mode": "rat", "rho": 0.0},
        {"mode": "rat", "rho": 1.0},
        {"mode": "rat", "rho": 10.0},
    ]
    found = []
    for setting, seed, neuron in product(settings, range(5), ("lif", "dlif")):
        if rng.random() < 0.8:
            pgd = rng.randrange(20, 90)
            found.append(record(pgd, seed=seed, neuron=neuron, **setting))
    rng.shuffle(found)
    return found


def shares(records, **options):
    """Share under PGD-20 by seed, of the runs with these options; null for one without effect."""
    found = {}
    for one in records:
        if all(one.options.get(name) == value for name, value in options.items()):
            assert one.seed not in found
            found[one.seed] = one.training["pgd20"]["correct"] / 100
    return found


def test_means_and_spreads_are_those_of_an_independent_computation(records):
    axes = axes_in(records, GRID)
    assert axes.keys() == {"mode", "rho", "norm", "neuron"}
    text = results_csv(cells_of(records, axes), axes, ["pgd20"])
    rows = list(csv.DictReader(text.splitlines()))
    assert sum(int(row["seeds"]) for row in rows) == len(records)
    for row in rows:
        options = {name: row[name] or None for name in axes}
        if row["rho"]:
            options["rho"] = float(row["rho"])
        found = list(shares(records, **options).values())
        assert float(row["mean"]) == pytest.approx(np.mean(found))
        assert int(row["seeds"]) == len(found)
        if len(found) > 1:
            assert float(row["standard_deviation"]) == pytest.approx(np.std(found, ddof=1))
        else:
            assert row["standard_deviation"] == ""


def test_differences_are_of_pairs_and_those_of_an_independent_computation(records):
    axes = axes_in(records, GRID)
    rows = contrasts(cells_of(records, axes), axes, "rho", ["pgd20"])
    found = set()
    for row in rows:
        found.add((row["mode"], row["norm"], row["second"]))
        assert row["first"] == "0"
        rest = {"mode": row["mode"], "neuron": row["neuron"]}
        before = shares(records, **rest, rho=0.0)
        after = shares(records, **rest, rho=float(row["second"]), norm=row["norm"])
        pairs = sorted(before.keys() & after.keys())
        one = [before[seed] for seed in pairs]
        other = [after[seed] for seed in pairs]
        assert row["pairs"] == len(pairs)
        assert row["difference"] == pytest.approx(np.mean(other) - np.mean(one))
        if len(pairs) > 1:
            interval = stats.ttest_rel(other, one).confidence_interval(0.95)
            assert (row["low"], row["high"]) == pytest.approx(tuple(interval))
    wanted = {("at", "l2", "1"), ("at", "l1", "1"), ("rat", "l2", "1"), ("rat", "l2", "10")}
    assert found == wanted


def test_an_option_without_effect_need_not_be_the_same_and_two_change_together():
    runs = []
    for seed in (0, 1):
        runs.append(record(5 + seed, mode="none", seed=seed))
        runs.append(record(40 + 5 * seed, seed=seed))
        runs.append(record(42 + 5 * seed, seed=seed, norm="l1", rho=3.0))
    axes = axes_in(runs, {"mode": ["none", "at"], "norm": ["l2", "l1"], "rho": [1, 3]})
    cells = cells_of(runs, axes)
    rows = contrasts(cells, axes, "mode", ["pgd20"])
    found = [(row["norm"], row["rho"]) for row in rows]
    assert found == [("l2", 1.0), ("l1", 3.0)]
    (row,) = contrasts(cells, axes, "norm, rho", ["pgd20"])
    assert (row["first"], row["second"]) == ("l2 1", "l1 3")
    assert row["difference"] == pytest.approx(0.02)
    assert contrasts(cells, axes, "norm", ["pgd20"]) == []  # rho differs too
    with pytest.raises(ValueError, match=r"in which runs differ \(mode, norm, rho\), got 'neuron'"):
        contrasts(cells, axes, "neuron", ["pgd20"])


def test_tables():
    runs = [record(5, mode="none"), record(7, mode="none", seed=1)]
    for seed, (before, after) in enumerate([(44, 50), (48, 60), (61, 70)]):
        runs.append(record(before, rho=0.0, seed=seed))
        runs.append(record(after, rho=1.0, seed=seed))
    axes = axes_in(runs, GRID)
    rows = contrasts(cells_of(runs, axes), axes, "rho", ["pgd20"])
    text = contrast_table(rows, "rho", ["mode"])
    assert "| at | 0 → 1 | pgd20 | +9.00 * | 1.73 | +1.55 to +16.45 | 3 |" in text
    runs.append(record(80, ["paper"], seed=3))
    report, paper = results_tables(cells_of(runs, axes), axes, columns_of(runs))
    assert "| mode | rho | seeds | clean | pgd20 |\n| --- | --- | ---: | ---: | ---: |" in report
    assert "| none | – | 2 | 90.0 ± 0.0 | 6.0 ± 1.4 |\n| at | 0 | 3 | " in report
    assert "| mode | rho | seeds | clean | pgd10/last | control | everything |" in paper
    assert paper.count("\n| at |") == 1
    assert "| 40.0 [37.55] |" in paper
    assert "Ding et al. (ICML 2024)" in paper


def test_a_mean_over_fewer_seeds_is_marked():
    suites = [["paper"], [], []]
    runs = [record(50 + n, suites[n], seed=n, model="without published figures") for n in range(3)]
    axes = axes_in(runs, GRID)
    report, paper = results_tables(cells_of(runs, axes), axes, columns_of(runs))
    assert "| at | 1 | 3 | 90.0 ± 0.0 |" in report
    assert "| at | 1 | 1 | 25.0 " in paper
    training = {"clean": {"correct": 9, "total": 10}}
    runs[2] = replace(runs[2], training=training)  # an earlier version's, without PGD
    (report, _) = results_tables(cells_of(runs, axes), axes, columns_of(runs))
    assert "| at | 1 | 3 | 90.0 ± 0.0 | 50.5 ± 0.7 (n = 2)" in report
    assert "n is the number of seeds where it is smaller" in report


def test_runs_of_one_cell_with_other_code_or_releases_are_named(tmp_path):
    def written(*trained_in):
        runs = [
            replace(record(50, seed=seed), name=f"seed{seed}", trained_in=where)
            for seed, where in enumerate(trained_in)
        ]
        write_report(tmp_path, runs, Console(quiet=True))
        return (tmp_path / "results.md").read_text().partition("**Not to be relied on**")[2]

    first = {"torch": "2.8", "commit": "a", f"{CODE_KEY} 3.12": "1"}
    assert written(first, first | {"commit": "b"}, {}) == ""
    assert written(first, {"torch": "2.8", f"{CODE_KEY} 3.13": "2"}) == ""
    other_code = written(first, first | {f"{CODE_KEY} 3.12": "2"})
    assert "- seed0, seed1: the code of the network changed" in other_code
    other_release = written(first, first | {"torch": "2.9"})
    assert "- seed0, seed1: trained with torch 2.8 and 2.9, in one cell" in other_release


def test_one_seed_has_no_spread():
    single = Statistic([0.5])
    assert single.mean == 0.5
    assert {single.spread, single.error, single.low, single.high} == {None}


def test_axes_and_columns():
    runs = [record(5, T=8), record(5, ["paper", "fast"], T=16)]
    assert axes_in(runs) == {"T": [8, 16]}
    found = axes_in(runs, {"T": [16, 8], "mode": ["at"]})
    assert found == {"T": [16, 8], "mode": ["at"]}
    assert columns_of(runs[:1]) == ["clean", "pgd20"]
    paper = ["paper/clean", "paper/pgd10/last", "paper/control", "paper/everything"]
    fast = ["fast/clean", "fast/control", "fast/everything"]
    assert columns_of(runs) == ["clean", "pgd20", *paper, *fast]
    few = [name for name in (*paper, *fast) if "control" not in name]
    assert columns_of(runs, few=True) == few
    assert columns_of(runs, ["fast/ev*", "pgd*"]) == ["fast/everything", "pgd20"]


@pytest.mark.parametrize(
    ("setting", "column", "percent"),
    [
        ({}, "paper/pgd10/last", 37.55),
        ({"rho": None}, "paper/pgd10/last", 37.55),
        ({"rho": 0.0}, "paper/pgd10/last", 29.06),
        ({"mode": "none", "neuron": "lif"}, "paper/pgd7/last", 0.03),
        ({"model": "vgg5", "indicator": "std"}, "paper/pgd7/last", 26.82),
        ({"norm": "l1", "rho": 3.0}, "autoattack/worst case", 23.04),
        ({}, "paper/pgd10", None),
        ({"norm": "l1"}, "paper/pgd10/last", None),
        ({"dataset": "cifar100"}, "paper/pgd10/last", None),
        ({"mode": "pgd_at"}, "paper/pgd10/last", None),
    ],
)
def test_published_accuracies(setting, column, percent):
    found = published_accuracy(KNOWN | setting, column)
    assert (found and found.percent) == percent


def test_every_published_accuracy_is_there_once():
    for known in PUBLISHED:
        assert known.source
    keys = {(str(known.options), known.column, known.source) for known in PUBLISHED}
    assert len(keys) == len(PUBLISHED) == 29


def test_the_figure_tells_lines_and_values_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, *where: drawn.append(figure) or where)
    runs = []
    for seed in (0, 1):
        runs.append(record(5, mode="none", seed=seed))
        for mode in ("at", "rat"):
            runs.append(record(50, mode=mode, rho=0.0, seed=seed))
            for rho, norm in product((0.3, 10.0), ("l1", "l2")):
                runs.append(record(50, mode=mode, rho=rho, norm=norm, seed=seed))
    axes = axes_in(runs)
    cells = cells_of(runs, axes)
    plot_effect(cells, axes, "rho", ["clean", "pgd20"], tmp_path / "effect-rho")
    (figure,) = drawn
    assert figure.get_figwidth() == 6.75
    found = [panel.get_title(loc="left") for panel in figure.axes]
    assert found == ["at", "rat", "", ""]
    found = [panel.get_ylabel() for panel in figure.axes]
    assert found == ["clean, %", "", "pgd20, %", ""]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"l1", "l2", "none"}
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert not box.overlaps(figure.axes[2].xaxis.label.get_window_extent())
    # equal steps, and rho 0, where the norm changes nothing, at the start of both lines
    for panel in figure.axes:
        found = [label.get_text() for label in panel.get_xticklabels()]
        assert found == ["0", "0.3", "10"]
        for container in panel.containers:
            assert container.lines[0].get_xdata() == pytest.approx([0, 1, 2], abs=0.2)
    level = next(one for one in figure.axes[2].containers if one.get_label() == "none")
    assert level.lines[0].get_ydata() == pytest.approx([5, 5, 5])
    for name in ("mode", "tau"):  # of words, and of nothing that differs
        assert plot_effect(cells, axes, name, ["clean"], tmp_path / "effect") == ()
