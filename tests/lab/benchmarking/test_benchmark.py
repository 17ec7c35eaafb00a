"""What is timed must be right, and what is not there must be said."""

import math
import os
import subprocess
import sys

import benchmark
import pytest
import torch
from lab import paths_for_children
from lab.benchmarking import race, steps, worker
from lab.benchmarking.benchmarks import BENCHMARKS
from lab.benchmarking.drawing import plot_benchmark
from lab.benchmarking.layers import LayerTask
from lab.benchmarking.networks import NetworkTask
from lab.benchmarking.paper_loops import PaperLoop
from lab.benchmarking.race import Measurement

from sj_robust.ops.dlif import cpp
from sj_robust.training import MODES

IMAGES = (2, 2, 3, 8, 8)
CURRENTS = (2, 2, 4, 4, 4)


@pytest.mark.parametrize(
    ("subject", "method"),
    [
        (subject, method)
        for subject in BENCHMARKS
        for method in BENCHMARKS[subject].methods
        if "vgg5" not in subject
    ],
)
def test_every_method_is_right_and_runs(subject, method, monkeypatch):
    for name, value in BENCHMARKS[subject].variables.get(method, {}).items():
        monkeypatch.setenv(name, value)
    try:
        task = BENCHMARKS[subject].methods[method](
            CURRENTS if BENCHMARKS[subject].is_layer else IMAGES
        )
    except ImportError as error:
        pytest.skip(f"{method}: {error}")
    except RuntimeError:
        if cpp.unavailable_reason() is None:
            raise
        pytest.skip(str(cpp.unavailable_reason()))
    task.check()
    task.backward(task.forward())
    assert task.tensor_bytes > 0
    assert BENCHMARKS[subject].peer_of(method) in BENCHMARKS[subject].methods


def test_a_wrong_layer_is_found_out():
    def late(shape):
        return lambda x_seq: (x_seq.cumsum(0) >= 1).to(x_seq) * 1.0 + 0 * x_seq

    def reference(shape):
        return lambda x_seq: (x_seq >= 1).to(x_seq) + 0 * x_seq

    with pytest.raises(ValueError, match="does not equal the textbook loop"):
        LayerTask("late", late, reference, CURRENTS).check()
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        LayerTask("graded", lambda shape: torch.sigmoid, None, CURRENTS).check()


def test_a_wrong_network_is_found_out(monkeypatch):
    from lab.benchmarking import networks

    kernel = "DLIF cpp" if cpp.unavailable_reason() is None else "DLIF eager"
    right = networks._NEURONS[kernel]
    monkeypatch.setitem(networks._NEURONS, kernel, lambda T: right(T=T, tau=3.0))
    with pytest.raises(ValueError, match=f"{kernel} does not equal the textbook loop"):
        NetworkTask("conv4", kernel, IMAGES).check()


@pytest.mark.parametrize(
    ("mode", "owner", "method", "wrong"),
    [
        ("none", PaperLoop, "entropy_loss", lambda loss: 1.01 * loss),
        ("gaussian", PaperLoop, "paper_loss", lambda loss: 1.01 * loss),
        ("at", PaperLoop, "single_step", lambda images: images.flip(3)),
        ("pgd_at", PaperLoop, "pgd", lambda images: images.flip(3)),
        ("trades", PaperLoop, "trades", lambda images: images.flip(3)),
        ("trades", PaperLoop, "trades_loss", lambda loss: 1.01 * loss),
        ("rat", PaperLoop, "single_step", lambda images: images.flip(3)),
        ("rat", steps, "published_retraction", None),
    ],
)
def test_a_wrong_step_of_a_mode_is_found_out(monkeypatch, mode, owner, method, wrong):
    right = getattr(owner, method)
    monkeypatch.setattr(
        owner, method, lambda *args, **kwargs: wrong and wrong(right(*args, **kwargs))
    )
    with pytest.raises(ValueError, match=f"mode {mode} does not equal"):
        BENCHMARKS["training_step"].methods[mode](IMAGES).check()


