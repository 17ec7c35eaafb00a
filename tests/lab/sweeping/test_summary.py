import csv
import math

import pytest
from lab.sweeping import plot
from lab.sweeping.plot import plot_effect
from lab.sweeping.published_accuracies import PUBLISHED, published_accuracy
from lab.sweeping.record import RunRecord
from lab.sweeping.summary import Statistic, axes_in, cells_of, columns_of, contrasts
from lab.sweeping.tables import contrast_csv, contrast_table, results_csv, results_tables

GRID = {"mode": ["none", "at"], "rho": [0, 1]}
PAPER = [
    "clean",
    "gaussian",
    "pgd10",
    "pgd10/last",
    "apgd_ce",
    "pgd10@10/255",
    "control/pgd10",
    "control",
    "everything",
    "verified",
]
KNOWN = {
    "dataset": "cifar10",
    "model": "vgg11",
    "neuron": "dlif",
    "mode": "at",
    "rho": 1.0,
    "norm": "l2",
}
KNOWN |= {"indicator": "mppd"}


def record(mode, rho, seed, pgd, suites=(), **options):
    everything = KNOWN | {"mode": mode, "rho": rho, "seed": seed} | options
    if mode == "none" or rho == 0:  # load_records leaves out what has no effect
        for name in ("norm", "indicator", *(["rho"] if mode == "none" else [])):
            del everything[name]
    figures = {"clean": {"correct": 9, "total": 10}, "pgd20": {"correct": pgd, "total": 100}}
    evaluations = {
        suite: {
            "figures": {name: {"correct": pgd, "total": 200} for name in PAPER},
            "alarm": "",
            "options": {},
        }
        for suite in suites
    }
    return RunRecord(f"{mode}-{rho}-{seed}", everything, figures, evaluations)


@pytest.fixture
def records():
    return [
        record("at", 1.0, 0, 50),
        record("at", 1.0, 1, 60),
        record("at", 1.0, 2, 70),
        record("at", 0.0, 2, 61),
        record("at", 0.0, 0, 44),
        record("at", 0.0, 1, 48),
        record("none", 0.0, 0, 5),
        record("none", 0.0, 1, 7),
    ]


@pytest.fixture
def axes(records):
    return axes_in(records, GRID)


@pytest.fixture
def cells(records, axes):
    return cells_of(records, axes)


def test_mean_and_spread_by_hand(axes, cells):
    assert axes == {"mode": ["none", "at"], "rho": [0.0, 1.0]}
    assert [cell.values for cell in cells] == [
        {"mode": "none"},
        {"mode": "at", "rho": 0.0},
        {"mode": "at", "rho": 1.0},
    ]
    assert [record.seed for record in cells[1].records] == [0, 1, 2]
    found = cells[2].statistic("pgd20")
    error = 0.1 / math.sqrt(3)
    assert (found.count, found.mean, found.spread, found.error) == pytest.approx(
        (3, 0.6, 0.1, error)
    )
    assert found.interval == pytest.approx(
        (0.6 - 4.302653 * error, 0.6 + 4.302653 * error)
    )  # Student's t
    assert cells[0].statistic("paper/pgd10") is None
    single = Statistic((0.5,))
    assert (single.spread, single.error, single.interval) == (None, None, None)


def test_differences_are_of_the_same_seed(records, axes, cells):
    (row,) = rows = contrasts(cells, axes, "rho", ["pgd20"])
    assert (row.first, row.second, row.values) == ({"rho": 0.0}, {"rho": 1.0}, {"mode": "at"})
    assert row.difference.values == pytest.approx((0.06, 0.12, 0.09))
    assert row.clear
    assert not contrasts(
        cells_of(records[:3], axes), axes, "rho", ["pgd20"]
    )  # nothing to compare with
    table = contrast_table(rows, axes, "rho")
    assert table.rows == (("at", "0 → 1", "pgd20", "+9.00 *", "1.73", "+1.55 to +16.45", "3"),)
    (line,) = csv.DictReader(contrast_csv(rows, axes, "rho").splitlines())
    assert float(line["difference"]) == pytest.approx(0.09)
    assert float(line["standard_error"]) == pytest.approx(0.03 / math.sqrt(3))
    assert float(line["low"]) == pytest.approx(0.0155, abs=1e-4)


