"""Exact decisions for small networks by a mixed-integer program."""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.ops.trains.config import Constants
from sj_robust.proofs._scipy import scipy_module
from sj_robust.proofs.bounds import LayerCall
from sj_robust.proofs.changes import Changes
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.moves import Shifts
from sj_robust.proofs.neurons import counts
from sj_robust.proofs.points import Points
from sj_robust.proofs.rules import Bounds, Pooling
from sj_robust.proofs.spiking import Float32Spiking
from sj_robust.proofs.structure import by_row, laid_out
from sj_robust.proofs.windows import constants_of

__all__ = ["Programs"]

_scipy = partial(scipy_module, wanted_by='method "mip"')

_TOLERANCE = 1e-6
"""Widens every equation by more than HiGHS' own tolerance of 1e-7."""

_LARGEST = 1e6
"""Largest coefficient of a program that is solved; with larger ones HiGHS was seen to be wrong."""

_ROUNDING = 1e-10
"""Covers float64's own rounding of a sum of terms, in units of the sum of their absolute values."""

_CLEAR = 1e-5
"""How far a second attempt keeps potentials from the threshold and logits from a draw."""

_OPEN = 128
"""Undecided spikes of an image up to which :meth:`Programs.witness` asks a program."""


@dataclass(frozen=True)
class _Bounded:
    """An image whose programs have joint bounds as their constants.

    Attributes:
        run: The run of its bounds.
        error: How far float32's logits can be from the map of the leaves, [classes].
        lead: What the right class leads by at least over each other one, [K].
        weights: Weights on the logits that give these leads, [K, classes].
    """

    run: JointRun
    error: Tensor
    lead: Tensor
    weights: Tensor

    def open_rivals(self) -> list[Tensor]:
        """Weights of the rivals that bounds leave open, the closest one first; NaN is no bound."""
        numbers: list[int] = self.lead.argsort().tolist()
        return [self.weights[k] for k in numbers if not self.lead[k] > 0]


class Programs:
    """Mixed-integer programs of the images of a network. 混合整数规划。

    Equation: for every rival k a program over the input in the box, a binary s per undecided spike,
    and v of every neuron and step that one may have reset, feasible if some input lets the rival
    draw level; h and the logits are affine in them::

        h[t] = lambda v[t-1] + p[t] (A s + b) + (1 - lambda) v_reset   (-+ error)
        h >= h_lo + (threshold - h_lo) s,    h < threshold + (h_hi - threshold) s
        v between h (s = 0) and v_reset (s = 1), big-M from the bounds; soft: v = h - threshold s
        logit_y - logit_k <= error

    The bounds are joint ones. The errors are those of float32 and a tolerance, so that what is
    infeasible is impossible for the network that runs. A solution is tried on that network; if it
    does not fool it, a second program keeps it clear of thresholds and draws.

    HiGHS computes in floating point, so that its "infeasible" is no proof. It is one if a tree of
    linear programs says so as well, by the multipliers of every leaf (:class:`_Tree`). A program
    with coefficients beyond 1e6 is not solved.

    Args:
        over_time: How the network treats time.
        points: Points of the balls that are tried on it.

    Source: as Tjeng et al. (ICLR 2019) for ReLU networks; solved by HiGHS (Huangfu and Hall 2018).
    """

    def __init__(self, over_time: OverTime, points: Points) -> None:
        """No program is made yet."""
        self._over_time = over_time
        self._points = points
        self._matrices = _Matrices(over_time.maps)

    def decided(
        self, image: Tensor, label: Tensor, time_limit: float
    ) -> tuple[float, Tensor | None]:
        """Lower bound of the lead of one image [1, *] (-inf if unknown), or an image of its ball
        that is classified wrong.
        """
        end = time.monotonic() + time_limit
        found = self._points.broken(image, label)
        if found is not None:
            return -torch.inf, found
        bounded = self._bounded(image, label)
        proved = bounded.lead[bounded.lead > 0]
        lead = float(proved.amin()) if len(proved) else torch.inf
        for weights in bounded.open_rivals():
            covered = self._program(bounded, _Rounding(clear=False), weights)
            solution = covered.solve(end)
            if solution.is_impossible and _Tree(covered).is_closed(end):
                lead = min(lead, _TOLERANCE)
                continue
            fooling = self._fooling(image, label, solution)
            if fooling is None and solution.point is not None:
                clear = self._program(bounded, _Rounding(clear=True), weights)
                fooling = self._fooling(image, label, clear.solve(end))
            return -torch.inf, fooling
        return lead, None

    def witness(self, image: Tensor, label: Tensor, nodes: int) -> Tensor | None:
        """An image of the ball of one image [1, *] that the network gets wrong; None if none was
        found.

        For every rival one program, that which keeps clear of thresholds and draws, with at most so
        many nodes of its tree. It proves nothing.
        """
        found = self._points.broken(image, label)
        if found is not None:
            return found
        bounded = self._bounded(image, label)
        for weights in bounded.open_rivals():
            program = self._program(bounded, _Rounding(clear=True), weights)
            if len(program.binaries) > _OPEN:
                break
            fooling = self._fooling(image, label, program.solve(math.inf, nodes))
            if fooling is not None:
                return fooling
        return None

    def _bounded(self, image: Tensor, label: Tensor) -> _Bounded:
        """Joint bounds of one image [1, *]."""
        maps = self._over_time.maps
        run = JointRun(maps.neurons, 1, over_time=self._over_time)
        logits = maps.bounded(run, image, self._points.eps)
        every = torch.eye(logits.shape[1], dtype=torch.float64, device=image.device)
        is_rival = every[label[0]] == 0
        lead = -run.lead(logits, label)[0]
        weights = every[label] - every
        return _Bounded(run, error=logits.error[0], lead=lead[is_rival], weights=weights[is_rival])

    def _program(
        self, bounded: _Bounded, rounding: "_Rounding", weights: Tensor
    ) -> "_Inequalities":
        """The program of one rival."""
        return _Program(bounded, self._matrices, rounding).of_rival(weights)

    def _fooling(self, image: Tensor, label: Tensor, solution: "_Solution") -> Tensor | None:
        """The image of a solution, if there is one and the network classifies it wrong."""
        if solution.point is None:
            return None
        values = solution.point[: image.numel()]
        pixels = torch.as_tensor(values, device=image.device)
        candidate = self._points.solution(image, pixels.view(image.shape))
        with torch.no_grad():
            wrong = self._points.logits(candidate).argmax(1) != label
        return candidate if bool(wrong) else None


