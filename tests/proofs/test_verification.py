"""Bounds are true of the float32 network that runs, and proofs check themselves: no verified image
is fooled, what a network does otherwise than its bounds say is refused, and nothing is left behind.
"""

import gc
from functools import partial

import pytest
import torch
from covering import mostly_slow
from proofs import fuzz
from proofs.collected import no_collection, tensors_of_cycles
from proofs.fuzz import leads
from proofs.networks import (
    NETWORKS,
    NEURONS,
    SAMPLED,
    T,
    batch,
    classifier,
    convolutional,
    in_steps,
    perturbed,
    residual,
    small,
    spikes_at_the_end,
)
from spikingjelly.activation_based import base, layer, neuron
from torch import nn
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust import SpikingClassifier
from sj_robust.core.preserved import full_precision
from sj_robust.proofs import UnsoundBoundsError, bounds, rounding, rules, soundness, verify
from sj_robust.proofs.bounds import BoundedRun, bounded_logits, bounded_neurons
from sj_robust.proofs.differentiable import DifferentiableBounds

METHODS = ("ibp", "joint", "mip")


NEWEST = {
    "PSN": {"T": T},
    "MaskedPSN": {"k": 2, "T": T, "lambda_init": 1.0},
    "SlidingPSN": {"k": 2},
    "KLIFNode": {},
    "GatedLIFNode": {"T": T},
    "CUBALIFNode": {},
    "ILIFNode": {},
    "SLTTLIFNode": {},
}
"""Neurons of the newer release; the older one's KLIF runs TorchScript, which has no bounds."""
THERE = [name for name in NEWEST if hasattr(neuron, "PSN")]
STEP_BY_STEP = ["MaskedPSN", "SlidingPSN", "CUBALIFNode", "ILIFNode"]


NODES = {name: partial(getattr(neuron, name), **NEWEST[name]) for name in THERE}
NODES |= NEURONS | {"ReLU": nn.ReLU}


def of_one_layer(node):
    parts = layer.Conv2d(2, 3, 3, stride=2, padding=1), node(), layer.Flatten()
    return nn.Sequential(*parts, layer.Linear(48, 3))


ROWS = [*SAMPLED, (convolutional, "ReLU", "m"), (spikes_at_the_end, "ReLU", "s")]
ROWS += [(of_one_layer, name, "m") for name in THERE]
FEW = [row for row in ROWS if row[0] is not residual]
ROWS += [(of_one_layer, name, "s") for name in STEP_BY_STEP if name in THERE]


@pytest.mark.parametrize(("build", "node", "step_mode"), mostly_slow(ROWS, quick=FEW))
def test_no_perturbed_image_breaks_what_is_proved(build, node, step_mode):
    """Joint bounds are nowhere looser than intervals, and without a radius those of the network."""
    model = classifier(build, NODES[node], step_mode=step_mode)
    x, y = batch(model, 4)
    wider = torch.tensor(-torch.inf)
    for method in ("ibp", "joint"):
        for eps in (0.0, 0.005, 0.02) if node in NEURONS else (0.005,):
            result = verify(model, x, y, eps, method=method)
            margin = torch.tensor(result.margin, dtype=torch.float64)
            for z in perturbed(model, x, y, eps):
                assert (leads(model(z).detach(), y) >= margin).all()
            if not eps:
                own = leads(model(x).detach(), y)
                assert_close(margin, own, atol=1e-3, rtol=0)
        assert (margin >= wider).all()
        wider = margin
    if node in NEURONS:
        wide = verify(model.double(), x.double(), y, 0.02)
        assert_close(torch.tensor(wide.margin).double(), margin, atol=1e-3, rtol=0)


RANDOM = [("Linf", seed) for seed in (0, 1, 8, 9, 11, 20)]
RANDOM += [(norm, seed) for norm in ("L0", "moves") for seed in (0, 3)]
MANY = [("Linf", seed) for seed in range(300, 312)]
MANY += [(norm, seed) for norm in ("L0", "moves") for seed in range(4, 12)]


@pytest.mark.parametrize(("norm", "seed"), mostly_slow(RANDOM + MANY, quick=RANDOM))
def test_what_is_proved_of_random_networks_holds_at_many_points(norm, seed):
    assert fuzz.check(seed, 256 if (norm, seed) in RANDOM else 2000, norm)["inputs"] >= 256


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

    def most_spikes():
        logits = bounded_logits(model, BoundedRun(bounded_neurons(model), 1), x, 0.0)
        return float(logits.upper[0, rounded_up])

    assert most_spikes() == pytest.approx(1.0, abs=1e-5)
    monkeypatch.setattr(rounding, "_UNIT", 0.0)
    assert most_spikes() == pytest.approx(0.0, abs=1e-5)


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


def a_part_sees_a_part(x):
    x = torch.cat([x, x], -1)
    first, last = x[..., :2], x[..., 1:3]
    last += 3.0
    first *= 0.5
    return torch.stack([x[..., 0], last[..., 0]], -1)


def a_constant_sees_it(x):
    found = torch.zeros(T, x.shape[1], 2)
    found += x + C
    return found


IN_PLACE = [alias, view_is_gone, a_view_sees_it, a_base_sees_it, a_constant_sees_it]


@pytest.mark.parametrize("statement", [*IN_PLACE, a_part_sees_a_part])
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


