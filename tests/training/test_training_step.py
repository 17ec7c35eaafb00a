"""One whole training step of every mode against the formulas written out in step_by_hand, in
float64.
"""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close
from training import step_by_hand
from training.step_by_hand import NEURONS, TAU, T

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import SampleSeeds
from sj_robust.core.randomness import draw_seed, private_generator, rand, randn
from sj_robust.training import (
    MODES,
    CertifiedOptions,
    GradientSparsity,
    Objective,
    ThresholdGuarding,
    WeightMagnitude,
    retract_,
    training_attack,
)

EPS = 0.1
CERTIFIED_EPS = 0.02
RAMP = 0.75
# Enough to flip a spike of every image, without which trades has a zero gradient at its start.
NOISE_STD = 0.1
SEEDS = SampleSeeds([11, 12, 13])
MARGIN = 0.6


@dataclass(frozen=True)
class Case:
    """A mode, options of the objective beside those of the mode, and weights of penalties."""

    mode: str
    options: dict = field(default_factory=dict)
    sparsity: float = 0.0
    squared: bool = False
    guard: float = 0.0
    guarded: str | tuple[str, ...] = "all"
    l1: float = 0.0
    bounds: CertifiedOptions = field(default_factory=CertifiedOptions)

    def __str__(self):
        return f"{self.mode} {CASES.index(self)}"

    @property
    def objective(self):
        """Every option of the objective."""
        mode = MODES[self.mode]
        usual = {
            "kappa": mode.kappa,
            "rho": mode.rho,
            "loss": mode.loss,
            "layers": "last",
            "norm": "l2",
            "indicator": "mppd",
            "input_gain": False,
        }
        return usual | self.options

    @property
    def penalties(self):
        penalties = []
        if self.guard:
            guarding = ThresholdGuarding(self.guard, margin=MARGIN, layers=self.guarded)
            penalties.append(guarding)
        if self.sparsity:
            penalties.append(GradientSparsity(self.sparsity, squared=self.squared))
        if self.l1:
            penalties.append(WeightMagnitude(self.l1))
        return penalties


CASES = [
    Case("none"),
    Case("gaussian"),
    Case("at"),
    Case("rat"),
    Case("pgd_at"),
    Case("trades"),
    Case("trades", {"rho": 0.5, "norm": "l1"}),
    Case("gaussian", {"norm": "l1", "rho": 2.5}),
    Case("at", {"layers": "all", "kappa": 0.3}),
    Case("at", {"layers": ("6", "2"), "norm": "l1", "input_gain": True}),
    Case("at", {"rho": 0.0}),
    Case("at", {"kappa": 0.0, "rho": 1.0}),
    Case("at", {"kappa": 1.0, "rho": 0.0}),
    Case("at", {"indicator": "std"}),
    Case("at", {"indicator": "std", "norm": "l1"}),
    Case("at", {"indicator": "std", "layers": "all"}),
    Case("at", {"indicator": "tasad"}),
    Case("at", {"indicator": "tasad", "norm": "l1"}),
    Case("at", {"indicator": "tasad", "layers": "all"}),
    Case("none", sparsity=0.3),
    Case("at", sparsity=0.3, squared=True),
    Case("pgd_at", sparsity=0.3),
    Case("none", guard=0.5),
    Case("rat", guard=0.5, guarded=("6",)),
    Case("trades", sparsity=0.2, guard=0.4),
    Case("certified"),
    Case("certified", {"kappa": 0.3, "rho": 0.5}),
    Case("certified", sparsity=0.3),
    Case("at", l1=0.01),
    Case("certified", bounds=CertifiedOptions(surrogate_width=0.5)),
    Case("certified", {"kappa": 0.4}, bounds=CertifiedOptions(box=0.2)),
    Case("certified", {"kappa": 0.4}, bounds=CertifiedOptions(attacked=True)),
    Case(
        "certified",
        {"kappa": 0.1, "rho": 0.5},
        l1=0.01,
        bounds=CertifiedOptions(box=0.6, attacked=True),
    ),
]


def dlif():
    return DLIFNode(T=T, tau=TAU)


def lif():
    return neuron.LIFNode(tau=TAU, surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0))


