import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset
from training import small_run

from sj_robust import DLIFNode
from sj_robust.proofs.gains import l2_gain, peak_gain
from sj_robust.training import (
    GradientSparsity,
    Journal,
    ThresholdGuarding,
    TrainingInterrupted,
    load_checkpoint,
    processes,
    retract_,
)


def weights(folder, name="last.pt"):
    return load_checkpoint(Path(folder) / name)["model"]


assert_same = partial(assert_close, rtol=0, atol=0)


def test_it_learns_and_leaves_what_it_promises(tmp_path):
    history, classifier = small_run.run(tmp_path, epochs=6)
    assert [record.epoch for record in history] == [1, 2, 3, 4, 5, 6]
    first = history[0]
    last = history[-1]
    assert last.losses["clean"] < first.losses["clean"] / 5
    assert last.validation["pgd"] > 0.9
    rates = [record.lr for record in history]
    assert rates == sorted(rates, reverse=True)
    assert_same(weights(tmp_path), dict(classifier.state_dict()))
    best = max(history, key=lambda record: record.validation["pgd"])
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == best.epoch
    with pytest.raises(ValueError, match="plan.lr"):
        small_run.run(tmp_path, epochs=6, lr=0.3, resume=True)


def back_propagate(classifier, data):
    """Gradients of the loss of one whole batch."""
    x, y = data.train.tensors
    classifier.zero_grad()
    logits = classifier.train()(x)
    torch.nn.functional.cross_entropy(logits, y).backward()


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_a_second_step_has_momentum_and_the_cosine_learning_rate(tmp_path, momentum):
    data = small_run.splits(16, torch.float64)
    options = {
        "data": data,
        "dtype": torch.float64,
        "perturb": None,
        "momentum": momentum,
    }
    _, trained = small_run.run(tmp_path / "a", epochs=2, weight_decay=0.3, **options)
    _, by_hand = small_run.run(tmp_path / "b", epochs=1, lr=1e-12, **options)
    velocity = {name: torch.zeros_like(value) for name, value in by_hand.named_parameters()}
    for lr in (0.1, 0.05):
        back_propagate(by_hand, data)
        for name, value in by_hand.named_parameters():
            decayed = value.grad + 0.3 * value.detach()
            velocity[name] = momentum * velocity[name] + decayed
            value.data -= lr * velocity[name]
    for name, value in by_hand.named_parameters():
        assert_close(trained.get_parameter(name), value, rtol=1e-9, atol=1e-12)


def test_a_step_ends_with_the_retraction_of_the_plan(tmp_path):
    one_step = {"data": small_run.splits(16), "epochs": 1, "perturb": None}
    _, retracted = small_run.run(tmp_path / "a", **one_step, retraction=0.05)
    _, plain = small_run.run(tmp_path / "b", **one_step)
    first = retracted.net.parts[0].weight
    assert not torch.equal(first, plain.net.parts[0].weight)
    retract_(plain, 0.05)  # all rows, since no layer has 200 of them
    assert_same(dict(retracted.state_dict()), dict(plain.state_dict()))


def test_the_noise_of_a_step_does_not_depend_on_what_ran_before(tmp_path):
    def seeds_of(seed):
        seeds = []

        def attack(model, x, y, *, generator):
            seeds.extend(generator.seeds)
            return x

        small_run.run(tmp_path / str(seed), perturb=attack, seed=seed)
        assert len(seeds) == 3 * 64
        return set(seeds)

    seeds = seeds_of(3)
    assert len(seeds) == 3 * 64
    assert seeds.isdisjoint(seeds_of(4))


def test_ctrl_c_during_the_last_validation_is_not_lost(tmp_path):
    stopped = []

    def attack(model, x, y, *, generator):
        if not stopped:
            stopped.append(True)
            signal.raise_signal(signal.SIGINT)
        return x

    with pytest.raises(TrainingInterrupted, match="continues with --resume"):
        small_run.run(tmp_path, epochs=1, attacks={"fgsm": attack, "pgd": attack})
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("single_step_attack", [True, False])
def test_overfitting_is_looked_for_only_where_a_single_step_attack_trains(
    tmp_path, single_step_attack
):
    calls = []

    def pgd(model, x, y, *, generator):
        calls.append(len(calls))
        return x if len(calls) == 1 else 1 - x  # harmless in the first epoch, fatal afterwards

    def fgsm(model, x, y, *, generator):
        return x

    small_run.run(
        tmp_path,
        epochs=6,
        data=small_run.splits(16),
        attacks={"fgsm": fgsm, "pgd": pgd},
        single_step_attack=single_step_attack,
        journal=Journal(tmp_path),
    )
    log = (tmp_path / "log.txt").read_text()
    assert ("catastrophic overfitting" in log) == single_step_attack


