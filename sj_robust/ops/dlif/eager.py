"""DLIF in plain torch, with an analytic backward pass that only stores the input.

A step costs as much as it has torch calls, so there are few, and none makes a mask of booleans.
Inside, potentials are negated: then ``threshold`` does fire and hard reset at once, and
``threshold_backward`` its gradient, since both keep what is above a value, and a negated potential
is above ``-v_threshold`` where the neuron is silent.
"""

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import (
    DLIFConfig,
    InputGradients,
    Inputs,
    OutputGradients,
    Outputs,
    Surrogate,
    state_dtype,
)
from sj_robust.ops.heap import advise_huge_pages

__all__ = ["backward", "forward", "unsupported_reason"]

# per thread and block, over all steps: fewer torch calls outweigh a smaller cache
_CPU_BLOCK_ELEMENTS = 1 << 21
_CPU_BLOCK_LIMIT = 1 << 24  # per block, however many threads


def unsupported_reason(x_seq: Tensor, surrogate: Surrogate) -> str | None:
    """Why this call cannot run here, or None."""
    if surrogate.needs_graph:
        return (
            "the surrogate has trainable parameters, or may use some, being a function of Python "
            "and no nn.Module; only backend='reference' computes their gradient"
        )
    return None


def forward(inputs: Inputs, outputs: Outputs) -> None:
    """See :class:`sj_robust.ops.dlif.operator.Implementation`."""
    x_seq = inputs.x_seq
    dtype = outputs.v.dtype
    flat = _flat(inputs)
    spike_seq = advise_huge_pages(outputs.spike_seq).view(flat.x_seq.shape)
    v = advise_huge_pages(outputs.v).view(-1)
    v_seq = None
    if outputs.v_seq is not None:
        v_seq = advise_huge_pages(outputs.v_seq).view(flat.x_seq.shape)
    blocks = _blocks(flat.x_seq)
    rows = _workspace(x_seq, blocks, rows=1 if x_seq.dtype == dtype else 2)
    for block in blocks:
        size = block.stop - block.start
        _advance(
            _part(flat, block),
            v=v[block],
            n_seq=[rows[0, :size]] * len(x_seq),
            spike=rows[-1, :size],
            spike_seq=spike_seq[:, block],
            v_seq=None if v_seq is None else v_seq[:, block],
        )
    v.neg_()


def backward(inputs: Inputs, grads: OutputGradients, found: InputGradients) -> None:
    """See :class:`sj_robust.ops.dlif.operator.Implementation`."""
    x_seq = inputs.x_seq
    input_gain = inputs.input_gain
    config = inputs.config
    dtype = state_dtype(x_seq)
    flat = _flat(inputs)
    grad_spike_seq = grads.spike_seq.view(flat.x_seq.shape)
    grad_v = None if grads.v is None else grads.v.view(-1)
    grad_v_seq = None if grads.v_seq is None else grads.v_seq.view(flat.x_seq.shape)
    grad_x_seq = advise_huge_pages(found.x_seq).view(flat.x_seq.shape)
    grad_v_init = None if found.v_init is None else found.v_init.view(-1)
    of_sum = torch.float64 if x_seq.device.type == "cpu" else dtype
    grad_gain = torch.zeros_like(input_gain, dtype=of_sum)
    gains = input_gain.unbind(0)
    blocks = _blocks(flat.x_seq)
    in_place = x_seq.dtype == dtype  # then the potentials stand where their gradients will
    rows = _workspace(x_seq, blocks, rows=2 if in_place else 2 + len(x_seq))
    for block in blocks:
        part = _part(flat, block)
        x_steps = part.x_seq.unbind(0)
        grad_x_steps = grad_x_seq[:, block].unbind(0)
        grad_spike_steps = grad_spike_seq[:, block].unbind(0)
        size = block.stop - block.start
        scratch, spare, *n_seq = rows[:, :size].unbind(0)
        if in_place:
            n_seq = list(grad_x_steps)
        _advance(part, v=scratch, n_seq=n_seq, spike=spare)
        grad_carry = None if grad_v is None else spare.copy_(grad_v[block])
        grad_gains = []
        for t in reversed(range(len(x_seq))):
            if grad_v_seq is not None:
                grad_v_now = grad_v_seq[t, block]
                if grad_carry is None:
                    grad_carry = spare.copy_(grad_v_now)
                else:
                    grad_carry.add_(grad_v_now)
            grad_spike = grad_spike_steps[t].to(dtype)
            grad_h = _grad_charge(n_seq[t], grad_spike, grad_carry, config, scratch, out=spare)
            if in_place:
                torch.mul(grad_h, gains[t], out=grad_x_steps[t])
            else:
                grad_x_steps[t].copy_(grad_h * gains[t])
            product = torch.mul(grad_h, x_steps[t].to(dtype), out=scratch)
            grad_gains.append(product.sum())  # a dot product loses digits
            grad_carry = grad_h.mul_(config.decay)
        grad_gain += torch.stack(grad_gains[::-1])
        if grad_v_init is not None:
            assert grad_carry is not None  # there is a step
            grad_v_init[block] = grad_carry
    found.input_gain.copy_(grad_gain)


