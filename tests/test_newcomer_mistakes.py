"""Mistakes of a newcomer, each made for real and answered with the rule, what was met and what to
do.
"""

import contextlib
import copy
import importlib
import io
import os
import re
import runpy
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from lab.command_line import run_recipe
from launch import unboxed
from torch import nn

from sj_robust import DLIFNode, MPPDMonitor, SpikingClassifier, replace_neurons
from sj_robust.attacks import fgsm, pgd
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.host import functional, layer, neuron, surrogate
from sj_robust.proofs.gains import perturbation_gains

ROOT = Path(__file__).parents[1]
T = 4
N = 8


def lif():
    return neuron.LIFNode(tau=2.0)


def network(node=None, step_mode="m"):
    """One hidden layer of spiking neurons for images of 8 x 8."""
    torch.manual_seed(0)
    spiking = DLIFNode(T=T) if node is None else node
    net = nn.Sequential(layer.Flatten(), layer.Linear(64, 16), spiking, layer.Linear(16, 10))
    functional.set_step_mode(net, step_mode)
    return net


def images(n=N):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def sequence(n=N, steps=T):
    return images(n).expand(steps, -1, -1, -1, -1)


def labels(n=N):
    return torch.arange(n) % 10


def classifier(node=None, T=T, **options):
    return SpikingClassifier(network(node), T=T, **options)


def attacked(model=None, x=None, y=None, **options):
    budget = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 2} | options
    x = images() if x is None else x
    return pgd(classifier() if model is None else model, x, labels() if y is None else y, **budget)


def one_after_the_other(net, *inputs):
    for x in inputs:
        net(x)


def trained_twice():
    net = network()
    for _ in range(2):
        net(sequence(steps=2)).sum().backward()


def never_in_step_mode_m():
    net = nn.Sequential(layer.Conv2d(1, 4, 3), layer.Flatten(), layer.Linear(144, 9), DLIFNode(T=T))
    SpikingClassifier(net, T=T)(images())


def closed_monitor():
    with MPPDMonitor(network()) as monitor:
        pass
    monitor.compare(sequence(), sequence())


def not_reset_between_runs():
    net = network(lif())
    monitor = MPPDMonitor(net)
    with monitor.clean():
        net(sequence())
    with monitor.perturbed():
        net(sequence())


def copied_after_a_step():
    net = network()
    net(sequence())
    copy.deepcopy(net)


def plain_layers():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), DLIFNode(T=T), nn.Flatten(), nn.Linear(144, 10))
    SpikingClassifier(net, T=T)(images())


def loaded(target, source):
    target.load_state_dict(source.state_dict())


def without_cuda(backend):
    with mock.patch.object(torch.version, "cuda", None):
        DLIFNode(T=T, backend=backend)


def recipe(what, before):
    """The command that ``what`` begins with, up to a comma, started as the command line does, in an
    empty folder.
    """
    name, *arguments = shlex.split(what.partition(",")[0])

    def do():
        before()
        sys.argv = [name, *arguments]
        run_recipe(importlib.import_module(name.removesuffix(".py")).main)

    return do


def nothing():
    """No file is there before."""


def without(package):
    """The start of a recipe where a package is not installed."""

    def do():
        with mock.patch.dict(sys.modules, {package: None}):
            for name in ("lab.command_line", "sj_robust.core.recipes_installed"):
                sys.modules.pop(name, None)
            runpy.run_path(str(ROOT / "recipes" / "adv_train.py"), run_name="adv_train")

    return do


def written(name, content):
    def write():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())

    return write


def foreign_checkpoint():
    torch.save({"state_dict": {}}, "theirs.pt")


def checkpoint_of_another_architecture():
    """A checkpoint whose weights are not those of the network it describes."""
    from dataclasses import asdict

    from sj_robust.models import NetworkSpec, build_classifier
    from sj_robust.training import save_checkpoint

    weights = build_classifier(NetworkSpec(channels=(4, 4))).state_dict()
    content = {"description": {"network": asdict(NetworkSpec(channels=(8, 8)))}, "model": weights}
    save_checkpoint(Path("best.pt"), content)


class Answer(NamedTuple):
    """A mistake; the class of the error or the exit code that answers it, and what the message
    has to name.
    """

    code: str
    name: str
    do: Callable[[], object]


