"""Wrong use of a recipe, told from a failure of its work."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["WrongUse", "checked"]


class WrongUse(ValueError):  # noqa: N818  # the name of what was done, as SystemExit's
    """A recipe was asked for what cannot be: nothing was done, and the exit code is 2. 命令行用法错误。"""


@contextmanager
def checked() -> Iterator[None]:
    """What a ValueError refuses inside is wrong use, since nothing but options is looked at there. 检查选项。

    Raises:
        WrongUse: In place of any other ValueError, with its message.

    Examples:
        >>> with checked():
        ...     int("many")
        Traceback (most recent call last):
            ...
        lab.command_line.wrong_use.WrongUse: invalid literal for int() with base 10: 'many'
    """
    try:
        yield
    except WrongUse:
        raise
    except ValueError as error:
        raise WrongUse(str(error)) from error
