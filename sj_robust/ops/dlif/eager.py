"""DLIF in plain torch: analytic backward, saves only the input, works on blocks that stay in cache."""

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import DLIFConfig, initial_potential, state_dtype
from sj_robust.ops.surrogate import Surrogate

_CPU_BLOCK_ELEMENTS = 1 << 18  # per thread and block, over all steps: 1 MB in float32


def unavailable_reason() -> str | None:
    """Plain torch is always there."""
    return None


def unsupported_reason(x_seq: Tensor, surrogate: Surrogate) -> str | None:
    """Why this call cannot run here, or None."""
    if surrogate.is_trainable:
        return "the surrogate has trainable parameters, whose gradient only backend='reference' computes"
    return None


def forward(
    x_seq: Tensor, input_gain: Tensor, v_init: Tensor | None, config: DLIFConfig, store_v_seq: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`sj_robust.ops.dlif.autograd.Implementation`."""
    spike_seq = torch.empty_like(x_seq)
    v = initial_potential(x_seq, config) if v_init is None else v_init.clone()
    v_seq = torch.empty_like(x_seq, dtype=v.dtype) if store_v_seq else None
    for block in _blocks(x_seq):
        _advance(
            x_seq[:, block],
            input_gain,
            v[block],
            config,
            spike_seq=spike_seq[:, block],
            v_seq=None if v_seq is None else v_seq[:, block],
        )
    return spike_seq, v, v_seq


def backward(
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    config: DLIFConfig,
    grad_spike_seq: Tensor,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    needs_v_init: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`sj_robust.ops.dlif.autograd.Implementation`."""
    T = x_seq.shape[0]
    dtype = state_dtype(x_seq)
    grad_x_seq = torch.empty_like(x_seq)
    grad_gain = torch.zeros_like(input_gain, dtype=torch.float64 if x_seq.device.type == "cpu" else dtype)
    grad_v_init = torch.empty_like(x_seq[0], dtype=dtype) if needs_v_init else None
    v_start = initial_potential(x_seq, config) if v_init is None else v_init
    gains = input_gain.unbind(0)
    blocks = _blocks(x_seq)
    buffer = torch.empty_like(x_seq[:, blocks[0]], dtype=dtype) if blocks else None
    for block in blocks:
        assert buffer is not None  # there is a block
        h_seq = buffer[:, : block.stop - block.start]
        _advance(x_seq[:, block], input_gain, v_start[block].clone(), config, h_seq=h_seq)
        grad_carry = torch.zeros_like(h_seq[0]) if grad_v is None else grad_v[block].clone()
        for t in reversed(range(T)):
            if grad_v_seq is not None:
                grad_carry += grad_v_seq[t, block]
            x = x_seq[t, block].to(dtype)
            grad_h = _grad_charge(h_seq[t], grad_spike_seq[t, block].to(dtype), grad_carry, config)
            if x_seq.dtype == dtype:
                torch.mul(grad_h, gains[t], out=grad_x_seq[t, block])
            else:
                grad_x_seq[t, block] = grad_h * gains[t]
            grad_gain[t] += (grad_h * x).sum()
            grad_carry = grad_h.mul_(config.decay)
        if grad_v_init is not None:
            grad_v_init[block] = grad_carry
    return grad_x_seq, grad_gain.to(dtype), grad_v_init


def _blocks(x_seq: Tensor) -> list[slice]:
    """Ranges of neurons whose T steps fit in cache; one range on a GPU and under torch.compile."""
    T, M = x_seq.shape
    size = M
    if x_seq.device.type == "cpu" and not torch.compiler.is_compiling():
        size = max(_CPU_BLOCK_ELEMENTS // T, 4096) * torch.get_num_threads()
    return [slice(start, min(start + size, M)) for start in range(0, M, max(size, 1))]


def _advance(
    x_seq: Tensor,
    input_gain: Tensor,
    v: Tensor,
    config: DLIFConfig,
    *,
    spike_seq: Tensor | None = None,
    v_seq: Tensor | None = None,
    h_seq: Tensor | None = None,
) -> None:
    """Move ``v`` through all steps in place and fill whichever of the sequences is given."""
    surrogate, v_threshold = config.surrogate, config.v_threshold
    v_reset = None if config.v_reset is None else torch.full((), config.v_reset, dtype=v.dtype, device=v.device)
    buffer = torch.empty_like(v)
    for t, gain in enumerate(input_gain.unbind(0)):
        h = buffer if h_seq is None else h_seq[t]
        torch.mul(x_seq[t], gain, out=h) if x_seq.dtype == h.dtype else h.copy_(x_seq[t]).mul_(gain)
        h.add_(v.mul_(config.decay))
        if config.leak_current:
            h.add_(config.leak_current)
        if surrogate.kind == "custom":
            spike = surrogate.spike(h - v_threshold)
            kept = h * (1 - spike) + spike * config.v_reset if config.v_reset is not None else h - spike * v_threshold
            v.copy_(kept)
        else:
            spike = h >= v_threshold
            after_spike = h - v_threshold if v_reset is None else v_reset
            torch.where(spike, after_spike, h, out=v)
        if spike_seq is not None:
            spike_seq[t].copy_(spike)
        if v_seq is not None:
            v_seq[t].copy_(v)


def _grad_charge(h: Tensor, grad_spike: Tensor, grad_v: Tensor, config: DLIFConfig) -> Tensor:
    """Gradient of the potential after charging, from those of the spike and of the potential after reset."""
    z = h - config.v_threshold
    if config.v_reset is None:
        kept = grad_v
        through_spike = torch.add(grad_spike, grad_v, alpha=-config.v_threshold)
    else:
        if config.surrogate.kind == "custom":
            kept = grad_v * (1 - config.surrogate.spike(z).detach())
        else:
            kept = torch.where(z < 0, grad_v, 0.0)
        through_spike = torch.addcmul(grad_spike, grad_v, h - config.v_reset if config.v_reset else h, value=-1.0)
    if config.detach_reset:
        through_spike = grad_spike
    return torch.addcmul(kept, through_spike, config.surrogate.derivative(z))
