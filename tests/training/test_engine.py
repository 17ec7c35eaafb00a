import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import TensorDataset
from training import small_run
from training.small_run import At, PowerCutError, power_cut

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.data import ShuffledBatches
from sj_robust.models.checkpoint import save_checkpoint
from sj_robust.neuron.fusion import plain_names
from sj_robust.perturbation.gains import l2_gain, peak_gain
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
    memory_order,
    retract_,
    training_attack,
)


def weights(folder, name="last.pt"):
    return load_checkpoint(Path(folder) / name)["model"]


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def test_it_learns_and_leaves_what_it_promises(tmp_path):
    history, classifier = small_run.run(tmp_path, epochs=6)
    assert [record.epoch for record in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].losses["clean"] < history[0].losses["clean"] / 5
    assert history[-1].validation["pgd"] > 0.9
    assert [record.lr for record in history] == sorted(
        (record.lr for record in history), reverse=True
    )
    assert_same(weights(tmp_path), dict(classifier.state_dict()))
    best = max(range(6), key=lambda epoch: history[epoch].validation["pgd"])
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == best + 1
    with pytest.raises(ValueError, match=r"other options \(plan\.lr: .*, 0\.3 now\)"):
        small_run.run(tmp_path, epochs=6, lr=0.3, resume=True)


@pytest.mark.parametrize(
    ("units", "precision", "named"),
    [("amx_bf16", "no", True), ("amx_bf16", "bf16", False), (None, "no", False)],
)
def test_the_log_recommends_bfloat16_where_the_processor_multiplies_it(
    tmp_path, monkeypatch, units, precision, named
):
    monkeypatch.setattr(journal, "bfloat16_units", lambda: units)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), mixed_precision=precision, num_processes=1
    )
    Journal(tmp_path).begin({}, {}, accelerator)
    assert ("--mixed-precision bf16" in (tmp_path / "log.txt").read_text()) == named


def test_the_first_step_is_sgd_with_weight_decay_on_every_parameter_also_the_gain(tmp_path):
    data = small_run.splits(16)
    _, classifier = small_run.run(
        tmp_path / "a", data=data, epochs=1, perturb=None, weight_decay=0.3
    )
    _, start = small_run.run(tmp_path / "b", data=data, epochs=1, perturb=None, lr=1e-30)
    x, y = data.train.tensors
    start.zero_grad()
    torch.nn.functional.cross_entropy(start.train()(x), y).backward()
    after = dict(classifier.named_parameters())
    assert any(isinstance(module, DLIFNode) for module in start.modules())
    for name, value in start.named_parameters():
        torch.testing.assert_close(
            after[name], value - 0.1 * (value.grad + 0.3 * value), rtol=1e-5, atol=1e-6
        )
    assert load_checkpoint(tmp_path / "a" / "last.pt")["optimizer"]["param_groups"][0]["fused"]


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_a_second_step_has_momentum_and_the_cosine_learning_rate(tmp_path, momentum):
    data = small_run.splits(16, torch.float64)
    options = {"data": data, "dtype": torch.float64, "perturb": None, "momentum": momentum}
    _, trained = small_run.run(tmp_path / "a", epochs=2, weight_decay=0.3, **options)
    _, by_hand = small_run.run(tmp_path / "b", epochs=1, lr=1e-30, **options)
    x, y = data.train.tensors
    velocity = {name: torch.zeros_like(value) for name, value in by_hand.named_parameters()}
    for lr in (0.1, 0.05):
        by_hand.zero_grad()
        torch.nn.functional.cross_entropy(by_hand.train()(x), y).backward()
        for name, value in by_hand.named_parameters():
            velocity[name] = momentum * velocity[name] + value.grad + 0.3 * value.detach()
            value.data -= lr * velocity[name]
    for name, value in by_hand.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_a_gradient_longer_than_the_clip_is_scaled_down_to_it(tmp_path, clip):
    one_step = {"data": small_run.splits(16), "epochs": 1, "perturb": None, "momentum": 0.0}
    one_step |= {"weight_decay": 0.0, "lr": 1.0}
    _, start = small_run.run(tmp_path / "a", **one_step | {"lr": 1e-30})
    _, plain = small_run.run(tmp_path / "b", **one_step)
    _, clipped = small_run.run(tmp_path / "c", gradient_clip=clip, **one_step)
    first, *after = (
        nn.utils.parameters_to_vector(net.parameters()).detach() for net in (start, plain, clipped)
    )
    steps = [weights - first for weights in after]
    length = float(steps[0].norm())
    assert length > 0.02
    torch.testing.assert_close(steps[1], steps[0] * min(1.0, clip / length), rtol=1e-3, atol=1e-6)


