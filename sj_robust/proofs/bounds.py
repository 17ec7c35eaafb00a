"""Bounds of everything that a spiking network computes while its input moves within a box, rounding
included.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sj_robust.core.preserved import other_forward
from sj_robust.neuron.charging import Neuron

__all__ = [
    "BoundedRun",
    "Bounds",
    "LayerBounds",
    "NoBoundsError",
    "Pooling",
    "by_row",
    "charge_rounding",
    "gamma",
    "laid_out",
    "reset_rounding",
    "threshold_rounding",
]

Pooling = Callable[[Tensor], Tensor]
"""A max pooling."""

_UNIT = 2.0**-24
"""Largest relative error of one rounding to nearest in float32."""

_SMALLEST = 2.0**-126
"""Below it float32 may flush to zero: the error that one operation can add whatever its values
are.
"""

_LARGEST_ERROR = 2.0**76
"""No more is rounded off a sum whose terms are below 2**100, far from float32's largest number of
2**128.
"""

_SLACK = 1.000001
"""Covers float64's own rounding, which is smaller than float32's by 2**29."""


class NoBoundsError(NotImplementedError):
    """An operation of the network of which no bounds are known. 无法给出上下界的运算。"""


class Bounds(Tensor):
    """Every value that a float32 tensor of a network can have while the input moves: ``centre -+
    (radius + error)``.

    In exact arithmetic a value is within ``centre -+ radius``; what float32 computes is at most
    ``error`` away from that. All three are float64. ``centre`` is kept as a graph down to the
    leaves (the input, the outputs of spiking layers and of max poolings), of which it is an affine
    function. 张量所有可能取值的上下界。

    In a ``differentiable`` run, which is for training, bounds are ``unrounded``: nothing asks for
    ``error``, and centre and radius are in the precision of the input and keep their graph to the
    weights.

    Equation, for ``y = A x + b`` with n terms summed in any order, ``u = 2**-24`` and ``gamma = n u
    / (1 - n u)``::

        centre' = A centre + b
        radius' = |A| radius
        error'  = |A| (error + gamma (|centre| + radius + error)) + gamma |b|

    Convolution, linear, batch norm in evaluation mode, average pooling, sums and reshapes are such
    maps. Max pooling is monotone: bounds of its result are those of its input, pooled. Anything
    else raises :class:`NoBoundsError`.

    Args:
        centre: Middle of the values.
        radius: How far the exact value can be from it; broadcast.
        error: How far float32 can be from the exact value; broadcast, None for values that are
            exact.
        run: The run whose leaves ``centre`` depends on.

    Source: interval arithmetic; rounding as in Higham, "Accuracy and Stability of Numerical
        Algorithms" (2002), ch. 3.

    Examples:
        >>> x = Bounds(torch.tensor([[0.5]]).double(), torch.tensor([[0.25]]).double())
        >>> y = 2 * x + 1
        >>> float(y.centre), float(y.radius), 0 < float(y.error) < 1e-6
        (2.0, 0.5, True)
    """

    centre: Tensor
    radius: Tensor
    error: Tensor
    unrounded: bool
    run: "BoundedRun | None"
    family: list[weakref.ref[Tensor]]
    """This and the views that may share its memory: what is done in place to one of them changes
    all.
    """

    @staticmethod
    def __new__(
        cls,
        centre: Tensor,
        radius: Tensor,
        error: Tensor | None = None,
        run: "BoundedRun | None" = None,
    ) -> "Bounds":
        """Wrap the parts; see the class."""
        unrounded = run is not None and run.differentiable
        dtype = centre.dtype if unrounded else torch.float32 if run is None else run.dtype
        self: Bounds = Tensor._make_wrapper_subclass(
            cls, centre.shape, dtype=dtype, device=centre.device
        )
        self.centre, self.run, self.unrounded = centre, run, unrounded
        self.radius = radius.expand(centre.shape)
        self.family = [weakref.ref(self)]
        if unrounded:
            self.error = radius.new_zeros(())
        else:
            self.error = (
                torch.zeros_like(self.radius) if error is None else error.expand(centre.shape)
            )
        return self

    @property
    def lower(self) -> Tensor:
        """Smallest value that float32 can give."""
        if self.unrounded:
            return self.centre - self.radius
        return self.centre.detach() - self.radius - self.error

    @property
    def upper(self) -> Tensor:
        """Largest value that float32 can give."""
        if self.unrounded:
            return self.centre + self.radius
        return self.centre.detach() + self.radius + self.error

    def same(self) -> "Bounds":
        """These bounds as they are now, whatever is done in place to them later."""
        return Bounds(self.centre, self.radius, self.error, self.run)

    # torch lacks the type
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape alone: tensors of a network are large."""
        return f"Bounds({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Bounds of a function of bounds."""
        kwargs = dict(kwargs or {})
        args = (*args, *(kwargs.pop(key) for key in ("input", "tensors", "other") if key in kwargs))
        name = func.__name__.strip("_")
        in_place = func.__name__ == f"{name}_" or name in _IN_PLACE
        if func.__name__ == "__float__":
            raise NoBoundsError("float(x), a number that depends on the input")
        if kwargs.get("out") is not None or (
            in_place and _RULES.get(name) not in (_sum, _product, _negative)
        ):
            raise NoBoundsError(f"{func.__name__}, which writes into a tensor: write x = f(x)")
        try:
            with torch._C.DisableTorchFunctionSubclass():
                if in_place:
                    return _written(args[0], _RULES[name](func, *args, **kwargs), func.__name__)
                if name in _QUESTIONS:
                    return func(*args, **kwargs)
                if name in _SHAPES:
                    return _moved(func, args, kwargs)
                if name in _RULES:
                    return _RULES[name](func, *args, **kwargs)
        except TypeError as error:  # a rule does not know an argument, or the call is wrong
            raise NoBoundsError(f"the operation {name} as it is called here ({error})") from error
        raise NoBoundsError(f"the operation {name}")

    @classmethod
    # torch declares its default, which is a function
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What reaches torch's dispatcher came around the rules above."""
        raise NoBoundsError(f"the operation {func}")


