"""A recipe as a sweep uses it: options, defaults and ``main``, loaded from the file of a script."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

from lab.command_line import from_values, idle, plain
from lab.command_line.declared import Decides, Radius, marked
from sj_robust.core.eps import parse_eps, plain_eps


@dataclass(frozen=True)
class Resolved:
    """All options of a run as plain data.

    Attributes:
        given: The options that were given, and the defaults of the others.
        complete: The same, with the value that None stands for in its place.
        idle: Names of the options without effect, see :func:`lab.command_line.idle`.
    """

    given: dict[str, Any]
    complete: dict[str, Any]
    idle: frozenset[str]

    def with_seed(self, seed: int) -> "Resolved":
        """The same run with another seed."""
        return replace(
            self, given=self.given | {"seed": seed}, complete=self.complete | {"seed": seed}
        )


@dataclass(frozen=True)
class Recipe:
    """What a sweep knows of a recipe.

    Attributes:
        path: Its file.
        options_type: Its dataclass ``Options``.
        main: Its function ``main``, which takes the words of a command line.
        completed: Its function of that name, if it has one: replaces every None that stands for a
            value which follows from the other options.
    """

    path: Path
    options_type: type[Any]
    main: Callable[[list[str]], None]
    completed: Callable[[Any], Any] | None = None

    def check_names(self, names: Iterable[str]) -> None:
        """Raise ValueError unless all are names of options."""
        for name in names:
            if name not in self.defaults:
                raise ValueError(
                    f"{self.path.name} has no option {name!r}; it has {', '.join(self.defaults)}"
                )

    def resolve(self, options: Mapping[str, Any], where: str = "") -> Resolved:
        """All options of a run from those given.

        A wrong option ends the process, after a message that says ``where`` it stands.
        """
        given = from_values(self.options_type, options, where or self.path.name)
        complete = given if self.completed is None else self.completed(given)
        return Resolved(plain(given), plain(complete), idle(complete))

    def identity(self, run: Resolved) -> str:
        """A text that two sets of options share if they make the same run: the decisive options as
        JSON, those without effect at their defaults.
        """
        idle_ones = {name: self.defaults[name] for name in run.idle}
        return json.dumps(self.decisive(run.complete | idle_ones), sort_keys=True)

    def decisive(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of which another value makes another run."""
        marks = marked(self.options_type, Decides)
        without = {name for name, mark in marks.items() if mark.what == "nothing"}
        return {name: value for name, value in options.items() if name not in without}

    def with_plain_radii(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with radii as numbers, which are equal if they differ by rounding alone."""
        found = dict(options)
        for name, hint in get_type_hints(self.options_type).items():
            is_radius = Radius in (hint, *get_args(hint))
            if is_radius and found.get(name) is not None:
                found[name] = plain_eps(parse_eps(found[name]))
        return found

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """All options with their defaults, as plain data."""
        return plain(self.options_type())


def load_recipe(path: Path) -> Recipe:
    """Load the recipe in a file, which is imported, so that its ``main`` is not run yet.
    加载实验脚本。

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it lacks ``Options`` or ``main``.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "mine.py"
    >>> _ = path.write_text("Options = dict; main = print")
    >>> load_recipe(path).main(["--T", "4"])
    ['--T', '4']
    """
    path = path.resolve()
    name = f"_recipe_{path.stem}_{abs(hash(str(path)))}"
    module = sys.modules.get(name) or _imported(path, name)
    if not hasattr(module, "Options") or not hasattr(module, "main"):
        raise ValueError(f"a recipe must have Options and main, {path} has not")
    return Recipe(
        path=path,
        options_type=module.Options,
        main=module.main,
        completed=getattr(module, "completed", None),
    )


def _imported(path: Path, name: str) -> ModuleType:
    """The module in a file, imported under a name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a sweep needs the recipe that it runs")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"a recipe must be a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # while a dataclass is made, its types are looked up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
