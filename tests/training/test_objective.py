"""One step of every mode against the formulas of the paper, written out here in float64."""

import pytest
import torch
import torch.nn.functional as F

from sj_robust import SpikingClassifier
from sj_robust.attacks import gaussian, rfgsm
from sj_robust.models import NetworkSpec, build_network
from sj_robust.training import Objective

T, TAU = 3, 5.0
LAYERS = ["stages.1", "stages.5"]


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z >= 0).double()

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return grad * torch.relu(1 - z.abs())


def by_hand(weights, x, *, training):
    """Logits and the input currents of both spiking layers, from nothing but a dictionary of weights."""

    def norm(x_seq, name):
        flat = x_seq.flatten(0, 1)
        if training:
            mean, var = flat.mean((0, 2, 3)), flat.var((0, 2, 3), unbiased=False)
        else:
            mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        mean, var, weight, bias = (
            value[:, None, None] for value in (mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"])
        )
        return ((flat - mean) / (var + 1e-5).sqrt() * weight + bias).view(x_seq.shape)

    def spikes(x_seq, gain):
        v, out = torch.zeros_like(x_seq[0]), []
        for t in range(T):
            h = (1 - 1 / TAU) * v + gain[t] * x_seq[t]
            out.append(Triangle.apply(h - 1))
            v = (1 - out[-1]) * h
        return torch.stack(out)

    def pool(x_seq):
        return F.avg_pool2d(x_seq.flatten(0, 1), 2).unflatten(0, (T, -1))

    first = F.conv2d(x, weights["first.weight"], weights["first.bias"], padding=1)
    current_1 = norm(torch.stack([first] * T), "stages.0")
    pooled = pool(spikes(current_1, weights["stages.1.input_gain"])).flatten(0, 1)
    second = F.conv2d(pooled, weights["stages.3.weight"], weights["stages.3.bias"], padding=1)
    current_2 = norm(second.unflatten(0, (T, -1)), "stages.4")
    features = pool(spikes(current_2, weights["stages.5.input_gain"])).flatten(2)
    outputs = features @ weights["stages.8.weight"].T + weights["stages.8.bias"]
    return outputs.mean(0), {"stages.1": current_1, "stages.5": current_2}


def mppd_by_hand(clean, perturbed, norm):
    eps, total = torch.zeros_like(clean[0]), []
    for t in range(T):
        eps = (1 - 1 / TAU) * eps + clean[t].detach() - perturbed[t]
        total.append(eps.square() if norm == "l2" else eps.abs())
    return torch.stack(total).mean()


@pytest.fixture
def problem():
    torch.manual_seed(0)
    spec = NetworkSpec(image_shape=(2, 8, 8), classes=5, T=T, tau=TAU, channels=(4, 6))
    classifier = SpikingClassifier(build_network(spec), T).double()
    with torch.no_grad():
        for name, value in classifier.net.named_parameters():
            if "input_gain" in name:
                value.copy_(torch.rand(T) + 0.7)
            elif value.ndim == 1:
                value.add_(0.3 * torch.randn(value.shape))
        classifier.train()
        for _ in range(5):
            classifier(torch.rand(16, 2, 8, 8, dtype=torch.float64))
    x, y = torch.rand(6, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    weights = {name: value.detach().clone() for name, value in classifier.net.state_dict().items()}
    for name, _ in classifier.net.named_parameters():
        weights[name].requires_grad_()
    return classifier, weights, x, y


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize(
    ("mode", "kappa", "rho", "layers"),
    [
        ("none", 0.5, 1.0, "last"),
        ("gaussian", 0.5, 1.0, "last"),
        ("at", 0.5, 1.0, "last"),
        ("at", 0.3, 2.5, "all"),
        ("at", 0.7, 0.5, ["stages.1"]),
        ("at", 0.5, 0.0, "last"),
    ],
)
def test_loss_and_every_gradient_equal_an_independent_computation(problem, mode, kappa, rho, layers, norm):
    classifier, weights, x, y = problem
    objective = Objective(classifier, kappa=kappa, rho=rho, layers=layers, norm=norm).train()
    x_tilde = None
    if mode == "gaussian":
        x_tilde = gaussian(None, x, std=0.2, clamp=False, generator=torch.Generator().manual_seed(1))
        assert x_tilde.max() > 1
    elif mode == "at":
        x_tilde = rfgsm(classifier, x, y, eps=0.1, step_size=0.08, noise_std=0.0)
        at = x.clone().requires_grad_()
        loss = F.cross_entropy(by_hand(weights, at, training=False)[0], y)
        expected = (x + 0.08 * torch.autograd.grad(loss, at)[0].sign()).clamp(0, 1)
        torch.testing.assert_close(x_tilde, expected, rtol=0, atol=1e-12)
    losses = objective(x, y, x_tilde)
    losses.total.backward()

    logits, clean = by_hand(weights, x, training=True)
    expected = F.cross_entropy(logits, y)
    if x_tilde is not None:
        logits_tilde, perturbed = by_hand(weights, x_tilde, training=True)
        names = {"last": ["stages.5"], "all": LAYERS}.get(layers if isinstance(layers, str) else "", layers)
        mppd = torch.stack([mppd_by_hand(clean[name], perturbed[name], norm) for name in names]).mean()
        expected = kappa * expected + (1 - kappa) * F.cross_entropy(logits_tilde, y) + rho * mppd
        if rho > 0:
            assert mppd > 1e-3
            torch.testing.assert_close(losses.mppd, mppd.detach(), rtol=1e-6, atol=0, check_dtype=False)
    expected.backward()

    torch.testing.assert_close(losses.total, expected, rtol=1e-6, atol=0, check_dtype=False)
    for name, value in classifier.net.named_parameters():
        before_batch_norm = name in ("first.bias", "stages.3.bias")  # which takes the bias away
        assert before_batch_norm or value.grad.abs().max() > 1e-6, name
        torch.testing.assert_close(value.grad, weights[name].grad, rtol=1e-6, atol=1e-9)


def test_batch_norm_sees_the_clean_and_then_the_perturbed_images(problem):
    classifier, weights, x, y = problem
    x_tilde = (x + 0.2).clamp(0, 1)
    mean = weights["stages.0.running_mean"].clone()
    for images in (x, x_tilde):
        first = F.conv2d(images, weights["first.weight"], weights["first.bias"], padding=1)
        mean = 0.9 * mean + 0.1 * first.mean((0, 2, 3)).detach()
    Objective(classifier).train()(x, y, x_tilde)
    torch.testing.assert_close(classifier.net.stages[0].running_mean, mean)


def test_parts_and_accuracy(problem):
    classifier, _, x, y = problem
    objective = Objective(classifier, kappa=0.25, rho=2.0).eval()
    losses = objective(x, y, x)
    assert losses.mppd == 0
    assert losses.clean == losses.perturbed == losses.total
    with torch.no_grad():
        assert losses.accuracy == losses.accuracy_perturbed == (classifier(x).argmax(1) == y).double().mean()
    assert not losses.clean.requires_grad


def test_calls_between_the_two_passes_do_not_count(problem):
    classifier, _, x, y = problem
    objective = Objective(classifier).eval()
    before = objective(x, y, x * 0.9).mppd
    classifier(x * 0.1)
    assert torch.equal(objective(x, y, x * 0.9).mppd, before)


def test_wrong_use(problem):
    classifier = problem[0]
    with pytest.raises(ValueError, match="kappa"):
        Objective(classifier, kappa=1.5)
    with pytest.raises(ValueError, match="rho"):
        Objective(classifier, rho=-1.0)
    with pytest.raises(ValueError, match="norm"):
        Objective(classifier, norm="l3")
    with pytest.raises(ValueError, match="nowhere"):
        Objective(classifier, layers=["nowhere"])
