"""Drawing of joint bounds."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures.joint import JointBounds
from lab.figures.style import COLOURS, DOUBLE, GREY, LINES, MARKERS, legend, letter

__all__ = ["draw_joint"]

_BLUE, _ORANGE, _GREEN, _PINK = COLOURS[:4]


def draw_joint(data: JointBounds) -> Figure:
    """Trains over the current, bounds of the count, and what every part proves."""
    figure = Figure(figsize=(DOUBLE, 2.5), layout="constrained")
    trains, counts, proved = figure.subplots(1, 3)
    _trains(trains, data)
    _counts(counts, data)
    _proved(proved, data)
    legend(figure, [counts, proved], loc="outside lower center", ncols=6, handlelength=2.0)
    return figure


def _trains(axes: Axes, data: JointBounds) -> None:
    """A row per time step, filled where the current makes the neuron fire."""
    for piece in data.trains:
        low, high = piece["current"]
        for t, spike in enumerate(piece["spikes"]):
            if spike:
                axes.fill_between([low, high], t + 0.6, t + 1.4, color=_BLUE, linewidth=0)
        axes.axvline(low, color=GREY, linewidth=0.4)
    axes.set_xlim(0.8, 2.2)
    axes.set_xlabel("current, the same in every step")
    axes.set_ylabel("time step")
    letter(axes, "(a) trains of a LIF neuron")


def _counts(axes: Axes, data: JointBounds) -> None:
    """Bounds of the count around a current."""
    looks = (("intervals", _ORANGE, LINES[1]), ("chain", _BLUE, LINES[0]))
    for name, colour, line in looks:
        for end in ("least", "most"):
            label = f"count by {name}" if end == "least" else None
            values = data.counts[f"{name} {end}"]
            axes.plot(data.counts["radius"], values, line, color=colour, label=label)
    axes.set_xlabel("radius around 1.6")
    axes.set_ylabel("number of spikes")
    letter(axes, "(b) bounds of its count")


def _proved(axes: Axes, data: JointBounds) -> None:
    """Share of proved images of the first network over eps."""
    network, shares_of = next(iter(data.proved.items()))
    parts = [part for part in shares_of if part != "eps"]
    colours = (_ORANGE, _PINK, _GREEN, _BLUE)
    for part, colour, marker in zip(parts, colours, MARKERS[:4], strict=True):
        axes.plot(
            shares_of["eps"],
            shares_of[part],
            marker=marker,
            markersize=3,
            color=colour,
            label=part,
        )
    axes.set_ylim(0, 100)
    axes.set_xlabel("eps")
    axes.set_ylabel("proved, %")
    letter(axes, f"(c) {network}")
