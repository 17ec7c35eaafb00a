"""Bounds are true of the float32 network that runs: no spike outside them, no verified image
fooled.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from proofs import fuzz
from proofs.networks import (
    NETWORKS,
    NEURONS,
    T,
    assert_keep_their_class,
    batch,
    classifier,
    convolutional,
    in_steps,
    lead,
    perturbed,
)
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust import SpikingClassifier
from sj_robust.classifier import PoissonEncoder, SpikingEventClassifier
from sj_robust.proofs import UnsoundBoundsError, bounds, rounding, rules, verify
from sj_robust.proofs.bounds import bounded_logits, bounded_neurons

RADII = (0.0, 0.001, 0.01, 0.1)


@pytest.mark.slow
def test_nothing_leaves_its_bounds_unless_they_leave_out_what_float32_rounds(monkeypatch):
    for seed in range(10):
        assert fuzz.check(seed, 64)["inputs"] == 64
    for module in (rounding, rules):
        monkeypatch.setattr(module, "gamma", lambda terms: 0.0)
    with pytest.raises((AssertionError, UnsoundBoundsError), match="^an? "):
        list(map(fuzz.check, range(10), [64] * 10))


@pytest.mark.slow
@pytest.mark.parametrize("build", NETWORKS)
def test_margins_fall_with_the_radius_and_are_the_networks_own_at_zero(build):
    """What intervals verify at a radius they verify at every smaller one, since they lie within
    each other. No joint margin is below that of intervals.
    """
    model = classifier(build, NEURONS["DLIF"])
    x, y = batch(model, 3)
    at_zero = verify(model, x, y, 0.0)
    expected = lead(model(x).detach(), y).double()
    assert_close(torch.tensor(at_zero.margin).double(), expected, atol=1e-4, rtol=0)
    for layer_bounds in at_zero.layers:
        assert sum(layer_bounds.undecided) == 0
    margins = torch.tensor([verify(model, x, y, eps, method="ibp").margin for eps in RADII])
    joint = torch.tensor([verify(model, x, y, eps).margin for eps in RADII])
    assert (margins.diff(dim=0) <= 1e-9).all()
    assert (joint >= margins).all()


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


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_number_in_float64_is_one_of_float32_beside_values_of_the_network(sign):
    x = torch.full((1,), -sign * 0.1)
    number = torch.tensor(sign * 0.1, dtype=torch.float64)
    found = rules.Bounds(x.double(), torch.zeros(1).double()) + number
    assert found.lower <= x + number <= found.upper


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


def test_torch_is_given_no_weights_for_which_it_would_import_sympy(monkeypatch):
    grad = torch.autograd.grad
    given = []

    def recorded(outputs, inputs, grad_outputs=None, **options):
        given.append(grad_outputs)
        return grad(outputs, inputs, grad_outputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    model = classifier(convolutional, NEURONS["LIF"])
    verify(model, torch.rand(2, 2, 8, 8), torch.randint(3, (2,)), 0.01)
    assert len(given) > 5
    assert {*given} == {None}


def test_parts_of_the_data_give_what_the_whole_gives_and_nothing_is_left_behind():
    model = classifier(convolutional, NEURONS["LIF"])
    x = torch.rand(7, 2, 8, 8)
    y = torch.randint(3, (7,))
    model(x)
    done = []
    with unchanged(model):
        whole = verify(model, x, y, 0.01)
        parts = verify(model, x, y, 0.01, batch_size=3, on_batch=done.append)
    with unchanged(model.train()):
        assert verify(model, x, y, 0.01) == whole
    assert all(module.training for module in model.modules())
    assert done == [3, 6, 7]
    assert parts.correct == whole.correct
    assert_close(torch.tensor(parts.margin), torch.tensor(whole.margin))
    for part, all_at_once in zip(parts.layers, whole.layers, strict=True):
        assert_close(torch.tensor(part.undecided), torch.tensor(all_at_once.undecided))
        assert_close(torch.tensor(part.potential), torch.tensor(all_at_once.potential))
    assert "forward" not in vars(model.net[2])
    title = f"Linf 0.01: {sum(whole.verified)} of 7 images verified"
    assert whole.table().startswith(title)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_bounds_of_relu_are_intervals_by_hand_and_hold(step_mode):
    """The twin of a spiking network: bounds of the results are the results of the bounds."""
    model = classifier(convolutional, nn.ReLU, step_mode=step_mode)
    model.T = 1
    x = torch.rand(7, 2, 8, 8)
    y = torch.randint(3, (7,))
    margins = {}
    for method in ("ibp", "joint"):
        margin = verify(model, x, y, 0.01, method=method).margin
        margins[method] = torch.tensor(margin, dtype=torch.float64)
    expected = margin_by_hand(model.net.double(), x, y, 0.01, step_mode)
    assert_close(margins["ibp"], expected, rtol=0, atol=1e-4)  # rounding
    model.float()
    for margin in margins.values():
        assert (margin >= margins["ibp"]).all()
        for z in perturbed(model, x, y, 0.01):
            assert (lead(model(z).double(), y) >= margin).all()


def margin_by_hand(net, x, y, eps, step_mode):
    """Least lead of the label by intervals, layer after layer, with ReLU after two of them."""
    low = (x - eps).clamp(min=0).double()
    high = (x + eps).clamp(max=1).double()
    if step_mode == "m":
        low = low.unsqueeze(0)
        high = high.unsqueeze(0)
    for part in net[:-1]:
        if isinstance(part, nn.ReLU):
            low = low.clamp(min=0)
            high = high.clamp(min=0)
        else:
            centre = part((low + high) / 2)
            radius = absolute(part)((high - low) / 2)
            low = centre - radius
            high = centre + radius
    low = low.flatten(0, -2).unsqueeze(-1)
    high = high.flatten(0, -2).unsqueeze(-1)
    head = net[-1]
    over = head.weight - head.weight[y].unsqueeze(1)
    shift = head.bias - head.bias[y].unsqueeze(1)
    greatest = over @ ((low + high) / 2) + over.abs() @ ((high - low) / 2)
    rival = greatest.squeeze(-1) + shift
    return -rival.scatter(1, y.unsqueeze(1), -torch.inf).amax(1).detach()


def test_a_network_without_spiking_layers_has_intervals():
    """Its lead is 1 everywhere, which they do not see."""
    model = in_steps(layer.Linear(1, 2), nn.ReLU(), layer.Linear(2, 2), T=1)
    first, _, last = model.net
    first.weight.data.fill_(8.0)
    first.bias.data.zero_()
    last.weight.data = torch.eye(2)
    last.bias.data = torch.tensor([1.0, 0.0])
    x = torch.tensor([[0.5]])
    y = torch.tensor([0])
    intervals = verify(model, x, y, 0.1, method="ibp")
    assert intervals.margin[0] == pytest.approx(1 - 1.6, abs=1e-4)
    assert intervals.layers == ()
    labels = intervals.plot().axes[1].get_yticklabels()
    assert [label.get_text() for label in labels] == ["no spiking layer"]


def absolute(part):
    """An affine layer without its shift, of the absolute values of its map."""
    part = copy.deepcopy(part)
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        part.running_mean.zero_()
    for name, value in part.named_parameters():
        value.data = torch.zeros_like(value) if name == "bias" else value.data.abs()
    return part


def rectified(T, *, inplace=False):
    """ReLU between a layer and a neuron."""
    relu = nn.ReLU(inplace)
    return in_steps(layer.Linear(2, 2), relu, layer.Linear(2, 2), neuron.IFNode(), T=T)


@pytest.mark.parametrize("steps", [2, 3])
def test_relu_has_bounds_in_every_time_step_but_not_in_place(steps):
    """Whichever of steps and images there are more of: proofs try 2 and 3 of them."""
    x = torch.rand(steps, 2)
    model = rectified(steps)
    y = model(x).argmax(1)
    for method in ("ibp", "joint"):
        verified = verify(model, x, y, 0.1, method=method).verified
        assert_keep_their_class(model, x, y, 0.1, verified)
    with pytest.raises(NotImplementedError, match="ReLU that writes into its input"):
        verify(rectified(1, inplace=True), x, y, 0.1)


def test_frames_of_events_are_bounded_step_by_step():
    torch.manual_seed(0)
    parts = (layer.Flatten(), layer.Linear(32, 3), neuron.LIFNode())
    model = in_steps(*parts, kind=SpikingEventClassifier)
    frames = torch.randint(2, (4, T, 2, 4, 4)).float()
    y = model(frames).argmax(1)
    verified = verify(model, frames, y, 0.1).verified
    assert_keep_their_class(model, frames, y, 0.1, verified)


class Statement(nn.Module):
    """A layer of current, a statement on it, and a neuron."""

    def __init__(self, statement):
        super().__init__()
        self.statement = statement
        self.node = neuron.IFNode(step_mode="m")

    def forward(self, x):
        return self.node(self.statement(x))


def behind(statement):
    return SpikingClassifier(Statement(statement), T).eval()


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
    model = behind(statement)
    x = torch.tensor([[0.9, 0.0]])
    y = torch.tensor([1])
    margin = verify(model, x, y, 0.0).margin
    assert margin[0] == pytest.approx(float(model(x).diff()), abs=1e-5)
    assert not verify(model, x, 1 - y, 0.05).verified[0]


def concatenated_by_name(x):
    parts = [torch.add(input=x, other=C), torch.sub(C, other=x)]
    return torch.cat(tensors=parts, dim=-1)


def concatenated(x):
    return torch.cat([x + C, C - x], -1)


def test_arguments_by_name_are_known():
    x = torch.rand(2, 2)
    y = torch.tensor([1, 1])
    by_name = verify(behind(concatenated_by_name), x, y, 0.0)
    by_place = verify(behind(concatenated), x, y, 0.0)
    assert_close(by_name.margin, by_place.margin)


WRITES = [a_view_sees_it, a_base_sees_it, a_constant_sees_it, no_difference]


@pytest.mark.parametrize("statement", WRITES)
def test_what_is_written_into_shared_memory_is_refused(statement):
    x = torch.rand(1, 2)
    with pytest.raises(NotImplementedError, match="write x = "):
        verify(behind(statement), x, torch.tensor([0]), 0.1)


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
    x = torch.rand(count, 2, 1, 1)
    y = torch.zeros(count, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="samples"):
        verify(model, x, y, 0.1)


def test_a_proof_of_what_the_network_gets_wrong_is_an_error(monkeypatch):
    def lead_of_one(run, logits, y):
        return -torch.ones(logits.shape).double()

    monkeypatch.setattr(bounds.BoundedRun, "lead", lead_of_one)
    model = classifier(convolutional, NEURONS["LIF"])
    x, y = batch(model, 3)
    y[2] = (y[2] + 1) % 3
    with pytest.raises(UnsoundBoundsError, match="image 0 is proved to keep its class by 1, "):
        verify(model, x, y, 0.1, batch_size=1)


def changed(node=None, **attributes):
    """A network whose neuron has other attributes than it was built with."""
    node = node or neuron.IFNode()
    vars(node).update(attributes)
    return in_steps(nn.Linear(2, 2), node)


RIGHT = {
    "x": torch.rand(2, 2),
    "y": torch.zeros(2, dtype=torch.int64),
    "eps": 0.1,
}
WRONG_ARGUMENTS = [  # others are in test_arguments
    ({"x": torch.rand(2, 2).double()}, "in float32.*got torch.float32, torch.float64; use"),
    ({"x": torch.rand(0, 2), "y": torch.zeros(0, dtype=torch.int64)}, "at least one image"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_ARGUMENTS)
def test_wrong_images_are_named(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        verify(changed(), **RIGHT | given)


def batch_statistics(x):
    normalised = F.batch_norm(x.flatten(0, 1), None, None, training=True)
    return normalised.view(x.shape)


NO_BOUNDS = [
    (lambda x: torch.add(x, C[:2], alpha=2), "a sum with alpha"),
    (lambda x: torch.neg(x, out=None), "the operation neg as it is called here"),
    (lambda x: x.unsqueeze(-1).sum(-1, dtype=torch.half), "a conversion to torch.float16"),
    (lambda x: x.to(torch.zeros(1).bfloat16()).float(), "a conversion to torch.bfloat16"),
    (lambda x: x.type_as(torch.zeros(1).half()).float(), "a conversion to torch.float16"),
    (lambda x: x * float(x.sum()), "a number that depends on the input"),
    (lambda x: x[..., :1], "at least 2 classes"),
    (lambda x: x + 0 * torch.rand(x.shape), "draws random numbers inside"),
    (batch_statistics, "the statistics of the batch"),
]


@pytest.mark.parametrize(("statement", "message"), NO_BOUNDS)
def test_what_has_no_bounds_is_named(statement, message):
    model = behind(statement)
    model.unused = torch.Generator()  # one that is not drawn from hides no other
    with pytest.raises((ValueError, NotImplementedError), match=message):
        verify(model, **RIGHT)


def weights_of(value):
    model = changed()
    model.net[0].weight.data.fill_(value)
    return model


class AlwaysTraining(nn.Linear):
    def train(self, mode=True):
        return super().train()


def trains_inside():
    model = changed()
    model.net[0] = AlwaysTraining(*model.net[0].weight.T.shape)
    return model


def encoded():
    return SpikingClassifier(changed().net, T, PoissonEncoder()).eval()


class Attention(nn.Module):
    def forward(self, x):
        return x @ x.transpose(-1, -2)


class SetsV(nn.Module):
    def __init__(self):
        super().__init__()
        self.node = neuron.IFNode()

    def forward(self, x):
        self.node.v = x + 0.4
        return self.node(x)


SMOOTH = surrogate.ATan(spiking=False)
WRONG_NETWORKS = {
    "wrap the network": nn.Flatten,
    "got net.0 in training mode": trains_inside,
    "the encoder PoissonEncoder": encoded,
    "a matrix product of values of several samples of a batch": lambda: in_steps(
        Attention(), neuron.IFNode()
    ),
    "whose surrogate does not spike": lambda: changed(neuron.IFNode(surrogate_function=SMOOTH)),
    "QIFNode.: its charge depends on the square": lambda: changed(neuron.QIFNode()),
    "set v_reset when it is built": lambda: changed(v_reset=0.8),
    "set .* no v in a forward": lambda: SpikingClassifier(SetsV(), T=1).eval(),
    "whose decay is negative: give it a tau": lambda: changed(neuron.LIFNode(), tau=0.5),
    "v_threshold is not one finite number": lambda: changed(v_threshold=torch.ones(2)),
    "weights must be finite, got NaN or infinity in net.0.weight": lambda: weights_of(torch.nan),
    "may be beyond 1e30": lambda: weights_of(3e38),
}


@pytest.mark.parametrize("message", WRONG_NETWORKS)
def test_networks_that_cannot_be_followed_are_named(message):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        verify(WRONG_NETWORKS[message](), **RIGHT)


def test_numbers_are_those_of_a_float64_network():
    model = behind(lambda x: (x - 0.1).to(torch.zeros(1).double()) * 1e9).double()
    x = torch.tensor([[0.1 + 1.3e-9, 0.1 - 1.3e-9]], dtype=torch.float64)
    margin = verify(model, x, torch.tensor([0]), 0.0).margin[0]
    assert margin == pytest.approx(float(-model(x).diff()), abs=1e-5)


@pytest.mark.parametrize("size", [0.0, 2.0])
def test_a_negative_threshold_does_not_lessen_rounding(size):
    size = torch.tensor([size])
    below = rounding.reset_rounding(size, 0.0, -5.0)
    above = rounding.reset_rounding(size, 0.0, 5.0)
    assert float(below) == float(above)
