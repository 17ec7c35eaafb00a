"""What every attack promises of its result, whatever samples, radius and network are."""

import inspect
import math
from copy import deepcopy

import pytest
import torch
from attacks.table import (
    ATTACKS,
    EVERY,
    ON_EVENTS,
    ON_IMAGES,
    SEARCHES,
    assert_within,
    linear_model,
    predicted,
    seeded,
)
from covering import each_in_turn
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sj_robust import attacks
from sj_robust.attacks import autoattack, fgsm, pgd, random_flips, random_moves, rfgsm

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LIBRARY = [name for name in ON_IMAGES if "autoattack" in name]
OWN = [name for name in EVERY if name not in LIBRARY]
SHAPES = {
    "any": [(1, 1), (0, 1, 3, 3), (3, 7), (2, 3, 4, 4), (1, 2, 3, 2, 2)],
    "images": [(0, 1, 3, 3), (3, 2, 3, 3), (1, 1, 4, 7), (2, 1, 14, 5)],
    "events": [(1, 2, 1, 1, 1), (0, 2, 2, 3, 3), (3, 2, 2, 2, 3), (2, 4, 1, 3, 2)],
}


def strict(model, dtype):
    """A network that takes images of its own dtype alone."""
    return lambda images: model(images) if images.dtype == dtype else 1 / 0


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=10, deadline=None)
@given(
    number=st.integers(0, 19),
    eps=st.one_of(st.floats(1e-9, 1), st.sampled_from([0.0, 4 / 255, 8 / 255, 0.1])),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_within_the_budget_for_any_samples(name, number, eps, dtype, share, seed):
    attack = EVERY[name]
    kind = "events" if attack.of_events else "any" if name in ATTACKS else "images"
    shape = SHAPES[kind][number % len(SHAPES[kind])]
    if attack.of_events:
        x = attack.frames(*shape, seed=seed, share=share, dtype=dtype)
        eps = min(round(24 * eps), math.prod(shape[1:]))
    else:
        # in float16 the gradient of a ratio of logits overflows where all are nearly equal
        assume(dtype != torch.float16 or eps == 0 or eps > 1e-4)
        generator = seeded(seed)
        x = torch.rand(shape, generator=generator).to(dtype)
        x[torch.rand(shape, generator=generator) < 0.2] = 0.0
        x[torch.rand(shape, generator=generator) < 0.2] = 1.0
    y = torch.randint(5, (shape[0],), generator=seeded(seed))
    before = x.clone(), y.clone()
    model = strict(linear_model(math.prod(shape[1:]), dtype, seed), dtype)
    x_adv = attack.run(model, x, y, eps, seeded(seed))
    attack.assert_within(x_adv, x, eps)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert x_adv.data_ptr() != x.data_ptr() or x.numel() == 0


@pytest.mark.parametrize(("name", "dtype"), each_in_turn(LIBRARY, DTYPES))
def test_within_the_budget_of_the_library_in_every_dtype(name, dtype):
    attack = EVERY[name]
    x, y = attack.samples(dtype)
    before = x.clone()
    model = linear_model(36, dtype)
    y = predicted(model, x)
    x_adv = attack.run(strict(model, dtype), x, y, 0.4, seeded())
    attack.assert_within(x_adv, x, 0.4)
    assert torch.equal(x, before)
    assert int((predicted(model, x_adv) != y).sum()) > 0


def test_within_the_budget_on_every_model(attack_and_model):
    attack, model = attack_and_model
    x, _ = attack.samples()
    # some attacks leave alone what is misclassified already
    y = predicted(deepcopy(model).eval(), x)
    x_adv = attack.run(model, x, y, 0.2, seeded())
    attack.assert_within(x_adv, x, 0.2)
    assert not torch.equal(x_adv, x)


def of_a_radius(name):
    function = getattr(attacks, name)
    parameters = inspect.signature(function).parameters if inspect.isfunction(function) else ()
    of_events = {row.function for row in ON_EVENTS.values()}
    return {"model", "eps"} <= set(parameters) and function not in of_events


OF_A_RADIUS = list(filter(of_a_radius, attacks.__all__))


@pytest.mark.parametrize("name", OF_A_RADIUS)
@pytest.mark.parametrize("eps", [0.2, "51/255"])
def test_a_radius_is_all_that_an_attack_needs(name, eps, batch):
    assert len(OF_A_RADIUS) == 9
    x = batch[0][:2]
    x_adv = getattr(attacks, name)(linear_model(36), x, batch[1][:2], eps=eps)
    assert_within(x_adv, x, "Linf", 0.2)
    assert not torch.equal(x_adv, x)


def test_the_edge_cases_of_a_batch(attack):
    x, y = attack.samples()
    model = linear_model(36)
    assert attack.run(model, x[:0], y[:0], attack.usual).shape == (0, *x.shape[1:])
    attack.assert_within(attack.run(model, x[:1], y[:1], attack.usual), x[:1], attack.usual)
    if attack is not EVERY["rfgsm_unprojected"]:  # the noise of its start stays
        assert torch.equal(attack.run(model, x, y, 0), x)
    together = attack.run(model, x, y, attack.usual, seeded())
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    found = attack.run(model, strided, y, attack.usual, seeded())
    assert torch.equal(found, together)


MOVING_ALL = (fgsm, rfgsm, pgd, random_flips, random_moves)
STAYING = {
    name: row
    for name, row in SEARCHES.items()
    if row.function not in MOVING_ALL and row.options.get("keep_best", True)
}


@pytest.mark.parametrize("name", STAYING)
def test_what_is_wrong_already_comes_back(name):
    attack = EVERY[name]
    x, y = attack.samples()
    confidence = attack.options.get("confidence", 0)
    logits = linear_model(36)(x)
    lead = logits.gather(1, y[:, None]) - logits
    wrong = lead.argmax(1)  # far behind
    behind = lead.amax(1) > confidence
    assert behind.sum() >= 5
    x_adv = attack.run(linear_model(36), x, wrong, attack.usual)
    assert torch.equal(x_adv[behind], x[behind])


def test_every_sample_is_moved_on_a_model_that_has_a_gradient(search):
    if search.function in (random_flips, random_moves):
        pytest.skip("what is drawn need not fool")
    x, y = search.samples()
    model = linear_model(36)
    x_adv = search.run(model, x, y, search.usual, seeded())
    moved = (x_adv - x).flatten(1).norm(dim=1)
    assert int((moved > 0.05).sum()) >= 5
    if search.function is not autoattack and not search.options.get("targeted"):
        assert int((predicted(model, x_adv) != y).sum()) >= 3


def test_unprojected_rfgsm_leaves_the_ball_by_the_noise_alone(batch):
    x = batch[0] * 0.5 + 0.25
    options = {"eps": 0.1, "noise_std": 0.01, "project": False}
    distance = (rfgsm(linear_model(36), x, batch[1], **options) - x).abs()
    assert 0.101 < distance.max() < 0.1 + 6 * 0.01
