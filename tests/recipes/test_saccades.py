"""Events made from images in the recipes: certified training, and the bracket of its network."""

from dataclasses import asdict
from shlex import split

import launch
import pytest
from evaluation import recipe_run
from evaluation.recipe_run import undrawn

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import Report
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.models.checkpoint import save_checkpoint

QUICK = split(
    "--dataset saccade:digits --T 3 --channels 4 --flips 2 --train-limit 50 --test-limit 6 "
    "--batch-size 24 --judged 2 --epochs 1 --optimizer adam --lr 0.01 --no-reference"
)
OPTIONS = ("--model-options", "{strides: [2], kernel_size: 4}")


def train(folder, *options):
    with undrawn():
        launch.in_process("adv_train", folder, *QUICK, *OPTIONS, *options)


@pytest.mark.slow
def test_a_certified_run_and_its_evaluation(tmp_path):
    run = tmp_path / "run"
    options = split(f"--mode certified --certified-flips 3 --counts --output {run}")
    train(tmp_path, *options)
    report = Report.load(run / "report.json")
    threat = ThreatModel("L0", 2, counts=True)
    assert report.threat == threat
    assert report.dataset == "saccade:digits"
    assert any("test images" in text and "verified at L0 2" in text for text in report.warnings)
    assert {row.member for row in report.attacks} == {"flips", "random"}
    options = split(f"{run}/dlif_certified --test-limit 3 --no-control --output found")
    recipe_run.in_process(tmp_path, *options)
    found = Report.load(tmp_path / "found" / "report.json")
    assert found.suite == "events"
    assert found.threat == threat  # of the training
    assert found.verified is not None
    assert found.bracket[0].correct <= found.bracket[1].correct


@pytest.mark.slow
def test_a_run_certified_for_moves_of_counts_and_its_evaluation(tmp_path):
    run = tmp_path / "run"
    moves = split("--flips None --moves 2 --largest-shift 1 --counts")
    options = split(f"--mode certified --output {run}")
    train(tmp_path, *moves, *options)
    report = Report.load(run / "report.json")
    threat = ThreatModel("moves", 2, largest_shift=1, counts=True)
    assert report.threat == threat
    assert any("verified at moves 2 by 1 frames" in text for text in report.warnings)
    assert {row.member for row in report.attacks} == {"moves", "random"}
    options = split(f"{run}/dlif_certified --test-limit 3 --no-control --output found")
    recipe_run.in_process(tmp_path, *options)
    found = Report.load(tmp_path / "found" / "report.json")
    assert found.threat == threat  # of the training
    assert found.bracket[0].correct <= found.bracket[1].correct


@pytest.mark.slow
def test_another_mode_is_selected_by_changed_events(tmp_path):
    train(tmp_path, *split(f"--mode at --output {tmp_path / 'run'}"))
    report = Report.load(tmp_path / "run" / "report.json")
    record = report.curves["dlif at"][0]
    assert set(record["validation"]) == {"clean", "flips"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--counts", "counts says what event frames hold, got it for digits; use event data"),
        (
            "--dataset saccade:digits --counts --mode none",
            "counts needs a number of events .*, got none; give --flips or --moves",
        ),
        ("--moves 2", "moves counts moved events, got 2 for digits; use event data"),
        (
            "--dataset saccade:digits --flips 2 --moves 3",
            "flips and moves exclude each other, got 2 and 3; omit one",
        ),
        ("--flips 2", "flips counts changed events, got 2 for digits; use event data"),
        (
            "--dataset saccade:digits --mode certified --certified-flips 1",
            "certified_flips goes with flips or moves, got 1 alone; give --flips",
        ),
        ("--select flips", "select must be one of clean, fgsm, pgd, got 'flips'"),
        (
            "--dataset saccade:digits --flips 2 --select pgd",
            "select must be one of clean, flips, got 'pgd'",
        ),
    ],
)
def test_wrong_use(options, message, tmp_path):
    with pytest.raises((SystemExit, ValueError), match=message):
        launch.in_process("adv_train", tmp_path, *split(options))


@pytest.mark.parametrize(("trained", "held"), [(True, "numbers of events"), (False, "0 or 1")])
def test_counts_may_not_contradict_the_training(tmp_path, trained, held):
    spec = NetworkSpec(image_shape=(2, 14, 14), T=3, channels=(3,), frames=True)
    options = {"dataset": "saccade:digits", "flips": 2, "counts": trained}
    content = {"description": {"network": asdict(spec), "options": options}}
    save_checkpoint(tmp_path / "best.pt", content | {"model": build_classifier(spec).state_dict()})
    message = rf"counts must be {trained} for .* frames of {held}, got --counts {not trained}; omit"
    given = split(f"{tmp_path}/best.pt --counts {not trained} --test-limit 2 --output found")
    with pytest.raises(ValueError, match=message):
        launch.in_process("evaluate", tmp_path, *given)
    assert not (tmp_path / "found").exists()
