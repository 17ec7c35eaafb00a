"""The page of the defences follows from what a sweep leaves."""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
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
    "cells": {
        "undefended": {},
        "at": {"search": {"lr": [0.05, 0.2]}},
        "tgo": {},
        "tgo_at": {},
        "unfinished": {},
    },
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


def save(sweep, cell, seed, members, *, suites=("paper_8", "standard_8"), name=None):
    """Save a run of a sweep and its evaluation; its figures spread by 0.02 over two seeds."""
    folder = sweep / "runs" / (name or f"{cell}-seed{seed}")
    (folder / "standard_8").mkdir(parents=True, exist_ok=True)
    clean, pgd, control, at_most, proved, mppd = FOUND[cell]
    shares = {
        "paper_8": {"clean": clean, "pgd20/last": pgd},
        "standard_8": {"control": control, "everything": at_most, "verified": proved},
        "paper": {},
    }
    evaluations = {}
    for suite in suites:
        figures = {}
        for name, share in shares[suite].items():
            if share is not None:
                correct = round(1e6 * (share + 0.02 * (seed - 0.5) * 2**0.5))
                figures[name] = {"correct": correct, "total": 10**6}
        evaluations[suite] = {"figures": figures}
    record = {
        "cell": cell,
        "options": {"seed": seed, "lr": 0.2, "threshold_guard": 3.0},
        "evaluations": evaluations,
        "ms_mppd": {"paper_8": {"pgd20": mppd}},
    }
    (folder / "run.json").write_text(json.dumps(record))
    report(members=members).save(folder / "standard_8" / "report.json")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, with its files in a folder of its own, and a sweep there."""
    monkeypatch.syspath_prepend(RESULTS)
    spec = importlib.util.spec_from_file_location("page_of_defences", RESULTS / "defences.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    for cell, (by_gradients, by_all) in BROKEN.items():
        members = (
            member("apgd_ce/training/r0", range(by_gradients)),
            member("spike_search/training/r0", range(by_gradients, by_all)),
        )
        for seed in range(2):
            save(folder, cell, seed, members)
    from defences_cost import cost  # which lies beside the script

    costs = tmp_path / "cost.csv"
    script.write_rows(costs, [cost(cell, TIMES) for cell in TIMES])
    page = tmp_path / "defences.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    for name, value in {
        "FOLDER": tmp_path / "defences",
        "TABLE": tmp_path / "defences" / "defences.csv",
        "NETWORKS": tmp_path / "defences" / "networks.csv",
        "COSTS": costs,
        "PAGE": page,
        "RUNS": tmp_path,
        "SWEEPS": folder.name,
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
    assert len(script.read_rows(script.NETWORKS, script.Network)) == 2 * len(FOUND)
    (tgo,) = [row for row in rows if row.cell == "tgo"]
    assert (tgo.data, tgo.radius, tgo.seeds, tgo.chosen) == (
        "pictures",
        "8/255",
        2,
        "threshold_guard 3",  # by the search of Fashion-MNIST, where it stands without a point
    )
    (at,) = [row for row in rows if row.cell == "at"]
    assert at.chosen == "lr 0.2"
    assert (tgo.pgd, tgo.pgd_sd, tgo.at_most, tgo.proved) == ("50.0", "2.0", "40.0", "")
    assert (tgo.ms_mppd, tgo.cost) == ("0.3", "1.30")
    lines = [line for line in text.splitlines() if line.startswith("| ") and "**" in line]
    assert [line.split(" | ")[0] for line in lines] == [
        "| TGO*",
        "| AT",
        "| TGO, AT*",
        "| no defence",
    ]
    assert "| 45.0 | 40.0 | **40.0 ± 2.0** | 1.30 |" in lines[0]
    assert "| 35.0 | 40.0 | **30.0 ± 2.0** |  |" in lines[1]  # the search breaks one more
    left = [8 - by_gradients for by_gradients, _ in BROKEN.values()]
    expected = spearmanr([row[5] for row in FOUND.values()], left)
    assert f"| pictures, 8/255 | {expected.statistic:+.2f} (4 rows) |" in text
    assert "| +10.0 / -20.0 |" in text  # what TGO adds to attacks by gradients, alone and beside AT
    for name in ("brackets.png", "ms_mppd.png"):
        assert (script.FOLDER / name).stat().st_size > 0
    monkeypatch.setattr("sys.argv", ["defences.py", "--page"])
    script.main()
    assert script.PAGE.read_text(encoding="utf-8") == text


def test_radii_of_a_data_set_stand_side_by_side(script, tmp_path, monkeypatch, capsys):
    sweep = yaml.safe_load((tmp_path / "sweep" / "sweep.yaml").read_text())
    sweep["evaluations"] |= {
        "paper_4": {"suite": "paper", "eps": "4/255"},
        "standard_4": {"suite": "standard", "eps": "4/255"},
    }
    del sweep["evaluations"]["paper"]
    (tmp_path / "sweep" / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    for cell, at_most in {"at": 0.5, "tgo": 0.6}.items():  # tgo_at and undefended are not done yet
        for seed in range(2):
            folder = tmp_path / "sweep" / "runs" / f"{cell}-seed{seed}"
            record = json.loads((folder / "run.json").read_text())
            record["evaluations"]["paper_4"] = record["evaluations"]["paper_8"]
            counts = {"everything": {"correct": round(100 * at_most), "total": 100}}
            record["evaluations"]["standard_4"] = {"figures": counts}
            (folder / "run.json").write_text(json.dumps(record))
            shutil.copytree(folder / "standard_8", folder / "standard_4")
    script.main()
    text = script.PAGE.read_text(encoding="utf-8")
    assert "### pictures, 4/255 and 8/255 (2 seeds)" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    head, *lines = rows
    assert head.count(" at 4/255, %") == head.count(" at 8/255, %") == 4
    assert [line.split(" | ")[0] for line in lines[:4]] == [
        "| TGO*",
        "| AT",
        "| TGO, AT*",
        "| no defence",
    ]
    assert "| 50.0 |  | 40.0 | **60.0 ± 0.0** | 50.0 | 45.0 | 40.0 | **40.0 ± 2.0** |" in lines[0]
    assert "| 60.0 |  |  |  |  | 45.0 | 40.0 |" in lines[2]
    assert "| pictures, 4/255 | – | – |" in text
    assert "left at pictures, 8/255 |" in text
    assert "left at pictures, 4/255" not in text  # what is left is relative to no defence
    assert re.search(r"\| pictures, 8/255 \| [+-]\d\.\d\d \(4 rows\) \|", text)


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
    save(sweep, "at", 0, (*by_gradients, *by_spikes))
    save(sweep, "at", 1, (by_gradients[0], member("spike_search/training/r0", (2, 3))))
    script.main()
    rows = {row.cell: row for row in script.read_rows(script.TABLE, script.Row)}
    # of ten images eight are right; gradients leave five with the first seed, six with the second
    assert (rows["at"].no_spike_search, rows["at"].no_spike_search_sd) == ("55.0", "7.1")


def test_what_was_measured_on_other_machines_stays(script, tmp_path, capsys):
    script.main()
    before = {row.cell: row for row in script.read_rows(script.TABLE, script.Row)}
    other = replace(before["at"], data="fashion_mnist")
    more = replace(before["tgo_at"], seeds=5)
    rows = [*before.values(), other]
    script.write_rows(script.TABLE, [more if row.cell == "tgo_at" else row for row in rows])
    sweep = tmp_path / "sweep"
    shutil.rmtree(sweep / "runs")
    left = (member("apgd_ce/training/r0", (0,)),)
    save(sweep, "at", 2, left)
    save(sweep, "at", 3, (), suites=("paper_8", "paper"))  # half evaluated
    save(sweep, "undefended", 0, left, name="removed")
    record = sweep / "runs" / "removed" / "run.json"
    record.write_text(record.read_text().replace('"undefended"', '"removed"'))
    script.main()
    assert "kept: pictures, 8/255, tgo_at, of 5 seeds instead of 2" in capsys.readouterr().out
    rows = script.read_rows(script.TABLE, script.Row)
    assert rows[0] == other
    tables = script.PAGE.read_text(encoding="utf-8").split("### ")
    assert ["cost" in one for one in tables if "clean, %" in one] == [True, False]
    after = {row.cell: row for row in rows[1:]}
    assert (after["at"].seeds, after["at"].clean) == (3, "71.4")  # of 68.6, 71.4 and 74.2
    assert {**after, "at": before["at"]} == {**before, "tgo_at": more}


def test_a_figure_that_one_seed_lacks_is_that_of_the_others(script, tmp_path):
    sweep = tmp_path / "sweep"
    record = sweep / "runs" / "at-seed0" / "run.json"
    without = json.loads(record.read_text())
    del without["evaluations"]["standard_8"]["figures"]["control"]
    del without["ms_mppd"]
    record.write_text(json.dumps(without))
    script.main()
    rows = {row.cell: row for row in script.read_rows(script.TABLE, script.Row)}
    assert (rows["at"].control, rows["at"].control_sd) == ("36.4", "")
    assert (rows["at"].ms_mppd, rows["undefended"].control_sd) == ("0.2", "2.0")


def test_figures_that_do_not_belong_together_are_refused(script, tmp_path):
    save(tmp_path / "sweep", "at", 1, (), name="again")
    with pytest.raises(SystemExit, match=r"again and .*at-seed1 are both at with seed 1 at 8/255"):
        script.main()
    shutil.rmtree(tmp_path / "sweep" / "runs" / "again")
    script.main()
    networks = script.read_rows(script.NETWORKS, script.Network)
    other = replace(networks[0], seed=7, images=20)
    script.write_rows(script.NETWORKS, [*networks, other])
    with pytest.raises(SystemExit, match=f"networks of {other.cell} at 8/255 differ in images"):
        script.main()


def test_data_sets_without_a_name_stand_one_after_the_other(script, tmp_path, monkeypatch, capsys):
    second = tmp_path / "second"
    shutil.copytree(tmp_path / "sweep", second)
    text = (second / "sweep.yaml").read_text().replace("data/pictures", "data/a")
    (second / "sweep.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["defences.py", str(tmp_path / "sweep"), str(second)])
    script.main()
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("### ")]
    assert heads[:2] == ["### a, 8/255 (2 seeds)", "### pictures, 8/255 (2 seeds)"]
    assert len(heads) == 4


def test_another_sweep_is_shown_and_nothing_is_written(script, tmp_path, monkeypatch, capsys):
    before = script.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["defences.py", str(tmp_path / "sweep")])
    script.main()
    assert "### pictures, 8/255 (2 seeds)" in capsys.readouterr().out
    assert script.PAGE.read_text(encoding="utf-8") == before
    assert not script.TABLE.exists()
    (tmp_path / "begun").mkdir()
    monkeypatch.setattr("sys.argv", ["defences.py", str(tmp_path / "begun")])
    with pytest.raises(SystemExit, match=r"no network has been evaluated in .*begun; run"):
        script.main()


def test_every_cell_has_a_name_and_cifar_10_takes_what_the_search_chose(script):
    rows = script.read_rows(RESULTS / "defences" / "defences.csv", script.Row)
    chosen = {}
    for row in rows:
        chosen.setdefault(row.cell, set()).add(row.chosen)
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
        if name == script.PLAIN:  # whose epoch on CIFAR-10 clean accuracy selects
            assert fixed[name]["options"].pop("select") == "clean"
        elif name in chosen:  # those that are measured
            assert chosen[name] == {f"{option} {value}"}
        assert {"options": {}} | cell == fixed[name]
    assert {cell.removesuffix("_at") for cell in cells[0]} <= {
        name.removesuffix("_at") for name in script.NAMES
    }
    assert all(name in script.NAMES for name in script.CLAIMS)
