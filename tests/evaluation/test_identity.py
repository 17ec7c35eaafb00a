"""No figure of another network: what a folder is refused for, and what it is not."""

import argparse
import functools
import itertools
import logging
import os
import subprocess
import sys
import tempfile
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import launch
import pytest
import torch
from evaluation import suite_run
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import sj_robust
from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import fgsm
from sj_robust.classifier import PoissonEncoder
from sj_robust.evaluation import Fault, Member, stress
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.identity import identify, network_key
from sj_robust.neuron import fuse

T = 3
LOG = logging.getLogger(__name__)


class Net(nn.Module):
    """A spiking network with all that a network may keep beside its weights."""

    def __init__(self, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 6)
        self.node = neuron.IFNode(step_mode="m", v_threshold=0.2)
        self.second = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        self.register_buffer("scale", torch.ones(3), persistent=False)
        self.turns = False
        self.change = nn.functional.relu
        self.order = ("first", "second")
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x_seq):
        first, second = (getattr(self, name) for name in self.order)
        if first is self.first:
            x_seq = second(self.change(self.node(first(x_seq.flatten(2)))))
        else:
            x_seq = self.change(self.node(self.first(x_seq.flatten(2)))) + second.bias
        logits = self.last(x_seq) * self.scale
        return logits.roll(int(self.turns), -1)


class Loud(neuron.IFNode):
    """A neuron with a parameter that it does not print."""

    def __init__(self, gain):
        super().__init__(step_mode="m", v_threshold=0.2)
        self.gain = gain

    def multi_step_forward(self, x_seq):
        return self.gain * super().multi_step_forward(x_seq)


class Hidden(nn.Module):
    """Layers in a list of Python's, which torch does not know."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = [nn.Linear(16, 3)]

    def forward(self, x_seq):
        return self.layers[0](x_seq.flatten(2))


class Rare(nn.Module):
    """Networks that differ on images that nobody has tried."""

    def __init__(self, shift):
        super().__init__()
        self.last = nn.Linear(16, 3)
        nn.init.constant_(self.last.weight, 0.1)
        self.shift = shift

    def forward(self, x_seq):
        x = x_seq.flatten(2)
        return self.last(x) + (x.sum() == 1.25) * self.shift


class Asks(nn.Module):
    """A network that asks something else about images that nobody has tried."""

    def __init__(self, asked=None, ask=None, **attributes):
        super().__init__()
        self.last = nn.Linear(16, 3)
        nn.init.constant_(self.last.weight, 0.1)
        nn.init.constant_(self.last.bias, 0.1)
        self.asked = asked
        self.ask = ask
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x_seq):
        x = x_seq.flatten(2)
        if x.sum() == 1.25:
            return self.last(x) * self.sign()
        return self.last(x)

    def sign(self):
        return self.ask(self.asked)


class Broken(dict):
    """A dictionary that cannot be read."""

    def __iter__(self):
        raise OSError("closed")


class Straight(torch.autograd.Function):
    """The step function with a slope that somebody else knows."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.slope = slope
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.slope * grad, None


class Sloped(nn.Module):
    """A network of which another slope changes the gradient alone."""

    def __init__(self, slope):
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(16, 3)
        self.slope = weakly(slope)

    def forward(self, x_seq):
        return Straight.apply(self.last(x_seq.flatten(2)), next(self.slope))


def weakly(value):
    """A value in a generator, where nobody can read it."""
    while True:
        yield value


def with_a_global_hook(monkeypatch):
    hooks = {0: lambda module, into, out: (into[0] / 2,) if isinstance(module, nn.Linear) else into}
    monkeypatch.setattr(nn.modules.module, "_global_backward_hooks", hooks)
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", True)
    return classifier()


class Scripted(nn.Module):
    def __init__(self, sign: float):
        super().__init__()
        self.last = nn.Linear(16, 3)
        nn.init.constant_(self.last.weight, 0.1)
        nn.init.constant_(self.last.bias, 0.1)
        self.sign = sign

    def forward(self, x):
        x = x.flatten(1)
        return self.last(x) * (self.sign if bool(x.sum() == 1.25) else 1.0)


def classifier(net=None, **options):
    return SpikingClassifier(Net() if net is None else net, **{"T": T} | options)


