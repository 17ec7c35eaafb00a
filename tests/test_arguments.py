"""Wrong arguments of the calls that take a network and images: each is refused at once, by its
name, with what to give instead.
"""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sj_robust import SpikingClassifier, compare_potentials, evaluate, perturbation_gains, verify
from sj_robust.attacks import ThreatModel
from sj_robust.core.host import layer, neuron
from sj_robust.evaluation import Corruption, Fault, own_network, stress
from sj_robust.proofs import smooth

T = 3
N = 8
SIDE = 4
CLASSES = 3
SECOND = 1.0
NAN = float("nan")
INF = float("inf")


class Counted(nn.Module):
    """A spiking network, in step mode "m", that counts its forwards."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.parts = nn.Sequential(
                layer.Flatten(step_mode="m"),
                layer.Linear(SIDE * SIDE, CLASSES, step_mode="m"),
                neuron.LIFNode(detach_reset=True, v_threshold=0.1, step_mode="m"),
            )
        self.forwards = 0

    def forward(self, x_seq):
        self.forwards += 1
        return self.parts(x_seq)


class Keeping(nn.Module):
    """A network that adds what it has seen, and has neurons or not."""

    def __init__(self, ends=True):
        super().__init__()
        self.linear = nn.Linear(SIDE * SIDE, CLASSES)
        self.end = neuron.LIFNode(v_threshold=0.1, step_mode="m") if ends else nn.Identity()
        self.seen = 0.0
        self.eval()

    def forward(self, x):
        self.seen = 0.5 * self.seen + self.linear(x.flatten(-3))
        return self.end(x.flatten(-3)).sum(-1, keepdim=True) + self.seen


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def images(*shape):
    return torch.rand(shape or (N, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0))


def labels():
    return torch.arange(N) % CLASSES


def frames(values=2):
    drawn = torch.randint(values, (N, T, 2, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    return drawn.float()


X = images()
Y = labels()
RIGHT: dict[Any, dict[str, Any]] = {
    evaluate: {"x": X, "y": Y, "eps": 0.1, "T": T, "progress": False},
    stress: {"x": X, "y": Y, "eps": 0.1, "T": T, "progress": False},
    compare_potentials: {"x": X, "x_perturbed": X + 0.1, "T": T},
    perturbation_gains: {"x": X, "x_perturbed": X + 0.1, "T": T},
    verify: {"x": X, "y": Y, "eps": 0.1, "T": T},
    smooth: {"x": X, "sigma": 0.1},
}
NETWORK = {
    evaluate: "model",
    stress: "model",
    compare_potentials: "net",
    perturbation_gains: "net",
    verify: "model",
}
CARDS = (evaluate, stress)
ALL = (*CARDS, compare_potentials, perturbation_gains, verify)


@dataclass(frozen=True)
class Wrong:
    """Arguments of calls, what the message has to name, by default the first of them, and how many
    forwards may come before.
    """

    calls: tuple[Any, ...]
    arguments: dict[str, Any] = field(hash=False)
    named: str = ""
    forwards: int = 0

    @property
    def message(self):
        return rf"\b{self.named or next(iter(self.arguments))}\b"

    @property
    def name(self):
        return ", ".join(f"{name}={repr(value)[:30]}" for name, value in self.arguments.items())


def each(calls, name, *values, **others):
    """One argument with each of some wrong values."""
    return [Wrong(calls, {name: value} | others) for value in values]


class Odd:
    """Of no kind that anything takes."""

    def __repr__(self):
        return "Odd()"


LOADER = DataLoader(TensorDataset(X, Y), 4)
COMPILED = torch.compile(SpikingClassifier(Counted(), T=3))
COUNTS = {
    ALL: ("T",),
    CARDS: ("batch_size", "draws"),
    (stress,): ("steps",),
    (verify, smooth): ("batch_size",),
    (smooth,): ("n", "n0"),
    (perturbation_gains,): ("max_iterations",),
}
NOT_CHANNELS = (
    "0.5",
    True,
    (True,),
    (0.5, False),
    torch.tensor([True]),
    np.True_,
    Odd(),
    (),
    ((0.1, 0.2), (0.3, 0.4)),
    (0.5, NAN),
    INF,
)
PAIRS = (compare_potentials, perturbation_gains)
WRONG = [
    # the radius
    *each(
        (*CARDS, verify), "eps", 4, 8.0, "8", "8/x", "", "1/0", None, True, Odd(), -0.1, NAN, INF
    ),
    *each((stress, verify), "eps", (0.1, 0.2), torch.tensor([0.1, 0.2])),
    *each((verify,), "eps", ThreatModel("L2", 0.1)),
    *each((evaluate,), "eps", (), (0.1, "x"), (0.1, 8), (0, 0.1), (0.1, ThreatModel("L2", 0.2))),
    *each(CARDS, "eps", 0, "0/255"),
    # the suite
    *each((evaluate,), "suite", "", "standrad", "Standard", "corruptions", 3, ["fast"], "events"),
    *each((evaluate,), "suite", "standard", eps=ThreatModel("L0", 3)),
    Wrong((evaluate,), {"eps": ThreatModel("L2", 0.1), "suite": "paper"}, "L2"),
    *each((stress,), "suite", "stres", "standard", None),
    *each((stress,), "suite", "stres", "standard", None, faults=[Fault("weight_bits", 4)]),
    # faults
    *each((stress,), "faults", [], "weight_bits", Fault("weight_bits", 4), ["weight_bits"]),
    *each((stress,), "faults", [("fog", 1)], [Corruption("fog", 1)]),
    *each((stress,), "faults", [Fault("weight_bits", 4)], suite="corruptions"),
    Wrong((stress,), {"x": images(N, 2, SIDE, SIDE), "suite": "corruptions"}, "images"),
    # counts
    *(
        wrong
        for calls, names in COUNTS.items()
        for name in names
        for wrong in each(calls, name, 0, -1, 2.0, "2", True)
    ),
    *each(ALL, "T", X),
    *each((*CARDS, perturbation_gains), "seed", -1, 1.5, "0", None, 2**60),
    # normalisation
    *each(ALL, "mean", *NOT_CHANNELS, [0.1, 0.2]),
    *each(ALL, "std", *NOT_CHANNELS, 0.0, np.array([-1.0]), np.ones((3, 1, 1))),
    # the network
    *(wrong for call in ALL for wrong in each((call,), NETWORK[call], nn.ReLU, "digits/lif", None)),
    *(Wrong((call,), {NETWORK[call]: Counted().to("meta")}, "meta") for call in ALL),
    *(Wrong((call,), {NETWORK[call]: Keeping()}, "seen") for call in ALL),
    Wrong(CARDS, {"model": Keeping(ends=False), "T": None}, "seen"),
    *(
        Wrong((call,), {NETWORK[call]: COMPILED, "T": None}, "torch.compile")
        for call in (*CARDS, perturbation_gains, verify)
    ),
    *each((verify,), "model", torch.compile(Counted()), compiled_in_place(Counted())),
    *each((smooth,), "model", "digits/lif"),
    *each((*CARDS, perturbation_gains, verify), "T", None),
    # images
    *each((*CARDS, verify, smooth), "x", (255 * X).byte(), 255 * X, 2 * X - 1, X[0, 0, 0]),
    *each((*CARDS, verify, smooth), "x", torch.where(X > 0.5, NAN, X)),
    *each(CARDS, "x", X.numpy(), "digits", None, 3),
    *each(CARDS, "x", list(X), [(X,)], [], y=None),
    *each(CARDS, "x", X[:0], y=Y[:0]),
    *each((verify, smooth), "x", X.numpy()),
    *each((evaluate,), "suite", "gradient", "standard", x=X.flatten(1), draws=2),
    # event frames
    *each(CARDS, "x", 0.7 * frames(4), frames(4).int(), frames() / 2, eps=3),
    *each(CARDS, "eps", 0.1, x=frames()),
    *each((evaluate,), "suite", "fast", x=frames(), eps=3),
    # labels
    *each((*CARDS, verify), "y", Y.float(), Y.int(), Y.tolist(), Y.numpy(), Y[:3], Y - 1),
    *each((*CARDS, verify), "y", nn.functional.one_hot(Y)),
    Wrong((*CARDS, verify), {"y": Y + 1}, forwards=2),
    *each(CARDS, "y", None),
    Wrong(CARDS, {"x": LOADER}, "y"),
    # where the results go, and what they are called
    *each(CARDS, "folder", __file__, f"{__file__}/a/b", "/proc/x", f"a/{'n' * 300}", 3, ""),
    *each(CARDS, "folder", "nn/" * 1400),
    *each(CARDS, "name", 3, ""),
    *each(CARDS, "dataset", 3, "", None),
    *each(CARDS, "progress", "no", None),
    # pairs of inputs
    *each(PAIRS, "x", X.numpy(), None),
    *each(PAIRS, "x_perturbed", X.tolist(), X[:3], X / 0),
    *each((perturbation_gains,), "x", X[:0], X.double().int()),
    # numbers of the proofs
    *each((perturbation_gains,), "margin", "1", None, -1.0, NAN),
    *each((perturbation_gains,), "tolerance", "1", None, -1.0, NAN),
    *each((verify,), "time_limit", "1", None, -1.0, NAN),
    *each((verify,), "method", "jonit", "crown", "", 1),
    *each((verify,), "on_batch", 3),
    *each((smooth,), "on_image", 3),
    *each((smooth,), "sigma", 0, -1, INF, "8/255"),
    *each((smooth,), "alpha", 0, 1, "a", NAN),
    *each((smooth,), "generator", 0),
]
CASES = [(call, wrong) for wrong in WRONG for call in wrong.calls]


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch):
    """What comes after the checks fails at its first step."""

    def computed(*arguments, **options):
        raise AssertionError("the work has begun")

    for name in ("assess", "stress_network"):
        monkeypatch.setattr(own_network, name, computed)


@pytest.mark.parametrize("call", RIGHT, ids=lambda call: call.__name__)
def test_wrong_arguments_are_refused_at_once(call):
    slow = []
    unlike = []
    Counted()(X.expand(T, *X.shape)).sum().backward()  # what torch loads at the first pass
    for _, wrong in (case for case in CASES if case[0] is call):
        net = Counted().eval()
        network = SpikingClassifier(net, T) if call is smooth else net
        arguments = RIGHT[call] | {NETWORK.get(call, "model"): network} | wrong.arguments
        began = time.process_time()
        try:
            with pytest.raises((TypeError, ValueError), match=wrong.message):
                call(**arguments)
        except BaseException as error:  # all of them are told, not the first alone
            unlike.append(f"{wrong.name}: {type(error).__name__}: {error}")
        if time.process_time() - began > SECOND:
            slow.append(wrong.name)
        if net.forwards > wrong.forwards:
            unlike.append(f"{wrong.name}: {net.forwards} forwards before it was refused")
    assert not unlike, "\n\n".join(unlike)
    assert not slow


@pytest.mark.parametrize(
    ("call", "package", "options", "command"),
    [
        (
            stress,
            "imagecorruptions",
            {"suite": "corruptions"},
            r"pip install 'sj_robust\[corruptions\]'",
        ),
        (
            stress,
            "imagecorruptions",
            {"suite": "corruptions", "faults": [Corruption("fog", 1)]},
            r"pip install 'sj_robust\[corruptions\]'",
        ),
        (verify, "scipy.optimize", {"method": "mip"}, "pip install scipy"),
        (smooth, "scipy.stats", {}, "pip install scipy"),
    ],
)
def test_a_missing_package_is_named_before_anything_runs(
    call, package, options, command, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    net = Counted().eval()
    network = SpikingClassifier(net, T) if call is smooth else net
    with pytest.raises(ModuleNotFoundError, match=command):
        call(**RIGHT[call] | {NETWORK.get(call, "model"): network} | options)
    assert net.forwards == 0


def test_every_form_of_mean_and_std_is_the_same_plain_data(monkeypatch):
    found = []
    monkeypatch.setattr(own_network, "assess", lambda *given: found.append(given[-1].configuration))
    for form in (
        float,
        list,
        tuple,
        torch.tensor,
        np.array,
        lambda values: torch.tensor(values[0]),
    ):
        mean, std = (form([value]) if form is not float else value for value in (0.25, 0.5))
        evaluate(Counted(), **RIGHT[evaluate] | {"mean": mean, "std": std, "T": np.int64(T)})
    plain = {"T": T, "mean": (0.25,), "std": (0.5,), "decay": {}, "gain": {}}
    assert found == [plain] * 6
    assert {type(one["T"]) for one in found} == {int}
    for one in found:
        assert type(one["mean"][0]) is float
    for eps, plain in {
        "0.25": 0.25,
        np.float64(0.1): 0.1,
        np.float32(0.1): 0.1,
        torch.tensor(0.1): 0.1,
        torch.tensor(8 / 255): 8 / 255,
        torch.tensor(0.123456): 0.123456,
        torch.tensor(0.1, dtype=torch.float64): 0.1,
    }.items():
        assert verify(Counted().parts.eval(), **RIGHT[verify] | {"eps": eps}).threat.eps == plain


def test_right_arguments_of_both_cards_reach_the_work():
    for call in CARDS:
        with pytest.raises(AssertionError, match="the work has begun"):
            call(Counted(), **RIGHT[call])
