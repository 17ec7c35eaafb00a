"""Trackers of Accelerate are told every epoch, each network in a run of its own."""

import adv_train
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from lab.processes import tracked
from launch import in_process


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


def test_without_trackers_nothing_is_told(tmp_path):
    accelerator = Accelerator(cpu=True)
    with tracked(accelerator, tmp_path, "dlif_at", {}):
        assert accelerator.trackers == []


@pytest.mark.slow
def test_a_training_tells_its_tracker(tmp_path, monkeypatch):
    recorder = Recorder()

    def with_recorder(*_):
        return Accelerator(cpu=True, log_with=[recorder])

    monkeypatch.setattr(adv_train, "make_accelerator", with_recorder)
    few = "--epochs 1 --train-limit 64 --test-limit 8 --batch-size 32 --channels 4 4 --judged 0"
    in_process("adv_train", tmp_path, *few.split())
    steps = [told for told in recorder.told if isinstance(told, tuple)]
    assert [step for step, _ in steps] == [1, 1]  # of both networks
    for _, values in steps:
        assert 0 <= values["validation/clean"] <= 1
        assert values["train/lr"] == 0.1
    assert any(name.startswith("ms_mppd/") for name in steps[0][1])
    assert [told["seed"] for told in recorder.told if isinstance(told, dict)] == [0, 0]
    assert recorder.told.count("finish") == 2
