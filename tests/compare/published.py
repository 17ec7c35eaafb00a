"""The published code of the paper beside this package: neuron, networks, training steps, retraction
and attacks.

python tests/compare/published.py CHECKOUT [--rat CHECKOUT_OF_SNN_RAT] [--checkpoint DIGITS_NETWORK]

CHECKOUT is a clone of github.com/DingJianhao/stable-snn. Its modules are imported as they are and
run on the CPU, its training by its own ``main``, in float64, so that no spike next to the threshold
goes either way by rounding. Prints the tables of docs/compare/published_code.md, and ends with 1 if
something differs by more than rounding. Needs the extras ``compare`` and ``recipes``.
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import io
import math
import os
import sys
import tempfile
import types
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from sj_robust import DLIFNode
from sj_robust.attacks import apgd, fgsm, parse_eps, pgd, rfgsm
from sj_robust.core.host import neuron, surrogate
from sj_robust.data import CIFAR_STATISTICS, load_images
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import load_published_checkpoint, published_names
from sj_robust.training import Objective, retract_

T, IMAGES = 3, 2
STATISTICS = CIFAR_STATISTICS["cifar10"]
ROUNDING = 1e-9
"""Largest difference, relative to the largest value, that counts as rounding."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="clone of the published code")
    parser.add_argument(
        "--rat", type=Path, help="clone of the code of SNN-RAT, to compare its networks"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="network of adv_train.py for digits, to compare APGD on"
    )
    choice = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.dont_write_bytecode = True  # the checkouts stay as they are
    warnings.simplefilter("ignore")
    rows, few_steps = [], []
    with imported(
        choice.checkout, "models.layers", "models", "attack", "regularize", "main_train-v2"
    ) as code:
        with float64():
            rows += [*neurons(code), *networks(code, ("vgg5", "vgg11", "vgg13", "wrn16"))]
            for mode in ("Raw", "Gaussian", "AT_FGSM"):
                rows += training(code, mode)
            rows += [*retraction(code), *attacks(code)]
        if choice.checkpoint is not None:
            few_steps = list(apgd_beside(code, choice.checkpoint))
    if choice.rat is not None:
        with imported(choice.rat, "models.layers", "models") as code, float64():
            rows += networks(code, ("vgg5", "vgg11", "wideresnet16"))
    print("| of the published code | compared | difference |\n| --- | --- | ---: |")
    print(*(f"| {name} | {what} | {difference:.1g} |" for name, what, difference in rows), sep="\n")
    if few_steps:
        print("\n| APGD, left in % | theirs | here |\n| --- | ---: | ---: |")
        print(*few_steps, sep="\n")
    if wrong := [name for name, _, difference in rows if not difference <= ROUNDING]:
        sys.exit(f"more than rounding: {', '.join(wrong)}")


@contextlib.contextmanager
def imported(checkout, *names):
    """Modules of a checkout by name, as long as the context lasts."""
    before = set(sys.modules)
    sys.modules["cv2"] = types.SimpleNamespace(
        mean=None
    )  # imported there for a name that nothing uses
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
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(path[0]):
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
    assert theirs.abs().max() > 0
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def neurons(code):
    """Spikes and gradients of one layer for random currents, gains and widths of the surrogate."""
    here = {
        "DLIFSpike": lambda **options: DLIFNode(T, tau=100.0, **options),
        "LIFSpike": lambda **options: neuron.LIFNode(tau=100.0, decay_input=False, **options),
    }
    for name, build in here.items():
        spikes, slopes = ([], []), ([], [])  # of ours, of theirs
        for gama in (0.5, 1.0, 2.0):
            torch.manual_seed(0)
            x, weight, gains = torch.randn(T, 1000), torch.randn(T, 1000), 0.5 + torch.rand(T)
            theirs = getattr(code["models.layers"], name)(T, tau=0.99, gama=gama)
            ours = build(
                step_mode="m",
                v_reset=0.0,
                surrogate_function=surrogate.PiecewiseQuadratic(1 / gama),
            )
            for side, net in enumerate((ours, theirs)):
                for parameter in net.parameters():
                    parameter.data.copy_(gains)
                inputs = [x.clone().requires_grad_(), *net.parameters()]
                spikes[side].append(
                    net(inputs[0] if net is ours else inputs[0].flatten()).view(T, 1000)
                )
                slopes[side].extend(torch.autograd.grad((spikes[side][-1] * weight).sum(), inputs))
        yield f"`{name}`", "spikes, widths 0.5, 1, 2", apart(*spikes)
        yield f"`{name}`", "gradients of currents and gains", apart(*slopes)


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
    build = code["models"].VGG if name.startswith("vgg") else code["models"].WideResNet
    if not hasattr(
        code["models.layers"], "build_neuron_function"
    ):  # SNN-RAT, whose neurons are without leak
        return lively(build(name, T, 10, STATISTICS))
    node = code["models.layers"].build_neuron_function(
        type=kind, T=T, thresh=1.0, tau=0.99, gama=1.0
    )
    return lively(build(name, T=T, dt=1, num_classes=10, neuron_module=node, norm=STATISTICS))


