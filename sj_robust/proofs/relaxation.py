"""Linear relaxation of a spiking network in a box, with bounds by back-substitution."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sj_robust.core.broadcast import along
from sj_robust.neuron.charging import Neuron
from sj_robust.ops.limits import by_sign
from sj_robust.proofs.bounds import BoundedRun, Layout, by_row, laid_out, pulled_back
from sj_robust.proofs.moves import Events
from sj_robust.proofs.opened import counts
from sj_robust.proofs.rounding import LEAST_SHARE, is_rounding, reset_rounding
from sj_robust.proofs.rules import Bounds, Function, Pooling
from sj_robust.proofs.spiking import Float32Spiking, Interval, LayerBounds, Spiking

__all__ = [
    "Bounded",
    "Decision",
    "Lower",
    "Maps",
    "RelaxedRun",
    "Slopes",
    "Stage",
    "Step",
    "minimum",
    "raised",
]

_ROUNDING = 1e-10
"""Covers float64's own rounding of a sum of terms, in units of the sum of their absolute values."""

_ELEMENTS = 2**22
"""Elements of all leaves that a back-substitution holds: more rows than fit go one after the
other.
"""

_OPERATIONS = 500
"""What it takes to replace a spike, in operations of a map."""

_OVERHEAD = 1e5
"""What a row costs however small the network is, likewise."""

_MANY = 3
"""Samples of a batch whose maps are compared."""

_FEW = 2
"""Samples of another one."""

Bounded = Callable[[BoundedRun, Tensor, float | Events], Bounds]
"""Bounds of the logits that a run finds, for images [N, *] and eps."""

LeafValue = Callable[[Tensor], Tensor]
"""Values of a leaf, for a tensor of its shape, device and precision."""

Slopes = dict[tuple[int, int], Tensor]
"""Slopes [R, *] of the linear functions below what each stage and step does."""


class Decision(NamedTuple):
    """A spike that is assumed or ruled out.

    Attributes:
        stage: Number of the call of the layer.
        step: Its time step.
        neuron: Number of the neuron in the layer.
        fires: Whether there is a spike.
    """

    stage: int
    step: int
    neuron: int
    fires: bool


@dataclass
class Step:
    """A spiking layer in one time step.

    Attributes:
        gain: Gain of the current.
        lower: Smallest charged potential h, [N, *].
        upper: Largest.
        error: How far float32's h can be from the charge equation with the current that float32
            gives.
        quiet: Whether there may be no spike.
        fires: Whether there may be one.
        free: Whether another slope than that of the only case can help: undecided, or decided by
            assumption.
    """

    gain: float
    lower: Tensor
    upper: Tensor
    error: Tensor
    quiet: Tensor = field(init=False)
    fires: Tensor = field(init=False)
    free: Tensor = field(init=False)

    def decide(self, around: tuple[float, float]) -> None:
        """Whether there may be a spike, or none, as the bounds of h say; see :class:`Stage`."""
        below, above = around
        self.quiet = self.lower < above
        self.fires = self.upper >= below
        self.free = self.quiet & self.fires

    def assume(
        self, around: tuple[float, float], fires: bool, samples: Tensor, neurons: Tensor
    ) -> None:
        """Take spikes of neurons [D] of samples [D] as there or as ruled out."""
        below, above = around
        if fires:
            impossible = self.quiet.view(len(self.quiet), -1)
            lower = self.lower.view(len(self.lower), -1)
            lower[samples, neurons] = lower[samples, neurons].clamp(min=below)
        else:
            impossible = self.fires.view(len(self.fires), -1)
            upper = self.upper.view(len(self.upper), -1)
            upper[samples, neurons] = upper[samples, neurons].clamp(max=above)
        impossible[samples, neurons] = False


