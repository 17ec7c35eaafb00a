"""Whether an image of a small network can be fooled, by a mixed-integer program."""

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sj_robust.stability._scipy import scipy_module
from sj_robust.stability.bounds import by_row, laid_out, reset_rounding
from sj_robust.stability.branching import Prover, inside_ball
from sj_robust.stability.relaxation import Maps, RelaxedRun, Stage

__all__ = ["Matrices", "mip"]

_scipy = partial(scipy_module, wanted_by='method "mip"')

_TOLERANCE = 1e-6
"""Widens every equation by more than the solver's own tolerance of 1e-7."""

_CLEAR = 1e-5
"""How far a second attempt keeps potentials from the threshold and logits from a draw."""


def mip(
    prover: Prover, matrices: "Matrices", image: Tensor, label: Tensor, time_limit: float
) -> tuple[float, Tensor | None]:
    """Lower bound of the lead of one image [1, *] (0 if unknown), or an image of its box that is
    classified wrong.

    Equation: for every rival k a program over the input in the box, a binary s per undecided spike,
    and h and v of every neuron and step, feasible if some input lets the rival draw level::

        |h[t] - lambda v[t-1] - p[t] (A s + b) - (1 - lambda) v_reset| <= error
        h >= h_lo + (threshold - h_lo) s,    h < threshold + (h_hi - threshold) s
        v between h (s = 0) and v_reset (s = 1), big-M from the bounds; soft: |v - h + threshold s|
        <= error logit_y - logit_k <= error

    The errors are those of float32 and the solver's tolerance, so that what is infeasible is
    impossible for the network that runs. A solution is tried on that network; if it does not fool
    it, a second program keeps it clear of thresholds and draws.

    Source: as Tjeng et al. (ICLR 2019) for ReLU networks; solved by HiGHS (Huangfu and Hall 2018).
    """
    end = time.monotonic() + time_limit
    run = prover.run(image, maps=prover.maps, end=end - time_limit / 2)
    weights, bounds, broken = prover.rivals(run, image, label)
    if broken is not None:
        return -torch.inf, broken
    lead = min((value for value in bounds.tolist() if value > 0), default=torch.inf)
    for k in bounds.argsort().tolist():
        if bounds[k] > 0:
            continue
        for clear in (0.0, _CLEAR):
            program = _Program(run, matrices, clear)
            status, point = program.solve(weights[k], end - time.monotonic())
            if status == "impossible" and not clear:
                break
            if status != "possible" or point is None:
                return 0.0, None
            candidate = inside_ball(image, point.to(image.device).view(image.shape), prover.eps)
            with torch.no_grad():
                if bool(prover.logits(candidate).argmax(1) != label):
                    return -torch.inf, candidate
        else:
            return 0.0, None
        lead = min(lead, _TOLERANCE)
    return lead, None


