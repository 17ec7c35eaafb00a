import signal

import numpy as np
import pytest
import torch
from filelock import FileLock
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.data import DataLoader
from training.small_run import Items, splits

from sj_robust import SpikingClassifier
from sj_robust.training import MODES, TrainingInterrupted, finetune, finetuning, load_checkpoint

STRIPES = splits()
QUICK = {"eps": 0.05, "T": 3, "epochs": 1, "batch_size": 16, "progress": False}


def linear(seed=0, tau=2.0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), neuron.LIFNode(tau=tau), nn.Linear(8, 3))
    functional.set_step_mode(net, "m")
    return net


def convolutional():
    """With batch norm and detached resets."""
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1, bias=False),
        layer.BatchNorm2d(8),
        neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True),
        layer.Flatten(),
        layer.Linear(128, 3),
    )
    functional.set_step_mode(net, "m")
    return net


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_neurons_of_memopt_train_without_what_needs_their_hooks():
    memopt = pytest.importorskip("spikingjelly.activation_based.memopt")
    net = linear()
    net[2] = memopt.checkpoint_module(net[2])
    with pytest.raises(ValueError, match="memopt"):
        finetune(net, STRIPES, rho=1.0, **QUICK)
    before = weights(net)
    finetune(net, STRIPES, rho=0.0, **QUICK)
    assert not same(before, weights(net))


def test_a_network_of_ones_own_becomes_robust_in_place():
    net = convolutional().train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    report = finetune(net, STRIPES, **QUICK | {"eps": 0.1, "epochs": 8, "lr": 0.1})
    assert [module.training for module in net.modules()] == modes
    assert all(weight.grad is None for weight in net.parameters())
    assert report.variants == ("before", "after")
    assert report.dataset == "stripes"
    assert len(report.labels) == len(STRIPES.test)
    assert report.warnings == ()
    before, after = (report.under("pgd20", variant=name) for name in report.variants)
    assert after.correct > before.correct
    assert len(report.curves["after"]) == 8
    x, y = STRIPES.test.tensors
    right = int((SpikingClassifier(net, T=3).eval()(x).argmax(1) == y).sum())
    assert right == report.under("clean", variant="after").correct


X, Y = STRIPES.train.tensors
NUMBERS = [(image, np.int64(label)) for image, label in zip(X, Y, strict=True)]
FORMS = {
    "tensors": (X, Y),
    "data set": STRIPES.train,
    "loader": DataLoader(STRIPES.train, 4),
    "classes as numbers": Items(NUMBERS),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_may_come_in_every_usual_form(form):
    report = finetune(linear(), FORMS[form], **QUICK)
    held_out = len(X) // 10
    assert len(report.labels) == held_out
    assert report.configuration["images"] == len(X) - held_out
    assert len(report.warnings) == 1  # of the images that selected the epoch
    tested = finetune(linear(), FORMS[form], test=STRIPES.test.tensors, **QUICK)
    assert len(tested.labels) == len(STRIPES.test)
    assert tested.warnings == ()
    _, *attacks = [row for row in tested.of("after") if row.attacks]  # noise has no budget
    fallen = set().union(*(row.fell for row in attacks))
    left = tested.standing("clean", variant="after") - fallen
    assert tested.standing("everything", variant="after") == left


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains(mode):
    net = linear()
    before = weights(net)
    report = finetune(net, STRIPES, mode=mode, **QUICK)
    assert not same(before, weights(net))
    assert report.configuration["mode"] == mode
    assert report.configuration["rho"] == MODES[mode].rho
    assert any("verified at Linf 0.05" in text for text in report.warnings) == (mode == "certified")


def test_the_radius_is_that_of_training_and_validation(monkeypatch):
    asked = []
    for name in ("training_attack", "validation_attacks", "final_attacks"):
        original = getattr(finetuning, name)

        def noting(*args, original=original, **options):
            asked.append(options.get("eps", args[-1]))
            return original(*args, **options)

        monkeypatch.setattr(finetuning, name, noting)
    finetune(linear(), STRIPES, **QUICK | {"eps": "8/255"})
    assert set(asked) == {8 / 255}


def test_a_training_that_was_stopped_goes_on_to_the_same_network(tmp_path, monkeypatch):
    whole = linear()
    options = QUICK | {"epochs": 2, "lr": 0.5}
    report = finetune(whole, STRIPES, **options)
    calls = []

    def interrupted(model, x, y, *, generator=None):
        calls.append(len(x))
        if len(calls) == 7:  # one of them is a trial before the training
            signal.raise_signal(signal.SIGINT)
        return attack(model, x, y, generator=generator)

    attack = finetuning.training_attack("at", eps=0.05)
    net = linear()
    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "training_attack", lambda *_, **__: interrupted)
        with pytest.raises(TrainingInterrupted):
            finetune(net, STRIPES, folder=tmp_path, **options)
    for again in (net, net, linear()):
        repeated = finetune(again, STRIPES, folder=tmp_path, **options)
        assert same(weights(whole), weights(again))
        assert (repeated.table(), repeated.curves) == (report.table(), report.curves)
        assert repeated.warnings == report.warnings
    (tmp_path / "before.json").unlink()  # as in folders of earlier releases
    for start, warned in ((net, True), (linear(), False), (net, False)):
        report = finetune(start, STRIPES, folder=tmp_path, **options)
        assert any("before:" in text for text in report.warnings) == warned