def test_an_option_without_effect_need_not_be_the_same(axes, cells):
    rows = contrasts(cells, axes, "mode", ["pgd20"])
    assert [(row.values, row.difference.count) for row in rows] == [
        ({"rho": 0.0}, 2),
        ({"rho": 1.0}, 2),
    ]
    assert rows[0].difference.values == pytest.approx((0.39, 0.41))


def test_two_options_together():
    settings = [(seed, norm, rho) for seed in (0, 1) for norm, rho in (("l2", 1.0), ("l1", 3.0))]
    runs = [
        record("at", rho, seed, 40 + 5 * seed + int(rho), norm=norm) for seed, norm, rho in settings
    ]
    axes = axes_in(runs, {"norm": ["l2", "l1"], "rho": [1, 3]})
    (row,) = contrasts(cells_of(runs, axes), axes, "norm, rho", ["pgd20"])
    assert row.second == {"norm": "l1", "rho": 3.0}
    assert row.difference.values == pytest.approx((0.02, 0.02))
    assert not contrasts(cells_of(runs, axes), axes, "norm", ["pgd20"])  # rho differs too
    with pytest.raises(ValueError, match=r"in which runs differ \(norm, rho\), got 'neuron'"):
        contrasts(cells_of(runs, axes), axes, "neuron", ["pgd20"])


def test_axes_without_a_grid_hold_what_differs_and_matters(records):
    assert list(axes_in(records)) == ["mode", "rho"]
    assert axes_in(records[:2], {"mode": ["at"]}) == {"mode": ["at"]}
    assert axes_in([record("at", 1.0, 0, 5, T=8), record("at", 1.0, 0, 5, T=16)])["T"] == [8, 16]


def test_columns(records):
    runs = [*records, record("at", 1.0, 3, 50, ["paper", "standard"])]
    assert columns_of(records) == ["clean", "pgd20"]
    paper = [
        "paper/clean",
        "paper/gaussian",
        "paper/pgd10/last",
        "paper/apgd_ce",
        "paper/control",
        "paper/everything",
    ]
    paper.append("paper/verified")
    standard = ["standard/clean", "standard/control", "standard/everything", "standard/verified"]
    assert columns_of(runs) == ["clean", "pgd20", *paper, *standard]
    assert columns_of(runs, few=True) == [
        name for name in (*paper, *standard) if "control" not in name
    ]
    assert columns_of(runs, ["standard/ev*", "pgd*"]) == ["standard/everything", "pgd20"]


def test_tables(records):
    runs = [*records, record("at", 1.0, 3, 80, ["paper"])]
    axes = axes_in(runs, GRID)
    cells = cells_of(runs, axes)
    report, paper = results_tables(cells, axes, columns_of(runs))
    assert report.heads == ("mode", "rho", "seeds", "clean", "pgd20")
    assert report.rows[0] == ("none", "–", "2", "90.0 ± 0.0", "6.0 ± 1.4")
    assert report.rows[1][:3] == ("at", "0", "3")
    assert len(paper.rows) == 1
    assert dict(zip(paper.heads, paper.rows[0], strict=True))["pgd10/last"] == "40.0 [37.55]"
    assert "Ding et al. (ICML 2024)" in paper.note
    text = report.markdown()
    assert "| mode | rho | seeds | clean | pgd20 |\n| --- | --- | ---: | ---: | ---: |" in text


