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
    """Arguments of calls, what the message has to say, and how many forwards may come before."""

    calls: tuple[Any, ...]
    arguments: dict[str, Any] = field(hash=False)
    message: str = ""
    forwards: int = 0

    @property
    def name(self):
        given = ", ".join(f"{name}={_short(value)}" for name, value in self.arguments.items())
        return given or "nothing"


def _short(value):
    kind = getattr(value, "dtype", None)
    if kind is not None:
        return f"{type(value).__name__}({kind})"
    return repr(value)[:30]


class Odd:
    """Of no kind that anything takes."""

    def __repr__(self):
        return "Odd()"


LOADER = DataLoader(TensorDataset(X, Y), 4)
WRONG = [
    # the radius
    *(
        Wrong((*CARDS, verify), {"eps": eps}, message)
        for eps, message in {
            4: r"eps must be <= 1, .*, got 4; write 4 / 255",
            8.0: r"eps must be <= 1, .*; write 8 / 255",
            "8": r"eps must be <= 1, .*; write 8 / 255",
            "8/x": r"eps must be a number or a fraction such as 8/255, got '8/x'",
            "": r"eps must be a number or a fraction such as 8/255, got ''",
            "1/0": r"eps must be a number or a fraction such as 8/255, got '1/0'",
            None: r"eps must be a number or a fraction such as 8/255, got None",
            True: r"eps must be a number or a fraction such as 8/255, got True",
            Odd(): r"eps must be a number or a fraction such as 8/255, got Odd\(\)",
            -0.1: r"eps must be >= 0 and finite, got -0.1",
            NAN: r"eps must be >= 0 and finite, got nan",
            INF: r"eps must be >= 0 and finite, got inf",
        }.items()
    ),
    *(
        Wrong((stress, verify), {"eps": eps}, r"eps must be a number or a fraction such as 8/255")
        for eps in ((0.1, 0.2), torch.tensor([0.1, 0.2]))
    ),
    *(
        Wrong((evaluate,), {"eps": eps}, message)
        for eps, message in {
            (): "eps must hold a radius or more",
            (0.1, "x"): "eps must be a number or a fraction such as 8/255, got 'x'",
            (0.1, 8): "eps must be <= 1",
            (0, 0.1): "eps must be > 0 to attack at all",
        }.items()
    ),
    Wrong(CARDS, {"eps": 0}, r"eps must be > 0 to attack at all, got 0.*'8/255'"),
    Wrong(CARDS, {"eps": "0/255"}, r"eps must be > 0 to attack at all"),
    # the norm and its budgets
    *(
        Wrong(CARDS, {"norm": norm}, rf"norm must be one of Linf, L2, L0, moves, got {said}")
        for norm, said in {
            "linf": r"'linf'; did you mean 'Linf'\?",
            "Linff": r"'Linff'; did you mean 'Linf'\?",
            "l3": "'l3'",
            2: "2",
            "": "''",
        }.items()
    ),
    Wrong(CARDS, {"largest_shift": 2}, r"largest_shift limits moves of events, .* omit it"),
    Wrong(CARDS, {"total_shift": 2}, r"total_shift limits moves of events, .* omit it"),
    Wrong(
        (evaluate,), {"norm": "L0", "eps": 3}, r"suite 'standard' does not fit a threat in L0; use"
    ),
    # the suite
    *(
        Wrong((evaluate,), {"suite": suite}, rf"suite must be one of paper, .*, got {said}")
        for suite, said in {
            "": "''",
            "standrad": r"'standrad'; did you mean 'standard'\?",
            "Standard": r"'Standard'; did you mean 'standard'\?",
            "auto-attack": r"'auto-attack'; did you mean 'autoattack'\?",
            "corruptions": "'corruptions'",
            3: "3",
        }.items()
    ),
    Wrong((evaluate,), {"suite": ["fast"]}, r"suite must be one of paper, .*, got \['fast'\]"),
    Wrong((evaluate,), {"suite": "events"}, r"suite 'events' does not fit a threat in Linf; count"),
    Wrong((evaluate,), {"suite": "paper", "norm": "L2"}, r"'paper' is defined for Linf, got 'L2'"),
    *(
        Wrong((stress,), {"suite": suite} | faults, rf"suite must be one of stress, .*, got {said}")
        for faults in ({}, {"faults": [Fault("weight_bits", 4)]})
        for suite, said in {
            "stres": r"'stres'; did you mean 'stress'\?",
            "corruption": r"'corruption'; did you mean 'corruptions'\?",
            "standard": "'standard'",
            None: "None",
        }.items()
    ),
    # faults
    Wrong((stress,), {"faults": []}, r"faults must contain at least one, got none; omit it"),
    Wrong((stress,), {"faults": "weight_bits"}, r"faults must be a list, got str; write faults="),
    Wrong((stress,), {"faults": Fault("weight_bits", 4)}, r"faults must be a list, got Fault; w"),
    Wrong((stress,), {"faults": ["weight_bits"]}, r"must be Fault, got 'weight_bits'; write Fault"),
    Wrong((stress,), {"faults": [("fog", 1)]}, r"must be Fault, got \('fog', 1\); write Fault"),
    Wrong(
        (stress,),
        {"faults": [Corruption("fog", 1)]},
        r"faults of the suite 'stress' must be Fault, got Corruption.*, or suite='corruptions'",
    ),
    Wrong(
        (stress,),
        {"suite": "corruptions", "faults": [Fault("weight_bits", 4)]},
        r"faults of the suite 'corruptions' must be Corruption, got Fault.*, or suite='stress'",
    ),
    Wrong(
        (stress,),
        {"suite": "corruptions", "x": images(N, 2, SIDE, SIDE)},
        r"corruptions need images \[N, C, H, W\] of 1 or 3 channels, got shape \(8, 2, 4, 4\)",
    ),
    # counts
    *(
        Wrong(calls, {name: value}, rf"{name} must be {said}")
        for calls, names in (
            (ALL, ("T",)),
            (CARDS, ("batch_size", "draws")),
            ((stress,), ("steps",)),
            ((verify, smooth), ("batch_size",)),
            ((smooth,), ("n", "n0")),
            ((perturbation_gains,), ("max_iterations",)),
        )
        for name in names
        for value, said in {
            0: ">= 1, got 0",
            -1: ">= 1, got -1",
            2.0: "an integer, got float; give one >= 1",
            "2": "an integer, got str; give one >= 1",
            True: "an integer, got bool; give one >= 1",
        }.items()
    ),
    Wrong(ALL, {"T": X}, r"T must be a number of time steps, got a tensor; name the arguments"),
    *(
        Wrong((*CARDS, perturbation_gains), {"seed": seed}, rf"seed must be {said}")
        for seed, said in {
            -1: ">= 0, got -1",
            1.5: "an integer, got float; give one >= 0",
            "0": "an integer, got str; give one >= 0",
            None: "an integer, got NoneType; give one >= 0",
            2**60: r"< 2\*\*53, got .*; give a smaller one",
        }.items()
    ),
    # normalisation
    *(
        Wrong(ALL, {name: value}, rf"{name} must {said}")
        for name in ("mean", "std")
        for value, said in {
            "0.5": rf"hold one number per channel, got '0.5'; write a list such as {name}=\[0.5",
            True: "hold one number per channel, got True; write a list",
            (True,): r"hold one number per channel, got \(True,\); write a list",
            (0.5, False): r"hold one number per channel, got \(0.5, False\); write a list",
            torch.tensor([True]): r"hold one number per channel, got tensor\(\[True\]\); write",
            np.True_: "hold one number per channel, got .*True.*; write a list",
            Odd(): r"hold one number per channel, got Odd\(\); write a list",
            (): r"hold one number per channel, got shape \[0\]; give one dimension",
            ((0.1, 0.2), (0.3, 0.4)): r"hold one number per channel, got shape \[2, 2\]; give one",
            (0.5, NAN): rf"be finite.* in every channel, got nan; omit {name}",
            INF: rf"be finite.* in every channel, got inf; omit {name}",
        }.items()
    ),
    Wrong(ALL, {"std": 0.0}, r"std must be finite and > 0 in every channel, got 0.0; omit std"),
    Wrong(ALL, {"std": np.array([-1.0])}, r"std must be finite and > 0 in every channel, got -1.0"),
    Wrong(ALL, {"mean": [0.1, 0.2]}, r"mean must hold one number per channel, got 2 for .*; give"),
    Wrong(ALL, {"std": np.ones((3, 1, 1))}, r"std must hold one number per channel, got 3 for .*;"),
    # the network
    *(
        Wrong(
            (call,),
            {NETWORK[call]: value},
            rf"{NETWORK[call]} must be a network \(nn.Module\), got {said}",
        )
        for call in ALL
        for value, said in {
            nn.ReLU: "the class ReLU; build it first",
            "digits/lif": "str; build it first",
            None: "NoneType; build it first",
        }.items()
    ),
    *(
        Wrong((call,), {NETWORK[call]: network, "T": T}, message)
        for call in ALL
        for network, T, message in (
            (Counted().to("meta"), 3, "must hold values, got parts.1.weight on the device meta"),
            (Keeping(), 3, r"keeps a state that .* \(seen\), .* method reset\(\)"),
        )
    ),
    Wrong(CARDS, {"model": Keeping(ends=False), "T": None}, r"carries a state .* \(seen\)"),
    *(
        Wrong(
            (call,),
            {NETWORK[call]: torch.compile(SpikingClassifier(Counted(), T=3)), "T": None},
            "the network must be given before torch.compile, got a compiled SpikingClassifier",
        )
        for call in (*CARDS, perturbation_gains, verify)
    ),
    *(
        Wrong(
            (verify,),
            {"model": compiled},
            "model must be given before torch.compile, got a compiled network",
        )
        for compiled in (torch.compile(Counted()), compiled_in_place(Counted()))
    ),
    Wrong((smooth,), {"model": "digits/lif"}, r"model must be a callable from images to logits"),
    Wrong(
        (*CARDS, perturbation_gains, verify),
        {"T": None},
        r"T must be given for a bare network \(Counted",
    ),
    # images
    *(
        Wrong((*CARDS, verify, smooth), {"x": value}, said)
        for value, said in (
            ((255 * X).byte(), r"x must be floating point, got torch.uint8; .*x.float\(\) / 255"),
            (255 * X, r"x must lie in \[0, 1\], got values from .*; scale it and normalise inside"),
            (2 * X - 1, r"x must lie in \[0, 1\], got values from -.*; scale it and normalise"),
            (torch.where(X > 0.5, NAN, X), r"x must be finite, got .* NaN .*; remove or replace"),
            (X[0, 0, 0], r"x must be a batch of images \[N, ...\], got .*; add N with x.unsqueeze"),
        )
    ),
    Wrong(CARDS, {"x": X.numpy()}, r"x must be a tensor of images, a data set or .*, got ndarray"),
    Wrong(CARDS, {"x": "digits"}, r"x must be a tensor of images, a data set or .*, got str; give"),
    Wrong(CARDS, {"x": None}, r"x must be a tensor of images, a data set or .*, got NoneType; giv"),
    Wrong(CARDS, {"x": 3}, r"x must be a tensor of images, a data set or .*, got int; give"),
    Wrong(
        CARDS, {"x": list(X), "y": None}, r"every batch of x must be a pair .*, got Tensor; give"
    ),
    Wrong(CARDS, {"x": [(X,)], "y": None}, r"every batch of x must be a pair .*, got tuple; give"),
    Wrong(CARDS, {"x": X[:0], "y": Y[:0]}, r"x must contain at least one image, got none"),
    Wrong(CARDS, {"x": [], "y": None}, r"x must contain at least one image, got none"),
    Wrong((verify, smooth), {"x": X.numpy()}, r"x must be a tensor of images, got ndarray; use"),
    Wrong(
        (evaluate,),
        {"x": X.flatten(1), "suite": "gradient"},
        r"suite 'gradient' needs images .* use 'fast', or",
    ),
    Wrong(
        (evaluate,),
        {"x": X.flatten(1), "suite": "standard", "draws": 2},
        r"suite 'standard' needs images .* use 'fast', or",
    ),
    # event frames
    Wrong(
        CARDS,
        {"x": 0.7 * frames(4), "eps": 3},
        r"or numbers of events, got values from 0 to 2.1; .* \(x > 0\).to\(x.dtype\)",
    ),
    Wrong(
        CARDS,
        {"x": frames(4).int(), "eps": 3},
        r"x must be floating point, got torch.int32; .* \(frames > 0\).float\(\)",
    ),
    Wrong(
        CARDS, {"x": frames() / 2, "eps": 3}, r"x must be binary event frames .* \(x > 0\).to\(x"
    ),
    Wrong(CARDS, {"x": frames(), "eps": 0.1}, r"eps must be an integer >= 1 for L0, .* 'Linf' or"),
    Wrong(
        CARDS,
        {"x": frames(), "norm": "moves", "eps": 3, "total_shift": 0},
        r"total_shift must be >= 1, got 0",
    ),
    Wrong((evaluate,), {"x": frames(), "eps": 3, "suite": "fast"}, r"use the suite 'events'"),
    # labels
    *(
        Wrong((*CARDS, verify), {"y": value}, said)
        for value, said in (
            (Y.float(), r"y must be int64, got torch.float32; use y.long\(\)"),
            (Y.int(), r"y must be int64, got torch.int32; use y.long\(\)"),
            (Y.tolist(), r"y must be a tensor of labels, got list; use torch.tensor\(labels\)"),
            (Y.numpy(), r"y must be a tensor of labels, got ndarray; use torch.tensor\(labels\)"),
            (Y[:3], r"y must have shape \[N\] = \[8\] as x has, got \[3\]; give one label per"),
            (nn.functional.one_hot(Y), r"y must have shape \[N\] = \[8\].*; give one label"),
            (Y - 1, r"y must hold labels >= 0, got -1; number the classes from 0"),
        )
    ),
    Wrong(
        (*CARDS, verify),
        {"y": Y + 1},
        r"y must hold labels < 3, the number of classes the model returns, got 3; number",
        forwards=2,
    ),
    Wrong(CARDS, {"y": None}, r"y must hold the labels of x, got None; or give a DataLoader"),
    Wrong(CARDS, {"x": LOADER}, r"y must be None where x brings its own labels, got both"),
    # where the results go, and what they are called
    Wrong(CARDS, {"folder": __file__}, r"folder must be a folder, but .* is a file; give another"),
    Wrong(CARDS, {"folder": f"{__file__}/a/b"}, r"folder must be a folder, .* is a file; give"),
    Wrong(CARDS, {"folder": "/proc/x"}, r"folder must be a folder that can be written, .*; give"),
    Wrong(CARDS, {"folder": f"a/{'n' * 300}"}, r"folder must have names of at most 255 bytes"),
    Wrong(CARDS, {"folder": 3}, r"folder must be the path of a folder, got 3; use a str"),
    Wrong(CARDS, {"folder": ""}, r"folder must be the path of a folder, got ''; use a str"),
    *(
        Wrong(CARDS, {name: value}, rf"{name} must be a non-empty string, got {said}; use")
        for name in ("name", "dataset")
        for value, said in {3: "3", "": "''"}.items()
    ),
    Wrong(CARDS, {"dataset": None}, r"dataset must be a non-empty string, got None; use"),
    Wrong(CARDS, {"progress": "no"}, r"progress must be True or False, got 'no'"),
    Wrong(CARDS, {"progress": None}, r"progress must be True or False, got None"),
    # pairs of inputs
    *(
        Wrong((compare_potentials, perturbation_gains), {name: value}, said)
        for name, value, said in (
            ("x", X.numpy(), r"x must be a tensor, got ndarray; use torch.as_tensor\(x\)"),
            ("x", None, r"x must be a tensor, got NoneType; use"),
            ("x_perturbed", X.tolist(), r"x_perturbed must be a tensor, got list; use torch.as_"),
            ("x_perturbed", X[:3], r"x and x_perturbed must have the same shape, got .*; perturb"),
            ("x_perturbed", X / 0, r"x_perturbed must be finite, got .*; omit those samples"),
        )
    ),
    Wrong(
        (perturbation_gains,),
        {"x": X[:0]},
        r"x must hold a sample, \[N, ...\], got shape .*; add N",
    ),
    Wrong(
        (perturbation_gains,),
        {"x": X.double().int()},
        r"x must be floating point, got torch.int32; scale",
    ),
    # numbers of the proofs
    *(
        Wrong((call,), {name: value}, rf"{name} must be {said}")
        for call, names in (
            (perturbation_gains, ("margin", "tolerance")),
            (verify, ("time_limit",)),
        )
        for name in names
        for value, said in {
            "1": rf"a number, got str; use float\({name}\)",
            None: rf"a number, got NoneType; use float\({name}\)",
            -1.0: "finite and >=? 0, got -1",
            NAN: "finite and >=? 0, got nan",
        }.items()
    ),
    *(
        Wrong((verify,), {"method": method}, rf"method must be one of ibp, .*, got {said}")
        for method, said in {
            "jonit": r"'jonit'; did you mean 'joint'\?",
            "crown": "'crown'",
            1: "1",
        }.items()
    ),
    Wrong(
        (verify,),
        {"on_batch": 3},
        r"on_batch must be a function or None, got int; give one such as print",
    ),
    Wrong(
        (smooth,),
        {"on_image": 3},
        r"on_image must be a function or None, got int; give one such as print",
    ),
    *(
        Wrong((smooth,), {"sigma": value}, rf"sigma must be {said}")
        for value, said in {
            0: "finite and > 0, got 0",
            -1: "finite and > 0, got -1",
            INF: "finite and > 0, got inf",
            "8/255": r"a number, got str; use float\(sigma\)",
        }.items()
    ),
    *(
        Wrong((smooth,), {"alpha": value}, rf"alpha must be {said}")
        for value, said in {
            0: r"in \(0, 1\), got 0; it is the probability of error, such as 0.001",
            1: r"in \(0, 1\), got 1; it is the probability of error",
            "a": r"a number, got str; use float\(alpha\)",
            NAN: "finite and >= 0, got nan",
        }.items()
    ),
    Wrong((smooth,), {"generator": 0}, r"generator must be a torch.Generator, got int; use torch."),
]
CASES = [(call, wrong) for wrong in WRONG for call in wrong.calls]


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch):
    """What comes after the checks fails at its first step."""

    def computed(*arguments, **options):
        raise AssertionError("the work has begun")

    for name in ("assess", "stress_network"):
        monkeypatch.setattr(own_network, name, computed)


def test_there_are_more_than_a_hundred():
    assert len(CASES) > 300
    assert {call for call, _ in CASES} == set(RIGHT)


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
    assert found == [{"T": T, "mean": (0.25,), "std": (0.5,)}] * 6
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
        assert verify(Counted().parts.eval(), **RIGHT[verify] | {"eps": eps}).eps == plain


def test_right_arguments_of_both_cards_reach_the_work():
    for call in CARDS:
        with pytest.raises(AssertionError, match="the work has begun"):
            call(Counted(), **RIGHT[call])
