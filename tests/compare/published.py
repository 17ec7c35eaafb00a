"""The published code of the paper beside this package: neuron, networks, training steps, retraction
and attacks.

python tests/compare/published.py CHECKOUT [--rat CHECKOUT_OF_SNN_RAT] [--checkpoint DIGITS_NETWORK]

CHECKOUT is a clone of github.com/DingJianhao/stable-snn. Its modules are imported as they are and
run on the CPU, its training by its own ``main``, in float64, so that no spike next to the threshold
goes either way by rounding. Prints the tables of docs/migrating.md, and ends with 1 if
something differs by more than rounding. Needs the extras ``compare`` and ``recipes``.
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import io
import itertools
import math
import os
import sys
import tempfile
import types
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from sj_robust import DLIFNode
from sj_robust.attacks import apgd, fgsm, pgd, rfgsm
from sj_robust.core.eps import parse_eps
from sj_robust.core.host import neuron, surrogate
from sj_robust.data import CIFAR_STATISTICS, load_images
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import load_published_checkpoint
from sj_robust.models.weights import published_names
from sj_robust.training import Objective, retract_

T = 3
IMAGES = 2
STATISTICS = CIFAR_STATISTICS["cifar10"]
ROUNDING = 1e-9
"""Largest difference, relative to the largest value, that counts as rounding."""


MODULES = ("models.layers", "models", "attack", "regularize", "main_train-v2")
"""Of the published code, which are compared."""


@dataclass(frozen=True)
class Row:
    """One comparison: a name of the published code, what was compared, how far apart it is."""

    name: str
    what: str
    difference: float

    def __str__(self):
        return f"| {self.name} | {self.what} | {self.difference:.1g} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="clone of the published code")
    parser.add_argument(
        "--rat",
        type=Path,
        help="clone of the code of SNN-RAT, to compare its networks",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="network of adv_train.py for digits, to compare APGD on",
    )
    choice = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.dont_write_bytecode = True  # the checkouts stay as they are
    warnings.simplefilter("ignore")
    rows = []
    few_steps = []
    with imported(choice.checkout, *MODULES) as code:
        with float64():
            rows += neurons(code)
            rows += networks(code, ("vgg5", "vgg11", "vgg13", "wrn16"))
            for mode in ("Raw", "Gaussian", "AT_FGSM"):
                rows += training(code, mode)
            rows += retraction(code)
            rows += attacks(code)
        if choice.checkpoint is not None:
            few_steps = list(apgd_beside(code, choice.checkpoint))
    if choice.rat is not None:
        with imported(choice.rat, "models.layers", "models") as code, float64():
            rows += networks(code, ("vgg5", "vgg11", "wideresnet16"))
    print("| of the published code | compared | difference |\n| --- | --- | ---: |")
    print(*rows, sep="\n")
    if few_steps:
        print("\n| APGD, left in % | theirs | here |\n| --- | ---: | ---: |")
        print(*few_steps, sep="\n")
    wrong = [row.name for row in rows if not row.difference <= ROUNDING]
    if wrong:
        sys.exit(f"more than rounding: {', '.join(wrong)}")


@contextlib.contextmanager
def imported(checkout, *names):
    """Modules of a checkout by name, as long as the context lasts."""
    before = set(sys.modules)
    # Imported there for a name that nothing uses.
    sys.modules["cv2"] = types.SimpleNamespace(mean=None)
    words = ["main", "-j", "0", "-T", str(T), "-bs", str(IMAGES), "-arch", "vgg5", "--epochs", "1"]
    path = [str(checkout.resolve()), *sys.path]
    with patch.object(sys, "path", path), patch.object(sys, "argv", words):
        found = {name: importlib.import_module(name) for name in names if "-" not in name}
        for name in set(names) - set(found):  # a script
            spec = importlib.util.spec_from_file_location("script", checkout / f"{name}.py")
            found[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
        yield found
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and file.startswith(path[0]):
                del sys.modules[name]


@contextlib.contextmanager
def float64():
    """Everything in float64; their spikes are made by ``Tensor.float``."""
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def apart(ours, theirs):
    """Largest difference of two tensors, or of two series of tensors, relative to the largest value
    of each.
    """
    if not torch.is_tensor(ours):
        return max(apart(*pair) for pair in zip(ours, theirs, strict=True))
    assert ours.shape == theirs.shape
    largest = theirs.detach().abs().max()
    assert largest > 0
    difference = (ours - theirs).detach().abs().max()
    return float(difference / largest)


class Layers:
    """Spikes and gradients of layers for the same currents and gains."""

    def __init__(self):
        self.spikes = []
        self.gradients = []

    def add(self, net, *, flat):
        """One more layer; theirs take the time steps side by side."""
        torch.manual_seed(0)
        x = torch.randn(T, 1000, requires_grad=True)
        weight = torch.randn(T, 1000)
        gains = 0.5 + torch.rand(T)
        for parameter in net.parameters():
            parameter.data.copy_(gains)
        spikes = net(x.flatten() if flat else x).view(T, 1000)
        self.spikes.append(spikes)
        self.gradients += torch.autograd.grad((spikes * weight).sum(), [x, *net.parameters()])


def neurons(code):
    """Spikes and gradients of one layer for random currents, gains and widths of the surrogate."""
    here = {
        "DLIFSpike": partial(DLIFNode, T=T, tau=100.0),
        "LIFSpike": partial(neuron.LIFNode, tau=100.0, decay_input=False),
    }
    for name, build in here.items():
        ours = Layers()
        theirs = Layers()
        for gama in (0.5, 1.0, 2.0):
            triangle = surrogate.PiecewiseQuadratic(1 / gama)
            node = build(step_mode="m", v_reset=0.0, surrogate_function=triangle)
            ours.add(node, flat=False)
            published = getattr(code["models.layers"], name)
            theirs.add(published(T, tau=0.99, gama=gama), flat=True)
        spikes = apart(ours.spikes, theirs.spikes)
        gradients = apart(ours.gradients, theirs.gradients)
        yield Row(f"`{name}`", "spikes, widths 0.5, 1, 2", spikes)
        yield Row(f"`{name}`", "gradients of currents and gains", gradients)


@torch.no_grad()
def lively(net, size=32):
    """A network of theirs with other gains, batch norms and mixing than at first, and spikes up to
    the last layer.
    """
    for name, parameter in net.named_parameters():
        if name.endswith((".p", ".comb")):
            parameter.copy_(0.5 + torch.rand_like(parameter))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(2.0)
            module.bias.uniform_(0, 1)
        if isinstance(module, nn.Linear):
            module.weight.mul_(3.0)
    net.train()(torch.rand(IMAGES, 3, size, size))
    return net.eval()


def theirs_of(code, name, kind="DLIFSpike"):
    torch.manual_seed(0)
    models = code["models"]
    build = models.VGG if name.startswith("vgg") else models.WideResNet
    if not is_published(code):  # SNN-RAT, whose neurons are without leak
        return lively(build(name, T, 10, STATISTICS))
    node = code["models.layers"].build_neuron_function(
        type=kind,
        T=T,
        thresh=1.0,
        tau=0.99,
        gama=1.0,
    )
    net = build(
        name,
        T=T,
        dt=1,
        num_classes=10,
        neuron_module=node,
        norm=STATISTICS,
    )
    return lively(net)


def is_published(code):
    """Whether it is the code of the paper, and not that of SNN-RAT."""
    return hasattr(code["models.layers"], "build_neuron_function")


def ours_of(net, tau=None):
    """The same network here, by way of a file; and their name of each of its parameters and
    buffers.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pth"
        torch.save(net.state_dict(), path)
        mean, std = STATISTICS
        classifier, _ = load_published_checkpoint(
            path,
            mean=mean,
            std=std,
            T=T,
            tau=tau,
        )
    classifier.mean.data = torch.tensor(mean)  # loading keeps 32 bits
    classifier.std.data = torch.tensor(std)
    return classifier, published_names(classifier.net, net.state_dict())


