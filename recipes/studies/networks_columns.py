"""What networks.py tries with every network: each column says "yes", in how far, or why not."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from tables import ROOT
from torch import Tensor, nn

from sj_robust import compare_potentials, evaluate, perturbation_gains, replace_neurons, verify
from sj_robust.attacks import ThreatModel, fgsm, flip_events, pgd, random_flips
from sj_robust.classifier import SpikingClassifier, SpikingEventClassifier
from sj_robust.evaluation import Member, worst_case
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.training import Objective

NETWORKS = ROOT / "tests" / "networks_as_written.py"
YES = "yes"


def outcome(column: Callable[[Any], str], row: Any) -> str:
    """What a column says, or the error in a line."""
    try:
        return column(row)
    except Exception as error:  # the page shows every one of them
        return f"no: {' '.join(str(error).split())}".replace(f"{NETWORKS}:", "")


def classifier_of(row: Any, net: nn.Module | None = None) -> SpikingClassifier:
    """The network as a user wraps it."""
    net = row.network() if net is None else net
    if row.frames:
        return SpikingEventClassifier(net, row.T).eval()
    return SpikingClassifier(net, row.T if row.given else None).eval()


def labelled(model: nn.Module, row: Any) -> tuple[Tensor, Tensor]:
    """Two images, and the classes that the network sees in them."""
    x = row.images()
    with torch.no_grad():
        return x, model(x).argmax(1)


def perturbed(x: Tensor, row: Any) -> Tensor:
    """Images close to x."""
    if row.frames:
        return random_flips(nn.Flatten(), x, torch.zeros(len(x)).long(), eps=20)
    generator = torch.Generator().manual_seed(2)
    return (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def attacked(row: Any) -> str:
    """A short attack."""
    model = classifier_of(row)
    x, y = labelled(model, row)
    threat = ThreatModel("L0", 2) if row.frames else ThreatModel("Linf", 0.03)
    attack = partial(pgd, eps=0.03, step_size=0.01, steps=2)
    if row.frames:
        attack = partial(flip_events, eps=2)
    worst_case(model, x, y, [Member("short", attack, threat=threat)], threat=threat)
    return YES


def compared(row: Any) -> str:
    """Statistics of every layer."""
    model = classifier_of(row)
    x = row.images()
    found = len(compare_potentials(model, x, perturbed(x, row)))
    neurons = sum(hasattr(module, "surrogate_function") for module in model.modules())
    return part(found, neurons, f"the decay of the other {neurons - found} neurons is not known")


def gains(row: Any) -> str:
    """Layers that the certificate covers."""
    x = row.images()
    found = perturbation_gains(
        classifier_of(row), x, x_perturbed=perturbed(x, row), max_iterations=10
    )
    failed = [layer for layer in found.layers if layer.not_covered is not None]
    why = f"{failed[0].name}: {failed[0].not_covered}" if failed else ""
    return part(len(found.layers) - len(failed), len(found.layers), why)


def proved(row: Any) -> str:
    """How many images intervals prove in a small ball."""
    model = classifier_of(row)
    x, y = labelled(model, row)
    eps = ThreatModel("L0", 1) if row.frames else 0.001
    found = verify(model, x, y, eps, method="ibp").verified
    return f"{sum(found)} of {len(found)}"


def left(row: Any) -> str:
    """Whether one image is still correct under a short suite of attacks."""
    model = classifier_of(row)
    x, y = labelled(model, row)
    asked: dict[str, Any] = {"eps": 0.03, "suite": "fast"}
    if row.frames:
        asked = {"eps": 1, "suite": "events"}
    report = evaluate(model, x[:1], y[:1], progress=False, **asked)
    return f"{report.worst_case.correct} of {report.worst_case.total}"


def replaced(row: Any) -> str:
    """DLIF in place of its neurons, with the same logits."""
    net = row.network()
    model = classifier_of(row, deepcopy(net))
    report = replace_neurons(net, row.T)
    x = row.images()
    with torch.no_grad():
        if not torch.allclose(classifier_of(row, net)(x), model(x), atol=1e-4):
            return "no: other logits"
    done = len(report.replaced)
    return part(done, done + len(report.skipped), next(iter(report.skipped.values()), ""))


def tuned(row: Any) -> str:
    """One step of adversarial training, as the recipe does it."""
    torch.manual_seed(0)
    spec = {"image_shape": row.shape, "T": row.T, "frames": row.frames, "classes": row.classes}
    model = build_classifier(NetworkSpec(name=f"{NETWORKS}:{row.build}", **spec))
    x, y = labelled(model.eval(), row)
    x_perturbed = perturbed(x, row) if row.frames else fgsm(model, x, y, eps=0.03)
    Objective(model.train())(x, y, x_perturbed).total.backward()
    reached = any(value.grad is not None for value in model.parameters())
    return YES if reached else "no: no gradient reaches its weights"


def part(done: int, of: int, why: str) -> str:
    """All of them, some or none."""
    if done == of > 0:
        return YES
    return f"{done} of {of}: {why}" if done else f"no: {why}"


COLUMNS: dict[str, Callable[[Any], str]] = {
    "takes": lambda row: str(classifier_of(row).find_convention(row.images())),
    "evaluate": attacked,
    "compare": compared,
    "gains": gains,
    "verify": lambda row: YES if proved(row) else "",
    "replace": replaced,
    "tune": tuned,
}
