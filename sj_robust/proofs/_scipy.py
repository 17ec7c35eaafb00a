"""scipy, which only some proofs need: imported when one asks for it."""

import importlib
from typing import Any

__all__ = ["scipy_module"]


def scipy_module(name: str, *, wanted_by: str) -> Any:
    """A part of scipy; a ModuleNotFoundError says who wants it and what to install."""
    try:
        return importlib.import_module(f"scipy.{name}")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{wanted_by} needs scipy, which is not installed: pip install scipy"
        ) from error
