"""What a sweep is asked for (a grid over options, seeds, cells with names, evaluations), and the
runs that this makes: where each is, and what came out.
"""

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
from sj_robust.core.eps import plain_eps
from sj_robust.core.folders import check_names
from sj_robust.core.saved import SavedResult, csv_text
from sj_robust.core.saved import plain as plain_data

OPTIONS_FILE = "options.yaml"
RECORD_FILE = "run.json"
Combination = dict[str, Any]


_TAKEN = ("training", "validation", "options", "run", "output")
"""Names that a run's files, folders and figures have already, up to a dot."""
_OF_THE_RUN = ("checkpoint", "data_root", "device", "name", "output", "resume")
"""Options that the sweep sets for the run that is evaluated."""
_WITHOUT_SUITE = ("compare", "leaderboard", "network", "smooth")
"""Options with which evaluate.py does not run a suite on a checkpoint."""


def expand(grid: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """All combinations of a grid, the last option varying fastest.

    ``"norm,rho"`` in a grid varies two options together.

    Raises:
        ValueError: If an option has no list of values or occurs twice, or a joint value has another
            length.

    Examples:
        >>> expand({"mode": ["at", "rat"], "rho": [0]})
        [{'mode': 'at', 'rho': 0}, {'mode': 'rat', 'rho': 0}]
        >>> expand({"norm,rho": [["l2", 1], ["l1", 3]]})
        [{'norm': 'l2', 'rho': 1}, {'norm': 'l1', 'rho': 3}]
    """
    names = [name for key in grid for name in names_in(key)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"an option may occur once in a grid, {name} occurs twice; join its values in one"
            )
    axes = [_settings(key, values) for key, values in grid.items()]
    combinations = []
    for settings in itertools.product(*axes):
        values = itertools.chain.from_iterable(settings)
        combinations.append(dict(zip(names, values, strict=True)))
    return combinations


def _settings(key: Any, values: Any) -> list[Any]:
    """Values of an entry of a grid: each a list with one for every name in the key."""
    if not isinstance(values, list) or not values:
        raise ValueError(
            f"a grid needs a list of one or more values for every option, got {key}: {values!r}"
        )
    count = len(names_in(key))
    if count == 1:
        return [[value] for value in values]
    for value in values:
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(f"{key} needs {count} values in each of its entries, got {value!r}")
    return values


def names_in(key: Any) -> list[str]:
    """Names of the options in a key such as ``"norm,rho"``."""
    return [name.strip() for name in str(key).split(",")]


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """Seeds 0, 1, ... of a number, or those given.

    Raises:
        ValueError: If there are none, or one occurs twice, is negative or no integer.
    """
    found = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    are_numbers = all(isinstance(seed, int) for seed in found)
    if not found or not are_numbers or len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f"seeds must be a number >= 1 or different integers >= 0, got {seeds}")
    return found


def value_text(value: Any) -> str:
    """A value as a reader sees it: 1.0 is 1.

    Examples:
        >>> value_text(1.0), value_text(0.25), value_text("at"), value_text([8, 8])
        ('1', '0.25', 'at', '[8, 8]')
    """
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class NamedCell:
    """A cell of a sweep.

    Attributes:
        name: Its name, which begins the names of its runs.
        preset: Options of adv_train.py in its preset.
        options: Those that it sets itself, which override those of the whole sweep.
        search: Combinations among which it chooses; a single empty one without a search.
    """

    name: str = ""
    preset: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    search: tuple[dict[str, Any], ...] = ({},)

    def check(self, grid: Iterable[str]) -> None:
        """Raise ValueError if the grid has other values of what the cell sets or searches."""
        for name in grid:
            if name in self.options or name in self.search[0]:
                raise ValueError(
                    f"{name} is in the grid and in cell {self.name}, whose own value would be "
                    "lost; remove it from one of them"
                )


