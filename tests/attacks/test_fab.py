"""FAB and its projection against both written out a second time, a known optimum, and the library
of AutoAttack.
"""

import numpy as np
import pytest
import torch
from attacks.oracle import linear_oracle
from attacks.table import Recorder, linear_model, predicted, seeded

from sj_robust.attacks import SampleSeeds
from sj_robust.attacks._fab import fab, shortest_step

NORMS = ["Linf", "L2"]


def step_by_bisection(
    point: np.ndarray,
    lead: float,
    normal: np.ndarray,
    norm: str,
):
    """The step of one point, whose length is halved into place."""
    way = -np.sign(lead) * np.sign(normal)
    speed = np.abs(normal) if norm == "L2" else np.abs(np.sign(normal))
    room = np.where(way > 0, 1 - point, point)
    low = 0.0
    high = 1e25
    for _ in range(200):
        middle = (low + high) / 2
        moved = way * np.minimum(middle * speed, room)
        if np.sign(lead) * (lead + normal @ moved) > 0:
            low = middle
        else:
            high = middle
    return way * np.minimum(low * speed, room)


def planes(count: int = 200, features: int = 12):
    """Points on and off the border of the box, and planes, some of which the box does not reach."""
    generator = np.random.default_rng(0)
    points = generator.random((count, features)).round(1)
    normals = generator.standard_normal((count, features))
    normals[:, 3] = 0
    normals[: count // 2] *= 1e-20
    leads = generator.standard_normal(count) * 3
    leads[: count // 2] *= 1e-20
    return points, leads, normals


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_the_one_found_by_bisection(norm):
    points, leads, normals = planes()
    found = shortest_step(torch.tensor(points), torch.tensor(leads), torch.tensor(normals), norm)
    for row in range(len(points)):
        expected = step_by_bisection(points[row], leads[row], normals[row], norm)
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-9)
    met = np.abs(leads + (normals * found.numpy()).sum(1)) < 1e-9 * np.abs(leads)
    assert 100 < met.sum() < 200


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("lead", [0.0, 1.0, -1.0])
def test_a_plane_without_a_direction_moves_nothing(norm, lead):
    points = torch.rand(2, 5, generator=seeded())
    step = shortest_step(points, torch.full((2,), lead), torch.zeros(2, 5), norm)
    assert torch.equal(step, torch.zeros(2, 5))


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_the_librarys(norm):
    projections = pytest.importorskip(
        "pyautoattack.fab_projections", reason="extra `attacks` holds the authors' implementation"
    )
    theirs = getattr(projections, f"projection_{norm.lower()}")
    points, leads, normals = (torch.tensor(values)[100:] for values in planes())
    bias = (normals * points).sum(1) - leads
    found = shortest_step(points, leads, normals, norm)
    torch.testing.assert_close(found, theirs(points, normals, bias), rtol=0, atol=1e-12)


X = np.array([0.5, 0.3, 0.8, 0.1])
CENTRE = np.array([0.62, 0.55, 0.7, 0.3])
CURVATURE = np.array([1.0, 2.0, 0.5, 3.0])


def ring(x):
    """Lead of class 1: the outside of an ellipse; the image lies outside."""
    return (CURVATURE * (x - CENTRE) ** 2).sum(-1) - 0.05


def ring_model(x: torch.Tensor) -> torch.Tensor:
    lead = (torch.tensor(CURVATURE) * (x - torch.tensor(CENTRE)) ** 2).sum(1) - 0.05
    return torch.stack([torch.zeros_like(lead), lead], 1)


def by_hand(norm: str, steps: int) -> list[np.ndarray]:
    """Algorithm 1 of the paper for one image of two classes: all images that are looked at."""
    order = np.inf if norm == "Linf" else 2
    here = X
    seen = []
    for _ in range(steps):
        seen.append(here)
        lead = -ring(here)  # of class 0 over the label, class 1
        normal = -2 * CURVATURE * (here - CENTRE)
        step = step_by_bisection(here, lead, normal, norm)
        of_image = step_by_bisection(X, lead + normal @ (X - here), normal, norm)
        length = np.linalg.norm(step, order)
        bias = min(length / (length + np.linalg.norm(of_image, order)), 0.1)
        here = (1 - bias) * (here + 1.05 * step) + bias * (X + 1.05 * of_image)
        here = here.clip(0, 1)
        seen.append(here)
        if ring(here) < 0:
            here = 0.1 * X + 0.9 * here
    return seen


@pytest.mark.parametrize("norm", NORMS)
def test_images_follow_the_algorithm(norm):
    model = Recorder(ring_model)
    x = torch.tensor(X)[None]
    x_adv = fab(
        model,
        x,
        torch.tensor([1]),
        eps=1e-3,
        norm=norm,
        steps=8,
    )
    assert torch.equal(x_adv, x)  # nothing fools within that radius
    seen = torch.cat(model.seen[1:-1]).numpy()  # first and last it is judged
    expected = np.array(by_hand(norm, steps=8))
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-8)
    fooled = ring(expected) < 0
    assert 4 < fooled.sum() < len(fooled)


