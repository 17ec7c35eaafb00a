"""Whether an image of a small network can be fooled, by a mixed-integer program."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sj_robust.proofs._scipy import scipy_module
from sj_robust.proofs.bounds import by_row, laid_out
from sj_robust.proofs.branching import Prover
from sj_robust.proofs.changes import Changes
from sj_robust.proofs.moves import Shifts
from sj_robust.proofs.relaxation import Maps, RelaxedRun, Stage, Step
from sj_robust.proofs.rounding import reset_rounding
from sj_robust.proofs.rules import Bounds

__all__ = ["Matrices", "mip"]

_scipy = partial(scipy_module, wanted_by='method "mip"')

_TOLERANCE = 1e-6
"""Widens every equation by more than HiGHS' own tolerance of 1e-7."""

_LARGEST = 1e6
"""Largest coefficient of a program that is solved; with larger ones HiGHS was seen to be wrong."""

_ROUNDING = 1e-10
"""Covers float64's own rounding of a sum of terms, in units of the sum of their absolute values."""

_CLEAR = 1e-5
"""How far a second attempt keeps potentials from the threshold and logits from a draw."""


def mip(
    prover: Prover, matrices: "Matrices", image: Tensor, label: Tensor, time_limit: float
) -> tuple[float, Tensor | None]:
    """Lower bound of the lead of one image [1, *] (-inf if unknown), or an image of its box that is
    classified wrong.

    Equation: for every rival k a program over the input in the box, a binary s per undecided spike,
    and v of every neuron and step that one may have reset, feasible if some input lets the rival
    draw level; h and the logits are affine in them::

        h[t] = lambda v[t-1] + p[t] (A s + b) + (1 - lambda) v_reset   (-+ error)
        h >= h_lo + (threshold - h_lo) s,    h < threshold + (h_hi - threshold) s
        v between h (s = 0) and v_reset (s = 1), big-M from the bounds; soft: v = h - threshold s
        logit_y - logit_k <= error

    The errors are those of float32 and a tolerance, so that what is infeasible is impossible for
    the network that runs. A solution is tried on that network; if it does not fool it, a second
    program keeps it clear of thresholds and draws.

    HiGHS computes in floating point, so that its "infeasible" is no proof. It is one if a tree of
    linear programs says so as well, by the multipliers of every leaf (:class:`_Tree`). A program
    with coefficients beyond 1e6 is not solved.

    Source: as Tjeng et al. (ICLR 2019) for ReLU networks; solved by HiGHS (Huangfu and Hall 2018).
    """
    end = time.monotonic() + time_limit
    run = prover.run(image, maps=prover.maps, end=end - time_limit / 2)
    rivals = prover.rivals(run, image, label)
    if rivals.broken:
        return -torch.inf, rivals.broken[0]
    weights, bounds = rivals.weights[0], rivals.bounds[0]
    lead = min((value for value in bounds.tolist() if value > 0), default=torch.inf)
    for k in bounds.argsort().tolist():
        if bounds[k] > 0:
            continue
        for clear in (0.0, _CLEAR):
            program = _Program(run, matrices, clear).of_rival(weights[k])
            status, point = program.solve(end)
            if status == "impossible" and not clear and _Tree(program).is_closed(end):
                break
            if status != "possible" or point is None:
                return -torch.inf, None
            pixels = torch.as_tensor(point[: image.numel()], device=image.device)
            candidate = prover.solution(image, pixels.view(image.shape))
            with torch.no_grad():
                if bool(prover.logits(candidate).argmax(1) != label):
                    return -torch.inf, candidate
        else:
            return -torch.inf, None
        lead = min(lead, _TOLERANCE)
    return lead, None