def with_attributes(**attributes):
    return lambda monkeypatch: classifier(Net(**attributes))


def scaled(factor):
    return lambda x: factor * x


def with_forward_hook(monkeypatch):
    model = classifier()
    model.net.last.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def with_backward_hook(monkeypatch):
    model = classifier()
    model.net.last.register_full_backward_hook(lambda module, into, out: (-into[0],))
    return model


def in_single_steps(monkeypatch):
    net = nn.Sequential(nn.Flatten(-3), nn.Linear(16, 3))
    net[1].weight.data.fill_(0.1)
    return SpikingClassifier(net, T, takes="steps")


def in_multi_steps(monkeypatch):
    model = in_single_steps(monkeypatch)
    return SpikingClassifier(model.net, T, takes="sequence")


plain = with_attributes()
UNLIKE = {
    "a flag that turns the logits": (plain, with_attributes(turns=True)),
    "a buffer that is not saved": (plain, with_attributes(scale=torch.tensor([1.0, 2.0, 1.0]))),
    "a function on the module": (plain, with_attributes(change=torch.sigmoid)),
    "code of a function": (
        with_attributes(change=lambda x: x + 1),
        with_attributes(change=lambda x: x + 2),
    ),
    "an argument that is bound": (
        with_attributes(change=partial(torch.clamp, max=1.0)),
        with_attributes(change=partial(torch.clamp, max=0.5)),
    ),
    "a forward hook": (plain, with_forward_hook),
    "a backward hook": (plain, with_backward_hook),
    "T": (plain, lambda _: classifier(T=T + 1)),
    "the mean": (lambda _: classifier(mean=[0.1]), lambda _: classifier(mean=[0.2])),
    "the step mode": (in_single_steps, in_multi_steps),
    "a parameter of the neuron": (
        with_attributes(node=Loud(1.0)),
        with_attributes(node=Loud(0.5)),
    ),
    "the wiring": (plain, with_attributes(order=("second", "first"))),
    "weights in a list": (lambda _: classifier(Hidden(0)), lambda _: classifier(Hidden(1))),
    "what no probe shows": (lambda _: classifier(Rare(0)), lambda _: classifier(Rare(1))),
    "functions in a list named as hooks": (
        lambda _: classifier(Asks(late_hooks=[scaled(1)])),
        lambda _: classifier(Asks(late_hooks=[scaled(-1)])),
    ),
    "v_seq of no neuron": (
        lambda _: classifier(Asks(v_seq=1)),
        lambda _: classifier(Asks(v_seq=-1)),
    ),
    "options from a command line": (
        lambda _: classifier(Asks(argparse.Namespace(sign=1))),
        lambda _: classifier(Asks(argparse.Namespace(sign=-1))),
    ),
    "a slope that nobody can read": (
        lambda _: classifier(Sloped(1.0)),
        lambda _: classifier(Sloped(2.0)),
    ),
    "a hook on every backward": (plain, with_a_global_hook),
    "an object": (
        with_attributes(options=SimpleNamespace(depth=[1, {"a": 2}])),
        with_attributes(options=SimpleNamespace(depth=[1, {"a": 3}])),
    ),
}


def run(model, folder, **options):
    """An evaluation of a moment, as plain data without times."""
    members = [Member("fgsm", partial(fgsm, eps=0.2))]
    given = suite_run.batches(6, 12)
    outcome = suite_run.suite_outcome(model, given, members, folder=folder, **options)
    return suite_run.without_times(outcome)


@pytest.fixture(scope="module")
def data():
    """Twelve images in two batches."""
    return Data.of(suite_run.batches(6, 12))


@pytest.fixture(scope="module")
def begun_by_the_plain_one(tmp_path_factory, data):
    """A folder that an evaluation of the plain network has begun."""
    folder = tmp_path_factory.mktemp("plain")
    begin(classifier(), data, folder)
    return folder


def begin(model, data, folder):
    """All of an evaluation that comes before its first attack, and a file that stands for that."""
    network_key(model, data, folder)
    (folder / "step").touch()