def test_targets_are_the_likeliest_wrong_classes_in_turn():
    """Class 3, the least likely, is the only one that x can raise."""

    def model(x):
        flat = 1e-9 * x[:, 1:]  # no other plane lies within the box
        rest = torch.tensor([[3.0, 2.0, 1.0]]) + flat * torch.tensor([[0.0, 1.0, 2.0]])
        return torch.cat([rest, 20 * x[:, :1] - 8], 1)

    x = torch.full((1, 2), 0.4)
    y = torch.zeros(1, dtype=torch.int64)
    for target_classes, falls in ((1, False), (2, False), (3, True), (9, True), (None, True)):
        x_adv = fab(model, x, y, eps=0.2, target_classes=target_classes, steps=10)
        assert bool(predicted(model, x_adv) != y) is falls


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_begin_on_the_border_of_half_the_radius(norm):
    model = Recorder(lambda x: torch.tensor([1.0, 0.0]) + 1e-9 * x)
    x = torch.full((50, 2), 0.5, dtype=torch.float64)
    y = torch.zeros(50, dtype=torch.int64)
    fab(
        model,
        x,
        y,
        eps=0.2,
        norm=norm,
        steps=1,
        restarts=3,
        generator=SampleSeeds(range(50)),
    )
    runs = model.seen[1:]  # of an image, a step and a judgement each
    starts = torch.stack([runs[0], runs[3], runs[6]]) - x
    length = starts.abs().amax(2) if norm == "Linf" else starts.norm(dim=2)
    expected = torch.tensor([0.0, 0.1, 0.1], dtype=torch.float64)[:, None].expand(-1, 50)
    torch.testing.assert_close(length, expected)
    assert not torch.equal(starts[1], starts[2])
    assert starts[1].mean(0).abs().max() < 0.03


def test_a_sample_leaves_as_soon_as_it_is_fooled_within_the_radius():
    oracle = linear_oracle(5, "Linf")
    model = Recorder(oracle.model)
    fab(
        model,
        oracle.x,
        oracle.y,
        eps=oracle.eps,
        steps=10,
    )
    standing = int(oracle.robust.sum())
    assert model.sizes[:3] == [60, 60, 60]
    assert model.sizes[3:-1] == [standing] * 18
    assert model.sizes[-1] == 60  # each of them is judged where it is handed over


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps", "targeted"), [("Linf", 0.06, True), ("L2", 0.35, False)])
def test_it_finds_what_the_librarys_finds(norm, eps, targeted):
    module = pytest.importorskip(
        "pyautoattack.fab_pt", reason="extra `attacks` holds the authors' implementation"
    )
    model = linear_model(36, seed=3)
    x = torch.rand(40, 1, 6, 6, generator=seeded(4))
    y = predicted(model, x)
    peer = module.FABAttack_PT(
        model,
        norm=norm,
        eps=eps,
        targeted=targeted,
        n_target_classes=4,
        device="cpu",
    )
    with torch.random.fork_rng():
        theirs = peer.perturb(x, y)
    ours = fab(
        model,
        x,
        y,
        eps=eps,
        norm=norm,
        target_classes=4 if targeted else None,
    )
    fell = predicted(model, theirs) != y
    assert 5 < int(fell.sum()) < 40
    assert (predicted(model, ours) != y)[fell].all()