STEPS = {
    "The network is not reset between two batches": Answer(
        "RuntimeError", "reset_net", lambda: one_after_the_other(network(), sequence(), sequence())
    ),
    "The network is not reset before a batch of another size": Answer(
        "RuntimeError",
        "reset_net",
        lambda: one_after_the_other(network(), sequence(steps=2), sequence(n=3, steps=2)),
    ),
    "A second backward pass reaches the previous sequence, since the network was not reset": Answer(
        "RuntimeError", "reset_net", trained_twice
    ),
    'A batch of images [N, C, H, W] goes into a network in step mode "m"': Answer(
        "RuntimeError", "step mode 'm'", lambda: network()(images())
    ),
    "A sequence has its samples first, [N, T, C, H, W]": Answer(
        "RuntimeError", "x.transpose(0, 1)", lambda: network()(sequence().transpose(0, 1))
    ),
    "A sequence is longer than the neurons' T": Answer(
        "RuntimeError", "T=6", lambda: network()(sequence(steps=6))
    ),
    'The layers were never put into step mode "m"': Answer(
        "ValueError", "T must", never_in_step_mode_m
    ),
    "A network that gets a sequence contains layers of plain torch": Answer(
        "RuntimeError", "spikingjelly.activation_based.layer", plain_layers
    ),
    "SpikingClassifier gets more time steps than its DLIF neurons have": Answer(
        "RuntimeError", "set_time_steps", lambda: classifier(T=8)(images())
    ),
    "SpikingClassifier gets fewer time steps than its DLIF neurons have": Answer(
        "UserWarning", "set_time_steps", lambda: classifier(T=2)
    ),
    "The network merges time and samples": Answer(
        "ValueError",
        "the network must",
        lambda: SpikingClassifier(nn.Sequential(network(), nn.Flatten(0, 1)), T=T)(images()),
    ),
}

SHAPES = {
    "One image without a batch dimension": Answer(
        "ValueError", "images must", lambda: classifier()(images()[0])
    ),
    "A sequence [T, N, C, H, W] goes into SpikingClassifier, which repeats images itself": Answer(
        "ValueError", "images must", lambda: classifier()(sequence())
    ),
    "Event frames come with time first": Answer(
        "ValueError", "frames must", lambda: SpikingEventClassifier(network(), T=T)(sequence())
    ),
    "Images are bytes": Answer(
        "TypeError", "images must", lambda: classifier()((images() * 255).byte())
    ),
    "Images are float64, as numpy makes them, and the weights float32": Answer(
        "ValueError", "images and network must", lambda: classifier()(images().double())
    ),
    "Only the network was converted to float16": Answer(
        "ValueError",
        "images and network must",
        lambda: SpikingClassifier(network().half(), T=T)(images()),
    ),
    "Only the network was moved to another device": Answer(
        "ValueError", "images and network must", lambda: classifier().to("meta")(images())
    ),
    "Only the images were moved to another device": Answer(
        "ValueError", "images and network must", lambda: classifier()(images().to("meta"))
    ),
    "mean and std have three channels, the images one": Answer(
        "ValueError",
        "mean and std must",
        lambda: classifier(mean=[0.5] * 3, std=[0.2] * 3)(images()),
    ),
    "A network that is already in a SpikingClassifier is wrapped again": Answer(
        "ValueError", "net must", lambda: SpikingClassifier(classifier(), T=T)
    ),
    "The network is wrapped in nn.DataParallel": Answer(
        "ValueError", "net must", lambda: SpikingClassifier(nn.DataParallel(network()), T=T)
    ),
}

ATTACKS = {
    "eps in units of 0 to 255": Answer("ValueError", "eps must", lambda: attacked(eps=8)),
    "step_size in units of 0 to 255": Answer(
        "ValueError", "step_size must", lambda: attacked(step_size=2)
    ),
    "Images from 0 to 255": Answer(
        "ValueError", "x must", lambda: attacked(x=torch.full((N, 1, 8, 8), 255.0))
    ),
    "Images are normalised before the attack": Answer(
        "ValueError", "x must", lambda: attacked(x=(torch.full((N, 1, 8, 8), 0.25) - 0.5) / 0.5)
    ),
    "Images are bytes in an attack": Answer(
        "TypeError", "x must", lambda: attacked(x=(images() * 255).byte())
    ),
    "An image contains NaN": Answer(
        "ValueError",
        "x must",
        lambda: attacked(x=images().masked_fill(images() == images().max(), torch.nan)),
    ),
    "Labels are one-hot": Answer(
        "TypeError", "y must", lambda: attacked(y=nn.functional.one_hot(labels(), 10).float())
    ),
    "Labels start at 1": Answer("ValueError", "y must", lambda: attacked(y=torch.full((N,), 10))),
    "There are fewer labels than images": Answer(
        "ValueError", "y must", lambda: attacked(y=labels(5))
    ),
    "The bare network, which is not reset between steps, is attacked": Answer(
        "RuntimeError", "SpikingClassifier", lambda: attacked(network(lif(), "s").train())
    ),
    'The bare network in step mode "m", whose outputs have a time dimension, is attacked': Answer(
        "ValueError", "logits must", lambda: attacked(network(lif()).train())
    ),
    "The model's forward runs under torch.no_grad": Answer(
        "RuntimeError", "no_grad", lambda: attacked(torch.no_grad()(classifier().forward))
    ),
    "The generator is a number": Answer(
        "TypeError",
        "generator must",
        lambda: fgsm(classifier(), images(), labels(), eps=0.1, generator=0),
    ),
}

