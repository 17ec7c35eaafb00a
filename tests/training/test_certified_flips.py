"""Certified training with changed events as the adversary."""

import pytest
import torch

from sj_robust.attacks import ThreatModel
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.proofs import verify
from sj_robust.proofs.changes import Flips
from sj_robust.proofs.differentiable import DifferentiableBounds
from sj_robust.training import event_attacks
from sj_robust.training.certified import CertifiedLoss


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
        steps = [ball.drawn(frame, generator) for frame in x.split(1, dim=1)]
        changed = torch.cat(steps, 1)  # each time step has the budget
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