@dataclass(frozen=True)
class _Leaf:
    """A tensor that bounds start from again: its centre is a variable of the graph."""

    centre: Tensor
    radius: Tensor
    batch_dim: int
    """Where the samples are; -1 if dimension 0 holds the time steps of all samples, first step
    first.
    """

    def by_sample(self, values: Tensor, samples: int) -> Tensor:
        """Values of the shape of the radius as rows, one per sample: [N, values]."""
        return by_row(values, samples, self.batch_dim).flatten(1)


def by_row(part: Tensor, rows: int, batch_dim: int) -> Tensor:
    """What the network lays out with its samples in ``batch_dim`` (see :class:`_Leaf`) as [N,
    *].
    """
    if batch_dim == -1:
        part = part.view(-1, rows, *part.shape[1:])
    return part.movedim(abs(batch_dim), 0)


def laid_out(part: Tensor, batch_dim: int) -> Tensor:
    """The inverse of :func:`by_row`."""
    part = part.movedim(0, abs(batch_dim))
    return part.flatten(0, 1) if batch_dim == -1 else part


@dataclass
class _Switch:
    """What a graph asks, which must not hold the run: the run holds the graph, and neither would
    ever be freed.
    """

    on: bool = False


class _Cut(torch.autograd.Function):
    """A leaf's centre: it passes its gradient on, unless its run asks for the map behind the leaves
    alone.
    """

    @staticmethod
    def forward(ctx: Any, centre: Tensor, cut: "_Switch") -> Tensor:
        """The centre."""
        ctx.cut = cut
        return centre.view_as(centre)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient, or none."""
        return None if ctx.cut.on else grads[0], None


@dataclass
class LayerBounds:
    """What the bounds say of one spiking layer, summed over the samples of a run.

    Attributes:
        undecided: Per time step, the number of spikes that may or may not be there; not counted in
            training.
        width: Per time step, the squared distance between the bounds of the charged potential;
            likewise.
        neurons: Neurons times samples.
        steps: Time steps that have run.
    """

    undecided: list[float] = field(default_factory=list)
    width: list[float] = field(default_factory=list)
    neurons: int = 0
    steps: int = 0


class BoundedRun:
    """One run of a network on bounds: its leaves, and what its spiking layers let through.

    Args:
        neurons: Neurons of known dynamics by name.
        samples: Number of samples in the run.
        differentiable: Whether the bounds are for training: in the precision of the input, without
            rounding, and with a graph to the weights, in which surrogates stand for the derivatives
            of both bounds of a spike. As with ``detach_reset``, the reset passes no gradient on.
    """

    dtype = torch.float32
    """Of the network; what float32 rounds covers float64 as well."""

    def __init__(
        self, neurons: dict[str, Neuron], samples: int, *, differentiable: bool = False
    ) -> None:
        """Nothing has run yet."""
        self.neurons, self.samples, self.differentiable = neurons, samples, differentiable
        self.cut = _Switch()
        self.leaves: list[_Leaf] = []
        self.layers = {name: LayerBounds() for name in neurons}
        self._potential: dict[str, tuple[Tensor, Tensor]] = {}

    def leaf(self, lower: Tensor, upper: Tensor, batch_dim: int) -> Bounds:
        """Bounds that start here, of values that are exact."""
        centre = (lower + upper) / 2
        if self.differentiable:
            centre = _Cut.apply(
                centre if centre.requires_grad else centre.requires_grad_(), self.cut
            )  # type: ignore[no-untyped-call]  # untyped in torch
            radius = (upper - lower) / 2
        else:
            radius = _SLACK * torch.maximum(upper - centre, centre - lower)
            centre.requires_grad_()
        self.leaves.append(_Leaf(centre, radius, batch_dim))
        return Bounds(centre, radius, run=self)

    @contextmanager
    def replacing_neurons(self) -> Iterator[None]:
        """Context in which the neurons give bounds of their spikes for bounds of their currents."""
        with ExitStack() as stack:
            for name, neuron in self.neurons.items():
                stack.enter_context(other_forward(neuron.module, self._spikes_of(name, neuron)))
            yield

    def lead(self, logits: Bounds, y: Tensor) -> Tensor:
        """Upper bound of what every class's logit is above the right one's, [N, classes]; the right
        one's own is 0.

        Equation, with w_k the gradient of ``centre_k`` on the leaves, which is that of an affine
        map::

            centre_k - centre_y + sum | w_k - w_y | radius + error_k + error_y
        """
        right = y.unsqueeze(1)
        gap = logits.centre - logits.centre.gather(1, right)
        weights, radius = self._last_map(logits.centre)
        order = y.argsort()
        labels, counts = torch.unique_consecutive(y[order], return_counts=True)
        parts = zip(labels, torch.split(radius[order], counts.tolist()), strict=True)
        spread = torch.cat([part @ (weights - weights[label]).abs().T for label, part in parts])[
            order.argsort()
        ]
        if logits.unrounded:
            return (gap + spread).scatter(1, right, 0.0)
        error = logits.error + logits.error.gather(1, right)
        return (gap.detach() + _SLACK * (spread + error)).scatter(1, right, 0.0)

    def _last_map(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The map from the leaves to the logits [classes, *], and the radius of the leaves [N, *].

        It is the same for every sample, so that one pass back gives it for as many classes as there
        are samples.
        """
        nothing = logits.new_zeros(logits.shape[1], 1), logits.new_zeros(self.samples, 1)
        if not logits.requires_grad:
            return nothing
        leaves = self._first_leaves(logits)
        centres = [leaf.centre for leaf in leaves]
        found: list[list[Tensor]] = [[] for _ in centres]
        self.cut.on = True
        for start in range(0, logits.shape[1], self.samples):
            number = min(self.samples, logits.shape[1] - start)
            asked = torch.zeros_like(logits)
            asked.diagonal(start)[:number] = 1.0
            grads = torch.autograd.grad(
                logits,
                centres,
                asked,
                retain_graph=True,
                create_graph=self.differentiable,
                allow_unused=True,
            )
            for rows, leaf, grad in zip(found, leaves, grads, strict=True):
                if grad is not None:
                    rows.append(leaf.by_sample(grad, self.samples)[:number])
        self.cut.on = False
        reached = [
            (torch.cat(rows), leaf) for rows, leaf in zip(found, leaves, strict=True) if rows
        ]
        if not reached:
            return nothing
        radii = [leaf.by_sample(leaf.radius, self.samples) for _, leaf in reached]
        return torch.cat([rows for rows, _ in reached], 1), torch.cat(radii, 1)

    def _first_leaves(self, logits: Tensor) -> list[_Leaf]:
        """The leaves that the graph of the logits meets first; in training others lie behind
        them.
        """
        ends, seen, todo = {leaf.centre.grad_fn for leaf in self.leaves}, set(), [logits.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [] if node in ends else [before for before, _ in node.next_functions]
        return [
            leaf
            for leaf in self.leaves
            if leaf.centre.grad_fn is None or leaf.centre.grad_fn in seen
        ]

    def _spikes_of(self, name: str, neuron: Neuron) -> Callable[..., Bounds]:
        def forward(x: Any, *args: Any, **kwargs: Any) -> Bounds:
            if not isinstance(x, Bounds):
                raise NoBoundsError(
                    f"the layer {name} got {type(x).__name__}, no bounds: something before it "
                    "lost them"
                )
            multi_step = neuron.module.step_mode == "m"
            if x.ndim <= multi_step or x.shape[int(multi_step)] != self.samples:
                raise NoBoundsError(
                    f"the layer {name} in step mode {neuron.module.step_mode!r} on "
                    f"{tuple(x.shape)} for {self.samples} samples, which must be [T, N, *] in "
                    "mode 'm' and [N, *] in mode 's'"
                )
            self._reached(x, int(multi_step), neuron, None)
            lower, upper = (
                (x.lower, x.upper) if multi_step else (x.lower.unsqueeze(0), x.upper.unsqueeze(0))
            )
            sure, possible = self.spikes(name, neuron, lower, upper)
            if not multi_step:
                sure, possible = sure[0], possible[0]
            self._passed(name, x, sure, possible)
            return self.leaf(sure, possible, int(multi_step))

        return forward

    def pool(self, x: Bounds, pooling: Pooling) -> Bounds:
        """Bounds of a max pooling, which start here."""
        if len(x) % self.samples:
            raise NoBoundsError(f"a max pooling of {tuple(x.shape)} for {self.samples} samples")
        batch_dim = 0 if len(x) == self.samples else -1
        self._reached(x, batch_dim, None, pooling)
        return self.leaf(pooling(x.lower), pooling(x.upper), batch_dim)

    def _reached(
        self, x: Bounds, batch_dim: int, neuron: Neuron | None, pooling: Pooling | None
    ) -> None:
        """An affine map ends here, at a spiking layer or a max pooling, from which the next leaf
        comes.
        """

    def _passed(self, name: str, current: Bounds, sure: Tensor, possible: Tensor) -> None:
        """A spiking layer has been called: bounds of what came in and of what goes out."""

    def potential(self, name: str) -> tuple[Tensor, Tensor]:
        """Bounds of a layer's potential after its last step so far."""
        return self._potential[name]

    def _decided(
        self,
        name: str,
        gain: float,
        h_lower: Tensor,
        h_upper: Tensor,
        error: Tensor,
        around: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bounds of a charged potential, whether it fires for sure, and whether it can; ``error``
        is within them.

        A potential of at least ``around[0]`` may fire, one of at least ``around[1]`` does.
        """
        return h_lower, h_upper, h_lower >= around[1], h_upper >= around[0]

    def spikes(
        self, name: str, neuron: Neuron, lower: Tensor, upper: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whether each neuron fires for sure, and whether it can, [T, N, *] as numbers, for bounds
        of its current in the next T steps.
        """
        charging, module, layer = neuron.charging(), neuron.module, self.layers[name]
        decay = charging.decay if self.differentiable else charging.decay_value
        reset = module.v_reset
        rest = 0.0 if reset is None else float(reset)
        threshold = float(module.v_threshold)
        if name not in self._potential and bool((torch.as_tensor(module.v) != rest).any()):
            raise NoBoundsError(
                f"the layer {name}, whose v_reset was changed after it was built: give it "
                "v_reset then"
            )
        unit = 0.0 if self.differentiable else threshold_rounding(threshold)
        above, below = threshold + unit, threshold - unit
        v_lower, v_upper = self._potential.get(
            name, (torch.full_like(lower[0], rest), torch.full_like(upper[0], rest))
        )
        layer.neurons = lower[0].numel()
        sure_seq, possible_seq = [], []
        for x_lower, x_upper in zip(lower, upper, strict=True):
            gain = charging.gain_at(layer.steps, input_gain=True)
            number = float(torch.as_tensor(gain).detach())
            ends = (
                (gain * x_lower, gain * x_upper)
                if self.differentiable
                else (number * x_lower, number * x_upper)
            )
            low, high = ends if number >= 0 else ends[::-1]
            h_lower, h_upper = (decay * v + end for v, end in ((v_lower, low), (v_upper, high)))
            if rest:
                h_lower, h_upper = h_lower + (1.0 - decay) * rest, h_upper + (1.0 - decay) * rest
            if self.differentiable:
                flags = [
                    torch.ge(h.detach(), threshold, out=torch.empty_like(h))
                    for h in (h_lower, h_upper)
                ]
            else:
                size = _larger(v_lower, v_upper) + _larger(low, high) + abs(rest)
                error = _within_float32(charge_rounding(size))
                h_lower, h_upper, *flags = self._decided(
                    name, number, h_lower - error, h_upper + error, error, (below, above)
                )
            # Numbers in place of booleans: masks and their gradients are products, which take a
            # tenth of the time.
            sure, possible = (flag.to(lower.dtype) for flag in flags)
            undecided = possible - sure
            layer.steps += 1
            if reset is None:
                fired, silent = (
                    (h_lower - threshold, h_upper - threshold),
                    (h_lower, h_upper.clamp(max=above)),
                )
                either = h_lower.clamp(max=below - threshold), torch.maximum(silent[1], fired[1])
                v_lower, v_upper = (
                    sure * fired[end] + undecided * either[end] + (1 - possible) * silent[end]
                    for end in (0, 1)
                )
            else:
                lowered = torch.maximum(sure, possible * (h_lower.detach() > rest))
                v_lower, v_upper = (
                    h_lower * (1 - lowered),
                    h_upper * (1 - possible) + max(above, rest) * undecided,
                )
                if rest:
                    v_lower, v_upper = v_lower + rest * lowered, v_upper + rest * sure
            if self.differentiable:
                spike = neuron.surrogate.spike
                sure_seq.append(spike(h_lower - threshold))
                possible_seq.append(spike(h_upper - threshold))
                continue
            layer.undecided.append(float(undecided.sum()))
            layer.width.append(float((h_upper - h_lower).square().sum()))
            error = reset_rounding(_larger(h_lower, h_upper), rest, threshold)
            v_lower, v_upper = v_lower - error, v_upper + error
            sure_seq.append(sure)
            possible_seq.append(possible)
        self._potential[name] = v_lower, v_upper
        return torch.stack(sure_seq), torch.stack(possible_seq)


def gamma(terms: int) -> float:
    """Relative error of a float32 sum of so many products, in any order."""
    return _SLACK * terms * _UNIT / (1.0 - terms * _UNIT)


def charge_rounding(size: Any) -> Any:
    """How far float32's charged potential can be from the exact one, for terms that sum up to
    ``size`` in absolute value.
    """
    return gamma(16) * size + 16 * _SMALLEST


def threshold_rounding(threshold: float) -> float:
    """How far float32's threshold can be from the exact one."""
    return _UNIT * abs(threshold)


def reset_rounding(size: Any, rest: float, threshold: float) -> Any:
    """How far float32's potential after the reset can be from the exact one, for potentials up to
    ``size``.
    """
    return gamma(4) * (size + abs(rest) + abs(threshold)) + 4 * _SMALLEST


def _within_float32(error: Tensor) -> Tensor:
    """An error that is at least 2**-24 of all that was summed, if that is finite in float32."""
    if error.numel() and not float(error.amax()) <= _LARGEST_ERROR:
        raise NoBoundsError("values that are not finite, or may be beyond 1e30")
    return error


def _larger(lower: Tensor, upper: Tensor) -> Tensor:
    """Largest absolute value between bounds."""
    return torch.maximum(lower.abs(), upper.abs())


def _written(x: Any, result: Bounds, name: str) -> Bounds:
    """``x`` with the parts of a result, so that all who hold it see them."""
    if (
        not isinstance(x, Bounds)
        or x.shape != result.shape
        or any(r() is not None and r() is not x for r in x.family)
    ):
        raise NoBoundsError(
            f"{name} on a view, on what has one, or on a constant: write x = x + y instead of x "
            "+= y"
        )
    x.centre, x.radius, x.error = result.centre, result.radius, result.error
    return x


def _moved(func: Any, args: Any, kwargs: Any) -> Any:
    """A function that only moves elements, of all parts."""
    copies = func.__name__ in _COPIES
    func = (
        torch.Tensor.reshape if func.__name__ == "view" else func
    )  # parts may be laid out otherwise
    run = _run_of(args)
    names = (
        ("centre", "radius")
        if run is not None and run.differentiable
        else ("centre", "radius", "error")
    )
    parts = [func(*_part(args, name, run), **kwargs) for name in names]
    one = isinstance(parts[0], Tensor)
    found = [
        Bounds(c, r, e[0] if e else None, run)
        for c, r, *e in ([parts] if one else zip(*parts, strict=True))
    ]
    if not copies and isinstance(args[0], Bounds):
        args[0].family += [ref for view in found for ref in view.family]
        for view in found:
            view.family = args[0].family
    return found[0] if one else type(parts[0])(found)


def _part(value: Any, part: str, run: BoundedRun | None) -> Any:
    """One part of bounds; what is fixed is its own centre."""
    if isinstance(value, Bounds):
        return getattr(value, part)
    if isinstance(value, Tensor) and value.is_floating_point():
        value = _constant(value, run)
        return value if part == "centre" else torch.zeros_like(value)
    if type(value) in (tuple, list):
        return type(value)(_part(item, part, run) for item in value)
    return value


def _run_of(value: Any) -> BoundedRun | None:
    if isinstance(value, Bounds):
        return value.run
    if type(value) in (tuple, list):
        return next((run for item in value if (run := _run_of(item)) is not None), None)
    return None


def _constant(value: Any, run: BoundedRun | None) -> Tensor:
    """A weight: in float64 and without a graph, or as it is in a differentiable run."""
    if isinstance(value, Bounds):
        raise NoBoundsError("a product of two values that depend on the input")
    number = torch.float32 if run is None else run.dtype
    found: Tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=number)
    return found if run is not None and run.differentiable else found.detach().double()


def _affine(
    x: Bounds,
    apply: Callable[[Tensor], Tensor],
    absolute: Callable[[Tensor], Tensor],
    terms: int,
    shift: Tensor,
) -> Bounds:
    """Bounds of ``apply(x) + shift``; ``absolute`` is the map whose entries are the absolute values
    of apply's.
    """
    centre, radius = apply(x.centre) + shift, absolute(x.radius)
    if x.unrounded:
        return Bounds(centre, radius, run=x.run)
    growth = gamma(terms)
    largest = x.centre.detach().abs() + x.radius + x.error
    error = absolute(x.error + growth * largest) + growth * shift.abs() + terms * _SMALLEST
    return Bounds(centre, radius, _within_float32(error), x.run)


def _weighted(
    func: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> Bounds:
    """Convolution and linear."""
    weight = _constant(weight, x.run)
    shift = x.centre.new_zeros(()) if bias is None else _constant(bias, x.run)
    if weight.ndim > 2:
        shift = shift.view(-1, *[1] * (weight.ndim - 2))
    return _affine(
        x,
        lambda z: func(z, weight, None, *args, **kwargs),
        lambda z: func(z, weight.abs(), None, *args, **kwargs),
        weight[0].numel() + 2,
        shift,
    )


def _batch_norm(
    func: Any,
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bounds:
    if training or running_mean is None or running_var is None:
        raise NoBoundsError(
            "batch norm with the statistics of the batch, which one image alone does not decide"
        )
    shape = (-1, *[1] * (x.ndim - 2))
    slope = (_constant(running_var, x.run) + eps).rsqrt()
    slope = (slope if weight is None else slope * _constant(weight, x.run)).view(shape)
    moved = _constant(running_mean, x.run).view(shape) * slope
    bias = torch.zeros_like(moved) if bias is None else _constant(bias, x.run).view(shape)
    found = _affine(x, lambda z: z * slope, lambda z: z * slope.abs(), 12, bias - moved)
    if found.unrounded:
        return found
    # Computed as (x - mean) * slope + bias or as x * slope + (bias - mean * slope): either is
    # covered.
    return Bounds(
        found.centre, found.radius, found.error + gamma(12) * (moved.abs() + bias.abs()), x.run
    )


def _average(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """Sums with weights >= 0: average pooling, ``mean``, ``sum``."""
    _converted(func, x, kwargs.pop("dtype", None))
    size = args[0] if args else kwargs.get("kernel_size", 1)
    if func.__name__.startswith("avg_pool"):
        terms = math.prod(size) if isinstance(size, tuple | list) else int(size) ** (x.ndim - 2)
    elif "pool" in func.__name__:
        terms = math.prod(x.shape[2:])
    else:
        terms = x.numel() // max(1, func(x.radius, *args, **kwargs).numel())

    def apply(z: Tensor) -> Any:
        return func(z, *args, **kwargs)

    return _affine(x, apply, apply, terms + 2, x.centre.new_zeros(()))


def _sum(func: Any, a: Any, b: Any, **kwargs: Any) -> Bounds:
    if kwargs:
        raise NoBoundsError("a sum with alpha or out")
    name, run = func.__name__.strip("_"), _run_of((a, b))
    a, b = (b, a) if name == "rsub" else (a, b)
    device = (a if isinstance(a, Bounds) else b).centre.device
    first, second = (
        value
        if isinstance(value, Bounds)
        else Bounds(z := _constant(value, run).to(device), torch.zeros_like(z), run=run)
        for value in (a, b)
    )
    centre = first.centre - second.centre if "sub" in name else first.centre + second.centre
    radius = first.radius + second.radius
    if first.unrounded:
        return Bounds(centre, radius, run=run)
    error = first.error + second.error
    size = centre.detach().abs() + radius + error
    return Bounds(centre, radius, _within_float32(error + gamma(2) * size + _SMALLEST), run)


def _product(func: Any, a: Any, b: Any, **kwargs: Any) -> Bounds:
    name = func.__name__.strip("_")
    x, other = (a, b) if isinstance(a, Bounds) else (b, a)
    if "div" in name and (kwargs or x is not a or name.startswith("r")):
        raise NoBoundsError("a division by a value that depends on the input, or one that rounds")
    factor = _constant(other, x.run).to(x.centre.device)
    factor = 1.0 / factor if "div" in name else factor
    return _affine(x, lambda z: z * factor, lambda z: z * factor.abs(), 4, x.centre.new_zeros(()))


def _negative(func: Any, x: Any) -> Bounds:
    return Bounds(-x.centre, x.radius, x.error, x.run)


def _largest_of(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """Max pooling."""
    if kwargs.pop("return_indices", False):
        raise NoBoundsError("a max pooling that returns indices")
    if x.run is None:
        raise NoBoundsError("a max pooling outside a run")
    run: BoundedRun = x.run
    return run.pool(x, lambda z: func(z, *args, **kwargs))


def _dropout(
    func: Any, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if training:
        raise NoBoundsError("dropout that stays on")
    return x


def _converted(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    given = [
        getattr(value, "dtype", value) for value in (*args, *kwargs.values())
    ]  # of tensors theirs
    given += [torch.float32] if func.__name__ == "float" else []
    if wanted := [value for value in given if isinstance(value, torch.dtype) and value != x.dtype]:
        raise NoBoundsError(f"a conversion to {wanted[0]}: bounds are those of {x.dtype}")
    return x


_QUESTIONS = {
    "get",
    "dim",
    "size",
    "numel",
    "is_floating_point",
    "is_contiguous",
    "stride",
    "ndimension",
    "len",
    "is_complex",
    "get_device",
}
_SHAPES = {
    "flatten",
    "view",
    "reshape",
    "expand",
    "permute",
    "transpose",
    "unsqueeze",
    "squeeze",
    "contiguous",
    "clone",
    "repeat",
    "chunk",
    "split",
    "getitem",
    "cat",
    "concat",
    "concatenate",
    "stack",
    "unbind",
    "movedim",
    "narrow",
    "select",
    "unflatten",
    "swapaxes",
    "tile",
    "flip",
}
_COPIES = {"clone", "repeat", "cat", "concat", "concatenate", "stack", "tile", "flip"}
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "idiv"}
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _weighted),
    "batch_norm": _batch_norm,
    **dict.fromkeys(
        (
            "avg_pool1d",
            "avg_pool2d",
            "avg_pool3d",
            "adaptive_avg_pool1d",
            "adaptive_avg_pool2d",
            "adaptive_avg_pool3d",
            "mean",
            "sum",
        ),
        _average,
    ),
    **dict.fromkeys(("add", "radd", "iadd", "sub", "rsub", "isub"), _sum),
    **dict.fromkeys(
        ("mul", "rmul", "imul", "div", "truediv", "rdiv", "rtruediv", "itruediv", "idiv"), _product
    ),
    "neg": _negative,
    **dict.fromkeys(
        (
            "max_pool1d",
            "max_pool2d",
            "max_pool3d",
            "adaptive_max_pool1d",
            "adaptive_max_pool2d",
            "adaptive_max_pool3d",
        ),
        _largest_of,
    ),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), _dropout),
    **dict.fromkeys(("to", "float", "type_as"), _converted),
}