def test_the_learning_rate_falls_to_a_fifth_at_milestones_also_in_a_resumed_run(tmp_path):
    options = {"epochs": 5, "milestones": (0.4, 0.8), "perturb": small_run.ATTACK}
    with pytest.raises(PowerCutError):
        small_run.run(tmp_path, **options | {"perturb": At(14, power_cut)})
    history, _ = small_run.run(tmp_path, **options, resume=True)
    rates = [record.lr for record in history]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004])


def test_statistics_are_means_over_batches_with_the_last_weights(tmp_path):
    options = {"build": small_run.batch_norm_net, "epochs": 2, "perturb": None}
    _, moving = small_run.run(tmp_path / "a", **options)
    _, measured = small_run.run(tmp_path / "b", precise_statistics=3, **options)
    assert_same(dict(moving.named_parameters()), dict(measured.named_parameters()))
    first = measured.net[1]
    batches = ShuffledBatches(64, 16, seed=3)
    images = small_run.splits().train.tensors[0]
    seen = [measured.net[0](images[batches.indices(1, i)].unsqueeze(0))[0] for i in range(3)]
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    torch.testing.assert_close(first.running_mean, means.detach(), rtol=1e-5, atol=1e-6)
    # a batch norm counts its images T times, which divides by another number less one
    torch.testing.assert_close(first.running_var, variances.detach(), rtol=1e-2, atol=1e-6)
    assert first.momentum == moving.net[1].momentum == 0.1
    assert not torch.allclose(first.running_mean, moving.net[1].running_mean)


