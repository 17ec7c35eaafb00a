"""The course of the first hour on a GPU: tests, measurements, and tables as they come."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lab.benchmarking.gpu_plan import Part
from lab.benchmarking.gpu_run import Store, load, measure_part, run_tests
from lab.benchmarking.gpu_tables import markdown, plot


def test_and_measure(
    store: Store,
    plan: Mapping[str, Part],
    tests: Path | None,
    device: str,
    rounds: int,
    command: str,
    say: Callable[[str], None],
) -> None:
    """Run the tests of a folder, if any, then every part of the plan.

    Tables are written after each row and charts after each part, beside the file of the store; what
    is measured is worth more than they are, so that nothing which goes wrong with them stops the
    run.
    """
    page = store.path.with_suffix(".md")

    def shown(what: str, show: Callable[[], object]) -> None:
        try:
            show()
        except Exception as error:  # such as a package for charts that is not installed
            say(f"no {what}: {error}")

    def written() -> None:
        page.write_text(markdown(store, plan, command), encoding="utf-8")

    if tests is not None:
        for row in run_tests(tests, store, began=say):
            say(f"{row.method}: {row.outcome} {row.reason}")
            shown("table", written)
    for name, part in plan.items():
        for row in measure_part(name, part, store, device=device, rounds=rounds):
            say(
                f"{name}, {row.method}, {row.precision} {row.shape}: "
                f"{row.reason or f'{row.median:.3g} ms'}"
            )
            shown("table", written)
        shown("chart", lambda: plot(store, plan, store.path.with_suffix(".png")))
    shown("table", written)
    shown("table", lambda: say(page.read_text(encoding="utf-8")))


def redraw_gpus(folder: Path, plan: Mapping[str, Part], say: Callable[[str], None]) -> list[Path]:
    """Charts again, from what earlier calls left in a folder; the files they are of."""
    paths = [
        path for path in sorted(folder.glob("gpu-*.jsonl")) if not path.stem.endswith(".earlier")
    ]
    for path in paths:
        plot(load(path), plan, path.with_suffix(".png"))
        say(f"{path} drawn as {path.stem}.png")
    return paths