@pytest.mark.parametrize("what", UNLIKE)
def test_another_network_is_refused_by_the_folder(
    tmp_path, monkeypatch, data, begun_by_the_plain_one, what
):
    first, second = UNLIKE[what]
    folder = begun_by_the_plain_one
    if first is not plain:
        folder = tmp_path
        begin(first(monkeypatch), data, folder)
    other = second(monkeypatch)
    with pytest.raises(ValueError, match=r"network changed: .*evaluate into another folder"):
        begin(other, data, folder)


@pytest.mark.slow
def test_evaluate_and_stress_refuse_it_and_name_what_differs(tmp_path):
    x, y = suite_run.images(6)
    options = {"eps": 0.1, "progress": False}
    few = {"faults": [Fault("weight_bits", 4)], "steps": 1}
    evaluate = partial(sj_robust.evaluate, suite="fast", **options)
    for name, call in (("evaluate", evaluate), ("stress", partial(stress, **few, **options))):
        call(classifier(), x, y, folder=tmp_path / name)
        with pytest.raises(ValueError, match=r"network changed: network\.net\.turns.*folder"):
            call(classifier(Net(turns=True)), x, y, folder=tmp_path / name)


class Rounds(Asks):
    """A network without a gradient."""

    def forward(self, x_seq):
        return super().forward(x_seq.detach()).detach()


class Fails(Sloped):
    """A network whose backward pass fails."""

    def __init__(self):
        super().__init__("no slope")


@pytest.mark.parametrize("kind", [Rounds, Fails])
def test_a_network_without_a_gradient_has_an_identity(kind, data):
    found = identify(classifier(kind()), data)
    assert found.noise.gradients is None
    assert found.noise.logits is not None
    assert found.differences(identify(classifier(kind()), data)) == []


class Keeps(Asks):
    """A network that keeps what its last layer gave, with the graph of it."""

    def forward(self, x_seq):
        self.kept = super().forward(x_seq)
        return self.kept


def test_no_graph_is_left_in_what_a_network_remembers(data):
    net = classifier(Keeps())
    identify(net, data)
    assert not net.net.kept.requires_grad


def with_an_open_file(monkeypatch):
    return classifier(Asks(tempfile.NamedTemporaryFile()))


def with_another_environment(monkeypatch):
    monkeypatch.setenv("TERMINAL_OF_TODAY", str(next(NUMBERS)))
    return classifier(Asks(ask=lambda _: float(os.environ.get("SIGN", "1"))))


def with_another_module(monkeypatch):
    monkeypatch.setitem(sys.modules, f"later{next(NUMBERS)}", ModuleType("later"))
    return classifier(Asks(ask=lambda _: len(sys.modules)))