def read_cells(given: Mapping[Any, Any]) -> list[NamedCell]:
    """Cells from their plain form: by name a mapping of ``config`` (a file, or a preset's name),
    ``options`` and ``search``, which are all optional; a sweep without cells has one.

    Raises:
        ValueError: If a cell has another key or no mapping where one is needed, or searches among
            fewer than two values.

    Examples:
        >>> (cell,) = read_cells({"at": {"options": {"mode": "at"}, "search": {"lr": [0.1, 0.2]}}})
        >>> cell.options, cell.search
        ({'mode': 'at'}, ({'lr': 0.1}, {'lr': 0.2}))
    """
    cells = []
    for name, content in given.items():
        parts = mapping(content, f"cell {name}")
        unknown = parts.keys() - {"config", "options", "search"}
        if unknown or not isinstance(name, str):
            raise ValueError(
                "a cell has a name in text, and config, options and search, got "
                f"{[*unknown, name][0]!r} in {name}; options of adv_train.py belong in its options"
            )
        search = tuple(expand(mapping(parts.get("search"), f"search of cell {name}")))
        if "search" in parts and len(search) < 2:
            raise ValueError(
                f"a search needs two values or more, got {parts['search']} in {name}; put a "
                "single one in its options"
            )
        config = parts.get("config")
        preset = {} if config is None else read_file(Path(str(config)))
        own = mapping(parts.get("options"), f"options of cell {name}")
        cells.append(NamedCell(name, preset, own, search))
    return cells or [NamedCell()]


def read_evaluations(
    suites: Sequence[str], shared: Mapping[str, Any], named: Mapping[Any, Any]
) -> dict[str, dict[str, Any]]:
    """Options of evaluate.py by the name of the evaluation, which is its suite unless it says
    another.

    Args:
        suites: Suites with no options of their own.
        shared: Options of all evaluations; a suite is that of the named ones.
        named: Own options of evaluations, by name.

    Raises:
        ValueError: If a name cannot be that of a folder in a run, or an option is the run's.

    Examples:
        >>> read_evaluations(["paper"], {"eps": 0.1}, {"weak": {"suite": "fast", "eps": 0.05}})
        {'paper': {'eps': 0.1, 'suite': 'paper'}, 'weak': {'suite': 'fast', 'eps': 0.05}}
    """
    found = {suite: {**shared, "suite": suite} for suite in suites}
    for name, content in named.items():
        found[name] = {"suite": name, **shared, **mapping(content, f"evaluation {name}")}
    for name, options in found.items():
        text = str(name)
        is_name = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_+.-]*", text) and isinstance(name, str)
        is_taken = text.lower().partition(".")[0] in _TAKEN or text.lower().endswith(".yaml")
        if not is_name or is_taken:
            raise ValueError(
                "the name of an evaluation must be text of letters, digits, _, +, - and ., begin "
                f"with a letter, digit or _, and be none of {', '.join(_TAKEN)} or *.yaml, got "
                f"{name!r}; rename it, and put a number in quotes"
            )
        for option in _OF_THE_RUN:
            if option in options:
                raise ValueError(
                    f"{option} of an evaluation is set by the sweep itself; omit it (data_root and "
                    "device are those of the training, which --options takes)"
                )
    return found


def check_suite_is_run(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if evaluate.py would write no report of attacks, which a sweep tabulates.

    Args:
        name: Name of the evaluation.
        options: All its options.
    """
    refused = [option for option in _WITHOUT_SUITE if options[option] is not None]
    if options["suite"] in ("stress", "corruptions"):
        refused.append("suite")
    for option in refused:
        raise ValueError(
            f"an evaluation of a sweep must be a suite of attacks on the trained network, {name} "
            f"has {option} {options[option]}; use evaluate.py on the networks of the sweep instead"
        )


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A mapping as it stands in a file; nothing, which YAML reads as None, is an empty one.

    Raises:
        ValueError: If it is something else.

    Examples:
        >>> mapping(["mode"], "a cell")
        Traceback (most recent call last):
            ...
        ValueError: a cell must have names with values, such as {mode: at}, got ['mode']
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} must have names with values, such as {{mode: at}}, got {value!r}")
    return value


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