def ours_of(net, tau=None):
    """The same network here, by way of a file; and their name of each of its parameters and
    buffers.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pth"
        torch.save(net.state_dict(), path)
        classifier, spec = load_published_checkpoint(
            path, mean=STATISTICS[0], std=STATISTICS[1], T=T, tau=tau
        )
    for kept, value in zip((classifier.mean, classifier.std), STATISTICS, strict=True):
        kept.data = torch.tensor(value)  # loading keeps 32 bits
    return classifier, published_names(classifier.net, spec.name)


@torch.no_grad()
def networks(code, names):
    """Logits in evaluation mode."""
    published = hasattr(code["models.layers"], "build_neuron_function")
    for name in names:
        for kind in (
            ("DLIFSpike", "LIFSpike") if published and name in ("vgg5", "wrn16") else ("DLIFSpike",)
        ):
            net = theirs_of(code, name, kind)
            x = torch.rand(IMAGES, 3, 32, 32)
            ours, _ = ours_of(net, None if published or name.startswith("vgg") else math.inf)
            yield (
                f"`{name}`, {kind if published else 'SNN-RAT'}",
                "logits",
                apart(ours(x), net(x).mean(0)),
            )


def training(code, mode):
    """One step by their ``main`` on a batch of random images, and the same step here on the images
    that it crafted.
    """
    script = code["main_train-v2"]
    torch.manual_seed(1)
    x, y = 0.1 + 0.8 * torch.rand(IMAGES, 3, 32, 32), torch.arange(IMAGES)
    seen, losses, made, grads = [], [], [], {}

    def build(**options):
        net = lively(code["models"].VGG(**options))
        made.extend([net, copy.deepcopy(net)])
        net.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
        return net

    def note(module, args, output):
        if isinstance(module, nn.CrossEntropyLoss):
            losses.append(output.detach())
        elif type(module).__name__ == "LyapunovFunction":
            losses.append(output[0].detach())

    def keep(optimizer, args, options):
        grads.update(
            {name: parameter.grad.clone() for name, parameter in made[0].named_parameters()}
        )

    script.args.training_mode = mode
    changes = {
        "cifar10": lambda: (TensorDataset(x, y), TensorDataset(x, y), STATISTICS),
        "device": torch.device("cpu"),
        "tqdm": lambda batches: batches,
        "get_logger": lambda file: types.SimpleNamespace(info=lambda text: None),
        "VGG": build,
    }
    handles = [register_module_forward_hook(note), register_optimizer_step_pre_hook(keep)]
    with (
        patch.multiple(script, **changes),
        patch.object(torch, "randperm", lambda n, **options: torch.arange(n)),
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        script.main()
    for handle in handles:
        handle.remove()
    classifier, names = ours_of(made[1])
    if mode == "AT_FGSM":
        _, start, _, crafted, _ = seen
        here = rfgsm(classifier, start, y, eps=4 / 255, noise_std=0.0, project=False)
        yield mode, "images after the step, from their start", apart(here, crafted)
    adversarial = None if mode == "Raw" else seen[-2]
    objective = Objective(classifier.train(), rho=0.0 if mode == "Raw" else 1.0)
    found = objective(x, y, adversarial)
    found.total.backward()
    theirs = losses[-3:] if adversarial is not None else losses
    ours = [found.clean, found.perturbed, found.mppd][: len(theirs)]
    what = "both cross entropies and MS-MPPD" if len(theirs) > 1 else "cross entropy"
    yield mode, what, apart(ours, theirs)
    ours = {
        names[key.removeprefix("net.")]: value.grad for key, value in classifier.named_parameters()
    }
    flat = [
        torch.cat([grad[name].flatten() for name in grads]) for grad in (ours, grads)
    ]  # of some, rounding alone
    yield mode, "gradients of all parameters", apart(*flat)
    after, ours = made[0].state_dict(), classifier.net.state_dict()
    buffers = [
        (key, name) for key, name in names.items() if name.endswith(("running_mean", "running_var"))
    ]
    kept = apart([ours[key] for key, _ in buffers], [after[name] for _, name in buffers])
    yield mode, "statistics of batch norm after the step", kept


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
        with patch.object(torch, "randperm", lambda n, **options: torch.arange(n)):
            retract_(classifier.net, 1e-2)
        ours, theirs = classifier.net.state_dict(), net.state_dict()
        pairs = [
            (ours[key], theirs[of])
            for key, of in names.items()
            if of.endswith((".weight", ".comb"))
        ]
        yield (
            f"`snn_rat_reg1`, `2` on `{name}`",
            "weights and mixing",
            apart(*zip(*pairs, strict=True)),
        )


def attacks(code):
    """Crafted images, from the image itself where theirs draws a start."""
    net = theirs_of(code, "vgg5")
    classifier, _ = ours_of(net)
    x = torch.rand(IMAGES, 3, 32, 32)
    y = classifier(x).argmax(1)
    published, eps = code["attack"], 8 / 255
    yield (
        "`FGSM`",
        "images, 8/255",
        apart(fgsm(classifier, x, y, eps=eps), crafted(published.FGSM, net, x, y, eps=eps)),
    )
    theirs = crafted(
        published.PGD, net, x, y, eps=eps, alpha=2.55 / 255, steps=7, random_start=False
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
    yield "`PGD`, 7 steps", "images, 8/255, from the image itself", apart(ours, theirs)


def crafted(kind, net, x, y, *, forward=lambda net, images, T: net(images).mean(0), **options):
    """Images of one of their attacks, set up as their main_test.py does."""
    attack = kind(net, forward_function=forward, T=T, **options)
    attack.targeted = attack._targeted = False
    return attack(x, y)


def apgd_beside(code, checkpoint):
    """What APGD of few steps leaves of a network, with their schedule and with this one."""
    subject = from_checkpoint(checkpoint)
    model, eps = subject.model, parse_eps(subject.options["eval_eps"] or subject.options["eps"])
    x, y = next(iter(DataLoader(load_images("digits").test, batch_size=1000)))
    for loss in ("ce", "dlr"):
        for steps in (10, 20, 100):
            theirs, ours = [], []
            for seed in range(3):
                options = {"eps": eps, "steps": steps, "loss": loss}
                forward = {"forward": lambda net, images, T: net(images)}
                theirs.append(
                    crafted(code["attack"].APGD, model, x, y, seed=seed, **forward, **options)
                )
                ours.append(
                    apgd(model, x, y, generator=torch.Generator().manual_seed(seed), **options)
                )
            left = [
                [100 * float((model(one).argmax(1) == y).double().mean()) for one in side]
                for side in (theirs, ours)
            ]
            shown = [
                f"{sum(one) / len(one):.1f} ({min(one):.1f} to {max(one):.1f})" for one in left
            ]
            yield f"| {loss}, {steps} steps | {' | '.join(shown)} |"


if __name__ == "__main__":
    main()
