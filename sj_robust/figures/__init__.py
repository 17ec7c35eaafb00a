"""The figures of the paper from one's own networks: numbers first, as a file, then the drawing.

Needs matplotlib (extra ``recipes``).
"""

from sj_robust.figures.data import (
    InputGains,
    OneNeuron,
    TrainingCurves,
    input_gains,
    one_neuron,
    training_curves,
)
from sj_robust.figures.draw import draw, redraw
from sj_robust.figures.saved import FigureData, load_figure, save_figure

__all__ = [
    "FigureData",
    "InputGains",
    "OneNeuron",
    "TrainingCurves",
    "draw",
    "input_gains",
    "load_figure",
    "one_neuron",
    "redraw",
    "save_figure",
    "training_curves",
]
