"""A grid over any options of adv_train.py and seeds: trained, evaluated, and tabled beside the
paper's figures.

python recipes/sweep.py --sweep recipes/configs/sweeps/digits_sweep.yaml --jobs 2
python recipes/sweep.py --base recipes/configs/digits.yaml --grid '{neuron: [lif, dlif]}'
python recipes/sweep.py --base digits --grid '{"norm,rho": [[l2, 1], [l1, 3]]}' --seeds 5
python recipes/sweep.py --base digits --grid '{mode: [none, at]}' --evaluate '[paper, standard]'
python recipes/sweep.py --output runs/digits_sweep      # go on with a stopped one
python recipes/sweep.py --output runs/digits_sweep --report --contrast '[rho]'  # tables, figure

--sweep FILE reads these options from a YAML file, as --config does.
"""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from lab.command_line import (
    check_code,
    check_options,
    checked,
    describe_folder,
    option,
    read_options,
    run_recipe,
)
from lab.command_line.declared import OutputFolder, PositiveInt

RECIPES = Path(__file__).parent
SWEEP_FILE = "sweep.yaml"


@dataclass(frozen=True)
class Options:
    """Options of sweep."""

    base: str | None = option(
        None,
        "Options of adv_train.py that all runs start from, a YAML file or the name of one "
        "in recipes/configs; null for its defaults.",
        group="runs",
        metavar="FILE",
    )
    options: dict[str, Any] = option(
        {},
        "Further options of adv_train.py, the same for all runs; they override base.",
        runs_code=True,
    )
    grid: dict[str, list[Any]] = option(
        {},
        'Values by option of adv_train.py; every combination is run. "norm,rho" '
        "with values such as [l1, 3] varies two options together.",
        runs_code=True,
    )
    seeds: int | list[int] = option(1, "Number of seeds, 0, 1, ..., or a list of them.")
    skip: list[dict[str, Any]] = option(
        [],
        "Combinations to leave out, such as {neuron: lif, rho: [1, 2]}; those that "
        "differ in an option without effect (rho with mode none) are one run anyway.",
    )
    evaluate: list[str] = option(
        [],
        "Suites of evaluate.py that every network goes through, such as [paper, standard].",
        group="evaluation",
    )
    evaluation_options: dict[str, Any] = option(
        {}, "Options of evaluate.py, such as {test_limit: 256}."
    )
    recipe: str | None = option(
        None,
        "The recipe that trains; null for adv_train.py beside this one.",
        group="recipes",
        metavar="FILE",
        runs_code=True,
    )
    evaluator: str | None = option(
        None,
        "The recipe that evaluates; null for evaluate.py beside this one.",
        metavar="FILE",
        runs_code=True,
    )
    jobs: PositiveInt = option(
        1,
        "Runs side by side, each in a process of its own; GPUs are shared out among them.",
        group="machine",
    )
    threads: PositiveInt = option(1, "Threads of torch in each.")
    cluster: Literal["local", "slurm"] = option(
        "local", "Where runs are performed: on this machine, or as jobs of a Slurm cluster."
    )
    cluster_options: dict[str, Any] = option(
        {}, "Options of submitit for these jobs, such as {slurm_partition: gpu, timeout_min: 600}."
    )
    output: OutputFolder | None = option(
        None,
        "Folder of the sweep; null means runs/ and the name of the sweep file, or runs/sweep.",
        group="output",
        metavar="FOLDER",
    )
    report: bool = option(False, "Only make tables and figure from the runs there are.")
    columns: list[str] | None = option(
        None,
        "Figures in the tables, as shell patterns such as paper/*; null for the "
        "usual ones. The CSV has all.",
    )
    contrast: list[str] = option(
        [], "Options whose effect is tabled over pairs of runs with the same seed."
    )
    plot: str = option("rho", "Option of numbers that the figure is drawn over.", metavar="OPTION")


def as_config(arguments: list[str]) -> list[str]:
    """--sweep is another name of --config."""
    return [re.sub(r"^--sweep(?==|$)", "--config", word) for word in arguments]


if __name__ == "__main__":
    check_options(
        Options, as_config(sys.argv[1:])
    )  # ends here if they are wrong: what follows imports torch

import yaml
from filelock import FileLock, Timeout
from lab.sweeping.grid import expand, seeds_of, values_in
from lab.sweeping.perform import LOG_FILE
from lab.sweeping.plan import PlannedRun, load_records, plan_runs
from lab.sweeping.pool import executor_for, perform_all
from lab.sweeping.recipe import load_recipe
from lab.sweeping.report import write_report
from rich.console import Console

from sj_robust.core.console import duration, working
from sj_robust.core.extras import check_extra
from sj_robust.core.folders import read_text
from sj_robust.core.saved import write_whole


