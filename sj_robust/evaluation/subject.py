"""The network that is evaluated: from a checkpoint, or from somebody's own function."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.models import NetworkSpec, build_network
from sj_robust.training.checkpoint import load_checkpoint

__all__ = ["Subject", "check_fits", "describe_network", "from_checkpoint", "from_function"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with what is known of it. 被评估的网络。

    Attributes:
        name: What the report calls it.
        model: Images in [0, 1] to logits.
        architecture: In a few words.
        options: Options it was trained with; empty if they are not known.
        spec: What its network was built from; None for somebody's own.

    Example:
        >>> Subject("mine", SpikingClassifier(nn.Flatten(), T=1), "nothing but a reshape").options
        {}
    """

    name: str
    model: nn.Module
    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    spec: NetworkSpec | None = None


def from_checkpoint(path: Path) -> Subject:
    """The network of a checkpoint that ``recipes/adv_train.py`` wrote. 从检查点读取网络。

    Args:
        path: The file; or a network's folder, whose ``best.pt`` is taken; or a run's folder with one network in it.

    Returns:
        The network, on the CPU, with its weights.

    Raises:
        FileNotFoundError: If there is no checkpoint; the message lists those nearby.
        ValueError: If the file is no checkpoint of a network, or the folder holds several networks.

    Example:
        >>> from_checkpoint(Path("nowhere.pt"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: nowhere.pt does not exist; give a checkpoint such as runs/NAME/NETWORK/best.pt
    """
    path = _checkpoint_file(path)
    content = load_checkpoint(path)
    try:
        description, state = content["description"], content["model"]
        spec = NetworkSpec(**description["network"])
        model = SpikingClassifier(build_network(spec), spec.T)
        model.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} holds no network that this release can build ({type(error).__name__}: {reason}); give a "
            "best.pt of recipes/adv_train.py, or your own network with --network module:function"
        ) from error
    size = f"channels {spec.channels}" if spec.name == "small" else f"hidden {spec.hidden}"
    name = path.parent.name if path.stem in ("best", "last") else path.stem
    architecture = f"{spec.name}, {spec.neuron}, T {spec.T}, tau {spec.tau:g}, {size}"
    return Subject(name, model.eval(), architecture, dict(description.get("options", {})), spec)