@dataclass
class Stage:
    """A call of a spiking layer or of another function: an affine map of earlier leaves ends here,
    and a leaf begins.

    Attributes:
        leaf: Number of the leaf.
        current: What reaches it.
        batch_dim: Where the current has its samples, as a leaf.
        neuron: The spiking layer; None for what is no step of a potential.
        pooling: The max pooling or ReLU; None for a spiking layer and for what has no line.
        around: What h must be at least to be able to fire, and to fire for sure.
        steps: Time steps of the call.
    """

    leaf: int
    current: Bounds
    batch_dim: int
    neuron: Neuron | None = None
    pooling: Pooling | None = None
    around: tuple[float, float] = (0.0, 0.0)
    steps: list[Step] = field(default_factory=list)

    @property
    def soft(self) -> bool:
        """Whether a spike lowers the potential by the threshold."""
        return self.neuron is not None and self.neuron.module.v_reset is None

    @property
    def rest(self) -> float:
        """Potential at the start, and after a spike if the reset is hard."""
        if self.neuron is None or self.soft:
            return 0.0
        return float(self.neuron.module.v_reset)

    @property
    def decay(self) -> float:
        """Share of the potential that a step keeps."""
        return 1.0 if self.neuron is None else self.neuron.charging().decay_value

    @property
    def threshold(self) -> float:
        """Potential at which there is a spike."""
        return 0.0 if self.neuron is None else float(self.neuron.module.v_threshold)

    def rows_first(self, part: Tensor) -> Tensor:
        """A part of a spiking layer's current as [N, steps, *]."""
        return part.movedim(1, 0) if self.batch_dim else part.unsqueeze(1)

    def native(self, part: Tensor) -> Tensor:
        """[N, steps, *] as the network lays it out."""
        return part.movedim(0, 1) if self.batch_dim else part.squeeze(1)


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
        """Keep a current: of a stage, or at last the logits."""
        self.currents.append(current.centre)
        self.sizes.append(current.radius)
        self.batch_dims.append(batch_dim)
        self.names.append(name)

    def shift_of(self, stage: int) -> Tensor:
        """A stage's current, [N, *]."""
        current = self.currents[stage].detach()
        return by_row(current, self.samples, self.batch_dims[stage])

    def size_of(self, stage: int) -> Tensor:
        """What rounding of a stage's current is relative to, [N, *]."""
        return by_row(self.sizes[stage], self.samples, self.batch_dims[stage])

    def spikes(self, neuron: Neuron, x_seq: Interval) -> Interval:
        return x_seq

    def leaf(self, values: Interval, batch_dim: int) -> Bounds:
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

    A row is one bound that is asked for: of an image and a class, of a neuron, of a part of a box.
    The maps are the same for all of them.

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
    _compared: dict[int, "_Multiples"] = field(default_factory=dict, init=False)

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

    def _has_one_shift(self, stage: int) -> bool:
        """Whether a stage's current, if all leaves are zero, is that of the first sample for every
        sample, in batches of two sizes.
        """
        many = self._trace(_MANY)
        few = self._trace(_FEW)
        first = many.shift_of(stage)[:1]
        size = many.size_of(stage)[:1]
        shifts = (many.shift_of(stage), few.shift_of(stage))
        return all(is_rounding(shift - first, size) for shift in shifts)

    def _has_one_image(self, stage: int) -> bool:
        """Whether every sample's current is that of its own leaves, in batches of two sizes.

        Equation, with A and b those of one sample, z random and f[n] a random factor of sample n::

            leaves f[n] z on sample n give f[n] A z + b on sample n
        """
        many = self._multiples(_MANY)
        few = self._multiples(_FEW)
        shift = self._trace(_MANY).shift_of(stage)[:1]
        image = (many.shift_of(stage)[:1] - shift) / many.factors[0]
        for trace in (many, few):
            current = trace.shift_of(stage)
            factors = along(trace.factors, 0, current.ndim)
            if not is_rounding(current - shift - factors * image, trace.size_of(stage)):
                return False
        return True

    def _multiples(self, rows: int) -> "_Multiples":
        if rows not in self._compared:
            trace = _Multiples(self.neurons, rows)
            self.run(trace)
            self._compared[rows] = trace
        return self._compared[rows]

    def _has_one_graph(self, stage: int) -> bool:
        """Whether weights on a stage's current belong to the same weights on leaves for every
        sample.

        Equation, with A the map of one sample, u random and n = 1, 2, ... the number of a sample::

            u on every sample gives A^T u on every sample, in a batch of any size
            n u on sample n gives n A^T u on sample n
        """
        trace = self._trace(_MANY)
        fewer = self._trace(_FEW)
        dim = trace.batch_dims[stage]
        current = trace.shift_of(stage)
        once = torch.rand_like(current[:1]).expand_as(current)
        factors = torch.arange(1.0, _MANY + 1, dtype=current.dtype, device=current.device)
        often = along(factors, 0, current.ndim) * once
        on_once = self.adjoint(stage, laid_out(once, dim), _MANY)
        on_often = dict(self.adjoint(stage, laid_out(often, dim), _MANY))
        on_few = dict(self.adjoint(stage, laid_out(once[:_FEW], dim), _FEW))
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

    def adjoint(self, stage: int, weights: Tensor, rows: int) -> list[tuple[int, Tensor]]:
        """Weights on a stage's current (native layout, -1 for the logits) as weights on earlier
        leaves.
        """
        trace = self._trace(rows)
        current = trace.currents[stage]
        leaves = [leaf.centre for leaf in trace.leaves]
        if not current.requires_grad:
            return []
        found = pulled_back(weights, current, leaves, create_graph=weights.requires_grad)
        return [(number, weight) for number, weight in enumerate(found) if weight is not None]

    def image(self, stage: int, leaves: list[Tensor], rows: int) -> Tensor:
        """What the map to a stage's current makes of values of the leaves, without its shift,
        native layout.

        ``<A^T u, z>`` is linear in u, so that its gradient is ``A z``.
        """
        current = self._trace(rows).currents[stage]
        weights = torch.zeros_like(current, requires_grad=True)
        products = []
        for number, back in self.adjoint(stage, weights, rows):
            products.append((back * leaves[number]).sum())
        if not products:
            return torch.zeros_like(current)
        total = torch.stack(products).sum()
        if not total.requires_grad:
            return torch.zeros_like(current)
        (found,) = torch.autograd.grad(total, weights)
        return found

    def shift(self, stage: int, rows: int) -> Tensor:
        """The stage's current if all leaves are zero, native layout."""
        return self._trace(rows).currents[stage].detach()

    def rows_that_fit(self) -> int:
        """Rows of one back-substitution."""
        size = sum(leaf.centre.numel() for leaf in self._trace(1).leaves)
        return max(1, _ELEMENTS // max(1, size))

    def work(self) -> float:
        """Operations of a back-substitution of one row, about: those of the maps, and as many for
        each element of the leaves as it takes to replace a spike.
        """
        trace = self._trace(1)
        with FlopCounterMode(display=False) as counter:
            for number, current in enumerate(trace.currents):
                if current.requires_grad:
                    self.adjoint(number, torch.ones_like(current), 1)
        of_maps = float(counter.get_total_flops())
        elements = sum(leaf.centre.numel() for leaf in trace.leaves)
        return of_maps + _OPERATIONS * elements + _OVERHEAD

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


class RelaxedRun(BoundedRun):
    """A run that keeps what back-substitution needs, and may be told more than intervals know.

    Args:
        neurons: Neurons of known dynamics by name.
        samples: Number of samples.
        maps: If given, potentials that intervals leave undecided are bounded by back-substitution
            as well.
        end: When that stops, by ``time.monotonic``; None for never.
        most: Potentials of each sample that are bounded so, the first ones; None for all.
        known: Stages of an earlier run.
        parts_of: Number of the sample of that run whose box holds that of each sample of this one,
            [N]; None if they are the same samples.
        decisions: For each sample spikes that are assumed or ruled out.
    """

    def __init__(
        self,
        neurons: dict[str, Neuron],
        samples: int,
        *,
        maps: Maps | None = None,
        end: float | None = None,
        most: int | None = None,
        known: list[Stage] | None = None,
        parts_of: Tensor | None = None,
        decisions: list[tuple[Decision, ...]] | None = None,
    ) -> None:
        """See the class."""
        super().__init__(neurons, samples)
        self.stages: list[Stage] = []
        self.empty: Tensor = torch.zeros(samples, dtype=torch.bool)
        """Whether a sample's decisions contradict its bounds: no input of its box makes them
        all.
        """
        self.error: Tensor = torch.zeros(())
        """How far float32's logits can be from the map of the leaves, [N, classes]."""
        self._maps = maps
        self._end = end
        self._known = known
        self._parts_of = parts_of
        self._left: Tensor | None = None
        if most is not None:
            self._left = torch.full((samples,), most)
        self._decisions: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}
        for sample, own in enumerate(decisions or []):
            for one in own:
                place = (one.stage, one.step, one.fires)
                self._decisions.setdefault(place, []).append((sample, one.neuron))

    def _reached(self, x: Bounds, batch_dim: int, by: Neuron | Function) -> None:
        stage = Stage(len(self.leaves), x.same(), batch_dim)
        if isinstance(by, Function):
            stage.pooling = by.pooling
        elif counts(by) is None:
            stage.neuron = by
        self.stages.append(stage)

    def _spiking(self, neuron: Neuron) -> Spiking:
        if counts(neuron) is not None:
            return super()._spiking(neuron)
        return _RelaxedSpiking(neuron, self.layers[neuron.name], self)

    def know(self, step: Step) -> None:
        """Add a step to the last stage, with all that is known of it beside intervals."""
        number = len(self.stages) - 1
        stage = self.stages[-1]
        t = len(stage.steps)
        stage.steps.append(step)
        if self._known is not None:
            self._recall(step, self._known[number].steps[t])
        step.decide(stage.around)
        if self._maps is not None:
            self._tighten(self._maps, number, t)
            step.decide(stage.around)
        for fires in (False, True):
            decided = self._decisions.get((number, t, fires))
            if decided is not None:
                samples, neurons = torch.tensor(decided, device=step.lower.device).T
                step.assume(stage.around, fires, samples, neurons)
        impossible = (step.lower > step.upper) | ~(step.quiet | step.fires)
        of_samples = impossible.flatten(1).any(1)
        self.empty = self.empty.to(impossible.device) | of_samples

    def _recall(self, step: Step, earlier: Step) -> None:
        """Cut a step's potentials off at the bounds of an earlier run."""
        rows = slice(None) if self._parts_of is None else self._parts_of
        step.lower = torch.maximum(step.lower, earlier.lower[rows])
        step.upper = torch.minimum(step.upper, earlier.upper[rows])

    def _tighten(self, maps: Maps, number: int, t: int) -> None:
        """Bound the undecided potentials of a step by back-substitution."""
        step = self.stages[number].steps[t]
        step.lower = step.lower.clone()
        step.upper = step.upper.clone()
        undecided = (step.quiet & step.fires).flatten(1)
        samples, neurons = undecided.nonzero(as_tuple=True)
        if self._left is not None:
            kept = self._first_ones(samples, self._left)
            samples = samples[kept]
            neurons = neurons[kept]
        if not len(samples):
            return
        rows = maps.rows_that_fit()
        some_samples = torch.split(samples, rows)
        some_neurons = torch.split(neurons, rows)
        parts = list(zip(some_samples, some_neurons, strict=True))
        lower = step.lower.view(self.samples, -1)
        upper = step.upper.view(self.samples, -1)
        shape = step.lower.shape[1:]
        # the tighter of two bounds; NaN, if found, is none
        for sign, bound, tighter in ((1.0, lower, torch.fmax), (-1.0, upper, torch.fmin)):
            for sample, neuron in parts:
                if self._end is not None and time.monotonic() > self._end:
                    return
                every = torch.arange(len(sample))
                weights = bound.new_zeros(len(sample), bound.shape[1])
                weights[every, neuron] = sign
                on_layer = weights.view(-1, *shape)
                found = minimum(maps, self, sample, on_layer, (number, t))
                bound[sample, neuron] = tighter(bound[sample, neuron], sign * found.value)

    def _first_ones(self, samples: Tensor, left: Tensor) -> Tensor:
        """Which of the rows, given sorted by their samples, their samples have work left for."""
        asked = torch.bincount(samples, minlength=self.samples).cpu()
        before = asked.cumsum(0) - asked
        number = torch.arange(len(samples), device=samples.device)
        place = number - before.to(samples.device)[samples]
        kept = place < left.to(samples.device)[samples]
        self._left = left - torch.minimum(asked, left)
        return kept


