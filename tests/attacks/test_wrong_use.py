"""Wrong use gets an error that names the rule, the value and the remedy."""

import pytest
import torch
from attacks.table import NOISES, linear_model, seeded
from torch import nn

from sj_robust import SpikingClassifier, attacks
from sj_robust.attacks import (
    SampleSeeds,
    apgd,
    autoattack,
    fgsm,
    gaussian,
    pgd,
    rfgsm,
    salt_and_pepper,
    sapgd,
    square,
)
from sj_robust.core.host import EVAL_MODE_HAS_NO_GRADIENT, functional, neuron

X = torch.rand(3, 1, 6, 6, generator=seeded(0))
Y = torch.tensor([0, 1, 4])
X[1, 0, 0, 1] = 1.0  # so that a model which takes the elements for logits is right about one image


def replaced(value: float) -> torch.Tensor:
    x = X.clone()
    x[1, 0, 2, 2] = value
    return x


WRONG_INPUTS = {
    "nan": (replaced(torch.nan), Y, ValueError, "x"),
    "inf": (replaced(torch.inf), Y, ValueError, "x"),
    "negative": (replaced(-0.01), Y, ValueError, "x"),
    "rounded": (replaced(1 + 2**-23), Y, ValueError, "x"),
    "bytes as floats": (X * 255, Y, ValueError, "x"),
    "bytes": ((X * 255).byte(), Y, TypeError, "x"),
    "list": (X.tolist(), Y, TypeError, "x"),
    "no N": (X[0, 0, 0], Y, ValueError, "x"),
    "int32 labels": (X, Y.int(), TypeError, "y"),
    "one-hot": (X, nn.functional.one_hot(Y, 5).float(), TypeError, "y"),
    "too few": (X, Y[:2], ValueError, "y"),
    "column": (X, Y[:, None], ValueError, "y"),
    "list of labels": (X, Y.tolist(), TypeError, "y"),
    "negative label": (X, torch.tensor([0, -1, 2]), ValueError, "y"),
    "device": (X, Y.to("meta"), ValueError, "y"),
}


def test_images_and_labels(any_attack):
    model = linear_model(36)
    for x, y, error, name in WRONG_INPUTS.values():
        with pytest.raises(error, match=rf"\b{name}\b"):
            any_attack.run(model, x, y, 0.1)


def test_labels_beyond_the_classes(search):
    with pytest.raises(ValueError, match=r"\by\b"):
        search.run(linear_model(36), X, torch.tensor([0, 5, 1]), 0.1)


LINEAR = linear_model(36)
WRONG_MODELS = [
    (None, TypeError, "model must be a callable from images to logits, got NoneType"),
    (lambda x: (x.flatten(1), None), TypeError, "must return a tensor of logits, got tuple"),
    (lambda x: x.argmax(1), TypeError, "logits must be floating point, got torch.int64"),
    (
        lambda x: x.flatten(2),
        ValueError,
        r"logits must be \[N, classes\] with N = 3, got shape \(3, 1, 36\)",
    ),
    (lambda x: x.flatten(1)[:2], ValueError, r"with N = 3, got shape \(2, 36\)"),
    (lambda x: x.flatten(1) / 0.0, ValueError, "logits must be finite"),
    (
        lambda x: x.detach().flatten(1),
        RuntimeError,
        r"no gradient reaches the images.*0.0.0.0.14.*SpikingClassifier",
    ),
    (lambda x: LINEAR(x.detach()), RuntimeError, "no gradient reaches the images"),
    (
        lambda x: (x.flatten(1) - x.flatten(1).detach()).sqrt(),
        ValueError,
        "gradient at the images must be finite",
    ),
]


def test_models(gradient_attack):
    for model, error, match in WRONG_MODELS:
        with pytest.raises(error, match=match):
            gradient_attack.run(model, X, Y, 0.1)


def test_a_bare_spiking_network_on_the_old_release_is_explained():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), neuron.IFNode(), nn.Linear(5, 5))
    if EVAL_MODE_HAS_NO_GRADIENT:
        with pytest.raises(
            RuntimeError, match=r"no gradient in evaluation mode, so wrap .* SpikingClassifier"
        ):
            fgsm(net, X, Y, eps=0.1)
    functional.reset_net(net)
    assert not torch.equal(fgsm(SpikingClassifier(net, T=2), X, Y, eps=0.1), X)


