"""The page of the defences follows from what a sweep leaves."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from evaluation.reports import member, report
from scipy.stats import spearmanr

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import make_suite

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SWEEP = {
    "options": {"dataset": "image_folder:data/pictures"},
    "cells": {"undefended": {}, "at": {}, "tgo": {}, "tgo_at": {}, "unfinished": {}},
    "evaluations": {
        "paper_8": {"suite": "paper", "eps": "8/255"},
        "standard_8": {"suite": "standard", "eps": "8/255"},
        "paper": {},
    },
    "evaluation_options": {"eps": "4/255"},
}
FOUND = {  # clean, PGD-20, control, at most, proved, MS-MPPD
    "undefended": (0.9, 0.25, 0.2, 0.1, None, 0.4),
    "at": (0.7, 0.4, 0.35, 0.3, 0.1, 0.2),
    "tgo": (0.8, 0.5, 0.45, 0.4, None, 0.3),
    "tgo_at": (0.6, 0.45, 0.4, 0.2, None, 0.1),
}
BROKEN = {"undefended": (5, 7), "at": (4, 5), "tgo": (4, 4), "tgo_at": (6, 6)}
"""Of eight images, those that gradients break, and those that gradients and a search break."""
TIMES = {"undefended": [2.0, 1.0, 1.0], "tgo": [2.0, 1.5, 1.3]}


def save(sweep, name, members):
    """Save the evaluation of a run of a sweep."""
    folder = sweep / "runs" / name
    (folder / "standard_8").mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"cell": name.partition("-")[0]}))
    report(members=members).save(folder / "standard_8" / "report.json")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, with its files in a folder of its own, and a sweep there."""
    monkeypatch.syspath_prepend(RESULTS)
    spec = importlib.util.spec_from_file_location("page_of_defences", RESULTS / "defences.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    names = [
        "paper_8/clean",
        f"paper_8/{script.PGD}",
        "standard_8/control",
        "standard_8/everything",
        "standard_8/verified",
        f"paper_8/{script.MPPD}",
    ]
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "figure", "mean", "standard_deviation", "seeds"])
        for cell, values in FOUND.items():
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    writer.writerow([cell, name, value, 0.02, 2])
    for cell, (by_gradients, by_all) in BROKEN.items():
        followed = member("spike_search/training/r0", range(by_gradients, by_all))
        save(
            folder, f"{cell}-seed0", (member("apgd_ce/training/r0", range(by_gradients)), followed)
        )
    tried = "tgo,threshold_guard 0.3,0.4,0.8,False\ntgo,threshold_guard 1,0.5,0.8,True\n"
    (folder / "search.csv").write_text(f"cell,value,validation,clean,chosen\n{tried}")
    from defences_cost import cost  # which lies beside the script

    costs = tmp_path / "cost.csv"
    script.write_rows(costs, [cost(cell, TIMES) for cell in TIMES])
    page = tmp_path / "defences.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    for name, value in {
        "FOLDER": tmp_path / "defences",
        "TABLE": tmp_path / "defences" / "defences.csv",
        "COSTS": costs,
        "PAGE": page,
        "SWEEPS": (str(folder),),
    }.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr("sys.argv", ["defences.py"])
    return script


def test_tables_and_figures_follow_from_the_sweep(script, monkeypatch, capsys):
    script.main()
    text = script.PAGE.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    rows = script.read_rows(script.TABLE, script.Row)
    assert [row.cell for row in rows] == list(FOUND)
    (tgo,) = [row for row in rows if row.cell == "tgo"]
    assert (tgo.data, tgo.radius, tgo.seeds, tgo.chosen) == (
        "pictures",
        "8/255",
        2,
        "threshold_guard 1",
    )
    assert (tgo.pgd, tgo.pgd_sd, tgo.at_most, tgo.proved) == ("50.0", "2.0", "40.0", "")
    assert (tgo.ms_mppd, tgo.cost) == ("0.3", "1.30")
    lines = [line for line in text.splitlines() if line.startswith("| ") and "**" in line]
    assert [line.split(" | ")[0] for line in lines] == [
        "| TGO*",
        "| AT",
        "| TGO, AT*",
        "| no defence",
    ]
    assert "| 45.0 | 40.0 | **40.0 ± 2.0** | +10.0 |" in lines[0]
    assert "| 35.0 | 40.0 | **30.0 ± 2.0** | +10.0 |" in lines[1]  # the search breaks one more
    left = [8 - by_gradients for by_gradients, _ in BROKEN.values()]
    expected = spearmanr([row[5] for row in FOUND.values()], left)
    assert f"{expected.statistic:+.2f} over 4 rows (all)" in text
    assert "| +10.0 / -20.0 |" in text  # what TGO adds to attacks by gradients, alone and beside AT
    for name in ("brackets.png", "ms_mppd.png"):
        assert (script.FOLDER / name).stat().st_size > 0
    monkeypatch.setattr("sys.argv", ["defences.py", "--page"])
    script.main()
    assert script.PAGE.read_text(encoding="utf-8") == text


