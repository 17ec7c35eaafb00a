"""Checks of what enters an attack, a proof or an evaluation, each error with rule, value and
remedy.
"""

import math
from numbers import Real

import torch
from torch import Tensor, nn

__all__ = [
    "check_count",
    "check_images",
    "check_labels",
    "check_logits",
    "check_model",
    "check_network",
    "check_size",
]


def check_images(x: Tensor) -> None:
    """Images are floating point, [N, ...], finite and in [0, 1].

    Args:
        x: The images.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If it has no batch dimension, or a value that is not finite or outside [0, 1].

    Source: threat model of Ding et al. (ICML 2024), section 5: images in [0, 1], normalised in the
        network.

    Examples:
        >>> check_images(torch.tensor([[0.0, 2.0]]))
        Traceback (most recent call last):
        ...
        ValueError: x must lie in [0, 1], got values from 0 to 2; scale it and normalise inside
        the model
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of images, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x must be floating point, got {x.dtype}; scale byte images with x.float() / 255"
        )
    if x.ndim < 2:
        raise ValueError(
            f"x must be a batch of images [N, ...], got shape {tuple(x.shape)}; add N with "
            "x.unsqueeze(0)"
        )
    if x.numel() == 0:
        return
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        raise ValueError(
            f"x must be finite, got {int((~finite).sum())} NaN or infinite values; mend the data"
        )
    low, high = (float(bound) for bound in torch.aminmax(x.detach()))
    if low < 0 or high > 1:
        raise ValueError(
            f"x must lie in [0, 1], got values from {low:.6g} to {high:.6g}; scale it and "
            "normalise inside the model"
        )


def check_labels(y: Tensor, x: Tensor) -> None:
    """Labels are int64 of shape [N], not negative, on the device of the images.

    Args:
        y: The labels.
        x: The images they belong to, [N, ...].

    Raises:
        TypeError: If ``y`` is not an int64 tensor.
        ValueError: If its shape or device does not fit ``x``, or a label is negative.

    Source: the convention of ``torch.nn.functional.cross_entropy`` for class indices.

    Examples:
        >>> check_labels(torch.tensor([1, 0]), torch.rand(2, 1, 4, 4))
    """
    if not isinstance(y, Tensor):
        raise TypeError(
            f"y must be a tensor of labels, got {type(y).__name__}; use torch.tensor(labels)"
        )
    if y.dtype != torch.int64:
        raise TypeError(
            f"y must be int64, got {y.dtype}; use y.long(), or y.argmax(1) of one-hot labels"
        )
    if y.shape != (x.shape[0],):
        raise ValueError(
            f"y must have shape [N] = [{x.shape[0]}] as x has, got {list(y.shape)}; give one "
            "label per image, and images [N, ...], samples first"
        )
    if y.device != x.device:
        raise ValueError(
            f"y must be on the device of x, {x.device}, got {y.device}; use y.to(x.device)"
        )
    if y.numel() and int(y.min()) < 0:
        raise ValueError(
            f"labels must be >= 0, got {int(y.min())}; number the classes from 0, leave other "
            "images out"
        )


def check_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Logits as float32 or float64, after a check that they are logits of the labels' images."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return a tensor of logits, got {type(logits).__name__}; "
            "wrap it in a function that returns the logits alone"
        )
    if not logits.is_floating_point():
        raise TypeError(
            f"logits must be floating point, got {logits.dtype}; return scores, not the prediction"
        )
    if logits.ndim != 2 or logits.shape[0] != y.shape[0]:
        raise ValueError(
            f"logits must be [N, classes] with N = {y.shape[0]}, got shape {tuple(logits.shape)}; "
            "average outputs over time first, as SpikingClassifier does"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "logits must be finite, got NaN or infinity; the network has diverged or overflows"
        )
    if y.numel() and int(y.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels must be < {logits.shape[1]}, the number of classes the model returns, got "
            f"{int(y.max())}; number the classes from 0, or build the network for as many as the "
            "data has"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def check_model(model: object) -> None:
    """The model can be called."""
    if not callable(model):
        raise TypeError(
            f"model must be a callable from images to logits, got {type(model).__name__}"
        )


def check_size(
    name: str, value: float, *, at_most: float = math.inf, positive: bool = False
) -> float:
    """A finite number that is not negative (or is positive), in the units of [0, 1] images."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}; use float({name})")
    size = float(value)
    if not math.isfinite(size) or size < 0 or (positive and size == 0):
        raise ValueError(f"{name} must be finite and {'> 0' if positive else '>= 0'}, got {size}")
    if size > at_most:
        raise ValueError(
            f"{name} must be <= {at_most:g}, since images lie in [0, 1], got {size:g}; write "
            f"{size:g} / 255 instead of {size:g}"
        )
    return size


def check_count(name: str, value: int, *, least: int = 1) -> None:
    """An integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def check_network(net: object) -> None:
    """Raise TypeError for what is no network, such as a class that was not called.
    检查参数是否为网络。

    Examples:
        >>> check_network(nn.ReLU)
        Traceback (most recent call last):
            ...
        TypeError: net must be a network (nn.Module), got the class ReLU; build it first,
        as in MyNet()
    """
    if not isinstance(net, nn.Module):
        kind = f"the class {net.__name__}" if isinstance(net, type) else type(net).__name__
        raise TypeError(
            f"net must be a network (nn.Module), got {kind}; build it first, as in MyNet()"
        )