@dataclass(frozen=True)
class _Inequalities:
    """Whether ``costs @ x + shift <= 0`` and ``matrix @ x <= limits`` for some x of a box.

    Attributes:
        costs: [columns].
        shift: A number.
        matrix: Sparse [rows, columns]; the largest entry of a row is in (1/2, 1].
        limits: [rows].
        lower: [columns].
        upper: [columns].
        binaries: Numbers of the columns that must be 0 or 1.
        largest: Largest coefficient of all before rows were scaled.
    """

    costs: Any
    shift: float
    matrix: Any
    limits: Any
    lower: Any
    upper: Any
    binaries: Any
    largest: float

    def solve(self, end: float) -> tuple[str, Any]:
        """What HiGHS says: possible (with a point), impossible or unknown."""
        optimize = _scipy("optimize")
        left = end - time.monotonic()
        if left <= 0 or not self.largest <= _LARGEST:
            return "unknown", None
        integral = np.zeros(len(self.costs))
        integral[self.binaries] = 1.0
        result = optimize.milp(
            np.zeros(len(self.costs)),
            integrality=integral,
            bounds=optimize.Bounds(self.lower, self.upper),
            constraints=[
                optimize.LinearConstraint(self.matrix, -np.inf, self.limits),
                optimize.LinearConstraint(self.costs[None], -np.inf, -self.shift),
            ],
            options={"time_limit": left},
        )
        if result.x is not None:
            return "possible", result.x
        return ("impossible" if result.status == 2 else "unknown"), None


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
        sparse = _scipy("sparse")
        ones = np.ones((len(program.limits), 1))
        self.relaxed = sparse.hstack([program.matrix, -ones]).tocsr()
        widest = np.maximum(np.abs(program.lower), np.abs(program.upper))
        self.most = float(
            (np.abs(program.matrix) @ widest + np.abs(program.limits)).max(initial=1.0)
        )

    def is_closed(self, end: float) -> bool:
        """Whether all leaves are, found in time."""
        program = self.program
        waiting = [(program.lower, program.upper)]
        while waiting:
            if time.monotonic() > end:
                return False
            lower, upper = waiting.pop()
            found = _linear_program(program.costs, program.matrix, program.limits, lower, upper)
            if found.x is None:
                if not self._is_empty(lower, upper):
                    return False
                continue
            pulls = _multipliers(found)
            value = _safe_minimum(
                program.costs, program.matrix, program.limits, lower, upper, pulls
            )
            if value + program.shift > 0:
                continue
            column = self._branch(found.x, pulls)
            if column is None:
                return False
            for spike in (0.0, 1.0):
                low, high = lower.copy(), upper.copy()
                low[column] = high[column] = spike
                waiting.append((low, high))
        return True

    def _is_empty(self, lower: Any, upper: Any) -> bool:
        """Whether no x of a box satisfies all rows: the least violation is above 0."""
        costs = np.zeros(len(lower) + 1)
        costs[-1] = 1.0
        lower, upper = np.append(lower, 0.0), np.append(upper, self.most)
        limits = self.program.limits
        found = _linear_program(costs, self.relaxed, limits, lower, upper)
        if found.x is None:
            return False
        multipliers = _multipliers(found)
        return _safe_minimum(costs, self.relaxed, limits, lower, upper, multipliers) > 0

    def _branch(self, point: Any, multipliers: Any) -> int | None:
        """The binary that is none in a solution and has the most weight in its active rows."""
        binaries = self.program.binaries
        broken = np.abs(point[binaries] - point[binaries].round()) > 1e-7
        if not broken.any():
            return None
        weight = (np.abs(self.program.matrix).T @ multipliers)[binaries]
        return int(binaries[np.where(broken, 1e-9 + weight, 0.0).argmax()])


def _linear_program(costs: Any, matrix: Any, limits: Any, lower: Any, upper: Any) -> Any:
    bounds = np.stack([lower, upper], 1)
    return _scipy("optimize").linprog(
        costs, A_ub=matrix, b_ub=limits, bounds=bounds, method="highs-ds"
    )


def _multipliers(found: Any) -> Any:
    """Multipliers >= 0 of the rows; any are sound."""
    return np.nan_to_num(np.maximum(-found.ineqlin.marginals, 0.0), posinf=0.0)


def _safe_minimum(
    costs: Any, matrix: Any, limits: Any, lower: Any, upper: Any, multipliers: Any
) -> float:
    """Lower bound of the costs over all x of the box with ``matrix @ x <= limits``."""
    reduced = costs + matrix.T @ multipliers
    value = np.minimum(reduced * lower, reduced * upper).sum() - multipliers @ limits
    widest = np.maximum(np.abs(lower), np.abs(upper))
    size = (np.abs(costs) + np.abs(matrix).T @ multipliers) @ widest
    size = size + multipliers @ np.abs(limits)
    return float(value - _ROUNDING * size)


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
        return _Affine(scale @ self.matrix, factor * self.shift, np.abs(factor) * self.slack)

    def through(self, matrix: Any) -> "_Affine":
        """A linear map of the values, which are exact."""
        return _Affine(matrix @ self.matrix, matrix @ self.shift, np.zeros(matrix.shape[0]))

    def plus(self, other: "_Affine") -> "_Affine":
        """A sum."""
        size = max(self.matrix.shape[1], other.matrix.shape[1])
        matrix = _wide(self.matrix, size) + _wide(other.matrix, size)
        return _Affine(matrix, self.shift + other.shift, self.slack + other.slack)

    def moved(self, shift: Any, slack: Any = 0.0) -> "_Affine":
        """Plus constants, and with more slack."""
        return _Affine(self.matrix, self.shift + shift, self.slack + slack)


