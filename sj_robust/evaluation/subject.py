"""The network to evaluate, from a checkpoint or a user's function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier, as_classifier
from sj_robust.core.checks import did_you_mean
from sj_robust.core.convention import checked_logits, kept_state
from sj_robust.core.environment import CODE_KEY
from sj_robust.evaluation.run.plain import Plain, plain_copy
from sj_robust.models import NetworkSpec, build_classifier, set_time_steps
from sj_robust.models.build import code_of
from sj_robust.models.checkpoint import load_checkpoint
from sj_robust.models.foreign import find_function, reason
from sj_robust.models.shipped import pretrained_file, pretrained_networks
from sj_robust.models.weights import as_named_in

__all__ = ["Subject", "check_fits", "describe_network", "from_checkpoint", "from_function"]

_COPIES = 3  # of one image: a batch that no other dimension is taken for
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to evaluate, with its description. 被评估的网络。

    Attributes:
        name: Name in the report.
        model: Images in [0, 1] to logits.
        architecture: Architecture in a few words.
        options: Options it was trained with; empty if they are not known.
        spec: Specification of the network; None for your own network.
        remarks: What a reader of its figures should know, for the warnings of the report.
        plain: A copy of the network, made before anything asks it; None if it cannot be copied.

    Examples:
        >>> Subject("mine", SpikingClassifier(nn.Flatten(), T=1), "nothing but a reshape").options
        {}
    """

    name: str
    model: nn.Module
    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    spec: NetworkSpec | None = None
    remarks: tuple[str, ...] = ()
    plain: Plain | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        plain, remark = plain_copy(self.model)
        object.__setattr__(self, "plain", plain)
        if remark and remark not in self.remarks:
            object.__setattr__(self, "remarks", (*self.remarks, remark))


def from_checkpoint(path: str | Path, T: int | None = None, *, trust_code: bool = False) -> Subject:
    """The network of a checkpoint that ``recipes/adv_train.py`` wrote. 从检查点读取网络。

    Args:
        path: The file; or a network's folder, whose ``best.pt`` is used; or a run's folder that
            contains one network; or the name of a network that comes with the package, see
            :func:`sj_robust.models.pretrained_networks`.
        T: Number of time steps to run it for, see :func:`sj_robust.models.set_time_steps`; None for
            the number it was trained with.
        trust_code: Whether a function of your own code that the checkpoint names
            (``module:function``) may be run to build the network. Whoever wrote the file chose the
            function and its arguments. A remark says if its code has changed since the training.

    Returns:
        The network, on the CPU, with its weights.

    Raises:
        FileNotFoundError: If there is no checkpoint; the message lists checkpoints nearby.
        ValueError: If the file is not a checkpoint of a network, the folder contains several
            networks, T is out of range, or the network is built by a function that is not trusted.

    Examples:
        >>> from_checkpoint("nowhere/best.pt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: nowhere/best.pt does not exist; give a checkpoint such as
        runs/NAME/NETWORK/best.pt
    """
    path = _checkpoint_file(Path(path))
    content = load_checkpoint(path)
    try:
        description, state = content["description"], content["model"]
        spec = NetworkSpec(**description["network"])
        if spec.is_own and not trust_code:
            raise ValueError(
                f"{path} names the function {spec.name} with options {spec.options}, which would "
                "be run to build its network; if you trust both, pass trust_code=True "
                "(--trust-code on the command line)"
            )
        changed = _changed_code(spec, description)
        model = build_classifier(spec)
        model.load_state_dict(as_named_in(model, state))
    except (KeyError, TypeError, RuntimeError) as error:
        cause = shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"{path} holds no network that this release can build ({type(error).__name__}: "
            f"{cause}); give a best.pt of recipes/adv_train.py, or your own network with "
            "--network module:function"
        ) from error
    if T is not None:
        set_time_steps(model, T)
        spec = replace(spec, T=T)
    name = path.parent.name if path.stem in ("best", "last") else path.stem
    options = dict(description.get("options", {}))
    return Subject(
        name=name,
        model=model.eval(),
        architecture=_in_words(spec),
        options=options,
        spec=spec,
        remarks=(*changed, *_unfinished(path, content)),
    )


