"""Numbers of a figure, read from the file that they were saved to."""

from pathlib import Path

from lab.figures.data import InputGains, OneNeuron, TrainingCurves
from lab.figures.ground_truth import GroundTruth
from sj_robust._saved import load_saved, saved_format
from sj_robust.perturbation.intensity import IntensityCorrelation

FigureData = OneNeuron | InputGains | TrainingCurves | IntensityCorrelation | GroundTruth
"""Numbers of one kind of figure."""

_KINDS: dict[str, type[FigureData]] = {
    kind.saved_as: kind for kind in (OneNeuron, InputGains, TrainingCurves, IntensityCorrelation, GroundTruth)
}


def load_figure(path: Path) -> FigureData:
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
    return load_saved(path, lambda text: _KINDS.get(saved_format(text) or "", OneNeuron).from_json(text))
