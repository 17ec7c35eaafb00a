"""Races, their rows, tables and files: with processes that stand in for those that measure."""

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import benchmark
import pytest
import torch
from lab.benchmarking import race
from lab.benchmarking.benchmarks import BENCHMARKS, Benchmark
from lab.benchmarking.race import Race
from lab.benchmarking.results import TESTS, Results, caption, load, markdown, table

WHERE = {
    "device": "cuda (a GPU)",
    "torch": "2.13",
    "spikingjelly": "2.0.0",
    "commit": "0123456789abcdef",
    "code": "fedcba",
}
WORKER = """
import json, os, sys, time
subject, method, shape, threads, device, passes = sys.argv[1:]
pass_ms = {"copy": 2.0, "DLIF triton": 50.0}.get(method, 100.0)
found = {"peak_mb": 64.0, "saved_mb": 16.0, "passes": []}
if method == "unable to start":
    sys.exit("no such library")
if method == "absent":
    found = {"reason": "not installed: no package"}
if method == "wrong":
    found = {"reason": "ValueError: it does not equal the textbook loop: it is not timed"}
if method == "crashing":
    print("illegal access", file=sys.stderr, flush=True)
    os._exit(9)
if method == "hanging":
    time.sleep(60)
if "passes" in found:
    for number in range(int(passes)):
        found["passes"].append({"forward": 0.25 * pass_ms + number, "backward": 0.75 * pass_ms})
print(json.dumps(found))
"""
FAILING = {
    "absent": "not installed: no package",
    "wrong": "ValueError: it does not equal the textbook loop: it is not timed",
    "crashing": "the process ended with code 9: illegal access",
    "unable to start": "the process ended with code 1: no such library",
}
METHODS = ("textbook loop", "DLIF triton", *FAILING)
SHAPE = (4, 64, 1, 16, 16)
FAKE = Race("gpu_layer", Benchmark({}, "", (SHAPE,), passes=5), METHODS, SHAPE, "cuda")
OPTIONS = {"rounds": 9, "threads": 1}


@pytest.fixture(autouse=True)
def _worker(tmp_path, monkeypatch):
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    monkeypatch.setattr(race, "WORKER", (sys.executable, str(path)))


def test_what_goes_wrong_is_a_row_and_the_others_are_timed():
    rows = {row.method: row for row in FAKE.run(METHODS, **OPTIONS)}
    assert list(rows) == list(METHODS)
    found = {name: row.reason for name, row in rows.items() if row.reason}
    assert found == FAILING
    row = rows["DLIF triton"]
    assert (row.quartile1, row.median, row.quartile3, row.best) == (50.0, 51.0, 52.0, 50.0)
    assert (row.forward, row.backward) == (13.5, 37.5)
    assert (row.peak_mb, row.saved_mb, row.tensor_mb) == (64.0, 16.0, 0.262144)
    assert row.copy == pytest.approx(2.0 * 0.262144 / 268.435456)


def test_a_process_that_hangs_is_a_row_and_a_heap_that_is_kept_hides_its_growth(monkeypatch):
    (row,) = replace(FAKE, allocator="reuse").run(["textbook loop"], **OPTIONS)
    assert (math.isnan(row.peak_mb), row.saved_mb) == (True, 16.0)
    monkeypatch.setattr(race, "LIMIT", 0.5)
    (row,) = FAKE.run(["hanging"], **OPTIONS)
    assert row.reason == "took longer than 0.5 s"


def test_a_stopped_run_goes_on_and_rows_of_other_code_are_set_aside(tmp_path):
    path = tmp_path / "gpu_layer.csv"
    first = Results(path, WHERE)
    first.add([replace(FAKE.row("textbook loop"), median=1.0), replace(FAKE.row("a"), reason="b")])
    again = Results(path, WHERE | {"commit": "another"})
    assert FAKE.left(again) == list(METHODS[1:])
    again.add([replace(FAKE.row("a"), median=2.0)])
    network = replace(FAKE, benchmark=Benchmark({}, "", (SHAPE,)), methods=("textbook loop",))
    assert network.run(network.left(again), **OPTIONS) == []  # nothing is left
    found = [row.method for row in load(path)[1]]
    assert found == ["textbook loop", "a"]
    for other in (WHERE | {"torch": "2.14"}, WHERE | {"code": "0"}):
        results = Results(path, other)
        assert results.rows == []
        results.add([FAKE.row(other["code"])])
    with (tmp_path / "gpu_layer.earlier.csv").open() as file:
        methods = [line["method"] for line in csv.DictReader(file)]
    assert methods == ["textbook loop", "a", "method", "fedcba"], "nothing is lost"