class _Program:
    """The program of one image and one rival: a binary per undecided spike, and what hangs on them.

    What is decided is put into the equations of what is not, so that the columns are the input,
    undecided spikes, and potentials that a reset may or may not have changed.
    """

    def __init__(self, run: RelaxedRun, matrices: "Matrices", clear: float) -> None:
        """Variables and constraints of the network; the rival is added by :meth:`of_rival`."""
        self.clear, self.run = clear, run
        self.size = 0
        self.columns: list[tuple[Any, Any, Any]] = []
        self.limits: list[tuple[Any, Any]] = []
        self.leaves: dict[int, _Affine] = {}
        self.potentials: dict[str, _Affine] = {}
        box = run.leaves[0]
        centre, radius = _flat(box.centre), _flat(box.radius)
        if run.changed is None:
            self.leaves[0] = self.variables(centre - radius, centre + radius)
        else:
            self.leaves[0] = self._changed(run.changed, centre)
        self.later = _undecided_later(run)
        for number, stage in enumerate(run.stages):
            current = self.through(*matrices.of(run, number))
            if stage.neuron is None and stage.pooling in (None, torch.relu):
                raise NotImplementedError(
                    "no program is known for a network with ReLU, products or other functions; "
                    "take the method ibp, joint, crown or bab"
                )
            if stage.neuron is None:
                self._pooling(stage, current, matrices.windows(run, number))
            else:
                self._neurons(number, stage, current)
        self.logits = self.through(*matrices.of(run, -1))

    def _changed(self, frames: Bounds, values: Any) -> _Affine:
        """Event frames, of which at most some values or events change."""
        assert frames.changes is not None
        if isinstance(frames.changes, Shifts):
            return self._moved(frames.changes, values)
        added, removed = _numbers(frames.changes)
        if not np.array_equal(added, 1.0 - values) or not np.array_equal(removed, values):
            return self._added_and_removed(frames.changes, values)
        found = self.variables(np.zeros(len(values)), np.ones(len(values)), integral=True)
        changes = found.times(1.0 - 2.0 * values).moved(values)
        every = _scipy("sparse").csr_matrix(np.ones((1, len(values))))
        number = _Affine(every @ changes.matrix, every @ changes.shift, np.zeros(1))
        self.at_most(number, frames.changes.budget)
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
        kept = found.plus(gone).plus(new.times(-1.0)).moved(-values)
        self.at_most(kept, 0.0)
        self.at_least(kept, 0.0)
        every = _scipy("sparse").csr_matrix(np.ones((1, len(values))))
        self.at_most(gone.plus(new).through(every), changes.budget)
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
        ball, frames = moves.ball, moves.frames
        assert ball is not None
        assert frames is not None
        sparse = _scipy("sparse")
        T = frames.shape[1]
        most, shift = ball.most, min(ball.largest_shift, T - 1)
        coming, leaving = (_flat(part) for part in ball.reach(frames))
        near = _flat(ball.near(frames))
        found = self.variables(
            values - np.minimum(leaving, most), values + np.minimum(coming, most)
        )
        gone = self._events(leaving, most)
        new = self._events(near if ball.counts else np.minimum(near, 1.0), most)
        kept = found.plus(gone).plus(new.times(-1.0)).moved(-values)
        self.at_most(kept, 0.0)
        self.at_least(kept, 0.0)
        lines = sparse.identity(len(values) // T)
        until = np.tril(np.ones((T, T)))
        later = until[np.minimum(np.arange(T) + shift, T - 1)]
        for first, second in ((gone, new), (new, gone)):
            left = first.through(sparse.kron(until, lines).tocsr())
            right = second.through(sparse.kron(later, lines).tocsr())
            self.at_most(left.plus(right.times(-1.0)), 0.0)
        self.at_most(gone.through(sparse.csr_matrix(np.ones((1, len(values))))), moves.budget)
        return found

    def _events(self, largest: Any, most: int) -> _Affine:
        """Numbers of events from 0 to ``largest``, of ``most`` binary variables each."""
        found = self.constant(np.zeros(len(largest)))
        for number in range(1, min(most, int(largest.max(initial=0.0))) + 1):
            there = 1.0 * (largest >= number)
            found = found.plus(self.variables(np.zeros(len(there)), there, integral=True))
        return found

    def of_rival(self, weights: Tensor) -> _Inequalities:
        """The program whose costs are the lead that the weights give, with rows scaled."""
        sparse, w = _scipy("sparse"), _flat(weights)
        error = 0.0 if self.clear else float((weights.abs() * self.run.error[0]).sum())
        costs = np.asarray(w @ _wide(self.logits.matrix, self.size)).ravel()
        shift = float(w @ self.logits.shift) - error - _TOLERANCE + 10 * self.clear
        lower, upper, integral = (
            np.concatenate(parts) for parts in zip(*self.columns, strict=True)
        )
        matrix = sparse.csr_matrix((0, self.size))
        limits = np.zeros(0)
        if self.limits:
            parts = [_wide(part, self.size) for part, _ in self.limits]
            matrix = sparse.vstack(parts).tocsr()
            limits = np.concatenate([np.broadcast_to(b, a.shape[0]) for a, b in self.limits])
        highest = matrix.maximum(0) @ upper + matrix.minimum(0) @ lower
        needed = highest > limits  # the others hold everywhere in the box
        matrix, limits = matrix[needed], limits[needed]
        sizes = abs(matrix).max(1).toarray().ravel() if len(limits) else np.zeros(0)
        largest = max(np.abs(costs).max(initial=0.0), sizes.max(initial=0.0))
        # Powers of two, so that nothing is rounded.
        factors = np.exp2(-np.ceil(np.log2(np.where(sizes > 0, sizes, 1.0))))
        return _Inequalities(
            costs=costs,
            shift=shift,
            matrix=_diagonal(factors) @ matrix,
            limits=factors * limits,
            lower=lower,
            upper=upper,
            binaries=np.flatnonzero(integral),
            largest=float(largest),
        )

    def through(self, matrix: dict[int, Any], shift: Any) -> _Affine:
        """An affine map of the leaves."""
        found = self.constant(shift)
        for leaf, part in matrix.items():
            values = self.leaves[leaf]
            found = found.plus(_Affine(part @ values.matrix, part @ values.shift, 0.0 * shift))
        return found

    def constant(self, values: Any) -> _Affine:
        """Values that nothing moves."""
        matrix = _scipy("sparse").csr_matrix((len(values), self.size))
        return _Affine(matrix, np.array(values, dtype=float), np.zeros(len(values)))

    def variables(self, lower: Any, upper: Any, *, integral: bool = False) -> _Affine:
        """Values that are new columns."""
        count = len(lower)
        columns = np.arange(self.size, self.size + count)
        self.size += count
        self.columns.append((lower, upper, np.full(count, float(integral))))
        entries = np.ones(count), (np.arange(count), columns)
        matrix = _scipy("sparse").csr_matrix(entries, shape=(count, self.size))
        return _Affine(matrix, np.zeros(count), np.zeros(count))

    def at_most(self, values: _Affine, upper: Any) -> None:
        """Inequalities that hold for some values within the slack."""
        self.limits.append((values.matrix, upper - values.shift + values.slack))

    def at_least(self, values: _Affine, lower: Any) -> None:
        """The same from below."""
        self.at_most(values.times(-1.0), -lower)

    def _neurons(self, number: int, stage: Stage, current: _Affine) -> None:
        steps, count = len(stage.steps), stage.steps[0].lower[0].numel()
        error = _flat(stage.current.error).reshape(steps, count)
        assert stage.neuron is not None
        name, decay, rest = stage.neuron.name, stage.decay, stage.rest
        spikes = []
        for t, step in enumerate(stage.steps):
            before = self.potentials.get(name, self.constant(np.full(count, rest)))
            rounding = _flat(step.error) + abs(step.gain) * error[t]
            own = current.at(slice(t * count, (t + 1) * count)).times(step.gain)
            charged = own.plus(before.times(decay)).moved(
                (1.0 - decay) * rest, _TOLERANCE + (0.0 if self.clear else rounding)
            )
            fires, quiet = _flat(step.fires) > 0, _flat(step.quiet) > 0
            open_ones = np.flatnonzero(fires & quiet)
            spike = self._spike(fires & ~quiet, open_ones)
            spikes.append(spike)
            clear = self.clear + 10 * rounding[open_ones] if self.clear else 0.0
            self._spiking(charged.at(open_ones), spike.at(open_ones), stage, step, open_ones, clear)
            kept = np.flatnonzero((fires & quiet) & self.later[number, t])
            self.potentials[name] = self._reset(stage, step, charged, spike, kept)
        self.leaves[stage.leaf] = _stacked(spikes, self.size)

    def _spike(self, sure: Any, open_ones: Any) -> _Affine:
        """Spikes of one step: decided, or a binary each."""
        found = self.constant(sure)
        binaries = self.variables(np.zeros(len(open_ones)), np.ones(len(open_ones)), integral=True)
        return found.plus(_spread(binaries, open_ones, len(sure)))

    def _spiking(
        self, charged: _Affine, spike: _Affine, stage: Stage, step: Step, rows: Any, clear: Any
    ) -> None:
        """A spike if and only if the potential reaches the threshold, within ``around`` or clear of
        it.
        """
        low, high = _flat(step.lower)[rows] - _TOLERANCE, _flat(step.upper)[rows] + _TOLERANCE
        below, above = stage.around
        if self.clear:
            reached, missed = below + clear, above - clear
        else:
            reached, missed = below - _TOLERANCE, above + _TOLERANCE
        self.at_least(charged.plus(spike.times(-np.maximum(reached - low, 0.0))), low)
        room = np.maximum(high - missed, 0.0)
        self.at_most(charged.plus(spike.times(-room)), np.maximum(missed, low))

    def _reset(
        self, stage: Stage, step: Step, charged: _Affine, spike: _Affine, kept: Any
    ) -> _Affine:
        """Potentials after the reset; right for decided spikes, and for the ``kept`` ones."""
        low, high = _flat(step.lower) - _TOLERANCE, _flat(step.upper) + _TOLERANCE
        rest, theta = stage.rest, stage.threshold
        size = np.maximum(np.abs(low), np.abs(high))
        rounding = np.zeros(len(size)) if self.clear else reset_rounding(size, rest, theta)
        slack = _TOLERANCE + rounding
        if stage.soft:
            return charged.plus(spike.times(-theta)).moved(0.0, slack)
        silent = 1.0 * (_flat(step.fires) == 0)
        decided = charged.times(silent).moved((1.0 - silent) * rest, slack)
        others = np.ones(len(low))
        others[kept] = 0.0
        above, below = np.maximum(high - rest, 0.0)[kept], np.maximum(rest - low, 0.0)[kept]
        after = self.variables(
            np.minimum(low[kept], rest) - 1.0, np.maximum(high[kept], rest) + 1.0
        )
        fired, own = spike.at(kept), charged.at(kept).moved(0.0, slack[kept])
        change = after.plus(own.times(-1.0))
        self.at_most(change.plus(fired.times(-below)), 0.0)
        self.at_least(change.plus(fired.times(above)), 0.0)
        self.at_most(after.plus(fired.times(above)).moved(0.0, slack[kept]), rest + above)
        self.at_least(after.plus(fired.times(-below)).moved(0.0, slack[kept]), rest - below)
        return decided.times(others).plus(_spread(after, kept, len(low)))

    def _pooling(self, stage: Stage, current: _Affine, windows: Any) -> None:
        assert stage.pooling is not None
        bounds = stage.current.lower, stage.current.upper
        low, error = _flat(bounds[0]), _flat(stage.current.error)
        values = current.moved(0.0, _TOLERANCE + (0.0 if self.clear else error))
        ends = [_flat(stage.pooling(part)) for part in bounds]
        pooled = self.variables(ends[0] - _TOLERANCE, ends[1] + _TOLERANCE)
        self.leaves[stage.leaf] = pooled
        outputs, inputs = windows
        chosen = self.variables(np.zeros(len(inputs)), np.ones(len(inputs)), integral=True)
        above = pooled.at(outputs).plus(values.at(inputs).times(-1.0))
        room = np.maximum(ends[1][outputs] - low[inputs], 0.0)
        self.at_least(above, -_TOLERANCE)
        self.at_most(above.plus(chosen.times(room)), room + _TOLERANCE)
        one_each = _scipy("sparse").csr_matrix(
            (np.ones(len(inputs)), (outputs, np.arange(len(inputs)))),
            shape=(len(ends[0]), len(inputs)),
        )
        sums = np.zeros(len(ends[0]))
        self.at_least(_Affine(one_each @ chosen.matrix, sums, sums), 1.0)


def _undecided_later(run: RelaxedRun) -> dict[tuple[int, int], Any]:
    """By stage and step, whether a neuron has an undecided spike in a later step."""
    later: dict[str, Any] = {}
    found = {}
    for number in reversed(range(len(run.stages))):
        stage = run.stages[number]
        if stage.neuron is None:
            continue
        for t in reversed(range(len(stage.steps))):
            step = stage.steps[t]
            undecided = _flat(step.fires & step.quiet) > 0
            after = later.get(stage.neuron.name, np.zeros(len(undecided), dtype=bool))
            found[number, t] = after
            later[stage.neuron.name] = after | undecided
    return found


def _wide(matrix: Any, size: int) -> Any:
    """A sparse matrix with as many columns."""
    parts = matrix.data, matrix.indices, matrix.indptr
    return _scipy("sparse").csr_matrix(parts, shape=(matrix.shape[0], size))


def _diagonal(values: Any) -> Any:
    return _scipy("sparse").diags(values).tocsr()


def _spread(values: _Affine, rows: Any, count: int) -> _Affine:
    """Values in some of so many rows, 0 in the others."""
    entries = np.ones(len(rows)), (rows, np.arange(len(rows)))
    place = _scipy("sparse").csr_matrix(entries, shape=(count, len(rows)))
    return _Affine(place @ values.matrix, place @ values.shift, place @ values.slack)


def _stacked(parts: list[_Affine], size: int) -> _Affine:
    matrix = _scipy("sparse").vstack([_wide(part.matrix, size) for part in parts]).tocsr()
    shift, slack = (np.concatenate([getattr(p, key) for p in parts]) for key in ("shift", "slack"))
    return _Affine(matrix, shift, slack)


class Matrices:
    """The affine maps as sparse matrices, made once for a network."""

    def __init__(self, maps: Maps) -> None:
        """Nothing is made yet."""
        self._maps = maps
        self._affine: dict[int, tuple[dict[int, Any], Any]] = {}
        self._windows: dict[int, Any] = {}

    def of(self, run: RelaxedRun, number: int) -> tuple[dict[int, Any], Any]:
        """By leaf a matrix [size of the current, size of the leaf], and the shift; -1 is the map to
        the logits.
        """
        if number not in self._affine:
            sparse = _scipy("sparse")
            batch_dim = 0 if number < 0 else run.stages[number].batch_dim
            like = by_row(self._maps.shift(number, 1), 1, batch_dim)
            size = like.numel()
            fit = max(1, min(size, self._maps.rows_that_fit()))
            blocks: dict[int, list[Any]] = {}
            for first in range(0, size, fit):
                units = torch.zeros((fit, size), dtype=torch.float64, device=like.device)
                wanted = torch.arange(first, min(first + fit, size), device=like.device)
                units[wanted - first, wanted] = 1.0
                native = laid_out(units.view(fit, *like.shape[1:]), batch_dim)
                for leaf, found in self._maps.adjoint(number, native, fit):
                    rows = run.leaves[leaf].by_sample(found, fit)[: len(wanted)]
                    blocks.setdefault(leaf, []).append(
                        sparse.csr_matrix(rows.detach().cpu().numpy())
                    )
            self._affine[number] = (
                {leaf: sparse.vstack(b).tocsr() for leaf, b in blocks.items()},
                _flat(like),
            )
        return self._affine[number]

    def windows(self, run: RelaxedRun, number: int) -> Any:
        """Numbers of outputs and inputs of a max pooling that belong together, of all time
        steps.
        """
        if number not in self._windows:
            stage = run.stages[number]
            assert stage.pooling is not None
            part = stage.current.centre.detach()
            frames, size = part.shape[0] // run.samples, part[0].numel()
            units = torch.eye(size, dtype=torch.float64, device=part.device).view(
                size, *part.shape[1:]
            )
            inputs, outputs = (
                a.cpu().numpy() for a in stage.pooling(units).flatten(1).nonzero(as_tuple=True)
            )
            width = stage.pooling(part[:1]).numel()
            steps = np.arange(frames)[:, None]
            self._windows[number] = (
                (outputs + steps * width).ravel(),
                (inputs + steps * size).ravel(),
            )
        return self._windows[number]


def _numbers(changes: Changes) -> tuple[Any, Any]:
    """How many events can come to each value, and how many can leave it."""
    ups, downs = ([_flat(part) for part in parts] for parts in (changes.up, changes.down))
    return np.sum(ups, 0), np.sum(downs, 0)


def _flat(part: Tensor) -> Any:
    return part.detach().double().flatten().cpu().numpy()
