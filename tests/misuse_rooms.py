"""Misuse of trainings, penalties, monitors and gains: a public call, what is changed of right use,
the class of the error and the argument that its message names.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import ToPILImage
from training import small_run

from sj_robust import DLIFNode, SpikingClassifier, perturbation_gains
from sj_robust.attacks import ThreatModel, pgd
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.data import Augmentation, ShuffledBatches, image_loader, load_images
from sj_robust.data.stored import contents
from sj_robust.defences import (
    EvolvingLeakNode,
    FrequencyEncoder,
    HomeostaticNode,
    NoisyLIFNode,
    StochasticGate,
    SurrogateOverlap,
)
from sj_robust.defences.stog import GateRates
from sj_robust.models import (
    VGG,
    ConvChain,
    NetworkSpec,
    WideResNet,
    build_classifier,
    set_time_steps,
)
from sj_robust.models.chain import FullyConnected
from sj_robust.perturbation import (
    MPPDMonitor,
    membrane_potential,
    ms_mppd,
    simplified_perturbation,
    tasad,
)
from sj_robust.perturbation.dynamics import full_perturbation, spike_train_distance
from sj_robust.perturbation.intensity import intensity_correlation
from sj_robust.proofs.gains import (
    gain_penalty,
    input_maps,
    l2_gain,
    l2_gain_limit,
    optimal_input_gain,
    peak_gain,
    printed_gain,
)
from sj_robust.training import (
    CertifiedOptions,
    ForwardPasses,
    GradientSparsity,
    Objective,
    StabilityGain,
    TemporalOrthogonality,
    ThresholdGuarding,
    TrainingPlan,
    WeightMagnitude,
    finetune,
    retract_,
    training_attack,
)
from sj_robust.training.modes import trades

T = 3
NAN = math.nan
STRIPES = small_run.splits()
X, Y = STRIPES.train.tensors


@dataclass(frozen=True)
class Misuse:
    """``name`` is what the message has to name, by default the first argument changed."""

    call: Callable[..., Any]
    changes: dict[str, Any] = field(hash=False)
    error: type[Exception] = ValueError
    name: str = ""

    @property
    def named(self):
        return self.name or next(iter(self.changes))

    def __str__(self):
        kind = getattr(self.call, "func", self.call).__name__
        return f"{kind} {self.named}"


def rows(call, *changes, error=ValueError):
    """One misuse of a call for each of some changes, which its message names."""
    return [Misuse(call, change, error) for change in changes]


def linear():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), neuron.LIFNode(), nn.Linear(8, 3))
    functional.set_step_mode(net, "m")
    return net


def finetuned(**changes):
    """A refused fine-tuning leaves the weights as they were."""
    right = {"net": linear(), "data": STRIPES, "eps": 0.05, "T": T, "epochs": 1, "batch_size": 16}
    given = right | {"progress": False} | changes
    before = [weight.clone() for weight in right["net"].parameters()]
    try:
        finetune(given.pop("net"), given.pop("data"), **given)
    finally:
        for weight, value in zip(right["net"].parameters(), before, strict=True):
            assert torch.equal(weight, value)


def odd(image=lambda x: x, label=int):
    """Pairs, of which one is another."""
    items = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
    items[3] = image(X[3]), label(Y[3])
    return small_run.Items(items)


def blank(*shape):
    return TensorDataset(torch.zeros(20, *shape), torch.zeros(20, dtype=torch.int64))


def objective(**changes):
    return Objective(SpikingClassifier(small_run.Net(0.0), T=T), **changes)


def certified(**changes):
    return objective(**{"loss": "certified", "certified_eps": 0.1} | changes)


def penalised(penalty, net=None):
    """One forward of the objective with a penalty that does not fit the network."""
    model = SpikingClassifier(net or linear(), T=T, takes="sequence")
    passes = ForwardPasses(model, Y[:2], X[:2], None, None, None)
    with penalty.observe(model):
        logits = model(X[:2])
    penalty.value(replace(passes, logits=logits.requires_grad_()))


def flips(**changes):
    return certified(
        certified_eps=ThreatModel("L0", 3), certified_options=CertifiedOptions(**changes)
    )


def unattacked(**changes):
    """Some options of certified training need perturbed images."""
    certified(kappa=0.5, rho=0.0, certified_options=CertifiedOptions(**changes))(X[:2], Y[:2])


def monitor(**changes):
    """A refused monitor leaves no hook."""
    net = nn.Sequential(neuron.IFNode(), Unknown(), neuron.IFNode())
    try:
        MPPDMonitor(net, **{"decay": {"1": 0.5}} | changes)
    finally:
        assert not any(module._forward_hooks for module in net.modules())


class Unknown(neuron.BaseNode):
    """A neuron whose decay nobody knows."""


def monitored_loss(**changes):
    net = nn.Sequential(neuron.IFNode(step_mode="m"), neuron.IFNode(step_mode="m"))
    with MPPDMonitor(net, layers=["0"]) as watching:
        with watching.clean():
            net(X[:4])
        functional.reset_net(net)
        with watching.perturbed():
            net(X[:4] + 0.1)
        watching.loss(**{"layers": ["0"]} | changes)


def associated(**changes):
    model = SpikingClassifier(linear(), T=T).eval()
    y = model(X[:4]).argmax(1)
    right = {"x": X[:4], "y": y, "perturb": {"more": lambda x, y, eps: x + eps}, "eps": [0.1, 0.2]}
    if changes.pop("all_wrong", False):
        right["y"] = (y + 1) % 3
    intensity_correlation(model, **right | {"resamples": 2} | changes)


def gains(**changes):
    return perturbation_gains(**{"net": linear(), "x": X[:2], "T": T} | changes)


SEQ = torch.ones(3, 2)
attack = partial(training_attack, eps=0.1)
crafted = partial(trades, linear, X[:2, 0], Y[:2], eps=0.1, step_size=0.1)
design = partial(optimal_input_gain, decay=0.5, T=4)
perturbation = partial(simplified_perturbation, x_seq=SEQ, x_seq_perturbed=SEQ, decay=0.5)
potential = partial(membrane_potential, SEQ, decay=0.5)
plan = partial(TrainingPlan, epochs=1)
retraction = partial(retract_, nn.Linear(2, 2))
digits = partial(load_images, "digits")
saccades = partial(load_images, "saccade:digits")
batches = partial(ShuffledBatches, 23, seed=0)
overlap = partial(SurrogateOverlap, 1.0)
chain = partial(ConvChain, (1, 8, 8), 10, T=4, spiking_neuron=DLIFNode)
connected = partial(FullyConnected, (1, 4, 4), 3, T=2, spiking_neuron=DLIFNode)


wide = partial(WideResNet, (1, 8, 8), 3, T=2, spiking_neuron=DLIFNode)


def run_small(x, step_mode):
    net = build_classifier(NetworkSpec(image_shape=(1, 4, 4), T=T)).net
    functional.set_step_mode(net, step_mode)
    net(x)


def dlif(**changes):
    """A neuron of two time steps."""
    return DLIFNode(**{"T": 2} | changes)


def encoded(steps):
    """More frames than there are frequencies."""
    encoder = FrequencyEncoder(0.5)
    for _ in range(steps):
        encoder(X[:1])


def specified(**changes):
    """``options`` holds what the architecture, the neuron or the encoder takes."""
    return build_classifier(NetworkSpec(**changes))


def options(option, *values, **spec):
    """One option of an architecture, wrong in several ways."""
    holder = "encoder_options" if "encoder" in spec else "options"
    return [Misuse(specified, spec | {holder: {option: value}}, name=option) for value in values]


def thresholds(values=(0.2, 0.4), name="thresholds", **changes):
    """Thresholds of pixels that do not fit the network."""
    usual = {"kernel_size": [1, 3], "batch_norm": False, "thresholds": list(values)}
    usual |= changes.pop("options", {})
    return Misuse(specified, {"channels": (2, 4)} | changes | {"options": usual}, name=name)


def augmented(shape, seed, name):
    return Misuse(lambda: Augmentation()(torch.rand(shape), [seed]), {}, name=name)


def rotated(images):
    Augmentation(scale=0.1)(images, [1])


def classified(kind=SpikingClassifier, net=None, x=X[:2], **changes):
    kind(net or linear(), **{"T": T} | changes)(x)


class Whole(nn.Module):
    """Takes images, and nothing with more dimensions."""

    def forward(self, images):
        assert images.ndim == 4
        return images.flatten(1)[:, :3].expand(T, -1, 3)


def returning(output):
    """A network that gives something else than logits."""
    net = nn.Flatten(2)
    net.register_forward_hook(lambda *_: output)
    return net


events = partial(classified, SpikingEventClassifier)
FRAMES = torch.zeros(2, T, 1, 4, 4)

MISUSE = [
    *rows(classified, {"T": 0}, {"std": [0.0]}, {"takes": "x"}),
    *rows(
        classified,
        {"T": 2.0},
        {"T": True},
        {"T": torch.tensor(4)},
        {"mean": "0.5"},
        error=TypeError,
    ),
    *(Misuse(classified, {"x": x}, name="images") for x in (X[0, 0, 0], FRAMES)),
    *(Misuse(events, {"x": x}, name="frames") for x in (X[:2], FRAMES[:, :2])),
    Misuse(events, {"takes": "images"}),
    Misuse(events, {"net": Whole(), "x": FRAMES}, name="images"),
    *(
        Misuse(classified, {"net": returning(output), "takes": "sequence"}, name="logits")
        for output in (
            torch.zeros(3, 5, 2),
            torch.zeros(4, 5, 2, 2),
            torch.zeros(1, 3),
            torch.zeros(2, dtype=torch.int64),
            (torch.zeros(2, 3),),
            {"logits": torch.zeros(2, 3)},
        )
    ),
    *rows(
        finetuned,
        {"mode": "fgsm"},
        {"eps": -1},
        {"rho": -1.0},
        {"rho": 5.0, "mode": "none"},
        {"lr": 1e-30},
        {"epochs": 0},
        {"batch_size": 500},
        {"mean": [0.5, 0.5]},
        {"data": blank(3, 2, 4, 4)},
        {"data": blank(6)},
        {"data": odd(lambda x: x[:, 1:])},
        {"data": odd(lambda x: x.double())},
        {"test": (X[:, :, 1:], Y)},
        {"test": (X[:0], Y[:0])},
        {"net": linear().requires_grad_(False)},
    ),
    Misuse(finetuned, {"data": (2 * torch.ones(20, 1, 4, 4), Y[:20])}, name="x"),
    Misuse(finetuned, {"data": (X, torch.eye(3)[Y])}, TypeError, "y"),
    Misuse(finetuned, {"validation_fraction": 0.0, "data": STRIPES.train}),
    Misuse(finetuned, {"eps": 0, "data": (X[:8], Y[:8])}, name="eps"),
    Misuse(finetuned, {"net": linear().half()}, name="float16"),
    *rows(
        finetuned,
        {"data": [1, 2]},
        {"data": (X, Y, Y)},
        {"data": small_run.Items([{"image": X[0], "label": 0}] * 20)},
        {"data": TensorDataset(X, Y, Y)},
        {"data": odd(torch.Tensor.numpy)},
        {"data": odd(label=str)},
        {"data": odd(label=lambda y: torch.eye(3)[y])},
        {"data": odd(ToPILImage())},
        {"net": "net"},
        {"rho": "1"},
        {"lr": "0.1"},
        {"validation_fraction": "a"},
        {"progress": "yes"},
        {"T": None},
        error=(TypeError, ValueError),
    ),
    Misuse(finetuned, {"data": (X.numpy(), Y)}, TypeError, "x"),
    *rows(
        plan,
        {"epochs": 0},
        {"lr": 0.0},
        {"retraction": -1e-3},
        {"weight_decay": -1e-3},
        {"momentum": 1.0},
        {"optimizer": "lion"},
        {"verified_method": "mip"},
        {"select": "verified"},
    ),
    *rows(
        objective,
        {"kappa": 1.5},
        {"rho": -1.0},
        {"norm": "l3"},
        {"loss": "mart"},
        {"trades_weight": NAN},
        {"indicator": "rate"},
        {"penalties": [GradientSparsity(1.0), GradientSparsity(2.0)]},
        {"certified_eps": 0.1},
    ),
    Misuse(objective, {"layers": ["nowhere"]}, name="nowhere"),
    Misuse(certified, {"certified_eps": None}),
    Misuse(certified, {"loss": "paper"}, name="certified_eps"),
    *(
        Misuse(certified, {"certified_eps": eps}, name="eps")
        for eps in (-0.1, 8, NAN, ThreatModel("L2", 0.5))
    ),
    *rows(unattacked, {"box": 0.5}, {"attacked": True}),
    *rows(flips, {"box": 0.5}, {"attacked": True}),
    *rows(
        CertifiedOptions,
        {"surrogate_width": 0.0},
        {"ramp": 0.96},
        {"box": 0.0},
        {"bounds": "crown"},
    ),
    *rows(attack, {"mode": "free"}, {"steps": 7, "mode": "at"}, {"steps": 1, "mode": "gaussian"}),
    Misuse(attack, {"project": False, "mode": "pgd_at"}),
    Misuse(
        partial(pgd, x=X, y=0 * Y, eps=0.1),
        {"model": lambda x: x.flatten(1)[:, :1]},
        name="2 classes",
    ),
    *rows(crafted, {"noise_std": 0.0}, {"step_size": 0.0}, {"steps": 0}, {"eps": 8}),
    *rows(GradientSparsity, {"weight": -1.0}, {"h": 0.0, "weight": 1.0}),
    *rows(ThresholdGuarding, {"weight": NAN}, {"margin": 0.0, "weight": 1.0}),
    *(
        Misuse(penalised, {"penalty": penalty}, (ValueError, TypeError, RuntimeError), name)
        for penalty, name in {
            ThresholdGuarding(1.0, layers=["9"]): "9",
            SurrogateOverlap(1.0, layers=["9"]): "9",
            TemporalOrthogonality(1.0): "OrthogonalEncoder",
            GateRates(1.0): "StochasticGate",
            StabilityGain(1.0): "DLIF",
        }.items()
    ),
    Misuse(penalised, {"penalty": WeightMagnitude(1.0), "net": nn.Flatten(2)}, name="l1"),
    *(
        Misuse(penalised, {"penalty": penalty(1.0), "net": net}, name=type(net).__name__)
        for penalty in (ThresholdGuarding, SurrogateOverlap)
        for net in (Unknown(), EvolvingLeakNode(T))
    ),
    *rows(retraction, {"beta": -0.1}, {"beta": math.inf}, {"beta": NAN}),
    *rows(
        monitor,
        {"decay": {"1": 0.0}},
        {"decay": {Unknown: 1.5}},
        {"decay": {"2": 0.5, "1": 0.5}},
        {"gain": {Unknown: 1.0}},
        {"layers": "first"},
        {"layers": []},
        {"keep": "all"},
    ),
    Misuse(monitor, {"decay": {"7": 0.5}}, name="7"),
    Misuse(monitor, {"decay": {neuron.LIFNode: 0.5}}, name="LIFNode"),
    Misuse(monitor, {"layers": ["1", "x"]}, name="x"),
    Misuse(monitor, {"layers": ["1"], "decay": {}}, name="Unknown"),
    Misuse(MPPDMonitor, {"net": nn.Linear(2, 2)}, name="Linear"),
    *rows(monitored_loss, {"norm": "linf"}, {"indicator": "rate"}),
    Misuse(monitored_loss, {"layers": ["nope"]}, name="nope"),
    Misuse(monitored_loss, {"layers": "1"}, name="1"),
    Misuse(monitored_loss, {"indicator": "std"}, name="spikes"),
    *(
        Misuse(call, {}, name="shape")
        for call in (
            partial(full_perturbation, SEQ, SEQ[:1]),
            partial(spike_train_distance, SEQ, SEQ[:1]),
            partial(tasad, SEQ, SEQ[:1]),
            partial(perturbation, x_seq=SEQ[:2]),
            partial(potential, spike_seq=SEQ[:, :1]),
        )
    ),
    Misuse(perturbation, {"x_seq": SEQ[:0], "x_seq_perturbed": SEQ[:0]}, name="time step"),
    *rows(perturbation, {"decay": 1.5}, {"decay": torch.tensor(0.0)}, {"gain": torch.ones(2)}),
    *rows(potential, {"decay": -0.1}),
    *rows(partial(ms_mppd, SEQ), {"norm": "max"}),
    *rows(associated, {"perturb": {}}, {"resamples": 0}, {"batch_size": 0}),
    *rows(associated, {"eps": [0.1]}, {"eps": [0.0, 0.1]}, {"eps": 0.1}),
    Misuse(associated, {"all_wrong": True}, name="misclassifies"),
    Misuse(associated, {"y": Y[:3]}, name="images"),
    Misuse(gains, {"x": X[:0]}),
    Misuse(gains, {"x_perturbed": X[:2] / 0.0}),
    Misuse(gains, {"x_perturbed": X[:1]}),
    Misuse(gains, {"T": None}),
    Misuse(gains, {"net": SpikingClassifier(linear(), 2)}, name="T"),
    Misuse(partial(input_maps, nn.Linear(2, 2), torch.rand(1, 2)), {}, name="neuron"),
    Misuse(gain_penalty, {"net": linear()}, name="DLIF"),
    *rows(
        design,
        {"mean": 0.0},
        {"objective": "l1"},
        {"held": "final"},
        {"held": "response", "objective": "peak"},
        {"decay": 1.5},
    ),
    *rows(
        dlif,
        {"T": 0},
        {"tau": 0.99},
        {"tau": 1.0},
        {"tau": NAN},
        {"v_threshold": math.inf},
        {"v_reset": NAN},
        {"input_gain_init": math.inf},
        {"backend": "numpy"},
        {"step_mode": "x"},
    ),
    *rows(
        dlif,
        {"T": 2.0},
        {"tau": [2.0]},
        {"tau": True},
        {"v_threshold": "1"},
        {"v_threshold": None},
        {"v_reset": True},
        {"v_reset": [0.0]},
        {"input_gain_init": "1"},
        error=TypeError,
    ),
    *rows(NoisyLIFNode, {"tau": 1.0}, {"noise_std": -1.0}),
    *rows(EvolvingLeakNode, {"T": 0}, {"tau": 0.5, "T": 2}),
    *rows(HomeostaticNode, {"T": 0}, {"tau_v": 0.0, "T": 2}, {"momentum": 2.0, "T": 2}),
    *rows(overlap, {"layers": "13"}, {"half_width": 0.0}, {"half_width": -1.0}),
    *rows(StochasticGate, {"temperature": 0.0}),
    *rows(FrequencyEncoder, {"narrowing": -0.1}),
    Misuse(encoded, {"steps": 3}, RuntimeError, "step"),
    Misuse(overlap, {"layers": []}, name="layer"),
    *rows(
        specified,
        {"neuron": "izhikevich"},
        {"encoder": "wavelet"},
        {"tau": 0.99},
        {"std": (0.1,), "frames": True},
    ),
    Misuse(specified, {"name": "zoo:spiking_resnet18"}, name="channels"),
    Misuse(specified, {"channels": (4, 0)}, name="width"),
    Misuse(specified, {"name": "vgg5", "hidden": (-8,)}, name="width"),
    Misuse(specified, {"mean": (0.1, 0.2)}, name="channel"),
    Misuse(specified, {"encoder_options": {"std": 0.1}}, name="direct"),
    *(Misuse(specified, {"encoder": name, "frames": True}, name=name) for name in ("rsc", "feel")),
    *options("sigma", 0.1, encoder="rsc"),
    *options("std", -1.0, encoder="rsc"),
    *options("generator", 3, encoder="rsc"),
    *options("generator", 3, encoder="poisson"),
    *options("patch", 3, encoder="stod"),
    *options("width", 1, encoder="feel"),
    *options("sharpness", 1, neuron="stog"),
    *options("v_threshold", 2, neuron="stog"),
    *options("generator", 1, neuron="stog"),
    *options("generator", 1, neuron="tgo"),
    *options("surrogate_function", 3, neuron="tgo"),
    *options("kernel_size", [3], [1, 3, 3], 0, [1, 0], 3.0, "33"),
    *options("strides", [2], [3, 1]),
    Misuse(specified, {"neuron": "relu"}, name="T"),
    Misuse(specified, {"image_shape": (1, 3, 8)}, name="halved"),
    Misuse(specified, {"name": "vgg16", "image_shape": (3, 16, 16)}, name="halved"),
    *rows(partial(VGG, image_shape=(1, 8, 8), classes=3), {"name": "vgg12"}),
    *rows(wide, {"depth": 18}, {"widen_factor": 0}),
    *(
        Misuse(run_small, {"x": x, "step_mode": mode}, name=name)
        for x, mode, name in (
            (X[0], "m", "[N, C, H, W]"),
            (X[None], "s", "frame"),
        )
    ),
    *rows(partial(set_time_steps, linear()), {"T": 0}),
    *rows(partial(set_time_steps, linear()), {"T": 2.0}, {"T": True}, error=TypeError),
    *rows(connected, {"widths": ()}, {"widths": (4, 0)}),
    Misuse(chain, {"features": ["A", 4]}, name="begin"),
    Misuse(chain, {"features": [4, "S"]}, name="stride"),
    thresholds([0.5]),
    thresholds([0.2, NAN]),
    thresholds(image_shape=(3, 8, 8)),
    thresholds(options={"batch_norm": True}),
    thresholds(options={"kernel_size": 3}),
    thresholds(neuron="hosnn"),
    *rows(
        digits,
        {"on_unreadable": "ignore"},
        {"train_limit": 0},
        {"validation_fraction": 0.0},
        {"validation_fraction": NAN},
    ),
    Misuse(digits, {"train_limit": 5}, name="validation_fraction"),
    *rows(digits, {"train_limit": 1.5}, {"test_limit": "5"}, error=TypeError),
    *(Misuse(digits, {"augment": whole}, name="cutout") for whole in (True, Augmentation())),
    *rows(digits, {"augment": 1}, {"augment": "yes"}, {"augment": {"scale": 1}}, error=TypeError),
    *rows(
        saccades,
        {"augment": Augmentation(rotation=5), "T": 2},
        {"augment": Augmentation(scale=0.1), "T": 2},
    ),
    *rows(batches, {"batch_size": 24}, {"batch_size": 4, "processes": 3}),
    *rows(partial(image_loader, STRIPES.train, 1), {"workers": -1}),
    Misuse(contents, {"images": []}, TypeError),
    Misuse(load_images, {"name": "imagenet"}, name="fashion_mnist"),
    *rows(saccades, {"T": None}, {"T": 0}, {"T": True}, {"T": 49}),
    *rows(
        Augmentation,
        {"padding": -1},
        {"cutout": 15},
        {"rotation": 270},
        {"rotation": -1},
        {"rotation": NAN},
        {"scale": 1},
    ),
    *rows(
        Augmentation,
        {"padding": 1.5},
        {"flip": "no"},
        {"rotation": "10"},
        {"scale": True},
        error=TypeError,
    ),
    augmented((2, 1, 8, 8), 1, "seed"),
    Misuse(rotated, {"images": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, TypeError),
    augmented((1, 8, 8), 1, "[N, C, H, W]"),
    augmented((1, 1, 8, 8), -1, "seeds"),
]
for gain in (l2_gain, peak_gain):
    right = partial(gain, decay=0.5, T=3)
    MISUSE += rows(
        right,
        {"T": 0},
        {"input_gain": torch.ones(4)},
        {"input_gain": [1.0, 2.0]},
        {"input_gain": torch.tensor(1.0), "T": 1},
        {"input_gain": [1.0, NAN, 1.0]},
        {"input_gain": torch.ones(2, 3), "decay": torch.ones(3)},
    )
for gain in (partial(l2_gain, T=3), partial(peak_gain, T=3), l2_gain_limit, printed_gain):
    wrong = (0.0, -0.5, 1.1, NAN, torch.tensor([0.5, 2.0]))
    MISUSE += rows(gain, *({"decay": decay} for decay in wrong))