NEURONS = {
    "The decay is given as tau": Answer("ValueError", "tau must", lambda: DLIFNode(T=T, tau=0.99)),
    "tau comes first, as in LIFNode": Answer("TypeError", "T must", lambda: DLIFNode(2.0)),
    "A surrogate class is given instead of an instance": Answer(
        "TypeError",
        "surrogate_function must",
        lambda: DLIFNode(T=T, surrogate_function=surrogate.ATan),
    ),
    "replace_neurons on a network without spiking neurons": Answer(
        "ValueError",
        "holds no SpikingJelly neuron",
        lambda: replace_neurons(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), T=T),
    ),
    "replace_neurons on a class": Answer(
        "TypeError", "net must", lambda: replace_neurons(neuron.LIFNode, T=T)
    ),
    "Backend cupy, with a torch built without CUDA": Answer(
        "RuntimeError", "backend='cupy'", lambda: without_cuda("cupy")
    ),
    "Backend triton, with a torch built without CUDA": Answer(
        "RuntimeError", "backend='triton'", lambda: without_cuda("triton")
    ),
    "A backend that does not exist": Answer(
        "ValueError", "backend must", lambda: DLIFNode(T=T, backend="cuda")
    ),
    "MPPDMonitor on a network without spiking neurons": Answer(
        "ValueError", "holds no SpikingJelly neuron", lambda: MPPDMonitor(nn.Linear(4, 4))
    ),
    "A monitor is used after it was closed": Answer("RuntimeError", "MPPDMonitor", closed_monitor),
    "compare gets inputs of different shapes": Answer(
        "ValueError",
        "x and x_perturbed must",
        lambda: MPPDMonitor(network()).compare(sequence(), sequence(3)),
    ),
    'compare on a network in step mode "s", which is called once': Answer(
        "ValueError",
        "forward=",
        lambda: MPPDMonitor(network(lif(), "s")).compare(images(), images()),
    ),
    "compare gets NaN": Answer(
        "ValueError",
        "x and x_perturbed must",
        lambda: MPPDMonitor(network()).compare(sequence(), sequence() / 0 * 0),
    ),
    "The network is not reset between the clean and the perturbed run": Answer(
        "RuntimeError", "reset_net", not_reset_between_runs
    ),
    "A certificate of a network without spiking neurons": Answer(
        "ValueError",
        "holds no SpikingJelly neuron",
        lambda: perturbation_gains(nn.Sequential(nn.Flatten(2), nn.Linear(64, 10)), images(), T=T),
    ),
    "A certificate of a bare network without its number of time steps": Answer(
        "ValueError", "T must", lambda: perturbation_gains(network(), images())
    ),
    "Weights for another number of time steps are loaded": Answer(
        "RuntimeError", "set_time_steps", lambda: loaded(network(), network(DLIFNode(T=8)))
    ),
    "Weights of a LIF network are loaded into its DLIF successor": Answer(
        "RuntimeError", "replace_neurons", lambda: loaded(network(), network(lif()))
    ),
    "A network is copied in the middle of training, before a reset": Answer(
        "RuntimeError", "reset_net", copied_after_a_step
    ),
}