@dataclass(frozen=True)
class _Rounding:
    """How a program takes what float32 rounds.

    Either all of it may happen, so that what is infeasible is impossible for the network that runs;
    or none of it matters, since a solution keeps so ``clear`` of thresholds and draws that the
    network that runs most likely agrees.
    """

    clear: bool

    def slack(self, error: Any) -> Any:
        """How far values may be from an equation, if float32 may be so far from it."""
        return _TOLERANCE if self.clear else _TOLERANCE + error

    def margin(self, error: Any) -> Any:
        """How far potentials keep from a threshold."""
        return _CLEAR + 10 * error if self.clear else -_TOLERANCE

    def lead(self, value: float, error: float) -> float:
        """What must not be above 0 where a rival draws level, from the lead."""
        if self.clear:
            return value - _TOLERANCE + 10 * _CLEAR
        return value - error - _TOLERANCE


@dataclass(frozen=True)
class _Solution:
    """What HiGHS says of a program: a point, that there is none, or nothing in time."""

    point: Any = None
    is_impossible: bool = False


@dataclass(frozen=True)
class _LinearProgram:
    """The least ``costs @ x`` over all x of a box with ``matrix @ x <= limits``.

    Attributes:
        costs: [columns].
        matrix: Sparse [rows, columns].
        limits: [rows].
        lower: [columns].
        upper: [columns].
    """

    costs: Any
    matrix: Any
    limits: Any
    lower: Any
    upper: Any

    def solved(self) -> Any:
        """What HiGHS finds."""
        return _scipy("optimize").linprog(
            self.costs,
            A_ub=self.matrix,
            b_ub=self.limits,
            bounds=np.stack([self.lower, self.upper], 1),
            method="highs-ds",
        )

    def fixed(self, column: int, value: float) -> "_LinearProgram":
        """The part of the box where a column has a value."""
        lower = self.lower.copy()
        upper = self.upper.copy()
        lower[column] = value
        upper[column] = value
        return replace(self, lower=lower, upper=upper)

    def largest(self) -> Any:
        """Largest absolute values of the columns."""
        return np.maximum(np.abs(self.lower), np.abs(self.upper))

    def safe_minimum(self, multipliers: Any) -> float:
        """Lower bound of the costs from multipliers of the rows; see :class:`_Tree`."""
        reduced = self.costs + self.matrix.T @ multipliers
        least = np.minimum(reduced * self.lower, reduced * self.upper)
        value = least.sum() - multipliers @ self.limits
        sizes = np.abs(self.costs) + np.abs(self.matrix).T @ multipliers
        size_of_costs = sizes @ self.largest()
        size_of_limits = multipliers @ np.abs(self.limits)
        return float(value - _ROUNDING * (size_of_costs + size_of_limits))


