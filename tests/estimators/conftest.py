"""The trained network of the attacks' tests as a fixture."""

from attacks.conftest import trained

__all__ = ["trained"]