def tracing(test):
    """While torch traces, it looks at gradients of tensors that have none, and makes objects of its
    own functions.
    """
    ignore = pytest.mark.filterwarnings(
        "ignore:The .grad attribute:UserWarning",
        "ignore:.*should not be instantiated:DeprecationWarning",
    )
    return ignore(test)


@pytest.mark.slow
@tracing
def test_a_compiled_network_trains_the_same_weights(tmp_path, monkeypatch):
    calls = []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    attacks = dict.fromkeys(("fgsm", "pgd"), lambda model, x, y, *, generator: x)
    options = {"epochs": 1, "data": small_run.splits(16), "attacks": attacks}
    plain, _ = small_run.run(tmp_path / "plain", **options)
    monkeypatch.setattr(processes, "_BACKEND", backend)
    history, classifier = small_run.run(tmp_path / "compiled", **options, compile=True)
    assert calls
    assert history[0].losses == pytest.approx(plain[0].losses, rel=1e-5)
    assert_close(weights(tmp_path / "plain"), weights(tmp_path / "compiled"))
    calls.clear()
    classifier(torch.rand(7, 1, 4, 4))  # its training over, it is not compiled any more
    assert not calls


@pytest.mark.slow
@tracing
@pytest.mark.parametrize(("takes", "reached"), [("sequence", 0), ("images", 0), ("steps", 2)])
def test_only_a_network_that_runs_all_steps_at_once_is_reset_in_the_graph(
    monkeypatch, takes, reached
):
    monkeypatch.setattr(processes, "_BACKEND", "eager")
    net = nn.Sequential(nn.Linear(3, 2), DLIFNode(T=4))
    with processes.compiled(net, takes=takes):
        net(torch.rand(2, 1, 3))
        assert net[1].time_step == reached
    assert "forward" not in vars(net)


def coloured(part):
    """Every image twice, as two channels."""
    x, y = part.tensors
    return TensorDataset(x.repeat(1, 2, 1, 1), y)


def two_channels():
    return small_run.batch_norm_net(2)


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_changes_the_memory_order_alone(tmp_path):
    seen = []

    def attack(model, x, y, *, generator):
        seen.append(is_channels_last(x))
        assert x.is_contiguous() is not seen[-1]
        return small_run.ATTACK(model, x, y, generator=generator)

    images = small_run.splits()
    data = replace(images, train=coloured(images.train), validation=coloured(images.test))
    options = {
        "build": two_channels,
        "data": data,
        "epochs": 1,
        "perturb": attack,
    }
    _, usual = small_run.run(tmp_path / "usual", **options)
    _, last = small_run.run(tmp_path / "last", **options, channels_last=True)
    assert seen == [False] * 4 + [True] * 4  # the CPU's default first
    assert is_channels_last(last.net[0].weight)
    for name, value in usual.named_parameters():
        assert_close(last.get_parameter(name), value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run of two epochs with penalties and without a clean pass: folder, history, classifier."""
    folder = tmp_path_factory.mktemp("logged")
    penalties = [GradientSparsity(0.1), ThresholdGuarding(0.2)]
    history, classifier = small_run.run(
        folder,
        epochs=2,
        objective={"penalties": penalties, "kappa": 0.0, "rho": 0.0},
        journal=Journal(folder),
    )
    return SimpleNamespace(folder=folder, history=history, classifier=classifier)


SHOWN = {
    "train/images_per_second",
    "train/penalty/gradient_sparsity",
    "train/total",
    "train/lr",
    "train/mppd",
    "validation/clean",
    "validation/fgsm",
    "validation/pgd",
    "input_gain/parts.1/t0",
    "input_gain/parts.1/t1",
    "input_gain/parts.1/t2",
}


def test_losses_and_gains_are_in_tensorboard(logged):
    (folder,) = (logged.folder / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert SHOWN.issubset(events.Tags()["scalars"])
    moved = events.Scalars("ms_mppd/parts.1")
    assert [event.step for event in moved] == [1, 2]
    for event in moved:
        assert event.value > 0
    node = logged.classifier.net.parts[1]
    shown = {"l2_gain/parts.1": l2_gain, "peak_gain/parts.1": peak_gain}
    for name, gain in shown.items():
        first, last = events.Scalars(name)
        assert first.value != last.value, "the gains move with training"
        expected = float(gain(node.decay, 3, node.input_gain))
        assert last.value == pytest.approx(expected, rel=1e-6)
