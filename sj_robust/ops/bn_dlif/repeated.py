"""One step of currents that represents all steps, after the first layer of a constant image."""

from torch import Tensor

__all__ = ["repeat_step", "repeated_step"]


def repeat_step(x: Tensor, T: int) -> Tensor:
    """Repeat one step over time without a copy; batch norm and DLIF in one pass return its gradient
    alone.

    Equation: ``x_seq[t] = x`` and ``grad x = sum_t grad x_seq[t]``, which otherwise would be
    written out T times and read again. The gradient of the sequence itself is then never computed,
    so a hook on that tensor is not called.

    Args:
        x: Currents of one step, [1, N, *].
        T: Number of time steps.

    Returns:
        The sequence, [T, N, *].

    Source: direct encoding of Ding et al. (ICML 2024), section 5, whose first current is the same
        at every step.

    Examples:
        >>> import torch
        >>> repeat_step(torch.zeros(1, 2, 3), 4).shape
        torch.Size([4, 2, 3])
    """
    x_seq = x.expand(T, *x.shape[1:])
    # a note that any operation on the tensor loses
    x_seq.single_step = x  # type: ignore[attr-defined]
    return x_seq


def repeated_step(x_seq: Tensor) -> Tensor | None:
    """The step that :func:`repeat_step` repeated, if this is its result."""
    return getattr(x_seq, "single_step", None)
