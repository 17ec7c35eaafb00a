"""The batch norm of one call."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["BatchNorm"]


@dataclass(frozen=True)
class BatchNorm:
    """What ``torch.nn.functional.batch_norm`` takes besides its input; every tensor is [C] or None.

    Args:
        weight: Scale per channel, or None for 1.
        bias: Offset per channel, or None for 0.
        running_mean: Updated in place when batch statistics are used; needed when they are not.
        running_var: As ``running_mean``.
        use_batch_statistics: Whether mean and variance are those of this batch (training).
        momentum: Share of this batch in the running statistics.
        eps: Added to the variance.

    Raises:
        ValueError: If neither batch nor running statistics are there to use.

    Examples:
        >>> BatchNorm(None, None, None, None, use_batch_statistics=True).eps
        1e-05
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    use_batch_statistics: bool
    momentum: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check that there are statistics to use."""
        if not self.use_batch_statistics and (
            self.running_mean is None or self.running_var is None
        ):
            raise ValueError(
                "running_mean and running_var must be given when use_batch_statistics is False, "
                "got None; pass them, or use_batch_statistics=True"
            )
