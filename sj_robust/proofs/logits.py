"""Bounds of a whole network: of its logits, from one forward on bounds of its images."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.neuron.charging import Neuron, find_neurons, is_neuron
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.moves import EVENTS, Events
from sj_robust.proofs.opened import as_lif, has_steps, no_bounds, stepped
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.spiking import Interval

__all__ = ["bounded_logits", "bounded_neurons"]


def bounded_logits(
    model: SpikingClassifier, run: BoundedRun, images: Tensor, eps: float | Tensor | Events
) -> Bounds:
    """Bounds of the logits over the ball, from one forward of the classifier on bounds of its
    images. 输出的上下界。

    Args:
        model: A classifier in evaluation mode.
        run: Where what is found is kept; made from :func:`bounded_neurons`.
        images: Images in [0, 1].
        eps: Linf radius, or one of each image, broadcast; or what may happen to event frames.

    Raises:
        NotImplementedError: If something in the network has no bounds; it is named.
    """
    model.find_convention(images, again=False)  # before anything is replaced
    run.dtype = images.dtype
    exact = images.detach() if run.differentiable else images.detach().double()
    if isinstance(eps, EVENTS):
        box = eps.box(exact)
    else:
        lowest = (exact - eps).clamp(min=0)
        highest = (exact + eps).clamp(max=1)
        box = Interval(lowest, highest)
    entered: list[str] = []

    def enter(module: nn.Module, args: object, *, name: str) -> None:
        entered.append(name)

    hooks = []
    for name, module in model.net.named_modules():
        if name and not list(module.children()):
            hooks.append(module.register_forward_pre_hook(partial(enter, name=name)))
    try:
        with torch.enable_grad():
            leaf = run.leaf(box, 0)
            if isinstance(eps, EVENTS):
                leaf.changes = eps.changes(exact, summed=run.differentiable)
                run.changed = leaf.same()
            with run.replacing_neurons(model.net):
                logits = model(leaf)
            if not isinstance(logits, Bounds):
                raise NoBoundsError(
                    "an output that does not depend on the input, or lost its bounds"
                )
    except NoBoundsError as error:
        raise _unknown(str(error), model, entered) from error
    except (NotImplementedError, torch.cuda.OutOfMemoryError):
        raise
    except _FAILURES as error:
        if "allocate memory" in str(error):
            raise
        what = f"a forward that fails on bounds ({type(error).__name__}: {error})"
        raise _unknown(what, model, entered) from error
    finally:
        for hook in hooks:
            hook.remove()
    return logits


def _unknown(what: str, model: SpikingClassifier, entered: list[str]) -> NotImplementedError:
    """Of what there are no bounds, and where: in or behind the last module that was entered."""
    where = ""
    if entered:
        last = entered[-1]
        kind = type(model.net.get_submodule(last)).__name__
        where = f" in or behind {last} ({kind})"
    return NotImplementedError(f"no bounds are known for {what}{where}; there are for {_COVERED}")


def bounded_neurons(model: SpikingClassifier) -> dict[str, Neuron]:
    """The network's spiking layers by name. 网络的脉冲层。

    Raises:
        NotImplementedError: If there are no bounds of one of them, or of the encoder; it is named.
    """
    neurons: dict[str, Neuron] = {}
    others: dict[str, str] = {}
    parts = list(model.net.modules())
    if any(map(is_neuron, parts)) or not has_steps(model.net):
        neurons, others, _ = find_neurons(model.net, offers_decay=True)
    unbounded: dict[str, str] = {}
    for name, reason in others.items():
        module = model.net.get_submodule(name)
        lif = as_lif(name, module)
        if lif is not None:
            neurons[name] = lif
        elif not stepped(module):
            why = no_bounds(module) or reason
            unbounded[name] = f"{name} ({type(module).__name__}): {why}"
    for name, n in neurons.items():
        fault = _why_unbounded(n)
        if fault is not None:
            unbounded[name] = f"{name}{fault}"
    if model.encoder is not None:
        unbounded = {"": f"the encoder {type(model.encoder).__name__}"} | unbounded
    if unbounded:
        raise NotImplementedError(
            f"no bounds are known for {next(iter(unbounded.values()))}; there are for {_COVERED}"
        )
    return neurons


def _why_unbounded(n: Neuron) -> str | None:
    """Why a neuron has no bounds, to follow its name in a sentence; None if it has some."""
    if not (n.known or n.stated):
        return f", a {n.type_name}, which fires in its own way"
    if not n.spiking:
        return ", whose surrogate does not spike"
    if not n.charging().decay_value >= 0:
        return ", whose decay is negative: give it a tau of 1 or more"
    for key in ("v_threshold", "v_reset"):
        value = getattr(n.module, key)
        if value is None:
            continue
        if torch.as_tensor(value).numel() != 1 or not math.isfinite(value):
            return f", whose {key} is not one finite number"
    return None


_FAILURES = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)
"""What code raises that was not written for bounds, such as one that asks for a tensor's type."""

_COVERED = (
    "direct encoding or given frames, convolution, linear, batch, layer and group norm, pooling, "
    "sums, products, ReLU and other monotone functions, softmax, and IF, LIF, PLIF, DLIF, I-LIF or "
    "PSN neurons that spike"
)
