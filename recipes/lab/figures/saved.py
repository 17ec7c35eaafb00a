"""Numbers of a figure, read from the file that they were saved to."""

from pathlib import Path

from lab.figures.data import InputGains, OneNeuron, TrainingCurves
from lab.figures.ground_truth import GroundTruth
from sj_robust._saved import saved_format
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
    found = saved_format(path.read_text(encoding="utf-8", errors="replace"))
    return _KINDS.get(found or "", OneNeuron).load(path)