class _Program:
    """The program of one image and one rival."""

    def __init__(self, run: RelaxedRun, matrices: "Matrices", clear: float) -> None:
        """Variables and constraints of the network; the rival is added by :meth:`solve`."""
        self.clear = clear
        self.size = self.height = 0
        self.columns: list[tuple[Any, Any, Any]] = []
        self.entries: list[tuple[Any, Any, Any]] = []
        self.limits: list[tuple[Any, Any]] = []
        self.leaves: dict[int, int] = {}
        self.potentials: dict[str, Any] = {}
        box = run.leaves[0]
        centre, radius = _flat(box.centre), _flat(box.radius)
        self.leaves[0] = int(self.variables(centre - radius, centre + radius)[0])
        for number, stage in enumerate(run.stages):
            affine = matrices.of(run, number)
            if stage.neuron is None:
                self._pooling(stage, affine, matrices.windows(run, number))
            else:
                self._neurons(stage, affine)
        self.last, self.run = matrices.of(run, -1), run

    def solve(self, weights: Tensor, time_limit: float) -> tuple[str, Tensor | None]:
        """Whether the lead that the weights give can be lost: possible (at this input), impossible
        or unknown.
        """
        optimize, sparse = _scipy("optimize"), _scipy("sparse")
        w = _flat(weights)
        error = 0.0 if self.clear else float((weights.abs() * self.run.error[0]).sum())
        matrix, shift = self.last
        most = error + _TOLERANCE - 10 * self.clear - float(w @ shift)
        self.rows(
            -np.inf,
            most,
            1,
            *((sparse.csr_matrix(w @ part), self.leaves[leaf]) for leaf, part in matrix.items()),
        )
        columns, rows, values = (np.concatenate(parts) for parts in zip(*self.entries, strict=True))
        coefficients = sparse.csr_matrix((values, (rows, columns)), shape=(self.height, self.size))
        low, high = map(np.concatenate, zip(*self.limits, strict=True))
        lower, upper, integral = map(np.concatenate, zip(*self.columns, strict=True))
        if time_limit <= 0:
            return "unknown", None
        result = optimize.milp(
            np.zeros(self.size),
            integrality=integral,
            bounds=optimize.Bounds(lower, upper),
            constraints=optimize.LinearConstraint(coefficients, low, high),
            options={"time_limit": time_limit},
        )
        if result.x is not None:
            length = self.run.leaves[0].centre[0].numel()
            return "possible", torch.as_tensor(result.x[:length])
        return ("impossible" if result.status == 2 else "unknown"), None

    def variables(self, lower: Any, upper: Any, *, integral: Any = False) -> Any:
        """Columns of new variables."""
        columns = np.arange(self.size, self.size + len(lower))
        self.size += len(lower)
        self.columns.append(
            (lower, upper, np.broadcast_to(np.asarray(integral, dtype=float), len(lower)))
        )
        return columns

    def rows(self, lower: Any, upper: Any, count: int, *terms: tuple[Any, Any]) -> None:
        """Inequalities over terms: (columns, values) one per row, or (sparse matrix, first
        column).
        """
        for first, second in terms:
            if hasattr(first, "tocoo"):
                part = first.tocoo()
                self.entries.append((part.col + second, part.row + self.height, part.data))
            else:
                self.entries.append(
                    (first, self.height + np.arange(count), np.broadcast_to(second, count))
                )
        self.limits.append((np.broadcast_to(lower, count), np.broadcast_to(upper, count)))
        self.height += count

    def _neurons(self, stage: Stage, affine: tuple[dict[int, Any], Any]) -> None:
        matrix, shift = affine
        steps, count = len(stage.steps), stage.steps[0].lower[0].numel()
        error = _flat(stage.current.error).reshape(steps, count)
        fires, quiet = (
            np.stack([_flat(getattr(step, name)) > 0 for step in stage.steps])
            for name in ("fires", "quiet")
        )
        spikes = self.variables(
            1.0 - quiet.ravel(), 1.0 * fires.ravel(), integral=(fires & quiet).ravel()
        )
        self.leaves[stage.leaf] = int(spikes[0])
        spikes = spikes.reshape(steps, count)
        rest, theta, decay = stage.rest, stage.threshold, stage.decay
        assert stage.neuron is not None
        name = stage.neuron.name
        for t, step in enumerate(stage.steps):
            low, high = _flat(step.lower) - _TOLERANCE, _flat(step.upper) + _TOLERANCE
            charged = self.variables(low, high)
            rounding = _flat(step.error) + abs(step.gain) * error[t]
            slack = _TOLERANCE + (0.0 if self.clear else rounding)
            part = slice(t * count, (t + 1) * count)
            constant = step.gain * shift[part] + (1.0 - decay) * rest
            before = self.potentials.get(name)
            terms = [(charged, 1.0)] + [
                (-step.gain * m[part], self.leaves[leaf]) for leaf, m in matrix.items()
            ]
            if before is None:
                constant = constant + decay * rest
            else:
                terms.append((before, -decay))
            self.rows(constant - slack, constant + slack, count, *terms)
            clear = self.clear + 10 * rounding if self.clear else 0.0
            self._spiking(charged, spikes[t], low, high, stage, clear)
            lowest = np.minimum(np.minimum(low, low - theta), min(rest, 0.0)) - 1.0
            highest = np.maximum(np.maximum(high, high - theta), max(rest, 0.0)) + 1.0
            self.potentials[name] = after = self.variables(lowest, highest)
            size = np.maximum(np.abs(low), np.abs(high))
            slack = _TOLERANCE + (0.0 if self.clear else reset_rounding(size, rest, theta))
            if stage.soft:
                self.rows(-slack, slack, count, (after, 1.0), (charged, -1.0), (spikes[t], theta))
                continue
            above, below = np.maximum(high - rest, 0.0), np.maximum(rest - low, 0.0)
            self.rows(-np.inf, slack, count, (after, 1.0), (charged, -1.0), (spikes[t], -below))
            self.rows(-slack, np.inf, count, (after, 1.0), (charged, -1.0), (spikes[t], above))
            self.rows(-np.inf, rest + above + slack, count, (after, 1.0), (spikes[t], above))
            self.rows(rest - below - slack, np.inf, count, (after, 1.0), (spikes[t], -below))

    def _spiking(
        self, charged: Any, spikes: Any, low: Any, high: Any, stage: Stage, clear: Any
    ) -> None:
        """A spike if and only if the potential reaches the threshold, within ``around`` or clear of
        it.
        """
        below, above = stage.around
        below, above = (
            (below - _TOLERANCE, above + _TOLERANCE)
            if not self.clear
            else (below + clear, above - clear)
        )
        self.rows(low, np.inf, len(low), (charged, 1.0), (spikes, -np.maximum(below - low, 0.0)))
        self.rows(
            -np.inf,
            np.maximum(above, low),
            len(low),
            (charged, 1.0),
            (spikes, -np.maximum(high - above, 0.0)),
        )

    def _pooling(self, stage: Stage, affine: tuple[dict[int, Any], Any], windows: Any) -> None:
        matrix, shift = affine
        assert stage.pooling is not None
        bounds = stage.current.lower, stage.current.upper
        low, high, error = map(_flat, (*bounds, stage.current.error))
        values = self.variables(low - _TOLERANCE, high + _TOLERANCE)
        slack = _TOLERANCE + (0.0 if self.clear else error)
        terms = [(-part, self.leaves[leaf]) for leaf, part in matrix.items()]
        self.rows(shift - slack, shift + slack, len(low), (values, 1.0), *terms)
        ends = [_flat(stage.pooling(part)) for part in bounds]
        pooled = self.variables(ends[0] - _TOLERANCE, ends[1] + _TOLERANCE)
        self.leaves[stage.leaf] = int(pooled[0])
        outputs, inputs = windows
        chosen = self.variables(np.zeros(len(inputs)), np.ones(len(inputs)), integral=True)
        room = np.maximum(ends[1][outputs] - low[inputs], 0.0)
        pairs = len(inputs)
        self.rows(-_TOLERANCE, np.inf, pairs, (pooled[outputs], 1.0), (values[inputs], -1.0))
        together = (pooled[outputs], 1.0), (values[inputs], -1.0), (chosen, room)
        self.rows(-np.inf, room + _TOLERANCE, pairs, *together)
        sums = _scipy("sparse").csr_matrix(
            (np.ones(pairs), (outputs, np.arange(pairs))), shape=(len(pooled), pairs)
        )
        self.rows(1.0, 1.0, len(pooled), (sums, int(chosen[0])))


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


def _flat(part: Tensor) -> Any:
    return part.detach().double().flatten().cpu().numpy()
