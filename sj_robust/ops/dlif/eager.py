"""DLIF in plain torch: analytic backward, saves only the input, works on blocks of neurons.

A step costs as much as it has torch calls, so there are few, and none makes a mask of booleans.
Inside, potentials are negated: then ``threshold`` does fire and hard reset at once, and
``threshold_backward`` its gradient, since both keep what is above a value, and a negated potential
is above ``-v_threshold`` where the neuron is silent.
"""

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients, Outputs, state_dtype
from sj_robust.ops.heap import advise_huge_pages
from sj_robust.ops.surrogate import Surrogate

__all__ = ["backward", "forward", "unsupported_reason"]

_CPU_BLOCK_ELEMENTS = (
    1 << 21
)  # per thread and block, over all steps: fewer torch calls outweigh a smaller cache
_CPU_BLOCK_LIMIT = 1 << 24  # per block, however many threads


def unsupported_reason(x_seq: Tensor, surrogate: Surrogate) -> str | None:
    """Why this call cannot run here, or None."""
    if surrogate.is_trainable:
        return (
            "the surrogate has trainable parameters, whose gradient only backend='reference' "
            "computes"
        )
    return None


def forward(inputs: Inputs, store_v_seq: bool) -> Outputs:
    """See :class:`sj_robust.ops.dlif.backends.Implementation`."""
    x_seq = inputs.x_seq
    spike_seq = advise_huge_pages(torch.empty_like(x_seq))
    v = advise_huge_pages(torch.empty_like(x_seq[0], dtype=state_dtype(x_seq)))
    v_seq = advise_huge_pages(torch.empty_like(x_seq, dtype=v.dtype)) if store_v_seq else None
    blocks = _blocks(x_seq)
    rows = _workspace(x_seq, blocks, rows=1 if x_seq.dtype == v.dtype else 2)
    for block in blocks:
        n, spike = (rows[i, : block.stop - block.start] for i in (0, -1))
        _advance(
            _part(inputs, block),
            v=v[block],
            n_seq=[n] * len(x_seq),
            spike=spike,
            spike_seq=spike_seq[:, block],
            v_seq=None if v_seq is None else v_seq[:, block],
        )
    return spike_seq, v.neg_(), v_seq


def backward(
    inputs: Inputs, grads: OutputGradients, needs_v_init: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`sj_robust.ops.dlif.backends.Implementation`."""
    x_seq, input_gain, _, config = inputs
    dtype = state_dtype(x_seq)
    grad_x_seq = advise_huge_pages(torch.empty_like(x_seq))
    grad_gain = torch.zeros_like(
        input_gain, dtype=torch.float64 if x_seq.device.type == "cpu" else dtype
    )
    grad_v_init = torch.empty_like(x_seq[0], dtype=dtype) if needs_v_init else None
    blocks = _blocks(x_seq)
    in_place = x_seq.dtype == dtype  # then the potentials stand where their gradients will
    rows = _workspace(x_seq, blocks, rows=2 if in_place else 2 + len(x_seq))
    for block in blocks:
        part = _part(inputs, block)
        grad_x_block = grad_x_seq[:, block]
        scratch, spare, *n_seq = rows[:, : block.stop - block.start].unbind(0)
        n_seq = n_seq or list(grad_x_block.unbind(0))
        _advance(part, v=scratch, n_seq=n_seq, spike=spare)
        grad_carry = None if grads.v is None else spare.copy_(grads.v[block])
        grad_gains = []
        of_step = (part.x_seq, grads.spike_seq[:, block], grad_x_block, input_gain)
        steps = list(zip(n_seq, *(of_block.unbind(0) for of_block in of_step), strict=True))
        for t, (n, x, grad_spike, grad_x, gain) in reversed(list(enumerate(steps))):
            if grads.v_seq is not None:
                grad_v_now = grads.v_seq[t, block]
                grad_carry = (
                    spare.copy_(grad_v_now) if grad_carry is None else grad_carry.add_(grad_v_now)
                )
            grad_h = _grad_charge(n, grad_spike.to(dtype), grad_carry, config, scratch, out=spare)
            torch.mul(grad_h, gain, out=grad_x) if in_place else grad_x.copy_(grad_h * gain)
            grad_gains.append(
                torch.mul(grad_h, x.to(dtype), out=scratch).sum()
            )  # a dot product loses digits
            grad_carry = grad_h.mul_(config.decay)
        grad_gain += torch.stack(grad_gains[::-1])
        if grad_v_init is not None:
            assert grad_carry is not None  # there is a step
            grad_v_init[block] = grad_carry
    return grad_x_seq, grad_gain.to(dtype), grad_v_init


def _blocks(x_seq: Tensor) -> list[slice]:
    """Ranges of neurons that bound the memory for T steps; one range on a GPU and under
    torch.compile.
    """
    T, M = x_seq.shape
    if (
        x_seq.device.type != "cpu" or torch.compiler.is_compiling()
    ):  # which would fix M, were it to count blocks
        return [slice(0, M)]
    size = max(min(_CPU_BLOCK_ELEMENTS * torch.get_num_threads(), _CPU_BLOCK_LIMIT) // T, 4096)
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
    if v_init is not None or config.v_reset:
        u = v.fill_(-(config.v_reset or 0.0)) if v_init is None else torch.neg(v_init, out=v)
        at_rest = False
    else:
        u, at_rest = v, True  # a potential of 0 adds nothing to the first step
    needs_spike = (
        spike_seq is not None or config.v_reset is None or config.surrogate.kind == "custom"
    )
    spikes_in_place = spike_seq is not None and spike_seq.dtype == v.dtype
    for t, (x, gain, n) in enumerate(
        zip(x_seq.unbind(0), input_gain.neg().unbind(0), n_seq, strict=True)
    ):
        torch.mul(x, gain, out=n) if x.dtype == n.dtype else n.copy_(x).mul_(gain)
        if not at_rest:
            n.add_(u.mul_(config.decay))
        at_rest = False
        if config.leak_current:
            n.sub_(config.leak_current)
        if spikes_in_place:
            assert spike_seq is not None  # see above
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
    return (
        torch.mul(through_spike, derivative, out=out)
        if grad_v is None
        else out.addcmul_(through_spike, derivative)
    )
