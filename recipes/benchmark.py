"""Measure what a DLIF layer costs beside its peers and beside the memory bandwidth of this machine.

    python recipes/benchmark.py                                           # three shapes, both allocators
    python recipes/benchmark.py --shapes '[[4,8,32,8,8]]' --rounds 3       # a quick look
    python recipes/benchmark.py --what scaling                            # time over T and over N
    python recipes/benchmark.py --output docs/benchmarks                  # leaves neuron.csv, neuron.md, neuron.png

Every method runs in a process of its own, those of one shape take turns, and nothing is timed before the operator's
tests and a comparison with the reference have passed. Peers that are not installed are named and left out; to have
them: pip install snntorch norse nir nirtorch.
"""

import csv
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sj_robust.benchmarking import METHODS, Measurement, race
from sj_robust.evaluation import environment
from sj_robust.plotting import plot_benchmark

PEER = "SpikingJelly LIFNode"


@dataclass(frozen=True)
class Options:
    """Options of benchmark.

    Attributes:
        what: neuron compares methods; scaling shows the time over T and over the number of neurons.
        shapes: Shapes [T, N, ...] of the input current; null for those of the documentation.
        methods: Methods to measure; null for all.
        rounds: Timed passes per method.
        threads: Threads of torch.
        allocators: malloc maps every large tensor afresh, reuse keeps the heap.
        instruction_set: Instruction set of the compiled kernel, baseline, avx2 or avx512; null for the best.
        output: Folder for the CSV, the table and the chart; null only prints.
        check: Whether the operator's tests run first; they need a clone of the repository and the extra test.
    """

    what: Literal["neuron", "scaling"] = "neuron"
    shapes: list[tuple[int, ...]] | None = None
    methods: list[str] | None = None
    rounds: int = 15
    threads: int = 2
    allocators: tuple[Literal["malloc", "reuse"], ...] = ("malloc", "reuse")
    instruction_set: str | None = None
    output: str | None = None
    check: bool = True


DEFAULT_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "neuron": [(8, 64, 64, 32, 32), (8, 128, 256, 8, 8), (4, 64, 128, 8, 8)],
    "scaling": [*((T, 32, 8192) for T in (1, 2, 4, 8, 16, 32, 64)), *((8, N, 8192) for N in (8, 16, 64, 128))],
}
DEFAULT_METHODS = {"neuron": list(METHODS), "scaling": ["DLIF cpp", "DLIF eager"]}


def main(arguments: list[str]) -> None:
    """Check, measure, show, save."""
    options: Options = auto_cli(Options, args=arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    where = environment() | {"threads": str(options.threads), "processor": processor()}
    for name, value in where.items():
        console.print(f"{name}: {value}", highlight=False)
    if options.check:
        refuse_unless_tests_pass()
    environ = {} if options.instruction_set is None else {"SJ_ROBUST_INSTRUCTION_SET": options.instruction_set}
    shapes = options.shapes or DEFAULT_SHAPES[options.what]
    methods = options.methods or DEFAULT_METHODS[options.what]
    races = [(allocator, shape) for allocator in options.allocators for shape in shapes]
    rows: list[Measurement] = []
    for allocator, shape in track(races, description="races", console=console):
        found, missing = race(
            methods, shape, rounds=options.rounds, threads=options.threads, allocator=allocator, environ=environ
        )
        for method, reason in missing.items():
            console.print(f"{method} is left out: {reason}", highlight=False)
        console.print(table(found))
        rows += found
    if options.output is not None:
        save(Path(options.output), options.what, rows, where)


def refuse_unless_tests_pass() -> None:
    """A wrong kernel has no speed."""
    tests = Path(__file__).parents[1] / "tests" / "ops"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        str(tests / "test_dlif.py"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(
            f"the operator's tests fail, so nothing is timed:\n{result.stdout[-2000:]}{result.stderr[-500:]}"
        )


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if info.exists() and names else platform.processor()


def table(rows: list[Measurement]) -> Table:
    """One race, with ratios to SpikingJelly's LIFNode and to the memory's speed."""
    first = rows[0]
    result = Table(title=f"[{first.shape.replace('x', ', ')}] {first.allocator}, ms; floor {first.floor:.1f}")
    for name in COLUMNS:
        result.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        result.add_row(*cells(row, rows))
    return result


COLUMNS = ("method", "median", "quartiles", "best", "faster than LIFNode", "speed of memory", "saved", "peak")


def cells(row: Measurement, rows: list[Measurement]) -> tuple[str, ...]:
    """Text of one line of the table; ratios of medians, speed of memory in the median and in the best run."""
    peer = next((other.median for other in rows if other.method == PEER), None)
    return (
        row.method,
        f"{row.median:.1f}",
        f"{row.quartile1:.1f} - {row.quartile3:.1f}",
        f"{row.best:.1f}",
        "" if peer is None else f"{peer / row.median:.2f}x",
        f"{100 * row.floor / row.median:.0f} % / {100 * row.floor / row.best:.0f} %",
        f"{row.saved:.2f}",
        f"{row.peak:.2f}",
    )


def save(folder: Path, what: str, rows: list[Measurement], where: dict[str, str]) -> None:
    """CSV with everything, a table in Markdown and a chart."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{what}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Measurement)), *where])
        writer.writeheader()
        writer.writerows(asdict(row) | where for row in rows)
    lines = [f"Processor {where['processor']}, {where['threads']} threads, torch {where['torch']}, "
             f"SpikingJelly {where['spikingjelly']}, commit {where['commit'][:12]}.", ""]  # fmt: skip
    for allocator, shape in dict.fromkeys((row.allocator, row.shape) for row in rows):
        of_race = [row for row in rows if (row.allocator, row.shape) == (allocator, shape)]
        lines += [f"[{shape.replace('x', ', ')}], {allocator}; floor {of_race[0].floor:.1f} ms", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        lines += ["| " + " | ".join(cells(row, of_race)) + " |" for row in of_race]
        lines.append("")
    (folder / f"{what}.md").write_text("\n".join(lines), encoding="utf-8")
    plot_benchmark(rows, folder / f"{what}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