@torch.no_grad()
def networks(code, names):
    """Logits in evaluation mode."""
    for name in names:
        if is_published(code):
            yield logits_row(name, "DLIFSpike", theirs_of(code, name), tau=None)
            if name in ("vgg5", "wrn16"):
                yield logits_row(name, "LIFSpike", theirs_of(code, name, "LIFSpike"), tau=None)
        else:
            tau = None if name.startswith("vgg") else math.inf
            yield logits_row(name, "SNN-RAT", theirs_of(code, name), tau=tau)


def logits_row(name, kind, net, *, tau):
    x = torch.rand(IMAGES, 3, 32, 32)
    ours, _ = ours_of(net, tau)
    return Row(f"`{name}`, {kind}", "logits", apart(ours(x), net(x).mean(0)))


class Step:
    """One step by their ``main`` on a batch, and what it did."""

    def __init__(self, code, mode, x, y):
        self.code = code
        self.batch = TensorDataset(x, y)
        self.seen = []  # the images of every pass
        self.losses = []
        self.gradients = {}
        script = code["main_train-v2"]
        script.args.training_mode = mode
        changes = {
            "cifar10": lambda: (self.batch, self.batch, STATISTICS),
            "device": torch.device("cpu"),
            "tqdm": lambda batches: batches,
            "get_logger": lambda file: types.SimpleNamespace(info=lambda text: None),
            "VGG": self.build,
        }
        handles = [
            register_module_forward_hook(self.note_loss),
            register_optimizer_step_pre_hook(self.note_gradients),
        ]
        with (
            patch.multiple(script, **changes),
            patch.object(torch, "randperm", in_order),
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            script.main()
        for handle in handles:
            handle.remove()

    def build(self, **options):
        self.net = lively(self.code["models"].VGG(**options))
        self.start = copy.deepcopy(self.net)
        self.net.register_forward_pre_hook(self.note_images)
        return self.net

    def note_images(self, module, args):
        self.seen.append(args[0].detach().clone())

    def note_loss(self, module, args, output):
        if isinstance(module, nn.CrossEntropyLoss):
            self.losses.append(output.detach())
        elif type(module).__name__ == "LyapunovFunction":
            self.losses.append(output[0].detach())

    def note_gradients(self, optimizer, args, options):
        for name, parameter in self.net.named_parameters():
            self.gradients[name] = parameter.grad.clone()


def in_order(n, **options):
    """In place of a random permutation."""
    return torch.arange(n)


def training(code, mode):
    """One step by their ``main`` on a batch of random images, and the same step here on the images
    that it crafted.
    """
    torch.manual_seed(1)
    x = 0.1 + 0.8 * torch.rand(IMAGES, 3, 32, 32)
    y = torch.arange(IMAGES)
    step = Step(code, mode, x, y)
    classifier, names = ours_of(step.start)
    if mode == "AT_FGSM":
        _, start, _, crafted, _ = step.seen
        here = rfgsm(classifier, start, y, eps=4 / 255, noise_std=0.0, project=False)
        yield Row(mode, "images after the step, from their start", apart(here, crafted))
    if mode == "Raw":
        found = Objective(classifier.train(), rho=0.0)(x, y)
        compared = apart([found.clean], step.losses)
        yield Row(mode, "cross entropy", compared)
    else:
        found = Objective(classifier.train(), rho=1.0)(x, y, step.seen[-2])
        compared = apart([found.clean, found.perturbed, found.mppd], step.losses[-3:])
        yield Row(mode, "both cross entropies and MS-MPPD", compared)
    found.total.backward()
    ours = {}
    for key, value in classifier.named_parameters():
        ours[names[key.removeprefix("net.")]] = value.grad.flatten()
    # All in one, since of some there is rounding alone.
    gradients = torch.cat([ours[name] for name in step.gradients])
    wanted = torch.cat([gradient.flatten() for gradient in step.gradients.values()])
    yield Row(mode, "gradients of all parameters", apart(gradients, wanted))
    after = step.net.state_dict()
    kept = []
    kept_there = []
    for key, value in classifier.net.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            kept.append(value)
            kept_there.append(after[names[key]])
    yield Row(mode, "statistics of batch norm after the step", apart(kept, kept_there))


def retraction(code):
    """Weights after the retraction of SNN-RAT, of large layers the same rows, and mixing
    coefficients.
    """
    for name in ("vgg5", "wrn16"):
        net = theirs_of(code, name)
        classifier, names = ours_of(net)
        with patch.object(np.random, "permutation", np.arange):
            code["regularize"].snn_rat_reg1(net, 1e-2)
            code["regularize"].snn_rat_reg2(net)
        with patch.object(torch, "randperm", in_order):
            retract_(classifier.net, 1e-2)
        state = classifier.net.state_dict()
        ours = []
        theirs = []
        for key, there in names.items():
            if there.endswith((".weight", ".comb")):
                ours.append(state[key])
                theirs.append(net.state_dict()[there])
        yield Row(f"`snn_rat_reg1`, `2` on `{name}`", "weights and mixing", apart(ours, theirs))


def attacks(code):
    """Crafted images, from the image itself where theirs draws a start."""
    net = theirs_of(code, "vgg5")
    classifier, _ = ours_of(net)
    x = torch.rand(IMAGES, 3, 32, 32)
    y = classifier(x).argmax(1)
    published = code["attack"]
    eps = 8 / 255
    theirs = crafted(published.FGSM, net, x, y, eps=eps)
    ours = fgsm(classifier, x, y, eps=eps)
    yield Row("`FGSM`", "images, 8/255", apart(ours, theirs))
    theirs = crafted(
        published.PGD,
        net,
        x,
        y,
        eps=eps,
        alpha=2.55 / 255,
        steps=7,
        random_start=False,
    )
    ours = pgd(
        classifier,
        x,
        y,
        eps=eps,
        step_size=2.55 / 255,
        steps=7,
        random_start=False,
        keep_best=False,
    )
    yield Row("`PGD`, 7 steps", "images, 8/255, from the image itself", apart(ours, theirs))


def mean_over_time(net, images, T):
    return net(images).mean(0)


def as_it_is(net, images, T):
    return net(images)


def crafted(kind, net, x, y, *, forward=mean_over_time, **options):
    """Images of one of their attacks, set up as their main_test.py does."""
    attack = kind(net, forward_function=forward, T=T, **options)
    attack.targeted = False
    attack._targeted = False
    return attack(x, y)


def apgd_beside(code, checkpoint):
    """What APGD of few steps leaves of a network, with their schedule and with this one."""
    subject = from_checkpoint(checkpoint)
    model = subject.model
    eps = parse_eps(subject.options["eval_eps"] or subject.options["eps"])
    x, y = next(iter(DataLoader(load_images("digits").test, batch_size=1000)))
    for loss, steps in itertools.product(("ce", "dlr"), (10, 20, 100)):
        options = {"eps": eps, "steps": steps, "loss": loss}
        theirs = []
        ours = []
        for seed in range(3):
            there = crafted(
                code["attack"].APGD,
                model,
                x,
                y,
                seed=seed,
                forward=as_it_is,
                **options,
            )
            here = apgd(model, x, y, generator=torch.Generator().manual_seed(seed), **options)
            theirs.append(left(model, there, y))
            ours.append(left(model, here, y))
        yield f"| {loss}, {steps} steps | {spread(theirs)} | {spread(ours)} |"


def left(model, x, y):
    """Images still classified correctly, in per cent."""
    right = model(x).argmax(1) == y
    return 100 * float(right.double().mean())


def spread(shares):
    mean = sum(shares) / len(shares)
    return f"{mean:.1f} ({min(shares):.1f} to {max(shares):.1f})"


if __name__ == "__main__":
    main()
