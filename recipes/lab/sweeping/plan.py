"""Which runs a sweep consists of, and which of them its folder holds already."""

import hashlib
import itertools
import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.command_line import read_file
from lab.sweeping.grid import value_text, values_in
from lab.sweeping.recipe import Recipe, Resolved
from lab.sweeping.record import RECORD_FILE, RunRecord

OPTIONS_FILE = "options.yaml"


@dataclass(frozen=True)
class PlannedRun:
    """A run that a sweep wants: all options of the training, and of the evaluation by suite."""

    folder: Path
    options: dict[str, Any]
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: Path = Path("recipes/adv_train.py")
    evaluator: Path = Path("recipes/evaluate.py")

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def record(self) -> RunRecord | None:
        """What is known of it already."""
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
) -> list[PlannedRun]:
    """The runs of a sweep, seed by seed, each once: combinations that differ in an option without
    effect are one run.

    So are those of which one has null and the other the value that null stands for, if the recipe
    tells. A run of an earlier sweep in the folder is recognised by its options, whatever its name.

    Raises:
        SystemExit: If an option is unknown or wrong, after a message.
        ValueError: If a run of the same name had other options.
    """
    suites = {}
    for suite, given in evaluations.items():
        suites[suite] = evaluator.resolve({**given, "suite": suite}).given
    known = _known(folder, recipe)
    identities = {path.name: identity for identity, path in known.items()}
    varied = values_in(combinations)
    cells = [recipe.resolve({**fixed, **combination}) for combination in combinations]
    planned: dict[str, PlannedRun] = {}
    for seed, cell in itertools.product(seeds, cells):
        run = cell.with_seed(seed)
        identity = recipe.identity(run)
        if identity in planned:
            continue
        options = _written_out(run, varied)
        options |= {name: recipe.defaults[name] for name in run.idle}
        name = _name({name: options[name] for name in varied if name not in run.idle}, seed)
        before = identities.get(name, identity)
        if before != identity and identity not in known:
            if before not in planned:  # of an earlier sweep
                _refuse_changes(folder / "runs" / name, json.loads(before), json.loads(identity))
            name += f"-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        path = known.get(identity, folder / "runs" / name)
        identities[path.name] = identity
        planned[identity] = PlannedRun(path, options, suites, recipe.path, evaluator.path)
        _check_evaluations(planned[identity], evaluator)
    return list(planned.values())


def load_records(folder: Path, recipe: Recipe) -> list[RunRecord]:
    """Records of all runs in the folder of a sweep, by name, with those options that have an effect
    in the recipe.

    Where an option is null in one run and has a value in another, null is the value that it stands
    for.
    """
    paths = sorted((folder / "runs").glob(f"*/{RECORD_FILE}"))
    records = [RunRecord.load(path) for path in paths]
    runs = [recipe.resolve(record.options, record.name) for record in records]
    everything = values_in(run.given for run in runs)
    found = []
    for record, run in zip(records, runs, strict=True):
        shown = recipe.decisive(_written_out(run, everything))
        found.append(replace(record, options=_without(shown, run.idle)))
    return found


def _without(options: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _written_out(run: Resolved, values: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Options with the value that None stands for, where one is among those values."""
    found = dict(run.given)
    for name, others in values.items():
        if found[name] is None and others != [None]:
            found[name] = run.complete[name]
    return found


def _known(folder: Path, recipe: Recipe) -> dict[str, Path]:
    """Folders of runs that were begun, by their options; what a newer recipe added has its
    default.
    """
    known = {}
    for path in sorted((folder / "runs").glob(f"*/{OPTIONS_FILE}")):
        run = recipe.resolve(read_file(path), f"{path}, of another version: use another --output")
        known[recipe.identity(run)] = path.parent
    return known


def _name(values: Mapping[str, Any], seed: int) -> str:
    """Words for themselves, numbers behind the name of their option."""
    parts = []
    for name, value in values.items():
        is_word = isinstance(value, str) and value[:1].isalpha()
        parts.append(value if is_word else f"{name}{value_text(value)}")
    return re.sub(r"[^\w.+-]+", "_", "-".join([*parts, f"seed{seed}"]))


def _check_evaluations(run: PlannedRun, evaluator: Recipe) -> None:
    """Raise ValueError if a suite was run with other options."""
    record = run.record
    if record is None:
        return
    for suite in run.evaluations.keys() & record.evaluations.keys():
        old = evaluator.decisive(record.evaluations[suite]["options"])
        new = evaluator.decisive(run.evaluations[suite])
        _refuse_changes(run.folder / suite, old, new)


def _refuse_changes(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ValueError, with the options that have changed, if any have."""
    names = [name for name, value in new.items() if old.get(name, value) != value]
    if not names:
        return
    told = [f"{name} was {old[name]!r} and is {new[name]!r} now" for name in names]
    raise ValueError(
        f"{path} was run with other options ({', '.join(told)}); results are never mixed: "
        f"use another --output, or make {' and '.join(names)} part of the grid"
    )