NUMBERS = itertools.count()
SAME = {
    "a file that is open": with_an_open_file,
    "another environment": with_another_environment,
    "another module loaded": with_another_module,
    "an object that cannot be read": lambda _: classifier(Asks(Broken(sign=1))),
    "TorchScript": lambda _: torch.jit.script(Scripted(1.0)),
    "a trace": lambda _: torch.jit.trace(Scripted(1.0), torch.rand(2, 1, 4, 4)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", SAME)
def test_what_surrounds_a_network_is_no_part_of_it(tmp_path, monkeypatch, what):
    wanted = run(SAME[what](monkeypatch), tmp_path)
    assert run(SAME[what](monkeypatch), tmp_path) == wanted


@pytest.mark.slow
def test_another_batch_size_is_named_and_is_not_blamed_on_the_network(tmp_path):
    x, y = suite_run.images(12)
    asked = {"eps": 0.1, "progress": False, "folder": tmp_path}
    evaluate = partial(sj_robust.evaluate, classifier(), suite="fast", **asked)
    first = evaluate(x, y, batch_size=12)
    with pytest.raises(ValueError, match=r"evaluation \(batch sizes changed\)"):
        evaluate(x, y, batch_size=3)
    again = evaluate(x, y, batch_size=12)
    assert again.standing("clean") == first.standing("clean")


class Remembers(nn.Module):
    """Counts, keeps what it saw last, and remembers by shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(16, 3)
        self.calls = 0
        self.by_shape = {}
        self.owner = SimpleNamespace(net=[self], log=LOG)
        self.generator = torch.Generator()
        self.cached = functools.lru_cache(scaled(2.0))

    def forward(self, x_seq):
        x = x_seq.flatten(2)
        self.calls += 1
        self.seen = x.detach()
        ones = self.by_shape.setdefault(tuple(x.shape), torch.ones_like(x))
        LOG.debug("called")
        return self.last(x * ones)


def stages():
    torch.manual_seed(0)
    parts = (
        layer.Conv2d(1, 4, 3, padding=1),
        layer.BatchNorm2d(4),
        DLIFNode(T=T),
        layer.AvgPool2d(2, 2),
        layer.Flatten(),
        layer.Linear(16, 3),
    )
    net = nn.Sequential(*parts)
    functional.set_step_mode(net, "m")
    return net


def used(model):
    """After an evaluation, and a forward whose states and gradients are left."""
    run(model, None)
    x, _ = suite_run.images(5)
    model.eval()(x).sum().backward()
    return model


def fused(model):
    fuse(model.net)
    return model


def loaded(model):
    fresh = classifier(type(model.net)())
    fresh.load_state_dict(model.state_dict())
    return fresh


ALIKE = {
    "built again": lambda model: model,
    "used": used,
    "copied": deepcopy,
    "loaded": loaded,
    "in training mode": lambda model: model.train(),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Net, Remembers])
def test_the_same_network_goes_on(tmp_path, kind):
    """Whatever it has gone through before, in the folder of the first and the first in its own."""
    wanted = run(classifier(kind()), tmp_path / "first")
    for change, changed in ALIKE.items():
        found = run(changed(classifier(kind())), tmp_path / "first")
        assert found == wanted, change
        found = run(changed(classifier(kind())), tmp_path / change)
        assert found == wanted, change
        assert run(classifier(kind()), tmp_path / change) == wanted, change


@pytest.mark.slow
def test_a_used_network_with_stages_is_the_same_one(tmp_path):
    forms = [fused(classifier(stages())), used(fused(classifier(stages())))]
    for number, (one, other) in enumerate(itertools.product(forms, repeat=2)):
        assert run(one, tmp_path / str(number)) == run(other, tmp_path / str(number))


def test_a_network_that_draws_is_known_again(tmp_path):
    for encoder in (PoissonEncoder(), PoissonEncoder(torch.Generator())):
        folder = tmp_path / str(encoder.generator is None)
        run(classifier(encoder=encoder), folder, draws=2)
        torch.rand(3, generator=encoder.generator)
        run(classifier(encoder=encoder), folder, draws=2)


def test_a_folder_without_progress_belongs_to_nobody(tmp_path, data):
    network_key(classifier(), data, tmp_path)
    key = network_key(classifier(Net(turns=True)), data, tmp_path)
    assert key == network_key(classifier(Net(turns=True)), data, None)
    assert key != network_key(classifier(), data, None)


def test_logits_of_another_machine_may_differ_by_rounding(data):
    here = identify(classifier(), data)
    for factor, machine, same in (
        (1.0, here.machine, True),
        (1 + 1e-6, here.machine, False),
        (1 + 1e-6, "another", True),
        (1.01, "another", False),
    ):
        for name in ("logits", "gradients"):
            rows = scaled_rows(getattr(here.noise, name), factor)
            noise = replace(here.noise, **{name: rows})
            there = replace(here, noise=noise, machine=machine)
            assert (here.differences(there) == []) is same
        if not same and machine == "another":
            assert "and now of another" in here.differences(there)[0]


def scaled_rows(rows, factor):
    """Figures of another machine."""
    return (factor * torch.tensor(rows, dtype=torch.float64)).tolist()


@pytest.mark.slow
def test_another_process_knows_it_again(tmp_path, capsys):
    run_forms(tmp_path)
    here = capsys.readouterr().out
    code = (
        "import sys, torch; from pathlib import Path; from evaluation import test_identity; "
        "torch.set_num_threads(1); test_identity.run_forms(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    where = {"cwd": launch.ROOT / "tests", "env": launch.ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, check=True, **where)
    assert done.stdout == here
    assert len(here.splitlines()) == 3


def run_forms(folder):
    """What a process says of three networks, each with a folder of its own."""
    forms = {
        "plain": classifier(),
        "remembers": used(classifier(Remembers())),
        "stages": fused(classifier(stages())),
    }
    for name, net in forms.items():
        print(run(net, folder / name))
