"""Checks of inputs; every error states rule, value and remedy."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "Channels",
    "check_channels",
    "check_choice",
    "check_classes",
    "check_count",
    "check_event_counts",
    "check_events",
    "check_function",
    "check_generator",
    "check_images",
    "check_inputs",
    "check_labels",
    "check_layers",
    "check_logits",
    "check_model",
    "check_network",
    "check_number",
    "check_number_of_channels",
    "check_samples",
    "check_seed",
    "check_size",
    "check_steps",
    "check_surrogate",
    "check_switch",
    "check_tau",
    "check_tensor",
    "check_text",
    "check_values",
    "did_you_mean",
    "is_checked",
    "is_compiled",
    "logits_of",
    "of_other_steps",
    "taken_for_checked",
]

Channels = float | Sequence[float] | Tensor | None
"""Numbers per channel of images; one for all of them; None where nothing is done."""

_Choice = TypeVar("_Choice", bound=str)
_LARGEST_SEED = 2**53 - 1
"""Numbers that are derived from it fit into the seed of a ``torch.Generator``."""
_CHECKED: ContextVar[bool] = ContextVar("checked", default=False)

_BINARY = "event frames of counts become binary with (frames > 0).float()"


_ROUNDED = 1e-4
"""How far rounding may take images in float32 out of [0, 1]."""


def check_images(x: Tensor) -> None:
    """Images are floating point, [N, ...], dense, finite and in [0, 1].

    Args:
        x: The images.

    Raises:
        TypeError: If ``x`` is not a dense floating-point tensor.
        ValueError: If it has no values, no batch dimension, or a value that is not finite or
            outside [0, 1].

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
        raise TypeError(
            f"x must be a tensor of images, got {type(x).__name__}; use torch.as_tensor(x)"
        )
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got layout {x.layout}; use x.to_dense()")
    if x.is_meta:
        raise ValueError("x must hold values, got a tensor on the device meta; load the images")
    if not x.is_floating_point():
        remedy = _BINARY if x.ndim == 5 else "scale byte images with x.float() / 255"
        raise TypeError(f"x must be floating point, got {x.dtype}; {remedy}")
    if x.ndim < 2:
        raise ValueError(
            f"x must be a batch of images [N, ...], got shape {tuple(x.shape)}; add N with "
            "x.unsqueeze(0)"
        )
    if x.numel() == 0:
        return
    _check_finite(x)
    low, high = (float(bound) for bound in torch.aminmax(x.detach()))
    if low < 0 or high > 1:
        found = f"from {low:.6g} to {high:.6g}"
        remedy = _BINARY if x.ndim == 5 else "scale it and normalise inside the model"
        rounded = max(_ROUNDED, 2 * torch.finfo(x.dtype).eps)
        if low >= -rounded and high <= 1 + rounded:
            found = f"from {low:.9g} to {high:.9g}"
            remedy = "interpolation may leave [0, 1] by rounding; use x.clamp(0, 1)"
        raise ValueError(f"x must lie in [0, 1], got values {found}; {remedy}")


def check_samples(x: Tensor) -> None:
    """Samples are images in [0, 1], or event frames [N, T, C, H, W], which may hold numbers of
    events.

    Args:
        x: The samples.

    Raises:
        TypeError: As :func:`check_images`.
        ValueError: As :func:`check_images`, or if a value of frames is not a number of events.

    Examples:
        >>> check_samples(torch.full((1, 3, 2, 4, 4), 2.0))
    """
    tensor = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
    if tensor and x.is_floating_point() and x.ndim == 5 and _outside(x):
        check_event_counts(x)
    else:
        check_images(x)


def _outside(x: Tensor) -> bool:
    """Whether a value is outside [0, 1], as no pixel of an image is."""
    return bool(((x < 0) | (x > 1)).any())


def _check_finite(x: Tensor) -> None:
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        raise ValueError(
            f"x must be finite, got {int((~finite).sum())} NaN or infinite values; "
            "remove or replace these values"
        )