def test_a_table_has_ratios_shares_and_reasons():
    rows = FAKE.run(["textbook loop", "DLIF triton", "wrong"], **OPTIONS)
    rows.append(replace(rows[0], method="SpikingJelly LIFNode, GPU", median=102.0, peak_mb=128.0))
    rows = [replace(row, copy=4.0, tensor_mb=16.0) for row in rows]
    assert caption(rows) == (
        "gpu_layer [4, 64, 1, 16, 16], cuda, milliseconds; moving the tensors takes 10.0 ms, a "
        "copy reaches 8 GB/s"
    )
    heads, lines = table(rows)
    cells = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    fast = cells["DLIF triton"]
    assert fast["SpikingJelly LIFNode, GPU / this, median"] == "2.00"
    assert fast["speed of memory, median / best"] == "20 % / 20 %"
    assert (fast["saved, tensors"], fast["peak, tensors"], fast["quartiles"]) == (
        "1.00",
        "4.00",
        "50.0 - 52.0",
    )
    assert fast["peak / SpikingJelly LIFNode, GPU"] == "0.50"
    assert cells["wrong"]["median"] == ""
    assert cells["wrong"]["note"] == FAILING["wrong"]
    assert "| wrong |  |" in "\n".join(markdown(rows))


def test_every_mode_has_a_ratio_to_its_own_peer():
    medians = {"none": 10.0, "none, textbook loop": 20.0, "at": 50.0, "at, textbook loop": 200.0}
    empty = Race("training_step", BENCHMARKS["training_step"], (), SHAPE, "malloc")
    rows = [replace(empty.row(method), median=medians[method]) for method in medians]
    heads, lines = table(rows)
    ratio = heads.index("textbook loop / this, median")
    images = heads.index("images / s")
    assert [line[ratio] for line in lines] == ["2.00", "1.00", "4.00", "1.00"]
    assert lines[0][images] == "6400"
    assert not any("saved" in head for head in heads)  # an attack builds several graphs
    assert table(rows[:1])[1][0][ratio] == ""  # its peer was not measured


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of the repository whose tests can be written."""
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "recipes" / "benchmark.py"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to import
    return tmp_path


def write_tests(clone, name, text):
    path = clone / "tests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.slow
def test_nothing_is_timed_while_its_tests_fail(clone):
    what, here = "training_step", Path(__file__).parents[2]
    for name in race.TESTS_OF[what]:
        assert (here / name).is_file()
        write_tests(clone, name, "def test_it():\n    pass\n")
    write_tests(clone, name, "def test_it():\n    assert 'spike' == 'no spike'\n")
    with pytest.raises(SystemExit, match=r"(?s)nothing is timed:.*no spike"):
        benchmark.main(["--what", what])


GPU_TESTS = """
import os, warnings
import pytest

@pytest.mark.parametrize('backend', ['cupy', 'triton'])
def test_both(backend):
    warnings.warn('new driver')
    assert backend == 'triton', 'spikes | differ'

def test_crash():
    os._exit(7)
"""


@pytest.mark.slow
def test_the_hour_on_a_gpu_is_one_command_that_goes_on(clone, monkeypatch, capsys):
    write_tests(clone, "gpu/test_kernels.py", GPU_TESTS)
    out = clone / "out"
    monkeypatch.chdir(clone)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "environment", lambda device: WHERE)
    methods = dict.fromkeys(("textbook loop", "DLIF triton", "wrong"))
    layer = Benchmark(methods, "textbook loop", (SHAPE, (2, *SHAPE[1:])), passes=5)
    monkeypatch.setattr(benchmark, "GPU_BENCHMARKS", {"gpu_layer": layer})
    arguments = ["--device", "cuda", "--rounds", "2", "--output", "out"]

    def killed(self, *arguments, **options):
        if self.shape != SHAPE:
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    run = Race.run
    with monkeypatch.context() as patch:
        patch.setattr(Race, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(arguments)
    told = capsys.readouterr().out
    assert "| wrong |" in told
    assert FAILING["wrong"] in told
    reasons = {row.method: row.reason for row in load(out / f"{TESTS}-2.0.0.csv")[1]}
    assert reasons["test_kernels.py, triton"] == ""
    assert "spikes | differ" in reasons["test_kernels.py, cupy"]
    assert reasons["test_kernels.py, not cupy and not triton"] == "code 7"
    page = (out / f"{TESTS}-2.0.0.md").read_text()
    assert "| test_kernels.py, triton | 1 passed" in page
    before = load(out / "gpu_layer-2.0.0.csv")[1]
    assert [row.method for row in before] == list(methods)
    with pytest.raises(SystemExit, match="2 rows have no figure"):
        benchmark.main(arguments)
    told = capsys.readouterr().out
    assert "test_kernels.py, cupy" in told
    assert "test_kernels.py, triton" not in told
    assert "cuda (a GPU), triton" in (out / "gpu_layer-2.0.0.md").read_text()
    after = load(out / "gpu_layer-2.0.0.csv")[1]
    assert after[:2] == before[:2]
    assert len(after) == 6
    chart = out / "gpu_layer-2.0.0.png"
    chart.unlink()
    benchmark.main(["--redraw", "out"])
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_file_of_something_else_is_not_drawn(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="no measurements"):
        benchmark.main(["--redraw", str(tmp_path)])
