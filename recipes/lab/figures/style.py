"""How the figures look in print: column widths, type, colours that everybody tells apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SINGLE, DOUBLE = 3.25, 6.75
"""Widths in inches of one column and of both."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000", "#56b4e9")
"""Colours of Okabe and Ito (2008) that all kinds of colour vision tell apart; markers and dashes differ as well."""

GREY = "#767676"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

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


@contextmanager
def print_style() -> Iterator[None]:
    """Within it figures are made, and written, for print."""
    with rc_context(_SETTINGS):
        yield


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure as PDF and as PNG, the same files for the same figure."""
    pdf, png = folder / f"{name}.pdf", folder / f"{name}.png"
    with print_style():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # both files keep the places that were found just now
        figure.savefig(pdf, metadata={"CreationDate": None})  # without a date
        figure.savefig(png, dpi=300)
    return pdf, png


def letter(axes: Axes, text: str) -> None:
    """Name a panel above its upper left corner."""
    axes.set_title(text, loc="left")
