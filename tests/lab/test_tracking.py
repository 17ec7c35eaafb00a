"""Trackers of Accelerate are told every epoch, each network in a run of its own."""

import adv_train
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from lab.command_line import check_options
from lab.tracking import tracked
from launch import in_process

from sj_robust.core import extras
from sj_robust.training.journal import EpochRecord, Journal
from sj_robust.training.objective import Losses


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.told = []

    @property
    def tracker(self):
        return self.told

    def start(self):
        self.told.append("start")

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step=None, **more):
        self.told.append((step, values))

    def finish(self):
        self.told.append("finish")


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(True)


def test_every_network_is_a_run_and_every_epoch_a_step(tmp_path):
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=[recorder])
    journal = Journal(tmp_path, track=accelerator.log)
    record = EpochRecord(1, dict.fromkeys(Losses._fields, 0.5), {"clean": 0.5}, 0.1)
    for name in ("dlif_at", "lif_undefended"):
        recorder.told.clear()
        sizes = {"epochs": 1, "batches": 2, "images": 4, "epoch": 0, "batch": 0}
        with (
            tracked(accelerator, tmp_path, name, {"T": 4}),
            journal.follow(name, **sizes),
        ):
            journal.on_epoch(record, {"ms_mppd/0": 0.25}, None)
        *begun, (step, values), ended = recorder.told
        assert begun[-1] == {"T": 4}
        assert ended == "finish"
        assert step == 1
        assert values["validation/clean"] == 0.5
        assert values["train/lr"] == 0.1
        assert values["ms_mppd/0"] == 0.25
    accelerator.end_training()
    assert recorder.told.count("finish") == 1


def test_without_trackers_nothing_is_told(tmp_path):
    accelerator = Accelerator(cpu=True)
    with tracked(accelerator, tmp_path, "dlif_at", {}):
        assert accelerator.trackers == []


def test_a_tracker_that_is_missing_is_named_with_its_command(monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="the tracker wandb is not installed: pip install wandb"):
        check_options(adv_train.Options, ["--trackers", "wandb"])


@pytest.mark.slow
def test_a_training_tells_its_tracker(tmp_path, monkeypatch):
    recorder = Recorder()

    def with_recorder(*_):
        return Accelerator(cpu=True, log_with=[recorder])

    monkeypatch.setattr(adv_train, "make_accelerator", with_recorder)
    few = "--epochs 1 --train-limit 64 --test-limit 8 --batch-size 32 --channels 4 4"
    in_process("adv_train", tmp_path, *few.split())
    steps = [told for told in recorder.told if isinstance(told, tuple)]
    assert [step for step, _ in steps] == [1, 1]  # of both networks
    assert recorder.told.count("finish") == 2
