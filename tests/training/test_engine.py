import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from training import small_run

from sj_robust import DLIFNode
from sj_robust.training import Journal, NonFiniteLossError, TrainingInterrupted, journal, load_checkpoint


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(True)


def weights(folder, name="last.pt"):
    return load_checkpoint(Path(folder) / name)["model"]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class After:
    """The training attack, and something else at one of its calls."""

    def __init__(self, call, action):
        self.call, self.action, self.calls = call, action, 0

    def __call__(self, model, x, y, *, generator):
        self.calls += 1
        if self.calls == self.call:
            self.action()
        return small_run.ATTACK(model, x, y, generator=generator)


class PowerCutError(Exception):
    pass


def power_cut():
    raise PowerCutError


def test_it_learns_and_leaves_what_it_promises(tmp_path):
    history, classifier = small_run.run(tmp_path, epochs=6)
    assert [record.epoch for record in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].losses["clean"] < history[0].losses["clean"] / 5
    assert history[-1].validation["pgd"] > 0.9
    assert [record.lr for record in history] == sorted((record.lr for record in history), reverse=True)
    assert_same(weights(tmp_path), classifier.state_dict())
    best = max(range(6), key=lambda epoch: history[epoch].validation["pgd"])
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == best + 1


def test_the_first_step_is_sgd_with_weight_decay_on_every_parameter_also_the_gain(tmp_path):
    data = small_run.splits(16)
    _, classifier = small_run.run(tmp_path / "a", data=data, epochs=1, perturb=None, weight_decay=0.3)
    AcceleratorState._reset_state(True)
    _, start = small_run.run(tmp_path / "b", data=data, epochs=1, perturb=None, lr=1e-30)
    x, y = data.train.tensors
    start.zero_grad()
    torch.nn.functional.cross_entropy(start.train()(x), y).backward()
    after = dict(classifier.named_parameters())
    assert any(isinstance(module, DLIFNode) for module in start.modules())
    for name, value in start.named_parameters():
        torch.testing.assert_close(after[name], value - 0.1 * (value.grad + 0.3 * value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpoint_steps", [None, 1, 3])
@pytest.mark.parametrize("call", [2, 6, 9])
def test_a_run_that_was_cut_off_ends_at_the_same_weights(tmp_path, call, checkpoint_steps):
    whole, _ = small_run.run(tmp_path / "whole", dropout=0.3)
    with pytest.raises(PowerCutError):
        small_run.run(tmp_path / "cut", dropout=0.3, checkpoint_steps=checkpoint_steps, perturb=After(call, power_cut))
    torch.manual_seed(99)  # whatever ran in between
    options = {"checkpoint_steps": checkpoint_steps, "resume": True}
    history, _ = small_run.run(tmp_path / "cut", dropout=0.3, **options)
    assert history == whole
    for name in ("last.pt", "best.pt"):
        assert_same(weights(tmp_path / "whole", name), weights(tmp_path / "cut", name))


def test_the_noise_of_a_step_does_not_depend_on_what_ran_before(tmp_path):
    seen = {}

    def watch(key):
        def attack(model, x, y, *, generator):
            seen.setdefault(key, []).extend(generator.seeds)
            return small_run.ATTACK(model, x, y, generator=generator)

        return attack

    small_run.run(tmp_path / "a", perturb=watch("a"))
    small_run.run(tmp_path / "b", perturb=watch("b"), seed=4)
    assert len(set(seen["a"])) == len(seen["a"]) == 3 * 64
    assert not set(seen["a"]) & set(seen["b"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(tmp_path, number):
    whole, _ = small_run.run(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match="--resume") as error:
        small_run.run(tmp_path / "cut", perturb=After(6, lambda: os.kill(os.getpid(), number)))
    assert error.value.signal_number == number
    assert signal.getsignal(number) is before
    content = load_checkpoint(tmp_path / "cut" / "last.pt")
    assert (content["epoch"], content["batch"]) == (1, 2)
    history, _ = small_run.run(tmp_path / "cut", resume=True)
    assert history == whole
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.fixture
def python_handles_ctrl_c():
    """A shell may have started the tests in the background, where SIGINT is ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_ctrl_c_during_the_last_validation_is_not_lost(tmp_path, monkeypatch):
    def attack(model, x, y, *, generator):
        if not stopped:
            stopped.append(signal.raise_signal(signal.SIGINT))
        return x

    stopped = []
    monkeypatch.setattr(small_run, "VALIDATION", {"fgsm": attack, "pgd": attack})
    with pytest.raises(TrainingInterrupted, match="continues with --resume"):
        small_run.run(tmp_path, epochs=1)
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)  # handled before it returns, unlike os.kill
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        small_run.run(tmp_path, perturb=After(6, twice))
    assert load_checkpoint(tmp_path / "last.pt")["batch"] == 0


def test_a_run_stopped_in_validation_resumes_with_that_validation(tmp_path, monkeypatch):
    """The process that resumes has trained no batch when its first epoch ends."""
    validation = dict(small_run.VALIDATION)
    monkeypatch.setattr(small_run, "VALIDATION", validation | {"pgd": lambda *_, **__: power_cut()})
    with pytest.raises(PowerCutError):
        small_run.run(tmp_path, epochs=3, checkpoint_steps=4)
    assert load_checkpoint(tmp_path / "last.pt")["batch"] == 4
    clock = SimpleNamespace(now=0.0, strftime=time.strftime)
    clock.monotonic = lambda: clock.now

    class Timed(Journal):
        def on_step(self, losses):
            clock.now += 4
            super().on_step(losses)

    def timed(model, x, y, *, generator):
        clock.now += 2
        return x

    monkeypatch.setattr(small_run, "VALIDATION", validation | {"pgd": timed})
    monkeypatch.setattr(journal, "time", clock)
    options = {"epochs": 3, "checkpoint_steps": 4, "resume": True}
    history, _ = small_run.run(tmp_path, **options, journal=Timed(tmp_path))
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "epoch" in line]
    assert "left" not in lines[0]
    assert "images/s" not in lines[0]
    # 2 s of validation, then an epoch of 4 steps of 16 images and another validation, with one more to go
    assert lines[1].endswith("; 4 images/s; 20 s left")
    assert lines[2].endswith("; 4 images/s; 0 s left")
    assert len(history) == 3


@pytest.mark.parametrize("single_step_attack", [True, False])
def test_overfitting_is_looked_for_only_where_a_single_step_attack_trains(tmp_path, monkeypatch, single_step_attack):
    calls = []

    def pgd(model, x, y, *, generator):
        calls.append(len(calls))
        return x if len(calls) == 1 else 1 - x  # harmless in the first epoch, fatal afterwards

    monkeypatch.setattr(small_run, "VALIDATION", {"fgsm": lambda model, x, y, *, generator: x, "pgd": pgd})
    small_run.run(tmp_path, epochs=6, journal=Journal(tmp_path), single_step_attack=single_step_attack)
    assert ("catastrophic overfitting" in (tmp_path / "log.txt").read_text()) == single_step_attack


def test_a_loss_that_is_not_finite(tmp_path):
    nan = After(6, lambda: None)

    def attack(model, x, y, *, generator):
        x_adv = nan(model, x, y, generator=generator)
        return x_adv * float("nan") if nan.calls == 6 else x_adv

    with pytest.raises(NonFiniteLossError, match=r"total=nan.* epoch 2, step 2; the last good checkpoint"):
        small_run.run(tmp_path, perturb=attack)
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("step", [6, 8])  # within an epoch, and its last
def test_broken_weights_never_reach_a_checkpoint(tmp_path, step):
    models = []

    def attack(model, x, y, *, generator):
        models.append(model)
        return small_run.ATTACK(model, x, y, generator=generator)

    class Breaking(Journal):
        def on_step(self, losses):
            if len(models) == step:
                next(models[0].parameters()).data[0] = float("nan")

    with pytest.raises(NonFiniteLossError, match=r"net.parts.0.weight holds NaN .* epoch 2.* is intact"):
        small_run.run(tmp_path, perturb=attack, journal=Breaking(None), checkpoint_steps=2)
    content = load_checkpoint(tmp_path / "last.pt")
    assert (content["epoch"], content["batch"]) == (1, 0 if step == 6 else 2)
    assert not load_checkpoint(tmp_path / "best.pt")["model"]["net.parts.0.weight"].isnan().any()


def test_a_checkpoint_of_other_options(tmp_path):
    small_run.run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"other options \(plan\.lr: .*, 0\.3 now\)"):
        small_run.run(tmp_path, epochs=1, lr=0.3, resume=True)


def test_wrong_use(tmp_path):
    with pytest.raises(ValueError, match="epochs must be >= 1"):
        small_run.run(tmp_path, epochs=0)
    with pytest.raises(ValueError, match="lr must be > 0"):
        small_run.run(tmp_path, lr=0.0)
    with pytest.raises(ValueError, match="batch_size"):
        small_run.run(tmp_path, batch_size=65)
