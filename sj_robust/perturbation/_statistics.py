"""What the monitor reports of a layer, and the running sums it comes from."""

from dataclasses import dataclass, fields
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sj_robust.core.saved import markdown_table
from sj_robust.core.shown import Shown, common_scale, heat_map, new_figure
from sj_robust.neuron.charging import Neuron
from sj_robust.ops.dlif.config import state_dtype
from sj_robust.ops.recurrence import charge, reset
from sj_robust.perturbation import dynamics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Kept", "LayerStats", "LayerTotals", "LayerTrace", "MPPDStatistics", "counted"]

_NOT_PER_STEP = ("name", "neuron", "samples")
"""Fields of :class:`LayerStats` that are no statistic."""

_MOST = 8
"""Rows and steps of a table; more are left out in the middle."""


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Statistics of one spiking layer over pairs of a clean and a perturbed run, per time step.
    单层的扰动统计量。

    Every tensor is float64 on the CPU with shape [T]. Means are over batch and features of all
    samples. With ``eps`` the simplified perturbation (no reset) and ``d = v - v~`` the full one:

    Attributes:
        name: Name of the neuron in the network.
        neuron: Class of the neuron.
        samples: Number of samples, each in both runs.
        firing_rate: Mean number of spikes per neuron at step t of the clean run.
        firing_rate_perturbed: The same of the perturbed run.
        silent: Share of the neurons that fired for no sample in steps 0 .. t of the clean run; the
            last entry is the share that never fired.
        silent_perturbed: The same of the perturbed run.
        ms_mppd: ``mean(eps[t]^2)``.
        l1: ``mean(|eps[t]|)``.
        max_abs: ``max |eps[t]|``.
        full_ms_mppd: ``mean(d[t]^2)``; None, like the other two, if the potential of a neuron whose
            decay was given could not be recomputed.
        full_l1: ``mean(|d[t]|)``.
        full_max_abs: ``max |d[t]|``.
        spike_distance: ``mean |s[t] - s~[t]|``; its mean over t is the spike-train distance divided
            by T.
        tasad: Mean over neurons of ``|mean(s~[:t+1]) - mean(s[:t+1])|``; the last entry is TASAD.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024).

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> from sj_robust.perturbation import MPPDMonitor
        >>> net = torch.nn.Sequential(neuron.IFNode(step_mode="m"))
        >>> stats = MPPDMonitor(net).compare(
        ...     torch.full((2, 1, 1), 0.5), torch.full((2, 1, 1), 0.75)
        ... )["0"]
        >>> stats.ms_mppd.tolist(), stats.summary()["ms_mppd"]
        ([0.0625, 0.25], 0.15625)
    """

    name: str
    neuron: str
    samples: int
    firing_rate: Tensor
    firing_rate_perturbed: Tensor
    silent: Tensor
    silent_perturbed: Tensor
    ms_mppd: Tensor
    l1: Tensor
    max_abs: Tensor
    full_ms_mppd: Tensor | None
    full_l1: Tensor | None
    full_max_abs: Tensor | None
    spike_distance: Tensor
    tasad: Tensor

    @property
    def T(self) -> int:  # noqa: N802  # the field's name for the number of time steps
        """Number of time steps."""
        return self.ms_mppd.shape[0]

    def summary(self) -> dict[str, float | None]:
        """One number per statistic: the mean over time; the maximum of maxima; the last entry of
        silent and tasad.
        """
        return {name: _whole(name, value) for name, value in self._tensors().items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON: ``"per_step"`` and ``"summary"`` of
        every statistic.
        """
        per_step = {}
        for name, value in self._tensors().items():
            per_step[name] = None if value is None else value.tolist()
        return {
            "name": self.name,
            "neuron": self.neuron,
            "samples": self.samples,
            "T": self.T,
            "summary": self.summary(),
            "per_step": per_step,
        }

    def __repr__(self) -> str:
        """One line with the numbers of :meth:`summary`."""
        measured = {name: value for name, value in self.summary().items() if value is not None}
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        return (
            f"LayerStats({self.name!r}, {self.neuron}, T={self.T}, samples={self.samples}: "
            f"{numbers})"
        )

    def _tensors(self) -> dict[str, Tensor | None]:
        names = [field.name for field in fields(self)]
        return {name: getattr(self, name) for name in names if name not in _NOT_PER_STEP}


