import contextlib
import math
import re
import signal
from dataclasses import replace
from shlex import split

import adv_train
import launch
import pytest
import torch
import yaml
from data.test_image_folder import picture
from data.test_torchvision_sets import DEBIAN, write_mnist
from evaluation.recipe_run import undrawn
from evaluation.short_suite import shortened
from filelock import FileLock
from lab.command_line import idle
from launch import ROOT, finish, start

from sj_robust.core.environment import CODE_KEY
from sj_robust.defences import ClippedReLU
from sj_robust.evaluation import Report
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models.checkpoint import save_checkpoint
from sj_robust.training import convert, load_checkpoint

OWN = """
from spikingjelly.activation_based import functional, layer
from torch import nn

def build(classes, spiking_neuron):
    net = nn.Sequential(
        layer.Flatten(), layer.Linear(192, 8), spiking_neuron(), layer.Linear(8, classes)
    )
    functional.set_step_mode(net, "m")
    return net
"""
QUICK = split("--epochs 2 --train-limit 260 --test-limit 40 --channels 4 4 --judged 0")

pytestmark = pytest.mark.slow


def in_process(folder, *options, draws=False):
    with contextlib.nullcontext() if draws else undrawn():
        launch.in_process("adv_train", folder, *options)


def weights(folder):
    return {
        str(path.relative_to(folder)): load_checkpoint(path)["model"]
        for path in sorted(folder.glob("*/*.pt"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken quick run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    in_process(folder.parent, *QUICK, "--output", str(folder), draws=True)
    return folder


def test_a_normalisation_goes_into_the_checkpoint_and_a_start_is_told(tmp_path, whole):
    state = {
        name: value
        for name, value in weights(whole)["dlif_at/best.pt"].items()
        if name not in ("mean", "std")
    }
    torch.save(
        {name.removeprefix("net."): value for name, value in state.items()}, tmp_path / "bare.pt"
    )
    options = split("--pretrained bare.pt --mean 0.3 --std 0.5 --no-reference")
    in_process(tmp_path, *QUICK, *options, "--output", "run")
    assert "starting from " in (tmp_path / "run" / "log.txt").read_text()
    saved = weights(tmp_path / "run")["dlif_at/best.pt"]
    found = (saved["mean"].tolist(), saved["std"].tolist())
    expected = (
        pytest.approx([0.3]),
        pytest.approx([0.5]),
    )
    assert found == expected


def test_certified_training_beside_ms_mppd_ends_with_what_is_verified(tmp_path, capsys):
    options = split("--mode certified --rho 0.5 --certified-eps 0.02 --eval-eps 0.01 --lr 0.02")
    in_process(tmp_path, *QUICK, *options, *split("--epochs 6 --no-reference"), draws=True)
    report = Report.load(tmp_path / "runs" / "digits-dlif-certified-1" / "report.json")
    (note,) = report.warnings
    found = re.fullmatch(
        r"dlif certified: (\d+) of 40 test images \(.*%\) verified at Linf 0.01", note
    )
    verified = int(found[1])
    assert report.verified.correct == verified
    assert verified <= report.under("pgd20").correct
    assert note in capsys.readouterr().out
    losses = report.curves["dlif certified"][-1]["losses"]
    assert losses["mppd"] > 0
    assert losses["certified"] > losses["clean"]


def test_what_a_run_leaves(whole):
    files = {
        str(path.relative_to(whole)) for path in whole.rglob("*") if "tfevents" not in path.name
    }
    expected = {
        ".lock",
        "README.md",
        "config.yaml",
        "log.txt",
        "report.json",
        "report.png",
        "tensorboard",
    }
    for network in ("dlif_at", "lif_undefended"):
        expected |= {
            network,
            f"tensorboard/{network}",
            f"{network}/last.pt",
            f"{network}/best.pt",
        }
    assert files | {".lock"} == expected  # which some releases of filelock remove
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    log = (whole / "log.txt").read_text()
    for text in (
        f"torch: {torch.__version__}",
        "spikingjelly:",
        "commit:",
        "device: cpu",
        "eps: 0.1",
        "epoch 2/2",
    ):
        assert text in log
    assert log.index("environment:") < log.index("configuration:") < log.index("epoch 1/2")


def test_a_run_that_was_killed_and_resumed_ends_at_the_same_weights(tmp_path, whole):
    options = (*QUICK, *split("--output cut --checkpoint-steps 1"))
    process = launch.Forked("adv_train", tmp_path, *options)
    last = tmp_path / "cut" / "dlif_at" / "last.pt"
    launch.wait_until(
        lambda: last.exists() and load_checkpoint(last)["batch"] > 0, "a checkpoint", process
    )
    process.kill()
    finish(process, code=-signal.SIGKILL)
    assert load_checkpoint(last)["epoch"] < 2
    with pytest.raises(
        FileExistsError, match="cut is not empty: .* --resume"
    ):  # not overwritten by accident
        in_process(tmp_path, *options)
    in_process(tmp_path, *split("--output cut --resume"))  # with the options of the run
    torch.testing.assert_close(weights(whole), weights(tmp_path / "cut"), rtol=0, atol=0)
    assert fallen(tmp_path / "cut") == fallen(whole)


def test_a_second_process_in_the_folder_of_a_run_is_refused(tmp_path, whole):
    log = (whole / "log.txt").read_text()
    with (
        FileLock(whole / ".lock"),
        pytest.raises(BlockingIOError, match="another process trains in .* another --output"),
    ):
        in_process(tmp_path, "--output", str(whole), "--resume")
    assert (whole / "log.txt").read_text() == log


def test_a_start_from_weights_that_saw_validation_images_is_warned_of(tmp_path, whole, capsys):
    start = str(whole / "dlif_at" / "best.pt")
    options = (
        *QUICK,
        *split("--epochs 1 --no-reference --seed 1 --output run --pretrained"),
        start,
    )
    in_process(tmp_path, *options)
    (warning,) = Report.load(tmp_path / "run" / "report.json").warnings
    assert re.search(r"was trained on \d+ of the 26 validation images", warning)
    assert "--seed 0 --train-limit 260 --validation-fraction 0.1" in warning
    assert f"WARNING: {warning}" in (tmp_path / "run" / "log.txt").read_text()


def fallen(folder):
    """Which images fell to whom, in the report of a run."""
    report = Report.load(folder / "report.json")
    return [(row.variant, row.member, row.fell) for row in report.rows]


def test_resuming_a_finished_run_gives_the_same_report_and_other_options_are_refused(tmp_path):
    quick = (*QUICK, *split("--epochs 1 --mode gaussian --no-reference"))
    in_process(tmp_path, *quick)
    folder = tmp_path / "runs" / "digits-dlif-gaussian-1"
    first = fallen(folder)
    in_process(tmp_path, *quick)
    started = (
        tmp_path / "runs" / "digits-dlif-gaussian-3"
    )  # one that was killed before its first checkpoint
    started.mkdir()
    (started / "config.yaml").write_text("{}")
    in_process(tmp_path, *split("--mode gaussian --resume"))
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"digits-dlif-gaussian-{number}" for number in (1, 2, 3)]
    for number in (1, 2):
        assert fallen(tmp_path / "runs" / f"digits-dlif-gaussian-{number}") == first
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"options\.rho: 1\.0 there, 2\.0 now"):
        in_process(tmp_path, "--output", str(folder), *split("--resume --rho 2"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == written


def test_a_run_goes_on_with_its_images_and_code_alone(tmp_path, capsys):
    for seed in range(80):
        part = "train" if seed < 40 else "test"
        picture(tmp_path / "pictures" / part / "ab"[seed % 2] / f"{seed}.png", seed, 8, 8)
    build = tmp_path / "mynet.py"
    build.write_text(OWN)
    options = split(
        "--dataset image_folder:pictures --model mynet.py:build --mode none --epochs 1 "
        "--batch-size 8 --no-reference --judged 0 --output run"
    )
    in_process(tmp_path, *options)
    report = Report.load(tmp_path / "run" / "report.json")
    (code,) = [name for name in report.environment if name.startswith(CODE_KEY)]
    last = tmp_path / "run" / "dlif_none" / "last.pt"
    content = load_checkpoint(last)
    assert report.environment[code] == content["description"][code]
    in_process(tmp_path, *options, "--resume")
    build.write_text(OWN.replace("192, 8", "192, 9").replace("8, classes", "9, classes"))
    with pytest.raises(ValueError, match=r"code on .*: '\w+' there"):
        in_process(tmp_path, *options, "--resume")
    build.write_text(OWN)
    picture(tmp_path / "pictures" / "train" / "a" / "0.png", 100, 8, 8)
    with pytest.raises(ValueError, match=r"images and labels: '\w+' there"):
        in_process(tmp_path, *options, "--resume")
    for name in (code, "images and labels"):  # as runs of before told neither
        content["description"].pop(name)
    parts = {name: part for name, part in content.items() if name not in ("format", "version")}
    save_checkpoint(last, parts)
    capsys.readouterr()
    in_process(tmp_path, *options, "--resume")
    assert "does not record images and labels, code on" in capsys.readouterr().out


def test_a_network_of_ones_own_without_the_neuron_asked_for_is_refused(tmp_path):
    fixed = OWN.replace("spiking_neuron()", "neuron.LIFNode()").replace(", spiking_neuron", "")
    fixed = fixed.replace("functional, layer", "functional, layer, neuron").replace("192", "64")
    (tmp_path / "mine.py").write_text(fixed)
    options = (*QUICK, "--model", f"{tmp_path / 'mine.py'}:build", "--neuron", "tgo")
    with pytest.raises(ValueError, match="builds LIFNode, not the neuron 'tgo' that was asked for"):
        in_process(tmp_path, *options, "--no-reference")


def test_a_twin_is_trained_and_its_weights_are_run_by_spikes(tmp_path):
    options = split("--mode twin_at --T 6 --levels 3 --gain_fall 0.2 --no-reference --judged 6")
    with shortened():
        in_process(tmp_path, *QUICK, *options)
    folder = tmp_path / "runs" / "digits-dlif-twin_at-1"
    twin, spiking = (
        from_checkpoint(folder / name).model for name in ("clipped_relu_pgd_at", "dlif_twin_at")
    )
    x = torch.rand(5, 1, 8, 8)
    assert spiking.T == 6
    assert {module.levels for module in twin.modules() if isinstance(module, ClippedReLU)} == {3}
    assert torch.equal(spiking(x), convert(twin, x, T=6, gain_fall=0.2)(x))
    report = Report.load(folder / "report.json")
    assert report.variants == ("clipped_relu pgd_at", "dlif twin_at")
    left = Report.load(folder / "dlif_twin_at" / "left.json")
    assert (left.suite, len(left.labels), left.eps) == ("fast", 6, report.eps)


@pytest.mark.parametrize(
    "options", ["--neuron lif", "--rho 1", "--dataset saccade:digits --flips 2"]
)
def test_a_twin_has_no_spikes_in_training(tmp_path, options):
    with pytest.raises(ValueError, match="twin_at"):
        in_process(tmp_path, *QUICK, *split(f"--mode twin_at {options}"))


@pytest.mark.parametrize(("neuron", "named"), [("if", True), ("lif", False)])
def test_a_time_constant_without_a_leak_is_ignored(neuron, named):
    options = adv_train.Options(neuron=neuron, tau=2.0, reference=False)
    assert ("tau" in idle(options)) == named
    assert "tau" not in idle(replace(options, reference=True))


def test_options_without_effect_are_in_the_log(tmp_path, capsys):
    options = (*QUICK, *split("--epochs 1 --no-reference --mode none --rho 1"))
    in_process(tmp_path, *options, *split("--norm l1 --hidden 8 8"))
    assert "ignored with the other options given: hidden, norm, rho\n" in capsys.readouterr().out


CONFIGS = ROOT / "recipes" / "configs"
OF_SMALL_IMAGES = (
    "digits",
    "certified/digits_0.1",
    "certified/fashion_mnist_8_two_steps",
    "defences/dsd",
    "defences/stod",
    "defences/stog",
    "defences/tgo",
    "twin/digits",
)
PRESETS = [CONFIGS / f"{name}.yaml" for name in OF_SMALL_IMAGES]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_train(tmp_path, path):
    write_mnist(tmp_path, train=200, test=30, size=28)
    root = str(DEBIAN if DEBIAN.is_dir() else tmp_path)
    options = (*split("--epochs 1 --train-limit 160 --test-limit 8 --judged 0 --data-root"), root)
    preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "thresholds" not in preset.get("model_options", {}):  # one for each channel
        options = (*options, *split("--channels 4 4"))
    if path.stem != "digits":  # whose reference is trained as well
        options = (*options, "--no-reference")
    in_process(tmp_path, "--config", str(path), *options)
    (saved,) = (tmp_path / "runs").glob("*/report.json")
    report = Report.load(saved)
    for records in report.curves.values():
        assert math.isfinite(records[-1]["losses"]["total"])
    assert set(report.variants) == set(report.curves)
    for row in report.rows:
        if row.kind == "clean":
            assert row.seen


def test_two_processes(tmp_path):
    few = split("--epochs 1 --no-reference --train-limit 64 --test-limit 8 --batch-size 16")
    options = (*QUICK, *few)
    out, _ = finish(start("adv_train", tmp_path, *options, launcher=launch.TWO_PROCESSES))
    found = [path.name for path in (tmp_path / "runs").iterdir()]
    assert found == ["digits-dlif-at-1"]
    assert out.count("| pgd20 |") == 1
    folder = tmp_path / "runs" / "digits-dlif-at-1"
    assert "processes: 2" in (folder / "log.txt").read_text()
    assert len(load_checkpoint(folder / "dlif_at" / "last.pt")["random"]) == 2