def _flat(inputs: Inputs) -> Inputs:
    """The same with all neurons of a step in a row."""
    x_seq = inputs.x_seq
    v_init = inputs.v_init
    return inputs._replace(
        x_seq=x_seq.view(len(x_seq), x_seq[0].numel()),
        v_init=None if v_init is None else v_init.view(-1),
    )


def _blocks(x_seq: Tensor) -> list[slice]:
    """Ranges of neurons that bound the memory for T steps; one range on a GPU."""
    T, M = x_seq.shape
    if x_seq.device.type != "cpu":
        return [slice(0, M)]
    elements = min(_CPU_BLOCK_ELEMENTS * torch.get_num_threads(), _CPU_BLOCK_LIMIT)
    size = max(elements // T, 4096)
    return [slice(start, min(start + size, M)) for start in range(0, M, size)]


def _workspace(x_seq: Tensor, blocks: list[slice], rows: int) -> Tensor:
    """Memory for so many steps of a block, one piece that every block uses again."""
    size = blocks[0].stop if blocks else 0  # the others are no larger
    return advise_huge_pages(x_seq.new_empty(rows, size, dtype=state_dtype(x_seq)))


def _part(inputs: Inputs, block: slice) -> Inputs:
    v_init = inputs.v_init
    return inputs._replace(
        x_seq=inputs.x_seq[:, block], v_init=None if v_init is None else v_init[block]
    )


def _advance(
    inputs: Inputs,
    *,
    v: Tensor,
    n_seq: list[Tensor],
    spike: Tensor,
    spike_seq: Tensor | None = None,
    v_seq: Tensor | None = None,
) -> None:
    """Walk through all steps: negated, the last potential to ``v`` and the charged ones to
    ``n_seq``; others if given.

    ``n_seq`` may hold the same memory for every step; ``spike`` is scratch where spikes are not
    written in place.
    """
    x_seq, input_gain, v_init, config = inputs
    u = v
    at_rest = False
    if v_init is not None:
        torch.neg(v_init, out=u)
    elif config.v_reset:
        u.fill_(-config.v_reset)
    else:
        at_rest = True  # a potential of 0 adds nothing to the first step
    is_custom = config.surrogate.kind == "custom"
    needs_spike = spike_seq is not None or config.v_reset is None or is_custom
    spikes_in_place = spike_seq is not None and spike_seq.dtype == v.dtype
    steps = zip(x_seq.unbind(0), input_gain.neg().unbind(0), n_seq, strict=True)
    for t, (x, gain, n) in enumerate(steps):
        if x.dtype == n.dtype:
            torch.mul(x, gain, out=n)
        else:
            n.copy_(x).mul_(gain)
        if not at_rest:
            n.add_(u.mul_(config.decay))
        at_rest = False
        if config.leak_current:
            n.sub_(config.leak_current)
        if spike_seq is not None and spikes_in_place:
            spike = spike_seq[t]
        if needs_spike:
            _fire(n, config, out=spike)
        if spike_seq is not None and not spikes_in_place:
            spike_seq[t].copy_(spike)
        _reset(n, spike, config, out=u)
        if v_seq is not None:
            torch.neg(u, out=v_seq[t])


def _fire(n: Tensor, config: DLIFConfig, *, out: Tensor) -> None:
    if config.surrogate.kind == "custom":
        out.copy_(config.surrogate.spike(-n - config.v_threshold))
    else:
        torch.le(n, -config.v_threshold, out=out)


def _reset(n: Tensor, spike: Tensor, config: DLIFConfig, *, out: Tensor) -> None:
    """Negated potential after the reset."""
    if config.v_reset is None:
        torch.add(n, spike, alpha=config.v_threshold, out=out)
    elif config.surrogate.kind == "custom":
        torch.sub(n * (1 - spike), spike, alpha=config.v_reset, out=out)
    else:
        torch.ops.aten.threshold.out(n, -config.v_threshold, -config.v_reset, out=out)


def _grad_charge(
    n: Tensor,
    grad_spike: Tensor,
    grad_v: Tensor | None,
    config: DLIFConfig,
    scratch: Tensor,
    *,
    out: Tensor,
) -> Tensor:
    """Gradient of the charged potential, from those of the spike and of the potential after reset
    (None is zero).

    ``n`` is the negated charged potential; it and ``scratch`` are overwritten. ``grad_v`` is None
    or ``out``.
    """
    is_custom = config.surrogate.kind == "custom"
    through_spike = grad_spike
    if grad_v is not None and not config.detach_reset:
        if config.v_reset is None:
            through_spike = torch.add(grad_spike, grad_v, alpha=-config.v_threshold, out=scratch)
        else:
            kept = torch.add(n, config.v_reset, out=scratch) if config.v_reset else n
            through_spike = torch.addcmul(grad_spike, grad_v, kept, out=scratch)
    if grad_v is not None and config.v_reset is not None:
        if is_custom:
            grad_v.mul_(1 - config.surrogate.spike(-n - config.v_threshold).detach())
        else:
            torch.ops.aten.threshold_backward.grad_input(
                grad_v, n, -config.v_threshold, grad_input=grad_v
            )
    z = n.add_(config.v_threshold)  # negated, which makes no difference to the built-in surrogates
    derivative = config.surrogate.derivative_(z.neg_() if is_custom else z)
    if grad_v is None:
        return torch.mul(through_spike, derivative, out=out)
    return out.addcmul_(through_spike, derivative)