def build(node):
    """The network of step_by_hand, its weights far from those of initialisation."""
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1, bias=False),
        layer.BatchNorm2d(4),
        node(),
        layer.AvgPool2d(2),
        layer.Conv2d(4, 5, 3, padding=1),
        layer.BatchNorm2d(5),
        node(),
        layer.Flatten(),
        layer.Linear(45, 210),
        node(),
        layer.Linear(210, 4),
    ).double()
    functional.set_step_mode(net, "m")
    generator = torch.Generator().manual_seed(5)
    scale = 1.0 if node is dlif else 2 * TAU  # decay_input divides the current by tau
    for name, value in net.state_dict().items():
        if not value.is_floating_point():
            continue
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if "input_gain" in name or "running_var" in name:
            value.copy_(0.7 + 0.6 * drawn.abs())
        elif value.ndim > 1:
            std = (2.0 / value[0].numel()) ** 0.5
            if name == "8.weight":
                std *= scale
            value.copy_(std * drawn)
        elif name in ("1.weight", "5.weight"):
            value.copy_(1.2 * scale + 0.3 * drawn)
        else:
            value.copy_(0.3 * drawn)
    x = torch.rand(3, 2, 6, 6, generator=generator).double()
    y = torch.tensor([0, 3, 1])
    return SpikingClassifier(net, T), x, y


def noise_of(mode, x):
    """What the attack of a mode draws: a seed for the network's own randomness first, unless it
    runs none.
    """
    private = private_generator(SEEDS, x.device)
    if mode != "gaussian":
        draw_seed(private)
    draw = rand if mode == "pgd_at" else randn
    return draw(x.shape, private, dtype=x.dtype, device=x.device)


@dataclass
class LossByHand:
    """Total, MS-MPPD and penalty of one step, from the formulas."""

    total: torch.Tensor
    mppd: torch.Tensor
    penalty: torch.Tensor


def passes_of(case, x, x_perturbed):
    """The images that the objective runs, in their order."""
    options = case.objective
    certified = options["loss"] == "certified"
    images = {}
    if x_perturbed is None:
        return {"clean": x}
    both = options["rho"] > 0 or options["loss"] == "trades"
    if certified or both or options["kappa"] > 0:
        images["clean"] = x
    weighs_perturbed = case.bounds.attacked if certified else options["kappa"] < 1
    if both or weighs_perturbed:
        images["perturbed"] = x_perturbed
    return images


def within(x, x_perturbed, reach):
    """Images that are at most so far from ``x``, element by element."""
    return x + (x_perturbed - x).clamp(-reach, reach)


def bounds_by_hand(case, network, x, y, x_perturbed):
    """The cross entropy of the worst logits that the bounds allow."""
    box = case.bounds.box
    reach = RAMP * CERTIFIED_EPS
    network.width = case.bounds.surrogate_width
    centre = within(x, x_perturbed, (1 - box) * reach)
    lead = network.lead(centre, y, box * reach)
    return step_by_hand.cross_entropy(lead, y)


def entropy_by_hand(case, network, x, y, x_perturbed, logits):
    """The loss without MS-MPPD and penalties."""
    options = case.objective
    kappa = options["kappa"]
    entropy = {name: step_by_hand.cross_entropy(z, y) for name, z in logits.items()}
    if options["loss"] == "certified":
        weight = (1 - kappa) * RAMP
        first = entropy["perturbed" if case.bounds.attacked else "clean"]
        bounds = bounds_by_hand(case, network, x, y, x_perturbed)
        return (1 - weight) * first + weight * bounds
    if "perturbed" not in logits:
        return entropy["clean"]
    if options["loss"] == "trades":
        divergence = step_by_hand.divergence(logits["clean"], logits["perturbed"])
        return entropy["clean"] + 6 * divergence
    clean = entropy.get("clean", 0.0)
    return kappa * clean + (1 - kappa) * entropy["perturbed"]


def mppd_by_hand(case, seen):
    """Mean over the chosen layers."""
    options = case.objective
    by_name = {"last": ["9"], "all": list(NEURONS)}
    names = by_name.get(options["layers"], options["layers"])
    terms = []
    for name in names:
        term = step_by_hand.perturbation(
            options["indicator"],
            options["norm"],
            seen["clean"][name],
            seen["perturbed"][name],
            input_gain=options["input_gain"],
        )
        terms.append(term)
    return sum(terms) / len(terms)


def guarding_by_hand(case, seen):
    """Mean over guarded layers and passes."""
    names = NEURONS if case.guarded == "all" else case.guarded
    terms = []
    for of_pass in seen.values():
        terms += [step_by_hand.guarded(of_pass[name], MARGIN) for name in names]
    return sum(terms) / len(terms)


def magnitude_by_hand(network):
    """Sum of the absolute weights of convolutions and linear layers."""
    names = ("0.weight", "4.weight", "8.weight", "10.weight")
    return sum(network.w[name].abs().sum() for name in names)