class Drawn(Items):
    """Another noise in every pass on some of the images, from a generator that nobody seeds."""

    def __init__(self, pairs):
        super().__init__(pairs)
        self.draws = torch.Generator().manual_seed(0)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        noise = 0.01 * torch.rand(x.shape, generator=self.draws)
        return ((x + noise).clamp(0, 1) if index % 10 == 9 else x), y


DRAWN = Drawn([(x, int(y)) for x, y in zip(X, Y, strict=True)])
KEPT = QUICK | {"data": (X, Y)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of trainings that have ended, by their data, and the network of the first."""
    folders = {}
    for name, data in {"tensors": (X, Y), "drawn": DRAWN, "splits": STRIPES}.items():
        net = linear()
        folders[name] = tmp_path_factory.mktemp(name)
        finetune(net, folder=folders[name], **KEPT | {"data": data})
        folders.setdefault("net", net)
    return folders


@pytest.mark.parametrize(
    ("of", "net", "options", "differing"),
    [
        ("tensors", {"seed": 1}, {}, "network.weights"),
        ("tensors", {"tau": 8.0}, {}, "network.modules"),
        ("tensors", {}, {"T": 4}, "finetune.T"),
        ("tensors", {}, {"mean": [0.5]}, "finetune.mean"),
        ("tensors", {}, {"std": [0.5]}, "finetune.std"),
        ("tensors", {}, {"validation_fraction": 0.3}, "finetune.validation_fraction"),
        ("tensors", {}, {"data": (1 - X, Y)}, "images and labels"),
        ("tensors", {}, {"data": (X, (Y + 1) % 3)}, "images and labels"),
        ("tensors", {}, {"rho": 0.5}, "finetune.rho"),
        ("drawn", {}, {"data": DRAWN}, None),  # by the labels alone
        ("drawn", {}, {"data": Drawn([(x, (y + 1) % 3) for x, y in DRAWN.items])}, "images and"),
        ("splits", {}, {"data": STRIPES, "validation_fraction": 0.3}, None),
    ],
)
def test_a_folder_takes_up_the_same_training_and_no_other(trained, of, net, options, differing):
    other = linear(**net)
    before = weights(other)
    if differing is None:
        finetune(other, folder=trained[of], **KEPT | options)
        return
    with pytest.raises(ValueError, match=differing):
        finetune(other, folder=trained[of], **KEPT | options)
    assert same(before, weights(other))


def test_random_weights_that_nobody_seeded_are_taken_up_from_the_last_checkpoint(trained):
    unseeded = linear(seed=7)
    last = load_checkpoint(trained["tensors"] / "last.pt")["model"]
    SpikingClassifier(unseeded, T=3).load_state_dict(last)
    finetune(unseeded, folder=trained["tensors"], **KEPT)
    assert same(weights(trained["net"]), weights(unseeded))
    with pytest.raises(ValueError, match="network.modules"):
        finetune(linear(tau=8.0), folder=trained["tensors"], **KEPT)


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    net = linear()
    with FileLock(tmp_path / ".lock"), pytest.raises(BlockingIOError, match=tmp_path.name):
        finetune(net, folder=tmp_path, **KEPT)
    assert same(weights(linear()), weights(net))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finetune(net, folder=tmp_path, **KEPT)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_trained_without_its_compilation(in_place):
    plain = linear()
    finetune(plain, STRIPES, **QUICK)
    net = linear()
    compiled = net if in_place else torch.compile(net, backend="eager")
    if in_place:
        net.compile(backend="eager")
    finetune(compiled, STRIPES, **QUICK)
    assert same(weights(plain), weights(net))
