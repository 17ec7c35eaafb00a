"""Registration of operators with torch.

A kernel reads memory, which a tracer's tensors do not have. So every call goes through torch's
registry, which knows the shapes of its outputs, its gradient and how to run it over a batch of
calls (vmap). Under autocast an operator takes every tensor as it is: the currents in any dtype,
potentials in float32.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Operator",
    "define",
    "differentiates_by_functorch",
    "have_memory",
    "in_functorch",
    "in_onnx_export",
    "is_traced",
    "present",
    "saved_tensors",
]

# untyped in torch
_library: Any = torch.library.Library("sj_robust", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Operator:
    """An operator of torch's registry.

    Attributes:
        overload: It, as torch knows it.
        kernel: What it runs on tensors that have memory: they by position, constants by keyword.
            An output that a call does not have may be None.
        gradient: How autograd goes through it. Its forward takes what to run, the tensors and the
            constants in a dictionary.
    """

    overload: Any
    kernel: Callable[..., Any]
    gradient: type[torch.autograd.Function] | None

    def __call__(self, *tensors: Tensor | None, **constants: Any) -> Any:
        """Call it; where torch would end at the kernel anyway, without asking it, which takes 15 to
        30 us.
        """
        if not have_memory(tensors):
            return self.overload(*tensors, **constants)
        if self.gradient is None:
            return self.kernel(*tensors, **constants)
        return _apply(self.gradient, self.kernel, tensors, constants)


def define(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    in_graph: Callable[..., Any] | None = None,
    gradient: type[torch.autograd.Function] | None = None,
) -> Operator:
    """An operator ``sj_robust::name`` for every device; vmap runs it once for every sample of the
    batch.

    ``torch.library.register_autograd`` is not used for the gradient: in every call it asks for the
    default of every argument, which takes 30 to 80 us.

    Args:
        schema: Name and signature: tensors by position, constants by keyword. An output that a
            call does not have is an empty tensor.
        kernel: See :class:`Operator`.
        fake: Tensors of the shapes, strides and dtypes of its outputs.
        in_graph: The kernel for calls of torch's registry, which checks the tensors, since the
            graph may have been made elsewhere, and returns every output; None for ``kernel``.
        gradient: See :class:`Operator`; None for an operator without one.
    """
    name = schema.partition("(")[0]
    qualified = f"sj_robust::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, in_graph or kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    overload = getattr(torch.ops.sj_robust, name).default

    def over_batch(
        info: Any, in_dims: tuple[int | None, ...], *tensors: Any, **constants: Any
    ) -> tuple[Any, ...]:
        samples = []
        for i in range(info.batch_size):
            pairs = zip(tensors, in_dims, strict=True)
            sample = [t if dim is None else t.select(dim, i) for t, dim in pairs]
            samples.append(overload(*sample, **constants))
        outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
        return outputs, (0,) * len(outputs)

    torch.library.register_vmap(qualified, over_batch, lib=_library)
    if gradient is None:
        return Operator(overload, kernel, None)

    def below_autograd(*tensors: Tensor | None, **constants: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # torch has no public name for it
            return overload(*tensors, **constants)

    def with_graph(*tensors: Tensor | None, **constants: Any) -> Any:
        return _apply(gradient, below_autograd, tensors, constants)

    _library.impl(name, with_graph, "Autograd")
    return Operator(overload, kernel, gradient)


def _apply(
    gradient: type[torch.autograd.Function],
    run: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    constants: dict[str, Any],
) -> Any:
    return gradient.apply(run, *tensors, constants)  # type: ignore[no-untyped-call]  # torch's


def saved_tensors(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    """Tensors that a forward pass saved for its backward pass of these gradients, which is
    differentiable once.

    Raises:
        RuntimeError: If a graph of the backward pass is wanted, the gradients are a batch of
            ``torch.autograd.grad(..., is_grads_batched=True)``, or the saved tensors were freed by
            an earlier backward pass.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "DLIF is differentiable once: create_graph=True would silently lose the second "
            "derivative; set backend='reference' on the neurons to differentiate twice"
        )
    is_batched = torch._C._functorch.is_legacy_batchedtensor  # torch has no public way to ask
    if any(gradient is not None and is_batched(gradient) for gradient in gradients):
        raise RuntimeError(
            "DLIF takes no batch of gradients (is_grads_batched=True, or vectorize=True of "
            "torch.autograd.functional): set backend='reference' on the neurons"
        )
    try:
        return ctx.saved_tensors  # type: ignore[no-any-return]  # ctx has no public type
    except RuntimeError as error:
        if "freed" not in str(error):  # such as a tensor that was changed in place
            raise
        raise RuntimeError(
            "backward reached a DLIF step whose graph was already freed: the membrane potential "
            "still belongs to an earlier sequence. Call functional.reset_net(net) before every "
            "new sequence, or functional.detach_net(net) between the chunks of one sequence"
        ) from error


def present(outputs: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Outputs as an operator returns them: an empty tensor for none."""
    return tuple(like.new_empty(0) if one is None else one for one in outputs)


# What torch has no public way to ask for; every release since 2.8 answers.


def in_functorch() -> bool:
    """Whether a transform of ``torch.func`` is at work, such as vmap."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def differentiates_by_functorch() -> bool:
    """Whether one of them differentiates, as ``torch.func.grad`` does."""
    if not in_functorch():
        return False
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    levels = retrieve_all_functorch_interpreters()
    return any(level.key().name in ("Grad", "Jvp") for level in levels)


def in_onnx_export() -> bool:
    """Whether torch writes an ONNX model, which can hold torch's own operators alone."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


def is_traced() -> bool:
    """Whether a call becomes part of what runs later or elsewhere, or over a batch of calls."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # whoever records has loaded it

    return get_proxy_mode() is not None


def have_memory(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether tensors hold what is in their memory, and nobody traces what is done with them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.is_neg():
            return False
        if tensor._is_zerotensor() or torch._is_functional_tensor(tensor):
            return False
    return True
