import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import launch
import pytest
import torch
from data.test_torchvision_sets import DEBIAN, write_mnist

from sj_robust.evaluation import Report
from sj_robust.models import NetworkSpec, build_network
from sj_robust.training import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "adv_train.py"
QUICK = ("--epochs", "2", "--train-limit", "260", "--test-limit", "40", "--channels", "[4,4]")
sys.path.insert(0, str(RECIPE.parent))
import adv_train  # noqa: E402  # a script, found only now

pytestmark = pytest.mark.slow

# SpikingJelly 0.0.0.0.14 uses what torch has deprecated since.
STRICT = ("-W", "error", "-W", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


in_process = partial(launch.in_process, adv_train.main)


def start(folder, *options):
    command = [sys.executable, *STRICT, str(RECIPE), *options]
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder, *options, code=0):
    process = start(folder, *options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out + err


def weights(folder):
    return {
        (path.parent.name, path.name, name): value
        for path in sorted(folder.glob("*/*.pt"))
        for name, value in load_checkpoint(path)["model"].items()
    }


def assert_same(folder, other):
    one, two = weights(folder), weights(other)
    assert len(one) > 40
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken quick run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder.parent, *QUICK, "--output", str(folder))
    return folder


def test_the_default_run_defends(tmp_path):
    output = run(tmp_path)
    folder = tmp_path / "runs" / "digits-dlif-at-1"
    report = Report.load(folder / "report.json")
    assert report.table() in output
    assert report.attacks == ("clean", "gaussian", "fgsm", "pgd20")
    assert report.threat.eps == 0.1
    assert {score.total for score in report.scores} == {360}
    defended, undefended = (report.accuracy(name, "pgd20") for name in ("dlif at", "lif undefended"))
    assert defended >= undefended + 0.20
    assert report.accuracy("dlif at", "clean") > 0.9
    assert report.accuracy("lif undefended", "clean") > 0.95
    for name in report.networks:
        assert report.accuracy(name, "pgd20") <= report.accuracy(name, "fgsm") <= report.accuracy(name, "clean")
        assert len(report.curves[name]) == report.configuration["epochs"]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_run_leaves(whole):
    files = {str(path.relative_to(whole)) for path in whole.rglob("*") if "tfevents" not in path.name}
    networks = ("dlif_at", "lif_undefended")
    checkpoints = {f"{network}/{name}.pt" for network in networks for name in ("last", "best")}
    folders = {*networks, "tensorboard", *(f"tensorboard/{network}" for network in networks)}
    assert files == {"README.md", "config.yaml", "log.txt", "report.json", "report.png"} | checkpoints | folders
    log = (whole / "log.txt").read_text()
    for text in (f"torch: {torch.__version__}", "spikingjelly:", "commit:", "device: cpu", "eps: 0.1", "epoch 2/2"):
        assert text in log
    assert log.index("environment:") < log.index("configuration:") < log.index("epoch 1/2")


def test_a_checkpoint_builds_its_network(whole):
    content = load_checkpoint(whole / "dlif_at" / "best.pt")
    spec = content["description"]["network"]
    net = build_network(NetworkSpec(**spec))
    net.load_state_dict({name.removeprefix("net."): value for name, value in content["model"].items()})
    assert spec["channels"] == (4, 4)
    options = content["description"]["options"]
    assert (options["kappa"], options["rho"], options["weight_decay"], options["eps"]) == (0.5, 1.0, 5e-4, 0.1)


def scalars(folder):
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_scalars(whole):
    events = scalars(whole / "tensorboard" / "dlif_at")
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in ("total", "clean", "perturbed", "mppd", "accuracy", "lr")} <= tags
    assert {"validation/clean", "validation/fgsm", "validation/pgd", "ms_mppd/stages.1", "ms_mppd/stages.5"} <= tags
    assert {f"input_gain/{layer}/t{t}" for layer in ("stages.1", "stages.5") for t in range(4)} <= tags
    assert [event.step for event in events.Scalars("ms_mppd/stages.5")] == [1, 2]
    assert events.Scalars("ms_mppd/stages.5")[0].value > 0