class _RelaxedSpiking(Float32Spiking):
    """A call of a spiking layer of which a run knows more than intervals."""

    def __init__(self, neuron: Neuron, layer: LayerBounds, run: RelaxedRun) -> None:
        super().__init__(neuron, layer)
        self.relaxed = run
        run.stages[-1].around = (self.below, self.above)

    def decided(self, h: Interval, error: Tensor, gain: float) -> tuple[Interval, Interval]:
        low = h.low.contiguous()
        high = h.high.contiguous()
        step = Step(gain=gain, lower=low, upper=high, error=error)
        self.relaxed.know(step)
        sure = step.fires & ~step.quiet
        spikes = Interval(
            low=sure.to(error.dtype),
            high=step.fires.to(error.dtype),
        )
        return Interval(step.lower, step.upper), spikes


@dataclass
class Lower:
    """Result of :func:`minimum`.

    Attributes:
        value: Lower bound of each row, [R].
        slopes: The slopes that gave it.
        gaps: For each stage and step how far the linear function is below what the layer does, at
            most, [R, *].
        weights: Weights on the input, [R, *], whose sign tells the corner where the bound is.
    """

    value: Tensor
    slopes: Slopes
    gaps: dict[tuple[int, int], Tensor]
    weights: Tensor

    def of(self, rows: Tensor | slice) -> "Lower":
        """Some of the rows."""
        slopes = {key: part[rows] for key, part in self.slopes.items()}
        gaps = {key: part[rows] for key, part in self.gaps.items()}
        return Lower(value=self.value[rows], slopes=slopes, gaps=gaps, weights=self.weights[rows])

    def weak(self) -> Tensor:
        """Numbers of the rows that are not above 0; NaN is not."""
        proved = self.value > 0
        return (~proved).nonzero().squeeze(1)

    def put(self, rows: Tensor, other: "Lower") -> None:
        """Take the other's rows instead of these."""
        self.value[rows] = other.value
        self.weights[rows] = other.weights
        for key in self.slopes:
            self.slopes[key][rows] = other.slopes[key]
            self.gaps[key][rows] = other.gaps[key]


