"""The networks and the batch of the attacks' tests as fixtures."""

from attacks.conftest import batch, model

__all__ = ["batch", "model"]
