"""StoG: gates that let spikes through at random."""

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from sj_robust.core.checks import check_generator
from sj_robust.core.host import base
from sj_robust.defences.node import Bounded, PerNeuron
from sj_robust.defences.penalty import ForwardPasses, Penalty
from sj_robust.ops.limits import at_least, at_most

__all__ = ["GateRates", "StochasticGate"]

_LEAST = 0.1
_MOST = 0.999


class StochasticGate(PerNeuron, base.StepModule, Bounded):
    """A gate after each neuron that passes its spikes on with a learned probability (StoG).
    随机门控：以可学习概率传递脉冲。

    Equation, with u uniform in [0, 1), drawn for every neuron, step and sample, and ``logit(p) =
    log(p / (1 - p))``::

        p = rate within [0.1, 0.999]
        m[t] = 1 if u <= p else 0
        out[t] = m[t] * s[t]
        dm[t]/dp = that of sigmoid((logit(p) + logit(1 - u)) / temperature)

    the derivative of the binary concrete relaxation (u and 1 - u have the same distribution).
    ``rate`` [*] is a parameter with one value per neuron; the first forward determines its shape,
    and it starts at 0.999. The gates are also active in evaluation mode, so attacks on the network
    need the expectation (``eot_samples``, 10 in the paper) and its evaluation needs several draws.

    Outside its range a rate has no gradient and would stay there. The trainings of this package
    therefore call :meth:`project_` after every step of the optimizer; a loop of your own has to do
    so, too.

    Differences from the published code: its upper limit is 1, where the relaxation has no
    derivative; its rates are not put back into their range; its derivative has the opposite sign of
    the relaxation's and is averaged over the batch, while here it is the derivative itself; and its
    rates stop learning halfway. As in that code, weight decay does not apply to the rates.

    Shapes: spikes [T, N, *] in step mode ``"m"``, [N, *] in ``"s"``; the same out. It has no state.

    Args:
        temperature: Temperature of the relaxation, > 0.
        generator: Source of u; None uses torch's global generator, which attacks and evaluations
            seed.
        step_mode: ``"m"`` or ``"s"``.

    Raises:
        ValueError: If ``temperature`` is out of range.
        RuntimeError: If samples do not have the shape of the rates.

    Source: Ding et al., "Enhancing the Robustness of Spiking Neural Networks with Stochastic Gating
        Mechanisms" (AAAI 2024), and its code.

    Examples:
        >>> gate = StochasticGate(generator=torch.Generator().manual_seed(0))
        >>> gate(torch.ones(4, 2, 5)).mean()
        tensor(1., grad_fn=<MeanBackward0>)
        >>> _ = gate.rate.data.fill_(0.5)
        >>> gate(torch.ones(400, 2, 5)).mean().item() < 0.55
        True
    """

    undecayed = ("rate",)
    """Parameters that weight decay leaves alone; a training asks every module for them."""

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        generator: torch.Generator | None = None,
        step_mode: str = "m",
    ) -> None:
        """Keep the options; see the class."""
        super().__init__()
        if not temperature > 0:
            raise ValueError(
                f"temperature must be > 0, got {temperature}; the published code uses 0.5"
            )
        check_generator(generator)
        self.temperature = temperature
        self.generator = generator
        self.step_mode = step_mode
        self.rate = UninitializedParameter()

    @torch.no_grad()
    def project_(self) -> None:
        """Put the rates back into their range, in place."""
        if not isinstance(self.rate, UninitializedParameter):
            self.rate.clamp_(_LEAST, _MOST)

    def forward(self, spikes: Tensor) -> Tensor:
        """The spikes that pass the gate."""
        if self.step_mode == "s":
            return self._passed(spikes)
        return torch.stack([self._passed(step) for step in spikes])

    def _passed(self, spikes: Tensor) -> Tensor:
        self.materialize("rate", tuple(spikes.shape[1:]), _MOST, spikes)
        p = at_most(at_least(self.rate, _LEAST), _MOST)
        # torch.rand with generator=None does not compile for shapes that change
        u = p.new_empty(spikes.shape).uniform_(generator=self.generator)
        logistic = (1 - u).logit(eps=1e-6)
        scaled = (p.logit() + logistic) / self.temperature
        relaxed = scaled.sigmoid()
        opened = (u <= p).to(p.dtype)
        gate = opened + (relaxed - relaxed.detach())
        return spikes * gate.to(spikes.dtype)

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        return f"temperature={self.temperature}, step_mode={self.step_mode}"


class GateRates(Penalty):
    """Sum of the squared rates of all gates, which closes them as far as the task allows (StoG).
    门控概率的平方惩罚项。

    Equation: ``value = sum over neurons of rate ** 2 / 2``.

    Args:
        weight: Weight in the objective; 5e-6 in the paper.

    Raises:
        ValueError: If the weight is out of range; when evaluated, if the network has no gate.

    Source: Ding et al. (AAAI 2024), as :class:`StochasticGate`.

    Examples:
        >>> GateRates(weight=5e-6).name
        'gate_rates'
    """

    name = "gate_rates"

    def value(self, passes: ForwardPasses) -> Tensor:
        """Sum over all gates; see the class."""
        gates = [m for m in passes.classifier.modules() if isinstance(m, StochasticGate)]
        if not gates:
            raise ValueError(
                "gate_rates needs a network with StochasticGate; use --neuron stog, or omit it"
            )
        squares = [gate.rate.square().sum() / 2 for gate in gates]
        return torch.stack(squares).sum()