def check_event_counts(x: Tensor) -> None:
    """Event frames are binary or hold numbers of events: integers >= 0.

    Args:
        x: The frames.

    Raises:
        ValueError: If a value is none.

    Examples:
        >>> check_event_counts(torch.tensor([0.0, 2.5]))
        Traceback (most recent call last):
        ...
        ValueError: x must be binary event frames (0 or 1) or numbers of events, got values from 0
        to 2.5; count the events of a frame, or take (x > 0).to(x.dtype)
    """
    _check_finite(x)
    if not bool(((x >= 0) & (x == x.round())).all()):
        low, high = (float(bound) for bound in torch.aminmax(x.detach()))
        raise ValueError(
            "x must be binary event frames (0 or 1) or numbers of events, got values from "
            f"{low:.6g} to {high:.6g}; count the events of a frame, or take (x > 0).to(x.dtype)"
        )


def check_events(x: Tensor, *, counts: bool) -> None:
    """Event frames are all 0 or 1, or with ``counts`` numbers of events.

    Args:
        x: The frames.
        counts: Whether they hold numbers of events.

    Raises:
        ValueError: If a value is none of these.

    Examples:
        >>> check_events(torch.tensor([0.0, 2.0]), counts=True)
        >>> check_events(torch.tensor([0.0, 2.0]), counts=False)
        Traceback (most recent call last):
        ...
        ValueError: x must be binary event frames (0 or 1), got values from 0 to 2; for numbers of
        events pass counts=True, or take (x > 0).to(x.dtype): the network must be trained on such
        frames
    """
    if counts:
        check_event_counts(x)
        return
    _check_finite(x)
    if not bool(((x == 0) | (x == 1)).all()):
        low, high = (float(bound) for bound in torch.aminmax(x.detach()))
        raise ValueError(
            f"x must be binary event frames (0 or 1), got values from {low:.6g} to {high:.6g}; "
            "for numbers of events pass counts=True, or take (x > 0).to(x.dtype): the network must "
            "be trained on such frames"
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
            f"y must hold labels >= 0, got {int(y.min())}; number the classes from 0, omit other "
            "images"
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
    if logits.shape[1] < 2:
        raise ValueError(
            f"the model must return at least 2 classes, got {logits.shape[1]}; return one logit "
            "per class"
        )
    is_finite = torch.isfinite(logits).all()
    if not bool(is_finite & (y < logits.shape[1]).all()):  # a GPU is waited for once
        check_classes(y, logits.shape[1])
        raise ValueError(
            "logits must be finite, got NaN or infinity; the network has diverged or overflows"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def logits_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Logits of a model as float32 or float64, checked unless :func:`is_checked`."""
    logits = model(x)
    if not is_checked():
        return check_logits(logits, y)
    return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def taken_for_checked() -> Iterator[None]:
    """Context in which attacks assume that images, labels and logits are checked: the caller has
    checked the images and checks the results. 其内不再重复检查。

    Every check waits for a GPU, and a gradient attack would make one per step.
    """
    token = _CHECKED.set(True)
    try:
        yield
    finally:
        _CHECKED.reset(token)


def is_checked() -> bool:
    """Whether images, labels and logits are taken for checked, see :func:`taken_for_checked`."""
    return _CHECKED.get()


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


def check_number(
    name: str,
    value: float | Tensor,
    *,
    above: float = -math.inf,
    most: float = math.inf,
    finite: bool = True,
    remedy: str = "",
) -> float:
    """A number ``above < value <= most``, or a tensor that holds one, as one of Python.

    Examples:
        >>> check_number("decay", 1.5, above=0.0, most=1.0)
        Traceback (most recent call last):
            ...
        ValueError: decay must be finite, > 0, <= 1, got 1.5
    """
    remedy = remedy and f"; {remedy}"
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"{name} must be a number, got {value!r}{remedy}")
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not above < number <= most or (finite and math.isinf(number)):
        limits = {
            "finite": finite,
            f"> {above:g}": above > -math.inf,
            f"<= {most:g}": most < math.inf,
        }
        rule = ", ".join(limit for limit, is_set in limits.items() if is_set)
        raise ValueError(f"{name} must be {rule or 'a number'}, got {number:g}{remedy}")
    return number


def check_tau(tau: float) -> float:
    """A time constant of a leak in steps, as a number of Python; infinite for none."""
    remedy = "the decay is 1 - 1 / tau, math.inf means no leak"
    if isinstance(tau, Real) and 0 < tau < 1:
        remedy = f"for a decay of {tau} pass tau={1 / (1 - tau):.6g}"
    return check_number("tau", tau, above=1.0, finite=False, remedy=remedy)


def check_count(name: str, value: int, *, least: int = 1, remedy: str = "") -> int:
    """An integer of at least ``least``, of Python or numpy, as one of Python."""
    remedy = remedy and f"; {remedy}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        got = type(value).__name__
        raise TypeError(f"{name} must be an integer, got {got}; give one >= {least}{remedy}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}{remedy}")
    return int(value)


def check_counts(*, least: int = 1, **counts: int) -> None:
    """:func:`check_count` of several numbers by their names."""
    for name, value in counts.items():
        check_count(name, value, least=least)


def check_seed(name: str, value: int) -> int:
    """An integer that seeds a generator, as one of Python."""
    seed = check_count(name, value, least=0)
    if seed > _LARGEST_SEED:
        raise ValueError(f"{name} must be < 2**53, got {seed}; give a smaller one")
    return seed


def check_choice(name: str, value: _Choice, choices: Iterable[_Choice]) -> _Choice:
    """One word of several; the message names those that are nearest to a wrong one.

    Examples:
        >>> check_choice("suite", "standrad", ["fast", "standard"])
        Traceback (most recent call last):
            ...
        ValueError: suite must be one of fast, standard, got 'standrad'; did you mean 'standard'?
    """
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}"
        )
    return value


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """End of a message with the words nearest to a wrong one; empty where none is near.

    Examples:
        >>> did_you_mean("standrad", ["paper", "standard"]), did_you_mean("x", ["paper"])
        ("; did you mean 'standard'?", '')
    """
    near = get_close_matches(str(value), list(choices), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_layers(layers: str | Iterable[str], *words: str) -> str | tuple[str, ...]:
    """One of the words, or the names of at least one layer; else ValueError. 检查层的选择。

    Examples:
        >>> check_layers(["net.2"], "last", "all")
        ('net.2',)
    """
    if isinstance(layers, str):
        if layers in words:
            return layers
        raise ValueError(
            f"layers must be {', '.join(map(repr, words))} or a list of names, got {layers!r}; for "
            f"one layer pass [{layers!r}]"
        )
    names = tuple(layers)
    if not names:
        raise ValueError("layers must name at least one layer, got none")
    return names


def check_text(name: str, value: str) -> None:
    """Check for a non-empty string."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} must be a non-empty string, got {value!r}; use a str")


def check_switch(name: str, value: bool) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_function(name: str, value: object) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"{name} must be a function or None, got {type(value).__name__}; give one such as print"
        )


