"""One layer in one pair of runs: what is kept of the clean run until the perturbed run uses it up."""

from collections import deque
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.perturbation import dynamics
from sj_robust.perturbation._statistics import LayerTotals, LayerTrace, PairStatistics

__all__ = ["Indicator", "LayerPair"]

Indicator = Literal["mppd", "tasad", "std"]


class LayerPair:
    """A clean and a perturbed run of one layer, one after the other or as the two halves of one batch.

    Args:
        neuron: The layer.
        paired: Whether one run holds both, clean samples first.
        input_gain: Whether the perturbation of a trace contains the learnable gain.
        trace: Whether full traces are kept.
        spikes: Whether the spikes are kept for a loss on them.
        statistics: Whether anything is measured beside the loss.
    """

    def __init__(
        self, neuron: Neuron, *, paired: bool, input_gain: bool, trace: bool, spikes: bool, statistics: bool
    ) -> None:
        """Nothing is kept yet; see the class."""
        self.neuron = neuron
        self.totals: LayerTotals | None = None
        self.trace: LayerTrace | None = None
        self.full_valid = True
        self._paired = paired
        self._options = {"input_gain": input_gain, "trace": trace}
        self._start: tuple[float | Tensor, int] | None = None
        self._shape: torch.Size | None = None
        self._time_step = 0
        self._clean_steps = 0
        self._taken_steps = 0
        self._measures = statistics
        self._steps: deque[tuple[Tensor, int | None, Tensor]] = deque()
        self._statistics: PairStatistics | None = None
        # Input currents of both runs in chunks [t, N, *] with their version, for the loss.
        self._clean_chunks: list[tuple[Tensor, int | None]] = []
        self._perturbed_chunks: list[tuple[Tensor, int | None]] = []
        # The same of the spikes, if they are kept.
        self._keep_spikes = spikes
        self._clean_spikes: list[Tensor] = []
        self._perturbed_spikes: list[tuple[Tensor, int | None]] = []

    @property
    def took_one_step(self) -> bool:
        """Whether the clean run was a single call in step mode ``"s"``."""
        return self._clean_steps == 1 and self.neuron.module.step_mode == "s"

    def before(self, first_call: bool, perturbed: bool) -> None:
        """Take note of the state in which the neuron enters a call; ``first_call`` of the clean or perturbed run."""
        v = self.neuron.module.v
        if not first_call:
            if not isinstance(v, Tensor):
                raise RuntimeError(
                    f"layer {self.neuron.name!r} was reset inside one run: clean(), perturbed() and paired() each hold "
                    "one run of the network; leave the context before resetting and running again"
                )
            return
        start = (v.detach().clone() if isinstance(v, Tensor) else float(v), self.neuron.time_step)
        if not perturbed:
            self._start = start
            self._time_step = start[1]
        elif self._start is None or start[1] != self._start[1] or not _same(start[0], self._start[0]):
            raise RuntimeError(
                f"layer {self.neuron.name!r} starts the perturbed run from another state than the clean run: "
                "call functional.reset_net(net) before each run"
            )

    def take_clean(self, x_seq: Tensor, spike_seq: Tensor) -> None:
        """Keep a chunk [t, N, *] of the clean run."""
        self._check_batch(x_seq)
        x_seq = x_seq.detach()
        version = _version(x_seq)
        self._clean_chunks.append((x_seq, version))
        self._clean_steps += len(x_seq)
        if not (self._measures or self._keep_spikes):
            return
        # A network may go on in place on its spikes, hence a copy; as bool where that loses nothing.
        spikes = spike_seq.detach() != 0 if self.neuron.binary else spike_seq.detach().clone()
        if self._keep_spikes:
            self._clean_spikes.append(spikes)
        if self._measures:
            self._steps.extend((x, version, spike) for x, spike in zip(x_seq, spikes, strict=True))

    def take_perturbed(self, x_seq: Tensor, spike_seq: Tensor) -> None:
        """Use up as many steps of the clean run as the chunk [t, N, *] of the perturbed run has."""
        self._taken_steps += len(x_seq)
        if self._taken_steps > self._clean_steps:
            raise ValueError(
                f"layer {self.neuron.name!r} takes more steps in the perturbed run than in the clean run "
                f"({self._clean_steps}): give both runs the same number of time steps"
            )
        if x_seq.shape[1:] != self._shape:
            raise ValueError(
                f"layer {self.neuron.name!r} gets input of shape {tuple(x_seq.shape[1:])} per step in the perturbed run"
                f" and {tuple(self._shape or ())} in the clean run: give both runs batches of the same shape"
            )
        self._keep_for_loss(x_seq, spike_seq)
        if not self._measures:
            return
        statistics = self._open_statistics()
        for x_perturbed, spike_perturbed in zip(x_seq.detach(), spike_seq.detach(), strict=True):
            x, version, spike = self._steps.popleft()
            self._check_version(x, version)
            statistics.step(x, spike, x_perturbed, spike_perturbed)
        statistics.check_potential(self.neuron.module.v)

    def take_paired(self, x_seq: Tensor, spike_seq: Tensor) -> None:
        """Use a chunk [t, 2 N, *] whose first half of the batch is clean and whose second half is perturbed."""
        self._check_batch(x_seq)
        size = x_seq.shape[1]
        if size % 2:
            raise ValueError(
                f"layer {self.neuron.name!r} gets a batch of {size}: paired() needs an even batch, clean samples first "
                "and then as many perturbed ones, torch.cat((x, x_perturbed))"
            )
        half = size // 2
        if not self._taken_steps:
            self._check_paired_start(half)
        self._taken_steps += len(x_seq)
        self._keep_for_loss(x_seq, spike_seq)
        if not self._measures:
            return
        statistics = self._open_statistics()
        for x, spike in zip(x_seq.detach(), spike_seq.detach(), strict=True):
            statistics.step(x[:half], spike[:half], x[half:], spike[half:])
        v = self.neuron.module.v
        statistics.check_potential(v[half:] if isinstance(v, Tensor) else v)

    def finish(self) -> None:
        """End the pair.

        Raises:
            ValueError: If the perturbed run had fewer steps than the clean one.
        """
        if not self._taken_steps or (not self._paired and self._taken_steps < self._clean_steps):
            raise ValueError(
                f"layer {self.neuron.name!r} takes {self._taken_steps} steps in the perturbed run and "
                f"{self._clean_steps} in the clean run: give both runs the same number of time steps"
            )
        self._start = None
        if self._statistics is not None:
            self.trace = self._statistics.close()
            self.totals = LayerTotals(self._statistics)
            self.full_valid = self._statistics.full_valid

    def loss(self, norm: Literal["l2", "l1"], *, input_gain: bool, indicator: Indicator) -> Tensor:
        """MS-MPPD of the layer or a distance of its spikes; the gradient reaches the perturbed run only."""
        if indicator not in get_args(Indicator):
            raise ValueError(f"indicator must be one of {get_args(Indicator)}, got {indicator!r}")
        if indicator != "mppd":
            return self._spike_loss(indicator, norm)
        if not self._perturbed_chunks:
            assert self._statistics is not None
            return self._statistics.mean(norm, input_gain=input_gain)
        x_seq, x_seq_perturbed = self._currents()
        charging = self.neuron.charging()
        gain = charging.gain
        if input_gain and charging.input_gain is not None:
            gain = gain * charging.input_gain[self._time_step : self._time_step + x_seq.shape[0]]
        eps = dynamics.simplified_perturbation(x_seq, x_seq_perturbed, decay=charging.decay, gain=gain)
        return dynamics.ms_mppd(eps, norm)

    def _spike_loss(self, indicator: Indicator, norm: Literal["l2", "l1"]) -> Tensor:
        if not self._keep_spikes:
            raise ValueError(f"indicator={indicator!r} needs the spikes: build the monitor with spikes=True")
        for spikes, version in self._perturbed_spikes:
            self._check_version(spikes, version, what="output")
        perturbed = _cat([spikes for spikes, _ in self._perturbed_spikes])
        if self._paired:
            clean, perturbed = perturbed.detach().chunk(2, 1)[0], perturbed.chunk(2, 1)[1]
        else:
            clean = _cat(self._clean_spikes)
        dtype = torch.float64 if perturbed.dtype == torch.float64 else torch.float32
        difference = clean.to(dtype) - perturbed.to(dtype)
        return dynamics.ms_mppd(difference if indicator == "std" else difference.mean(0), norm)

    def _currents(self) -> tuple[Tensor, Tensor]:
        for x, version in (*self._clean_chunks, *self._perturbed_chunks):
            self._check_version(x, version)
        perturbed = _cat([x for x, _ in self._perturbed_chunks])
        if not self._paired:
            return _cat([x for x, _ in self._clean_chunks]), perturbed
        half = perturbed.shape[1] // 2
        return perturbed[:, :half].detach(), perturbed[:, half:]

    def _keep_for_loss(self, x_seq: Tensor, spike_seq: Tensor) -> None:
        """Keep a chunk of the perturbed run or of both; without gradients the statistics know the loss."""
        if torch.is_grad_enabled() or not self._measures:
            self._perturbed_chunks.append((x_seq, _version(x_seq)))
        else:
            self._clean_chunks.clear()
        if self._keep_spikes:
            self._perturbed_spikes.append((spike_seq, _version(spike_seq)))

    def _open_statistics(self) -> PairStatistics:
        if self._statistics is None:
            assert self._start is not None
            v_init, time_step = self._start
            if self._paired and isinstance(v_init, Tensor):
                v_init = v_init[: v_init.shape[0] // 2]
            self._statistics = PairStatistics(self.neuron, v_init, time_step, **self._options)
        return self._statistics

    def _check_batch(self, x_seq: Tensor) -> None:
        assert self._start is not None
        v = self._start[0]
        expected = self._shape or (v.shape if isinstance(v, Tensor) else x_seq.shape[1:])
        self._shape = x_seq.shape[1:]
        if self._shape != expected:
            raise ValueError(
                f"layer {self.neuron.name!r} gets input of shape {tuple(x_seq.shape[1:])} per step where its state has "
                f"{tuple(expected)}: call functional.reset_net(net) before a batch of another size, and do not share "
                "one neuron between layers of different size"
            )

    def _check_paired_start(self, half: int) -> None:
        assert self._start is not None
        v = self._start[0]
        if isinstance(v, Tensor) and not torch.equal(v[:half], v[half:]):
            raise RuntimeError(
                f"layer {self.neuron.name!r} starts with different states in the clean and the perturbed half of the "
                "batch: call functional.reset_net(net) before the run"
            )

    def _check_version(self, x: Tensor, version: int | None, *, what: str = "input") -> None:
        if version is not None and x._version != version:
            raise RuntimeError(
                f"the {what} of layer {self.neuron.name!r} was changed in place after the neuron's call, so its "
                "perturbation is lost: make the operation that changes it out of place"
            )


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return bool(torch.as_tensor(first == second).all())


def _cat(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)
