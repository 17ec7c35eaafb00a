"""What is timed must be right, and what is wrong is refused."""

import pytest
import torch
from covering import mostly_slow
from lab.benchmarking import networks, race
from lab.benchmarking.benchmarks import BENCHMARKS, GPU_BENCHMARKS
from lab.benchmarking.layers import Layer, textbook_loop
from lab.benchmarking.networks import FUSED, NetworkTask, Precision
from lab.benchmarking.race import NOT_HERE
from lab.benchmarking.steps import PublishedTask

from sj_robust.ops.dlif import cpp
from sj_robust.training import MODES

IMAGES = (2, 2, 3, 8, 8)
CURRENTS = (2, 2, 4, 4, 4)
ALL = BENCHMARKS | GPU_BENCHMARKS
METHODS = []
for name, one in ALL.items():
    if "vgg" not in name and name != "conv4_adversarial":  # others are of the same parts
        METHODS += [(name, method) for method in one.methods]
QUICK = []
for name, one in METHODS:  # every subject and every method once
    subjects, methods = ({case[i] for case in QUICK} for i in (0, 1))
    if "bf16" not in one and not (name in subjects and one in methods):
        QUICK.append((name, one))
NEED_MORE = {"cpp", "one pass", "sj_robust", "alone"}  # a compiler
NEED_MORE |= {"cupy", "triton", "GPU", "snnTorch", "Norse"}


@pytest.mark.parametrize(("subject", "method"), mostly_slow(METHODS, quick=QUICK))
def test_every_method_is_right_and_runs_or_says_what_is_missing(subject, method, monkeypatch):
    benchmark = ALL[subject]
    for name, value in benchmark.variables.get(method, {}).items():
        monkeypatch.setenv(name, value)
    try:
        task = race.made(subject, method, CURRENTS if benchmark.passes else IMAGES)
    except ImportError:
        assert any(word in method for word in NEED_MORE)
        return
    task.check()
    task.backward(task.forward())
    assert benchmark.peer_of(method) in benchmark.methods


def test_every_mode_is_compared_with_a_published_loop_of_its_own():
    benchmark = BENCHMARKS["training_step"]
    peers = {mode: benchmark.peer_of(mode) for mode in MODES}
    assert peers.pop("certified") == "certified"  # no published loop trains a spiking network so
    assert peers == {mode: f"{mode}, textbook loop" for mode in peers}
    joint = {"certified, joint bounds", "certified, joint bounds, plain torch"}
    assert set(benchmark.methods) == {*MODES, *peers.values(), *joint}


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"certified"}))
def test_the_published_step_draws_the_noise_of_its_paper(mode, monkeypatch):
    drawn = set()
    for kind in ("rand_like", "randn_like"):
        draw = getattr(torch, kind)
        noted = lambda x, kind=kind, draw=draw: drawn.add(kind) or draw(x)  # noqa: E731
        monkeypatch.setattr(torch, kind, noted)
    race.made("training_step", f"{mode}, textbook loop", IMAGES).forward()
    expected = {"none": set(), "pgd_at": {"rand_like"}}.get(mode, {"randn_like"})
    assert drawn == expected


class WrongGradient(torch.nn.Module):
    """A neuron with the spikes of DLIF."""

    def __init__(self, T):
        super().__init__()
        self.node = textbook_loop(T)

    def forward(self, x_seq):
        return self.node(x_seq).detach() + 0 * x_seq


WRONG_LAYERS = {
    "does not equal the textbook loop": Layer(WrongGradient),
    "neither 0 nor 1": Layer(lambda T: torch.sigmoid, check="spikes"),
}


@pytest.mark.parametrize("words", WRONG_LAYERS)
def test_a_wrong_layer_is_refused(words):
    with pytest.raises(ValueError, match=words):
        WRONG_LAYERS[words](CURRENTS).check()


def test_a_wrong_network_is_refused(monkeypatch):
    method = FUSED if cpp.unavailable_reason() is None else "DLIF eager"
    right = networks.NEURONS[method]

    def other(T):
        node = right(T)
        node.tau = 3.0
        return node

    monkeypatch.setitem(networks.NEURONS, method, other)
    with pytest.raises(ValueError, match="does not equal the textbook loop"):
        NetworkTask("conv4", method, Precision(), IMAGES).check()


@pytest.mark.parametrize(
    ("mode", "part", "wrong"),
    [
        ("none", "loss", lambda loss: 1.01 * loss),
        ("gaussian", "loss", lambda loss: 1.01 * loss),
        ("at", "crafted", lambda images: images.flip(3)),
        ("rat", "crafted", lambda images: images.flip(3)),
        ("rat", "retract", lambda nothing: nothing),
        ("pgd_at", "crafted", lambda images: images.flip(3)),
        ("trades", "crafted", lambda images: images.flip(3)),
        ("trades", "loss", lambda loss: 1.01 * loss),
    ],
)
def test_a_wrong_step_of_a_mode_is_refused(monkeypatch, mode, part, wrong):
    right = getattr(PublishedTask, part)
    if part == "retract":
        right = lambda *_: None  # noqa: E731  # left out

    def replaced(self, *arguments):
        return wrong(right(self, *arguments))

    monkeypatch.setattr(PublishedTask, part, replaced)
    with pytest.raises(ValueError, match="does not equal the textbook loop"):
        BENCHMARKS["training_step"].methods[mode](IMAGES).check()


def test_a_worker_weighs_and_times_a_method_or_has_a_reason(monkeypatch):
    found = race.answer("neuron", "textbook loop", CURRENTS, "cpu", 2)
    assert set(found) == {"peak_mb", "saved_mb", "passes"}
    assert len(found["passes"]) == 2
    assert min(min(times.values()) for times in found["passes"]) > 0

    def absent(shape):
        raise ImportError("no package of that name")

    cases = {
        f"{NOT_HERE}no package of that name": absent,
        "ValueError: spikes are neither 0 nor 1: it is not timed": WRONG_LAYERS["neither 0 nor 1"],
    }
    for reason, method in cases.items():
        monkeypatch.setitem(BENCHMARKS["neuron"].methods, "mine", method)
        assert race.answer("neuron", "mine", CURRENTS, "cpu", 1) == {"reason": reason}