class MPPDStatistics(Shown, dict[str, LayerStats]):
    """The statistics of every spiking layer by its name, in order of execution. 各层统计量。

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> from sj_robust.perturbation import compare_potentials
        >>> net = torch.nn.Sequential(neuron.IFNode(step_mode="m"))
        >>> compare_potentials(net, torch.full((2, 1, 1), 0.5), torch.full((2, 1, 1), 0.75))
        <MPPDStatistics: 1 spiking layer, T = 2, 1 pair of inputs; MS-MPPD from 0.156 (0)
        to 0.156 (0)>
    """

    @property
    def verdict(self) -> str:
        """Number of layers and pairs, and the layers where the potential moved least and most,
        averaged over time.
        """
        if not self:
            return "no spiking layer"
        sizes = {name: float(layer.ms_mppd.mean()) for name, layer in self.items()}
        low = min(sizes, key=sizes.__getitem__)
        high = max(sizes, key=sizes.__getitem__)
        first = next(iter(self.values()))
        layers = counted(len(self), "spiking layer")
        pairs = counted(first.samples, "pair")
        verdict = (
            f"{layers}, T = {first.T}, {pairs} of inputs; MS-MPPD from {sizes[low]:.3g} ({low}) "
            f"to {sizes[high]:.3g} ({high})"
        )
        if self.silent:
            verdict += f"; {', '.join(self.silent)} NEVER FIRED"
        return verdict

    @property
    def silent(self) -> tuple[str, ...]:
        """Layers in which no neuron ever fired on the clean inputs."""
        return tuple(name for name, layer in self.items() if float(layer.silent[-1]) == 1)

    def table(self) -> str:
        """Markdown: the verdict, then a row per layer; if there are many layers or steps, the first
        and last ones.
        """
        heads = [
            "layer",
            "neuron",
            "MS-MPPD per step",
            "spikes per neuron and step",
            "never fires, %",
        ]
        rows = []
        for name, layer in self.items():
            per_step = [f"{value:.3g}" for value in layer.ms_mppd.tolist()]
            firing_rate = float(layer.firing_rate.mean())
            silent = 100 * float(layer.silent[-1])
            steps = " ".join(_few(per_step))
            rows.append([name, layer.neuron, steps, f"{firing_rate:.3g}", f"{silent:.1f}"])
        shown = _few(rows, between=["..."] * len(heads))
        return f"{self.verdict}.\n\n{markdown_table(heads, shown, words=3)}"

    def plot(self, statistic: str = "ms_mppd") -> "Figure":
        """A heat map of layers and time steps. 层与时间步的热图。

        It needs matplotlib (extra ``recipes``).

        Args:
            statistic: Name of the statistic, one of those of :class:`LayerStats` that have a value
                per step.

        Raises:
            ValueError: If there is no such statistic.
        """
        layers = {}
        for name, layer in self.items():
            values = layer.to_dict()["per_step"].get(statistic)
            if values is not None:
                layers[name] = values
        if not layers:
            raise ValueError(
                f"statistic must be one of LayerStats that was measured, got {statistic!r}"
            )
        figure = new_figure(5.0, 1.2 + 0.24 * len(layers))
        axes = figure.subplots()
        scale = common_scale(chain.from_iterable(layers.values()))
        mesh = heat_map(axes, layers, scale)
        axes.set_xlabel("time step")
        figure.colorbar(mesh, ax=axes, label="MS-MPPD" if statistic == "ms_mppd" else statistic)
        return figure


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """Currents, spikes and potentials of one spiking layer in one pair of runs, kept by
    ``MPPDMonitor(keep="trace")``. 单层的完整轨迹。

    Every tensor is detached with shape [T, N, *].

    Attributes:
        name: Name of the neuron in the network.
        x_seq: Input currents of the clean run.
        x_seq_perturbed: Input currents of the perturbed run.
        spike_seq: Spikes of the clean run.
        spike_seq_perturbed: Spikes of the perturbed run.
        v_seq: Potentials after the reset in the clean run, recomputed from currents and spikes.
        v_seq_perturbed: The same of the perturbed run.
        eps: Simplified perturbation.
    """

    name: str
    x_seq: Tensor
    x_seq_perturbed: Tensor
    spike_seq: Tensor
    spike_seq_perturbed: Tensor
    v_seq: Tensor
    v_seq_perturbed: Tensor
    eps: Tensor

    @property
    def full(self) -> Tensor:
        """Full perturbation ``v_seq - v_seq_perturbed``."""
        return dynamics.full_perturbation(self.v_seq, self.v_seq_perturbed)