def from_function(
    text: str,
    *,
    T: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Subject:
    """Somebody's own SpikingJelly network. 载入用户自己的网络。

    Args:
        text: ``module:function`` or ``path/to/file.py:function``; the function takes nothing and returns the network
            with its weights loaded, bare or inside a ``SpikingClassifier``. Modules are looked for in the working
            folder first.
        T: Time steps, for a bare network.
        mean: Mean per channel that a bare network expects to be subtracted from images in [0, 1].
        std: Standard deviation per channel that it expects them to be divided by.

    Returns:
        The network.

    Raises:
        ModuleNotFoundError: If there is no such module.
        FileNotFoundError: If there is no such file.
        ValueError: If the text has no colon, there is no such function, it or its module fails, it returns no network,
            or ``T`` is missing.

    Example:
        >>> from_function("torch.nn:Flatten", T=4).model.T
        4
    """
    module_name, colon, function_name = text.rpartition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(f"network must be module:function, got {text!r}; such as mynet:build or mynet.py:build")
    function = getattr(_module(module_name), function_name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {function_name!r}; give module:function that builds a network")
    try:
        network = function()
    except Exception as error:  # somebody else's code raises anything
        raise ValueError(
            f"{text} failed ({_reason(error)}); it must return the network, its weights loaded, without arguments"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{text} must return a network (nn.Module), got {type(network).__name__}")
    if isinstance(network, SpikingClassifier):
        if T is not None or mean is not None or std is not None:
            raise ValueError(f"{text} returns a SpikingClassifier, which has its own T, mean and std; leave them out")
        return Subject(function_name, network.eval(), type(network.net).__name__)
    if T is None:
        raise ValueError(f"{text} returns a bare network ({type(network).__name__}): give its time steps with --T")
    model = SpikingClassifier(network, T, mean=mean, std=std)
    return Subject(function_name, model.eval(), type(network).__name__)


def describe_network(model: nn.Module) -> dict[str, Any]:
    """Time steps, size, and neuron and training surrogate of every spiking layer, as plain data. 描述网络。

    Args:
        model: The network.

    Returns:
        ``T``, ``parameters`` (their number) and ``layers`` (rows with ``layer``, ``neuron``, ``surrogate``).

    Example:
        >>> from sj_robust import DLIFNode
        >>> describe_network(SpikingClassifier(nn.Sequential(DLIFNode(T=2)), T=2))["layers"]
        [{'layer': 'net.0', 'neuron': 'DLIFNode', 'surrogate': 'PiecewiseQuadratic(alpha=1.0, spiking=True)'}]
    """
    layers = [
        {"layer": name, "neuron": type(module).__name__, "surrogate": " ".join(repr(module.surrogate_function).split())}
        for name, module in model.named_modules()
        if hasattr(module, "surrogate_function") and hasattr(module, "v_threshold")
    ]
    size = sum(parameter.numel() for parameter in model.parameters())
    return {"T": getattr(model, "T", None), "parameters": size, "layers": layers}


def check_fits(subject: Subject, images: Tensor, classes: int, dataset: str) -> None:
    """A network takes the images of a data set, knows its classes and can be attacked. 检查网络与数据是否匹配。

    Args:
        subject: The network.
        images: Images [N, C, H, W] of the data set, on the network's device; the first one is tried.
        classes: Number of classes of the data set.
        dataset: Name of the data set, for the message.

    Raises:
        ValueError: If they do not belong together, logits are not finite, or no gradient reaches the images.

    Example:
        >>> own = Subject("mine", nn.Flatten(), "a reshape")
        >>> check_fits(own, torch.rand(1, 1, 2, 2), classes=4, dataset="digits")
    """
    shape = tuple(images.shape[1:])
    if subject.spec is not None and tuple(subject.spec.image_shape) != shape:
        raise ValueError(
            f"{subject.name} takes images {tuple(subject.spec.image_shape)}, those of {dataset} are {shape}; leave "
            "--dataset out to take the one it was trained on"
        )
    image = images[:1].clone().requires_grad_()
    try:
        logits = subject.model(image)
    except Exception as error:  # somebody else's code raises anything
        low = sorted({str(weight.dtype) for weight in subject.model.parameters() if weight.dtype in _HALF})
        hint = f"; images are {images.dtype}, weights {low[0]}: return network.float(), or cast inside" if low else ""
        raise ValueError(
            f"{subject.name} does not take images {shape} of {dataset} ({_reason(error)}){hint}"
        ) from error
    if logits.shape[1] != classes:
        raise ValueError(f"{subject.name} tells {logits.shape[1]} classes apart, {dataset} has {classes}; give its own")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{subject.name} gives NaN or infinite logits: it has diverged; load other weights")
    if not logits.requires_grad or torch.autograd.grad(logits.sum(), image, allow_unused=True)[0] is None:
        raise ValueError(
            f"no gradient reaches the images of {subject.name}, so that attacks would be blind; leave no_grad and "
            "detach out of its forward"
        )


def _checkpoint_file(path: Path) -> Path:
    """The checkpoint that a path stands for."""
    if path.is_file():
        return path
    if not path.is_dir():
        near = _listed(path.parent)
        hint = (
            f"; in {path.parent} there are {near}" if near else "; give a checkpoint such as runs/NAME/NETWORK/best.pt"
        )
        raise FileNotFoundError(f"{path} does not exist{hint}")
    if (path / "best.pt").is_file():
        return path / "best.pt"
    found = sorted(path.glob("*/best.pt"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path} holds {len(found)} networks, give one of them: {', '.join(map(str, found))}")
    near = _listed(path)
    raise FileNotFoundError(f"no best.pt in {path}" + (f"; there are {near}" if near else "; is the run finished?"))


def _listed(folder: Path) -> str:
    """Checkpoints in a folder and those below it."""
    if not folder.is_dir():
        return ""
    patterns = ("*/best.pt", "*/*/best.pt", "*/*/*/best.pt", "*.pt")
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return ", ".join(map(str, found[:6]))


def _module(name: str) -> ModuleType:
    """A module by name or by file."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path.resolve()} does not exist; give module:function or file.py:function")
        specification = importlib.util.spec_from_file_location(path.stem, path)
        assert specification is not None  # a file that ends in .py has a loader
        assert specification.loader is not None  # as above
        module = importlib.util.module_from_spec(specification)
        sys.modules[path.stem] = module
        sys.path.insert(0, str(path.parent.resolve()))
        with _failures_named(name):
            specification.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path.cwd()))
    try:
        with _failures_named(name):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise ModuleNotFoundError(
            f"no module {name!r} in {Path.cwd()} or among the installed ones; give module:function or file.py:function"
        ) from error


@contextmanager
def _failures_named(name: str) -> Iterator[None]:
    """What a module of somebody else raises while it is imported, in one line; one that is missing keeps its error."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # it raises anything
        raise ValueError(f"{name} cannot be imported ({_reason(error)}); correct it and start again") from error


def _reason(error: Exception) -> str:
    """An error in one line, with the last place in somebody else's code that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_theirs(frame.filename)]
    place = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def _is_theirs(file: str) -> bool:
    """Whether a file of a traceback belongs to neither Python nor an installed package nor this one."""
    foreign = ("<", str(Path(__file__).parents[1]), str(Path(traceback.__file__).parent))
    return not file.startswith(foreign) and "site-packages" not in file
