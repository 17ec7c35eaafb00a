"""The hour on a GPU, rehearsed on the CPU: rows, failures, short memory, killed runs, tables and
charts.
"""

import json
import math
import os
import sys
from dataclasses import replace

import benchmark
import pytest
import torch
from lab.benchmarking import gpu_hour, gpu_run, gpu_tables, gpu_worker
from lab.benchmarking.gpu_plan import COPY, PLAN, Part, layer_parts, network_part
from lab.benchmarking.gpu_run import TESTS, GpuRow, Store, measure_part, run_tests

from sj_robust.ops import available_backends

WHERE = {
    "device": "cuda (a GPU)",
    "torch": "2.13",
    "spikingjelly": "2.0.0",
    "cupy": "14",
    "triton": "3.9",
    "commit": "0123456789abcdef",
    "kernels": "fedcba",
}
SMALL = (2, 4, 4, 8, 8)
PARTS = layer_parts((("float32", SMALL), ("bfloat16", SMALL))) | {
    "step": network_part("small", (2, 4, 3, 8, 8))
}
UNABLE = (
    "is not available",
    "CuPy is not installed",
    "must be on a CUDA device",
)  # what needs a GPU
if available_backends()["cpp"] != "available":
    UNABLE += ("do not run in one pass",)


class Task:
    """Stands for a method: what its name says goes wrong."""

    def __init__(self, method, precision, shape):
        self.method, self.tensor_bytes, self.inputs = method, 4 * math.prod(shape), []
        if method == "hungry" and shape[1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if method == "absent":
            raise ImportError("no module named absent")

    def check(self):
        if self.method == "wrong":
            raise ValueError("wrong does not equal the textbook loop: it is not timed")

    def forward(self):
        return self.method

    def backward(self, result):
        assert result == self.method


SHAPE = (2, 16, 3, 4, 4)
METHODS = (COPY, "absent", "crashing", "hanging", "unable to start")
FAKE = Part(Task, METHODS, (("float32", SHAPE), ("float16", SHAPE)), (), passes=5)
WORKER = """
import json, os, sys, time
_, method, device, rounds, cases = sys.argv[1:]
if method == "unable to start":
    sys.exit("no such library")
print("a library says hello")
for number, (precision, shape) in enumerate(json.loads(cases)):
    print(json.dumps({"begun": number}), flush=True)
    if method == "crashing" and precision == "float32":
        print("illegal access", file=sys.stderr, flush=True)
        os._exit(9)
    if method == "hanging":
        time.sleep(60)
    facts = {"shape": shape, "median": 2.0}
    if method == "absent":
        facts = {"reason": "ImportError: no module"}
    print(json.dumps({"done": number, **facts}), flush=True)
"""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "gpu-2.0.0.jsonl", WHERE)


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, part in PARTS.items() for method in part.methods]
)
def test_every_method_of_the_plan_runs_or_says_why(name, method, capsys):
    part = PARTS[name]
    gpu_worker.main(part, method, "cpu", 2, list(part.cases))
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    done = [answer for answer in said if "done" in answer]
    assert len(done) == len(part.cases)
    for (precision, shape), facts in zip(part.cases, done, strict=True):
        if "reason" in facts:
            assert any(words in facts["reason"] for words in UNABLE), facts
        else:
            size = 4 if "float32" in precision or name == "step" else 2
            repeated = shape[0] if name == "step" else 1
            elements = math.prod(shape[1:]) * repeated if name == "step" else math.prod(shape)
            assert facts["tensor_mb"] == pytest.approx(size * elements / 1e6)
            assert 0 < facts["best"] <= facts["quartile1"] <= facts["median"] <= facts["quartile3"]


def test_the_plan_names_its_peers_and_what_it_compares_with():
    for name, part in PLAN.items():
        assert set(part.peers) <= set(part.methods)
        assert set(part.variables) <= set(part.methods)
        assert (COPY in part.methods) == (not math.isnan(part.passes)), name
        assert len(part.cases) == len(set(part.cases))