def test_every_attack_that_follows_spikes_is_known_by_name(script):
    suite = make_suite("standard", ThreatModel("Linf", 0.1), chosen=["atan:4"], classes=10)
    names = [member.name for member in (*suite.members, *suite.control)]
    assert [name for name in names if script.follows_spikes(name)] == [
        "spike_search/training/r0",
        "program/training/r0",
        "control/spike_search/training/r0",
    ]


def test_what_only_a_search_over_spikes_breaks_counts_as_standing_without_it(script, tmp_path):
    by_gradients = (
        member("apgd_ce/training/r0", (0, 1)),
        member("control/apgd_ce/training/r0", (2,), group="control"),
    )
    by_spikes = (
        member("spike_search/training/r0", (3,)),
        member("program/training/r0", (4,)),
        member("control/spike_search/training/r0", (5,), group="control"),
    )
    sweep = tmp_path / "sweep"
    save(sweep, "at-seed0", (*by_gradients, *by_spikes))
    only_two = member("spike_search/training/r0", (2, 3))
    save(sweep, "at-seed1", (by_gradients[0], only_two))
    script.main()
    rows = {row.cell: row for row in script.read_rows(script.TABLE, script.Row)}
    # of ten images eight are right; gradients leave five with the first seed, six with the second
    assert (rows["at"].no_spike_search, rows["at"].no_spike_search_sd) == ("55.0", "7.1")
    save(sweep, "at-seed1", by_gradients)
    with pytest.raises(SystemExit, match=r"not have the mean of the reports of at; run .*--report"):
        script.main()


def test_another_sweep_is_shown_and_nothing_is_written(script, tmp_path, monkeypatch, capsys):
    before = script.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["defences.py", str(tmp_path / "sweep")])
    script.main()
    assert "### pictures, 8/255 (2 seeds)" in capsys.readouterr().out
    assert script.PAGE.read_text(encoding="utf-8") == before
    assert not script.TABLE.exists()
    (tmp_path / "begun").mkdir()
    monkeypatch.setattr("sys.argv", ["defences.py", str(tmp_path / "begun")])
    with pytest.raises(SystemExit, match=r"no sweep has results\.csv yet"):
        script.main()


def test_every_cell_has_a_name_and_cifar_10_takes_what_the_search_chose(script):
    rows = script.read_rows(RESULTS / "defences" / "defences.csv", script.Row)
    chosen = {row.cell: row.chosen for row in rows if row.data == "fashion_mnist"}
    assert len(chosen) >= 18
    cells = []
    for path in sorted((RESULTS.parents[1] / "recipes/configs/sweeps").glob("defences_*.yaml")):
        sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
        cells.append(sweep["cells"])
        for suites in script.radii(sweep).values():
            assert suites.keys() == {"paper", "standard"}
    fixed, searched = cells
    assert list(fixed) == list(searched)
    for name, cell in searched.items():
        ((option, values),) = cell.pop("search").items()
        value = fixed[name]["options"].pop(option)
        assert value in values
        if name in chosen:  # those that are measured
            assert chosen[name] == f"{option} {value}"
        assert {"options": {}} | cell == fixed[name]
    assert {cell.removesuffix("_at") for cell in cells[0]} <= {
        name.removesuffix("_at") for name in script.NAMES
    }
    assert all(name in script.NAMES for name in script.CLAIMS)
