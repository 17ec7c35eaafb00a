import copy
import re
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from filelock import FileLock
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.data import DataLoader
from training.small_run import Items, splits

import sj_robust
from sj_robust import SpikingClassifier
from sj_robust.attacks import fgsm
from sj_robust.models.checkpoint import save_checkpoint
from sj_robust.training import TrainingInterrupted, finetune, finetuning, load_checkpoint

STRIPES = splits()
QUICK = {"eps": 0.05, "T": 3, "epochs": 1, "batch_size": 16, "progress": False}


class ResidualNet(nn.Module):
    """LIF neurons and a sum, as somebody writes them."""

    def __init__(self):
        super().__init__()
        self.stem = self.part(1)
        self.branch = self.part(8)
        self.head = nn.Sequential(layer.Flatten(), layer.Linear(128, 3))

    def part(self, channels):
        return nn.Sequential(
            layer.Conv2d(channels, 8, 3, padding=1, bias=False),
            layer.BatchNorm2d(8),
            neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True),
        )

    def forward(self, x_seq):
        y_seq = self.stem(x_seq)
        return self.head(y_seq + self.branch(y_seq))


def network(seed=0):
    torch.manual_seed(seed)
    net = ResidualNet()
    functional.set_step_mode(net, "m")
    return net


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_neurons_of_memopt_train_without_what_needs_their_hooks():
    memopt = pytest.importorskip("spikingjelly.activation_based.memopt")
    net = network()
    net.stem[2] = memopt.checkpoint_module(net.stem[2])
    with pytest.raises(ValueError, match=r"memopt, which runs 'stem\.2'"):
        finetune(net, STRIPES, rho=1.0, **QUICK)
    before = weights(net)
    finetune(net, STRIPES, rho=0.0, **QUICK)
    assert not same(before, weights(net))


@pytest.mark.slow
def test_a_network_of_ones_own_becomes_robust_in_place():
    net = network().train()
    net.branch.eval()
    modes = [module.training for module in net.modules()]
    options = QUICK | {"eps": 0.1, "epochs": 15, "lr": 0.1}
    report = sj_robust.finetune(net, STRIPES, **options)
    assert [module.training for module in net.modules()] == modes
    assert report.variants == ("before", "after")
    assert report.dataset == "stripes"
    assert len(report.labels) == len(STRIPES.test)
    before = report.under("pgd20", variant="before")
    after = report.under("pgd20", variant="after")
    assert after.correct > before.correct
    assert len(report.curves["after"]) == 15
    assert report.configuration["rho"] == 1.0  # MS-MPPD is in the loss
    x, y = STRIPES.test.tensors
    model = sj_robust.SpikingClassifier(net, T=3).eval()
    right = int((model(x).argmax(1) == y).sum())
    assert right == report.under("clean", variant="after").correct


@pytest.mark.parametrize("kind", ["tensors", "data set", "loader", "classes as numbers"])
def test_images_may_come_in_every_usual_form(kind):
    x, y = STRIPES.train.tensors
    numbers = [(image, np.int64(label)) for image, label in zip(x, y, strict=True)]
    given = {
        "tensors": (x, y),
        "data set": STRIPES.train,
        "loader": DataLoader(STRIPES.train, 4),
        "classes as numbers": Items(numbers),
    }
    report = finetune(linear(), given[kind], **QUICK)
    assert report.dataset == "images"
    held_out = len(x) // 10
    assert len(report.labels) == held_out
    assert report.configuration["images"] == len(x) - held_out
    for name in report.variants:
        noise, *attacks = [row for row in report.of(name) if row.attacks]
        assert noise.measured
        assert noise.outside == noise.fell
        fallen = set().union(*(row.fell for row in attacks))
        left = report.standing("clean", variant=name) - fallen
        assert report.standing("everything", variant=name) == left


def test_the_report_is_about_test_images_if_there_are_any():
    given = STRIPES.train
    report = finetune(linear(), given, test=STRIPES.test.tensors, **QUICK)
    assert len(report.labels) == len(STRIPES.test)
    assert report.warnings == ()


def test_figures_of_the_images_that_selected_the_epoch_are_warned_of():
    (warning,) = finetune(linear(), STRIPES.train, **QUICK).warnings
    assert "held-out" in warning
    assert finetune(linear(), STRIPES, **QUICK).warnings == ()


class SomeShifted(Items):
    """Another noise in every pass on some of the images, from a generator that nobody seeds."""

    def __init__(self, pairs):
        super().__init__(pairs)
        self.draws = torch.Generator().manual_seed(0)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        noise = 0.01 * torch.rand(x.shape, generator=self.draws)
        return ((x + noise).clamp(0, 1) if index % 10 == 9 else x), y


