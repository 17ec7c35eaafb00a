"""From saved numbers to figures."""

from pathlib import Path
from typing import TYPE_CHECKING

from lab.figures.data import InputGains, OneNeuron, TrainingCurves
from lab.figures.ground_truth import GroundTruth
from lab.figures.saved import FigureData, load_figure
from sj_robust.perturbation.intensity import IntensityCorrelation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(data: FigureData) -> dict[str, "Figure"]:
    """The figures that numbers are for, by what they add to the name of the file with the numbers.

    Examples:
        >>> list(draw(InputGains({"mine": {"0": [1.0, 0.5]}})))
        ['']
    """
    from lab.figures.drawings import draw_curves, draw_gains, draw_ground_truth, draw_neuron  # these import matplotlib
    from lab.figures.intensity_drawings import draw_heat_maps, draw_intensity
    from lab.figures.style import print_style

    with print_style():
        match data:
            case OneNeuron():
                return {"": draw_neuron(data)}
            case InputGains():
                return {"": draw_gains(data)}
            case TrainingCurves():
                return {"": draw_curves(data)}
            case GroundTruth():
                return {"": draw_ground_truth(data)}
            case IntensityCorrelation():
                return {"": draw_intensity(data), "_heat_maps": draw_heat_maps(data)}


def redraw(path: Path) -> tuple[Path, ...]:
    """Draw a file of numbers beside it, as PDF and PNG; raises as ``load_figure``."""
    from lab.figures.style import save  # imports matplotlib

    figures = draw(load_figure(path))
    return tuple(file for end, figure in figures.items() for file in save(figure, path.parent, path.stem + end))
