"""How the figures look in print: column widths, markers and dashes; type and colours are those of
the package.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sj_robust.core.shown import COLOURS, GREY, print_style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DOUBLE",
    "GREY",
    "LINES",
    "MARKERS",
    "SINGLE",
    "legend",
    "letter",
    "print_style",
    "save",
]

SINGLE, DOUBLE = 3.25, 6.75
"""Widths in inches of one column and of both."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def save(figure: "Figure", folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure as PDF and as PNG, the same files for the same figure."""
    pdf, png = folder / f"{name}.pdf", folder / f"{name}.png"
    write_figure(figure, pdf)
    write_figure(figure, png)
    return pdf, png


def letter(axes: "Axes", text: str) -> None:
    """Name a panel above its upper left corner."""
    axes.set_title(text, loc="left")


def legend(figure: "Figure", panels: "Iterable[Axes]", **look: Any) -> None:
    """Every label once outside the panels, whichever of them has its line; nothing where there are
    none.
    """
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if any(found):
        figure.legend(list(found.values()), list(found), **{"ncols": len(found)} | look)