@dataclass(frozen=True)
class _Inequalities:
    """Whether ``costs @ x + shift <= 0`` for some x of a linear program, binaries being 0 or 1.

    Attributes:
        linear: The program; the largest entry of a row is in (1/2, 1].
        shift: A number.
        binaries: Numbers of the columns that must be 0 or 1.
        largest: Largest coefficient of all before rows were scaled.
    """

    linear: _LinearProgram
    shift: float
    binaries: Any
    largest: float

    def solve(self, end: float, nodes: int | None = None) -> _Solution:
        """What HiGHS says until a time, or with so many nodes at most."""
        optimize = _scipy("optimize")
        left = end - time.monotonic()
        if left <= 0 or not self.largest <= _LARGEST:
            return _Solution()
        linear = self.linear
        no_costs = np.zeros(len(linear.costs))
        integral = np.zeros(len(linear.costs))
        integral[self.binaries] = 1.0
        rows = optimize.LinearConstraint(linear.matrix, -np.inf, linear.limits)
        draws_level = optimize.LinearConstraint(linear.costs[None], -np.inf, -self.shift)
        options: dict[str, Any] = {"time_limit": left}
        if nodes is not None:
            options = {"node_limit": nodes}
        result = optimize.milp(
            no_costs,
            integrality=integral,
            bounds=optimize.Bounds(linear.lower, linear.upper),
            constraints=[rows, draws_level],
            options=options,
        )
        says_infeasible = result.status == 2
        return _Solution(result.x, is_impossible=result.x is None and says_infeasible)


class _Tree:
    """Branch and bound over the binaries, every leaf of which is closed by a bound of its own.

    Equation, for any multipliers y >= 0, in particular those that HiGHS gives for the linear
    program of a leaf with its box [l, u]::

        c x >= -y b + sum_j min(d_j l_j, d_j u_j),    d = c + y G,    if G x <= b

    computed in float64 with what that rounds taken away. A leaf is closed if this is above 0 with
    the costs c of the lead, or with those of the largest violation of a row: then no x of its box
    satisfies all rows.

    Source: Neumaier and Shcherbina, "Safe bounds in linear and mixed-integer linear programming"
        (Mathematical Programming, 2004).
    """

    def __init__(self, program: _Inequalities) -> None:
        """See the class."""
        self.program = program
        linear = program.linear
        column = np.ones((len(linear.limits), 1))
        self.relaxed = _scipy("sparse").hstack([linear.matrix, -column]).tocsr()
        largest_sums = np.abs(linear.matrix) @ linear.largest()
        violations = largest_sums + np.abs(linear.limits)
        self.most = float(violations.max(initial=1.0))

    def is_closed(self, end: float) -> bool:
        """Whether all leaves are, found in time."""
        waiting = [self.program.linear]
        while waiting:
            if time.monotonic() > end:
                return False
            leaf = waiting.pop()
            found = leaf.solved()
            if found.x is None:
                if not self._is_empty(leaf):
                    return False
                continue
            multipliers = _multipliers(found)
            if leaf.safe_minimum(multipliers) + self.program.shift > 0:
                continue
            column = self._branch(found.x, multipliers)
            if column is None:
                return False
            waiting += [leaf.fixed(column, spike) for spike in (0.0, 1.0)]
        return True

    def _is_empty(self, leaf: _LinearProgram) -> bool:
        """Whether no x of a box satisfies all rows: the least violation is above 0."""
        costs = np.zeros(len(leaf.costs) + 1)
        costs[-1] = 1.0
        violation = _LinearProgram(
            costs=costs,
            matrix=self.relaxed,
            limits=leaf.limits,
            lower=np.append(leaf.lower, 0.0),
            upper=np.append(leaf.upper, self.most),
        )
        found = violation.solved()
        return found.x is not None and violation.safe_minimum(_multipliers(found)) > 0

    def _branch(self, point: Any, multipliers: Any) -> int | None:
        """The binary that is none in a solution and has the most weight in its active rows."""
        binaries = self.program.binaries
        values = point[binaries]
        broken = np.abs(values - values.round()) > 1e-7
        if not broken.any():
            return None
        sizes = np.abs(self.program.linear.matrix)
        weight = (sizes.T @ multipliers)[binaries]
        chosen = np.where(broken, 1e-9 + weight, 0.0).argmax()
        return int(binaries[chosen])


def _multipliers(found: Any) -> Any:
    """Multipliers >= 0 of the rows; any are sound."""
    positive = np.maximum(-found.ineqlin.marginals, 0.0)
    return np.nan_to_num(positive, posinf=0.0)


