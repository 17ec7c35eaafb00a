"""Drawings of one neuron, input gains and training curves."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from lab.figures.data import InputGains, OneNeuron, TrainingCurves
from lab.figures.ground_truth import GroundTruth
from lab.figures.style import COLOURS, DOUBLE, GREY, LINES, MARKERS, SINGLE, legend, letter

_BLUE, _ORANGE, _GREEN, _PINK, _AMBER, _BLACK = COLOURS[:6]
_MOST_LINES = len(COLOURS)


def draw_neuron(data: OneNeuron) -> Figure:
    """Potentials above, what tells them apart below; constant perturbation on the left, Gaussian on
    the right.
    """
    figure = Figure(figsize=(DOUBLE, 4.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    titles = {
        "constant": (
            "(a) current {current:g}, perturbed by {shift:+g}",
            "(b) the two runs of (a) compared",
        ),
        "gaussian": (
            "(c) current {current:g}, perturbed by noise of std {std:g}",
            "(d) the two runs of (c) compared",
        ),
    }
    for column, (name, case) in enumerate(data.cases.items()):
        upper, lower = panels[:, column]
        _potentials(upper, case, data.settings["v_threshold"])
        _distances(lower, case)
        for axes, title in zip((upper, lower), titles[name], strict=True):
            letter(axes, title.format(**data.settings))
        lower.set_xlabel("time step")
    panels[0, 0].set_ylabel("membrane potential")
    panels[1, 0].set_ylabel("perturbation, distance")
    legend(figure, panels[:, 0], loc="outside upper center", columnspacing=1.2, handlelength=2.2)
    return figure


def _potentials(axes: Axes, case: dict[str, list[float]], v_threshold: float) -> None:
    """Potentials after the reset, and a mark above the threshold for every spike."""
    axes.axhline(v_threshold, color=GREY, linewidth=0.8, linestyle=":", label="threshold")
    looks = (("", "clean", _BLUE, "-", 0), ("_perturbed", "perturbed", _ORANGE, "--", 1))
    for end, label, colour, line, place in looks:
        axes.plot(case[f"v{end}"], line, color=colour, label=label)
        fired = [step for step, spike in enumerate(case[f"spike{end}"]) if spike]
        height = v_threshold * (1.1 + 0.13 * place)
        axes.plot(
            fired, [height] * len(fired), "|", color=colour, markersize=6, markeredgewidth=1.4
        )


def _distances(axes: Axes, case: dict[str, list[float]]) -> None:
    series = (
        ("full", "with reset", _BLACK, "-", "o"),
        ("simplified", "without reset (MPPD)", _GREEN, "--", "s"),
        ("std", "STD", _AMBER, "-.", "^"),
        ("tasad", "TASAD", _PINK, (0, (4, 1, 1, 1)), "D"),
    )
    axes.axhline(0, color=GREY, linewidth=0.6)
    for offset, (name, label, colour, line, marker) in enumerate(series):
        look: dict[str, Any] = {
            "color": colour,
            "linestyle": line,
            "marker": marker,
            "markevery": (offset, 5),
            "markersize": 3,
        }
        axes.plot(case[name], label=label, **look)


def draw_ground_truth(data: GroundTruth) -> Figure:
    """A panel per radius: what each attack leaves, from the strongest down, and the exact robust
    accuracy as a line.
    """
    count = len(data.truths)
    rows = max(sum(attack.eps == truth.eps for attack in data.attacks) for truth in data.truths)
    figure = Figure(figsize=(DOUBLE, 0.8 + 0.11 * rows), layout="constrained")
    for axes, truth in zip(figure.subplots(1, count, squeeze=False).flat, data.truths, strict=True):
        attacks = sorted(
            (a for a in data.attacks if a.eps == truth.eps),
            key=lambda a: (a.left, a.suite, a.attack),
        )
        share = [100 * attack.left / data.images for attack in attacks]
        sums = [attack.attack in ("worst case", "control", "everything") for attack in attacks]
        axes.barh(
            range(len(share)),
            share,
            color=[_ORANGE if whole else _BLUE for whole in sums],
            height=0.7,
        )
        low, high = (
            100 * images / data.images for images in (truth.verified, data.images - truth.broken)
        )
        axes.axvspan(low, high, color=_BLACK, alpha=0.15, linewidth=0)
        axes.axvline(high, color=_BLACK, linewidth=1.0)
        axes.set_yticks(
            range(len(share)),
            [f"{attack.suite}: {attack.attack}" for attack in attacks],
            fontsize=5,
        )
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(max(0.0, low - 10), min(100.0, max(share) + 3))
        axes.set_xlabel(f"accuracy at Linf {truth.eps:g}, %; line: exact")
    return figure


def draw_gains(data: InputGains) -> Figure:
    """A panel per network: a line per layer, or a map if there are more layers than lines can be
    told apart.
    """
    count, most = len(data.networks), max(map(len, data.networks.values()))
    tall = 2.3 if most <= _MOST_LINES else 0.9 + 0.16 * most  # a map needs a row per layer
    figure = Figure(
        figsize=(SINGLE if count == 1 else DOUBLE, tall * math.ceil(count / 2)),
        layout="constrained",
    )
    panels = figure.subplots(math.ceil(count / 2), min(count, 2), squeeze=False)
    for axes, (name, layers) in zip(panels.flat, data.networks.items(), strict=False):
        steps = max(map(len, layers.values()))
        if len(layers) <= _MOST_LINES:
            axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
            for (layer, gains), colour, line, marker in zip(
                layers.items(), COLOURS, LINES, MARKERS, strict=False
            ):
                axes.plot(
                    range(len(gains)),
                    gains,
                    color=colour,
                    linestyle=line,
                    marker=marker,
                    label=_short(layer),
                )
            axes.set_ylabel("input gain p[t]")
            axes.legend(
                title="layer",
                title_fontsize=7,
                loc="center left",
                bbox_to_anchor=(1, 0.5),
                borderpad=0,
            )
            axes.margins(y=0.15)
        else:
            _map_of_gains(figure, axes, layers, steps)
        axes.set_xticks(range(steps))
        axes.set_xlabel("time step")
        letter(axes, name)
    for axes in panels.flat[count:]:
        axes.set_axis_off()
    return figure


def _map_of_gains(figure: Figure, axes: Axes, layers: dict[str, list[float]], steps: int) -> None:
    grid = [[*gains, *[math.nan] * (steps - len(gains))] for gains in layers.values()]
    values = [value for gains in layers.values() for value in gains]
    # White is the gain that a neuron starts with.
    farthest = max(0.01, *(abs(value - 1) for value in values))
    scale = Normalize(1 - farthest, 1 + farthest)
    image = axes.imshow(grid, aspect="auto", cmap="PuOr_r", norm=scale)
    axes.set_yticks(range(len(layers)), [_short(layer) for layer in layers])
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="input gain p[t]")


def draw_curves(data: TrainingCurves) -> Figure:
    """Validation accuracy on the left, MS-MPPD in training on the right; one colour per network."""
    figure = Figure(figsize=(DOUBLE, 2.7), layout="constrained")
    accuracy, perturbation = figure.subplots(1, 2)
    attacks: dict[str, Any] = {}
    looks = list(zip(COLOURS, MARKERS, strict=True))
    for index, (name, records) in enumerate(data.networks.items()):
        colour, marker = looks[index % len(looks)]
        epochs = [record["epoch"] for record in records]
        every = max(1, len(epochs) // 6)
        for attack in records[0]["validation"]:
            line = LINES[
                list(attacks).index(attack) if attack in attacks else len(attacks) % len(LINES)
            ]
            attacks[attack] = line
            values = [100 * record["validation"][attack] for record in records]
            marks: dict[str, Any] = {"marker": marker, "markevery": (index, every), "markersize": 3}
            accuracy.plot(epochs, values, color=colour, linestyle=line, **marks)
        shown = [record for record in records if record["losses"].get("mppd", 0.0) > 0]
        penalties = [record["losses"]["mppd"] for record in shown]
        label = name if shown else f"{name} (not in its loss)"
        perturbation.plot(
            [record["epoch"] for record in shown],
            penalties,
            color=colour,
            marker=marker,
            label=label,
        )
    letter(accuracy, "(a) validation accuracy, %")
    letter(perturbation, "(b) MS-MPPD in training")
    accuracy.set_ylim(0, 102)
    perturbation.set_yscale("log")
    perturbation.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    perturbation.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    perturbation.yaxis.set_minor_formatter(NullFormatter())
    for axes in (accuracy, perturbation):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for attack, line in attacks.items():
        accuracy.plot([], [], color=GREY, linestyle=line, label=attack)
    accuracy.legend(loc="lower right", ncols=len(attacks))
    if not any(
        record["losses"].get("mppd") for records in data.networks.values() for record in records
    ):
        perturbation.set_yticks([])
    perturbation.legend(loc="upper right")
    return figure


def _short(layer: str) -> str:
    """The name without what the classifier puts before every layer."""
    return layer.removeprefix("net.")