def minimum(
    maps: Maps,
    run: RelaxedRun,
    samples: Tensor,
    weights: Tensor,
    start: tuple[int, int] | None = None,
    slopes: Slopes | None = None,
) -> Lower:
    """Lower bound of a weighted sum of logits, or of potentials of one step, over each sample's
    box. 反向代入的下界。

    Equation: going back through the layers, ``w_s`` and ``w_v`` are the weights on a neuron's spike
    and on its potential after the reset. What the neuron adds is a function of its charged
    potential h alone, with a jump::

        f(h) = w_v h                                for h in [lower, threshold),
        f(h) = w_s + w_v (v_reset | h - threshold)  for h in [threshold, upper] (hard | soft reset)
        f(h) >= a h + min (f(e) - a e)              over the ends e of both pieces, every slope a

    and ``a`` is the weight on ``h[t] = lambda v[t-1] + p[t] x[t] + (1 - lambda) v_reset``, hence on
    the current and on the earlier potential. The slope is that of the largest minorant at the
    middle of [lower, upper]: an edge of the lower convex hull of f, which contains both lines of
    Liang et al. for a spike and treats the reset's product with it. What float32 rounds enters as
    ``-|weight| error`` at each current, charge and reset.

    Args:
        maps: The affine maps.
        run: Bounds of every potential.
        samples: Number of each row's sample in the run, [R].
        weights: Weights on the logits [R, classes], or on a step's charged potentials [R, *].
        start: Stage and step of those potentials; None for the logits.
        slopes: Slopes instead of those above; any are sound.

    Source: CROWN (Zhang et al., NeurIPS 2018); S-CROWN (Liang et al., NeurIPS 2022).
    """
    rows = len(samples)
    missing = (1 << (rows - 1).bit_length()) - rows
    if missing:  # the maps are traced for few numbers of rows, powers of two
        samples = _filled_up(samples, missing)
        weights = _filled_up(weights, missing)
    walk = _Walk(maps=maps, run=run, samples=samples, slopes=slopes)
    if start is None:
        walk.through(-1, weights, run.error[samples])
        stages = len(run.stages)
    else:
        stages, step = start
        walk.steps(stages, on_spikes=None, last=step, on_last=weights)
    for number in reversed(range(stages)):
        walk.stage(number)
    return walk.finished(rows)


