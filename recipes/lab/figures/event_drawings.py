"""Drawings of event frames: a strip, and an animation."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw

from lab.figures.events import EventPictures, Values
from lab.figures.style import COLOURS, DOUBLE, GREY

_BLUE, _ORANGE, _GREEN = COLOURS[:3]
_BLACK = COLOURS[5]
_FRAMES = 8
"""Frames that a strip shows at most, evenly chosen."""

_WIDTH = 306
"""Width of a frame of the animation, or three times its pixels."""

_HEAD = 24
"""Height of the line above it."""

_LETTERS = 13
"""Size of its letters."""

_FAINTEST = 0.3
"""Strength of the colour of few events among many; 1 is that of the most."""

_MILLISECONDS = 700
"""How long the animation shows a frame."""


def draw_events(data: EventPictures) -> Figure:
    """A column per frame: clean, with a square where a single change or move breaks the sample, and
    attacked, with what changed.
    """
    T = data.shape[0]
    shown = np.unique(np.linspace(0, T - 1, min(T, _FRAMES)).round().astype(int))
    wide = DOUBLE / max(4, len(shown))
    tall = wide * data.shape[2] / data.shape[3]
    figure = Figure(figsize=(wide * len(shown), 2 * tall + 0.9), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False)
    clean, attacked = (_frames(part, data.shape) for part in (data.clean, data.attacked))
    breaking = _frames(data.breaking, data.shape)
    most = max(1.0, float(clean.max()), float(attacked.max()))
    for column, t in enumerate(shown):
        above, below = panels[:, column]
        above.imshow(_coloured(clean[t], most), interpolation="nearest")
        above.set_title(f"frame {t + 1}", loc="center")
        _mark(above, breaking[t], "s", _BLACK, "breaks it alone")
        below.imshow(_coloured(attacked[t], most), interpolation="nearest")
        _mark(below, clean[t] - attacked[t], "x", _BLACK, "gone")
        _mark(below, attacked[t] - clean[t], "o", _GREEN, "new")
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
    panels[0, 0].set_ylabel(f"clean: seen as {data.seen[0]}")
    panels[1, 0].set_ylabel(f"attacked: seen as {data.seen[1]}")
    handles = [*below.get_legend_handles_labels()[0], *_patches()]
    handles += above.get_legend_handles_labels()[0] if data.breaking else []
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    figure.suptitle(f"{data.network}, {data.threat}", fontsize=8)
    return figure


def _patches() -> list[Patch]:
    """What the colours of events mean."""
    names = {"darker": _ORANGE, "brighter": _BLUE, "both": GREY}
    return [Patch(color=colour, label=name) for name, colour in names.items()]


def animate_events(data: EventPictures, path: Path) -> None:
    """Clean frames on the left, attacked ones on the right, frame by frame; events that are gone
    and new ones have colours of their own.
    """
    clean, attacked = (_frames(part, data.shape) for part in (data.clean, data.attacked))
    most = max(1.0, float(clean.max()), float(attacked.max()))
    pixel = max(3, _WIDTH // data.shape[3])
    pictures = []
    for t, (before, after) in enumerate(zip(clean, attacked, strict=True), 1):
        left = _coloured(before, most)
        right = _coloured(after, most)
        right[(before > after).any(0)] = _rgb(_BLACK)
        right[(after > before).any(0)] = _rgb(_GREEN)
        gap = np.full((left.shape[0], 2, 3), _rgb(GREY))
        both = np.concatenate([left, gap, right], 1)
        large = both.repeat(pixel, 0).repeat(pixel, 1)
        drawn = Image.fromarray((255 * large).round().astype(np.uint8))
        picture = Image.new("RGB", (drawn.width, drawn.height + _HEAD), "white")
        picture.paste(drawn, (0, _HEAD))
        pen = ImageDraw.Draw(picture)
        told = {
            0: f"clean: seen as {data.seen[0]}",
            left.shape[1] + 2: f"attacked: seen as {data.seen[1]}; frame {t} of {len(clean)}",
        }
        for column, text in told.items():
            pen.text((pixel * column + 6, 5), text, fill="black", font_size=_LETTERS)
        pictures.append(picture.quantize(32))
    first, *others = pictures
    first.save(path, save_all=True, append_images=others, duration=_MILLISECONDS, loop=0)


def _frames(values: Values, shape: list[int]) -> Any:
    """The inverse of :func:`_values`."""
    found = np.zeros(shape)
    for *place, value in values:
        found[tuple(int(number) for number in place)] = value
    return found


def _coloured(frame: Any, most: float) -> Any:
    """A frame [polarities, H, W] in colours [H, W, 3]: falls orange, rises blue, both grey; few
    events of many are paler.
    """
    number = frame.max(0)
    found = np.ones((*number.shape, 3))
    found[frame[0] > 0] = _rgb(_ORANGE)
    if len(frame) > 1:
        found[frame[1] > 0] = _rgb(_BLUE)
        found[(frame > 0).all(0)] = _rgb(GREY)
    share = _FAINTEST + (1 - _FAINTEST) * number / most
    return 1 - (1 - found) * share[..., None]


def _rgb(colour: str) -> Any:
    """A colour ``#rrggbb`` as three numbers in [0, 1]."""
    return np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])


def _mark(axes: Axes, where: Any, marker: str, colour: str, label: str) -> None:
    """A mark around every place at which a frame [polarities, H, W] is above 0, with the number if
    it is above 1.
    """
    rows, columns = (where > 0).any(0).nonzero()
    for row, column in zip(rows, columns, strict=True):
        number = int(where[:, row, column].clip(min=0).sum())
        if number > 1:
            place = (column, row)
            axes.annotate(f"{number}", place, (3, 3), textcoords="offset points", fontsize=6)
    axes.plot(
        columns,
        rows,
        marker,
        color=colour,
        markerfacecolor="none",
        markersize=4,
        markeredgewidth=0.9,
        linestyle="none",
        label=label,
    )