class Kept(NamedTuple):
    """What is kept of a pair of runs.

    Attributes:
        input_gain: Whether the perturbation of a trace contains the learnable gain.
        trace: Whether full traces are kept.
        spikes: Whether the spikes are kept for a loss on them.
        statistics: Whether anything is measured beside the loss.
    """

    input_gain: bool
    trace: bool
    spikes: bool
    statistics: bool


class _Size(NamedTuple):
    """How large a perturbation is in one step: sums of squares and of magnitudes, and the peak."""

    l2: Tensor
    l1: Tensor
    peak: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "_Size":
        return cls(_total(values.square()), _total(values.abs()), _peak(values))


_SUMS = (
    "firing_rate",
    "firing_rate_perturbed",
    "spike_distance",
    "tasad",
    "eps_l2",
    "eps_l1",
    "plain_l2",
    "plain_l1",
    "full_l2",
    "full_l1",
)
"""What is summed in every step: ``eps`` contains the learnable gain, ``plain`` does not, ``full``
is with the reset.
"""

_MAXIMA = ("eps", "plain", "full")
"""Whose peak is kept of every step."""


class LayerTotals:
    """Sums of one layer over pairs of runs, of which means are made.

    The first pair is given step by step (:meth:`step`), and then closed (:meth:`close`); after that
    there are means, and other closed pairs can be added (:meth:`add`). No tensor here has a graph,
    and none has the size of a batch once the pair is closed.

    Args:
        neuron: The neuron.
        v_init: Its potential before both runs.
        time_step: Number of steps between its reset and the runs.
        kept: What is kept.
    """

    @torch.no_grad()
    def __init__(self, neuron: Neuron, v_init: float | Tensor, time_step: int, kept: Kept) -> None:
        self.neuron = neuron
        self.full_valid = True
        self._samples = 0
        self._elements = 0
        # An entry per step until the pair is closed, in the order of _SUMS and of _MAXIMA.
        self._step_sums: list[Tensor] = []
        self._step_maxima: list[Tensor] = []
        self._charging = neuron.charging()
        self._time_step = time_step
        self._input_gain = kept.input_gain
        self._v_init = v_init
        self._state: dict[str, Tensor] = {}
        self._first_spike: list[Tensor] = []  # step of each neuron's first, per run
        self._keep_trace = kept.trace
        self._trace: list[dict[str, Tensor]] = []  # fields of LayerTrace, per step

    @torch.no_grad()
    def step(self, x: Tensor, spike: Tensor, x_perturbed: Tensor, spike_perturbed: Tensor) -> None:
        """Take in one step [N, *] of both runs."""
        t = len(self._step_sums)
        dtype = state_dtype(x)
        x = x.detach().to(dtype)
        spike = spike.detach().to(dtype)
        x_perturbed = x_perturbed.detach().to(dtype)
        spike_perturbed = spike_perturbed.detach().to(dtype)
        state = self._state or self._start(x)

        gain = self._charging.gain_at(self._time_step + t, input_gain=True)
        plain_gain = self._charging.gain_at(self._time_step + t, input_gain=False)
        decay = self._charging.decay
        dx = x - x_perturbed
        eps = charge(state["eps"], dx, decay=decay, gain=gain, v_reset=None)
        plain = eps
        if plain_gain is not gain:
            plain = charge(state["plain"], dx, decay=decay, gain=plain_gain, v_reset=None)
        v = self._potential(state["v"], x, spike, gain)
        v_perturbed = self._potential(state["v_perturbed"], x_perturbed, spike_perturbed, gain)
        dspike = spike_perturbed - spike
        excess = state["excess"] + dspike
        self._state = {
            "eps": eps,
            "plain": plain,
            "v": v,
            "v_perturbed": v_perturbed,
            "excess": excess,
        }

        sizes = {"eps": _Size.of(eps), "full": _Size.of(v - v_perturbed)}
        sizes["plain"] = sizes["eps"] if plain is eps else _Size.of(plain)
        sums = {
            "firing_rate": _total(spike),
            "firing_rate_perturbed": _total(spike_perturbed),
            "spike_distance": _total(dspike.abs()),
            "tasad": _total(excess.abs()) / (t + 1),
        }
        for name, size in sizes.items():
            sums[f"{name}_l2"] = size.l2
            sums[f"{name}_l1"] = size.l1
        self._step_sums.append(torch.stack([sums[name] for name in _SUMS]))
        peaks = [sizes[name].peak for name in _MAXIMA]
        self._step_maxima.append(torch.stack(peaks))
        first, first_perturbed = self._first_spike
        self._first_spike = [
            _earliest(first, spike, t),
            _earliest(first_perturbed, spike_perturbed, t),
        ]
        if self._keep_trace:
            step = {
                "x_seq": x,
                "x_seq_perturbed": x_perturbed,
                "spike_seq": spike,
                "spike_seq_perturbed": spike_perturbed,
                "v_seq": v,
                "v_seq_perturbed": v_perturbed,
                "eps": eps if self._input_gain else plain,
            }
            self._trace.append(step)

    @torch.no_grad()
    def check_potential(self, v_perturbed: Any) -> None:
        """Set ``full_valid`` to False if the recomputed potential of the perturbed run is not the
        neuron's own: its decay and gain were given by the user, and are wrong.
        """
        if self.neuron.known or not isinstance(v_perturbed, Tensor) or not self._state:
            return
        mine = self._state["v_perturbed"]
        if v_perturbed.shape != mine.shape:
            self.full_valid = False
            return
        scale = 1e-5 if mine.dtype == v_perturbed.dtype else 1e-2
        if not torch.allclose(mine, v_perturbed.to(mine), rtol=scale, atol=scale):
            self.full_valid = False

    @torch.no_grad()
    def close(self) -> LayerTrace | None:
        """End the pair and let go of everything that has the size of a batch; the trace, if one was
        kept.
        """
        self._sums = torch.stack(self._step_sums)
        self._maxima = torch.stack(self._step_maxima)
        self._step_sums = []
        self._step_maxima = []
        self._state = {}
        self._v_init = 0.0
        steps = self._trace
        self._trace = []
        if not steps:
            return None
        whole = {}
        for name in steps[0]:
            of_steps = [step[name] for step in steps]
            whole[name] = torch.stack(of_steps)
        return LayerTrace(name=self.neuron.name, **whole)

    def mean(self, norm: str, *, input_gain: bool) -> Tensor:
        """``mean(eps^2)`` for ``"l2"`` or ``mean(|eps|)`` for ``"l1"`` over the whole pair."""
        kind = "eps" if input_gain else "plain"
        sums = self._sums[:, _SUMS.index(f"{kind}_{norm}")]
        return (sums.mean() / self._elements).to(self._dtype)

    @torch.no_grad()
    def add(self, other: "LayerTotals") -> None:
        """Take in another pair, which :meth:`check_fits` has looked at."""
        self._samples += other._samples
        self._elements += other._elements
        self._sums = self._sums + other._sums.to(self._sums.device)
        others = other._maxima.to(self._maxima.device)
        self._maxima = torch.maximum(self._maxima, others)
        first = []
        for mine, theirs in zip(self._first_spike, other._first_spike, strict=True):
            first.append(torch.minimum(mine, theirs.to(mine.device)))
        self._first_spike = first
        self.full_valid &= other.full_valid

    def check_fits(self, other: "LayerTotals") -> None:
        """Raise ValueError if steps or features differ."""
        if self._extent != other._extent:
            raise ValueError(
                f"layer {self.neuron.name!r}: statistics are kept per time step and neuron, and "
                f"those so far have {self._extent}, but this pair has {other._extent}; call "
                "clear_recorded_data() first"
            )

    @torch.no_grad()
    def stats(self) -> LayerStats:
        """The statistics so far."""
        of_elements = (self._sums / self._elements).double()
        per_step = of_elements.cpu().unbind(1)
        means = dict(zip(_SUMS, per_step, strict=True))
        maxima = dict(zip(_MAXIMA, self._maxima.double().cpu().unbind(1), strict=True))
        first, first_perturbed = self._first_spike
        kind = "eps" if self._input_gain else "plain"
        return LayerStats(
            name=self.neuron.name,
            neuron=self.neuron.type_name,
            samples=self._samples,
            firing_rate=means["firing_rate"],
            firing_rate_perturbed=means["firing_rate_perturbed"],
            silent=_silent(first, len(self._sums)),
            silent_perturbed=_silent(first_perturbed, len(self._sums)),
            ms_mppd=means[f"{kind}_l2"],
            l1=means[f"{kind}_l1"],
            max_abs=maxima[kind],
            full_ms_mppd=means["full_l2"] if self.full_valid else None,
            full_l1=means["full_l1"] if self.full_valid else None,
            full_max_abs=maxima["full"] if self.full_valid else None,
            spike_distance=means["spike_distance"],
            tasad=means["tasad"],
        )

    @property
    def _extent(self) -> str:
        return f"T={len(self._sums)} and features {tuple(self._first_spike[0].shape)}"

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        """The state before the first step, whose currents are ``x``."""
        self._dtype = x.dtype
        self._samples = x.shape[0]
        self._elements = x.numel()
        never = torch.full(
            x.shape[1:], torch.iinfo(torch.int16).max, dtype=torch.int16, device=x.device
        )
        self._first_spike = [never, never]
        zero = torch.zeros_like(x)
        v = zero + self._v_init
        return {"eps": zero, "plain": zero, "v": v, "v_perturbed": v, "excess": zero}

    def _potential(self, v: Tensor, x: Tensor, spike: Tensor, gain: float | Tensor) -> Tensor:
        """Potential after a step, with the spikes that the neuron fired."""
        module = self.neuron.module
        h = charge(v, x, decay=self._charging.decay, gain=gain, v_reset=module.v_reset)
        return reset(h, spike, v_threshold=module.v_threshold, v_reset=module.v_reset)


