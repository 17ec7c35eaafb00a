"""Representations of results: one line, a table in a notebook, a heat map."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from itertools import groupby
from math import ceil, nan
from pathlib import Path
from typing import TYPE_CHECKING

from sj_robust.core.saved import markdown_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "COLOURS",
    "GREY",
    "ORANGE",
    "Shown",
    "coded",
    "common_scale",
    "heat_map",
    "new_figure",
    "png",
    "print_style",
    "shown_html",
    "without_formulas",
    "write_figure",
]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000", "#56b4e9")
"""Colours of Okabe and Ito (2008) that all kinds of colour vision tell apart; markers and dashes
differ as well.
"""
BLUE, ORANGE, GREY = (*COLOURS[:2], "#767676")

_SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # letters stay text
}


class Shown:
    r"""Base of a result: a sentence where it is printed, a table where a notebook shows it.
    可直接显示的结果。

    Examples:
        >>> class Half(Shown):
        ...     verdict = "half of 2 images"
        ...
        ...     def table(self):
        ...         return "| image | right |\n| --- | ---: |\n| 0 | yes |\n\nOne is left out."
        >>> Half()
        <Half: half of 2 images>
        >>> Half()._repr_html_()
        '<table><tr><th>image</th><th>right</th></tr><tr><td>0</td><td>yes</td></tr></table><p>One
        is left out.</p>'
    """

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        raise NotImplementedError

    def table(self) -> str:
        """The whole result as Markdown."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.verdict}>"

    def _repr_html_(self) -> str:
        """The table, where a notebook shows the result."""
        return shown_html(self.table())


def shown_html(markdown: str) -> str:
    """Tables and lines of Markdown as HTML. Markdown 转 HTML。"""
    found = []
    lines_of_text = filter(None, markdown.splitlines())
    for is_table, lines in groupby(lines_of_text, key=lambda line: line.startswith("| ")):
        if not is_table:
            found += [f"<p>{coded(line)}</p>" for line in lines]
            continue
        head, _, *rows = lines
        table = [_row_of_html(head, "th")]
        table += [_row_of_html(row, "td") for row in rows]
        found.append(f"<table>{''.join(table)}</table>")
    return "".join(found)


def _row_of_html(line: str, tag: str) -> str:
    """A row of a Markdown table, every cell in a tag."""
    cells = [f"<{tag}>{coded(cell)}</{tag}>" for cell in markdown_cells(line)]
    return f"<tr>{''.join(cells)}</tr>"


def coded(text: str) -> str:
    """HTML of a text, with text in backticks as code. 反引号内的文字转为代码。"""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def without_formulas(text: str) -> str:
    r"""A text of a user as figures show it, in which dollars make no formulas.
    图中不按公式解析的文字。

    Examples:
        >>> print(without_formulas("a$b"))
        a\$b
    """
    return text.replace("$", r"\$")


@contextmanager
def print_style() -> Iterator[None]:
    """Context or decorator in which figures are made and written in print style.
    印刷风格。
    """
    from matplotlib import rc_context

    with rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, which a notebook shows. 新建图。"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    # IPython learns how to show figures from pyplot once that has drawn one itself, which nothing
    # here does
    figure._repr_png_ = partial(png, figure)  # type: ignore[attr-defined]
    return figure


def png(figure: "Figure") -> bytes:
    """A figure as a notebook shows it. 笔记本中的图。"""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def write_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure so that the same one gives the same file; its ending decides the format.
    保存图。
    """
    metadata = {"CreationDate": None} if Path(path).suffix == ".pdf" else None
    with print_style():
        figure.savefig(path, dpi=200, metadata=metadata)
    figure.set_layout_engine("none")  # placed once: the next format finds it as it is


def common_scale(values: Iterable[float]) -> "Normalize":
    """A logarithmic scale of colours over all values > 0. 公共颜色尺度。"""
    from matplotlib.colors import LogNorm, Normalize

    positive = [value for value in values if value > 0]
    if positive and min(positive) < max(positive):
        return LogNorm(min(positive), max(positive))
    return Normalize(0, 1)


def heat_map(axes: "Axes", layers: Mapping[str, Sequence[float]], scale: "Normalize") -> "QuadMesh":
    """A row per layer, from top to bottom, and a column per time step; one that is empty without
    layers. 层与时间步的热图。
    """
    layers = layers or {"no spiking layer": [nan]}
    steps = max(map(len, layers.values()))
    grid = []
    for values in layers.values():
        missing = [nan] * (steps - len(values))
        grid.append([*values, *missing])
    mesh = axes.pcolormesh(grid, norm=scale, cmap="cividis", edgecolors="face", linewidth=0.1)
    axes.grid(visible=False)
    middles_of_rows = [row + 0.5 for row in range(len(grid))]
    axes.set_yticks(middles_of_rows, list(layers), fontsize=7)
    shown = range(0, steps, ceil(steps / 8))
    middles_of_steps = [step + 0.5 for step in shown]
    axes.set_xticks(middles_of_steps, list(map(str, shown)), fontsize=7)
    axes.set_ylim(len(grid), 0)
    return mesh