def wait_for(process, path, condition):
    for _ in range(3000):
        assert process.poll() is None, process.communicate()
        if path.exists() and condition(path):
            return
        time.sleep(0.02)
    pytest.fail(f"{path} did not appear")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_and_resumed_ends_at_the_same_weights(tmp_path, whole, number):
    options = (*QUICK, "--output", "cut", "--checkpoint-steps", "1")
    process = start(tmp_path, *options)
    wait_for(process, tmp_path / "cut" / "dlif_at" / "last.pt", lambda path: load_checkpoint(path)["batch"] > 0)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    content = load_checkpoint(tmp_path / "cut" / "dlif_at" / "last.pt")
    assert content["epoch"] < 2
    if number == signal.SIGINT:
        assert process.returncode == 130, out + err
        assert "continues with --resume" in err
        assert "Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL
    refused = run(tmp_path, *options, code=1)  # a run is not overwritten by accident
    assert re.search(r"^error: cut is not empty: .* --resume.*\n\Z", refused, re.MULTILINE)
    run(tmp_path, "--output", "cut", "--resume")  # with the options of the run
    assert_same(whole, tmp_path / "cut")
    assert Report.load(tmp_path / "cut" / "report.json").scores == Report.load(whole / "report.json").scores


def test_resuming_a_finished_run_gives_the_same_report_and_other_options_are_refused(tmp_path, monkeypatch):
    quick = (*QUICK, "--epochs", "1", "--mode", "gaussian", "--reference", "false")
    in_process(monkeypatch, tmp_path, *quick)
    folder = tmp_path / "runs" / "digits-dlif-gaussian-1"
    scores = Report.load(folder / "report.json").scores
    in_process(monkeypatch, tmp_path, *quick)
    with pytest.raises(ValueError, match="--T must be an integer > 0, got 0"):
        in_process(monkeypatch, tmp_path, *quick, "--T", "0")
    started = tmp_path / "runs" / "digits-dlif-gaussian-3"  # one that was killed before its first checkpoint
    started.mkdir()
    (started / "config.yaml").write_text("{}")
    in_process(monkeypatch, tmp_path, "--mode", "gaussian", "--resume")
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"digits-dlif-gaussian-{number}" for number in (1, 2, 3)]
    for number in (1, 2):
        assert Report.load(tmp_path / "runs" / f"digits-dlif-gaussian-{number}" / "report.json").scores == scores
    options = (monkeypatch, tmp_path, "--output", str(folder), "--resume")
    with pytest.raises(ValueError, match=r"options\.rho: 1\.0 there, 2\.0 now"):
        in_process(*options, "--rho", "2")
    save_checkpoint(folder / "dlif_gaussian" / "last.pt", {"description": {}})
    with pytest.raises(ValueError, match="no run can go on from it"):
        in_process(*options)
    (folder / "dlif_gaussian" / "last.pt").write_text("foreign")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        in_process(*options)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        in_process(monkeypatch, tmp_path, "--output", "nowhere", "--resume")


def test_bounds_and_options_without_effect_are_in_the_log(tmp_path, monkeypatch, capsys):
    options = (*QUICK, "--epochs", "1", "--reference", "false", "--log-bounds", "--mode", "none", "--rho", "1")
    in_process(monkeypatch, tmp_path, *options, "--norm", "l1")
    assert "without effect beside the other options: norm, rho\n" in capsys.readouterr().out
    events = scalars(tmp_path / "runs" / "digits-dlif-none-1" / "tensorboard" / "dlif_none")
    for layer in ("stages.1", "stages.5"):
        bound, gain = (events.Scalars(f"{name}/{layer}")[0].value for name in ("l2_bound", "l2_gain"))
        assert bound > 0
        assert bound != gain


def test_print_config_and_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def printed(*options):
        with pytest.raises(SystemExit) as stop:
            adv_train.main([*options, "--print-config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    text = printed("--data-root", "x", "--tau", "5")
    Path("mine.yaml").write_text(text)
    assert "data_root: x" in text
    assert "mode: at" in text
    assert printed("--config", "mine.yaml", "--eps", "0.25") == text.replace("eps: 0.1\n", "eps: 0.25\n", 1)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_train(tmp_path, monkeypatch, path):
    write_mnist(tmp_path, train=200, test=30, size=28)
    root = str(DEBIAN if DEBIAN.is_dir() else tmp_path)
    in_process(monkeypatch, tmp_path, "--config", str(path), *QUICK, "--epochs", "1", "--data-root", root)
    (saved,) = (tmp_path / "runs").glob("*/report.json")
    report = Report.load(saved)
    assert all(math.isfinite(records[-1]["losses"]["total"]) for records in report.curves.values())
    assert {score.network for score in report.scores} == set(report.curves)
    assert all(score.total > 0 for score in report.scores)


def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(RECIPE), *QUICK]
    result = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits-dlif-at-1"]
    assert result.stdout.count("| pgd20 |") == 1
    folder = tmp_path / "runs" / "digits-dlif-at-1"
    assert "processes: 2" in (folder / "log.txt").read_text()
    assert len(load_checkpoint(folder / "dlif_at" / "last.pt")["random"]) == 2
