"""Training that starts from the weights of another network."""

import math
import warnings
from pathlib import Path

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.host import functional
from sj_robust.models.build import NetworkSpec, build_encoder
from sj_robust.models.weights import Weights, as_named_in, check_keys, read_weights
from sj_robust.neuron import DLIFNode

__all__ = ["start_from"]


@torch.no_grad()
def start_from(
    classifier: SpikingClassifier, path: Path | str, *, decay_input: bool | None = None
) -> None:
    """Copy pretrained weights into a network; DLIF neurons start as the LIF neurons they were
    trained with.

    以预训练 LIF 网络的权重初始化 DLIF 网络。

    Equation: ``input_gain[t] = 1``, which is LIF with ``decay_input=False`` at the same tau, or ``1
    / tau`` for one with ``decay_input=True``: the logits are those of the pretrained network. Gains
    in the file are copied.

    Args:
        classifier: The network, changed in place; the tau of its LIF, IF and DLIF neurons must be
            that of the pretrained network. A warning says if the file states another number of time
            steps, or another kind of encoder: then the logits are others.
        path: ``best.pt`` of ``recipes/adv_train.py``, or a ``state_dict`` (.pt, .pth) of the bare
            network or its classifier, such as one of SpikingJelly's model zoo.
        decay_input: Whether the LIF neurons had ``decay_input=True``, SpikingJelly's default; a
            checkpoint of this package has False. None means True for neurons whose gains are all
            ``1 / tau``, as after ``replace_neurons`` has converted such LIF neurons, and False for
            all others.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If names or shapes differ (the message lists them); if the file states that the
            network had another tau, other channel statistics or PLIF neurons; or if the file is
            damaged.

    Source: the equivalences of ``sj_robust.replace_neurons``.

    Examples:
        >>> import tempfile
        >>> from sj_robust.models import build_classifier
        >>> lif, dlif = (build_classifier(NetworkSpec(neuron=name)) for name in ("lif", "dlif"))
        >>> file = Path(tempfile.mkdtemp()) / "lif.pt"
        >>> torch.save(lif.state_dict(), file)
        >>> start_from(dlif, file)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> bool(torch.allclose(dlif.eval()(images), lif.eval()(images)))
        True
    """
    path = Path(path)
    weights = read_weights(path)
    spec = _spec_of(weights, path)
    nodes = {
        name: module for name, module in classifier.named_modules() if isinstance(module, DLIFNode)
    }
    _check_neurons(weights, spec, classifier, nodes, decay_input=decay_input, path=path)
    whole = classifier.state_dict()
    tensors = as_named_in(classifier, weights.tensors)
    of_net = as_named_in(classifier.net, weights.tensors)
    bare = {f"net.{key}": value for key, value in of_net.items()}
    found_whole = whole.keys() & tensors.keys()
    found_bare = whole.keys() & bare.keys()
    if len(found_bare) > len(found_whole):
        # the file is of the bare network, which has no mean and std
        statistics = {key: whole[key] for key in ("mean", "std") if key in whole}
        tensors = bare | statistics
    for name, node in nodes.items():
        key = f"{name}.input_gain"
        if key not in tensors:
            tensors[key] = _gain_of_lif(node, decay_input)
    check_keys(
        tensors,
        whole,
        str(path),
        "build the network that the file was trained as (name, sizes, T, mean and std)",
    )
    for key in ("mean", "std"):
        if key in whole and not torch.allclose(whole[key], tensors[key].to(whole[key])):
            raise ValueError(
                f"{path} was trained with {key} {tensors[key].tolist()}, the network has "
                f"{whole[key].tolist()}; give it the same"
            )
    if spec is not None:
        _warn_of_others(spec, classifier, path)
    classifier.load_state_dict(tensors)
    functional.reset_net(classifier)


def _spec_of(weights: Weights, path: Path) -> NetworkSpec | None:
    """What a checkpoint of this package says of its network; None for another file."""
    if weights.network is None:
        return None
    try:
        return NetworkSpec(**weights.network)
    except TypeError as error:
        raise ValueError(
            f"{path} describes a network that this release does not know ({error}); update "
            "sj_robust, or save its state_dict alone"
        ) from error


def _gain_of_lif(node: DLIFNode, decay_input: bool | None) -> Tensor:
    """Input gain with which a DLIF neuron is the LIF neuron of its tau; see :func:`start_from` for
    ``decay_input``.
    """
    decayed = torch.full_like(node.input_gain, 1 / node.tau)
    if decay_input is None:
        decay_input = torch.equal(node.input_gain, decayed)
    if decay_input and not math.isinf(node.tau):
        return decayed
    return torch.ones_like(decayed)


def _check_neurons(
    weights: Weights,
    spec: NetworkSpec | None,
    classifier: SpikingClassifier,
    nodes: dict[str, DLIFNode],
    *,
    decay_input: bool | None,
    path: Path,
) -> None:
    """Raise ValueError if neurons cannot begin as the neurons of the file."""
    learned = [
        key for key in weights.tensors if key.endswith(".w") and weights.tensors[key].ndim == 0
    ]
    if nodes and learned:
        raise ValueError(
            f"{path} has PLIF neurons, each with its own tau ({learned[0]}), but DLIF "
            "neurons of a NetworkSpec share one; load it in your own function (network "
            "module:function), whose neurons are then converted"
        )
    if spec is None:
        return
    if nodes and decay_input:
        raise ValueError(
            f"{path} is a checkpoint of this package, whose LIF has decay_input=False; omit it"
        )
    if ":" in spec.name:  # neurons of the zoo, and one's own, have a tau that it does not state
        return
    neuron_of_file = "IF" if spec.neuron == "if" else f"tau {spec.tau:g}"
    tau = math.inf if spec.neuron == "if" else spec.tau
    found = map(_tau, classifier.modules())
    others = {other for other in found if other is not None} - {tau}
    if others:
        other = min(others)
        neuron_here = "IF neurons" if other == math.inf else f"{other:g}"
        remedy = 'neuron "if"' if tau == math.inf and not nodes else f"tau={tau:g}"
        raise ValueError(
            f"{path} was trained with {neuron_of_file}, the network has {neuron_here}; build it "
            f"with {remedy}"
        )


def _tau(module: nn.Module) -> float | None:
    """Time constant of a neuron that is described by it alone; None for any other module."""
    if isinstance(module, DLIFNode | neuron.LIFNode):
        return float(module.tau)
    return math.inf if isinstance(module, neuron.IFNode) else None


def _warn_of_others(spec: NetworkSpec, classifier: SpikingClassifier, path: Path) -> None:
    """Warn of what changes the logits and is no weight."""
    told = []
    T = getattr(classifier, "T", spec.T)  # which only the network may know
    if spec.T != T:
        told.append(f"T={spec.T}, the network has T={T}")
    if type(build_encoder(spec)) is not type(classifier.encoder):
        kind = type(classifier.encoder).__name__ if classifier.encoder else "no encoder"
        told.append(f"encoder {spec.encoder!r}, the network has {kind}")
    if told:
        warnings.warn(
            f"{path} was trained with {' and '.join(told)}: it does not start with the logits "
            "of the file; build it as the file was trained if this is not intended",
            stacklevel=4,  # behind the decorator of start_from
        )
