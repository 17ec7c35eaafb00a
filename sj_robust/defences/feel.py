"""FEEL-SNN: images that lose high frequencies over time, and learned leaks."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from sj_robust.core.host import base
from sj_robust.defences.node import PerNeuron, SteppedNode, check_decay
from sj_robust.ops.recurrence import reset

__all__ = ["EvolvingLeakNode", "FrequencyEncoder"]


class FrequencyEncoder(base.MemoryModule):
    """Frames that lose high frequencies from step to step (the FE of FEEL-SNN).
    逐步滤除高频的频率编码。

    Equation, with the two-dimensional Fourier transform F of each channel, its frequencies k and l
    starting at -H/2 and -W/2, and the step t = 0, 1, ...::

        keep[t] = 1 - narrowing * t
        M[t](k, l) = 1 where -keep[t] * H/2 <= k < keep[t] * H/2, and l likewise with W, else 0
        frame[t] = |F^-1(M[t] * F(x))|

    The backward pass uses the real part. The magnitude has no derivative at 0, the value of black
    pixels, and its sign there is determined by rounding errors, which would hide the gradient from
    an attack. The two differ where the filtered image is far from real and positive.

    Call it once per step, as ``SpikingClassifier`` does; ``functional.reset_net`` returns to the
    first step.

    The paper only covers images of 32x32, for which its masks are 32, 28, 24, ... wide, which is
    ``narrowing`` 1/8.

    Args:
        narrowing: Share of the width of the mask that is removed per step, in [0, 1]; at ``t *
            narrowing >= 1`` nothing would remain, which is an error.

    Raises:
        ValueError: If ``narrowing`` is out of range.
        RuntimeError: If no frequency remains.

    Source: Xu et al., "FEEL-SNN: Robust Spiking Neural Networks with Frequency Encoding and
        Evolutionary Leak Factor" (NeurIPS 2024), and its code (shape of the masks, magnitude).

    Examples:
        >>> encoder = FrequencyEncoder()
        >>> x = torch.rand(2, 1, 8, 8)
        >>> bool(torch.allclose(encoder(x), x, atol=1e-6)), bool(torch.allclose(encoder(x), x))
        (True, False)
    """

    time_step: int

    def __init__(self, narrowing: float = 0.125) -> None:
        """Keep the option; see the class."""
        super().__init__()
        if not 0.0 <= narrowing <= 1.0:
            raise ValueError(
                f"narrowing must be in [0, 1], got {narrowing}; the paper uses 1/8 per step"
            )
        self.narrowing = narrowing
        self.register_memory("time_step", 0)

    def forward(self, images: Tensor) -> Tensor:
        """The frame of the next step, in the shape and dtype of ``images`` [N, C, H, W]."""
        keep = 1.0 - self.narrowing * self.time_step
        if keep <= 0:
            raise RuntimeError(
                f"narrowing={self.narrowing} leaves no frequency at step {self.time_step}; use a "
                "smaller one, or fewer time steps"
            )
        self.time_step += 1
        if images.numel() == 0:  # of which not every library has a transform
            return images
        wide = images if images.dtype == torch.float64 else images.float()
        spectrum = torch.fft.fft2(wide) * self._mask(wide, keep)
        filtered = torch.fft.ifft2(spectrum)
        frame: Tensor = filtered.real + (filtered.abs() - filtered.real).detach()
        return frame.to(images.dtype)

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        return f"narrowing={self.narrowing}"

    @staticmethod
    def _mask(images: Tensor, keep: float) -> Tensor:
        """1 for the frequencies that stay, [H, W] in the order of the transform."""
        sides = []
        for size in images.shape[-2:]:
            half = size // 2
            reach = round(keep * half, 6)  # 0.4 * 5 is 2, whatever it rounds to
            k = torch.arange(size, device=images.device) - half
            inside = (k >= -reach) & (k < reach)
            if size % 2:  # there are as many frequencies above 0 as below
                inside = k.abs() <= reach
            side = inside.to(images.dtype)
            sides.append(torch.fft.ifftshift(side))
        return torch.outer(*sides)


class EvolvingLeakNode(SteppedNode, PerNeuron):
    """LIF neuron with a learned leak for every neuron and time step (the EL of FEEL-SNN).
    泄漏因子可学习的 LIF 神经元。

    Equation::

        h[t] = leak[t] * v[t-1] + x[t]
        s[t] = 1 if h[t] >= v_threshold else 0
        v[t] = (1 - s[t]) * h[t] + s[t] * v_reset      (v_reset None: h[t] - s[t] * v_threshold)

    ``leak`` [T, *] is an unbounded parameter with the shape of one sample, which the first forward
    determines; after a reset ``leak[0]`` has no effect, since v is 0. The leak follows the
    sequence, not the call, as DLIF's gain does.

    The paper does not state a bound on the leak (its code has none) nor its initial value (its code
    uses 1, ``tau=math.inf``).

    Shapes and states: see :class:`SteppedNode`.

    Args:
        T: Number of time steps of a sequence.
        tau: Initial membrane time constant, ``leak = 1 - 1 / tau``, > 1.
        **arguments: Those of :class:`SteppedNode`.

    Raises:
        ValueError: If ``T`` or ``tau`` is out of range.
        RuntimeError: If a sequence is longer than T, or samples do not have the shape of the leaks.

    Source: Xu et al. (NeurIPS 2024), as for :class:`FrequencyEncoder`, and its code.

    Examples:
        >>> node = EvolvingLeakNode(T=4, tau=2.0)
        >>> node(torch.full((4, 3, 5), 0.6)).sum(), node.leak.shape
        (tensor(15., grad_fn=<SumBackward0>), torch.Size([4, 5]))
    """

    T: int
    per_step = ("leak",)

    def __init__(self, T: int, tau: float = float("inf"), **arguments: Any) -> None:
        """Build the neuron; see the class."""
        super().__init__(**arguments)
        if T < 1:
            raise ValueError(f"T must be >= 1, the number of time steps of a sequence, got {T}")
        self.T = T
        self.first_leak = check_decay(tau)
        self.leak = UninitializedParameter()

    def step(self, x: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """See the class."""
        v, time_step = states
        if time_step >= self.T:
            raise RuntimeError(
                f"EvolvingLeakNode has T={self.T} time steps, but step {time_step + 1} was asked "
                "for: call functional.reset_net(net) before every new sequence, or build the "
                "neuron with a larger T"
            )
        self.materialize("leak", (self.T, *x.shape[1:]), self.first_leak, x)
        h = self.leak[time_step].to(x.dtype) * v + x
        spike = self.surrogate_function(h - self.v_threshold)
        fired = spike.detach() if self.detach_reset else spike
        v = reset(h, fired, v_threshold=self.v_threshold, v_reset=self.v_reset)
        return spike, (v, time_step + 1)

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        return f"T={self.T}, {super().extra_repr()}"
