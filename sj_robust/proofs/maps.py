"""The affine maps between the leaves of a network, and runs that trace them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sj_robust.core.broadcast import along
from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import BoundedRun, Layout, by_row, laid_out, pulled_back
from sj_robust.proofs.moves import Events
from sj_robust.proofs.rounding import LEAST_SHARE, is_rounding
from sj_robust.proofs.rules import Bounds, Function
from sj_robust.proofs.spiking import Interval

__all__ = ["Bounded", "Maps", "Trace"]

_ELEMENTS = 2**22
"""Elements of all leaves that a pass back through a map holds: more rows than fit go one after the
other.
"""

_MANY = 3
"""Samples of a batch whose maps are compared."""

_FEW = 2
"""Samples of another one."""

Bounded = Callable[[BoundedRun, Tensor, float | Events], Bounds]
"""Bounds of the logits that a run finds, for images [N, *] and eps."""

LeafValue = Callable[[Tensor], Tensor]
"""Values of a leaf, for a tensor of its shape, device and precision."""


class Trace(BoundedRun):
    """A run whose leaves have given values: the graphs of the affine maps, and their values
    there. With leaves of zero, these are what the maps shift by.

    Args:
        neurons: Neurons of known dynamics by name.
        samples: Number of samples.
        value: Gives the values of the leaves.
        sized: Whether to keep what rounding is relative to; see
            :class:`sj_robust.proofs.rules.Run`.
    """

    points = True

    def __init__(
        self, neurons: dict[str, Neuron], samples: int, value: LeafValue, *, sized: bool = False
    ) -> None:
        """Nothing has run yet."""
        super().__init__(neurons, samples)
        self.rounded = False
        self.sized = sized
        self.value = value
        self.currents: list[Tensor] = []
        self.sizes: list[Tensor] = []
        self.names: list[str] = []
        self.batch_dims: list[int] = []

    def _reached(self, x: Bounds, batch_dim: int, by: Neuron | Function) -> None:
        name = by.name
        if isinstance(by, Neuron):
            name = f"the layer {name}"
        self.note(x, batch_dim, name)

    def note(self, current: Bounds, batch_dim: int, name: str) -> None:
        """Keep a current: of a call, or at last the logits."""
        self.currents.append(current.centre)
        self.sizes.append(current.radius)
        self.batch_dims.append(batch_dim)
        self.names.append(name)

    def shift_of(self, call: int) -> Tensor:
        """A call's current, [N, *]."""
        current = self.currents[call].detach()
        return by_row(current, self.samples, self.batch_dims[call])

    def size_of(self, call: int) -> Tensor:
        """What rounding of a call's current is relative to, [N, *]."""
        return by_row(self.sizes[call], self.samples, self.batch_dims[call])

    def spikes(self, neuron: Neuron, x_seq: Interval) -> Interval:
        """See :class:`BoundedRun`: no spike is bounded."""
        return x_seq

    def leaf(self, values: Interval, batch_dim: int) -> Bounds:
        """See :class:`BoundedRun`, with the value of a leaf."""
        return self.point(self.value(values.low), batch_dim)

    def point(self, value: Tensor, batch_dim: int) -> Bounds:
        """A leaf with this value."""
        found = super().leaf(Interval(value, value), batch_dim)
        if self.sized:
            found.radius = value.abs()
        return found


class _Multiples(Trace):
    """A run whose leaves have random values, the same for all samples but for a random factor of
    each.
    """

    def __init__(self, neurons: dict[str, Neuron], samples: int) -> None:
        super().__init__(neurons, samples, torch.zeros_like, sized=True)
        self._generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(_MANY, generator=self._generator, dtype=torch.float64)
        self.factors = drawn[:samples] + 0.5

    def leaf(self, values: Interval, batch_dim: int) -> Bounds:
        like = by_row(values.low, self.samples, batch_dim)
        drawn = torch.randn(like.shape[1:], generator=self._generator, dtype=torch.float64)
        self.factors = self.factors.to(like.device)
        rows = along(self.factors, 0, like.ndim) * drawn.to(like.device)
        return self.point(laid_out(rows, batch_dim).contiguous(), batch_dim)


