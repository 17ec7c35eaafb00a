"""Certificates: what somebody else needs to check a proof without this package."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sj_robust.core.saved import whole_file
from sj_robust.core.threat import ThreatModel
from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.neurons import counts
from sj_robust.proofs.program import Operation, Program, Value

__all__ = ["Proof"]

Arrays = dict[str, np.ndarray[Any, Any]]

_FORMAT = "sj_robust certificate 1"
_RESHAPED = "flatten unflatten unsqueeze squeeze view reshape contiguous"
"""Operations that keep the order of elements."""


@dataclass(frozen=True)
class Proof:
    """What is proved, of which network as it was then.

    Attributes:
        eps: Radius in Linf.
        x: The images.
        y: Their labels.
        operations: Of the network, for a batch of two images.
        weights: By name.
        refusal: Why there is no certificate, if there is none.
    """

    eps: float
    x: Tensor
    y: Tensor
    operations: list[dict[str, Any]]
    weights: Arrays
    refusal: str = ""

    @classmethod
    def of(
        cls, program: Program, threat: ThreatModel, x: Tensor, y: Tensor, method: str
    ) -> "Proof":
        """What was proved of a program of two images."""
        weights: Arrays = {}
        operations: list[dict[str, Any]] = []
        refusal = ""
        if method == "mip":
            refusal = (
                'no certificates are known for method "mip", whose programs are not saved; use '
                'verify(..., method="joint")'
            )
        elif threat.norm != "Linf":
            refusal = "no certificates are known for events; there are for Linf"
        else:
            try:
                operations = _Written(weights).of(program)
            except NotImplementedError as error:
                refusal = str(error)
        images, labels = (one.detach().cpu().clone() for one in (x, y))
        return cls(threat.eps, images, labels, operations, weights, refusal)

    def save(self, path: str | Path, verified: Tensor) -> str:
        """See :meth:`Verification.save_certificate`."""
        if self.refusal:
            raise NotImplementedError(self.refusal)
        numbers = verified.nonzero().squeeze(1)
        claim = {
            "images": self.x[numbers].numpy(),
            "labels": self.y[numbers].numpy(),
            "numbers": numbers.numpy(),
        }
        network = _digest(self.operations, self.weights)
        header = {
            "format": _FORMAT,
            "eps": self.eps,
            "network": network,
            "claim": _digest([network, self.eps], claim),
            "operations": self.operations,
        }
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        arrays = {"header": text, **claim, **self.weights}
        with whole_file(Path(path)) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's allow_pickle
        return network


def _digest(text: Any, arrays: Arrays) -> str:
    """SHA-256 of what can be written as JSON, and of arrays by name; the checker, which imports
    nothing of this package, computes it in the same way.
    """
    found = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    for name in sorted(arrays):
        one = arrays[name]
        found.update(json.dumps([name, one.dtype.str, one.shape]).encode())
        found.update(np.ascontiguousarray(one).tobytes())
    return found.hexdigest()


class _Written:
    """Writes the operations of a program, each of which takes what the one before it gives.

    Args:
        weights: Where arrays go, by name.
    """

    def __init__(self, weights: Arrays) -> None:
        """Nothing is written yet."""
        self._weights = weights
        self._neurons: set[str] = set()

    def of(self, program: Program) -> list[dict[str, Any]]:
        """All of them.

        Raises:
            NotImplementedError: If a certificate has no such operation; it is named.
        """
        before = -1
        found: list[dict[str, Any]] = []
        for number, operation in enumerate(program.operations):
            values = operation.values
            if values != [Value(before)] or operation.args[:1] != (Value(before),):
                raise self._unknown(operation, "which takes more than the result before it")
            before = number
            found += self._one(operation)
        if program.output != Value(before):
            raise NotImplementedError("no certificates are known for a result that nothing takes")
        return found

    def _unknown(self, operation: Operation, why: str) -> NotImplementedError:
        func = operation.func
        name = func.type_name if isinstance(func, Neuron) else getattr(func, "__name__", func)
        return NotImplementedError(
            f"no certificates are known for {name} in or behind {operation.where or 'the input'}, "
            f"{why}; there are for convolution, linear, batch norm, average pooling, IF, LIF, PLIF "
            "and DLIF one after the other in step mode m, and a mean over time"
        )

    def _one(self, operation: Operation) -> list[dict[str, Any]]:
        func = operation.func
        if isinstance(func, Neuron):
            return [self._neuron(operation, func)]
        name = getattr(func, "__name__", "").strip("_")
        args, given = operation.args[1:], operation.kwargs
        shape = list(operation.shape)
        if name in _RESHAPED.split():
            return [{"op": "reshape", "shape": shape}]
        if name == "expand":
            return [{"op": "expand", "shape": shape}]
        if name in ("float", "clone") and not given:
            return []
        write = _WRITERS.get(name)
        try:
            found = None if write is None else write(self._kept, *args, **given)
        except TypeError:  # an argument that it does not know
            found = None
        if found is None:
            raise self._unknown(operation, "as it is called here")
        return [{"op": name, **found}]

    def _neuron(self, operation: Operation, neuron: Neuron) -> dict[str, Any]:
        module = neuron.module
        is_new = neuron.name not in self._neurons
        starts_at_rest = neuron.initial == (module.v_reset or 0.0)
        if counts(neuron) is not None or not (is_new and starts_at_rest):
            raise self._unknown(operation, "which counts, starts elsewhere or is called twice")
        if module.step_mode != "m":
            raise self._unknown(operation, "which runs in step mode s")
        self._neurons.add(neuron.name)
        charging = neuron.charging()
        gains = []
        for t in range(operation.shape[0]):
            gain = charging.gain_at(t, input_gain=True)
            gains.append(float(torch.as_tensor(gain).detach()))
        return {
            "op": "neuron",
            "decay": charging.decay_value,
            "gains": gains,
            "threshold": float(module.v_threshold),
            "rest": None if module.v_reset is None else float(module.v_reset),
        }

    def _kept(self, value: Tensor) -> str:
        """The name of a weight."""
        name = f"weight{len(self._weights)}"
        self._weights[name] = value.detach().cpu().numpy()
        return name


Keep = Callable[[Tensor], str]


def _pair(value: Any) -> list[int]:
    return [int(one) for one in (value if isinstance(value, tuple | list) else (value, value))]


def _conv2d(
    keep: Keep,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any] | None:
    if isinstance(padding, str) or groups != 1 or _pair(dilation) != [1, 1]:
        return None
    sizes = {"stride": _pair(stride), "padding": _pair(padding)}
    return _linear(keep, weight, bias) | sizes


def _linear(keep: Keep, weight: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
    if bias is None:
        bias = weight.new_zeros(len(weight))
    return {"weight": keep(weight), "bias": keep(bias)}


def _batch_norm(
    keep: Keep,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Any]:
    if weight is None:
        weight = torch.ones_like(mean)
    if bias is None:
        bias = torch.zeros_like(mean)
    parts = {"mean": mean, "variance": variance, "weight": weight, "bias": bias}
    return {"eps": eps, **{name: keep(part) for name, part in parts.items()}}


def _avg_pool2d(
    keep: Keep,
    size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> dict[str, Any] | None:
    if any(_pair(padding)) or ceil_mode or divisor is not None:
        return None
    return {"size": _pair(size), "stride": _pair(stride or size)}


def _mean(keep: Keep, dim: Any, keepdim: bool = False) -> dict[str, Any] | None:
    return None if dim not in (0, (0,), [0]) or keepdim else {}


_WRITERS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "avg_pool2d": _avg_pool2d,
    "mean": _mean,
}
