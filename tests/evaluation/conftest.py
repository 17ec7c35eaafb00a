"""The networks of the attacks' tests as fixtures, the trained one among them."""

from attacks.conftest import batch, model, trained

__all__ = ["batch", "model", "trained"]