def test_what_goes_wrong_is_a_row_and_a_stopped_run_goes_on(store, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    options = {"device": "cpu", "rounds": 2, "limit": 2.0, "worker": (str(tmp_path / "worker.py"),)}
    rows = [next(measure_part("fake", FAKE, store, **options))]  # and then it is killed
    with store.path.open("a") as file:
        file.write('{"part": "fake", "meth')  # in the middle of a line
    again = Store(store.path, WHERE | {"commit": "another"})
    assert [row.key for row in again.rows] == [rows[0].key]
    later = list(measure_part("fake", FAKE, again, **options))
    assert [(row.method, row.precision) for row in rows + later] == [
        (method, precision) for method in METHODS for precision in ("float32", "float16")
    ]
    assert [row.reason for row in later] == [
        "",
        *["ImportError: no module"] * 2,
        "the process ended with code 9: illegal access",
        "",
        "took longer than 2 s",
        "not tried: a row of this method took longer than 2 s",
        *["the process ended with code 1: no such library"] * 2,
    ]
    retried = [row.method for row in measure_part("fake", FAKE, again, **options | {"limit": 0.5})]
    assert retried == [
        "absent",
        "absent",
        "crashing",
        "hanging",
        "hanging",
        "unable to start",
        "unable to start",
    ]
    assert len(again.rows) == 10
    for other in (WHERE | {"torch": "2.14"}, WHERE | {"kernels": "0"}):
        kept = Store(store.path, other)
        assert kept.rows == []
        kept.add(GpuRow("layer", other["kernels"]))
    store.path.write_text('{"device": "cu')  # killed in its first line
    assert Store(store.path, WHERE).rows == []
    assert len(Store(tmp_path / "gpu-2.0.0.earlier.jsonl", WHERE).rows) == 10 + 1, (
        "nothing that was set aside is lost"
    )


@pytest.mark.slow
def test_the_process_of_a_method(store):
    part = replace(PLAN["layer"], methods=(COPY,), cases=(("float16", SMALL),))
    (row,) = measure_part("layer", part, store, device="cpu", rounds=2)
    assert row.reason == ""
    assert row.tensor_mb == pytest.approx(2 * math.prod(SMALL) / 1e6)


def test_a_worker_says_what_is_wrong_and_halves_the_batch_where_memory_is_short(capsys):
    for method, wanted in (
        ("absent", "ImportError: no module named absent"),
        ("wrong", "ValueError: wrong does not equal the textbook loop: it is not timed"),
    ):
        gpu_worker.main(FAKE, method, "cpu", 2, FAKE.cases[:1])
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"done": 0, "reason": wanted}
    gpu_worker.main(FAKE, "hungry", "cpu", 2, FAKE.cases[:1])
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["shape"] == [2, 4, 3, 4, 4]
    assert facts["tensor_mb"] == 4 * 384 / 1e6
    assert gpu_worker.is_out_of_memory(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
    )


def test_an_error_that_takes_the_device_along_ends_the_process(monkeypatch, capsys):
    monkeypatch.setattr(gpu_worker, "_is_healthy", lambda device: False)
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code))
    with pytest.raises(SystemExit) as ended:
        gpu_worker.main(FAKE, "wrong", "cpu", 2, FAKE.cases)
    assert ended.value.code == 3
    assert [list(json.loads(line)) for line in capsys.readouterr().out.splitlines()] == [
        ["begun"],
        ["done", "reason"],
    ]


def measured(method, median, *, part="layer", shape="8x16x3x4x4", wanted="8x16x3x4x4", **changes):
    times = {
        "quartile1": median,
        "quartile3": median,
        "best": median,
        "forward": median / 2,
        "backward": median / 2,
    }
    return GpuRow(
        part,
        method,
        "float32",
        wanted,
        shape,
        median=median,
        host=0.1,
        peak_mb=10.0,
        tensor_mb=100.0,
        **times,
        **changes,
    )