RECIPES = {
    "adv_train.py --learning-rate 0.1": Answer("exit code 2", "--learning-rate", nothing),
    "adv_train.py --epochs three": Answer("exit code 2", "--epochs", nothing),
    "adv_train.py --epochs 0": Answer("exit code 2", "--epochs", nothing),
    "adv_train.py --config mine.yaml, with a key that does not exist": Answer(
        "exit code 2", "--learning-rate", written("mine.yaml", "learning_rate: 0.1\n")
    ),
    "adv_train.py --config mine.yaml, which does not exist": Answer(
        "exit code 2", "mine.yaml must", nothing
    ),
    "adv_train.py --dataset cifar": Answer("exit code 2", "--dataset", nothing),
    "adv_train.py --dataset fashion_mnist --data-root pictures, without the files": Answer(
        "exit code 1", "download=True", nothing
    ),
    "adv_train.py --dataset image_folder:pictures, which does not exist": Answer(
        "exit code 1", "train/CLASS", nothing
    ),
    "adv_train.py --eps 8 --no-reference": Answer("exit code 2", "eps must", nothing),
    "adv_train.py --model resnet18": Answer("exit code 2", "network must", nothing),
    "adv_train.py --resume, without a run to resume": Answer("exit code 1", "--output", nothing),
    "adv_train.py --output results, which holds other files": Answer(
        "exit code 1", "--output", written("results/notes.txt", "mine")
    ),
    "adv_train.py --output results, which is a file": Answer(
        "exit code 2", "--output", written("results", "mine")
    ),
    "evaluate.py, with nothing to evaluate": Answer("exit code 2", "--network", nothing),
    "evaluate.py best.pt, which does not exist": Answer("exit code 1", "does not exist", nothing),
    "evaluate.py best.pt, which is damaged": Answer(
        "exit code 2", "cannot be read", written("best.pt", "damaged")
    ),
    "evaluate.py theirs.pt, a checkpoint of another program": Answer(
        "exit code 2", "format mark", foreign_checkpoint
    ),
    "evaluate.py best.pt, whose weights are of another architecture": Answer(
        "exit code 2", "size mismatch", checkpoint_of_another_architecture
    ),
    "evaluate.py --eps 8/255 --T 4 --network mynet.py:build, which does not exist": Answer(
        "exit code 1", "does not exist", nothing
    ),
    "evaluate.py --eps 8/255 --network spikingjelly.activation_based.neuron:LIFNode, without its "
    "time steps": Answer("exit code 2", "T must", nothing),
    "evaluate.py --network torch.nn:Flatten --T 4 --eps 8": Answer(
        "exit code 2", "eps must", nothing
    ),
    "sweep.py --jobs 0": Answer("exit code 2", "--jobs", nothing),
    "sweep.py, with nothing to run": Answer("exit code 2", "--sweep", nothing),
}

MISTAKES = {
    "Time steps and the state between them": STEPS,
    "Shapes, types and devices": SHAPES,
    "Attacks": ATTACKS,
    "Neurons, monitor, certificate, weights": NEURONS,
    "Recipes": {
        what: before._replace(do=recipe(what, before.do)) for what, before in RECIPES.items()
    }
    | {
        "adv_train.py, without the extra 'recipes'": Answer(
            "exit code 1", "[recipes]", without("accelerate")
        )
    },
}
"""What is done, and what answers it."""


@contextlib.contextmanager
def kept():
    """An empty working folder; arguments, modules' paths and environment are as before
    afterwards.
    """
    ours = mock.patch.multiple(sys, argv=sys.argv, path=list(sys.path))
    with (
        tempfile.TemporaryDirectory() as empty,
        contextlib.chdir(empty),
        ours,
        mock.patch.dict(os.environ, COLUMNS="100"),
    ):
        yield Path(empty).resolve()


def answer(mistake):
    """What is raised or warned, or the exit code of a recipe; and the text that is shown, which may
    be notes.
    """
    out = io.StringIO()
    err = io.StringIO()
    raised = None
    printed = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with kept() as folder, printed[0], printed[1], warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mistake()
        except (Exception, SystemExit) as error:
            raised = error
    if isinstance(raised, SystemExit):
        code = f"exit code {raised.code if isinstance(raised.code, int) else 1}"
        text = err.getvalue() if isinstance(raised.code, int) else str(raised.code)
        if "error: " in text:
            text = text[text.rindex("error: ") :]
        elif "For full helptext" in text:  # the first part of tyro's
            untitled = re.sub(r"\A(╭.*╮\n|.*\n *-{5,} *\n)", "", text)  # in a box, or plain
            text = re.split("Argument helptext|For full helptext", unboxed(untitled))[0]
    elif raised is None:
        code = caught[0].category.__name__
        text = "; ".join(str(warning.message) for warning in caught)
    else:
        code = type(raised).__name__
        text = "\n".join((*getattr(raised, "__notes__", ()), "")) or str(raised)
        text = text.splitlines()[-1].strip() if text.startswith("Error(s) in loading") else text
    return code, text.strip().replace(f"{folder}/", "")


