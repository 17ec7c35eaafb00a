import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from spikingjelly.activation_based import layer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import TensorDataset
from training import small_run

from sj_robust import DLIFNode
from sj_robust.training import (
    MODES,
    GradientSparsity,
    Journal,
    NonFiniteLossError,
    ThresholdGuarding,
    TrainingInterrupted,
    compilation,
    journal,
    load_checkpoint,
    training_attack,
)


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
    assert load_checkpoint(tmp_path / "a" / "last.pt")["optimizer"]["param_groups"][0]["fused"]


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
    for name in ("retraction", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name} must be >= 0"):
            small_run.run(tmp_path, **{name: -1e-3})
    with pytest.raises(ValueError, match="momentum must be in"):
        small_run.run(tmp_path, momentum=1.0)


def test_a_network_for_another_number_of_classes(tmp_path):
    def build():
        return nn.Sequential(nn.Flatten(2), nn.Linear(16, 2), DLIFNode(T=3, tau=4.0))

    with pytest.raises(ValueError, match="logit for each of the 3 classes, got 2"):
        small_run.run(tmp_path, build=build)


@pytest.mark.parametrize(
    ("mode", "training", "crafting"),
    [("none", 1, 0), ("gaussian", 2, 0), ("at", 2, 1), ("rat", 2, 1), ("pgd_at", 1, 7), ("trades", 2, 11)],
)
def test_a_step_of_a_mode_makes_no_needless_pass(tmp_path, mode, training, crafting):
    """The one pass of trades beyond its steps is the clean prediction."""
    passes = []

    class Watching(Journal):
        def on_step(self, losses):
            steps.append(passes.copy())
            passes.clear()

    def build():
        net = small_run.Net(0.0)
        net.register_forward_pre_hook(lambda module, args: passes.append(module.training))
        return net

    steps = []
    chosen = MODES[mode]
    objective = {"loss": chosen.loss, "kappa": chosen.kappa, "rho": 0.0 if mode == "none" else chosen.rho}
    perturb = training_attack(mode, eps=0.1)
    small_run.run(tmp_path, epochs=1, build=build, objective=objective, perturb=perturb, journal=Watching(None))
    for passes_of_step in steps[1:]:
        assert (passes_of_step.count(True), passes_of_step.count(False)) == (training, crafting)
    assert len(steps) == 4


def tracing(test):
    """While torch traces, it looks at gradients of tensors that have none, and makes objects of its own functions."""
    for warning in ("The .grad attribute:UserWarning", ".*should not be instantiated:DeprecationWarning"):
        test = pytest.mark.filterwarnings(f"ignore:{warning}")(test)
    return test


@tracing
def test_a_compiled_network_trains_the_same_weights(tmp_path, monkeypatch):
    calls = []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    data = small_run.splits(32)
    plain, _ = small_run.run(tmp_path / "plain", epochs=1, data=data)
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(compilation, "_BACKEND", backend)
    history, classifier = small_run.run(tmp_path / "compiled", epochs=1, data=data, compile=True)
    assert calls
    assert history[0].losses == pytest.approx(plain[0].losses, rel=1e-5)
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    calls.clear()
    classifier(torch.rand(7, 1, 4, 4))  # its training over, it is not compiled any more
    assert not calls


@tracing
def test_a_network_that_cannot_be_compiled(tmp_path, monkeypatch):
    def backend(graph, example_inputs):
        raise OSError("no compiler here")

    monkeypatch.setattr(compilation, "_BACKEND", backend)
    with pytest.raises(ValueError, match=r"compile=True, but .* no compiler here.*compile=False"):
        small_run.run(tmp_path, epochs=1, perturb=None, compile=True)


def test_channels_last_changes_the_memory_order_alone(tmp_path):
    seen = []

    def attack(model, x, y, *, generator):
        seen.append((x.is_contiguous(memory_format=torch.channels_last), x.is_contiguous()))
        return small_run.ATTACK(model, x, y, generator=generator)

    images = small_run.splits()
    coloured = [
        TensorDataset(part.tensors[0].repeat(1, 2, 1, 1), part.tensors[1]) for part in (images.train, images.test)
    ]
    data = replace(images, train=coloured[0], validation=coloured[1])
    models = []
    for layout in (None, True):
        options = {"channels_last": layout, "build": two_channels, "data": data, "epochs": 1, "perturb": attack}
        models.append(small_run.run(tmp_path / str(layout), **options)[1])
        AcceleratorState._reset_state(True)
    assert seen == [(False, True)] * 4 + [(True, False)] * 4
    assert models[1].net[0].weight.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_penalties_and_speed_are_in_the_log(tmp_path):
    penalties = [GradientSparsity(0.1), ThresholdGuarding(0.2)]
    options = {"objective": {"penalties": penalties, "kappa": 0.0, "rho": 0.0}, "epochs": 1}
    history, _ = small_run.run(tmp_path, **options, journal=Journal(tmp_path))
    losses = history[0].losses
    parts = (losses["penalty/gradient_sparsity"], losses["penalty/threshold_guarding"])
    assert 0.1 * parts[0] + 0.2 * parts[1] == pytest.approx(losses["penalty"], rel=1e-5)
    text = (tmp_path / "log.txt").read_text()
    expected = (
        f"perturbed {losses['perturbed']:.3f}, gradient_sparsity {parts[0]:.3f}, threshold_guarding {parts[1]:.3f})"
    )
    assert f"({expected}, accuracy {losses['accuracy_perturbed']:.1%}; validation" in text  # no clean pass, none shown
    assert re.search(r"; \d+ images/s; ", text)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    shown = set(events.Tags()["scalars"])
    assert {"train/images_per_second", "train/penalty/gradient_sparsity", "train/total", "validation/pgd"} <= shown
    assert {"input_gain/parts.1/t0", "ms_mppd/parts.1"} <= shown
    assert {"l2_gain/parts.1", "peak_gain/parts.1"} <= shown


def two_channels():
    return nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1, step_mode="m"),
        layer.BatchNorm2d(4, step_mode="m"),
        DLIFNode(T=3, tau=4.0),
        layer.Flatten(step_mode="m"),
        layer.Linear(64, 3, step_mode="m"),
    )