def test_tables_and_chart(store, tmp_path, monkeypatch, capsys):
    store.add(GpuRow(TESTS, "test_autocast [triton]", outcome="3 passed"))
    store.add(GpuRow(TESTS, "test_graphs [cupy]", outcome="1 failed", reason="spikes | differ"))
    store.add(GpuRow(TESTS, "test_two_gpus", outcome="1 skipped (needs two GPUs)"))
    store.add(measured(COPY, 2.0))  # half of it in the forward pass
    store.add(measured("DLIF triton", 5.0))
    store.add(
        measured("SpikingJelly LIFNode, GPU", 25.0, shape="8x8x3x4x4")
    )  # half the batch: 50 for the whole
    store.add(
        GpuRow(
            "layer",
            "DLIF cupy",
            "float32",
            "8x16x3x4x4",
            "8x16x3x4x4",
            reason="ImportError: no cupy",
        )
    )
    store.add(measured("DLIF auto", 4.0, part="VGG-11 training step"))
    text = gpu_tables.markdown(store, PLAN, "python recipes/benchmark.py --device cuda")
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    }
    assert (
        "cuda (a GPU), torch 2.13, SpikingJelly 2.0.0, CuPy 14, Triton 3.9, commit 0123456789ab"
        in text
    )
    assert "Tests that fail: test_graphs [cupy]. Tests that did not run: test_two_gpus." in text
    assert lines["test_graphs [cupy]"] == ["1 failed", "spikes / differ"]
    assert "a copy reaches 200 GB/s, at which the 5 passes take 2.5 ms" in text
    assert lines["DLIF triton"][5:8] == ["100", "50 %", "10.00"]
    assert lines["SpikingJelly LIFNode, GPU"][-1] == "memory was short: [8, 8, 3, 4, 4]"
    assert lines["DLIF cupy"][-1] == "ImportError: no cupy"
    assert lines["DLIF auto"][5] == "4000"
    monkeypatch.chdir(tmp_path)
    benchmark.main(["--redraw", "."])
    assert "gpu-2.0.0.jsonl drawn as gpu-2.0.0.png" in capsys.readouterr().out
    assert (tmp_path / "gpu-2.0.0.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing is measured"):
        gpu_tables.plot(Store(tmp_path / "other.jsonl", WHERE), PLAN, tmp_path / "b.png")


@pytest.mark.slow
def test_a_test_that_takes_its_process_along_is_a_row(store, tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "gpu" / "test_kernels.py").write_text(
        "import os, pytest, warnings\n"
        "@pytest.mark.parametrize('backend', ['cupy', 'triton'])\n"
        "def test_both(backend):\n"
        "    warnings.warn('new driver')\n"
        "    assert backend == 'triton', 'spikes differ'\n"
        "def test_crash():\n    os._exit(7)\n"
        "def test_skipped():\n    pytest.skip('needs two GPUs')\n"
    )
    rows = {row.method: row for row in run_tests(tmp_path / "gpu", store)}
    assert rows["test_both [triton]"].outcome == "1 passed"
    assert rows["test_both [triton]"].reason == ""
    assert "spikes differ" in rows["test_both [cupy]"].reason
    assert "code 7" in rows["test_crash"].reason
    assert rows["test_skipped"].outcome == "1 skipped (needs two GPUs)"
    assert [row.method for row in run_tests(tmp_path / "gpu", store)] == [
        "test_both [cupy]",
        "test_crash",
    ]
    (row,) = run_tests(tmp_path / "nowhere", store)
    assert "finds no tests" in row.reason


def test_a_backend_that_hangs_runs_no_more_tests(store, tmp_path, monkeypatch):
    each = (
        "@pytest.mark.parametrize('backend', ['triton', 'cupy'])\ndef test_{}(backend):\n    pass\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import pytest\n" + each.format("one") + each.format("two")
    )
    reasons = {"test_one [triton]": "no outcome, code -9: took longer than 480 s"}
    monkeypatch.setattr(
        gpu_run, "_tested", lambda name, *_: GpuRow(TESTS, name, reason=reasons.get(name, ""))
    )
    left = "not run: another test of triton took longer than 480 s"
    assert {row.method: row.reason for row in run_tests(tmp_path, store)} == reasons | {
        "test_one [cupy]": "",
        "test_two [triton]": left,
        "test_two [cupy]": "",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        benchmark.main(["--device", "cuda"])


def test_the_whole_command_in_small(monkeypatch, tmp_path, capsys):
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "recipes" / "benchmark.py"))
    monkeypatch.setattr(benchmark, "PLAN", {"layer": PARTS["layer"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "environment", lambda device: WHERE)
    rows = [measured(COPY, 1.0), measured("DLIF triton", 5.0)]

    def known(name, part, store, *, device, rounds):
        assert (name, device, rounds) == ("layer", "cuda", 3)
        for row in rows:
            store.add(row)
            yield row

    monkeypatch.setattr(gpu_hour, "measure_part", known)
    monkeypatch.setattr(gpu_hour, "plot", lambda *arguments: 1 / 0)
    benchmark.main(
        ["--device", "cuda", "--rounds", "3", "--check", "false", "--output", str(tmp_path / "out")]
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "gpu-2.0.0.jsonl",
        "gpu-2.0.0.md",
    ]
    told = capsys.readouterr().out
    assert "layer, DLIF triton, float32 8x16x3x4x4: 5 ms" in told
    assert "no chart: division by zero" in told
