"""Run a grid over options of adv_train.py and seeds, and compare the results with the paper.

Examples:
    python recipes/sweep.py --sweep recipes/configs/sweeps/digits_sweep.yaml --jobs 2
    python recipes/sweep.py --base recipes/configs/digits.yaml --grid '{neuron: [lif, dlif]}'
    python recipes/sweep.py --base digits --grid '{"norm,rho": [[l2, 1], [l1, 3]]}' --seeds 5
    python recipes/sweep.py --base digits --grid '{mode: [none, at]}' --evaluate paper standard
    python recipes/sweep.py --output runs/digits_sweep      # resume
    python recipes/sweep.py --output runs/digits_sweep --report --contrast rho  # tables and figure

--sweep FILE reads these options from a YAML file, as --config does.
"""

import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from lab.command_line import (
    NamesCode,
    OutputFolder,
    PositiveInt,
    Yaml,
    YamlDict,
    check_code,
    check_options,
    checked,
    config_files,
    describe_folder,
    plain,
    read_file,
    read_options,
    run_recipe,
)

RECIPES = Path(__file__).parent
SWEEP_FILE = "sweep.yaml"


@dataclass(frozen=True)
class Options:
    """Options of sweep."""

    # runs
    base: str | None = None
    """Base options of adv_train.py: a YAML file, or the name of a preset such as digits; None: the
    defaults."""
    options: Annotated[YamlDict, NamesCode()] = field(default_factory=dict)
    """Options of adv_train.py for all runs; they override --base. Those of the command line are
    added to those of a file."""
    grid: Annotated[dict[str, list[Any]], Yaml(dict), NamesCode()] = field(default_factory=dict)
    """Values of each option of adv_train.py; every combination is run, once where only ignored
    options (rho with mode none) differ. "norm,rho" with values such as [l1, 3] varies two options
    together."""
    seeds: Annotated[int | list[int], Yaml(int, list)] = 1
    """Number of seeds (0, 1, ...), or a list of seeds."""
    cells: Annotated[YamlDict, NamesCode()] = field(default_factory=dict)
    """Named cells, in addition to the grid: each has a config (a preset such as defences/tgo),
    options that override all others, and a search: one option with several values. With the
    first seed, a network is trained for each value; the value that is best on the validation images
    is used for all seeds."""

    # evaluation
    evaluate: tuple[str, ...] = ()
    """Suites of evaluate.py to run on every network, such as paper standard."""
    evaluation_options: YamlDict = field(default_factory=dict)
    """Options of evaluate.py, such as {test_limit: 256}."""
    evaluations: YamlDict = field(default_factory=dict)
    """Named evaluations with their own options, such as {at_4: {suite: fast, eps: 4/255}}."""

    # recipes
    recipe: Annotated[str | None, NamesCode()] = None
    """Training recipe; None: adv_train.py in the same folder."""
    evaluator: Annotated[str | None, NamesCode()] = None
    """Evaluation recipe; None: evaluate.py in the same folder."""

    # machine
    jobs: PositiveInt = 1
    """Parallel runs, one process each; GPUs are distributed among them."""
    threads: PositiveInt = 1
    """Number of torch threads per run."""
    cluster: Literal["local", "slurm"] = "local"
    """Run on this machine, or as jobs of a Slurm cluster."""
    cluster_options: YamlDict = field(default_factory=dict)
    """Options of submitit for Slurm jobs, such as {slurm_partition: gpu, timeout_min: 600}."""

    # output
    output: OutputFolder | None = None
    """Output folder; None: runs/ and the name of the sweep file, or runs/sweep."""
    report: bool = False
    """Only make the tables and the figure from finished runs."""
    columns: list[str] | None = None
    """Columns of the tables, as shell patterns such as paper/*; None: the default ones. The CSV has
    all."""
    contrast: tuple[str, ...] = ()
    """Options whose effect is tabulated, over pairs of runs with the same seed."""
    plot: str = "rho"
    """Numeric option on the x axis of the figure."""


def as_config(arguments: list[str]) -> list[str]:
    """--sweep is another name of --config."""
    return [re.sub(r"^--sweep(?==|$)", "--config", word) for word in arguments]


if __name__ == "__main__":
    check_options(
        Options, as_config(sys.argv[1:])
    )  # ends here if they are wrong: what follows imports torch

import yaml
from lab.sweeping.perform import LOG_FILE, executor_for, perform_all
from lab.sweeping.report import Results, write_report
from lab.sweeping.runs import (
    Combination,
    PlannedRun,
    Planner,
    Recipe,
    Trial,
    check_suite_is_run,
    compared,
    expand,
    load_recipe,
    names_in,
    read_cells,
    read_evaluations,
    seeds_of,
    trials_csv,
)
from rich.console import Console

from sj_robust.core.console import duration, working
from sj_robust.core.extras import check_extra
from sj_robust.core.folders import locked
from sj_robust.core.saved import write_whole