def _filled_up(part: Tensor, missing: int) -> Tensor:
    """Rows with the first one so many times more."""
    first = part[:1].expand(missing, *part.shape[1:])
    return torch.cat([part, first])


class _Walk:
    """One back-substitution: weights on leaves and potentials that are not yet replaced, and the
    sum so far.
    """

    def __init__(self, maps: Maps, run: RelaxedRun, samples: Tensor, slopes: Slopes | None) -> None:
        self.maps = maps
        self.run = run
        self.samples = samples
        self.given = slopes
        self.on_leaves: dict[int, Tensor] = {}
        self.on_potentials: dict[str, Tensor] = {}
        self.rests: dict[str, float] = {}
        self.value = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
        self.size = torch.zeros_like(self.value)
        self.slopes: Slopes = {}
        self.gaps: dict[tuple[int, int], Tensor] = {}

    def add(self, term: Tensor) -> None:
        """Add a term of every row."""
        term = term.flatten(1)
        self.value = self.value + term.sum(1)
        self.size = self.size + term.detach().abs().sum(1)

    def through(self, number: int, weights: Tensor, error: Tensor) -> None:
        """Replace a current by the leaves that it is a map of; ``weights`` and ``error`` in native
        layout.
        """
        rows = len(self.samples)
        self.add(self._by_row(-weights.abs() * error, number))
        shift = self.maps.shift(number, rows)
        _check_layout(weights, shift)
        self.add(self._by_row(weights * shift, number))
        for leaf, weight in self.maps.adjoint(number, weights, rows):
            if leaf in self.on_leaves:
                weight = self.on_leaves[leaf] + weight
            self.on_leaves[leaf] = weight

    def stage(self, number: int) -> None:
        """Replace a leaf, and the potentials of its layer, by the current."""
        stage = self.run.stages[number]
        weights = self.on_leaves.pop(stage.leaf, None)
        if stage.neuron is not None:
            on_spikes = None if weights is None else stage.rows_first(weights)
            self.steps(number, on_spikes=on_spikes, last=len(stage.steps) - 1)
        elif weights is None:
            return
        elif stage.pooling is None:
            self._boxed(stage, weights)
        elif stage.pooling is torch.relu:
            self._rectified(number, weights)
        else:
            self._pooled(number, stage.pooling, weights)

    def steps(
        self, number: int, *, on_spikes: Tensor | None, last: int, on_last: Tensor | None = None
    ) -> None:
        """Replace the steps of a spiking layer by its current, from the ``last`` one back to the
        first.

        ``on_spikes`` are weights [R, steps, *]; ``on_last`` are weights on the last step's charged
        potential in the place of those on its spike and on the potential behind it.
        """
        stage = self.run.stages[number]
        assert stage.neuron is not None
        name = stage.neuron.name
        on_potential = self.on_potentials.pop(name, None)
        on_currents: dict[int, Tensor] = {}
        for t in reversed(range(last + 1)):
            if t == last and on_last is not None:
                on_charged = on_last
            elif on_spikes is None and on_potential is None:
                continue
            else:
                on_charged = self._fired(number, t, on_spikes, on_potential)
            step = stage.steps[t]
            self.add(on_charged * ((1.0 - stage.decay) * stage.rest))
            self.add(-on_charged.abs() * step.error[self.samples])
            on_currents[t] = step.gain * on_charged
            on_potential = stage.decay * on_charged
        if on_potential is not None:
            self.on_potentials[name] = on_potential
            self.rests[name] = stage.rest
        if on_currents:
            self._to_current(number, on_currents)

    def _to_current(self, number: int, on_currents: dict[int, Tensor]) -> None:
        """Go through the current of a spiking layer, of which some steps have weights [R, *]."""
        stage = self.run.stages[number]
        error = stage.rows_first(stage.current.error)[self.samples]
        some = next(iter(on_currents.values()))
        nothing = torch.zeros_like(some)
        weights = [on_currents.get(t, nothing) for t in range(error.shape[1])]
        on_current = torch.stack(weights, 1)
        self.through(number, stage.native(on_current), stage.native(error))

    def finished(self, rows: int) -> Lower:
        """The bound: what is left hangs on the input and on the potentials at the start."""
        for name, weights in self.on_potentials.items():
            self.add(weights * self.rests[name])
        box = self.run.leaves[0]
        centre = box.centre.detach()[self.samples]
        weights = self.on_leaves.pop(0, torch.zeros_like(centre))
        self.add(weights * centre)
        if self.run.changed is None:
            self.add(-weights.abs() * box.radius[self.samples])
        else:
            changes = self.run.changed.changes
            assert changes is not None
            self.add(-changes.falls(self.samples, weights))
        found = Lower(
            value=self.value - _ROUNDING * self.size,
            slopes=self.slopes,
            gaps=self.gaps,
            weights=weights.detach(),
        )
        return found.of(slice(rows))

    def _fired(
        self, number: int, t: int, on_spikes: Tensor | None, on_potential: Tensor | None
    ) -> Tensor:
        """Weights on h instead of those on the spike and on the potential after the reset; see the
        equation of :func:`minimum`.
        """
        stage = self.run.stages[number]
        step = stage.steps[t]
        quiet = step.quiet[self.samples]
        fires = step.fires[self.samples]
        h = Interval(step.lower[self.samples], step.upper[self.samples])
        nothing = torch.zeros_like(h.low)
        on_spike = nothing if on_spikes is None else on_spikes[:, t]
        if on_potential is None:
            on_potential = nothing
        rounding = reset_rounding(h.size(), stage.rest, stage.threshold)
        self.add(-on_potential.abs() * rounding)
        silent = _without_spike(stage, h, on_potential)
        fired = _with_spike(stage, h, on_spike, on_potential)
        if self.given is not None:
            slope = self._given_slope(number, t)
        else:
            after_spike = on_potential if stage.soft else nothing
            of_only_piece = torch.where(fires, after_spike, on_potential)
            of_hull = _slope(silent, fired, stage.threshold)
            slope = torch.where(quiet & fires, of_hull, of_only_piece)
        heights = torch.stack([*silent.heights(slope), *fired.heights(slope)])
        possible = torch.stack([quiet, quiet, fires, fires])
        offset = heights.masked_fill(~possible, torch.inf).amin(0)
        offset = torch.where(quiet | fires, offset, 0.0)  # of an empty part of a box
        self.add(offset)
        highest = heights.masked_fill(~possible, -torch.inf).amax(0)
        self.slopes[number, t] = slope.detach()
        self.gaps[number, t] = (highest - offset).detach()
        return slope

    def _given_slope(self, number: int, t: int) -> Tensor:
        """The slope that was asked for, with rows for what :func:`minimum` filled up."""
        assert self.given is not None
        slope = self.given[number, t]
        return _filled_up(slope, len(self.samples) - len(slope))

    def _pooled(self, number: int, pooling: Pooling, weights: Tensor) -> None:
        """A maximum is at least the value whose lower bound is the largest, and at most the largest
        upper bound.
        """
        current = self.run.stages[number].current
        under, over = by_sign(weights)
        upper = self._of_samples(current.upper, number)
        self.add(self._by_row(over * pooling(upper), number))
        lower = self._of_samples(current.lower, number)
        with torch.enable_grad():
            lower.requires_grad_()
            pooled = pooling(lower)
        total = (under * pooled).sum()
        on_largest = torch.autograd.grad(total, lower, create_graph=weights.requires_grad)[0]
        error = self._of_samples(current.error, number)
        self.through(number, on_largest, error)

    def _boxed(self, stage: Stage, weights: Tensor) -> None:
        """A product or another function of which no line is known is bounded by its interval."""
        leaf = self.run.leaves[stage.leaf]
        rows = by_row(weights, len(self.samples), leaf.batch_dim)
        centres = by_row(leaf.centre.detach(), self.run.samples, leaf.batch_dim)
        radii = by_row(leaf.radius, self.run.samples, leaf.batch_dim)
        centre = centres[self.samples]
        radius = radii[self.samples]
        _check_layout(rows, centre)
        self.add(rows * centre - rows.abs() * radius)

    def _rectified(self, number: int, weights: Tensor) -> None:
        """ReLU is at least ``a x`` for any a in [0, 1], and at most the line through both ends."""
        current = self.run.stages[number].current
        low = self._of_samples(current.lower, number)
        high = self._of_samples(current.upper, number)
        slope_below = (high > -low).to(low.dtype)
        rise = high.relu() - low.relu()
        slope_above = torch.where(high > low, rise / (high - low), slope_below)
        height_above = low.relu() - slope_above * low
        under, over = by_sign(weights)
        self.add(self._by_row(over * height_above, number))
        on_current = under * slope_below + over * slope_above
        self.through(number, on_current, self._of_samples(current.error, number))

    def _of_samples(self, part: Tensor, number: int) -> Tensor:
        """A part of a stage's current, of the sample of each row, in native layout."""
        batch_dim = self.run.stages[number].batch_dim
        rows = by_row(part, self.run.samples, batch_dim)
        return laid_out(rows[self.samples], batch_dim)

    def _by_row(self, term: Tensor, number: int) -> Tensor:
        """A term in native layout as [R, *]; -1 are the logits."""
        batch_dim = self.run.stages[number].batch_dim if number >= 0 else 0
        return by_row(term, len(self.samples), batch_dim)


