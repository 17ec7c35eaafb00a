"""One whole training step of every mode against the formulas written out in step_by_hand, in
float64.
"""

from types import SimpleNamespace

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
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
CERTIFIED_EPS, RAMP = 0.02, 0.75
# enough to flip a spike of every image, without which trades has a zero gradient at its start
NOISE_STD = 0.1
SEEDS = SampleSeeds([11, 12, 13])


def case_of(
    mode,
    *,
    sparsity=0.0,
    squared=False,
    guard=0.0,
    guarded="all",
    l1=0.0,
    bounds=None,
    **options,
):
    """A mode, options of the objective beside those of the mode, and penalties."""
    of_mode = {name: getattr(MODES[mode], name) for name in ("kappa", "rho", "loss")}
    usual = {"layers": "last", "norm": "l2", "indicator": "mppd", "input_gain": False}
    penalties = {"sparsity": sparsity, "squared": squared, "guard": guard, "guarded": guarded}
    bounds = {"surrogate_width": 1.0, "box": 1.0, "attacked": False} | (bounds or {})
    options = of_mode | usual | options
    return SimpleNamespace(mode=mode, options=options, l1=l1, bounds=bounds, **penalties)


CASES = [
    case_of("none"),
    case_of("gaussian"),
    case_of("at"),
    case_of("rat"),
    case_of("pgd_at"),
    case_of("trades"),
    case_of("trades", rho=0.5, norm="l1"),
    case_of("gaussian", norm="l1", rho=2.5),
    case_of("at", layers="all", kappa=0.3),
    case_of("at", layers=("6", "2"), norm="l1", input_gain=True),
    case_of("at", rho=0.0),
    case_of("at", kappa=0.0, rho=1.0),
    case_of("at", kappa=1.0, rho=0.0),
    *(case_of("at", indicator=i, norm=n) for i in ("std", "tasad") for n in ("l2", "l1")),
    *(case_of("at", indicator=i, layers="all") for i in ("std", "tasad")),
    case_of("none", sparsity=0.3),
    case_of("at", sparsity=0.3, squared=True),
    case_of("pgd_at", sparsity=0.3),
    case_of("none", guard=0.5),
    case_of("rat", guard=0.5, guarded=("6",)),
    case_of("trades", sparsity=0.2, guard=0.4),
    case_of("certified"),
    case_of("certified", kappa=0.3, rho=0.5),
    case_of("certified", sparsity=0.3),
    case_of("at", l1=0.01),
    case_of("certified", bounds={"surrogate_width": 0.5}),
    case_of("certified", kappa=0.4, bounds={"box": 0.2}),
    case_of("certified", kappa=0.4, bounds={"attacked": True}),
    case_of("certified", l1=0.01, kappa=0.1, bounds={"box": 0.6, "attacked": True}, rho=0.5),
]


def build(kind):
    """The network of step_by_hand, its weights far from those of initialisation."""
    generator = torch.Generator().manual_seed(5)
    triangle = surrogate.PiecewiseQuadratic(alpha=1.0)

    def node():
        return (
            DLIFNode(T=T, tau=TAU)
            if kind == "dlif"
            else neuron.LIFNode(tau=TAU, surrogate_function=triangle)
        )

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
    scale = 1.0 if kind == "dlif" else 2 * TAU  # decay_input divides the current by tau
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if not value.is_floating_point():
                continue
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if "input_gain" in name or "running_var" in name:
                value.copy_(0.7 + 0.6 * drawn.abs())
            elif value.ndim > 1:
                value.copy_(
                    drawn * (2.0 / value[0].numel()) ** 0.5 * (scale if name == "8.weight" else 1.0)
                )
            else:
                value.copy_(
                    (1.2 * scale if name in ("1.weight", "5.weight") else 0.0) + 0.3 * drawn
                )
    x = torch.rand(3, 2, 6, 6, generator=generator, dtype=torch.float64)
    return SpikingClassifier(net, T), x, torch.tensor([0, 3, 1])


def noise_of(mode, x):
    """What the attack of a mode draws: a seed for the network's own randomness first, unless it
    runs none.
    """
    private = private_generator(SEEDS, x.device)
    if mode != "gaussian":
        draw_seed(private)
    return (rand if mode == "pgd_at" else randn)(x.shape, private, dtype=x.dtype, device=x.device)