@dataclass
class Maps:
    """The affine maps between the leaves of a network, for any number of rows. 各层之间的仿射映射。

    A row is one sample of a run; the maps are the same for all of them.

    Attributes:
        bounded: Gives the bounds of the logits that a run finds.
        neurons: Neurons of known dynamics by name.
        frame: One image [*].
    """

    bounded: Bounded
    neurons: dict[str, Neuron]
    frame: Tensor
    _traces: dict[int, Trace] = field(default_factory=dict, init=False)
    _layouts: tuple[Layout, ...] | None = field(default=None, init=False)
    _compared: dict[int, _Multiples] = field(default_factory=dict, init=False)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Where each operation outside of spiking layers has its samples, as a run of several
        tells.
        """
        if self._layouts is None:
            self._layouts = tuple(self.traced(_FEW, torch.zeros_like).laid)
        return self._layouts

    def tell_layouts(self, run: BoundedRun) -> None:
        """Let a run of one sample know where it is; several samples tell it themselves."""
        if run.samples == 1:
            run.layouts = self.layouts

    def check_samples(self) -> None:
        """Raise NotImplementedError unless all samples have the same map, each of its own leaves,
        however many.
        """
        for rows in (_MANY, _FEW):
            self._traces[rows] = self.traced(rows, torch.zeros_like, sized=True)
        for number, name in enumerate(self._trace(_MANY).names):
            if not (
                self._has_one_shift(number)
                and self._has_one_image(number)
                and self._has_one_graph(number)
            ):
                raise NotImplementedError(
                    "no bounds are known for a network that mixes the samples of a batch, or "
                    f"treats them differently, as before {name}; give time steps first, [T, N, "
                    "*], and use no value of other images"
                )
        del self._traces[_MANY], self._traces[_FEW]
        self._compared.clear()

    def _has_one_shift(self, call: int) -> bool:
        """Whether a call's current, if all leaves are zero, is that of the first sample for every
        sample, in batches of two sizes.
        """
        many = self._trace(_MANY)
        few = self._trace(_FEW)
        first = many.shift_of(call)[:1]
        size = many.size_of(call)[:1]
        shifts = (many.shift_of(call), few.shift_of(call))
        return all(is_rounding(shift - first, size) for shift in shifts)

    def _has_one_image(self, call: int) -> bool:
        """Whether every sample's current is that of its own leaves, in batches of two sizes.

        Equation, with A and b those of one sample, z random and f[n] a random factor of sample n::

            leaves f[n] z on sample n give f[n] A z + b on sample n
        """
        many = self._multiples(_MANY)
        few = self._multiples(_FEW)
        shift = self._trace(_MANY).shift_of(call)[:1]
        image = (many.shift_of(call)[:1] - shift) / many.factors[0]
        for trace in (many, few):
            current = trace.shift_of(call)
            factors = along(trace.factors, 0, current.ndim)
            if not is_rounding(current - shift - factors * image, trace.size_of(call)):
                return False
        return True

    def _multiples(self, rows: int) -> _Multiples:
        if rows not in self._compared:
            trace = _Multiples(self.neurons, rows)
            self.run(trace)
            self._compared[rows] = trace
        return self._compared[rows]

    def _has_one_graph(self, call: int) -> bool:
        """Whether weights on a call's current belong to the same weights on leaves for every
        sample.

        Equation, with A the map of one sample, u random and n = 1, 2, ... the number of a sample::

            u on every sample gives A^T u on every sample, in a batch of any size
            n u on sample n gives n A^T u on sample n
        """
        trace = self._trace(_MANY)
        fewer = self._trace(_FEW)
        dim = trace.batch_dims[call]
        current = trace.shift_of(call)
        once = torch.rand_like(current[:1]).expand_as(current)
        factors = torch.arange(1.0, _MANY + 1, dtype=current.dtype, device=current.device)
        often = along(factors, 0, current.ndim) * once
        on_once = self.adjoint(call, laid_out(once, dim), _MANY)
        on_often = dict(self.adjoint(call, laid_out(often, dim), _MANY))
        on_few = dict(self.adjoint(call, laid_out(once[:_FEW], dim), _FEW))
        leaves = [leaf for leaf, _ in on_once]
        assert leaves == list(on_often) == list(on_few)
        for leaf, weights in on_once:
            of_many = trace.leaves[leaf]
            of_few = fewer.leaves[leaf]
            rows = of_many.by_sample(weights, _MANY)
            scaled_rows = of_many.by_sample(on_often[leaf], _MANY)
            few_rows = of_few.by_sample(on_few[leaf], _FEW)
            first = rows[:1]
            size = first.abs() + LEAST_SHARE * first.abs().amax()
            scales = factors.unsqueeze(1)
            gaps = (rows - first, few_rows - first, scaled_rows / scales - first)
            if not all(is_rounding(gap, size) for gap in gaps):
                return False
        return True

    def adjoint(self, call: int, weights: Tensor, rows: int) -> list[tuple[int, Tensor]]:
        """Weights on a call's current (native layout, -1 for the logits) as weights on earlier
        leaves.
        """
        trace = self._trace(rows)
        current = trace.currents[call]
        leaves = [leaf.centre for leaf in trace.leaves]
        if not current.requires_grad:
            return []
        found = pulled_back(weights, current, leaves, create_graph=weights.requires_grad)
        return [(number, weight) for number, weight in enumerate(found) if weight is not None]

    def image(self, call: int, leaves: list[Tensor], rows: int) -> Tensor:
        """What the map to a call's current makes of values of the leaves, without its shift,
        native layout.

        ``<A^T u, z>`` is linear in u, so that its gradient is ``A z``.
        """
        current = self._trace(rows).currents[call]
        weights = torch.zeros_like(current, requires_grad=True)
        products = []
        for number, back in self.adjoint(call, weights, rows):
            products.append((back * leaves[number]).sum())
        if not products:
            return torch.zeros_like(current)
        total = torch.stack(products).sum()
        if not total.requires_grad:
            return torch.zeros_like(current)
        (found,) = torch.autograd.grad(total, weights)
        return found

    def shift(self, call: int, rows: int) -> Tensor:
        """The call's current if all leaves are zero, native layout."""
        return self._trace(rows).currents[call].detach()

    def rows_that_fit(self) -> int:
        """Rows of one pass back through a map."""
        size = sum(leaf.centre.numel() for leaf in self._trace(1).leaves)
        return max(1, _ELEMENTS // max(1, size))

    def traced(self, rows: int, value: LeafValue, *, sized: bool = False) -> Trace:
        """A run of so many rows whose leaves have the values that are given for one like them."""
        trace = Trace(self.neurons, rows, value, sized=sized)
        self.run(trace)
        return trace

    def run(self, trace: Trace) -> Bounds:
        """Let the network run on the leaves of a trace; the logits."""
        self.tell_layouts(trace)
        zeros = self.frame.new_zeros(trace.samples, *self.frame.shape)
        logits = self.bounded(trace, zeros, 0.0)
        trace.note(logits, 0, "the output")
        return logits

    def _trace(self, rows: int) -> Trace:
        if rows not in self._traces:
            if len(self._traces) > 3:
                oldest = next(key for key in self._traces if key != 1)
                del self._traces[oldest]
            self._traces[rows] = self.traced(rows, torch.zeros_like)
        return self._traces[rows]
