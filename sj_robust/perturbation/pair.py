"""One layer in one pair of runs."""

from collections import deque
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sj_robust.core.checks import check_choice
from sj_robust.neuron.charging import Neuron
from sj_robust.neuron.watching import SpikingCall
from sj_robust.ops.dlif.config import state_dtype
from sj_robust.perturbation import dynamics
from sj_robust.perturbation._statistics import Kept, LayerTotals, LayerTrace

__all__ = ["Indicator", "LayerPair", "NotFollowedError"]

Indicator = Literal["mppd", "tasad", "std"]


class NotFollowedError(RuntimeError):
    """No layer that is to be followed can be, or ran."""


class LayerPair:
    """A clean and a perturbed run of one layer, one after the other."""

    def __init__(self, neuron: Neuron, kept: Kept) -> None:
        """Nothing is kept yet."""
        self.neuron = neuron
        self.totals: LayerTotals | None = None
        self.trace: LayerTrace | None = None
        self._kept = kept
        self._start: tuple[float | Tensor, int]  # potential and time step before the run
        self._shape: torch.Size | None = None
        self._clean_steps = 0
        self._taken_steps = 0
        self._steps: deque[tuple[_Chunk, Tensor, Tensor]] = (
            deque()
        )  # current and spike, and the chunk they are from
        # For the loss: input currents of both runs and, if they are kept, spikes.
        self._clean: list[_Chunk] = []
        self._perturbed: list[_Chunk] = []
        self._clean_spikes: list[_Chunk] = []
        self._perturbed_spikes: list[_Chunk] = []

    @property
    def took_one_step(self) -> bool:
        """Whether the clean run was a single call in step mode ``"s"``."""
        return self._clean_steps == 1 and self.neuron.module.step_mode == "s"

    @property
    def size(self) -> tuple[int, ...]:
        """Time steps and samples of the clean run."""
        return (self._clean_steps, *(self._shape or ())[:1])

    def before(self, call: SpikingCall, *, first_call: bool, perturbed: bool) -> None:
        """Take note of the state in which the neuron entered a call; ``first_call`` of the clean or
        perturbed run.
        """
        v = call.v_before
        if not first_call:
            if not isinstance(v, Tensor):
                raise RuntimeError(
                    f"layer {self.neuron.name!r} was reset inside one run: clean() and perturbed() "
                    "each hold one run of the network; leave the context before resetting and "
                    "running again"
                )
            return
        start = (v.detach().clone() if isinstance(v, Tensor) else float(v), call.time_step)
        if not perturbed:
            self._start = start
        elif start[1] != self._start[1] or not _same(start[0], self._start[0]):
            raise RuntimeError(
                f"layer {self.neuron.name!r} starts the perturbed run from a different state than "
                "the clean run: call functional.reset_net(net) before each run"
            )

    def take_clean(self, x_seq: Tensor, spike_seq: Tensor | None) -> None:
        """Keep a chunk [t, N, *] of the clean run."""
        self._check_batch(x_seq)
        chunk = _Chunk.of(x_seq.detach())
        self._clean.append(chunk)
        self._clean_steps += len(x_seq)
        if not (self._kept.statistics or self._kept.spikes):
            return
        assert spike_seq is not None  # they were asked for
        # A network may go on in place on its spikes, hence a copy; as bool where that loses
        # nothing.
        spikes = spike_seq.detach()
        spikes = spikes != 0 if self.neuron.binary else spikes.clone()
        if self._kept.spikes:
            self._clean_spikes.append(_Chunk.of(spikes))
        if self._kept.statistics:
            self._steps.extend(
                (chunk, x, spike) for x, spike in zip(chunk.values, spikes, strict=True)
            )

    def take_perturbed(self, x_seq: Tensor, spike_seq: Tensor | None) -> None:
        """Use up as many steps of the clean run as the chunk [t, N, *] of the perturbed run has."""
        self._taken_steps += len(x_seq)
        if self._taken_steps > self._clean_steps:
            raise ValueError(
                f"layer {self.neuron.name!r} takes more steps in the perturbed run than in the "
                f"clean run ({self._clean_steps}): give both runs the same number of time steps"
            )
        if x_seq.shape[1:] != self._shape:
            raise ValueError(
                f"layer {self.neuron.name!r} gets input of shape {tuple(x_seq.shape[1:])} per "
                f"step in the perturbed run and {tuple(self._shape or ())} in the clean run: "
                "give both runs batches of the same shape"
            )
        totals = self._keep(x_seq, spike_seq)
        if totals is None:
            return
        assert spike_seq is not None  # they were asked for
        for x_perturbed, spike_perturbed in zip(x_seq.detach(), spike_seq.detach(), strict=True):
            chunk, x, spike = self._steps.popleft()
            chunk.check("input", self.neuron.name)
            totals.step(x, spike, x_perturbed, spike_perturbed)
        totals.check_potential(self.neuron.module.v)

    def finish(self) -> None:
        """End the pair; ValueError if the perturbed run had fewer steps than the clean one."""
        if self._taken_steps < self._clean_steps:
            raise ValueError(
                f"layer {self.neuron.name!r} takes {self._taken_steps} steps in the perturbed "
                f"run and {self._clean_steps} in the clean run: give both runs the same number "
                "of time steps"
            )
        self._start = 0.0, self._start[1]  # the potentials are as large as a batch
        if self.totals is not None:
            self.trace = self.totals.close()

    def loss(self, norm: dynamics.Norm, *, input_gain: bool, indicator: Indicator) -> Tensor:
        """MS-MPPD of the layer or a distance of its spikes; the gradient reaches the perturbed run
        only.
        """
        check_choice("indicator", indicator, get_args(Indicator))
        if indicator != "mppd":
            return self._spike_loss(indicator, norm)
        if not self._perturbed:
            assert self.totals is not None
            return self.totals.mean(norm, input_gain=input_gain)
        x_seq, x_seq_perturbed = self._both(self._clean, self._perturbed, "input")
        charging = self.neuron.charging()
        gain = charging.gain
        if input_gain and charging.input_gain is not None:
            first = self._start[1]
            gain = gain * charging.input_gain[first : first + x_seq.shape[0]]
        eps = dynamics.simplified_perturbation(
            x_seq, x_seq_perturbed, decay=charging.decay, gain=gain
        )
        return dynamics.ms_mppd(eps, norm)

    def _spike_loss(self, indicator: Indicator, norm: dynamics.Norm) -> Tensor:
        if not self._kept.spikes:
            raise ValueError(
                f"indicator={indicator!r} needs the spikes: build the monitor with spikes=True"
            )
        clean, perturbed = self._both(self._clean_spikes, self._perturbed_spikes, "output")
        dtype = state_dtype(perturbed)
        difference = clean.to(dtype) - perturbed.to(dtype)
        return dynamics.ms_mppd(difference if indicator == "std" else difference.mean(0), norm)

    def _both(
        self, clean: "list[_Chunk]", perturbed: "list[_Chunk]", what: str
    ) -> tuple[Tensor, Tensor]:
        """Input or output of both runs, [T, N, *]; the clean one is a constant."""
        for chunk in (*clean, *perturbed):
            chunk.check(what, self.neuron.name)
        return _cat(clean), _cat(perturbed)

    def _keep(self, x_seq: Tensor, spike_seq: Tensor | None) -> LayerTotals | None:
        """Keep a chunk of the perturbed run for the loss; the statistics, if there are any."""
        if torch.is_grad_enabled() or not self._kept.statistics:
            self._perturbed.append(_Chunk.of(x_seq))
        else:
            self._clean.clear()  # without gradients the statistics know the loss
        if self._kept.spikes:
            assert spike_seq is not None  # they were asked for
            self._perturbed_spikes.append(_Chunk.of(spike_seq))
        if self._kept.statistics and self.totals is None:
            v_init, time_step = self._start
            self.totals = LayerTotals(
                neuron=self.neuron, v_init=v_init, time_step=time_step, kept=self._kept
            )
        return self.totals

    def _check_batch(self, x_seq: Tensor) -> None:
        v, _ = self._start
        expected = self._shape or (v.shape if isinstance(v, Tensor) else x_seq.shape[1:])
        self._shape = x_seq.shape[1:]
        if self._shape != expected:
            raise ValueError(
                f"layer {self.neuron.name!r} gets input of shape {tuple(x_seq.shape[1:])} per "
                f"step where its state has {tuple(expected)}: call functional.reset_net(net) "
                "before a batch of another size, and do not share one neuron between layers of "
                "different size"
            )


class _Chunk(NamedTuple):
    """Values [t, N, *] of one call, and the version by which torch tells whether they were changed
    in place.
    """

    values: Tensor
    version: int | None

    @classmethod
    def of(cls, values: Tensor) -> "_Chunk":
        return cls(values, None if values.is_inference() else values._version)

    def check(self, what: str, layer: str) -> None:
        if self.version is not None and self.values._version != self.version:
            raise RuntimeError(
                f"the {what} of layer {layer!r} was changed in place after the neuron's call, so "
                "its perturbation is lost: make the operation that changes it out of place"
            )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return bool(torch.as_tensor(first == second).all())


def _cat(chunks: list[_Chunk]) -> Tensor:
    if len(chunks) == 1:
        return chunks[0].values
    return torch.cat([chunk.values for chunk in chunks])
