"""Certified training as a run: its schedule, what it refuses, stopped and continued; its formulas
are in test_training_step, two processes in test_distributed."""

import gc
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.testing import assert_close
from training import small_run

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import ThreatModel
from sj_robust.defences import StochasticGate
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.proofs import differentiable, verify
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.changes import Flips
from sj_robust.proofs.differentiable import DifferentiableBounds
from sj_robust.training import (
    CertifiedOptions,
    Journal,
    Objective,
    TrainingPlan,
    event_attacks,
    load_checkpoint,
    validation,
)
from sj_robust.training.certified import CertifiedLoss
from sj_robust.training.engine import check_training
from sj_robust.training.validation import Validation

EPS = 0.05
CERTIFIED = {
    "objective": {
        "loss": "certified",
        "certified_eps": EPS,
        "kappa": 0.2,
        "rho": 0.0,
    },
    "select": "verified",
    "verified": ThreatModel("Linf", EPS),
    "perturb": None,
}


class Wave(nn.Module):
    def forward(self, x):
        return x.sin()


def unbounded():
    net = nn.Sequential(
        layer.Flatten(),
        layer.Linear(16, 9),
        nn.Sequential(
            nn.Unflatten(2, (3, 3)),
            Wave(),
            nn.Flatten(2),
        ),
        DLIFNode(T=3),
        layer.Linear(9, 3),
    )
    functional.set_step_mode(net, "m")
    return net


@pytest.mark.slow
def test_radius_and_weight_rise_and_the_epoch_is_chosen_by_what_is_verified(tmp_path, monkeypatch):
    """In half precision, of which the proofs know nothing."""
    made = []
    ramps = []
    bounded = []

    class Watching(Journal):
        def on_step(self, losses):
            ramps.append(made[0].certified.ramp)
            bounded.append(losses["certified"])
            super().on_step(losses)

    def noting(*args, **options):
        made.append(Objective(*args, **options))
        return made[0]

    monkeypatch.setattr(small_run, "Objective", noting)
    history, classifier = small_run.run(
        tmp_path,
        **CERTIFIED,
        epochs=6,
        lr=0.04,
        journal=Watching(tmp_path),
        mixed_precision="bf16",
    )
    steps = torch.arange(24) / 24
    expected = ((steps - 0.05) / 0.6).clamp(0, 1)
    assert_close(torch.tensor(ramps), expected, atol=1e-6, rtol=0)
    assert [value > 0 for value in bounded] == [ramp > 0 for ramp in ramps]
    first = history[0].validation["verified"]
    last = history[-1].validation["verified"]
    assert last > first + 0.3
    best = max(history, key=lambda record: record.validation["verified"])
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == best.epoch
    x, y = small_run.splits().validation.tensors
    assert verify(classifier.eval(), x, y, EPS).accuracy == pytest.approx(last)
    text = (tmp_path / "log.txt").read_text()
    assert re.search(r"epoch 6/6: loss [^;]*certified \d[^;]*; validation [^;]*verified \d", text)


def certified(net=None, **options):
    """The objective of certified training."""
    classifier = SpikingClassifier(net or small_run.Net(0.0), T=3)
    return Objective(classifier, **CERTIFIED["objective"] | options)


def check(objective, accelerator=None, **options):
    """What a training looks at before it starts."""
    plan = TrainingPlan(epochs=1, batch_size=16, **options)
    check_training(objective, small_run.splits(), plan, accelerator or Accelerator(cpu=True))


def drawing():
    return nn.Sequential(small_run.Net(0.0), StochasticGate(step_mode="m"))


def plain(net):
    return Objective(SpikingClassifier(net, T=3))


PROVED = {"select": "verified", "verified": ThreatModel("Linf", EPS)}
HALF = SimpleNamespace(num_processes=1, mixed_precision="fp16")


@pytest.mark.parametrize(
    ("objective", "options", "named"),
    [
        (lambda: certified(unbounded()), PROVED, "sin in or behind 2.1"),
        (lambda: plain(unbounded()), PROVED, "verified"),
        (lambda: plain(drawing()), PROVED, "verified"),
        (lambda: certified(drawing()), {}, "random"),
        (certified, {"compile": True}, "compile"),
        (certified, {"accelerator": HALF}, "mixed_precision"),
    ],
)
def test_what_it_cannot_train_is_refused_before_it_starts(objective, options, named):
    with pytest.raises(ValueError, match=named):
        check(objective(), **options)


def test_the_ramp_is_as_long_as_its_share_of_the_training():
    classifier = build_classifier(NetworkSpec(channels=(2, 2)))
    loss = CertifiedLoss(classifier, 0.1, CertifiedOptions(ramp=0.4))
    expected = {0.0: 0.0, 0.05: 0.0, 0.25: 0.5, 0.45: 1.0, 0.9: 1.0}
    for progress, ramp in expected.items():
        loss.progress = progress
        assert loss.ramp == pytest.approx(ramp)


def test_a_network_with_relu_has_no_figures_of_spikes_in_the_log():
    images = small_run.splits().validation
    classifier = build_classifier(
        NetworkSpec(neuron="relu", T=1, image_shape=(1, 4, 4), classes=3, channels=(2, 2))
    )
    found = Validation(images, Accelerator(cpu=True), seed=0)
    assert found.scalars(classifier, small_run.ATTACK) == {}
    assert set(found.accuracy(classifier, {}, ThreatModel("Linf", EPS))) == {"clean", "verified"}


