"""Which runs a sweep consists of, and which of them its folder holds already."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lab.sweeping.grid import value_text
from lab.sweeping.recipe import Recipe
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
        return (
            RunRecord.load(self.folder / RECORD_FILE)
            if (self.folder / RECORD_FILE).is_file()
            else None
        )

    @property
    def finished(self) -> bool:
        """Whether training and every suite are done."""
        record = self.record
        return record is not None and record.evaluations.keys() >= self.evaluations.keys()

    def to_json(self) -> str:
        """The plan as text for a process of its own."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "PlannedRun":
        """The plan that :meth:`to_json` wrote."""
        content = json.loads(text)
        return cls(
            **content | {name: Path(content[name]) for name in ("folder", "recipe", "evaluator")}
        )

    def name_values(self) -> None:
        """Give the record the values of options that were null when it ran and have a value, the
        same one, now.
        """
        if (record := self.record) is None:
            return
        options = {
            name: self.options.get(name) if value is None else value
            for name, value in record.options.items()
        }
        if options != record.options:
            replace(record, options=options).save(self.folder / RECORD_FILE)


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
        ValueError: If an option is unknown or wrong, or a run of the same name had other options.
    """
    suites = {
        suite: evaluator.resolve({**options, "suite": suite})
        for suite, options in evaluations.items()
    }
    known = _known(folder, recipe)
    taken = {path.name: key for key, path in known.items()}
    valued = {name for one in combinations for name, value in one.items() if value is not None}
    planned: dict[str, PlannedRun] = {}
    for seed in seeds:
        for combination in combinations:
            options = recipe.resolve({**fixed, **combination, "seed": seed})
            complete, without, key = (
                recipe.complete(options),
                recipe.idle(options),
                recipe.identity(options),
            )
            options |= {name: complete[name] for name in valued if options[name] is None}
            options |= {name: recipe.defaults[name] for name in without}
            if key in planned:
                continue
            name = _name({name: options[name] for name in combination if name not in without}, seed)
            if name in taken and key not in known:
                if taken[name] not in planned:  # of an earlier sweep
                    raise ValueError(
                        _changed(folder / "runs" / name, json.loads(taken[name]), json.loads(key))
                    )
                name += f"-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            path = known.get(key, folder / "runs" / name)
            taken[path.name] = key
            planned[key] = PlannedRun(path, options, suites, recipe.path, evaluator.path)
            _check_evaluations(planned[key], evaluator)
    return list(planned.values())


def load_records(folder: Path, recipe: Recipe) -> list[RunRecord]:
    """Records of all runs in the folder of a sweep, by name, with those options that have an effect
    in the recipe.
    """
    records = (RunRecord.load(path) for path in sorted((folder / "runs").glob(f"*/{RECORD_FILE}")))
    return [replace(record, options=_with_effect(record, recipe)) for record in records]


def _with_effect(record: RunRecord, recipe: Recipe) -> dict[str, Any]:
    without = recipe.idle(recipe.resolve(record.options))
    return {
        name: value
        for name, value in recipe.decisive(record.options).items()
        if name not in without
    }


def _known(folder: Path, recipe: Recipe) -> dict[str, Path]:
    """Folders of runs that were begun, by their options; what a newer recipe added has its
    default.
    """
    known = {}
    for path in sorted((folder / "runs").glob(f"*/{OPTIONS_FILE}")):
        try:
            options = recipe.resolve(yaml.safe_load(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(
                f"{path}: {error}; the run is of another version, use another --output"
            ) from error
        known[recipe.identity(options)] = path.parent
    return known


def _name(values: Mapping[str, Any], seed: int) -> str:
    """Words for themselves, numbers behind the name of their option."""
    words = {name: isinstance(value, str) and value[:1].isalpha() for name, value in values.items()}
    parts = [
        value if words[name] else f"{name}{value_text(value)}" for name, value in values.items()
    ]
    return re.sub(r"[^\w.+-]+", "_", "-".join([*parts, f"seed{seed}"]))


def _check_evaluations(run: PlannedRun, evaluator: Recipe) -> None:
    record = run.record
    for suite, options in run.evaluations.items():
        if record is None or suite not in record.evaluations:
            continue
        old, new = (
            evaluator.decisive(record.evaluations[suite]["options"]),
            evaluator.decisive(options),
        )
        if any(old.get(name, value) != value for name, value in new.items()):
            raise ValueError(_changed(run.folder / suite, old, new))


def _changed(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in new if name in old and old[name] != new[name]]
    differences = ", ".join(f"{name} was {old[name]!r} and is {new[name]!r} now" for name in names)
    return (
        f"{path} was run with other options ({differences}); results are never mixed: use "
        f"another --output, or make {' and '.join(names)} part of the grid"
    )
