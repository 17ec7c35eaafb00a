"""The affine maps between the leaves of a network, and runs that trace them."""

import torch
from torch import Tensor

from sj_robust.classifier import SpikingClassifier
from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import (
    BoundedRun,
    LayerCall,
    Programs,
    bounded_logits,
    pulled_back,
    unknown,
)
from sj_robust.proofs.moves import Events
from sj_robust.proofs.program import Program
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.spiking import Interval
from sj_robust.proofs.structure import Structure

__all__ = ["Maps", "Trace"]

_ELEMENTS = 2**22
"""Elements of all leaves that a pass back through a map holds: more rows than fit go one after the
other.
"""


class Trace(BoundedRun):
    """A run whose leaves are zero: the graphs of the affine maps, and what these shift by.

    Args:
        neurons: Neurons of known dynamics by name.
        samples: Number of samples.
    """

    points = True

    def __init__(self, neurons: dict[str, Neuron], samples: int) -> None:
        """Nothing has run yet."""
        super().__init__(neurons, samples)
        self.rounded = False
        self.currents: list[Tensor] = []

    def _reached(self, call: LayerCall) -> None:
        self.currents.append(call.current.centre)

    def spikes(self, neuron: Neuron, x_seq: Interval) -> Interval:
        """See :class:`BoundedRun`: no spike is bounded."""
        return x_seq

    def leaf(self, values: Interval, batch_dim: int) -> Bounds:
        """See :class:`BoundedRun`, with zeros."""
        zeros = torch.zeros_like(values.low)
        return super().leaf(Interval(zeros, zeros), batch_dim)


class Maps:
    """The affine maps between the leaves of a network, for any number of rows. 各层之间的仿射映射。

    A row is one sample of a run; the maps are the same for all of them.

    Args:
        model: The classifier.
        neurons: Its neurons of known dynamics by name.
        frame: One image [*].
    """

    def __init__(self, model: SpikingClassifier, neurons: dict[str, Neuron], frame: Tensor) -> None:
        """Nothing is captured yet."""
        self.neurons = neurons
        self.frame = frame
        self._model = model
        self._programs = Programs(model, neurons)
        self._traces: dict[int, Trace] = {}

    def bounded(self, run: BoundedRun, images: Tensor, eps: float | Events) -> Bounds:
        """Bounds of the logits that a run finds, for images [N, *]."""
        return bounded_logits(self._model, run, images, eps, programs=self._programs)

    def structure(self, *, framed: bool = False) -> Structure:
        """How the network treats samples and time; NotImplementedError if it mixes samples."""
        try:
            return self._programs.structure(self.frame.unsqueeze(0), framed=framed)
        except NoBoundsError as error:
            raise unknown(error, self._model) from error

    def program(self) -> Program:
        """The program of two images."""
        return self._programs.of(torch.stack([self.frame, self.frame]))

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

    def shift(self, call: int, rows: int) -> Tensor:
        """The call's current if all leaves are zero, native layout."""
        return self._trace(rows).currents[call].detach()

    def rows_that_fit(self) -> int:
        """Rows of one pass back through a map."""
        size = sum(leaf.centre.numel() for leaf in self._trace(1).leaves)
        return max(1, _ELEMENTS // max(1, size))

    def _trace(self, rows: int) -> Trace:
        if rows not in self._traces:
            if len(self._traces) > 3:
                oldest = next(key for key in self._traces if key != 1)
                del self._traces[oldest]
            trace = Trace(self.neurons, rows)
            zeros = self.frame.new_zeros(rows, *self.frame.shape)
            trace.currents.append(self.bounded(trace, zeros, 0.0).centre)
            self._traces[rows] = trace
        return self._traces[rows]