LEAST = {  # what every attack must be given
    gaussian: {"std": 0.1},
    attacks.uniform: {"eps": 0.1},
    salt_and_pepper: {"amount": 0.1},
    fgsm: {"eps": 0.1},
    rfgsm: {"eps": 0.1},
    pgd: {"eps": 0.1},
    apgd: {"eps": 0.1, "keep_best": False},
    sapgd: {"eps": 0.1, "keep_best": False},
    square: {"eps": 0.1},
    autoattack: {"eps": 0.1},
}
MOVING = [attack for attack in LEAST if attack not in (gaussian, salt_and_pepper)]
ITERATED = [pgd, apgd, sapgd]
WRONG = [
    (MOVING, {"eps": 8}, ValueError, r"eps must be <= 1, .* got 8; write 8 / 255"),
    (MOVING, {"eps": -0.1}, ValueError, r"eps must be finite and >= 0, got -0.1"),
    (MOVING, {"eps": float("nan")}, ValueError, r"eps must be finite and >= 0, got nan"),
    (
        MOVING,
        {"eps": torch.tensor(0.1)},
        TypeError,
        r"eps must be a number, got Tensor; use float\(eps\)",
    ),
    (MOVING, {"eps": True}, TypeError, r"eps must be a number, got bool"),
    (LEAST, {"generator": 0}, TypeError, r"generator must be a torch.Generator, got int.*seed"),
    (
        LEAST,
        {"generator": SampleSeeds([1])},
        ValueError,
        r"one seed per image, 3, got 1; select .* seeds.rows\(rows\)",
    ),
    (
        [pgd, apgd, square, autoattack],
        {"norm": "l2"},
        ValueError,
        r"norm must be one of \('Linf', 'L2'\), got 'l2'",
    ),
    (ITERATED, {"steps": 0}, ValueError, r"steps must be >= 1, got 0"),
    (ITERATED, {"steps": 2.5}, TypeError, r"steps must be an integer, got float"),
    (ITERATED, {"restarts": 0}, ValueError, r"restarts must be >= 1"),
    (ITERATED, {"eot_samples": 0}, ValueError, r"eot_samples must be >= 1"),
    (ITERATED, {"eot_samples": 1.0}, TypeError, r"eot_samples must be an integer, got float"),
    (
        [fgsm, *ITERATED],
        {"loss": lambda z, y: z.sum()},
        ValueError,
        r"one value per sample, \[3\], got \[\]; use red",
    ),
    ([rfgsm, pgd], {"step_size": 0.0}, ValueError, r"step_size must be finite and > 0, got 0.0"),
    ([rfgsm], {"noise_std": -1}, ValueError, r"noise_std must be finite and >= 0"),
    (
        [pgd],
        {"restarts": 2, "random_start": False},
        ValueError,
        r"restarts > 1 need random_start=True .*restarts=2",
    ),
    (
        [pgd],
        {"stop_early": True, "keep_best": False},
        ValueError,
        r"stop_early=True keeps the image that fools, got keep_best=False; omit one",
    ),
    ([apgd], {"target_classes": 0}, ValueError, r"target_classes must be >= 1"),
    (
        [apgd],
        {"loss": "cw"},
        ValueError,
        r"loss must be one of \('ce', 'dlr', 'dlr_targeted'\) or a func.* got 'cw'",
    ),
    ([apgd], {"loss": None}, ValueError, r"loss must be one of .* got None"),
    ([gaussian], {"std": 8}, ValueError, r"std must be <= 1, .* got 8"),
    ([salt_and_pepper], {"amount": 1.1}, ValueError, r"amount must be <= 1"),
    ([salt_and_pepper], {"amount": -0.1}, ValueError, r"amount must be finite and >= 0, got -0.1"),
    ([salt_and_pepper], {"amount": "half"}, TypeError, r"amount must be a number, got str"),
    ([square], {"queries": 0}, ValueError, r"queries must be >= 1, got 0"),
    ([autoattack], {"version": "best"}, ValueError, r"version must be"),
    ([autoattack], {"attacks": ["pgd"]}, ValueError, r"attacks must be"),
    ([autoattack], {"attacks": "square"}, ValueError, r"attacks must be"),
]


@pytest.mark.parametrize(
    ("attack", "options", "error", "match"),
    [(attack, *wrong) for several, *wrong in WRONG for attack in several],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_options(attack, options, error, match):
    with pytest.raises(error, match=match):
        attack(linear_model(36), X, Y, **LEAST[attack] | options)


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize(("loss", "least"), [("dlr", 3), ("dlr_targeted", 4)])
def test_losses_need_classes(loss, least, keep_best):
    model = lambda x: x.flatten(1)[:, : least - 1]  # noqa: E731
    match = (
        rf"loss='{loss}' needs at least {least} classes, the model returns {least - 1}; "
        "use loss='ce'"
    )
    with pytest.raises(ValueError, match=match):
        apgd(
            model,
            X,
            Y * 0,
            eps=0.1,
            loss=loss,
            keep_best=keep_best,
        )


def test_a_single_class_and_infinite_logits(image_attack):
    with pytest.raises(ValueError, match="at least 2 classes"):
        image_attack.run(lambda x: x.flatten(1)[:, :1], X, Y * 0, 0.1)
    with pytest.raises(ValueError, match="logits must be finite"):
        image_attack.run(lambda x: x.flatten(1) / 0, X, Y, 0.1)
    if image_attack.function is autoattack:
        with pytest.raises(RuntimeError, match="grad"):
            image_attack.run(lambda x: x.detach().flatten(1), X, Y, 0.1)


@pytest.mark.parametrize("attack", NOISES.values(), ids=NOISES)
def test_a_noise_takes_no_model_or_a_callable(attack):
    with pytest.raises(TypeError, match="model must be a callable"):
        attack.run(3, X, Y, 0.1)


def test_budgets_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        fgsm(linear_model(36), X, Y, 0.1)