def test_csv_holds_shares(axes, cells):
    rows = list(csv.DictReader(results_csv(cells, axes, ["pgd20"]).splitlines()))
    assert [row["rho"] for row in rows] == ["", "0.0", "1.0"]
    assert [float(row["mean"]) for row in rows] == pytest.approx([0.06, 0.51, 0.6])
    assert float(rows[2]["standard_deviation"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("setting", "column", "percent"),
    [
        ({}, "paper/pgd10/last", 37.55),
        ({"rho": None}, "paper/pgd10/last", 37.55),
        ({"rho": 0.0}, "paper/pgd10/last", 29.06),
        ({"rho": 0}, "paper/apgd_dlr", 29.88),
        ({"mode": "none", "rho": 0.3}, "paper/pgd7/last", 0.09),
        ({"mode": "none", "neuron": "lif"}, "paper/pgd7/last", 0.03),
        ({"mode": "rat", "model": "wrn16_4"}, "paper/pgd7/last", 56.71),
        ({"model": "vgg5", "indicator": "std"}, "paper/pgd7/last", 26.82),
        ({"norm": "l1", "rho": 3.0}, "autoattack/worst case", 23.04),
        ({}, "paper/pgd10", None),
        ({"norm": "l1"}, "paper/pgd10/last", None),
        ({"neuron": "lif"}, "paper/pgd10/last", None),
        ({"dataset": "cifar100"}, "paper/pgd10/last", None),
        ({"rho": 0.5}, "paper/pgd10/last", None),
        ({"mode": "pgd_at"}, "paper/pgd10/last", None),
    ],
)
def test_published_accuracies(setting, column, percent):
    found = published_accuracy(KNOWN | setting, column)
    assert (found and found.percent) == percent


def test_every_published_accuracy_says_who_published_it():
    assert all(known.source and 0 <= known.percent <= 100 for known in PUBLISHED)
    keys = [(str(known.options), known.column, known.source) for known in PUBLISHED]
    assert len(set(keys)) == len(keys)


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are drawn, which no file keeps."""
    figures = []
    monkeypatch.setattr(
        plot, "save", lambda figure, folder, name: figures.append(figure) or (folder, folder)
    )
    return figures


def test_the_figure_tells_lines_and_values_apart(records, tmp_path, drawn):
    settings = [
        (rho, seed, norm) for rho in (0.3, 10.0) for seed in (0, 1) for norm in ("l1", "l2")
    ]
    more = [record("at", rho, seed, 50, ["paper"], norm=norm) for rho, seed, norm in settings]
    runs = [one for one in [*records, *more] if one.options.get("rho") != 1.0]
    axes = axes_in(runs)
    columns = ["clean", "paper/pgd10/last", "paper/pgd10@10/255", "paper/everything"]
    plot_effect(cells_of(runs, axes), axes, "rho", columns, tmp_path / "effect-rho")
    (figure,) = drawn
    assert figure.get_figwidth() == 6.75
    panel = figure.axes[0]
    assert [axis.get_title(loc="left") for axis in figure.axes[:4]] == [
        "clean (training)",
        "PGD-10, last iterate (paper)",
        "PGD-10, eps 10/255 (paper)",
        "worst of all (paper)",
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "undefended",
        "AT, l1",
        "AT, l2",
    ]
    # equal steps, and rho 0, where the norm changes nothing, at the start of both lines
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "0.3", "10"]
    assert [len(container.lines[0].get_xdata()) for container in panel.containers] == [3, 3]
    assert panel.containers[0].lines[0].get_xdata() == pytest.approx([0, 1, 2], abs=0.2)
    one = [record("at", rho, 0, 50) for rho in (0.0, 1.0)]
    plot_effect(
        cells_of(one, axes_in(one)), axes_in(one), "rho", ["pgd20"], tmp_path / "effect-rho"
    )
    assert drawn[1].legends == []
    for name in ("mode", "tau"):  # of words, and of nothing that differs
        assert plot_effect(cells_of(runs, axes), axes, name, ["clean"], tmp_path / "effect") == ()


def test_more_lines_than_colours_go_into_a_column_per_mode(tmp_path, drawn):
    runs = [
        record(mode, rho, 0, 50, neuron=neuron, norm=norm)
        for neuron in ("lif", "dlif")
        for mode in ("gaussian", "at")
        for norm in ("l1", "l2")
        for rho in (0.3, 1.0)
    ]
    runs += [record("none", 0.0, 0, 5, neuron=neuron) for neuron in ("lif", "dlif")]
    plot_effect(
        cells_of(runs, axes_in(runs)),
        axes_in(runs),
        "rho",
        ["clean", "pgd20"],
        tmp_path / "effect-rho",
    )
    (figure,) = drawn
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["AT", "Gaussian", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["clean, %", "", "PGD-20, %", ""]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(labels) == {
        "LIF, undefended",
        "DLIF, undefended",
        "LIF, l1",
        "LIF, l2",
        "DLIF, l1",
        "DLIF, l2",
    }
    looks = {
        one.get_label().partition(",")[0]: one.lines[0].get_color()
        for one in figure.axes[1].containers
    }
    assert len(figure.axes[1].containers) == 4
    assert len(set(looks.values())) == 2, "a colour per neuron"