def loss_by_hand(case, network, x, y, x_perturbed):
    if case.bounds.attacked:
        x_perturbed = within(x, x_perturbed, RAMP * CERTIFIED_EPS)
    logits = {}
    seen = {}
    sparsity = None
    for name, images in passes_of(case, x, x_perturbed).items():
        if case.sparsity and sparsity is None:
            sparsity = step_by_hand.Sparsity(network, images, y, h=0.01, squared=case.squared)
            logits[name] = sparsity.logits
            seen[name] = sparsity.seen
        else:
            logits[name], seen[name] = network.run(images, training=True)
    total = entropy_by_hand(case, network, x, y, x_perturbed, logits)
    mppd = torch.zeros((), dtype=torch.float64)
    penalty = torch.zeros((), dtype=torch.float64)
    rho = case.objective["rho"]
    if x_perturbed is not None and rho > 0:
        mppd = mppd_by_hand(case, seen)
    if case.guard:
        penalty = penalty + case.guard * guarding_by_hand(case, seen)
    if case.sparsity:
        penalty = penalty + case.sparsity * sparsity.penalty()
    if case.l1:
        penalty = penalty + case.l1 * magnitude_by_hand(network)
    return LossByHand(total + rho * mppd + penalty, mppd, penalty)


def after_a_step(network, mode):
    """Weights after SGD with learning rate 0.1, and the retraction of the mode."""
    after = {}
    for name, value in network.parameters().items():
        before = value.detach()
        decayed = value.grad + mode.weight_decay * before
        after[name] = before - 0.1 * decayed
    if mode.retraction:
        generator = torch.Generator().manual_seed(3)
        retract = partial(step_by_hand.retracted, beta=mode.retraction)
        for name in ("0.weight", "4.weight", "10.weight"):
            after[name] = retract(after[name])
        rows = torch.randperm(210, generator=generator)[:63]
        after["8.weight"] = retract(after["8.weight"], rows=rows)
    return after


assert_near = partial(assert_close, rtol=1e-9, atol=1e-12)


OF_EACH_MODE = {case.mode: case for case in CASES}.values()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_the_formulas(case):
    check_step(case, dlif)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_EACH_MODE, ids=str)
def test_a_step_of_lif_equals_the_formulas(case):
    check_step(case, lif)


def check_step(case, node):
    classifier, x, y = build(node)
    by_hand = step_by_hand.Network(classifier.net.state_dict())
    mode = MODES[case.mode]
    objective = Objective(
        classifier,
        penalties=case.penalties,
        certified_eps=CERTIFIED_EPS if mode.loss == "certified" else None,
        certified_options=case.bounds,
        **case.objective,
    ).train()
    if objective.certified is not None:
        objective.certified.progress = 0.05 + 0.6 * RAMP
    optimizer = torch.optim.SGD(
        objective.parameters(),
        lr=0.1,
        momentum=0.9,
        weight_decay=mode.weight_decay,
    )

    attack = training_attack(case.mode, eps=EPS, noise_std=NOISE_STD)
    x_perturbed = None
    if attack is not None:
        x_perturbed = attack(classifier, x, y, generator=SEEDS)
    losses = objective(x, y, x_perturbed)
    losses.total.backward()

    images = step_by_hand.perturbed_images(
        case.mode,
        by_hand,
        x,
        y,
        noise=noise_of(case.mode, x),
        eps=EPS,
        noise_std=NOISE_STD,
    )
    if attack is not None:
        assert_close(x_perturbed, images, rtol=0, atol=1e-12)
    for value in by_hand.parameters().values():
        value.requires_grad_()
    expected = loss_by_hand(case, by_hand, x, y, images)
    expected.total.backward()
    assert by_hand.margin > 1e-9  # no spike that rounding could flip

    assert_near(losses.total, expected.total)
    assert_near(losses.mppd, expected.mppd.detach())
    assert_near(losses.penalty, expected.penalty.detach())
    assert (losses.mppd > 1e-4) == (case.objective["rho"] > 0)
    assert (losses.penalty > 1e-4) == bool(case.penalties)
    for name, value in classifier.net.named_parameters():
        if name != "4.bias":  # batch norm takes it away
            assert value.grad.abs().max() > 1e-6, name
        assert_close(value.grad, by_hand.w[name].grad, rtol=1e-8, atol=1e-11)
    for name, value in classifier.net.named_buffers():
        if "running" in name or "tracked" in name:
            assert_near(value, by_hand.w[name])

    optimizer.step()
    if mode.retraction:
        retract_(classifier.net, mode.retraction, torch.Generator().manual_seed(3))
    after = after_a_step(by_hand, mode)
    for name, value in classifier.net.named_parameters():
        assert_close(value.detach(), after[name], rtol=1e-8, atol=1e-12)