def counted(count: int, what: str) -> str:
    """``"1 pair"``, ``"2 pairs"``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _few(items: list[Any], between: Any = "...") -> list[Any]:
    """All of few items; of many the first and last ones."""
    if len(items) <= _MOST:
        return items
    half = _MOST // 2
    return [*items[:half], between, *items[-half:]]


def _whole(name: str, per_step: Tensor | None) -> float | None:
    """One number for all steps, as :meth:`LayerStats.summary` says."""
    if per_step is None:
        return None
    if name.endswith("max_abs"):
        return float(per_step.max())
    if name in ("silent", "silent_perturbed", "tasad"):
        return float(per_step[-1])
    return float(per_step.mean())


def _total(values: Tensor) -> Tensor:
    """Sum of all values, in float64 where the device has it."""
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    return values.sum(dtype=dtype)


def _peak(values: Tensor) -> Tensor:
    return values.abs().max() if values.numel() else values.new_zeros(())


def _earliest(first: Tensor, spike: Tensor, t: int) -> Tensor:
    """Earliest step at which each neuron fired for any sample, now that it is step ``t``."""
    fires = (spike != 0).any(0)
    return torch.where(fires, first.clamp(max=t), first)


def _silent(first: Tensor, steps: int) -> Tensor:
    """Share of the neurons that had not fired up to each step, [T], from the steps of their first
    spikes.
    """
    shares = [(first > t).double().mean() for t in range(steps)]
    return torch.stack(shares).cpu()
