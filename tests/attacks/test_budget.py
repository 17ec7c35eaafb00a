"""The budget of every attack, as a property."""

import inspect
import math
from copy import deepcopy
from itertools import product

import pytest
import torch
from attacks.table import ATTACKS, ON_IMAGES, assert_within, linear_model, predicted, seeded
from covering import each_in_turn
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sj_robust import attacks
from sj_robust.attacks import rfgsm

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SQUARES = [name for name in ON_IMAGES if "square" in name]
OTHERS = [name for name in ON_IMAGES if name not in SQUARES]
IN_A_DTYPE = [*product(SQUARES, DTYPES), *each_in_turn(OTHERS, DTYPES)]


@pytest.mark.parametrize("name", ATTACKS)
@settings(max_examples=12, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (0, 1, 3, 3), (3, 7), (2, 3, 4, 4), (1, 2, 3, 2, 2)]),
    eps=st.one_of(
        st.floats(1e-9, 1),
        st.sampled_from(
            [
                0.0,
                4 / 255,
                8 / 255,
                0.1,
            ]
        ),
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_inside_ball_and_box_for_any_shape_radius_and_dtype(name, shape, eps, dtype, seed):
    # in float16 the gradient of a ratio of logits overflows where all are nearly equal
    assume(dtype != torch.float16 or eps == 0 or eps > 1e-4)
    generator = seeded(seed)
    x = torch.rand(shape, generator=generator).to(dtype)
    x[torch.rand(shape, generator=generator) < 0.2] = 0.0
    x[torch.rand(shape, generator=generator) < 0.2] = 1.0
    y = torch.randint(5, (shape[0],), generator=generator)
    before = x.clone(), y.clone()
    model = linear_model(math.prod(shape[1:]), dtype, seed)
    x_adv = ATTACKS[name].run(model, x, y, eps, generator)
    assert_within(x_adv, x, ATTACKS[name].norm, eps)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert x_adv.data_ptr() != x.data_ptr() or x.numel() == 0


def of_a_radius(name):
    function = getattr(attacks, name)
    return inspect.isfunction(function) and {"model", "eps"} <= set(
        inspect.signature(function).parameters
    )


OF_A_RADIUS = list(filter(of_a_radius, attacks.__all__))


@pytest.mark.parametrize("name", OF_A_RADIUS)
@pytest.mark.parametrize("eps", [0.2, "51/255"])
def test_a_radius_is_all_that_an_attack_needs(name, eps):
    assert len(OF_A_RADIUS) == 9
    x = torch.rand(2, 1, 6, 6, generator=seeded())
    model = linear_model(36, torch.float32)
    x_adv = getattr(attacks, name)(model, x, predicted(model, x), eps=eps)
    assert_within(x_adv, x, "Linf", 0.2)
    assert not torch.equal(x_adv, x)


def test_inside_ball_and_box_on_every_model(attack_and_model, batch):
    attack, model = attack_and_model
    x, _ = batch
    y = predicted(
        deepcopy(model).eval(), x
    )  # some attacks leave alone what is misclassified already
    x_adv = attack.run(model, x, y, 0.2, seeded())
    assert_within(x_adv, x, attack.norm, 0.2)
    assert not torch.equal(x_adv, x)


@pytest.mark.parametrize(("image_attack", "dtype"), IN_A_DTYPE, indirect=["image_attack"])
def test_inside_ball_and_box_in_every_dtype_of_network(image_attack, batch, dtype):
    model = linear_model(36, dtype)
    x = batch[0].to(dtype)
    y = predicted(model, x)
    before = x.clone()
    strict = lambda images: model(images) if images.dtype == dtype else 1 / 0  # noqa: E731
    x_adv = image_attack.run(strict, x, y, 0.4, seeded())
    assert_within(x_adv, x, image_attack.norm, 0.4)
    assert torch.equal(x, before)
    assert int((predicted(model, x_adv) != y).sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dlif"], indirect=True)
def test_inside_ball_and_box_on_a_spiking_network(image_attack, batch, model):
    x = batch[0]
    x_adv = image_attack.run(model, x, predicted(model.eval(), x), 0.2)
    assert_within(x_adv, x, image_attack.norm, 0.2)


def test_the_edge_cases_of_a_batch(image_attack, batch):
    model = linear_model(36)
    x = batch[0]
    y = predicted(model, x)
    assert image_attack.run(model, x[:0], y[:0], 0.2).shape == (0, 1, 6, 6)
    assert torch.equal(image_attack.run(model, x, (y + 1) % 5, 0.2), x)  # all wrong before
    alone = image_attack.run(
        model,
        x[:1],
        y[:1],
        0.2,
        seeded(),
    )
    assert_within(alone, x[:1], image_attack.norm, 0.2)
    wide = linear_model(72)
    strided = x.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
    y = predicted(wide, strided)
    together = image_attack.run(wide, strided, y, 0.2, seeded())
    expected = image_attack.run(
        wide,
        strided.contiguous(),
        y,
        0.2,
        seeded(),
    )
    assert torch.equal(together, expected)


def test_every_sample_is_moved_on_a_model_that_has_a_gradient(gradient_attack, batch):
    x, y = batch
    x_adv = gradient_attack.run(linear_model(36), x, y, 0.2, seeded())
    moved = (x_adv - x).flatten(1).norm(dim=1)
    assert int((moved > 0.05).sum()) >= 5


def test_a_radius_of_zero_returns_the_images(every_attack, batch):
    x, y = batch
    if every_attack is ATTACKS["rfgsm_unprojected"]:
        pytest.skip("without projection the noise of the start stays, whatever eps")
    found = every_attack.run(linear_model(36), x, y, 0.0)
    assert torch.equal(found, x)


def test_unprojected_rfgsm_leaves_the_ball_by_the_noise_alone(batch):
    x = batch[0] * 0.5 + 0.25
    y = batch[1]
    x_adv = rfgsm(
        linear_model(36),
        x,
        y,
        eps=0.1,
        noise_std=0.01,
        project=False,
    )
    distance = (x_adv - x).abs()
    assert distance.max() > 0.101
    assert distance.max() < 0.1 + 6 * 0.01