@pytest.mark.parametrize("mode", ["none", "pgd_at", "gaussian", "rat", "trades"])
def test_every_mode_trains(mode):
    net = linear()
    before = weights(net)
    report = finetune(net, STRIPES, mode=mode, **QUICK)
    assert not same(before, weights(net))
    assert report.configuration["mode"] == mode


@pytest.mark.slow
def test_certified_training_proves_images():
    torch.manual_seed(0)
    net = nn.Sequential(layer.Flatten(), layer.Linear(16, 24), neuron.LIFNode())
    net.append(layer.Linear(24, 3))
    functional.set_step_mode(net, "m")
    options = QUICK | {"eps": 0.01, "epochs": 8, "lr": 0.1, "mode": "certified"}
    report = finetune(net, STRIPES, **options)
    assert "verified at Linf 0.01" in report.warnings[-1]
    assert report.curves["after"][-1]["validation"]["verified"] > 0


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_to_the_same_network(tmp_path, monkeypatch):
    whole = linear()
    options = QUICK | {"epochs": 3}
    report = finetune(whole, STRIPES, **options)
    calls = []

    def interrupted(model, x, y, *, generator=None):
        calls.append(len(x))
        if len(calls) == 7:  # one of them is a trial before the training
            signal.raise_signal(signal.SIGINT)
        return attack(model, x, y, generator=generator)

    attack = finetuning.training_attack("at", eps=0.05)
    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "training_attack", lambda *_, **__: interrupted)
        net = linear()
        with pytest.raises(TrainingInterrupted) as stopped:
            finetune(net, STRIPES, folder=tmp_path / "kept", **options)
    assert f"continues from {tmp_path / 'kept'}" in stopped.value.__notes__[0]
    again = finetune(net, STRIPES, folder=tmp_path / "kept", **options)
    assert same(weights(whole), weights(net))
    assert (again.table(), again.curves) == (report.table(), report.curves)
    assert load_checkpoint(tmp_path / "kept" / "best.pt")["epoch"] <= 3
    with pytest.raises(ValueError, match="other options"):
        finetune(linear(), STRIPES, folder=tmp_path / "kept", **options | {"rho": 0.5})


X, Y = STRIPES.train.tensors
KEPT = QUICK | {"data": (X, Y)}