def from_function(
    text: str,
    *,
    T: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Subject:
    """A SpikingJelly network of your own. 载入用户自己的网络。

    Args:
        text: ``module:function`` or ``path/to/file.py:function``; the function takes nothing and
            returns the network with its weights loaded, bare or inside a ``SpikingClassifier``.
            Modules are looked for in the working folder first.
        T: Time steps, for a bare network with spiking neurons; None if it repeats its images
            itself.
        mean: Mean per channel that a bare network expects to be subtracted from images in [0, 1].
        std: Standard deviation per channel that it expects them to be divided by.

    Raises:
        ModuleNotFoundError: If there is no such module.
        FileNotFoundError: If there is no such file.
        ValueError: If the text has no colon, there is no such function, it or its module fails, or
            it returns no network.

    Examples:
        >>> from_function("torch.nn:Flatten", T=4).model.T
        4
    """
    function = find_function(text)
    try:
        network = function()
    except Exception as error:  # foreign code raises anything
        raise ValueError(
            f"{text} failed ({reason(error)}); it must return the network, its weights loaded, "
            "without arguments"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{text} must return a network (nn.Module), got {type(network).__name__}; return an "
            "instance"
        )
    model = as_classifier(network, T, mean=mean, std=std)
    bare = network.net if isinstance(network, SpikingClassifier) else network
    return Subject(text.rpartition(":")[2], model.eval(), type(bare).__name__)


def describe_network(model: nn.Module) -> dict[str, Any]:
    """Time steps, size, and neuron and training surrogate of every spiking layer, as plain data.
    描述网络。

    Args:
        model: The network.

    Returns:
        ``T``, ``parameters`` (their number) and ``layers`` (rows with ``layer``, ``neuron``,
        ``surrogate``).

    Examples:
        >>> from sj_robust import DLIFNode
        >>> describe_network(SpikingClassifier(nn.Sequential(DLIFNode(T=2)), T=2))["layers"]
        [{'layer': 'net.0', 'neuron': 'DLIFNode',
        'surrogate': 'PiecewiseQuadratic(alpha=1.0, spiking=True)'}]
    """
    layers = []
    for name, module in model.named_modules():
        if hasattr(module, "surrogate_function") and hasattr(module, "v_threshold"):
            surrogate = " ".join(repr(module.surrogate_function).split())
            kind = type(module).__name__
            layers.append({"layer": name, "neuron": kind, "surrogate": surrogate})
    size = sum(parameter.numel() for parameter in model.parameters())
    return {"T": getattr(model, "T", None), "parameters": size, "layers": layers}


def check_fits(subject: Subject, images: Tensor, classes: int | None, dataset: str) -> int:
    """Check that a network accepts the images of a data set, has its classes and can be attacked.
    检查网络与数据是否匹配。

    Args:
        subject: The network.
        images: Images [N, C, H, W] or frames [N, T, C, H, W] of the data set, on the network's
            device; the first one is tried.
        classes: Number of classes of the data set; None if it is not known.
        dataset: Name of the data set, for the message.

    Returns:
        Number of classes that the network tells apart.

    Raises:
        ValueError: If they do not belong together, the network does not return logits [N, classes],
            they are not finite, or no gradient reaches the images.

    Examples:
        >>> own = Subject("mine", nn.Flatten(), "a reshape")
        >>> check_fits(own, torch.rand(1, 1, 2, 2), classes=4, dataset="digits")
        4
    """
    shape = tuple(images.shape[1:])
    spec = subject.spec
    if spec is not None:
        taken = tuple(spec.image_shape)
        kind = "images"
        if spec.frames:
            taken = (spec.T, *spec.image_shape)
            kind = "frames"
        if taken != shape:
            raise ValueError(
                f"{subject.name} takes {kind} {taken}, those of {dataset} are {shape}; omit "
                "--dataset to use the one it was trained on"
            )
    once = [1] * (images.ndim - 1)
    image = images[:1].repeat(_COPIES, *once).requires_grad_()
    kept: tuple[str, ...] = ()
    try:
        if not isinstance(subject.model, SpikingClassifier):  # which has looked for one
            kept = kept_state(subject.model, image, resets=False)
        outputs = subject.model(image)
    except Exception as error:  # foreign code raises anything
        dtypes = {weight.dtype for weight in subject.model.parameters()}
        low = sorted(str(dtype) for dtype in dtypes if dtype in _HALF)
        hint = ""
        if low:
            hint = (
                f"; images are {images.dtype}, weights {low[0]}: return network.float(), or cast "
                "inside"
            )
        raise ValueError(
            f"{subject.name} does not take images {shape} of {dataset} ({reason(error)}){hint}"
        ) from error
    if kept:
        raise ValueError(
            f"{subject.name} carries a state from one call to the next ({', '.join(kept)}), so its "
            "logits depend on earlier calls; reset it in its forward"
        )
    logits = checked_logits(outputs, _COPIES)
    if classes is not None and logits.shape[1] != classes:
        raise ValueError(
            f"{subject.name} distinguishes {logits.shape[1]} classes, {dataset} has {classes}; "
            "choose its own data set"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"{subject.name} gives NaN or infinite logits: it has diverged; load other weights"
        )
    if (
        not logits.requires_grad
        or torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] is None
    ):
        raise ValueError(
            f"no gradient reaches the images of {subject.name!r}, so attacks cannot work; remove "
            "no_grad and detach from its forward"
        )
    return int(logits.shape[1])


