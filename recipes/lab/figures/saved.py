"""Numbers of a figure as a file that loads back equal."""

import json
from dataclasses import asdict
from pathlib import Path

from lab.figures.data import InputGains, OneNeuron, TrainingCurves
from sj_robust._saved import known_fields, load_saved, saved_content, saved_format, write_whole
from sj_robust.perturbation.intensity import FORMAT as INTENSITY_FORMAT
from sj_robust.perturbation.intensity import IntensityCorrelation

FigureData = OneNeuron | InputGains | TrainingCurves | IntensityCorrelation
"""Numbers of one kind of figure."""

_FORMAT = "sj_robust.figure"
_VERSION = 1
_KINDS: dict[str, type[OneNeuron | InputGains | TrainingCurves]] = {
    "neuron": OneNeuron,
    "gains": InputGains,
    "curves": TrainingCurves,
}


def save_figure(data: FigureData, path: Path) -> None:
    """Write the numbers of a figure as JSON; the file is whole or not there.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "gains.json"
        >>> save_figure(InputGains({"mine": {"0": [1.0, 0.5]}}), path)
        >>> load_figure(path)
        InputGains(networks={'mine': {'0': [1.0, 0.5]}})
    """
    if isinstance(data, IntensityCorrelation):
        text = data.to_json()
    else:
        kind = next(name for name, cls in _KINDS.items() if isinstance(data, cls))
        head = {"format": _FORMAT, "version": _VERSION, "kind": kind}
        text = json.dumps(head | asdict(data), indent=1, allow_nan=False)
    write_whole(path, text + "\n")


def load_figure(path: Path) -> FigureData:
    """The numbers that :func:`save_figure` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else, is damaged or of another version.
    """
    return load_saved(path, _parsed)


def _parsed(text: str) -> FigureData:
    """The numbers in a text; an intensity study has a format of its own."""
    if saved_format(text) == INTENSITY_FORMAT:
        return IntensityCorrelation.from_json(text)
    content = saved_content(text, what="the numbers of a figure", format=_FORMAT, version=_VERSION)
    kind = content.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}; update sj_robust")
    with known_fields("the figure"):
        return _KINDS[kind](**content)
