"""One autograd node for every implementation of DLIF that brings its own backward pass."""

from typing import Any, Protocol

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients, Outputs

__all__ = ["DLIFFunction", "Implementation", "output_gradients", "saved_tensors"]


class Implementation(Protocol):
    """What a backend provides, for contiguous tensors [T, M] and [M]."""

    def forward(self, inputs: Inputs, store_v_seq: bool) -> Outputs:
        """Spikes, last potential, and potentials after reset if asked for."""

    def backward(
        self, inputs: Inputs, grads: OutputGradients, needs_v_init: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of ``x_seq``, ``input_gain`` and, if needed, ``v_init``."""


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
    ) -> Outputs:
        """Forward pass over all steps."""
        ctx.save_for_backward(x_seq, input_gain, v_init)
        ctx.config, ctx.implementation = config, implementation
        ctx.set_materialize_grads(False)
        return implementation.forward(Inputs(x_seq, input_gain, v_init, config), store_v_seq)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Back-propagation through time."""
        x_seq, input_gain, v_init = saved_tensors(ctx)
        inputs = Inputs(x_seq, input_gain, v_init, ctx.config)
        found = ctx.implementation.backward(inputs, output_gradients(x_seq, *grads), ctx.needs_input_grad[2])
        return *found, None, None, None


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """Tensors that a forward pass saved for its backward pass, which is differentiable once.

    Raises:
        RuntimeError: If a graph of the backward pass is wanted, or the saved tensors were freed by an earlier one.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "DLIF is differentiable once: create_graph=True would silently lose the second derivative; "
            "set backend='reference' on the neurons to differentiate twice"
        )
    try:
        return ctx.saved_tensors  # type: ignore[no-any-return]  # ctx has no public type
    except RuntimeError as error:
        if "freed" not in str(error):  # such as a tensor that was changed in place
            raise
        raise RuntimeError(
            "backward reached a DLIF step whose graph was already freed: the membrane potential still "
            "belongs to an earlier sequence. Call functional.reset_net(net) before every new sequence, or "
            "functional.detach_net(net) between the chunks of one sequence"
        ) from error


def output_gradients(
    x_seq: Tensor, spike_seq: Tensor | None, v: Tensor | None, v_seq: Tensor | None
) -> OutputGradients:
    """Gradients as autograd hands them over, contiguous and those of the spikes written out."""
    return OutputGradients(
        torch.zeros_like(x_seq) if spike_seq is None else spike_seq.contiguous(),
        None if v is None else v.contiguous(),
        None if v_seq is None else v_seq.contiguous(),
    )
