"""Compare the speed of DLIF layers and networks with that of other neurons, libraries and ReLU.

Examples:
    python recipes/benchmark.py                         # the neuron: three shapes, both allocators
    python recipes/benchmark.py --shapes '[[4,8,32,8,8]]' --rounds 3  # a quick check
    python recipes/benchmark.py --what batch_norm       # after batch norm
    python recipes/benchmark.py --what stage            # with pooling; bf16, channels last
    python recipes/benchmark.py --what conv4            # a training step; also vgg5
    python recipes/benchmark.py --what conv4_adversarial  # adversarial step; also vgg5_adversarial
    python recipes/benchmark.py --what training_step    # every training mode
    python recipes/benchmark.py --what joint_step       # training with joint bounds, CPU time
    python recipes/benchmark.py --output docs/benchmarks  # writes neuron.csv, .md, .png
    python recipes/benchmark.py --device cuda --output docs/benchmarks  # GPU, one hour

Each method runs in its own process, and methods of one shape take three turns. Timing starts only
after the operator's tests and a comparison with the reference loop have passed. Other libraries are
optional (pip install snntorch norse nir nirtorch). Failures are listed with their reason. Results
are saved as they arrive, and the same command resumes an interrupted run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lab.command_line import (
    AtLeastTwo,
    OutputFolder,
    PositiveInt,
    WrongUse,
    Yaml,
    check_options,
    describe_folder,
    read_options,
    run_recipe,
)


@dataclass(frozen=True)
class Options:
    """Options of benchmark."""

    # measurement
    what: Literal[
        "neuron",
        "batch_norm",
        "stage",
        "conv4",
        "vgg5",
        "conv4_adversarial",
        "vgg5_adversarial",
        "training_step",
        "joint_step",
    ] = "neuron"
    """What to measure; see the examples."""
    shapes: Annotated[list[list[int]] | None, Yaml(list, type(None))] = None
    """Input shapes [T, N, C, H, W], such as [[4,8,32,8,8]]; None: those of the documentation."""
    methods: list[str] | None = None
    """Methods to measure, such as "DLIF cpp"; None: all. An unknown name makes the command list
    the known ones."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: run tests/gpu, then measure a layer, batch norm with a layer, and a training step of
    VGG-11 on the GPU; only --rounds, --check and --output apply."""
    rounds: AtLeastTwo = 15
    """Timed passes per method."""
    check: bool = True
    """Run the tests of the timed code first; needs a clone of the repository and the
    optional extra 'test'."""

    # machine
    threads: PositiveInt = 2
    """Number of torch threads."""
    allocators: tuple[Literal["malloc", "reuse"], ...] = ("malloc", "reuse")
    """malloc: map every large tensor anew. reuse: keep the heap."""

    # output
    output: OutputFolder | None = None
    """Folder for CSV, table and chart; None: only print."""
    redraw: str | None = None
    """Redraw the charts in this folder without measuring anything."""


if __name__ == "__main__":
    check_options(Options)  # --help and wrong options end here: what follows imports torch

import hashlib
import json
import os
import shlex

import torch
from lab.benchmarking.benchmarks import BENCHMARKS, GPU_BENCHMARKS
from lab.benchmarking.race import NOT_HERE, TOO_LONG, Race, refuse_unless_tests_pass, run_gpu_tests
from lab.benchmarking.results import TESTS, Results, Row, draw, load, markdown
from rich.console import Console

import sj_robust
from sj_robust.core.console import working
from sj_robust.core.environment import environment, processor, version_of
from sj_robust.ops.dlif import cpp

PEERS = ("snntorch", "norse")
GPU_PACKAGES = ("triton", "cupy-cuda12x", "cupy-cuda13x")


def main(arguments: list[str]) -> None:
    """Check, measure, show, save."""
    options = read_options(Options, arguments)
    if options.redraw is not None:
        redraw(Path(options.redraw))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: torch finds no CUDA GPU, so nothing is measured; python -m "
            "sj_robust.doctor says more"
        )
    races = races_on_gpu() if options.device == "cuda" else races_on_cpu(options)
    where = measured_with(options)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for name, value in where.items():
        console.print(f"{name}: {value}")
    if options.output is not None:
        Path(options.output).mkdir(parents=True, exist_ok=True)
        describe_folder(Path(options.output), "benchmark", arguments)
    if options.check:
        check(options, where, arguments, console)
    subject = "a GPU" if options.device == "cuda" else options.what
    rows: list[Row] = []
    with working(f"measuring {subject}", console, total=len(races)) as step:
        for race in races:
            results = Results(csv_file(options, where, race.subject), where)
            hung = [row.method for row in rows if row.reason.startswith(TOO_LONG)]
            left = [method for method in race.left(results) if method not in hung]
            found = race.run(left, rounds=options.rounds, threads=options.threads)
            rows += found
            results.add(found)
            console.print("\n".join(markdown(found)))
            save(results, arguments)
            step()
    for path in dict.fromkeys(csv_file(options, where, race.subject) for race in races):
        if path is not None:
            names = f"{path.name}, {path.stem}.md and {path.stem}.png"
            console.print(f"{names} are in {options.output}")
    failed = [row for row in rows if row.reason and not row.reason.startswith(NOT_HERE)]
    if failed:
        raise SystemExit(f"error: {len(failed)} rows have no figure, see the reasons above")


def races_on_gpu() -> list[Race]:
    """All that there is for a GPU."""
    races = []
    for name, benchmark in GPU_BENCHMARKS.items():
        methods = tuple(benchmark.methods)
        races += [Race(name, benchmark, methods, shape, "cuda") for shape in benchmark.shapes]
    return races


def races_on_cpu(options: Options) -> list[Race]:
    """One benchmark; methods and shapes that it does not have are refused."""
    benchmark = BENCHMARKS[options.what]
    methods = tuple(options.methods or benchmark.methods)
    for method in methods:
        if method not in benchmark.methods:
            there = ", ".join(benchmark.methods)
            raise WrongUse(f"{options.what} has no method {method}; it has {there}")
    shapes = benchmark.shapes
    if options.shapes is not None:
        shapes = tuple(map(tuple, options.shapes))
    axes = {len(shape) for shape in benchmark.shapes}
    for shape in shapes:
        if len(shape) not in axes or min(shape) < 1:
            example = json.dumps([benchmark.shapes[-1]])
            raise WrongUse(
                f"a shape must be sizes >= 1, such as {example} for {options.what}, got "
                f"{list(shape)}"
            )
    races = []
    for allocator in options.allocators:
        races += [Race(options.what, benchmark, methods, shape, allocator) for shape in shapes]
    return races


def measured_with(options: Options) -> dict[str, str]:
    """Machine, versions and code, which stand beside every row."""
    where = environment(options.device) | {"threads": str(options.threads)}
    where |= {"rounds": str(options.rounds)}
    where |= {"processor": processor()}
    where |= {"instruction_set": os.environ.get(cpp.INSTRUCTION_SET_VARIABLE, "best")}
    for package in GPU_PACKAGES if options.device == "cuda" else PEERS:
        where[package] = version_of(package) or "not installed"
    digest = hashlib.sha256()
    folder = Path(sj_robust.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".cu"):
            digest.update(path.read_bytes())
    return where | {"code": digest.hexdigest()[:12]}


def csv_file(options: Options, where: dict[str, str], subject: str) -> Path | None:
    """Where the rows of a benchmark are kept, if anywhere."""
    if options.output is None:
        return None
    release = f"-{where['spikingjelly']}" if options.device == "cuda" else ""
    return Path(options.output) / f"{subject}{release}.csv"


def check(options: Options, where: dict[str, str], arguments: list[str], console: Console) -> None:
    """Run the tests of what is timed; on a GPU they are rows, and what fails stops nothing else."""
    tests = Path(__file__).parents[1] / "tests"
    if options.device == "cuda":
        results = Results(csv_file(options, where, TESTS), where)
        run_gpu_tests(tests / "gpu", results, console.print)
        save(results, arguments)
        return
    with working("running the tests of what is timed", console):
        refuse_unless_tests_pass(tests, options.what)


def save(results: Results, arguments: list[str]) -> None:
    """A table in Markdown and a chart beside the rows."""
    if results.path is None:
        return
    where = results.where
    machine = f"processor {where['processor']}, {where['threads']} threads"
    if where["device"].startswith("cuda"):
        packages = ", ".join(f"{name} {where[name]}" for name in GPU_PACKAGES)
        machine = f"{where['device']}, {packages}"
    command = shlex.join(["python", "recipes/benchmark.py", *arguments])
    head = (
        f"`{command}`: {machine}, torch {where['torch']}, SpikingJelly {where['spikingjelly']}, "
        f"commit {where['commit'][:12]}."
    )
    lines = [head, "", *markdown(results.rows)]
    results.path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    draw(results.rows, results.path.with_suffix(".png"))


def redraw(folder: Path) -> None:
    """Charts again, from the CSV files alone."""
    paths = [path for path in sorted(folder.glob("*.csv")) if not path.match("*.earlier.csv")]
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no *.csv; --redraw takes the folder that an earlier call wrote to"
        )
    for path in paths:
        _, rows = load(path)
        draw(rows, path.with_suffix(".png"))
        print(f"{path} drawn as {path.stem}.png")


if __name__ == "__main__":
    run_recipe(main, stopped="and run the same command to continue")
