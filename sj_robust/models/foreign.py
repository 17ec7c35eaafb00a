"""A user's functions by name: ``module:function`` or ``file.py:function``."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from inspect import Parameter, signature
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

__all__ = ["call_with_known", "find_function", "reason"]


def find_function(text: str) -> Callable[..., Any]:
    """A function by name; its module, looked for in the working folder first, is imported, and so
    runs.

    Raises:
        ModuleNotFoundError, FileNotFoundError: If there is no such module or file.
        ValueError: If the text has no colon, the file is not Python's, there is no such function,
            or its module fails.

    Examples:
        >>> find_function("math:sqrt")(4.0)
        2.0
    """
    module_name, colon, function_name = text.rpartition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(
            f"network must be module:function, got {text!r}; such as mynet:build or mynet.py:build"
        )
    function = getattr(_module(module_name), function_name, None)
    if not callable(function):
        raise ValueError(
            f"{module_name} has no function {function_name!r}; give module:function that builds "
            "a network"
        )
    return function  # type: ignore[no-any-return]  # whatever it is, it can be called


def call_with_known(
    function: Callable[..., Any], name: str, offered: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """Call a function with those ``offered`` that its signature names (``**kwargs`` names none),
    and with all options.

    Options go before what is offered. A ValueError that calls the function ``name`` says what it
    does not take, or that it fails.

    Examples:
        >>> call_with_known(
        ...     lambda T, width=1: T * width, "area", {"T": 4, "classes": 10}, {"width": 3}
        ... )
        12
    """
    parameters = signature(function).parameters
    keyword = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    named = [key for key, value in parameters.items() if value.kind in keyword]
    takes_any = any(value.kind is Parameter.VAR_KEYWORD for value in parameters.values())
    unknown = [] if takes_any else [key for key in options if key not in named]
    if unknown:
        raise ValueError(
            f"{name} takes no option {', '.join(map(repr, unknown))}; it takes "
            f"{', '.join(named) or 'none'}"
        )
    try:
        return function(
            **{key: value for key, value in offered.items() if key in named} | dict(options)
        )
    except Exception as error:  # somebody else's code raises anything
        raise ValueError(
            f"{name} failed ({reason(error)}); correct it or its options, and start again"
        ) from error


def reason(error: Exception) -> str:
    """An error in one line, with the last line of foreign code in its traceback.

    Examples:
        >>> reason(ValueError("too far"))
        'ValueError: too far'
    """
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if _is_theirs(frame.filename)
    ]
    line = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{line}"


def _module(name: str) -> ModuleType:
    """A module by name or by file."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.resolve()} does not exist; give module:function or file.py:function"
            )
        loader = _FromSource(path.stem, str(path.resolve()))
        specification = importlib.util.spec_from_file_location(path.stem, path, loader=loader)
        assert specification is not None  # the loader is given
        module = importlib.util.module_from_spec(specification)
        sys.modules[path.stem] = module
        sys.path.insert(0, str(path.parent.resolve()))
        with _failures_named(name):
            loader.exec_module(module)
        return module
    if "/" in name or Path(name).is_file():
        raise ValueError(
            f"a file with a network must end in .py, got {name!r}; give module:function or "
            "file.py:function"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        with _failures_named(name):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise ModuleNotFoundError(
            f"no module {name!r} in {Path.cwd()} or among the installed ones; give "
            "module:function or file.py:function"
        ) from error


class _FromSource(SourceFileLoader):
    """Compile a file whenever it is loaded; modules that it imports are loaded as usual.

    Python keeps the code of a file whose size and whose time in seconds are those of before, so a
    file that was edited twice within a second would run as it was.
    """

    def get_code(self, fullname: str) -> CodeType:
        """The code of the file as it is now."""
        return self.source_to_code(self.get_data(self.path), self.path)


@contextmanager
def _failures_named(name: str) -> Iterator[None]:
    """Report in one line the error of a foreign module during import; a missing module keeps its
    error.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # it raises anything
        raise ValueError(
            f"{name} cannot be imported ({reason(error)}); correct it and start again"
        ) from error


def _is_theirs(file: str) -> bool:
    """Whether a file of a traceback belongs to neither Python nor an installed package nor this
    one.
    """
    foreign = ("<", str(Path(__file__).parents[1]), str(Path(traceback.__file__).parent))
    return not file.startswith(foreign) and "site-packages" not in file
