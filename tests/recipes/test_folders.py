"""What a sweep and a benchmark of the real recipes leave in their folders."""

import csv
from shlex import split

import launch
import pytest
from evaluation.recipe_run import undrawn
from evaluation.short_suite import shortened
from lab.sweeping.runs import RECORD_FILE, RunRecord
from launch import ROOT

pytestmark = pytest.mark.slow


def test_a_sweep_of_the_real_recipes_has_their_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = "{epochs: 1, train_limit: 130, test_limit: 8, channels: [2, 2], T: 2, device: cpu}"
    given = [
        "--options",
        options,
        "--grid",
        "{rho: [1]}",
        "--evaluation-options",
        "{test_limit: 4}",
    ]
    with undrawn(), shortened():
        launch.in_process(
            "sweep", tmp_path, *split("--base digits --evaluate paper --output sweep"), *given
        )
    run = tmp_path / "sweep" / "runs" / "rho1-seed0"
    record = RunRecord.load(run / RECORD_FILE)
    assert record.accuracies["paper/pgd7/last"] <= record.accuracies["paper/clean"]
    assert record.training["pgd20"]["total"] == 8
    assert (record.options["rho"], record.options["reference"]) == (1, False)
    assert record.environment["torch"]
    assert min(record.seconds.values()) > 0
    assert (run / "training" / "dlif_at" / "best.pt").is_file()


def test_a_benchmark_leaves_numbers_table_and_chart_and_draws_it_again(tmp_path):
    given = split("--shapes [[2,4,3,8,8]] --methods 'DLIF eager' 'textbook loop' --rounds 2")
    given += split("--allocators malloc --no-check --output measured")
    launch.in_process("benchmark", tmp_path, *given)
    folder = tmp_path / "measured"
    rows = list(csv.DictReader((folder / "neuron.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["DLIF eager", "textbook loop"]
    for row in rows:
        times = [float(row[name]) for name in ("best", "quartile1", "median", "quartile3")]
        assert times == sorted(times)
        assert times[0] > 0
        assert float(row["copy"]) > 0
        assert row["commit"]
    assert float(rows[0]["saved_mb"]) == 0.0
    assert "| textbook loop |" in (folder / "neuron.md").read_text()
    chart = folder / "neuron.png"
    before = chart.read_bytes()
    assert before.startswith(b"\x89PNG")
    chart.unlink()
    launch.in_process("benchmark", folder, "--redraw", ".")
    assert chart.read_bytes() == before
