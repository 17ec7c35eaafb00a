"""From saved numbers to figures."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lab.figures.data import InputGains, OneNeuron, TrainingCurves
from lab.figures.drawings import draw_curves, draw_gains, draw_neuron
from lab.figures.intensity_drawings import draw_heat_maps, draw_intensity
from lab.figures.style import print_style, save
from sj_robust.core.saved import SavedResult, saved_format
from sj_robust.perturbation.intensity import IntensityCorrelation

_DRAWINGS: Mapping[type[SavedResult], Mapping[str, Callable[[Any], Figure]]] = {
    OneNeuron: {"": draw_neuron},
    InputGains: {"": draw_gains},
    TrainingCurves: {"": draw_curves},
    IntensityCorrelation: {"": draw_intensity, "_heat_maps": draw_heat_maps},
}
"""What draws the figures of each kind of numbers, by what they add to the name of the file with the
numbers.
"""


def load_figure(path: Path) -> SavedResult:
    """The numbers that the ``save`` of a figure's data wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else, is damaged or of another version.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "gains.json"
        >>> InputGains({"mine": {"0": [1.0, 0.5]}}).save(path)
        >>> load_figure(path)
        InputGains(networks={'mine': {'0': [1.0, 0.5]}})
    """
    kinds = {kind.saved_as: kind for kind in _DRAWINGS}
    found = saved_format(path.read_text(encoding="utf-8", errors="replace"))
    return kinds.get(found or "", OneNeuron).load(path)


def draw(data: SavedResult) -> dict[str, Figure]:
    """The figures that numbers are for, by what they add to the name of the file with the numbers.

    Examples:
        >>> list(draw(InputGains({"mine": {"0": [1.0, 0.5]}})))
        ['']
    """
    with print_style():
        return {end: make(data) for end, make in _DRAWINGS[type(data)].items()}


def redraw(path: Path) -> tuple[Path, ...]:
    """Draw a file of numbers beside it, as PDF and PNG; raises as :func:`load_figure`."""
    data = load_figure(path)
    files: list[Path] = []
    for end, figure in draw(data).items():
        files += save(figure, path.parent, path.stem + end)
    return tuple(files)