def test_adam_takes_its_own_step(tmp_path):
    small_run.run(
        tmp_path,
        perturb=None,
        epochs=1,
        optimizer="adam",
        lr=1e-3,
    )
    (group,) = load_checkpoint(tmp_path / "last.pt")["optimizer"]["param_groups"]
    assert group["betas"] == (0.9, 0.999)


def test_a_step_leaves_nothing_behind(monkeypatch):
    runs = []

    class Watched(BoundedRun):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            runs.append(weakref.ref(self))

    monkeypatch.setattr(differentiable, "BoundedRun", Watched)
    loss = CertifiedLoss(build_classifier(NetworkSpec(channels=(2, 2))), eps=0.1)
    value, _ = loss.value(torch.rand(2, 1, 8, 8), torch.tensor([3, 7]))
    value.backward()
    del value
    gc.collect()
    assert [run() for run in runs] == [None]


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({}, {}),
        ({"surrogate_width": 0.5}, {"kappa": 0.5}),
        ({"box": 0.3}, {"rho": 1.0}),
        ({"attacked": True}, {"kappa": 0.4}),
        ({"box": 0.5, "attacked": True}, {"kappa": 0.2, "rho": 0.5}),
    ],
)
def test_joint_bounds_take_every_option_of_the_loss(options, objective):
    x = torch.rand(6, 1, 4, 4)
    y = torch.arange(6) % 3
    x_perturbed = x + 0.03 * torch.randn(x.shape)
    losses = {}
    for bounds in ("ibp", "joint"):
        torch.manual_seed(0)
        asked = CertifiedOptions(bounds=bounds, **options)
        made = certified(small_run.batch_norm_net(), certified_options=asked, **objective).train()
        made.certified.progress = 0.5
        losses[bounds] = made(x, y, x_perturbed)
        losses[bounds].total.backward()
        for name, value in made.classifier.named_parameters():
            assert bool(value.grad.isfinite().all()), name
            assert bool(value.grad.any()) or name.endswith("0.bias"), name
    assert losses["joint"].certified <= losses["ibp"].certified
    assert losses["joint"].clean == losses["ibp"].clean


@pytest.mark.parametrize("method", ["ibp", "joint"])
def test_the_epoch_is_chosen_by_the_method_of_the_plan(method, tmp_path, monkeypatch):
    methods = []

    def noting(*args, **options):
        methods.append(options["method"])
        return verify(*args, **options)

    monkeypatch.setattr(validation, "verify", noting)
    small_run.run(tmp_path, **CERTIFIED, verified_method=method, epochs=2)
    assert methods == [method, method]


def network():
    torch.manual_seed(0)
    options = {"strides": [2], "kernel_size": 4}
    spec = NetworkSpec(
        image_shape=(2, 10, 10), classes=10, T=3, channels=(4,), frames=True, options=options
    )
    return build_classifier(spec)


def samples(count=8):
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(count, 3, 2, 10, 10, generator=generator) < 0.2).float()
    return x, torch.arange(count) % 10


def test_the_radius_rises_in_parts_of_an_event():
    x, y = samples()
    loss = CertifiedLoss(network().eval(), ThreatModel("L0", 2))
    values = []
    for progress in (0.0, 0.2, 0.3, 0.5, 1.0):
        loss.progress = progress
        values.append(float(loss.value(x, y)[0].detach()))
    assert values == sorted(values)
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("threat", [ThreatModel("L0", 1), ThreatModel("moves", 2, largest_shift=1)])
def test_training_proves_more(threat):
    x, y = samples()
    y = y % 2
    x[y == 1, :, :, :, 5:] = 0  # events on one side, and on both
    model = network()
    model.net.first.weight.data *= 2  # so that it fires
    loss = CertifiedLoss(model.eval(), threat)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    before = verify(model, x, y, threat).accuracy
    for step in range(15):
        loss.progress = step / 15
        optimizer.zero_grad()
        loss.value(x, y)[0].backward()
        optimizer.step()
    assert verify(model, x, y, threat).accuracy > before + 0.4


@pytest.mark.parametrize("budget", [0.0, 1.0, 2.5])
def test_joint_bounds_of_changed_events_are_tighter_hold_and_have_a_gradient(budget):
    x, y = samples()
    model = network()
    model.net.first.weight.data *= 2
    model.eval()
    leads = {}
    for method in ("ibp", "joint"):
        bounds = DifferentiableBounds(model, method=method)
        leads[method] = bounds.lead(x, y, Flips(budget))
    rounding = 1e-4
    assert (leads["joint"] <= leads["ibp"] + rounding).all()
    if budget == 1.0:
        assert leads["joint"].mean() < leads["ibp"].mean() - 0.01
    ball = Flips(int(budget))
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        weights = torch.rand(x.shape, generator=generator) * (2 * x - 1)
        steps = map(ball.lowest, x.split(1, dim=1), weights.split(1, dim=1))
        changed = torch.cat(list(steps), 1)  # each time step has the budget
        logits = model(changed)
        lead = logits - logits.gather(1, y.unsqueeze(1))
        assert (lead <= leads["joint"] + rounding).all()
    leads["joint"].sum().backward()
    assert model.net.first.weight.grad.any()


def test_attacks_of_validation_and_of_the_end_keep_the_number_of_changes():
    model = network().eval()
    x, y = samples(4)
    for final in (False, True):
        for name, attack in event_attacks(3, final=final).items():
            x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
            assert int((x_adv != x).flatten(1).sum(1).max()) <= 3, name


def test_frames_of_counts_need_to_be_said():
    loss = CertifiedLoss(network().eval(), ThreatModel("L0", 2))
    x, y = samples()
    with pytest.raises(ValueError, match="for numbers of events pass counts=True"):
        loss.value(3 * x, y)