def linear(seed=0, tau=2.0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), neuron.LIFNode(tau=tau), nn.Linear(8, 3))
    functional.set_step_mode(net, "m")
    return net


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training that has ended, and its network."""
    folder = tmp_path_factory.mktemp("trained")
    net = linear()
    finetune(net, folder=folder, **KEPT)
    return folder, net


@pytest.mark.parametrize(
    ("net", "options", "differing"),
    [
        ({"seed": 1}, {}, "another network (network.net.1.weight"),
        ({"tau": 8.0}, {}, "another network (network.net.2.tau"),
        ({}, {"T": 4}, "finetune.T: 3 there, 4 now"),
        ({}, {"mean": [0.5]}, "finetune.mean: None there, [0.5] now"),
        ({}, {"std": [0.5]}, "finetune.std: None there, [0.5] now"),
        ({}, {"validation_fraction": 0.3}, "finetune.validation_fraction: 0.1 there, 0.3 now"),
        ({}, {"data": (1 - X, Y)}, "images and labels: "),
        ({}, {"data": (X, (Y + 1) % 3)}, "images and labels: "),
        ({}, {"rho": 0.5}, "finetune.rho: 1.0 there, 0.5 now"),
    ],
)
def test_a_folder_of_another_training_is_refused(trained, net, options, differing):
    folder, _ = trained
    other = linear(**net)
    before = weights(other)
    with pytest.raises(ValueError, match=re.escape(differing)) as refused:
        finetune(other, folder=folder, **KEPT | options)
    assert "another folder" in str(refused.value)
    assert same(before, weights(other))


@pytest.mark.parametrize("weights_of", ["the start", "its end"])
def test_the_same_call_takes_up_its_folder(trained, weights_of):
    folder, net = trained
    again = linear() if weights_of == "the start" else copy.deepcopy(net)
    report = finetune(again, folder=folder, **KEPT)
    assert same(weights(net), weights(again))
    assert len(report.curves["after"]) == 1


def test_before_is_that_of_the_first_call(tmp_path):
    net = linear()
    options = KEPT | {"epochs": 3, "lr": 0.5, "folder": tmp_path}
    first = finetune(net, **options)
    before, after = (first.under("clean", variant=name) for name in first.variants)
    assert before.correct != after.correct
    for again in (finetune(net, **options), finetune(linear(), **options)):
        assert again.table() == first.table()
        assert again.warnings == first.warnings


def test_before_of_a_network_that_is_trained_already_is_warned_of(tmp_path):
    options = QUICK | {"folder": tmp_path}
    net = linear()
    assert finetune(net, STRIPES, **options).warnings == ()
    (tmp_path / "before.json").unlink()  # as in folders of earlier releases
    (warning,) = finetune(net, STRIPES, **options).warnings
    assert "weights that were trained by an earlier call, since" in warning
    assert "before.json is missing; for the figures before" in warning
    assert finetune(linear(), STRIPES, **options).warnings == ()
    assert finetune(net, STRIPES, **options).warnings == ()
    others = replace(STRIPES, test=STRIPES.validation)
    (warning,) = finetune(net, others, test=STRIPES.train, **options).warnings
    assert "before.json is of other test images; for the figures before" in warning
    assert finetune(linear(), STRIPES, test=STRIPES.train, **options).warnings == ()


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    net = linear()
    before = weights(net)
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(BlockingIOError, match=tmp_path.name),
    ):
        finetune(net, folder=tmp_path, **KEPT)
    assert same(before, weights(net))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finetune(net, folder=tmp_path, **KEPT)


def test_images_that_are_drawn_anew_in_every_pass_are_told_by_their_labels(tmp_path):
    drawn = SomeShifted([(x, int(y)) for x, y in zip(X, Y, strict=True)])
    net = linear()
    options = KEPT | {"data": drawn, "folder": tmp_path}
    finetune(net, **options)
    finetune(linear(), **options)
    shifted = SomeShifted([(x, (y + 1) % 3) for x, y in drawn.items])
    with pytest.raises(ValueError, match="images and labels: "):
        finetune(linear(), **options | {"data": shifted})


def test_random_weights_that_nobody_seeded_are_taken_up_from_the_last_checkpoint(trained):
    folder, net = trained
    unseeded = linear(seed=7)
    with pytest.raises(ValueError, match="last.pt"):
        finetune(unseeded, folder=folder, **KEPT)
    last = load_checkpoint(folder / "last.pt")["model"]
    SpikingClassifier(unseeded, T=QUICK["T"]).load_state_dict(last)
    finetune(unseeded, folder=folder, **KEPT)
    assert same(weights(net), weights(unseeded))
    with pytest.raises(ValueError, match="tau") as refused:
        finetune(linear(tau=8.0), folder=folder, **KEPT)
    assert "random" not in str(refused.value)


def test_a_folder_whose_fingerprint_is_gone_is_refused(tmp_path):
    finetune(linear(), folder=tmp_path, **KEPT)
    (tmp_path / "network_before.json").unlink()
    with pytest.raises(ValueError, match="network_before.json"):
        finetune(linear(), folder=tmp_path, **KEPT)


def test_a_folder_of_an_earlier_release_is_refused(tmp_path):
    finetune(linear(), folder=tmp_path, **KEPT)
    content = load_checkpoint(tmp_path / "last.pt")
    earlier = content["description"]["finetune"]
    for name in ("T", "mean", "std", "validation_fraction"):
        del earlier[name]
    run = {name: value for name, value in content.items() if name not in ("format", "version")}
    save_checkpoint(tmp_path / "last.pt", run | {"description": {"finetune": earlier}})
    with pytest.raises(ValueError, match="another folder"):
        finetune(linear(), folder=tmp_path, **KEPT)


def test_images_without_a_split_of_their_own_need_no_fraction(tmp_path):
    options = QUICK | {"folder": tmp_path}
    finetune(linear(), STRIPES, **options)
    finetune(linear(), STRIPES, validation_fraction=0.3, **options)


COMPILED = {
    "by torch.compile": lambda net: torch.compile(net, backend="eager"),
    "in place": lambda net: net.compile(backend="eager") or net,
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_network_is_trained_without_its_compilation(how):
    plain = linear()
    finetune(plain, STRIPES, **QUICK)
    net = linear()
    finetune(COMPILED[how](net), STRIPES, **QUICK)
    assert same(weights(plain), weights(net))
    assert all(weight.grad is None for weight in net.parameters())


def test_a_training_that_moves_no_weight_is_an_error():
    with pytest.raises(ValueError, match="lr"):
        finetune(linear(), STRIPES, **QUICK | {"lr": 1e-30})


@pytest.mark.slow
def test_a_threat_of_validation_is_that_of_training(monkeypatch):
    """No radius but the one that was asked for."""
    asked = []

    def recorded(eps):
        asked.append(eps)
        return {"fgsm": partial(fgsm, eps=eps), "pgd": partial(fgsm, eps=eps)}

    monkeypatch.setattr(finetuning, "validation_attacks", recorded)
    finetune(linear(), STRIPES, **QUICK | {"eps": "8/255"})
    assert asked == [8 / 255]