def test_every_mode_is_compared_with_its_own_peer():
    steps_of_modes = BENCHMARKS["training_step"]
    modes = set(MODES) - {"certified"}  # which no published loop on SpikingJelly's neuron trains
    assert set(steps_of_modes.peers) == modes
    assert {steps_of_modes.peer_of(mode) for mode in modes} == set(steps_of_modes.methods) - set(
        MODES
    )
    rows = [
        Measurement(
            "training_step",
            "malloc",
            "4x64x1x28x28",
            method,
            median,
            median,
            median,
            median,
            1.0,
            1.0,
            math.nan,
            peak,
            1.0,
            math.nan,
        )
        for method, median, peak in [
            ("none", 10.0, 6.0),
            ("none, textbook loop", 20.0, 12.0),
            ("at", 50.0, 5.0),
            ("at, textbook loop", 200.0, 20.0),
        ]
    ]
    table = {
        row.method: dict(zip(benchmark.columns(rows), benchmark.cells(row, rows), strict=True))
        for row in rows
    }
    assert [cells["textbook loop / this, median"] for cells in table.values()] == [
        "2.00",
        "1.00",
        "4.00",
        "1.00",
    ]
    assert table["none"]["images / s"] == "6400"
    assert table["at"]["peak / textbook loop"] == "0.25"
    assert benchmark.cells(rows[0], rows[:1])[4:6] == ("", "")  # its peer was not measured


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"certified"}))
def test_the_published_step_draws_the_noise_of_its_paper(mode, monkeypatch):
    drawn = set()
    for kind in ("rand_like", "randn_like"):
        draw = getattr(torch, kind)
        noted = lambda x, kind=kind, draw=draw: drawn.add(kind) or draw(x)  # noqa: E731
        monkeypatch.setattr(torch, kind, noted)
    BENCHMARKS["training_step"].methods[f"{mode}, textbook loop"](IMAGES).forward()
    assert drawn == {"none": set(), "pgd_at": {"rand_like"}}.get(mode, {"randn_like"})


WORKER = """
import json, sys

facts = {
    "absent": {"missing": "no such library"},
    "late": {"wrong": "late does not equal the textbook loop"},
    "copy": {},
}
print(json.dumps(facts.get(sys.argv[2], {"tensor_mb": 1, "peak_mb": 2, "saved_mb": 3})), flush=True)
for turn, _ in enumerate(sys.stdin):
    print(json.dumps([4 - turn, 10]), flush=True)
"""


def started(arguments, variables):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], **pipes)


def test_a_race_has_a_row_for_each_method_that_is_there_and_right(monkeypatch):
    monkeypatch.setattr(race, "_started", started)
    options = {"rounds": 3, "threads": 1}
    rows, missing = race.race("neuron", ["one", "absent", "two"], CURRENTS, **options)
    assert [row.method for row in rows] == ["one", "two"]
    assert missing == {"absent": "no such library"}
    for row in rows:
        assert (row.forward, row.backward, row.median, row.best) == (3, 10, 13, 12)
        assert (row.tensor_mb, row.peak_mb, row.saved_mb) == (1, 2, 3)
        assert row.copy == 2  # the fastest
    with pytest.raises(RuntimeError, match="late does not equal the textbook loop"):
        race.race("neuron", ["one", "late"], CURRENTS, **options)


def test_a_copy_is_as_fast_as_memory_may_be():
    shape = (1 << 10, 1 << 10)
    milliseconds, backward = worker._copy(shape, 1)()
    assert backward == 0
    assert 0.1 < 4 * (1 << 20) / milliseconds / 1e6 < 1e3  # gigabytes in a second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "broken"),
    [("neuron", "ops/test_dlif.py"), ("training_step", "training/test_training_step.py")],
)
def test_nothing_is_timed_while_its_tests_fail(monkeypatch, tmp_path, what, broken):
    tests = tmp_path / "tests"
    for name in (
        "ops/test_dlif.py",
        "ops/test_cpp.py",
        "ops/test_bn_dlif.py",
        "neuron/test_fusion.py",
        broken,
    ):
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        (tests / name).write_text("def test_it():\n    pass\n")
    (tests / broken).write_text("def test_it():\n    assert 'spike' == 'no spike'\n")
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "recipes" / "benchmark.py"))
    with pytest.raises(SystemExit, match=r"(?s)nothing is timed:.*no spike"):
        benchmark.main(["--what", what])


def test_the_chart_of_networks_has_no_line_for_the_memory(tmp_path):
    row = Measurement(
        "conv4",
        "malloc",
        "2x2x3x8x8",
        "ReLU",
        2.0,
        1.9,
        2.1,
        1.8,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        math.nan,
    )
    plot_benchmark([row], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_worker_that_nobody_reads_any_more_ends_without_a_word():
    """As after Ctrl-C at the moment when it was started; with LIFNode torch would speak of
    Triton.
    """
    call = [
        sys.executable,
        "-m",
        "lab.benchmarking.worker",
        "neuron",
        "SpikingJelly LIFNode",
        str(list(CURRENTS)),
        "1",
    ]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(call, env=os.environ | paths_for_children(), **pipes) as worker:
        worker.stdout.close()
        assert worker.stderr.read() == b""
        assert worker.wait(60) == 1