def check_surrogate(function: object) -> None:
    """A surrogate of SpikingJelly or another function of ``h - v_threshold``, or None."""
    if isinstance(function, type):
        name = function.__name__
        raise TypeError(
            f"surrogate_function must be an instance, got the class {name}; write {name}()"
        )
    if function is not None and not callable(function):
        raise TypeError(
            f"surrogate_function must be a function of h - v_threshold, got {function!r}; pass a "
            "surrogate of SpikingJelly such as surrogate.ATan()"
        )


def check_generator(generator: object) -> None:
    """A generator of random numbers, or None for torch's global one."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; use "
            "torch.Generator().manual_seed(seed)"
        )


def check_steps(T: int | None) -> int | None:
    """A number of time steps, or None."""
    if isinstance(T, Tensor):
        raise TypeError(
            "T must be a number of time steps, got a tensor; name the arguments after the images"
        )
    return None if T is None else check_count("T", T)


def check_channels(
    name: str, value: Channels, *, positive: bool = False
) -> tuple[float, ...] | None:
    """One finite number per channel, as plain numbers: from a number, a sequence, a tensor or an
    array.

    Examples:
        >>> check_channels("mean", torch.tensor([0.5, 0.25])), check_channels("std", 1)
        ((0.5, 0.25), (1.0,))
    """
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes) or _holds_truth(value):
            raise TypeError("a text or a truth value")
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must hold one number per channel, got {value!r}; write a list such as "
            f"{name}=[0.5, 0.5, 0.5]"
        ) from error
    if numbers.numel() == 0 or numbers.numel() != max(numbers.shape, default=1):
        raise ValueError(
            f"{name} must hold one number per channel, got shape {list(numbers.shape)}; give one "
            "dimension of numbers"
        )
    plain = tuple(numbers.flatten().tolist())
    wrong = [one for one in plain if not math.isfinite(one) or (positive and one <= 0)]
    if wrong:
        kind = "finite and > 0" if positive else "finite"
        raise ValueError(
            f"{name} must be {kind} in every channel, got {wrong[0]}; omit {name} if images "
            "are not normalised"
        )
    return plain


def _holds_truth(value: object) -> bool:
    """Whether a value or one in it is True or False, of Python, numpy or torch."""
    if isinstance(value, list | tuple):
        return any(map(_holds_truth, value))
    kind = getattr(value, "dtype", type(value).__name__)
    return str(kind) in ("bool", "torch.bool")


def check_number_of_channels(images: Tensor, **numbers: tuple[float, ...] | None) -> None:
    """Numbers per channel are as many as the images [N, C, ...] have, or one for all of them."""
    for name, values in numbers.items():
        if values is not None and len(values) not in (1, images.shape[1]):
            raise ValueError(
                f"{name} must hold one number per channel, got {len(values)} for images of shape "
                f"{tuple(images.shape)}; give {images.shape[1]}"
            )


def check_tensor(name: str, values: Tensor) -> None:
    """A tensor."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(values).__name__}; use torch.as_tensor({name})"
        )


