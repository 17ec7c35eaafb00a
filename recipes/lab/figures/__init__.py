"""The figures of the paper from one's own networks: numbers first, as a file, then the drawing.

Needs matplotlib (extra ``recipes``).
"""

from lab.figures.data import (
    InputGains,
    OneNeuron,
    TrainingCurves,
    input_gains,
    one_neuron,
    training_curves,
)
from lab.figures.draw import draw, redraw
from lab.figures.saved import FigureData, load_figure, save_figure

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