def test_a_step_ends_with_the_retraction_of_the_plan(tmp_path):
    one_step = {"data": small_run.splits(16), "epochs": 1, "perturb": None}
    _, retracted = small_run.run(tmp_path / "a", **one_step, retraction=0.05)
    _, plain = small_run.run(tmp_path / "b", **one_step)
    assert not torch.equal(retracted.net.parts[0].weight, plain.net.parts[0].weight)
    retract_(plain, 0.05)  # all rows, since no layer has 200 of them
    assert_same(dict(retracted.state_dict()), dict(plain.state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_steps", [None, 1, 3])
@pytest.mark.parametrize("call", [2, 6, 9])
def test_a_run_that_was_cut_off_ends_at_the_same_weights(tmp_path, whole, call, checkpoint_steps):
    options = {"dropout": 0.3, "checkpoint_steps": checkpoint_steps}
    with pytest.raises(PowerCutError):
        small_run.run(tmp_path, **options, perturb=At(call, power_cut))
    torch.manual_seed(99)  # whatever ran in between
    history, _ = small_run.run(tmp_path, **options, resume=True)
    assert history == whole.history
    for name, expected in whole.weights.items():
        assert_same(expected, weights(tmp_path, name))


def test_a_run_that_began_before_there_were_stages_goes_on(tmp_path):
    build = small_run.batch_norm_net
    small_run.run(tmp_path, epochs=1, build=build)
    path = tmp_path / "last.pt"
    content = load_checkpoint(path)
    plain = plain_names(SpikingClassifier(build(), T=3))
    before = {plain[key]: value for key, value in content["model"].items()}
    of_the_file = {"format", "version"}
    kept = {name: value for name, value in content.items() if name not in of_the_file}
    save_checkpoint(path, kept | {"model": before})
    assert before.keys() != content["model"].keys()
    _, classifier = small_run.run(tmp_path, epochs=1, build=build, resume=True)
    assert_same(dict(classifier.state_dict()), content["model"])


def test_the_noise_of_a_step_does_not_depend_on_what_ran_before(tmp_path):
    seen = {3: [], 4: []}
    for seed, seeds in seen.items():

        def attack(model, x, y, *, generator, seeds=seeds):
            seeds.extend(generator.seeds)
            return x

        small_run.run(tmp_path / str(seed), perturb=attack, seed=seed)
    assert len(set(seen[3])) == len(seen[3]) == 3 * 64
    assert not set(seen[3]) & set(seen[4])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(tmp_path, whole, number):
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match="--resume") as error:
        small_run.run(tmp_path, dropout=0.3, perturb=At(6, lambda *_: os.kill(os.getpid(), number)))
    assert error.value.signal_number == number
    assert signal.getsignal(number) is before
    content = load_checkpoint(tmp_path / "last.pt")
    assert (content["epoch"], content["batch"]) == (1, 2)
    history, _ = small_run.run(tmp_path, dropout=0.3, resume=True)
    assert history == whole.history
    assert_same(whole.weights["last.pt"], weights(tmp_path))


def test_ctrl_c_during_the_last_validation_is_not_lost(tmp_path):
    def attack(model, x, y, *, generator):
        if not stopped:
            stopped.append(signal.raise_signal(signal.SIGINT))
        return x

    stopped = []
    with pytest.raises(TrainingInterrupted, match="continues with --resume"):
        small_run.run(tmp_path, epochs=1, attacks={"fgsm": attack, "pgd": attack})
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(*_):
        signal.raise_signal(signal.SIGINT)  # handled before it returns, unlike os.kill
        signal.raise_signal(signal.SIGINT)

    # A shell may have started the tests in the background, where SIGINT is ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            small_run.run(tmp_path, perturb=At(6, twice))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert load_checkpoint(tmp_path / "last.pt")["batch"] == 0


def test_a_run_stopped_in_validation_resumes_with_that_validation(tmp_path, monkeypatch):
    """The process that resumes has trained no batch when its first epoch ends."""
    options = {"epochs": 3, "checkpoint_steps": 4}
    with pytest.raises(PowerCutError):
        small_run.run(
            tmp_path,
            **options,
            attacks=small_run.VALIDATION | {"pgd": lambda *_, **__: power_cut()},
        )
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

    monkeypatch.setattr(journal, "time", clock)
    attacks = small_run.VALIDATION | {"pgd": timed}
    history, _ = small_run.run(
        tmp_path, **options, resume=True, attacks=attacks, journal=Timed(tmp_path)
    )
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "epoch" in line]
    assert "left" not in lines[0]
    assert "images/s" not in lines[0]
    # 2 s of validation, then an epoch of 4 steps of 16 images and another validation, with one more
    # to go
    assert lines[1].endswith("; 4 images/s; 20 s left")
    assert lines[2].endswith("; 4 images/s; 0 s left")
    assert len(history) == 3