@dataclass(frozen=True)
class _Affine:
    """Values of a float32 network, each within ``matrix @ columns + shift -+ slack``.

    Attributes:
        matrix: Sparse [values, columns so far].
        shift: [values].
        slack: [values].
    """

    matrix: Any
    shift: Any
    slack: Any

    def at(self, rows: Any) -> "_Affine":
        """Some of the values."""
        return _Affine(self.matrix[rows], self.shift[rows], self.slack[rows])

    def times(self, factor: Any) -> "_Affine":
        """A multiple, by a number or one per value."""
        scale = _diagonal(np.broadcast_to(factor, self.shift.shape))
        return _Affine(
            matrix=scale @ self.matrix,
            shift=factor * self.shift,
            slack=np.abs(factor) * self.slack,
        )

    def through(self, matrix: Any) -> "_Affine":
        """A linear map of the values, which are exact."""
        no_slack = np.zeros(matrix.shape[0])
        return _Affine(matrix @ self.matrix, matrix @ self.shift, no_slack)

    def plus(self, other: "_Affine") -> "_Affine":
        """A sum."""
        size = max(self.matrix.shape[1], other.matrix.shape[1])
        return _Affine(
            matrix=_wide(self.matrix, size) + _wide(other.matrix, size),
            shift=self.shift + other.shift,
            slack=self.slack + other.slack,
        )

    def minus(self, other: "_Affine") -> "_Affine":
        """A difference."""
        return self.plus(other.times(-1.0))

    def moved(self, shift: Any, slack: Any = 0.0) -> "_Affine":
        """Plus constants, and with more slack."""
        return _Affine(self.matrix, self.shift + shift, self.slack + slack)


@dataclass(frozen=True)
class _Columns:
    """Columns of a program: their box, and which are 0 or 1."""

    lower: Any
    upper: Any
    integral: Any


@dataclass(frozen=True)
class _Rows:
    """Rows of a program: ``matrix @ x <= limits``; a limit may be that of all."""

    matrix: Any
    limits: Any


