"""Checks for packages of extras that a suite or a tracker needs, before any work."""

from importlib.util import find_spec

__all__ = ["check_extra", "check_tracker"]

_PACKAGES = {
    "autoattack": ("pyautoattack", "attacks"),
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


def check_tracker(tracker: str) -> None:
    """Raise ModuleNotFoundError, with the command to install it, if the package of a tracker is
    missing. 检查实验跟踪器是否已安装。

    Args:
        tracker: Name of a tracker, which is that of its package.

    Examples:
        >>> check_tracker("tensorboard")
    """
    if find_spec(tracker) is None:
        raise ModuleNotFoundError(
            f"the tracker {tracker} is not installed: pip install {tracker}", name=tracker
        )