@pytest.mark.parametrize("single_step_attack", [True, False])
def test_overfitting_is_looked_for_only_where_a_single_step_attack_trains(
    tmp_path, single_step_attack
):
    calls = []

    def pgd(model, x, y, *, generator):
        calls.append(len(calls))
        return x if len(calls) == 1 else 1 - x  # harmless in the first epoch, fatal afterwards

    attacks = {"fgsm": lambda model, x, y, *, generator: x, "pgd": pgd}
    options = {"epochs": 6, "attacks": attacks, "single_step_attack": single_step_attack}
    small_run.run(tmp_path, **options, journal=Journal(tmp_path))
    assert ("catastrophic overfitting" in (tmp_path / "log.txt").read_text()) == single_step_attack


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

    with pytest.raises(
        NonFiniteLossError, match=r"net.parts.0.weight holds NaN .* epoch 2.* is intact"
    ):
        small_run.run(tmp_path, perturb=attack, journal=Breaking(None), checkpoint_steps=2)
    content = load_checkpoint(tmp_path / "last.pt")
    assert (content["epoch"], content["batch"]) == (1, 0 if step == 6 else 2)
    assert not load_checkpoint(tmp_path / "best.pt")["model"]["net.parts.0.weight"].isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"batch_size": 65}, "batch_size must be from 1 to the number of training images, 64"),
        ({"retraction": -1e-3}, "retraction must be >= 0"),
        ({"weight_decay": -1e-3}, "weight_decay must be >= 0"),
        ({"momentum": 1.0}, "momentum must be in"),
        (
            {"milestones": (0.5, 1.0)},
            r"milestones must be in \(0, 1\), got \[1.0\]; they are shares",
        ),
        ({"precise_statistics": -1}, "precise_statistics must be >= 0, got -1; it is a number"),
        ({"gradient_clip": 0.0}, "gradient_clip must be > 0 and finite, got 0.0; None"),
        (
            {
                "build": lambda: nn.Sequential(
                    nn.Flatten(2), nn.Linear(16, 2), DLIFNode(T=3, tau=4.0)
                )
            },
            "logit for each of the 3 classes, got 2",
        ),
    ],
)
def test_wrong_use(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        small_run.run(tmp_path, **options)


@pytest.mark.parametrize(
    ("mode", "training", "crafting"),
    [
        ("none", 1, 0),
        ("gaussian", 2, 0),
        ("at", 2, 1),
        ("rat", 2, 1),
        ("pgd_at", 1, 7),
        ("trades", 2, 11),
    ],
)
def test_a_step_of_a_mode_makes_no_needless_pass(tmp_path, mode, training, crafting):
    """The one pass of trades beyond its steps is the clean prediction."""
    passes, steps = [], []

    class Watching(Journal):
        def on_step(self, losses):
            steps.append((passes.count(True), passes.count(False)))
            passes.clear()

    def build():
        net = small_run.Net(0.0)
        net.register_forward_pre_hook(lambda module, args: passes.append(module.training))
        return net

    chosen = MODES[mode]
    objective = {
        "loss": chosen.loss,
        "kappa": chosen.kappa,
        "rho": 0.0 if mode == "none" else chosen.rho,
    }
    perturb = training_attack(mode, eps=0.1)
    small_run.run(
        tmp_path,
        epochs=1,
        build=build,
        objective=objective,
        perturb=perturb,
        journal=Watching(None),
    )
    assert steps[1:] == [(training, crafting)] * 3


def tracing(test):
    """While torch traces, it looks at gradients of tensors that have none, and makes objects of its
    own functions.
    """
    for warning in (
        "The .grad attribute:UserWarning",
        ".*should not be instantiated:DeprecationWarning",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{warning}")(test)
    return test


@pytest.mark.slow
@tracing
def test_a_compiled_network_trains_the_same_weights(tmp_path, monkeypatch):
    calls = []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    data = small_run.splits(32)
    plain, _ = small_run.run(tmp_path / "plain", epochs=1, data=data)
    monkeypatch.setattr(compilation, "_BACKEND", backend)
    history, classifier = small_run.run(tmp_path / "compiled", epochs=1, data=data, compile=True)
    assert calls
    assert history[0].losses == pytest.approx(plain[0].losses, rel=1e-5)
    torch.testing.assert_close(weights(tmp_path / "plain"), weights(tmp_path / "compiled"))
    calls.clear()
    classifier(torch.rand(7, 1, 4, 4))  # its training over, it is not compiled any more
    assert not calls


@pytest.mark.slow
@tracing
@pytest.mark.parametrize(("takes", "reached"), [("sequence", 0), ("images", 0), ("steps", 2)])
def test_only_a_network_that_runs_all_steps_at_once_is_reset_in_the_graph(
    monkeypatch, takes, reached
):
    monkeypatch.setattr(compilation, "_BACKEND", "eager")
    net = nn.Sequential(nn.Linear(3, 2), DLIFNode(T=4))
    with compilation.compiled(net, takes=takes):
        net(torch.rand(2, 1, 3))
        assert net[1].time_step == reached
    assert "forward" not in vars(net)


@pytest.mark.slow
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
        TensorDataset(part.tensors[0].repeat(1, 2, 1, 1), part.tensors[1])
        for part in (images.train, images.test)
    ]
    data = replace(images, train=coloured[0], validation=coloured[1])
    options = {
        "build": lambda: small_run.batch_norm_net(2),
        "data": data,
        "epochs": 1,
        "perturb": attack,
    }
    models = [
        small_run.run(tmp_path / str(one), **options, channels_last=one)[1] for one in (None, True)
    ]
    assert seen == [(False, True)] * 4 + [(True, False)] * 4
    assert models[1].net[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        *(list(model.parameters()) for model in models), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("slow", "chosen"), [(False, True), (True, False)], ids=["channels first", "channels last"]
)
def test_memory_order_is_measured_in_half_precision(monkeypatch, slow, chosen):
    classifier, images, now = (
        SpikingClassifier(small_run.batch_norm_net(2), 3),
        torch.rand(4, 2, 4, 4),
        [0.0],
    )
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        mixed_precision="bf16",
        is_main_process=True,
        autocast=partial(torch.autocast, "cpu", torch.bfloat16),
    )
    before = {name: value.clone() for name, value in classifier.state_dict().items()}

    def run(module, args):  # the passes in one order take long
        now[0] += 2.0 if args[0].is_contiguous(memory_format=torch.channels_last) == slow else 1.0

    classifier.register_forward_pre_hook(run)
    monkeypatch.setattr(memory_order, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert memory_order.choose_channels_last(classifier, images, accelerator, seed=0) == chosen
    assert now[0] > 0
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.stride() == before[name].stride()
    assert all(parameter.grad is None for parameter in classifier.parameters())
    accelerator.mixed_precision = "no"  # in float32 nothing is measured
    now[0] = 0.0
    assert not memory_order.choose_channels_last(classifier, images, accelerator, seed=0)
    assert now[0] == 0


def test_penalties_gains_and_speed_are_in_the_log(tmp_path):
    penalties = [GradientSparsity(0.1), ThresholdGuarding(0.2)]
    options = {"objective": {"penalties": penalties, "kappa": 0.0, "rho": 0.0}, "epochs": 2}
    history, classifier = small_run.run(tmp_path, **options, journal=Journal(tmp_path))
    losses = history[0].losses
    parts = (losses["penalty/gradient_sparsity"], losses["penalty/threshold_guarding"])
    assert 0.1 * parts[0] + 0.2 * parts[1] == pytest.approx(losses["penalty"], rel=1e-5)
    text = (tmp_path / "log.txt").read_text()
    expected = (
        f"perturbed {losses['perturbed']:.3f}, gradient_sparsity {parts[0]:.3f}, "
        f"threshold_guarding {parts[1]:.3f})"
    )
    assert (
        f"({expected}, accuracy {losses['accuracy_perturbed']:.1%}; validation" in text
    )  # no clean pass, none shown
    assert re.search(r"; \d+ images/s; ", text)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    shown = set(events.Tags()["scalars"])
    assert {
        "train/images_per_second",
        "train/penalty/gradient_sparsity",
        "train/total",
        "train/lr",
    } <= shown
    assert {f"validation/{name}" for name in ("clean", "fgsm", "pgd")} <= shown
    assert {"train/mppd", *(f"input_gain/parts.1/t{t}" for t in range(3))} <= shown
    assert [(event.step, event.value > 0) for event in events.Scalars("ms_mppd/parts.1")] == [
        (1, True),
        (2, True),
    ]
    node = classifier.net.parts[1]
    for name, gain in (("l2_gain/parts.1", l2_gain), ("peak_gain/parts.1", peak_gain)):
        first, last = (event.value for event in events.Scalars(name))
        assert first != last, "the gains move with training"
        assert last == pytest.approx(float(gain(node.decay, 3, node.input_gain)), rel=1e-6)