def main(arguments: list[str]) -> None:
    """Plan, run, report."""
    options = parse(arguments)
    folder = Path(str(options.output))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=True)
    failed: list[str] = []
    if not options.report:
        with checked(), working("checking every run", console):
            planned = plan(options, folder)
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            with checked():
                executor = executor_for(
                    folder, options.cluster, options.cluster_options, jobs=options.jobs
                )
            describe_folder(folder, "sweep", arguments)  # a sweep that is stopped has it too
            failed = run(options, planned, executor, folder, console)
    records = load_records(folder, load_recipe(Path(options.recipe or RECIPES / "adv_train.py")))
    if records or not failed:
        with checked():
            files = write_report(
                folder,
                records,
                console,
                grid=values_in(expand(options.grid)),
                columns=options.columns,
                contrast=options.contrast,
                plot=options.plot,
            )
        console.print(f"{', '.join(file.name for file in files)} are in {folder}", markup=False)
        describe_folder(folder, "sweep", arguments)
    if failed:
        heading = f"{len(failed)} runs FAILED; the same command tries them again:"
        console.print("\n".join([heading, *failed]), markup=False)
        sys.exit(1)


def run(
    options: Options, planned: list[PlannedRun], executor: Any, folder: Path, console: Console
) -> list[str]:
    """Perform the runs that are missing, and say how each ended; returns what failed."""
    kept = asdict(options) | {"output": None, "report": False}
    write_whole(folder / SWEEP_FILE, yaml.safe_dump(kept, sort_keys=False))
    missing = [one for one in planned if not one.finished]
    done = len(planned) - len(missing)
    console.print(f"{len(planned)} runs in {folder}, {done} of them finished before", markup=False)
    failed = []
    start = time.monotonic()
    ends = perform_all(missing, executor, jobs=options.jobs, threads=options.threads)
    for number, (one, error) in enumerate(ends, 1):
        record = one.record
        if error is None and record is not None:
            said = record.headline
        else:
            said = f"FAILED, {error}; see {one.folder / LOG_FILE}"
            failed.append(f"{one.name}: {error}")
        left = duration((time.monotonic() - start) / number * (len(missing) - number))
        console.print(
            f"{done + number}/{len(planned)} {one.name}: {said}; {left} left", markup=False
        )
    return failed


def plan(options: Options, folder: Path) -> list[PlannedRun]:
    """All runs; every option is checked before anything starts."""
    if not options.grid and options.base is None:
        raise ValueError(
            f"nothing to run: give --sweep FILE, or --base and --grid ({folder / SWEEP_FILE} is "
            "missing)"
        )
    recipe = load_recipe(Path(options.recipe or RECIPES / "adv_train.py"))
    recipe.check_names(
        name.strip() for option in (*options.contrast, options.plot) for name in option.split(",")
    )
    given = base_options(options.base) | options.options
    owned = sorted({"output", "resume", "seed"} & {*given, *values_in(expand(options.grid))})
    if owned:
        raise ValueError(
            f"{owned[0]} is set by the sweep itself; leave it out, and give seeds with --seeds"
        )
    fixed = ({"reference": False} if "reference" in recipe.names else {}) | given
    combinations = expand(options.grid, fixed=recipe.resolve(fixed), skip=options.skip)
    if not combinations:
        raise ValueError("skip leaves no combination of the grid; remove an entry")
    evaluator = load_recipe(Path(options.evaluator or RECIPES / "evaluate.py"))
    for suite in options.evaluate if options.evaluator is None else []:
        check_extra(suite)
    return plan_runs(
        folder,
        combinations,
        seeds_of(options.seeds),
        recipe=recipe,
        evaluator=evaluator,
        fixed=fixed,
        evaluations=dict.fromkeys(options.evaluate, options.evaluation_options),
    )


def base_options(base: str | None) -> dict[str, Any]:
    """Options in a file, or in the preset of that name."""
    if base is None:
        return {}
    places = [Path(base), RECIPES / "configs" / f"{base}.yaml"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = f"it is a YAML file, or the name of one in {places[1].parent}"
        raise FileNotFoundError(f"base {base} does not exist; {known}")
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options of adv_train.py, such as epochs: 15")
    return content


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of the folder; a kill lets go of it."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BlockingIOError(
            f"{folder} is being written by another sweep; wait for it, or change --output"
        ) from error


def parse(arguments: list[str]) -> Options:
    """Options from the command line; a folder's own sweep.yaml comes first where nothing else says
    what to run.
    """
    words = as_config(arguments)
    options = read_options(Options, words)
    pairs = pairwise([*words, ""])
    files = [
        word.partition("=")[2] or following
        for word, following in pairs
        if word.split("=")[0] == "--config"
    ]
    output = options.output or str(Path("runs") / (Path(files[-1]).stem if files else "sweep"))
    before = Path(output) / SWEEP_FILE
    if not files and not options.grid and options.base is None and before.is_file():
        kept = read_options(Options, ["--config", str(before), *words])
        check_code(replace(kept, options=base_options(kept.base) | kept.options), options, before)
        options = kept
    return replace(options, output=output)


if __name__ == "__main__":
    run_recipe(main, stopped="the same command goes on")
