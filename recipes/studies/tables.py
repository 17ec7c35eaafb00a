"""CSV files of the studies, with which a stopped one goes on, and the tables of their pages."""

import csv
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sj_robust.core.saved import csv_text, write_whole
from sj_robust.core.shown import new_figure
from sj_robust.data import image_loader, load_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"

Row = dict[str, str]


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV file, all text; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """All rows, of which there is one or more, in the order of the first one's columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, csv_text(list(rows[0]), rows))


def replace_rows(path: Path, key: Row, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, which get the columns of a key, in the place of those that have its texts."""
    others = [row for row in read_table(path) if not key.items() <= row.items()]
    write_table([*others, *(key | dict(row) for row in rows)], path)


def merged(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> list[Row]:
    """Write rows into a table, in the place of those with equal texts in some columns."""
    found = {tuple(row[name] for name in columns): row for row in [*read_table(path), *rows]}
    if found:
        write_table(list(found.values()), path)
    return list(found.values())


def once(
    path: Path,
    grid: Iterable[Mapping[str, Any]],
    measured: Callable[..., Mapping[str, Any] | Iterable[Mapping[str, Any]]],
) -> list[Row]:
    """The rows of a CSV file. What it lacks of the grid is measured first and written at once:
    ``measured`` takes the columns of the grid as keywords, and gives the others of its rows.
    """
    rows = read_table(path)
    for key in grid:
        texts = {name: str(value) for name, value in key.items()}
        if any(texts.items() <= row.items() for row in rows):
            continue
        found = measured(**key)
        for other in [found] if isinstance(found, Mapping) else found:
            rows.append(texts | {name: str(value) for name, value in other.items()})
            print(", ".join(rows[-1].values()), flush=True)
        write_table(rows, path)
    return rows


@dataclass(frozen=True)
class Options:
    """Options of a study that reads the CSV files of the pages alone."""

    output: Path = RESULTS


def groups(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows with equal texts in some columns together, in the order of the first of each."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in columns), []).append(row)
    return found


def numbers(rows: Iterable[Row], column: str) -> list[float]:
    """The numbers of a column; an empty text is none."""
    return [float(row[column]) for row in rows if row[column]]


def each(rows: Iterable[Row], column: str, form: str = ".1f") -> str:
    """All numbers of a column in one cell."""
    return " / ".join(format(value, form) for value in numbers(rows, column))


def with_spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation of several."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}" if values else ""


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A page with every table between its marks."""
    for name, table in tables.items():
        begins, ends = f"<!-- {name}: begins -->\n", f"\n<!-- {name}: ends -->"
        if begins not in text:
            raise ValueError(f"no place for the table {name!r}: the page has no line {begins!r}")
        before, rest = text.split(begins)
        text = f"{before}{begins}{table}{ends}{rest.split(ends)[1]}"
    return text


def write_page(page: Path, tables: Mapping[str, str]) -> None:
    """Write the tables into their page; without a page, print them."""
    if not page.exists():
        print("\n\n".join(tables.values()))
        return
    write_whole(page, with_tables(page.read_text(encoding="utf-8"), tables))


def panels(count: int, height: float) -> tuple["Figure", list["Axes"]]:
    """A figure with panels side by side."""
    figure = new_figure(3.4 * count, height)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def first_images(dataset: str, count: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The first test images of a data set, and their labels."""
    test = load_images(dataset, test_limit=count, **options).test
    x, y = next(iter(image_loader(test, count)))
    return x, y


def run_recipe(name: str, words: Iterable[str], output: Path) -> None:
    """Run a recipe, or go on with it, unless its report is there."""
    if (output / "report.json").exists():
        return
    command = [sys.executable, str(ROOT / "recipes" / name), *words, "--output", str(output)]
    if output.exists():
        command.append("--resume")
    subprocess.run(command, cwd=ROOT, check=True)