class _Program:
    """The program of one image and one rival: a binary per undecided spike, and what hangs on them.

    What is decided is put into the equations of what is not, so that the columns are the input,
    undecided spikes, and potentials that a reset may or may not have changed.
    """

    def __init__(self, bounded: _Bounded, matrices: "_Matrices", rounding: _Rounding) -> None:
        """Variables and constraints of the network; the rival is added by :meth:`of_rival`."""
        self.bounded = bounded
        self.run = run = bounded.run
        self.rounding = rounding
        self.size = 0
        self.columns: list[_Columns] = []
        self.rows: list[_Rows] = []
        self.leaves: dict[int, _Affine] = {}
        self.potentials: dict[str, _Affine] = {}
        box = run.leaves[0]
        centre = _flat(box.centre)
        if run.changed is None:
            radius = _flat(box.radius)
            self.leaves[0] = self.variables(centre - radius, centre + radius)
        else:
            self.leaves[0] = self._changed(run.changed, centre)
        self.layers = {name: _Layer.of(run, name) for name in run.neurons}
        for number, call in enumerate(run.layer_calls):
            current = self.through(matrices.of(run, number))
            if isinstance(call.by, Neuron) and counts(call.by) is None:
                self._neurons(self.layers[call.by.name], call, current)
            elif call.pooling is None:
                raise NotImplementedError(
                    "no program is known for a network with ReLU, products or other functions; "
                    "use the method ibp or joint"
                )
            else:
                windows = matrices.windows(number, call, call.pooling)
                self._pooled(call, call.pooling, current, windows)
        self.logits = self.through(matrices.of(run, -1))

    def _changed(self, frames: Bounds, values: Any) -> _Affine:
        """Event frames, of which at most some values or events change."""
        assert frames.changes is not None
        if isinstance(frames.changes, Shifts):
            return self._moved(frames.changes, values)
        added, removed = _numbers(frames.changes)
        if not np.array_equal(added, 1.0 - values) or not np.array_equal(removed, values):
            return self._added_and_removed(frames.changes, values)
        found = self.binaries(len(values))
        changes = found.times(1.0 - 2.0 * values).moved(values)
        self.sum_at_most(changes, frames.changes.budget)
        return found

    def _added_and_removed(self, changes: Changes, values: Any) -> _Affine:
        """Numbers of events, with binary variables a and r for each that is added and removed.

        Equation: ``x~ = x + a - r,  sum of all a and r <= k``, r at most x.
        """
        most = len(changes.up)
        added, removed = _numbers(changes)
        found = self.variables(values - removed, values + added)
        new = self._events(added, most)
        gone = self._events(removed, most)
        self.zero(found.plus(gone).minus(new).moved(-values))
        self.sum_at_most(gone.plus(new), changes.budget)
        return found

    def _moved(self, moves: Shifts, values: Any) -> _Affine:
        """Event frames, of which at most some events move in time.

        Equation, with g[t] events of a pixel and polarity that leave frame t and n[t] that come, a
        binary variable for each, and G and N their sums over time::

            x~ = x - g + n,   sum of all g <= m,   g <= x,   x~ <= 1 if frames are binary
            G[t] <= N[t + s],   N[t] <= G[t + s],   with t + s = T - 1 at the end

        By the last line every event that leaves has its own place at most s frames away: the k-th
        that leaves is the k-th that comes.
        """
        ball = moves.ball
        frames = moves.frames
        assert ball is not None
        assert frames is not None
        most = ball.most
        coming, leaving = ball.reach(frames)
        may_come = _flat(coming)
        may_leave = _flat(leaving)
        near = _flat(ball.near(frames))
        if not ball.counts:
            near = np.minimum(near, 1.0)
        found = self.variables(
            lower=values - np.minimum(may_leave, most),
            upper=values + np.minimum(may_come, most),
        )
        gone = self._events(may_leave, most)
        new = self._events(near, most)
        self.zero(found.plus(gone).minus(new).moved(-values))
        T = frames.shape[1]
        until = np.tril(np.ones((T, T)))
        last = np.minimum(np.arange(T) + ball.largest_shift, T - 1)
        lines = _scipy("sparse").identity(len(values) // T)
        so_far = _scipy("sparse").kron(until, lines).tocsr()
        a_shift_later = _scipy("sparse").kron(until[last], lines).tocsr()
        for first, second in ((gone, new), (new, gone)):
            waiting = first.through(so_far).minus(second.through(a_shift_later))
            self.at_most(waiting, 0.0)
        self.sum_at_most(gone, moves.budget)
        return found

    def _events(self, largest: Any, most: int) -> _Affine:
        """Numbers of events from 0 to ``largest``, of ``most`` binary variables each."""
        nothing = np.zeros(len(largest))
        found = self.constant(nothing)
        variables = min(most, int(largest.max(initial=0.0)))
        for number in range(1, variables + 1):
            there = 1.0 * (largest >= number)
            found = found.plus(self.variables(nothing, there, integral=True))
        return found

    def of_rival(self, weights: Tensor) -> _Inequalities:
        """The program whose costs are the lead that the weights give, with rows scaled."""
        on_logits = _flat(weights)
        on_columns = on_logits @ _wide(self.logits.matrix, self.size)
        costs = np.asarray(on_columns).ravel()
        shift = float(on_logits @ self.logits.shift)
        errors = weights.abs() * self.bounded.error
        error = float(errors.sum())
        lower = np.concatenate([part.lower for part in self.columns])
        upper = np.concatenate([part.upper for part in self.columns])
        integral = np.concatenate([part.integral for part in self.columns])
        rows = self._needed_rows(lower, upper)
        sizes = np.zeros(0)
        if len(rows.limits):
            sizes = abs(rows.matrix).max(1).toarray().ravel()
        # Powers of two, so that nothing is rounded.
        exponents = np.ceil(np.log2(np.where(sizes > 0, sizes, 1.0)))
        factors = np.exp2(-exponents)
        linear = _LinearProgram(
            costs=costs,
            matrix=_diagonal(factors) @ rows.matrix,
            limits=factors * rows.limits,
            lower=lower,
            upper=upper,
        )
        largest_cost = np.abs(costs).max(initial=0.0)
        largest_of_rows = sizes.max(initial=0.0)
        return _Inequalities(
            linear=linear,
            shift=self.rounding.lead(shift, error),
            binaries=np.flatnonzero(integral),
            largest=float(max(largest_cost, largest_of_rows)),
        )

    def _needed_rows(self, lower: Any, upper: Any) -> _Rows:
        """The rows that do not hold everywhere in the box."""
        matrix = _scipy("sparse").csr_matrix((0, self.size))
        limits = np.zeros(0)
        if self.rows:
            parts = [_wide(part.matrix, self.size) for part in self.rows]
            matrix = _scipy("sparse").vstack(parts).tocsr()
            of_parts = [np.broadcast_to(part.limits, part.matrix.shape[0]) for part in self.rows]
            limits = np.concatenate(of_parts)
        highest = matrix.maximum(0) @ upper + matrix.minimum(0) @ lower
        needed = highest > limits
        return _Rows(matrix[needed], limits[needed])

    def through(self, affine: "_Map") -> _Affine:
        """An affine map of the leaves."""
        found = self.constant(affine.shift)
        for leaf, matrix in affine.of_leaves.items():
            found = found.plus(self.leaves[leaf].through(matrix))
        return found

    def constant(self, values: Any) -> _Affine:
        """Values that nothing moves."""
        matrix = _scipy("sparse").csr_matrix((len(values), self.size))
        exact = np.array(values, dtype=float)
        no_slack = np.zeros(len(values))
        return _Affine(matrix, exact, no_slack)

    def variables(self, lower: Any, upper: Any, *, integral: bool = False) -> _Affine:
        """Values that are new columns."""
        count = len(lower)
        columns = np.arange(self.size, self.size + count)
        self.size += count
        is_integral = np.full(count, float(integral))
        self.columns.append(_Columns(lower, upper, is_integral))
        matrix = _places(np.arange(count), columns, (count, self.size))
        return _Affine(matrix, np.zeros(count), np.zeros(count))

    def binaries(self, count: int) -> _Affine:
        """So many new columns that are 0 or 1."""
        return self.variables(np.zeros(count), np.ones(count), integral=True)

    def at_most(self, values: _Affine, upper: Any) -> None:
        """Inequalities that hold for some values within the slack."""
        limits = upper - values.shift + values.slack
        self.rows.append(_Rows(values.matrix, limits))

    def at_least(self, values: _Affine, lower: Any) -> None:
        """The same from below."""
        self.at_most(values.times(-1.0), -lower)

    def zero(self, values: _Affine) -> None:
        """Equations that hold for some values within the slack."""
        self.at_most(values, 0.0)
        self.at_least(values, 0.0)

    def sum_at_most(self, values: _Affine, upper: float) -> None:
        """An inequality that holds for the sum of exact values."""
        self.at_most(values.through(_ones(len(values.shift))), upper)

    def _neurons(self, layer: "_Layer", call: LayerCall, current: _Affine) -> None:
        """Spikes and potentials of a call of a spiking layer."""
        errors = _flat(call.current.error)
        spikes = []
        for first in range(0, len(errors), layer.count):
            own = slice(first, first + layer.count)
            step = layer.steps[call.read.first + first // layer.count]
            rounding = step.rounding + abs(step.gain) * errors[own]
            charged = self._charged(layer, step, current.at(own), rounding)
            open_ones = np.flatnonzero(step.is_open)
            spike = self._spike(step.sure, open_ones)
            self._open_spikes(layer, step, charged, spike, rounding, open_ones)
            spikes.append(spike)
            layer.potential = self._after_reset(layer, step, charged, spike)
        self.leaves[call.read.leaf] = _stacked(spikes, self.size)

    def _charged(self, layer: "_Layer", step: "_Step", current: _Affine, rounding: Any) -> _Affine:
        """The charged potentials h of a step."""
        start = self.constant(np.full(len(rounding), layer.initial))
        before = start if layer.potential is None else layer.potential
        decay = layer.constants.decay
        charged = current.times(step.gain).plus(before.times(decay))
        towards_rest = (1.0 - decay) * layer.constants.rest
        return charged.moved(towards_rest, self.rounding.slack(rounding))

    def _spike(self, sure: Any, open_ones: Any) -> _Affine:
        """Spikes of one step: decided, or a binary each."""
        binaries = self.binaries(len(open_ones))
        return self.constant(sure).plus(_spread(binaries, open_ones, len(sure)))

    def _open_spikes(
        self,
        layer: "_Layer",
        step: "_Step",
        charged: _Affine,
        spike: _Affine,
        rounding: Any,
        open_ones: Any,
    ) -> None:
        """A spike if and only if the potential reaches the threshold.

        Equation, for h in [low, high]::

            h >= low + (reached - low) s,    h <= missed + (high - missed) s
        """
        h = charged.at(open_ones)
        s = spike.at(open_ones)
        low = step.low[open_ones]
        high = step.high[open_ones]
        margin = self.rounding.margin(rounding[open_ones])
        reached = layer.constants.below + margin
        missed = layer.constants.above - margin
        rise = np.maximum(reached - low, 0.0)
        room = np.maximum(high - missed, 0.0)
        self.at_least(h.plus(s.times(-rise)), low)
        nearly_low = np.maximum(missed, low)
        self.at_most(h.plus(s.times(-room)), nearly_low)

    def _after_reset(
        self, layer: "_Layer", step: "_Step", charged: _Affine, spike: _Affine
    ) -> _Affine:
        """Potentials after the reset; right for decided spikes, and for those that matter."""
        constants = layer.constants
        size = np.maximum(np.abs(step.low), np.abs(step.high))
        slack = np.broadcast_to(self.rounding.slack(constants.of_reset(size)), size.shape)
        if constants.soft:
            lowered = charged.plus(spike.times(-constants.threshold))
            return lowered.moved(0.0, slack)
        decided = charged.times(1.0 - step.possible)
        decided = decided.moved(step.possible * constants.rest, slack)
        kept = np.flatnonzero(step.is_open & step.open_later)
        others = np.ones(len(size))
        others[kept] = 0.0
        h = charged.at(kept).moved(0.0, slack[kept])
        undecided = self._hard_reset(constants.rest, step, h, spike.at(kept), slack[kept], kept)
        return decided.times(others).plus(_spread(undecided, kept, len(size)))

    def _hard_reset(
        self, rest: float, step: "_Step", h: _Affine, s: _Affine, slack: Any, kept: Any
    ) -> _Affine:
        """New columns v of potentials that are h where there is no spike, and rest where there is.

        Equation, with ``above`` and ``below`` the distances of h's ends from rest::

            -above s <= v - h <= below s,    -below (1 - s) <= v - rest <= above (1 - s)
        """
        low = step.low[kept]
        high = step.high[kept]
        above = np.maximum(high - rest, 0.0)
        below = np.maximum(rest - low, 0.0)
        v = self.variables(
            lower=np.minimum(low, rest) - 1.0,
            upper=np.maximum(high, rest) + 1.0,
        )
        with_above = s.times(above)
        with_below = s.times(-below)
        change = v.minus(h)
        self.at_most(change.plus(with_below), 0.0)
        self.at_least(change.plus(with_above), 0.0)
        self.at_most(v.plus(with_above).moved(0.0, slack), rest + above)
        self.at_least(v.plus(with_below).moved(0.0, slack), rest - below)
        return v

    def _pooled(
        self, call: LayerCall, pooling: Pooling, current: _Affine, windows: "_Windows"
    ) -> None:
        """Maxima: no input of a window is above its maximum, and one, which a binary chooses, is
        equal to it.
        """
        lowest = _flat(pooling(call.current.lower))
        highest = _flat(pooling(call.current.upper))
        maxima = self.variables(lowest - _TOLERANCE, highest + _TOLERANCE)
        self.leaves[call.read.leaf] = maxima
        error = _flat(call.current.error)
        values = current.moved(0.0, self.rounding.slack(error))
        inputs = windows.inputs
        outputs = windows.outputs
        count = len(inputs)
        chosen = self.binaries(count)
        above = maxima.at(outputs).minus(values.at(inputs))
        low = _flat(call.current.lower)[inputs]
        room = np.maximum(highest[outputs] - low, 0.0)
        self.at_least(above, -_TOLERANCE)
        self.at_most(above.plus(chosen.times(room)), room + _TOLERANCE)
        of_each = _places(outputs, np.arange(count), (len(highest), count))
        self.at_least(chosen.through(of_each), 1.0)


@dataclass(frozen=True)
class _Step:
    """Joint bounds of one step of a spiking layer, each [neurons].

    Attributes:
        gain: Gain of the current.
        low: Smallest charged potential h, less a tolerance.
        high: Largest, likewise.
        sure: Whether there is a spike for sure, 0 or 1.
        possible: Whether there may be one.
        rounding: How far float32's h can be from the charge equation with the current that float32
            gives.
        open_later: Whether a later spike is undecided.
    """

    gain: float
    low: Any
    high: Any
    sure: Any
    possible: Any
    rounding: Any
    open_later: Any

    @property
    def is_open(self) -> Any:
        """Which spikes are undecided."""
        return self.sure != self.possible


@dataclass
class _Layer:
    """A spiking layer in a program.

    Attributes:
        constants: Its numbers.
        initial: Its potential before the first step.
        steps: Bounds of its steps over all calls.
        potential: Its potential so far; None before the first step.
    """

    constants: Constants
    initial: float
    steps: list[_Step]
    potential: _Affine | None = None

    @property
    def count(self) -> int:
        """Number of neurons."""
        return len(self.steps[0].low)

    @classmethod
    def of(cls, run: JointRun, name: str) -> "_Layer":
        """A layer as the run of one image has bounded it."""
        memory = run.memories[name]
        spiking = Float32Spiking(run.neurons[name], run.layers[name])
        constants = constants_of(spiking, len(memory.steps))
        steps: list[_Step] = []
        open_later: Any = False
        for t in reversed(range(len(memory.steps))):
            kept = memory.steps[t]
            gain = constants.gains[t]
            before = memory.steps[t - 1].v.size() if t else abs(spiking.initial)
            size = before + abs(gain) * memory.rounded[t].size() + abs(constants.rest)
            step = _Step(
                gain=gain,
                low=_flat(kept.h.low) - _TOLERANCE,
                high=_flat(kept.h.high) + _TOLERANCE,
                sure=_flat(kept.spikes.low),
                possible=_flat(kept.spikes.high),
                rounding=_flat(constants.of_charge(size)),
                open_later=open_later,
            )
            open_later = open_later | step.is_open
            steps.insert(0, step)
        return cls(constants, spiking.initial, steps)


def _wide(matrix: Any, size: int) -> Any:
    """A sparse matrix with as many columns."""
    parts = (matrix.data, matrix.indices, matrix.indptr)
    return _scipy("sparse").csr_matrix(parts, shape=(matrix.shape[0], size))


def _diagonal(values: Any) -> Any:
    return _scipy("sparse").diags(values).tocsr()


def _ones(count: int) -> Any:
    """The map from so many values to their sum."""
    return _scipy("sparse").csr_matrix(np.ones((1, count)))


def _places(rows: Any, columns: Any, shape: tuple[int, int]) -> Any:
    """A sparse matrix with ones in some places."""
    ones = np.ones(len(rows))
    return _scipy("sparse").csr_matrix((ones, (rows, columns)), shape=shape)


def _spread(values: _Affine, rows: Any, count: int) -> _Affine:
    """Values in some of so many rows, 0 in the others."""
    place = _places(rows, np.arange(len(rows)), (count, len(rows)))
    return _Affine(place @ values.matrix, place @ values.shift, place @ values.slack)


def _stacked(parts: list[_Affine], size: int) -> _Affine:
    matrices = [_wide(part.matrix, size) for part in parts]
    return _Affine(
        matrix=_scipy("sparse").vstack(matrices).tocsr(),
        shift=np.concatenate([part.shift for part in parts]),
        slack=np.concatenate([part.slack for part in parts]),
    )


@dataclass(frozen=True)
class _Map:
    """An affine map of the leaves.

    Attributes:
        of_leaves: By leaf a matrix [size of the current, size of the leaf].
        shift: [size of the current].
    """

    of_leaves: dict[int, Any]
    shift: Any


@dataclass(frozen=True)
class _Windows:
    """Numbers of outputs and inputs of a max pooling that belong together."""

    outputs: Any
    inputs: Any


class _Matrices:
    """The affine maps as sparse matrices, made once for a network."""

    def __init__(self, maps: Maps) -> None:
        """Nothing is made yet."""
        self._maps = maps
        self._affine: dict[int, _Map] = {}
        self._windows: dict[int, _Windows] = {}

    def of(self, run: JointRun, number: int) -> _Map:
        """The map to the current of a call; -1 is that to the logits."""
        if number not in self._affine:
            self._affine[number] = self._map(run, number)
        return self._affine[number]

    def windows(self, number: int, call: LayerCall, pooling: Pooling) -> _Windows:
        """Windows of a max pooling, of all time steps."""
        if number not in self._windows:
            self._windows[number] = _windows_of(call.current.centre.detach(), pooling)
        return self._windows[number]

    def _map(self, run: JointRun, number: int) -> _Map:
        """The map, as many rows at a time as fit."""
        batch_dim = 0 if number < 0 else run.layer_calls[number].batch_dim
        shift = by_row(self._maps.shift(number, 1), 1, batch_dim)
        size = shift.numel()
        fit = max(1, min(size, self._maps.rows_that_fit()))
        blocks: dict[int, list[Any]] = {}
        for first in range(0, size, fit):
            count = min(fit, size - first)
            row = torch.arange(count, device=shift.device)
            units = torch.zeros((fit, size), dtype=torch.float64, device=shift.device)
            units[row, first + row] = 1.0
            native = laid_out(units.view(fit, *shift.shape[1:]), batch_dim)
            for leaf, found in self._maps.adjoint(number, native, fit):
                rows = run.leaves[leaf].by_sample(found, fit)[:count]
                values = rows.detach().cpu().numpy()
                block = _scipy("sparse").csr_matrix(values)
                blocks.setdefault(leaf, []).append(block)
        of_leaves = {}
        for leaf, parts in blocks.items():
            of_leaves[leaf] = _scipy("sparse").vstack(parts).tocsr()
        return _Map(of_leaves, _flat(shift))


def _windows_of(part: Tensor, pooling: Pooling) -> _Windows:
    """Windows from which of a frame's inputs alone each of its outputs is 1, for every frame of one
    sample.
    """
    size = part[0].numel()
    units = torch.eye(size, dtype=torch.float64, device=part.device)
    of_inputs = units.view(size, *part.shape[1:])
    pooled = pooling(of_inputs).flatten(1)
    pairs = pooled.nonzero().cpu().numpy()
    inputs = pairs[:, 0]
    outputs = pairs[:, 1]
    steps = np.arange(len(part))[:, None]
    return _Windows(
        outputs=(outputs + steps * pooled.shape[1]).ravel(),
        inputs=(inputs + steps * size).ravel(),
    )


def _numbers(changes: Changes) -> tuple[Any, Any]:
    """How many events can come to each value, and how many can leave it."""
    ups = [_flat(part) for part in changes.up]
    downs = [_flat(part) for part in changes.down]
    return np.sum(ups, 0), np.sum(downs, 0)


def _flat(part: Tensor) -> Any:
    return part.detach().double().flatten().cpu().numpy()
