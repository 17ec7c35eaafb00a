"""The runs of a sweep, and which of them are in its folder already."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.command_line import read_file
from lab.sweeping.grid import value_text, values_in
from lab.sweeping.recipe import Recipe, Resolved
from lab.sweeping.record import RECORD_FILE, RunRecord
from sj_robust.core.folders import check_names

OPTIONS_FILE = "options.yaml"


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep.

    Attributes:
        folder: Where it is, or will be.
        options: All options of the training.
        evaluations: By suite all options of the evaluation.
        recipe: Script of the training.
        evaluator: Script of the evaluation.
        cell: Name of its cell, where cells have names.
        identity: What its options come to, see :meth:`Recipe.identity`.
    """

    folder: Path
    identity: str
    options: dict[str, Any]
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: Path = Path("recipes/adv_train.py")
    evaluator: Path = Path("recipes/evaluate.py")
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


def plan_runs(
    folder: Path,
    combinations: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    *,
    recipe: Recipe,
    evaluator: Recipe,
    fixed: Mapping[str, Any],
    evaluations: Mapping[str, Mapping[str, Any]],
    begun: Mapping[str, Path],
    cell: str = "",
) -> list[PlannedRun]:
    """The runs of a sweep, or of its cell of that name, seed by seed, each only once.

    Combinations are the same run if they differ only in an option without effect, or if one has
    null and the other the value that null stands for (see :meth:`Recipe.identity`). A run of an
    earlier sweep in the folder, one of ``begun`` (see :func:`begun_runs`), is recognised by its
    options, whatever its name.

    Raises:
        SystemExit: If an option is unknown or wrong, after a message.
        ValueError: If a run of the same name had other options, or its name is too long.
    """
    suites = {}
    for suite, given in evaluations.items():
        suites[suite] = evaluator.resolve({"suite": suite, **given}).given
    varied = values_in(combinations)
    settings = [recipe.resolve({**fixed, **combination}) for combination in combinations]
    owners = {path.name: identity for identity, path in begun.items()}
    planned: dict[str, PlannedRun] = {}
    for seed, setting in itertools.product(seeds, settings):
        resolved = setting.with_seed(seed)
        identity = recipe.identity(resolved)
        if identity in planned:
            continue
        options = _written_out(resolved, varied)
        options |= {name: recipe.defaults[name] for name in resolved.idle}
        path = begun.get(identity)
        if path is None:
            shown = {name: options[name] for name in varied if name not in resolved.idle}
            path = folder / "runs" / _name(cell, shown, seed)
            check_names("a run, whose folder is called by its options,", path)
            owner = owners.get(path.name)
            if owner is not None:
                if owner not in planned:  # a run of an earlier sweep
                    _refuse_changes(path, json.loads(owner), json.loads(identity))
                digest = hashlib.sha256(identity.encode()).hexdigest()
                path = path.with_name(f"{path.name}-{digest[:8]}")
            owners[path.name] = identity
        run = PlannedRun(
            folder=path,
            options=options,
            evaluations=suites,
            recipe=recipe.path,
            evaluator=evaluator.path,
            cell=cell,
            identity=identity,
        )
        _check_evaluations(run, evaluator)
        planned[identity] = run
    return list(planned.values())


def load_records(folder: Path, recipe: Recipe) -> list[RunRecord]:
    """Records of all runs in the folder of a sweep, sorted by name, with the options that had an
    effect.

    An option that is null in one run and has a value in another is written out in both.
    """
    paths = sorted((folder / "runs").glob(f"*/{RECORD_FILE}"))
    records = [RunRecord.load(path) for path in paths]
    runs = [recipe.resolve(record.options, record.name) for record in records]
    values = values_in(run.given for run in runs)
    found = []
    for record, run in zip(records, runs, strict=True):
        options = recipe.decisive(_written_out(run, values))
        effective = {name: value for name, value in options.items() if name not in run.idle}
        found.append(replace(record, options=effective))
    return found


def begun_runs(folder: Path, recipe: Recipe) -> dict[str, Path]:
    """Folders of the runs that earlier sweeps began, by identity; an option that a newer recipe
    has added has its default.
    """
    found = {}
    for path in sorted((folder / "runs").glob(f"*/{OPTIONS_FILE}")):
        run = recipe.resolve(read_file(path), f"{path}, of another version: use another --output")
        found[recipe.identity(run)] = path.parent
    return found


def _written_out(run: Resolved, values: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The given options of a run; None is replaced by the value that it stands for, unless all
    ``values`` of the option are None.
    """
    found = dict(run.given)
    for name, others in values.items():
        if found[name] is None and others != [None]:
            found[name] = run.complete[name]
    return found


def _name(cell: str, values: Mapping[str, Any], seed: int) -> str:
    """Name of a run such as ``dlif-rho0.1-seed0``: words as they are, other values behind the name
    of their option.
    """
    parts = [cell] if cell else []
    for name, value in values.items():
        is_word = isinstance(value, str) and value[:1].isalpha()
        parts.append(value if is_word else f"{name}{value_text(value)}")
    return re.sub(r"[^\w.+-]+", "_", "-".join([*parts, f"seed{seed}"]))


def _check_evaluations(run: PlannedRun, evaluator: Recipe) -> None:
    """Raise ValueError if a suite of the run has been run with other options."""
    record = run.record
    if record is None:
        return
    for suite in run.evaluations.keys() & record.evaluations.keys():
        old = evaluator.decisive(record.evaluations[suite]["options"])
        new = evaluator.decisive(run.evaluations[suite])
        _refuse_changes(run.folder / suite, old, new)


def _refuse_changes(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ValueError if an option has another value than before."""
    names = [name for name, value in new.items() if old.get(name, value) != value]
    if not names:
        return
    told = [f"{name} was {old[name]!r} and is {new[name]!r} now" for name in names]
    raise ValueError(
        f"{path} was run with other options ({', '.join(told)}); results are never mixed: "
        f"use another --output, or make {' and '.join(names)} part of the grid"
    )