@pytest.mark.parametrize("build", [one for one in NETWORKS if one is not spikes_at_the_end])
def test_an_error_of_a_rule_is_found_at_the_images(build, monkeypatch):
    rule = rules.RULES["linear"]

    def wrong(*arguments):
        found = rule(*arguments)
        return rules.Bounds(1.01 * found.centre, found.radius, found.error, found.run)

    monkeypatch.setitem(rules.RULES, "linear", wrong)
    model = classifier(build, NEURONS["LIF"])
    x, y = batch(model, 2)
    with pytest.raises(UnsoundBoundsError, match="is outside its bounds"):
        verify(model, x, y, 0.001)


class Counts(base.MemoryModule):
    """Turns its sign from the twelfth forward on, which a value that it holds counts."""

    def __init__(self, kind):
        super().__init__()
        if kind == "memory":
            self.register_memory("count", 0)
        elif kind == "buffer":
            self.register_buffer("count", torch.zeros(()))
        elif kind == "parameter":
            self.count = nn.Parameter(torch.zeros(()), requires_grad=False)
        else:
            self.count = torch.zeros(()) if kind == "tensor" else 0

    def reset(self):
        """Forgets to reset."""

    def forward(self, x):
        self.count += 1
        return x * (1.0 if self.count < 12 else -1.0)


def counting(kind):
    torch.manual_seed(2)
    layers = [nn.Linear(4, 6), neuron.IFNode(step_mode="m"), nn.Linear(6, 3), Counts(kind)]
    return SpikingClassifier(nn.Sequential(*layers), T=3).eval()


CHANGES = r"must not change during a forward pass in evaluation mode, but one changes net\.3\.count"


@pytest.mark.parametrize("kind", ["buffer", "parameter", "tensor", "number", "memory"])
def test_a_network_whose_forward_changes_what_it_holds_is_refused(kind):
    x = torch.rand(2, 4)
    for method in METHODS:
        with pytest.raises(ValueError, match=CHANGES):
            verify(counting(kind), x, torch.tensor([0, 1]), 0.05, method=method)
    with pytest.raises(ValueError, match=CHANGES):
        DifferentiableBounds(counting(kind)).lead(x, torch.tensor([0, 1]), 0.05)


def test_values_that_a_forward_sets_again_as_they_were_are_no_change():
    """Weight norm computes its weight in every forward; a neuron that keeps v_seq is reset."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    node = neuron.LIFNode(step_mode="m", store_v_seq=True)
    model = SpikingClassifier(nn.Sequential(first, node, nn.Linear(6, 3)), T=3).eval()
    x = torch.rand(3, 4)
    soundness.check_unchanged(model, soundness.check_kept(model, x))


class Flags(nn.Module):
    """Notes how torch computes when it runs."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, x):
        self.note(precision())
        return 1.0 * x


def precision():
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
        products = torch.backends.mkldnn.matmul.fp32_precision
        on_cuda = torch.backends.cuda.matmul.fp32_precision
    else:
        products = torch.get_float32_matmul_precision()
        on_cuda = torch.backends.cuda.matmul.allow_tf32
    return {
        "cudnn": torch.backends.cudnn.enabled,
        "cudnn TF32": torch.backends.cudnn.allow_tf32,
        "matrix products": products,
        "matrix products on CUDA": on_cuda,
        "NNPACK": torch._C._get_nnpack_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def test_the_network_runs_on_sums_of_products_in_float32():
    """cuDNN and NNPACK may take Winograd's or the FFT algorithm, whose error is another one."""
    noted = []
    flags = Flags(noted.append)
    model = SpikingClassifier(
        nn.Sequential(nn.Linear(4, 3), flags, neuron.IFNode(step_mode="m")), T
    ).eval()
    model.find_convention(torch.rand(2, 4))  # by forwards as the caller computes
    noted.clear()
    torch.set_float32_matmul_precision("medium")
    try:
        before = precision()
        with torch.autocast("cpu"):
            verify(model, torch.rand(2, 4), torch.tensor([0, 1]), 0.01)
        assert precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    wanted = {"cudnn": False, "cudnn TF32": False, "NNPACK": False, "autocast": False}
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        wanted |= {"matrix products": "ieee", "matrix products on CUDA": "ieee"}
    else:
        wanted |= {"matrix products": "highest", "matrix products on CUDA": False}
    assert noted
    for seen in noted:
        assert seen == wanted
    with full_precision(torch.device("cpu")):
        assert not precision()["cudnn TF32"]


OPTIONS = {"time_limit": 0.001, "batch_size": 2}


def images(count):
    """A small network, and images with the classes that it gives them."""
    model = small(NEURONS["DLIF"], seed=2)
    x = torch.rand(count, 3, generator=torch.Generator().manual_seed(2))
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("method", mostly_slow(METHODS, quick=["joint"]))
def test_memory_does_not_grow_with_the_images(method):
    held = {}

    def held_tensors(done):
        if done not in (10, 20):  # once all trains have been listed, and at the end
            return
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
        held[done] = sum(one.untyped_storage().nbytes() for one in tensors)

    verify(*images(20), 0.1, on_batch=held_tensors, method=method, **OPTIONS)
    assert held[20] <= 1.02 * held[10]


@pytest.mark.parametrize("method", mostly_slow(METHODS, quick=["joint"]))
def test_a_proof_leaves_no_tensors_to_the_collector(method):
    """Python looks for cycles rarely, and the batches of a proof would add up until then."""
    given = images(4)
    verify(*given, 0.1, method=method, **OPTIONS)
    with no_collection():
        verify(*given, 0.1, method=method, **OPTIONS)
        assert not tensors_of_cycles()
