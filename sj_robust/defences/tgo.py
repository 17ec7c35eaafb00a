"""TGO: potentials kept away from the threshold, and neurons that fire with noise."""

from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.checks import check_generator
from sj_robust.defences.node import SteppedNode, check_decay
from sj_robust.defences.penalty import PotentialPenalty, check_weight
from sj_robust.neuron.charging import Charging
from sj_robust.ops.recurrence import charge, reset

__all__ = ["NoisyLIFNode", "ThresholdGuarding"]


class NoisyLIFNode(SteppedNode):
    """LIF neuron that fires with noise, the second half of threshold guarding optimisation (TGO).
    带噪声发放的 LIF 神经元。

    Equation, with ``decay = 1 - 1 / tau`` and ``n ~ N(0, 1)``, new for every neuron, step and
    sample::

        h[t] = decay * v[t-1] + x[t]   (+ (1 - decay) * v_reset for a hard reset)
        s[t] = 1 if h[t] + noise_std * n[t] >= v_threshold else 0
        v[t] = (1 - s[t]) * h[t] + s[t] * v_reset      (v_reset None: h[t] - s[t] * v_threshold)

    so that ``P(s = 1 | h) = Phi((h - v_threshold) / noise_std)``: a neuron near the threshold fires
    with a probability that a small change of h hardly affects. The gradient is the surrogate's at
    ``h + noise_std * n - v_threshold``. A network of such neurons draws random numbers in every
    forward, so attacks on it need the expectation (``eot_samples``) and its evaluation needs
    several draws.

    The following is not stated in the paper and was chosen here: the noise decides whether the
    neuron spikes but does not stay in the potential; its standard deviation; and whether it is
    active outside training (``noise_at_test``), which summaries of the paper deny and its reviewers
    assume.

    Shapes and states: see :class:`SteppedNode`.

    Args:
        tau: Membrane time constant in steps, > 1; ``math.inf`` for no leak.
        noise_std: Standard deviation of the noise, >= 0, in units of the potential.
        noise_at_test: Whether the noise is also active in evaluation mode.
        generator: Source of the noise; None uses torch's global generator, which attacks and
            evaluations seed.
        **arguments: Those of :class:`SteppedNode`.

    Raises:
        ValueError: If ``tau`` or ``noise_std`` is out of range.

    Source: Wang et al., "Robust Spiking Neural Networks Against Adversarial Attacks" (ICLR 2026),
        NLIF; firing with Gaussian noise as in Ma et al., "Exploiting noise as a resource for
        computation and learning in spiking neural networks" (Patterns 2023).

    Examples:
        >>> node = NoisyLIFNode(tau=2.0, noise_std=0.1)
        >>> node(torch.full((4, 1), 0.6)).shape
        torch.Size([4, 1])
        >>> NoisyLIFNode(tau=2.0, noise_std=0.0)(torch.full((4, 1), 0.6)).flatten()
        tensor([0., 0., 1., 0.])
    """

    def __init__(
        self,
        tau: float = 100.0,
        *,
        noise_std: float = 0.2,
        noise_at_test: bool = True,
        generator: torch.Generator | None = None,
        **arguments: Any,
    ) -> None:
        """Build the neuron; see the class."""
        super().__init__(**arguments)
        check_generator(generator)
        self.decay = check_decay(tau)
        self.tau = float(tau)
        self.noise = _Noise(check_weight("noise_std", noise_std), noise_at_test, generator)

    def step(self, x: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """See the class."""
        v, time_step = states
        h = charge(v, x, decay=self.decay, gain=1.0, v_reset=self.v_reset)
        spike = self.surrogate_function(self.noise(h) - self.v_threshold)
        fired = spike.detach() if self.detach_reset else spike
        v = reset(h, fired, v_threshold=self.v_threshold, v_reset=self.v_reset)
        return spike, (v, time_step + 1)

    def charging(self) -> Charging:
        """How the neuron charges, for monitors and penalties."""
        return Charging(self.decay)

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        return f"tau={self.tau}, {super().extra_repr()}"


class _Noise(nn.Module):
    """Gaussian noise on top of a potential.

    It is a module of its own because a classifier puts the neurons of SpikingJelly 0.0.0.0.14, and
    nothing else, in training mode where it needs a gradient.
    """

    def __init__(self, std: float, at_test: bool, generator: torch.Generator | None) -> None:
        super().__init__()
        self.std = std
        self.at_test = at_test
        self.generator = generator

    def forward(self, h: Tensor) -> Tensor:
        if self.std == 0 or not (self.training or self.at_test):
            return h
        # torch.randn with generator=None does not compile for shapes that change
        noise = h.new_empty(h.shape).normal_(generator=self.generator)
        return h + self.std * noise

    def extra_repr(self) -> str:
        return f"std={self.std}, at_test={self.at_test}"


class ThresholdGuarding(PotentialPenalty):
    """Keeps membrane potentials away from the threshold, where a small change flips a spike; the
    first half of threshold guarding optimisation (TGO).
    膜电位远离阈值的约束。

    Equation, with h the potential before the reset::

        value = mean over layers of mean over neurons, time and batch of max(0, margin - |h -
        v_threshold|)

    over all passes of the step, clean and perturbed. The gradient reaches the network through h,
    including its past spikes (surrogate), unless a neuron detaches its reset. For a
    :class:`NoisyLIFNode`, h is the potential without the noise.

    The paper does not state ``margin`` or the largest weight. Its weight rises along a cosine
    (``rising``), and it sums over layers, while the mean is used here.

    Args:
        weight: Weight in the objective.
        margin: Distance from the threshold within which a potential is penalised, in units of the
            potential, > 0.
        **options: ``layers`` and ``rising``, see
            :class:`~sj_robust.defences.penalty.PotentialPenalty`; so are the errors.

    Source: threshold-guarding constraint of Wang et al., "Robust Spiking Neural Networks Against
        Adversarial Attacks" (ICLR 2026).

    Examples:
        >>> ThresholdGuarding(weight=0.1, margin=0.5).margin
        0.5
    """

    name = "threshold_guarding"

    def __init__(self, weight: float, *, margin: float = 0.5, **options: Any) -> None:
        """Keep the options; see the class."""
        super().__init__(weight, **options)
        self.margin = check_weight("margin", margin, positive=True)

    def cost(self, z: Tensor, node: Any) -> Tensor:
        """``max(0, margin - |z|)``."""
        return (self.margin - z.abs()).relu()