def _changed_code(spec: NetworkSpec, description: Mapping[str, Any]) -> tuple[str, ...]:
    """A remark if the network's own code is not that of its training, where that is known."""
    if not any(name.startswith(CODE_KEY) for name in description):
        return ()
    if all(description.get(name, digest) == digest for name, digest in code_of(spec).items()):
        return ()
    return (
        f"The code of {spec.name} has changed since the training: with these weights it may "
        "compute something else than the trained network. Evaluate with the code of the "
        "training, or train again.",
    )


def _unfinished(path: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    """A remark if the training that the checkpoint is of has stopped before its last epoch."""
    last = path.with_name("last.pt")
    run = path.absolute().parent.parent
    if (run / "report.json").is_file() or not last.is_file():
        return ()  # adv_train writes its report at the end
    if path != last:
        try:
            content = load_checkpoint(last)
        except ValueError:  # damaged, which is not this checkpoint's fault
            return ()
    epoch = content.get("epoch")
    epochs = content["description"].get("options", {}).get("epochs")
    if epoch is None or epochs is None or epoch >= epochs:
        return ()
    return (
        f"The training of {path.absolute().parent.name} is unfinished (epoch {epoch} of {epochs}): "
        "adv_train.py --resume continues it.",
    )


def _in_words(spec: NetworkSpec) -> str:
    """Architecture, neuron, time and what makes the size of a network."""
    sizes = {"small": f", channels {spec.channels}"}
    size = f", hidden {spec.hidden}" if spec.name.startswith("vgg") else sizes.get(spec.name, "")
    options = "".join(f", {key} {value}" for key, value in spec.options.items())
    tau = "" if spec.is_own else f", tau {spec.tau:g}"  # else its neurons have their own
    encoder = "" if spec.encoder == "direct" else f", encoder {spec.encoder}"
    encoder += "".join(f", {key} {value}" for key, value in spec.encoder_options.items())
    return f"{spec.name}, {spec.neuron}, T {spec.T}{tau}{size}{options}{encoder}"


def _checkpoint_file(path: Path) -> Path:
    """The checkpoint that a path stands for."""
    if path.is_file():
        return path
    if not path.exists() and path.as_posix() in pretrained_networks():
        return pretrained_file(path.as_posix())
    if not path.is_dir():
        near = _listed(path.parent)
        hint = (
            f"in {path.parent} there are {near}"
            if near
            else "give a checkpoint such as runs/NAME/NETWORK/best.pt"
        )
        hint += did_you_mean(path.as_posix(), pretrained_networks())
        raise FileNotFoundError(f"{path} does not exist; {hint}")
    found = sorted(path.glob("best.pt")) or sorted(path.glob("*/best.pt"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{path} holds {len(found)} networks, give one of them: {', '.join(map(str, found))}"
        )
    near = _listed(path)
    raise FileNotFoundError(
        f"no best.pt in {path}" + (f"; there are {near}" if near else "; is the run finished?")
    )


def _listed(folder: Path) -> str:
    """Checkpoints in a folder and those below it."""
    if not folder.is_dir():
        return ""
    found: list[Path] = []
    for pattern in ("*/best.pt", "*/*/best.pt", "*/*/*/best.pt", "*.pt"):
        found += sorted(folder.glob(pattern))
    return ", ".join(map(str, found[:6]))