# What no message can catch, since it may be meant: what is done, and in the second paragraph what
# to do instead. The functions show that it is silent, and wrong.


def state_is_carried_over():
    """A LIF network is not reset in your own loop: SpikingJelly continues from the last potentials.

    Call `functional.reset_net(net)` before every batch, or wrap the network in a
    `SpikingClassifier`.
    """
    net = network(neuron.IFNode())
    x = sequence() * 4
    first, second = (net(x) for _ in range(2))
    return not torch.equal(first, second)


def images_count_as_time_steps():
    """Images [N, C, H, W] go into a LIF network in step mode "m": the samples count as time steps.

    Pass [T, N, C, H, W], or use a `SpikingClassifier`. The output's shape shows the mistake.
    """
    return network(lif())(images()).shape == (N, 1, 10)


def samples_first_go_through():
    """A sequence is [N, T, ...] and has no more samples than the neurons have time steps.

    Time comes first everywhere except in `SpikingEventClassifier`: use `x.transpose(0, 1)`.
    """
    return network()(sequence(n=3).transpose(0, 1)).shape == (3, 4, 10)


def gains_are_not_trained():
    """The optimizer is created before `replace_neurons` (or `set_time_steps`), and never sees the
    new gains.

    Replace the neurons first, then create the optimizer.
    """
    net = network(lif())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    replace_neurons(net, T=T)
    (group,) = optimizer.param_groups
    return id(net[2].input_gain) not in map(id, group["params"])


def bytes_scaled_by_nothing():
    """Images from 0 to 255 go into a forward pass, which does not check values; attacks and
    evaluations do.

    Scale them to [0, 1], and give mean and std to the `SpikingClassifier`.
    """
    return classifier()(images() * 255).shape == (N, 10)


SILENT = [
    state_is_carried_over,
    images_count_as_time_steps,
    samples_first_go_through,
    gains_are_not_trained,
    bytes_scaled_by_nothing,
]

ANSWERED = {}
for mistakes in MISTAKES.values():
    ANSWERED |= mistakes


@pytest.mark.parametrize("expected", ANSWERED.values(), ids=ANSWERED)
def test_a_mistake_is_answered_with_the_rule_and_a_remedy(expected):
    code, text = answer(expected.do)
    assert code == expected.code
    assert expected.name in " ".join(text.split())


@pytest.mark.parametrize("happens", SILENT)
def test_what_no_message_tells_is_still_silent(happens):
    with kept(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert happens()


def test_right_use_of_the_same_things_has_no_answer():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attacked()
        attacked(classifier(lif()))
        attacked(SpikingClassifier(network(lif(), "s"), T=T))
        net = network(lif(), "s")
        MPPDMonitor(net).compare(
            sequence(), sequence(), forward=lambda x: [net(step) for step in x]
        )
        copy.deepcopy(classifier()).eval()
        model = classifier()
        model(images()).sum()
        found = copy.deepcopy(model)(images())
        assert torch.equal(found, model(images()))
        loaded(network(), network())
        single = SpikingClassifier(network(lif(), "s"), T=1)
        assert MPPDMonitor(single).compare(images(), images())["net.2"].samples == N


def test_weights_without_gains_go_into_a_dlif_network_if_that_is_asked_for():
    net = network()
    missing, unexpected = net.load_state_dict({"1.weight": torch.full((16, 64), 0.5)}, strict=False)
    assert "2.input_gain" in missing
    assert not unexpected
    expected = torch.full((16, 64), 0.5)
    assert torch.equal(net[1].weight, expected)
    assert torch.equal(net[2].input_gain, torch.ones(T))


@pytest.mark.parametrize("takes", ["images", "sequence"])
def test_layers_that_never_meet_the_time_dimension_are_not_blamed(takes):
    own = takes == "images"
    wrapped = nn.Conv2d(1, 2, 3) if own else layer.SeqToANNContainer(nn.Conv2d(1, 2, 3))
    net = nn.Sequential(wrapped, layer.Flatten(), layer.Linear(5, 10), DLIFNode(T=T))
    functional.set_step_mode(net, "s" if own else "m")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        SpikingClassifier(net, T=T, takes=takes)(images())
    assert not getattr(caught.value, "__notes__", [])