def main(arguments: list[str]) -> None:
    """Plan, run, report."""
    options = parse(arguments)
    folder = Path(str(options.output))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=True)
    failed: list[str] = []
    with checked(), working("checking every run", console):
        planned = plan(options, folder)
    if not options.report:
        with checked():
            executor = executor_for(
                folder, options.cluster, options.cluster_options, jobs=options.jobs
            )
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"{folder} is being written by another sweep; wait for it, or change --output"
        with locked(folder / ".lock", busy):
            describe_folder(folder, "sweep", arguments)  # a sweep that is stopped has it too
            kept = plain(options) | {"output": None, "report": False}
            write_whole(folder / SWEEP_FILE, yaml.safe_dump(kept, sort_keys=False))
            failed += run(options, planned.searches, executor, folder, console)
            planned = plan(options, folder)  # what the searches chose is known now
            failed += run(options, planned.runs, executor, folder, console)
    if planned.trials:
        write_whole(folder / "search.csv", trials_csv(planned.trials))
    results = Results(planned.runs, axes_of(options))
    if results.cells or not failed:
        with checked():
            files = write_report(
                folder,
                results,
                console,
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
    if not planned:
        return []
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


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do.

    Attributes:
        runs: All runs that are known: those of a cell are once its search is done.
        searches: Trainings of the searches that are not done.
        trials: What the searches that are done came to.
    """

    runs: list[PlannedRun]
    searches: list[PlannedRun]
    trials: list[Trial]


def plan(options: Options, folder: Path) -> Plan:
    """All runs; every option is checked before anything starts."""
    if not options.grid and not options.cells and options.base is None:
        raise ValueError(
            f"nothing to run: give --sweep FILE, or --base and --grid ({folder / SWEEP_FILE} is "
            "missing)"
        )
    recipe = load_recipe(Path(options.recipe or RECIPES / "adv_train.py"))
    evaluator = load_recipe(Path(options.evaluator or RECIPES / "evaluate.py"))
    given = read_evaluations(options.evaluate, options.evaluation_options, options.evaluations)
    evaluations = {}
    for name, chosen in given.items():
        evaluations[name] = plain(evaluator.read(chosen, f"evaluation {name}"))
        if options.evaluator is None:
            check_suite_is_run(name, evaluations[name])
            check_extra(evaluations[name]["suite"])
    cells = read_cells(options.cells)
    grid = expand(options.grid)
    seeds = seeds_of(options.seeds)
    check_axes(options, recipe.defaults)
    base = base_options(options.base)
    planner = Planner(folder, recipe, evaluator)
    found = Plan([], [], [])
    for cell in cells:
        cell.check(grid[0])
        fixed = base | cell.preset | options.options | cell.options
        check_owned([*fixed, *grid[0], *cell.search[0]])
        if "reference" in recipe.defaults:
            fixed.setdefault("reference", False)
        if "judged" in recipe.defaults:
            fixed.setdefault("judged", 0)
        settings = settings_of(recipe, fixed, grid)  # checked even while a search is missing
        if len(cell.search) > 1:
            searched = settings_of(recipe, fixed, cell.search)
            tried = planner.plan(searched, seeds[:1], {}, cell.name)
            trials = compared(cell, tried)
            if not trials:
                found.searches.extend(tried)
                continue
            found.trials.extend(trials)
            pairs = zip(cell.search, trials, strict=True)
            best = next(values for values, trial in pairs if trial.chosen)
            settings = settings_of(recipe, fixed, [best | values for values in grid])
        runs = planner.plan(settings, seeds, evaluations, cell.name, grid[0])
        found.runs.extend(runs)
    if options.cells:
        found.runs.sort(key=lambda one: int(one.options["seed"]))  # every cell with the first seed
    return found


def settings_of(
    recipe: Recipe, fixed: Combination, combinations: Iterable[Combination]
) -> list[tuple[Combination, Any]]:
    """Each combination with the options that it makes, which are checked."""
    return [(values, recipe.read(fixed | values)) for values in combinations]


def axes_of(options: Options) -> list[str]:
    """Options that the grid varies, and the cell where cells have names."""
    axes = [name for key in options.grid for name in names_in(key)]
    return ["cell", *axes] if options.cells else axes


def check_axes(options: Options, known: Iterable[str]) -> None:
    """Raise ValueError unless what is tabulated can differ, and what is drawn is an option."""
    axes = axes_of(options)
    for name in (name for option in options.contrast for name in names_in(option)):
        if name not in axes:
            raise ValueError(
                f"a contrast needs an option of the grid ({', '.join(axes)}), got {name!r}"
            )
    if options.plot not in known:
        raise ValueError(f"plot must be an option ({', '.join(known)}), got {options.plot!r}")


def check_owned(names: Iterable[str]) -> None:
    """The sweep itself sets some options."""
    owned = sorted({"output", "resume", "seed"}.intersection(names))
    if owned:
        raise ValueError(
            f"{owned[0]} is set by the sweep itself; omit it, and give seeds with --seeds"
        )


def base_options(base: str | None) -> dict[str, Any]:
    """Options in a file, or in the preset of that name."""
    return {} if base is None else read_file(Path(base))


def parse(arguments: list[str]) -> Options:
    """Options from the command line; a folder's own sweep.yaml comes first where nothing else says
    what to run.
    """
    words = as_config(arguments)
    given = options = read_options(Options, words)
    files = config_files(words)
    output = options.output or str(Path("runs") / (files[-1].stem if files else "sweep"))
    before = Path(output) / SWEEP_FILE
    says_what = options.grid or options.cells or options.base is not None
    goes_on = not files and not says_what and before.is_file()
    if goes_on:
        files = [before]
        options = read_options(Options, ["--config", str(before), *words])
    for path in reversed(files):
        added = read_file(path).get("options", {}) | options.options
        options = replace(options, options=added)
    if goes_on:
        of_runs = base_options(options.base) | options.options
        check_code(replace(options, options=of_runs), given, before)
    return replace(options, output=output)


if __name__ == "__main__":
    run_recipe(main, stopped="run the same command to continue")
