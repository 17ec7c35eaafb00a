"""A recipe, which is a script and no module of the package, as something to check options against
and to run.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.command_line import from_values, idle, plain
from lab.command_line.declared import Decides, marked


@dataclass(frozen=True)
class Resolved:
    """All options of a run as plain data.

    Attributes:
        given: Those given, checked, and the recipe's defaults.
        complete: The same with values where None leaves it to other options.
        idle: Names of those that change nothing, see :func:`lab.command_line.idle`.
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

    ``completed`` is its function of that name, if it has one: options with values where they were
    None because others decide them.
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
        """Options of a run from those given; wrong ones end the process, after a message that says
        ``where`` they stand.
        """
        given = from_values(self.options_type, options, where or self.path.name)
        complete = given if self.completed is None else self.completed(given)
        return Resolved(plain(given), plain(complete), idle(complete))

    def identity(self, run: Resolved) -> str:
        """Text that is equal for two runs that are one: their options, idle ones at their defaults,
        as JSON.
        """
        idle_ones = {name: self.defaults[name] for name in run.idle}
        return json.dumps(self.decisive(run.complete | idle_ones), sort_keys=True)

    def decisive(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of which another value is another run."""
        marks = marked(self.options_type, Decides)
        without = {name for name, mark in marks.items() if mark.what == "nothing"}
        return {name: value for name, value in options.items() if name not in without}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """All options with their defaults, as plain data."""
        return plain(self.options_type())


def load_recipe(path: Path) -> Recipe:
    """The recipe in a file, which is run as a module, not as a script. 加载实验脚本。

    FileNotFoundError if there is no such file, ValueError if it lacks ``Options`` or ``main``.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "mine.py"
    >>> _ = path.write_text("Options = dict; main = print")
    >>> load_recipe(path).main(["--T", "4"])
    ['--T', '4']
    """
    path = path.resolve()
    name = f"_recipe_{path.stem}_{abs(hash(str(path)))}"
    if name not in sys.modules:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a sweep needs the recipe that it runs")
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"a recipe must be a Python file, got {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # the types of a dataclass are looked up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    module = sys.modules[name]
    if not hasattr(module, "Options") or not hasattr(module, "main"):
        raise ValueError(f"a recipe must have Options and main, {path} has not")
    return Recipe(path, module.Options, module.main, getattr(module, "completed", None))
