"""One autograd node for every implementation of DLIF that brings its own backward pass."""

from typing import Any, Protocol

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import DLIFConfig

__all__ = ["DLIFFunction", "Implementation"]


class Implementation(Protocol):
    """What a backend provides. Tensors are [T, M] contiguous (inputs) and [T] or [M] (gain, potential)."""

    def forward(
        self, x_seq: Tensor, input_gain: Tensor, v_init: Tensor | None, config: DLIFConfig, store_v_seq: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Spikes [T, M], last potential [M], potentials after reset [T, M] if asked for."""

    def backward(
        self,
        x_seq: Tensor,
        input_gain: Tensor,
        v_init: Tensor | None,
        config: DLIFConfig,
        grad_spike_seq: Tensor,
        grad_v: Tensor | None,
        grad_v_seq: Tensor | None,
        needs_v_init: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of ``x_seq``, ``input_gain`` and, if needed, ``v_init``.

        A gradient that is None is zero; whether its product with an infinite potential is NaN or zero is left open.
        """


class DLIFFunction(torch.autograd.Function):
    """Runs an :class:`Implementation`; saves its inputs and nothing else, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        input_gain: Tensor,
        v_init: Tensor | None,
        config: DLIFConfig,
        implementation: Implementation,
        store_v_seq: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Forward pass over all steps."""
        ctx.save_for_backward(x_seq, input_gain, v_init)
        ctx.config, ctx.implementation = config, implementation
        ctx.set_materialize_grads(False)
        return implementation.forward(x_seq, input_gain, v_init, config, store_v_seq)

    @staticmethod
    def backward(
        ctx: Any, grad_spike_seq: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Back-propagation through time."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "DLIF is differentiable once: create_graph=True would silently lose the second derivative; "
                "set backend='reference' on the neurons to differentiate twice"
            )
        x_seq, input_gain, v_init = _saved_tensors(ctx)
        if grad_spike_seq is None:
            grad_spike_seq = torch.zeros_like(x_seq)
        grad_x_seq, grad_input_gain, grad_v_init = ctx.implementation.backward(
            x_seq,
            input_gain,
            v_init,
            ctx.config,
            grad_spike_seq.contiguous(),
            None if grad_v is None else grad_v.contiguous(),
            None if grad_v_seq is None else grad_v_seq.contiguous(),
            ctx.needs_input_grad[2],
        )
        return grad_x_seq, grad_input_gain, grad_v_init, None, None, None


def _saved_tensors(ctx: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    try:
        x_seq, input_gain, v_init = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            "backward reached a DLIF step whose graph was already freed: the membrane potential still "
            "belongs to an earlier sequence. Call functional.reset_net(net) before every new sequence, or "
            "functional.detach_net(net) between the chunks of one sequence"
        ) from error
    return x_seq, input_gain, v_init
