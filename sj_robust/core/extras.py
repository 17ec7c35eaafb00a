"""Packages that a suite runs on and that come with an extra: asked for before any work, and before
torch is imported.
"""

from importlib.util import find_spec

__all__ = ["check_extra"]

_PACKAGES = {
    "corruptions": ("imagecorruptions", "corruptions"),
}
"""By suite, its package and the extra that installs it."""


def check_extra(suite: str) -> None:
    """Raise ModuleNotFoundError, with the command to install it, if the package of a suite is
    missing. 检查套件所需的可选依赖。

    Args:
        suite: Name of a suite of attacks, or ``"corruptions"``.

    Examples:
        >>> check_extra("standard")  # needs none
    """
    package, extra = _PACKAGES.get(suite, ("", ""))
    if package and find_spec(package) is None:
        raise ModuleNotFoundError(
            f"the suite {suite} needs {package}, which is not installed: pip install "
            f"'sj_robust[{extra}]'",
            name=package,
        )