def loss_by_hand(case, network, x, y, x_perturbed):
    """Total, MS-MPPD and penalty."""
    options = case.options
    kappa, rho, loss = options["kappa"], options["rho"], options["loss"]
    runs, attacked, reach = {}, case.bounds["attacked"], RAMP * CERTIFIED_EPS
    if attacked:
        x_perturbed = within(x, x_perturbed, reach)
    both = x_perturbed is not None and (rho > 0 or loss == "trades")
    if loss == "certified" or x_perturbed is None or kappa > 0 or both:
        runs["clean"] = x
    if x_perturbed is not None and ((kappa < 1 and loss != "certified") or both or attacked):
        runs["perturbed"] = x_perturbed
    logits, seen, slope = {}, {}, None
    for number, (name, images) in enumerate(runs.items()):
        if case.sparsity and number == 0:
            logits[name], seen[name], slope = step_by_hand.sparsity(
                network, images, y, h=0.01, squared=case.squared
            )
        else:
            logits[name], seen[name] = network.run(images, training=True)
    entropy = {name: step_by_hand.cross_entropy(z, y) for name, z in logits.items()}
    if loss == "certified":
        weight = (1 - kappa) * RAMP
        box, network.width = case.bounds["box"], case.bounds["surrogate_width"]
        centre = within(x, x_perturbed, (1 - box) * reach)
        bounds = step_by_hand.cross_entropy(network.lead(centre, y, box * reach), y)
        total = (1 - weight) * entropy["perturbed" if attacked else "clean"] + weight * bounds
    elif x_perturbed is None:
        total = entropy["clean"]
    elif loss == "trades":
        total = entropy["clean"] + 6 * step_by_hand.divergence(logits["clean"], logits["perturbed"])
    else:
        total = kappa * entropy.get("clean", 0.0) + (1 - kappa) * entropy.get("perturbed", 0.0)
    mppd = penalty = torch.zeros((), dtype=torch.float64)
    if both and rho > 0:
        chosen = {"last": ["9"], "all": list(NEURONS)}.get(options["layers"], options["layers"])
        pairs = [(seen["clean"][n], seen["perturbed"][n]) for n in chosen]
        kind = options["indicator"], options["norm"]
        terms = [
            step_by_hand.perturbation(*kind, *pair, input_gain=options["input_gain"])
            for pair in pairs
        ]
        mppd = sum(terms) / len(terms)
    if case.guard:
        chosen = list(NEURONS) if case.guarded == "all" else case.guarded
        terms = [step_by_hand.guarded(run[n], 0.6) for n in chosen for run in seen.values()]
        penalty = penalty + case.guard * sum(terms) / len(terms)
    if case.sparsity:
        penalty = penalty + case.sparsity * slope()
    if case.l1:
        names = ("0.weight", "4.weight", "8.weight", "10.weight")
        penalty = penalty + case.l1 * sum(network.w[name].abs().sum() for name in names)
    return total + rho * mppd + penalty, mppd, penalty


def within(x, x_perturbed, reach):
    """Images that are at most so far from ``x``, element by element."""
    return x + (x_perturbed - x).clamp(-reach, reach)


@pytest.mark.parametrize("kind", ["dlif", pytest.param("lif", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.mode} {CASES.index(case)}")
def test_a_step_equals_the_formulas(case, kind):
    classifier, x, y = build(kind)
    by_hand = step_by_hand.Network(classifier.net.state_dict())
    mode = MODES[case.mode]
    penalties = []
    if case.guard:
        penalties.append(ThresholdGuarding(case.guard, margin=0.6, layers=case.guarded))
    if case.sparsity:
        penalties.append(GradientSparsity(case.sparsity, squared=case.squared))
    if case.l1:
        penalties.append(WeightMagnitude(case.l1))
    objective = Objective(
        classifier,
        penalties=penalties,
        certified_eps=CERTIFIED_EPS if mode.loss == "certified" else None,
        certified_options=CertifiedOptions(**case.bounds),
        **case.options,
    ).train()
    if objective.certified is not None:
        objective.certified.progress = 0.05 + 0.6 * RAMP
    optimizer = torch.optim.SGD(
        objective.parameters(), 0.1, momentum=0.9, weight_decay=mode.weight_decay
    )

    attack = training_attack(case.mode, eps=EPS, noise_std=NOISE_STD)
    x_perturbed = None if attack is None else attack(classifier, x, y, generator=SEEDS)
    losses = objective(x, y, x_perturbed)
    losses.total.backward()

    noise = noise_of(case.mode, x)
    expected_images = step_by_hand.perturbed_images(
        case.mode, by_hand, x, y, noise, eps=EPS, noise_std=NOISE_STD
    )
    if attack is not None:
        torch.testing.assert_close(x_perturbed, expected_images, rtol=0, atol=1e-12)
    for value in by_hand.parameters().values():
        value.requires_grad_()
    total, mppd, penalty = loss_by_hand(case, by_hand, x, y, expected_images)
    total.backward()
    assert by_hand.margin > 1e-9  # no spike that rounding could flip

    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(losses.total, total, **close)
    torch.testing.assert_close(losses.mppd, mppd.detach(), **close)
    torch.testing.assert_close(losses.penalty, penalty.detach(), **close)
    assert (mppd > 1e-4) == (case.options["rho"] > 0)
    assert (penalty > 1e-4) == bool(penalties)
    for name, value in classifier.net.named_parameters():
        assert name == "4.bias" or value.grad.abs().max() > 1e-6, (
            name
        )  # batch norm takes the bias away
        torch.testing.assert_close(
            value.grad, by_hand.w[name].grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: n + m
        )
    for name, value in classifier.net.state_dict().items():
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(value, by_hand.w[name], **close)

    optimizer.step()
    if mode.retraction:
        retract_(classifier.net, mode.retraction, torch.Generator().manual_seed(3))
    with torch.no_grad():
        after = {
            n: v - 0.1 * (v.grad + mode.weight_decay * v) for n, v in by_hand.parameters().items()
        }
    if mode.retraction:
        rows = torch.randperm(210, generator=torch.Generator().manual_seed(3))[:63]
        for name in ("0.weight", "4.weight", "8.weight", "10.weight"):
            after[name] = step_by_hand.retracted(
                after[name], mode.retraction, rows if name == "8.weight" else None
            )
    for name, value in classifier.net.named_parameters():
        torch.testing.assert_close(value.detach(), after[name], rtol=1e-8, atol=1e-12)