def _check_layout(a: Tensor, b: Tensor) -> None:
    """Raise NotImplementedError unless two parts have one shape: torch would repeat the smaller one
    and add up what does not belong together.
    """
    if a.shape != b.shape:
        raise NotImplementedError(
            "no bounds are known for a network that lays its samples out differently in batches "
            f"of different sizes: {tuple(a.shape)} against {tuple(b.shape)}"
        )


@dataclass(frozen=True)
class _Piece:
    """One of the two lines of what a neuron adds to the sum, f(h); see :func:`minimum`.

    Attributes:
        h: Charged potentials for which it holds.
        at_low: f at their lower end.
        at_high: f at the upper one.
    """

    h: Interval
    at_low: Tensor
    at_high: Tensor

    def heights(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """At both ends, how far f is above a line of this slope through the origin."""
        line_at_low = slope * self.h.low
        line_at_high = slope * self.h.high
        return self.at_low - line_at_low, self.at_high - line_at_high


def _without_spike(stage: Stage, h: Interval, on_potential: Tensor) -> _Piece:
    """What f is below the threshold: the potential stays."""
    _, above = stage.around
    silent = Interval(h.low, h.high.clamp(max=above))
    at_low = on_potential * silent.low
    at_high = on_potential * silent.high
    return _Piece(silent, at_low, at_high)


def _with_spike(stage: Stage, h: Interval, on_spike: Tensor, on_potential: Tensor) -> _Piece:
    """What f is from the threshold on: a spike, and the potential after the reset."""
    below, _ = stage.around
    fired = Interval(h.low.clamp(min=below), h.high)
    if not stage.soft:
        value = on_spike + on_potential * stage.rest
        return _Piece(fired, value, value)
    at_low = on_spike + on_potential * (fired.low - stage.threshold)
    at_high = on_spike + on_potential * (fired.high - stage.threshold)
    return _Piece(fired, at_low, at_high)


def raised(maps: Maps, run: RelaxedRun, samples: Tensor, weights: Tensor, *, rounds: int) -> Lower:
    """:func:`minimum` with slopes that gradient ascent has chosen. It ends for a row when its bound
    is above 0, so that no row depends on the others.

    Slopes of spikes that were assumed or ruled out are free as well, which puts a multiplier on the
    assumption.

    Source: alpha- and beta-CROWN (Xu et al., ICLR 2021; Wang et al., NeurIPS 2021).
    """
    best = minimum(maps, run, samples, weights)
    weak = best.weak()
    if rounds == 0 or not best.slopes or not len(weak):
        return best
    ascent = _Ascent(
        maps=maps,
        run=run,
        samples=samples[weak],
        weights=weights[weak],
        first=best.of(weak),
    )
    for turn in range(rounds):
        found = ascent.turn(turn)
        improved = _better(best.of(weak), found)
        best.put(weak, improved)
        left = improved.weak()
        if not len(left):
            break
        if 2 * len(left) <= len(weak):  # the others are done
            weak = weak[left]
            ascent.keep(left)
    return best


class _Ascent:
    """Gradient ascent on the slopes of some rows, by Adam with a rate that falls."""

    def __init__(
        self, maps: Maps, run: RelaxedRun, samples: Tensor, weights: Tensor, first: Lower
    ) -> None:
        self.maps = maps
        self.run = run
        self.samples = samples
        self.weights = weights
        self.start = first.slopes
        self.scales: Slopes = {}
        self.moved: Slopes = {}
        for (number, t), slope in self.start.items():
            step = run.stages[number].steps[t]
            width = (step.upper - step.lower)[samples].clamp(min=1e-9)
            spread = first.gaps[number, t] / width + 0.1 * slope.abs()
            self.scales[number, t] = spread * step.free[samples]
            self.moved[number, t] = torch.zeros_like(slope, requires_grad=True)
        moved = list(self.moved.values())
        self.optimizer = torch.optim.Adam(moved, lr=0.2, maximize=True)

    def turn(self, number: int) -> Lower:
        """The bounds with the slopes so far, which then take a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.2 * 0.95**number
        moved = list(self.moved.values())
        with torch.enable_grad():
            slopes = {}
            for key, start in self.start.items():
                slopes[key] = start + self.scales[key] * self.moved[key]
            found = minimum(self.maps, self.run, self.samples, self.weights, slopes=slopes)
            gradients = torch.autograd.grad(found.value.sum(), moved, allow_unused=True)
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        return found

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, each as if the others had never been there."""
        self.samples = self.samples[rows]
        self.weights = self.weights[rows]
        for parts in (self.start, self.scales):
            for key, part in parts.items():
                parts[key] = part[rows]
        states = self.optimizer.state
        for key, parameter in self.moved.items():
            kept = parameter.detach()[rows].requires_grad_()
            state = states.pop(parameter, {})
            for name, value in state.items():
                if value.shape == parameter.shape:  # else the number of steps
                    state[name] = value[rows]
            states[kept] = state
            self.moved[key] = kept
        self.optimizer.param_groups[0]["params"] = list(self.moved.values())


def _better(first: Lower, second: Lower) -> Lower:
    """Row by row the larger bound; one above 0 stays as it is."""
    proved = first.value > 0
    take = (second.value.detach() > first.value) & ~proved

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(along(take, 0, a.ndim), b.detach(), a)

    slopes = {}
    gaps = {}
    for key in first.slopes:
        slopes[key] = chosen(first.slopes[key], second.slopes[key])
        gaps[key] = chosen(first.gaps[key], second.gaps[key])
    return Lower(
        value=chosen(first.value, second.value),
        slopes=slopes,
        gaps=gaps,
        weights=chosen(first.weights, second.weights),
    )


def _slope(silent: _Piece, fired: _Piece, threshold: float) -> Tensor:
    """Slope of the edge of the lower convex hull that is highest in the middle; any slope is
    sound.

    The hull of f has an edge from end to end, or two that meet at the jump, at the lower of f's two
    values there.
    """
    low = silent.h.low
    high = fired.h.high
    width = (high - low).clamp(min=1e-12)
    least_width = 1e-3 * width
    jump = torch.minimum(torch.full_like(low, threshold), high).maximum(low)
    at_jump = torch.minimum(silent.at_high, fired.at_low)
    whole = (fired.at_high - silent.at_low) / width
    left = (at_jump - silent.at_low) / (jump - low).maximum(least_width)
    right = (fired.at_high - at_jump) / (high - jump).maximum(least_width)
    middle_is_right = low + high > 2 * jump
    edge = torch.where(middle_is_right, right, left)
    return torch.where(left < right, edge, whole)