def check_inputs(x: Tensor, x_perturbed: Tensor | None = None) -> None:
    """Inputs of a classifier, [N, ...] and finite; perturbed ones of the same shape, if given."""
    for name, values in {"x": x, "x_perturbed": x if x_perturbed is None else x_perturbed}.items():
        check_tensor(name, values)
        if not values.is_floating_point():
            raise TypeError(
                f"{name} must be floating point, got {values.dtype}; scale bytes with "
                f"{name}.float() / 255"
            )
        if values.ndim < 2 or values.numel() == 0:
            raise ValueError(
                f"{name} must hold a sample, [N, ...], got shape {tuple(values.shape)}; add N "
                f"with {name}.unsqueeze(0)"
            )
        if values.shape != x.shape:
            raise ValueError(
                f"x and x_perturbed must have the same shape, got {tuple(x.shape)} and "
                f"{tuple(values.shape)}; perturb every sample"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} must be finite, got nan or inf; omit those samples")


def check_classes(y: Tensor, classes: int) -> None:
    """Labels are below the number of classes that a network tells apart."""
    if y.numel() and int(y.max()) >= classes:
        raise ValueError(
            f"y must hold labels < {classes}, the number of classes the model returns, got "
            f"{int(y.max())}; number the classes from 0, or build the network with as many "
            "classes as the data has"
        )


def check_network(net: object, name: str = "net") -> None:
    """Raise TypeError for what is not a network, such as a class that was not called; ``name`` is
    the argument's. 检查参数是否为网络。

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
            f"{name} must be a network (nn.Module), got {kind}; build it first, as in MyNet()"
        )


def check_values(net: nn.Module) -> None:
    """Raise ValueError for a network on torch's device ``meta``, which keeps no values.
    检查网络是否位于 meta 设备。

    Examples:
        >>> check_values(nn.Linear(2, 2, device="meta"))
        Traceback (most recent call last):
            ...
        ValueError: the network must hold values, got weight on the device meta; build it on another
        device, or call net.to_empty(device="cpu") and load its weights
    """
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if value.is_meta:
            raise ValueError(
                f"the network must hold values, got {name} on the device meta; build it on another "
                'device, or call net.to_empty(device="cpu") and load its weights'
            )


def is_compiled(network: nn.Module) -> bool:
    """Whether a network or a part of it is compiled, by ``torch.compile`` or in place. 是否已编译。

    Examples:
        >>> is_compiled(nn.Linear(2, 2)), is_compiled(torch.compile(nn.Linear(2, 2)))
        (False, True)
    """
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in network.modules()
    )


def of_other_steps(key: str, saved: int, T: int | None) -> str:
    """What is said of weights that a neuron with T time steps does not load.
    时间步数不符的权重。

    Examples:
        >>> of_other_steps("0.input_gain", 8, 4)[:55]
        '0.input_gain: the weights are those of T=8 time steps, '
    """
    return (
        f"{key}: the weights are those of T={saved} time steps, but this neuron has T={T}; build "
        f"it with T={saved}, load, and then call sj_robust.models.set_time_steps(net, {T})"
    )
