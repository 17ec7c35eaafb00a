"""Measure what DLIF costs beside its peers: layers beside the memory's speed, networks beside ReLU.

    python recipes/benchmark.py                                           # the neuron: three shapes, both allocators
    python recipes/benchmark.py --shapes '[[4,8,32,8,8]]' --rounds 3       # a quick look
    python recipes/benchmark.py --what batch_norm                         # behind a batch norm
    python recipes/benchmark.py --what stage                              # and before a pooling; bf16, channels last
    python recipes/benchmark.py --what conv4                              # a training step; vgg5 likewise
    python recipes/benchmark.py --what conv4_adversarial                  # adversarial step; vgg5_, small_adversarial
    python recipes/benchmark.py --what training_step                      # the step of every training mode
    python recipes/benchmark.py --what verify                             # proofs of images beside PGD on them
    python recipes/benchmark.py --what instruction_sets                   # the compiled kernel on each of them
    python recipes/benchmark.py --what scaling                            # time over T and over N
    python recipes/benchmark.py --output docs/benchmarks                  # leaves neuron.csv, neuron.md, neuron.png
    python recipes/benchmark.py --device cuda --output docs/benchmarks    # all that there is for a GPU, within an hour

Every method runs in a process of its own, those of one shape take turns, and nothing is timed
before the operator's tests and a comparison with the textbook loop have passed. Peers that are not
installed are named and left out; to have them: pip install snntorch norse nir nirtorch. On a GPU
each row and each group of tests is on its own: one that fails is a row with the reason, what is
known is on disk, and the same command goes on where a run was stopped.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lab.command_line import (
    WrongUse,
    check_options,
    checked,
    describe_folder,
    option,
    read_options,
    run_recipe,
)
from lab.command_line.declared import AtLeastTwo, OutputFolder, PositiveInt


@dataclass(frozen=True)
class Options:
    """Options of benchmark."""

    what: Literal[
        "neuron",
        "batch_norm",
        "stage",
        "instruction_sets",
        "scaling",
        "conv4",
        "vgg5",
        "conv4_adversarial",
        "vgg5_adversarial",
        "small_adversarial",
        "training_step",
        "verify",
    ] = option("neuron", "What to measure, see the examples.", group="measurement")
    shapes: list[tuple[int, ...]] | None = option(
        None,
        "Shapes [T, N, C, H, W] of the input, such as [[4,8,32,8,8]]; "
        "null for those of the documentation.",
    )
    methods: list[str] | None = option(
        None,
        "Methods to measure, such as [DLIF cpp]; null for all. A wrong name is "
        "answered with those there are.",
    )
    device: Literal["cpu", "cuda"] = option(
        "cpu",
        "cuda runs tests/gpu and then measures layer, batch norm with layer and a training step "
        "of VGG-11 on the GPU; of the other options it takes rounds, check and output.",
    )
    rounds: AtLeastTwo = option(15, "Timed passes per method; the tables show milliseconds.")
    check: bool = option(
        True,
        "Whether the tests of what is timed run first; they need a clone of the repository and "
        "the extra test.",
    )
    threads: PositiveInt = option(2, "Threads of torch.", group="machine")
    allocators: tuple[Literal["malloc", "reuse"], ...] = option(
        ("malloc", "reuse"), "malloc maps every large tensor afresh, reuse keeps the heap."
    )
    instruction_set: str | None = option(
        None, "Instruction set of the compiled kernel, baseline, avx2 or avx512; null for the best."
    )
    output: OutputFolder | None = option(
        None,
        "Folder for the CSV, the table and the chart; null only prints.",
        group="output",
        metavar="FOLDER",
    )
    redraw: str | None = option(
        None,
        "Folder of an earlier call, whose charts are drawn again, and nothing is "
        "measured; null to measure.",
        metavar="FOLDER",
    )


if __name__ == "__main__":
    check_options(Options)  # --help and wrong options end here: what follows imports torch

import csv
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile

import torch
from lab.benchmarking.benchmarks import BENCHMARKS, check_instruction_set
from lab.benchmarking.gpu_hour import redraw_gpus, test_and_measure
from lab.benchmarking.gpu_plan import PLAN
from lab.benchmarking.gpu_run import Store
from lab.benchmarking.race import Measurement, race
from lab.benchmarking.tables import caption, cells, columns, markdown
from rich.console import Console
from rich.table import Table

from sj_robust import ops
from sj_robust._console import working
from sj_robust._environment import processor, version_of
from sj_robust.evaluation import environment

PEERS = ("snntorch", "norse")


def main(arguments: list[str]) -> None:
    """Check, measure, show, save."""
    options = read_options(Options, arguments)
    if options.redraw is not None:
        redraw(Path(options.redraw))
        return
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(
                "error: torch finds no CUDA GPU, so nothing is measured; python -m "
                "sj_robust.doctor says more"
            )
        with tempfile.TemporaryDirectory() as folder:
            first_hour(options, Path(options.output or folder), arguments)
        return
    benchmark = BENCHMARKS[options.what]
    unknown = sorted(set(options.methods or []) - set(benchmark.methods))
    if unknown:
        raise WrongUse(
            f"{options.what} has no method {unknown[0]}; it has {', '.join(benchmark.methods)}"
        )
    axes = {len(shape) for shape in benchmark.shapes}
    for shape in options.shapes or ():
        if len(shape) not in axes or min(shape) < 1:
            example = json.dumps([benchmark.shapes[-1]])
            raise WrongUse(
                f"a shape must be sizes >= 1, such as {example} for {options.what}, got "
                f"{list(shape)}"
            )
    with checked():
        check_instruction_set(options.instruction_set)
    where = environment() | {"threads": str(options.threads), "processor": processor()}
    where |= {"instruction_set": options.instruction_set or "best"}
    where |= {name: version_of(name) or "not installed" for name in PEERS}
    console = said(where)
    environ = (
        {}
        if options.instruction_set is None
        else {"SJ_ROBUST_INSTRUCTION_SET": options.instruction_set}
    )
    if options.check:
        with working("running the tests of what is timed", console):
            refuse_unless_tests_pass(options.what, environ)
    methods = options.methods or list(benchmark.methods)
    races = [
        (allocator, shape)
        for allocator in options.allocators
        for shape in options.shapes or benchmark.shapes
    ]
    rows: list[Measurement] = []
    with working(f"measuring {options.what}", console, total=len(races)) as step:
        for allocator, shape in races:
            try:
                found, missing = race(
                    options.what,
                    methods,
                    shape,
                    rounds=options.rounds,
                    threads=options.threads,
                    allocator=allocator,
                    environ=environ,
                )
            except RuntimeError as error:  # of a process of its own, or a method is wrong
                raise SystemExit(f"error: {error}") from error
            for method, reason in missing.items():
                console.print(f"{method} is left out: {reason}")
            if found:
                console.print(table(found))
            rows += found
            step()
    if options.output is not None and rows:
        name = (
            options.what
            if options.instruction_set is None
            else f"{options.what}-{options.instruction_set}"
        )
        save(Path(options.output), name, rows, where, arguments)
        console.print(f"{name}.csv, {name}.md and {name}.png are in {options.output}")


def first_hour(options: Options, folder: Path, arguments: list[str]) -> None:
    """All that there is for a GPU; a call that was stopped goes on."""
    where = {
        name: value for name, value in environment(options.device).items() if name != "threads"
    }
    cupy = next(
        (version for kind in ("cuda12x", "cuda13x") if (version := version_of(f"cupy-{kind}"))),
        None,
    )
    where |= {"triton": version_of("triton") or "not installed", "cupy": cupy or "not installed"}
    where |= {"kernels": digest_of_kernels()}
    console = said(where)
    store = Store(folder / f"gpu-{where['spikingjelly']}.jsonl", where)
    describe_folder(folder, "benchmark", arguments)
    tests = Path(__file__).parents[1] / "tests" / "gpu" if options.check else None
    command = shlex.join(["python", "recipes/benchmark.py", *arguments])
    test_and_measure(store, PLAN, tests, options.device, options.rounds, command, console.print)
    if options.output is not None:
        console.print(f"{store.path.name}, and its .md and .png, are in {folder}")


def said(where: dict[str, str]) -> Console:
    """The console, on which it is said where everything is measured."""
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    for name, value in where.items():
        console.print(f"{name}: {value}")
    return console


def digest_of_kernels() -> str:
    """Changes with any text of ``sj_robust.ops``, so that no row of other kernels stays in a
    table.
    """
    folder = Path(ops.__file__).parent
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cu"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def refuse_unless_tests_pass(what: str, environ: dict[str, str]) -> None:
    """A wrong kernel has no speed: run its tests, with the instruction set that will be timed."""
    tests = Path(__file__).parents[1] / "tests"
    files = ["ops/test_dlif.py", "ops/test_cpp.py"]
    if what not in ("neuron", "instruction_sets", "scaling"):
        files += ["ops/test_bn_dlif.py", "neuron/test_fusion.py"]
    files += {
        "training_step": ["training/test_training_step.py"],
        "verify": ["stability/test_verification.py"],
    }.get(what, [])
    options = ["-q", "--no-header", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(str(tests / name) for name in files)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environ
    )
    if result.returncode != 0:
        tail = f"{result.stdout[-2000:]}{result.stderr[-500:]}"
        raise SystemExit(f"the tests of what is timed fail, so nothing is timed:\n{tail}")


def table(rows: list[Measurement]) -> Table:
    """One race on the terminal."""
    result = Table(title=caption(rows))
    for name in columns(rows):
        result.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        result.add_row(*cells(row, rows))
    return result


def save(
    folder: Path, what: str, rows: list[Measurement], where: dict[str, str], arguments: list[str]
) -> None:
    """CSV with everything, a table in Markdown and a chart."""
    folder.mkdir(parents=True, exist_ok=True)
    describe_folder(folder, "benchmark", arguments)
    with (folder / f"{what}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Measurement)), *where])
        writer.writeheader()
        writer.writerows(asdict(row) | where for row in rows)
    lines = [
        f"`{shlex.join(['python', 'recipes/benchmark.py', *arguments])}`: processor "
        f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, SpikingJelly "
        f"{where['spikingjelly']}, commit {where['commit'][:12]}.",
        "",
    ]
    lines += markdown(rows)
    (folder / f"{what}.md").write_text("\n".join(lines), encoding="utf-8")
    draw(rows, folder / f"{what}.png")


def draw(rows: list[Measurement], path: Path) -> None:
    """The chart."""
    from lab.benchmarking.drawing import plot_benchmark  # imports matplotlib

    plot_benchmark(rows, path)


def redraw(folder: Path) -> None:
    """Charts again, from the CSV files alone."""
    of_gpus = redraw_gpus(folder, PLAN, print)
    if not (paths := sorted(folder.glob("*.csv"))) and not of_gpus:
        raise FileNotFoundError(
            f"{folder} holds no *.csv; --redraw takes the folder that an earlier call wrote to"
        )
    kinds = {field.name: field.type for field in fields(Measurement)}
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            texts = list(csv.DictReader(file))
        if not texts or not kinds.keys() <= texts[0].keys():
            raise ValueError(f"{path} holds no measurements of this recipe; move it elsewhere")
        rows = []
        for text in texts:
            values: dict[str, Any] = {
                name: text[name] if kind is str else float(text[name])
                for name, kind in kinds.items()
            }
            rows.append(Measurement(**values))
        draw(rows, path.with_suffix(".png"))
        print(f"{path} drawn as {path.stem}.png")


if __name__ == "__main__":
    run_recipe(
        main,
        stopped="which on a CPU is nothing before all is measured; the same command goes on on a GPU",
    )
