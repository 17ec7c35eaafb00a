"""The runs of a sweep: what makes each of them, where it is, and what came out."""

import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from lab.command_line import Decides, Radius, from_values, idle, marked, plain, read_file
from lab.sweeping.grid import NamedCell, expand, mapping, value_text
from sj_robust.core.eps import plain_eps
from sj_robust.core.folders import check_names
from sj_robust.core.saved import SavedResult, csv_text
from sj_robust.core.saved import plain as plain_data

OPTIONS_FILE = "options.yaml"
RECORD_FILE = "run.json"
Combination = dict[str, Any]


@dataclass(frozen=True)
class RunRecord(SavedResult, what="a run of a sweep", format="sj_robust.sweep_run", version=1):
    """Options and accuracies of one run of a sweep.

    Attributes:
        name: Name of the run's folder.
        options: All options of the training; a number that is not finite is text, such as "inf", as
            on a command line.
        training: Counts of the recipe's own report by attack: ``{"correct": ..., "total": ...}``.
        evaluations: Per suite its ``options``, ``eps`` and ``figures``, counts like those of
            ``training``; ``alarm`` is the reason for which they mean nothing, empty if there is
            none.
        seconds: Time of the training and of each suite, of the last attempt where one was killed.
        cpu_seconds: Processor time of the same.
        cell: Name of the cell where the sweep's cells have names.
        validation: Accuracies on the validation images of the epoch that was selected, that which
            selected it first.
        ms_mppd: Per suite the MS-MPPD of the last spiking layer under each of its attacks, mean
            over time.
        trained_in: Versions, device, commit of the training, with the digest of the code of a
            network of one's own; empty in records of earlier versions.
        environment: The same of the last part of the run.
        notes: Warnings of the training.

    Examples:
        >>> record = RunRecord(
        ...     "at-seed0", {"mode": "at", "seed": 0}, {"clean": {"correct": 9, "total": 10}}
        ... )
        >>> record.accuracies, record.seed
        ({'clean': 0.9}, 0)
    """

    name: str
    options: dict[str, Any]
    training: dict[str, dict[str, int]] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    cell: str = ""
    validation: dict[str, float] = field(default_factory=dict)
    ms_mppd: dict[str, dict[str, float]] = field(default_factory=dict)
    trained_in: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", plain_data(self.options))
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.options["seed"])

    @property
    def accuracies(self) -> dict[str, float]:
        """Shares in [0, 1] by column: ``pgd20`` of the recipe's own report, ``paper/pgd20`` of the
        suite paper.
        """
        counts = dict(self.training)
        for suite, result in self.evaluations.items():
            counts |= {f"{suite}/{name}": found for name, found in result["figures"].items()}
        return {name: found["correct"] / found["total"] for name, found in counts.items()}

    @property
    def measures(self) -> dict[str, float]:
        """Figures that are no accuracies of the test, by column: ``validation/pgd``,
        ``paper/pgd20/ms_mppd``, ``training/cpu_seconds``.
        """
        found = {f"validation/{name}": share for name, share in self.validation.items()}
        for suite, layers in self.ms_mppd.items():
            found |= {f"{suite}/{attack}/ms_mppd": value for attack, value in layers.items()}
        return found | {f"{part}/cpu_seconds": value for part, value in self.cpu_seconds.items()}

    @property
    def headline(self) -> str:
        """Clean accuracy and the lowest of the training's report, and the worst case of every
        suite.
        """
        found = self.accuracies
        lowest = min(self.training, key=lambda name: found[name])
        shown = [name for name in dict.fromkeys(["clean", lowest]) if name in found]
        texts = [f"{name} {found[name]:.1%}" for name in shown]
        texts += [f"{suite} worst {found[f'{suite}/everything']:.1%}" for suite in self.evaluations]
        return ", ".join(texts)


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
    completed: Callable[[Any], Any]

    def read(self, options: Mapping[str, Any], where: str = "") -> Any:
        """All options of a run from those given; a wrong one ends the process, after a message that
        says ``where`` it stands.
        """
        return from_values(self.options_type, options, where or self.path.name)

    def values(self, options: Any) -> dict[str, Any]:
        """What options come to: none stands for another one, and radii that differ by rounding
        alone are equal.
        """
        complete = self.completed(options)
        found = plain(complete)
        for name, value in vars(complete).items():
            if isinstance(value, Radius):
                found[name] = plain_eps(value)
        return found

    def identity(self, options: Any) -> str:
        """A text that two sets of options share if they make the same run: what they come to as
        JSON, those without effect at their defaults.
        """
        found = self.values(options)
        found |= {name: self.defaults[name] for name in self.idle(options)}
        return json.dumps(self.decisive(found), sort_keys=True)

    def idle(self, options: Any) -> frozenset[str]:
        """Names of the options without effect."""
        return idle(self.completed(options))

    def decisive(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of which another value makes another run."""
        marks = marked(self.options_type, Decides)
        without = {name for name, mark in marks.items() if mark.what == "nothing"}
        return {name: value for name, value in options.items() if name not in without}

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
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a sweep needs the recipe that it runs")
    name = f"_recipe_{path.stem}_{abs(hash(str(path)))}"
    module: Any = sys.modules.get(name) or _imported(path, name)
    if not hasattr(module, "Options") or not hasattr(module, "main"):
        raise ValueError(f"a recipe must have Options and main, {path} has not")
    completed = getattr(module, "completed", lambda options: options)
    return Recipe(path, module.Options, module.main, completed)


def _imported(path: Path, name: str) -> ModuleType:
    """The module in a file, imported under a name."""
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


class Skip:
    """The entries of a sweep's option skip: combinations that have all values of one are not run.

    A value of an entry may be a list of them. None is the value that it stands for, in an entry and
    in a run.
    """

    def __init__(self, entries: Sequence[Any], recipe: Recipe) -> None:
        """Check the entries.

        Raises:
            SystemExit: If an option is unknown or wrong, after a message.
            ValueError: If an entry is no mapping, or empty.
        """
        self._recipe = recipe
        self._choices: list[list[Combination]] = []
        self._unused = dict(enumerate(entries))
        for entry in entries:
            given = mapping(entry, "an entry of skip")
            if not given:
                raise ValueError("an entry of skip needs an option or more, got an empty one")
            lists = {
                name: value if type(value) is list else [value] for name, value in given.items()
            }
            self._choices.append([self._read(choice) for choice in expand(lists)])

    def _read(self, choice: Combination) -> Combination:
        """A choice with its values as the recipe has them."""
        options = self._recipe.read(choice, "skip")
        return {name: getattr(options, name) for name in choice}

    @property
    def names(self) -> set[str]:
        """Names of the options in the entries."""
        return {name for choice in itertools.chain(*self._choices) for name in choice}

    def matches(self, options: Any, searched: Collection[str] = ()) -> bool:
        """Whether these options of a run are skipped; those that a search has yet to choose match
        no entry.
        """
        values = self._recipe.values(options)
        matching = []
        for number, choices in enumerate(self._choices):
            for choice in choices:
                same = self._recipe.values(replace(options, **choice)) == values
                if same and choice.keys().isdisjoint(searched):
                    matching.append(number)
        for number in matching:
            self._unused.pop(number, None)
        return bool(matching)

    def check_used(self) -> None:
        """Raise ValueError if an entry has not matched any combination."""
        for entry in self._unused.values():
            raise ValueError(
                f"an entry of skip must match a combination of the sweep, {entry} matches none; "
                "correct it, or remove it"
            )


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep.

    Attributes:
        folder: Where it is, or will be.
        options: All options of the training.
        values: Its values on the axes of the tables; an option without effect is left out.
        evaluations: By suite all options of the evaluation.
        recipe: Script of the training.
        evaluator: Script of the evaluation.
        cell: Name of its cell, where cells have names.
    """

    folder: Path
    options: dict[str, Any]
    values: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    recipe: Path
    evaluator: Path
    cell: str = ""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def record(self) -> RunRecord | None:
        """What came out of it so far; None if it has no record yet."""
        path = self.folder / RECORD_FILE
        return RunRecord.load(path) if path.is_file() else None

    @property
    def finished(self) -> bool:
        """Whether training and every suite are done."""
        record = self.record
        return record is not None and record.evaluations.keys() >= self.evaluations.keys()


class Planner:
    """Finds the folders of runs.

    A run of an earlier sweep in the folder is recognised by its options, whatever its name; an
    option that a newer recipe has added has its default there.
    """

    def __init__(self, folder: Path, recipe: Recipe, evaluator: Recipe) -> None:
        """Read what earlier sweeps began."""
        self._runs = folder / "runs"
        self._recipe = recipe
        self._evaluator = evaluator
        self._begun: dict[str, Path] = {}
        for path in sorted(self._runs.glob(f"*/{OPTIONS_FILE}")):
            where = f"{path}, of another version: use another --output"
            self._begun[recipe.identity(recipe.read(read_file(path), where))] = path.parent
        self._named = {path.name: identity for identity, path in self._begun.items()}
        self._cells: dict[str, str] = {}

    def plan(
        self,
        settings: Sequence[tuple[Combination, Any]],
        seeds: Sequence[int],
        evaluations: Mapping[str, dict[str, Any]],
        cell: str = "",
        shown: Collection[str] | None = None,
    ) -> list[PlannedRun]:
        """The runs of a sweep, or of its cell of that name, seed by seed, each only once.

        Combinations are the same run if they differ only in an option without effect, or if one has
        null and the other the value that null stands for.

        Args:
            settings: The combinations, each with the options that it makes.
            seeds: The seeds.
            evaluations: By suite all options of the evaluation.
            cell: Name of the cell.
            shown: Options that are axes of the tables; None for all of the combinations.

        Raises:
            ValueError: If a run of the same name has other options, its name is too long, or
                another cell has the same run.
        """
        varied = list(dict.fromkeys(name for combination, _ in settings for name in combination))
        no_null = {
            name
            for name in varied
            if any(getattr(options, name) is not None for _, options in settings)
        }
        planned: dict[str, PlannedRun] = {}
        for seed, (_, unseeded) in itertools.product(seeds, settings):
            given = replace(unseeded, seed=seed)
            identity = self._recipe.identity(given)
            if identity in planned:
                continue
            owner = self._cells.setdefault(identity, cell)
            if owner != cell:
                raise ValueError(f"cells {owner} and {cell} are the same run; remove one of them")
            complete = self._recipe.completed(given)
            written = {name: getattr(complete, name) for name in no_null}
            options = plain(replace(given, **written))
            without_effect = self._recipe.idle(given)
            options |= {name: self._recipe.defaults[name] for name in without_effect}
            values = {name: options[name] for name in varied if name not in without_effect}
            path = self._begun.get(identity) or self._runs / _name(cell, values, seed)
            if self._named.setdefault(path.name, identity) != identity:
                _refuse_changes(path, json.loads(self._named[path.name]), json.loads(identity))
            check_names("a run, whose folder is called by its options,", path)
            if shown is not None:
                values = {name: values[name] for name in values if name in shown}
            run = PlannedRun(
                folder=path,
                options=options,
                values={"cell": cell, **values} if cell else values,
                evaluations=dict(evaluations),
                recipe=self._recipe.path,
                evaluator=self._evaluator.path,
                cell=cell,
            )
            self._check_evaluations(run)
            planned[identity] = run
        return list(planned.values())

    def _check_evaluations(self, run: PlannedRun) -> None:
        """Raise ValueError if a suite of the run has been run with other options."""
        known = {} if run.record is None else run.record.evaluations
        for suite in run.evaluations.keys() & known.keys():
            old = self._evaluator.decisive(known[suite]["options"])
            new = plain_data(self._evaluator.decisive(run.evaluations[suite]))
            _refuse_changes(run.folder / suite, old, new)


def _name(cell: str, values: Mapping[str, Any], seed: int) -> str:
    """Name of a run such as ``dlif-rho0.1-seed0``: words as they are, other values behind the name
    of their option.
    """
    parts = [cell] if cell else []
    for name, value in values.items():
        is_word = isinstance(value, str) and value[:1].isalpha()
        parts.append(value if is_word else f"{name}{value_text(value)}")
    return re.sub(r"[^\w.+-]+", "_", "-".join([*parts, f"seed{seed}"]))


def _refuse_changes(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ValueError if an option has another value than before."""
    names = [name for name, value in new.items() if old.get(name, value) != value]
    if names:
        told = [f"{name} is {old[name]!r} there and {new[name]!r} here" for name in names]
        raise ValueError(
            f"{path} is of other options ({', '.join(told)}); results are never mixed: use another "
            f"--output, or make {' and '.join(names)} part of the grid"
        )


@dataclass(frozen=True)
class Trial:
    """What one value of a searched option came to.

    Attributes:
        cell: Name of the cell.
        value: The option with its value, as text.
        validation: Accuracy on the validation images under the attack that selects the epoch.
        clean: Accuracy on the clean ones.
        chosen: Whether it is the best of its cell.
    """

    cell: str
    value: str
    validation: float
    clean: float
    chosen: bool


def compared(cell: NamedCell, runs: Sequence[PlannedRun]) -> list[Trial]:
    """The values of a cell by their accuracies on validation images, the best one chosen; empty
    while a training is missing.

    The first criterion is the accuracy that selects the epoch, the second that of clean images; of
    equal ones the first value is taken. ``runs`` stand in the order of ``cell.search``.

    Raises:
        ValueError: If two values make the same run, or a record is of an earlier version.
    """
    texts = [
        ", ".join(f"{name} {value_text(value)}" for name, value in values.items())
        for values in cell.search
    ]
    if len(runs) < len(texts):
        raise ValueError(
            f"a search needs values that make different runs, two of cell {cell.name} make the "
            f"same one ({'; '.join(texts)}); remove equal values, null beside the value that it "
            "stands for, and options without effect"
        )
    found = []
    for run in runs:
        record = run.record
        if record is None:
            return []
        if not record.validation:
            raise ValueError(
                f"run {run.name} of an earlier version has no validation accuracies to compare; "
                "use another --output"
            )
        found.append((next(iter(record.validation.values())), record.validation["clean"]))
    best = found.index(max(found))
    return [
        Trial(cell.name, text, *shares, number == best)
        for number, (text, shares) in enumerate(zip(texts, found, strict=True))
    ]


def trials_csv(trials: Iterable[Trial]) -> str:
    """A line per value that was tried."""
    return csv_text(list(Trial.__dataclass_fields__), map(asdict, trials))
