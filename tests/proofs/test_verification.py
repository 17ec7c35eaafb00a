"""Bounds are true of the float32 network that runs: no spike outside them, no verified image
fooled.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from proofs import fuzz
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import pgd
from sj_robust.classifier import PoissonEncoder, SpikingEventClassifier
from sj_robust.proofs import UnsoundBoundsError, bounds, rounding, rules, verify
from sj_robust.proofs.verification import bounded_logits, bounded_neurons

T = 4
NEURONS = {
    "IF": lambda: neuron.IFNode(),
    "LIF": lambda: neuron.LIFNode(tau=2.0),
    "LIF soft": lambda: neuron.LIFNode(tau=3.0, decay_input=False, v_reset=None),
    "LIF reset to 0.2": lambda: neuron.LIFNode(tau=2.0, v_reset=0.2, v_threshold=0.7),
    "LIF reset to -0.5": lambda: neuron.LIFNode(tau=2.0, v_reset=-0.5, v_threshold=0.3),
    "PLIF": lambda: neuron.ParametricLIFNode(init_tau=2.0),
    "DLIF": lambda: with_gains(DLIFNode(T=T, tau=4.0)),
    "DLIF soft": lambda: with_gains(DLIFNode(T=T, tau=10.0, v_reset=None, v_threshold=0.6)),
}


def with_gains(node):
    """Gains of either sign."""
    node.input_gain.data = torch.tensor([1.5, -0.7, 2.0, 0.3])
    return node


def convolutional(node):
    return nn.Sequential(
        layer.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        layer.BatchNorm2d(4),
        node(),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(16, 6, bias=False),
        node(),
        layer.Linear(6, 3),
    )


def residual(node):
    def block():
        return fuzz.Residual(layer.Conv2d(4, 4, 3, padding=1), layer.BatchNorm2d(4), node())

    return nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        node(),
        block(),
        layer.MaxPool2d(2),
        block(),
        layer.AdaptiveAvgPool2d(2),
        layer.Flatten(),
        layer.Linear(16, 3),
    )


def spikes_at_the_end(node):
    return nn.Sequential(layer.MaxPool2d(2), layer.Flatten(), layer.Linear(32, 3), node())


NETWORKS = [convolutional, residual, spikes_at_the_end]


def classifier(build, node, *, seed=0, step_mode="m", **arguments):
    torch.manual_seed(seed)
    net = build(node)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.normal_(1.0, 0.5)
            module.bias.data.normal_()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= 3  # so that neurons fire
    functional.set_step_mode(net, step_mode)
    return SpikingClassifier(net, T, **arguments).eval()


def perturbed(model, x, y, eps):
    """Points of the ball: its corners, random ones, and adversarial ones."""
    random = [x + eps * (2 * torch.rand(x.shape) - 1) for _ in range(4)]
    corners = [x + eps * (2.0 * torch.randint(2, x.shape) - 1) for _ in range(4)]
    yield from (
        torch.maximum(torch.minimum(z, x + eps), x - eps).clamp(0, 1)
        for z in (x, *random, *corners)
    )
    if eps > 0:
        yield pgd(model, x, y, eps=eps, step_size=eps / 3, steps=5)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nothing_leaves_its_bounds(seed):
    assert fuzz.check(seed, 64)["inputs"] == 64


@pytest.mark.slow
def test_what_float32_rounds_is_noticed_where_bounds_leave_it_out(monkeypatch):
    for module in (rounding, rules):
        monkeypatch.setattr(module, "gamma", lambda terms: 0.0)
    with pytest.raises((AssertionError, UnsoundBoundsError), match="^an? "):
        list(map(fuzz.check, range(10), [64] * 10))


@pytest.mark.slow
@pytest.mark.parametrize("build", NETWORKS)
def test_margins_fall_with_the_radius_and_are_the_networks_own_at_zero(build):
    """What intervals verify at a radius they verify at every smaller one, since they lie within
    each other.

    The relaxation takes its lines anew for every radius, which promises no such order: here it
    holds for what is verified, not for every margin. No margin of it is below that of intervals.
    """
    model = classifier(build, NEURONS["DLIF"])
    x = torch.rand(6, 2, 8, 8)
    logits = model(x).detach()
    y = logits.argmax(1)
    at_zero = verify(model, x, y, 0.0)
    rivals = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    expected = logits.gather(1, y.unsqueeze(1)).squeeze(1) - rivals
    assert_close(
        torch.tensor(at_zero.margin), expected.double(), atol=1e-4, rtol=0, check_dtype=False
    )
    found = sum(map(sum, (layer.undecided for layer in at_zero.layers)))
    assert found == 0
    radii = (0.0, 1e-4, 0.001, 0.003, 0.01, 0.03, 0.1)
    margins, crown = (
        torch.tensor([verify(model, x, y, eps, method=method).margin for eps in radii])
        for method in ("ibp", "crown")
    )
    assert (margins.diff(dim=0) <= 1e-9).all()
    assert (crown >= margins).all()
    verified = crown > 0
    assert (verified[1:] <= verified[:-1]).all()


A, B = torch.tensor([[1.5, -0.5, 0.3, -2.0], [-0.7, 0.2, 3.0, 1.1]]).double()
AFFINE = {
    "batch norm": lambda x: F.batch_norm(x, A, B.abs() + 0.1, 3 * B, A),
    "batch norm alone": lambda x: F.batch_norm(x, A, B.abs() + 0.1),
    "convolution": lambda x: F.conv2d(x, A.view(2, 2, 1, 1), B[:2], groups=2),
    "linear": lambda x: F.linear(x, B.view(1, 4), A[:1]),
    "average": lambda x: F.avg_pool2d(F.adaptive_avg_pool2d(x, (2, 4)), (2, 1)),
    "means": lambda x: x.mean(1, True).sum(-1) / -3.0,
    "sums": lambda x: 1.0 - (2.0 - x[:, :2]) * A + (-x[:, 2:]) / B,
}


@pytest.mark.parametrize("name", AFFINE)
def test_an_affine_map_spreads_a_box_by_its_absolute_values(name):
    centre = torch.randn(1, 4, 4, 4).double()
    radius = torch.rand(1, 4, 4, 4).double()
    found = AFFINE[name](rules.Bounds(centre, radius))
    jacobian = torch.autograd.functional.jacobian(AFFINE[name], centre)
    assert_close(found.centre, AFFINE[name](centre))
    expected = (jacobian.abs() * radius).sum((-4, -3, -2, -1))
    assert_close(found.radius, expected)


def test_a_potential_on_the_threshold_needs_the_margin_for_rounding(monkeypatch):
    """The exact sum is below the threshold; float32 rounds it up to the threshold, and there is a
    spike.
    """
    x = torch.rand(1, 300, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(layer.Linear(300, 2, step_mode="m"), neuron.IFNode(step_mode="m"))
    torch.manual_seed(0)
    nn.init.uniform_(net[0].weight, 0.0, 0.01)
    nn.init.zeros_(net[0].bias)
    model = SpikingClassifier(net, 1).eval()
    current = net[0](x.unsqueeze(0))[0, 0].detach()
    exact = (net[0].weight.double() @ x[0].double()).detach()
    rounded_up = int((current.double() - exact).argmax())
    assert float(current[rounded_up]) > float(exact[rounded_up])
    net[1].v_threshold = float(current[rounded_up])
    assert float(model(x).detach()[0, rounded_up]) == 1.0

    def possible():
        run = fuzz.Recorded(bounded_neurons(model), 1)
        bounded_logits(model, run, x, 0.0)
        first = fuzz.kept(run.layers["1"])[0]
        return bool(first.possible[0, rounded_up])

    assert possible()
    monkeypatch.setattr(rounding, "_UNIT", 0.0)
    assert not possible()


def test_parts_of_the_data_give_what_the_whole_gives_and_nothing_is_left_behind():
    model = classifier(convolutional, NEURONS["LIF"])
    x = torch.rand(7, 2, 8, 8)
    y = torch.randint(3, (7,))
    model(x)
    done = []
    with unchanged(model):
        whole = verify(model, x, y, 0.01)
        parts = verify(model, x, y, 0.01, batch_size=3, on_batch=done.append)
    assert done == [3, 6, 7]
    assert parts.correct == whole.correct
    assert_close(torch.tensor(parts.margin), torch.tensor(whole.margin))
    for part, all_at_once in zip(parts.layers, whole.layers, strict=True):
        assert_close(torch.tensor(part.undecided), torch.tensor(all_at_once.undecided))
        assert_close(torch.tensor(part.potential), torch.tensor(all_at_once.potential))
    assert "forward" not in vars(model.net[2])
    assert (
        whole.table()
        .splitlines()[0]
        .startswith(f"Linf 0.01: {sum(whole.verified)} of 7 images verified")
    )


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_bounds_of_relu_are_intervals_by_hand_and_hold(step_mode):
    """The twin of a spiking network: bounds of the results are the results of the bounds."""
    model = classifier(convolutional, nn.ReLU, step_mode=step_mode)
    model.T = 1
    x = torch.rand(7, 2, 8, 8)
    y = torch.randint(3, (7,))
    margins = {m: verify(model, x, y, 0.01, method=m).margin for m in ("ibp", "crown", "bab")}
    low = (x - 0.01).clamp(min=0).double()
    high = (x + 0.01).clamp(max=1).double()
    parts = [part for part in model.net.double() if not isinstance(part, nn.ReLU)]
    for number, part in enumerate(parts[:-1]):
        if step_mode == "m":
            low = low.unsqueeze(0)
            high = high.unsqueeze(0)
        zero = part(torch.zeros_like(low))
        centre = part((low + high) / 2)
        radius = absolute(part)((high - low) / 2)
        ends = [centre - radius, centre + radius]
        if number in (1, 4):
            ends = [end.clamp(min=0) for end in ends]
        assert zero.shape == centre.shape
        low, high = (end.squeeze(0) if step_mode == "m" else end for end in ends)
    over = parts[-1].weight[None] - parts[-1].weight[y][:, None]
    shift = parts[-1].bias - parts[-1].bias[y][:, None]
    lead = over @ ((low + high) / 2)[..., None] + over.abs() @ ((high - low) / 2)[..., None]
    lead = (lead.squeeze(-1) + shift).scatter(1, y.unsqueeze(1), -torch.inf)
    found = torch.tensor(margins["ibp"], dtype=torch.float64)
    assert_close(found, -lead.amax(1).detach(), rtol=0, atol=1e-4)  # rounding
    model.float()
    for margin in margins.values():
        bound = torch.tensor(margin, dtype=torch.float64)
        assert (bound >= found).all()
        for z in perturbed(model, x, y, 0.01):
            logits = model(z).double()
            rival = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
            assert (logits.gather(1, y.unsqueeze(1)).squeeze(1) - rival >= bound).all()


def test_lines_of_relu_are_exact_where_it_is_decided_and_there_is_no_program():
    """Its lead is 1 everywhere, which intervals do not see."""
    net = nn.Sequential(layer.Linear(1, 2), nn.ReLU(), layer.Linear(2, 2))
    functional.set_step_mode(net, "m")
    model = SpikingClassifier(net, 1).eval()
    y = torch.tensor([0])
    net[0].weight.data = torch.tensor([[8.0], [8.0]])
    net[0].bias.data = torch.zeros(2)
    net[2].weight.data = torch.eye(2)
    net[2].bias.data = torch.tensor([1.0, 0.0])
    x = torch.tensor([[0.5]])
    intervals = verify(model, x, y, 0.1)
    assert intervals.margin[0] == pytest.approx(1 - 1.6, abs=1e-4)
    assert intervals.layers == ()
    labels = intervals.plot().axes[1].get_yticklabels()
    assert [label.get_text() for label in labels] == ["no spiking layer"]
    found = verify(model, x, y, 0.1, method="crown").margin[0]
    assert found == pytest.approx(1, abs=1e-4)
    net[0].bias.data = torch.full((2,), -4.0)
    assert not verify(model, x, y, 0.3, method="crown").verified[0]
    with pytest.raises(NotImplementedError, match="no program is known for a network with ReLU"):
        verify(model, x, y, 0.3, method="mip")


def absolute(part):
    """An affine layer without its shift, of the absolute values of its map."""
    part = copy.deepcopy(part)
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        part.running_mean.zero_()
    for name, value in part.named_parameters():
        value.data = torch.zeros_like(value) if name == "bias" else value.data.abs()
    return part


class Rectified(nn.Module):
    """ReLU between a layer and a neuron, on [T, N, *]."""

    def __init__(self, inplace=False):
        super().__init__()
        self.parts = nn.Sequential(
            layer.Linear(2, 2), nn.ReLU(inplace), layer.Linear(2, 2), neuron.IFNode()
        )
        functional.set_step_mode(self, "m")

    def forward(self, x):
        return self.parts(x)


@pytest.mark.parametrize("steps", [2, 3])
def test_relu_on_several_time_steps_and_in_place_is_refused(steps):
    """Whichever of steps and images there are more of: proofs try 2 and 3 of them."""
    x = torch.rand(steps, 2)
    y = torch.zeros(steps, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="ReLU of .* there are for one time step"):
        verify(SpikingClassifier(Rectified(), steps).eval(), x, y, 0.1)
    with pytest.raises(NotImplementedError, match="ReLU that writes into its input"):
        verify(SpikingClassifier(Rectified(inplace=True), 1).eval(), x, y, 0.1)


def test_frames_of_events_are_bounded_step_by_step():
    torch.manual_seed(0)
    net = nn.Sequential(layer.Flatten(), layer.Linear(32, 3), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    model = SpikingEventClassifier(net, T).eval()
    frames = torch.randint(2, (4, T, 2, 4, 4)).float()
    y = model(frames).argmax(1)
    verified = torch.tensor(verify(model, frames, y, 0.1).verified)
    for z in perturbed(model, frames, y, 0.1):
        assert (model(z).argmax(1) == y)[verified].all()


class Statement(nn.Module):
    """A layer of current, a statement on it, and a neuron."""

    def __init__(self, statement):
        super().__init__()
        self.statement = statement
        self.node = neuron.IFNode(step_mode="m")

    def forward(self, x):
        return self.node(self.statement(x))


C = torch.tensor([0.0, 5.0])


def alias(x):
    kept = x = x * 1.0
    x += C
    return kept


def view_is_gone(x):
    x = (x * 1.0).flatten(0, 1).unflatten(0, x.shape[:2])
    x.add_(C).mul_(2.0).sub_(C).div_(2.0)
    return x


def a_view_sees_it(x):
    x = x * 1.0
    view = x[:, :, :]
    x += C
    return view


def a_base_sees_it(x):
    x = x * 1.0
    view = x[:, :, 1]
    view += 5.0
    return x


def a_constant_sees_it(x):
    found = torch.zeros(4, x.shape[1], 2)
    found += x
    return found


def no_difference(x):
    return torch.mul(x, C, out=x * 1.0)


@pytest.mark.parametrize("statement", [alias, view_is_gone])
def test_what_is_written_in_place_is_seen_by_all_who_hold_it(statement):
    model = SpikingClassifier(Statement(statement), T).eval()
    x = torch.tensor([[0.9, 0.0]])
    y = torch.tensor([1])
    expected = (float(model(x).diff()),)
    assert_close(verify(model, x, y, 0.0).margin, expected, atol=1e-5, rtol=0)
    assert not verify(model, x, 1 - y, 0.05, method="crown").verified[0]


def test_arguments_by_name_are_known():
    model = behind(
        lambda x: torch.cat(tensors=[torch.add(input=x, other=C), torch.sub(C, other=x)], dim=-1)
    )
    x = torch.rand(2, 2)
    y = torch.tensor([1, 1])
    assert_close(
        verify(model, x, y, 0.0).margin,
        verify(behind(lambda x: torch.cat([x + C, C - x], -1)), x, y, 0.0).margin,
    )


@pytest.mark.parametrize(
    "statement", [a_view_sees_it, a_base_sees_it, a_constant_sees_it, no_difference]
)
def test_what_is_written_into_shared_memory_is_refused(statement):
    with pytest.raises(NotImplementedError, match="write x = "):
        verify(
            SpikingClassifier(Statement(statement), T).eval(),
            torch.rand(1, 2),
            torch.tensor([0]),
            0.1,
        )


class BatchFirst(nn.Module):
    """A max pooling of frames of one sample after the other."""

    def __init__(self):
        super().__init__()
        self.node = neuron.IFNode(step_mode="m")
        self.pool = nn.MaxPool2d(1)

    def forward(self, x):
        x = self.node(x).transpose(0, 1)
        return self.pool(x.flatten(0, 1)).view(x.shape).transpose(0, 1).flatten(2)


MIXED = {
    "neuron in a container": layer.SeqToANNContainer(nn.Flatten(), neuron.IFNode(step_mode="s")),
    "batch first": BatchFirst(),
    "mean": Statement(lambda x: (x - x.mean(1, keepdim=True)).flatten(2)),
    "number": Statement(lambda x: x.flatten(2) / x.shape[1]),
    "order": Statement(lambda x: x.flip(1).flatten(2)),
    "weights": Statement(lambda x: x.flatten(2) * torch.arange(x.shape[1]).view(1, -1, 1)),
}


@pytest.mark.parametrize("net", MIXED)
@pytest.mark.parametrize("count", [1, T])
def test_a_network_that_mixes_samples_is_refused(net, count):
    model = SpikingClassifier(MIXED[net], T, takes="sequence").eval()
    with pytest.raises(NotImplementedError, match="samples"):
        verify(model, torch.rand(count, 2, 1, 1), torch.zeros(count, dtype=torch.long), 0.1)


def test_a_proof_of_what_the_network_gets_wrong_is_an_error(monkeypatch):
    monkeypatch.setattr(
        bounds.BoundedRun, "lead", lambda self, logits, y: -torch.ones(logits.shape).double()
    )
    model = classifier(convolutional, NEURONS["LIF"])
    x = torch.rand(3, 2, 8, 8)
    y = model(x).argmax(1)
    y[2] = (y[2] + 1) % 3
    with pytest.raises(UnsoundBoundsError, match="image 0 is proved to keep its class by 1, "):
        verify(model, x, y, 0.1, batch_size=1)


def changed(node=None, **attributes):
    """A network whose neuron has other attributes than it was built with."""
    model = SpikingClassifier(
        nn.Sequential(nn.Linear(2, 2), node or neuron.IFNode(step_mode="m")), T
    ).eval()
    vars(model.net[1]).update(attributes)
    return model


def weights_of(value):
    model = changed()
    model.net[0].weight.data.fill_(value)
    return model


def behind(statement):
    return SpikingClassifier(Statement(statement), T).eval()


def draws():
    model = behind(lambda x: x + 0 * torch.rand(x.shape))
    model.unused = torch.Generator()  # one that is not drawn from must not hide that another is
    return model


def trains_inside():
    model = changed()
    model.net[0].train()
    return model


class Attention(nn.Module):
    def forward(self, x):
        return x @ x.transpose(-1, -2)


WRONG = {
    "no classifier": (nn.Flatten(), {}, "wrap the network"),
    "training": (changed().train(), {}, "call model.eval()"),
    "training inside": (trains_inside(), {}, "got net.0 in training mode"),
    "random": (draws(), {}, "draws random numbers inside"),
    "float64": (
        changed(),
        {"x": torch.rand(2, 2).double()},
        "in float32.*got torch.float32, torch.float64; use",
    ),
    "negative": (changed(), {"eps": -0.1}, "eps must be >= 0 and finite, got -0.1"),
    "not a number": (changed(), {"eps": float("nan")}, "eps must be >= 0 and finite, got nan"),
    "label": (changed(), {"y": torch.tensor([0, 2])}, "y must hold labels < 2"),
    "labels": (changed(), {"y": torch.tensor([0])}, "shape .N. = .2."),
    "none": (
        changed(),
        {"x": torch.rand(0, 2), "y": torch.tensor([], dtype=torch.long)},
        "an image or more",
    ),
    "range": (changed(), {"x": torch.rand(2, 2) + 1}, "must lie in .0, 1."),
    "method": (
        changed(),
        {"method": "exact"},
        "method must be one of ibp, joint, crown, bab, mip, got 'exact'",
    ),
    "no time": (
        changed(),
        {"method": "bab", "time_limit": 0},
        "time_limit must be finite and > 0, got 0",
    ),
    "time as text": (
        changed(),
        {"method": "bab", "time_limit": "1"},
        "time_limit must be a number, got str",
    ),
    "attention": (
        SpikingClassifier(nn.Sequential(Attention(), neuron.IFNode(step_mode="m")), T).eval(),
        {},
        "the operation matmul in or behind 0 .Attention.",
    ),
    "encoder": (
        SpikingClassifier(changed().net, T, PoissonEncoder()).eval(),
        {},
        "the encoder PoissonEncoder",
    ),
    "not spiking": (
        changed(neuron.IFNode(surrogate_function=surrogate.ATan(spiking=False), step_mode="m")),
        {},
        "whose surrogate does not spike",
    ),
    "batch statistics": (
        behind(lambda x: F.batch_norm(x.flatten(0, 1), None, None, training=True).view(x.shape)),
        {},
        "the statistics of the batch",
    ),
    "neuron": (changed(neuron.QIFNode(step_mode="m")), {}, "the decay of QIFNode is not known"),
    "reset changed": (changed(v_reset=0.8), {}, "whose v_reset was changed"),
    "tau": (
        changed(neuron.LIFNode(step_mode="m"), tau=0.5),
        {},
        "whose decay is negative: give it a tau",
    ),
    "by name": (behind(lambda x: torch.add(x, C[:2], alpha=2)), {}, "a sum with alpha"),
    "unknown name": (
        behind(lambda x: torch.neg(x, out=None)),
        {},
        "the operation neg as it is called here",
    ),
    "sum in half": (
        behind(lambda x: x.unsqueeze(-1).sum(-1, dtype=torch.half)),
        {},
        "a conversion to torch.float16",
    ),
    "thresholds": (changed(v_threshold=torch.ones(2)), {}, "v_threshold is not one finite number"),
    "nan": (
        weights_of(torch.nan),
        {},
        "weights must be finite, got NaN or infinity in net.0.weight",
    ),
    "overflow": (weights_of(3e38), {}, "may be beyond 1e30"),
    "half": (
        behind(lambda x: x.to(torch.zeros(1).bfloat16()).float()),
        {},
        "a conversion to torch.bfloat16",
    ),
    "type_as": (
        behind(lambda x: x.type_as(torch.zeros(1).half()).float()),
        {},
        "a conversion to torch.float16",
    ),
    "number": (behind(lambda x: x * float(x.sum())), {}, "a number that depends on the input"),
    "one class": (behind(lambda x: x[..., :1]), {}, "2 classes or more"),
    "no batch": (changed(), {"batch_size": 0}, "batch_size must be >= 1, got 0"),
    "half a batch": (changed(), {"batch_size": 1.5}, "batch_size must be an integer"),
    "text": (changed(), {"eps": "8/x"}, "eps must be a number or a fraction"),
    "list": (changed(), {"y": [0, 1]}, "y must be a tensor of labels, got list"),
    "float labels": (changed(), {"y": torch.zeros(2)}, "y must be int64"),
    "no tensor": (changed(), {"x": [[0.1, 0.2]]}, "x must be a tensor of images, got list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_and_what_has_no_bounds_are_refused(case):
    model, given, message = WRONG[case]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        verify(
            model,
            **{"x": torch.rand(2, 2), "y": torch.zeros(2, dtype=torch.long), "eps": 0.1} | given,
        )


def test_numbers_are_those_of_a_float64_network():
    model = behind(lambda x: (x - 0.1).to(torch.zeros(1).double()) * 1e9).double()
    x = torch.tensor([[0.1 + 1.3e-9, 0.1 - 1.3e-9]], dtype=torch.float64)
    found = verify(model, x, torch.tensor([0]), 0.0).margin[0]
    assert found == pytest.approx(float(-model(x).diff()), abs=1e-5)


@pytest.mark.parametrize("size", [torch.tensor([2.0]), torch.tensor([0.0])])
def test_a_negative_threshold_does_not_lessen_rounding(size):
    found = float(rounding.reset_rounding(size, 0.0, -5.0))
    expected = float(rounding.reset_rounding(size, 0.0, 5.0))
    assert found == expected
