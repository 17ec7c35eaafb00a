"""Bounds on the membrane potential perturbation of every layer, compared with measurements."""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sj_robust.core.saved import SavedResult, markdown_table
from sj_robust.core.shown import Shown, new_figure, print_style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bound", "Certificate", "LayerCertificate"]


SCOPE = (
    "Bounds are on eps, the perturbation without reset, of one layer, given the spike difference "
    "Ds that did reach it. The true potential difference has no finite gain, since a spike next "
    "to the threshold appears or vanishes at once; for the same reason bounds of layers do not "
    "compose to one of the network, and nothing here says that the class cannot change."
)
"""What every certificate says about itself."""

NOT_L2 = "not a valid L2-to-L2 bound in general; as L2-to-peak it holds for |p| <= 1"
"""What the printed constant of Theorem 3.1 is."""


@dataclass(frozen=True)
class _Series:
    """One row of marks: a field of :class:`LayerCertificate`, and how it is drawn."""

    name: str
    label: str
    color: str
    marker: str


# Colours of Okabe and Ito (2008), and another marker for each: told apart in grey and by all kinds
# of colour vision.
_PANELS = {
    "L2 over time, ||eps|| / ||Ds||": (
        _Series("measured_l2", "measured, largest of all pairs", "#000000", "o"),
        _Series("l2", "exact, T steps", "#0072b2", "|"),
        _Series("any_time", "any T", "#009e73", "D"),
        _Series("printed", "printed, no L2 bound in general", "#d55e00", "x"),
    ),
    "largest step, max ||eps[t]|| / ||Ds||": (
        _Series("measured_peak", "measured, largest of all pairs", "#000000", "o"),
        _Series("peak", "exact, T steps", "#0072b2", "|"),
        _Series("printed_peak", "printed, if all |p| <= 1", "#d55e00", "x"),
    ),
}


@dataclass(frozen=True)
class Bound:
    """One bound on one layer.

    Attributes:
        value: Upper bound of the ratio; None if there is none (no leak and any number of steps).
        held: Whether it held on every pair, up to the stated margin; None if nothing was measured
            or no spike difference reached the layer.
    """

    value: float | None
    held: bool | None


@dataclass(frozen=True)
class LayerCertificate:
    """One spiking layer; ratios and bounds are those of eps to Ds, the spike differences of all
    layers that feed it, taken together.

    Attributes:
        name: Name in the network.
        neuron: Class of the neuron.
        decay: Fraction of the potential kept per step (lambda); None if it is not known.
        input_gain: Fixed times learnable input gain of every step (p); None if it is not known.
        feeds: Layers that feed it; ``"input"`` is the normalised input of the network.
        norm: ||W|| of the stacked linear map before it; None if the layer is not covered.
        upper_bound: Whether ``norm`` counts max pooling by its Lipschitz constant, so that it is a
            bound, not the norm.
        residual: Residual of the estimate of ``norm``.
        l2: Exact gain over T steps times ``norm``: bounds ||eps|| / ||Ds||.
        any_time: The same for any number of steps with gains up to the largest ``|p|``.
        peak: Exact L2-to-peak constant times ``norm``: bounds max_t ||eps[t]|| / ||Ds||.
        printed: sqrt(1 / (1 - decay)) times ``norm`` as the L2-to-L2 bound it is printed as; not
            valid in general.
        printed_peak: The same as the L2-to-peak bound that it is while ``|p| <= 1``.
        measured_l2: Largest ||eps|| / ||Ds|| over the pairs; None if no spike difference reached
            the layer.
        measured_peak: Largest max_t ||eps[t]|| / ||Ds|| over the pairs.
        not_covered: The reason if there are no bounds, else None.
    """

    name: str
    neuron: str
    decay: float | None = None
    input_gain: tuple[float, ...] | None = None
    feeds: tuple[str, ...] = ()
    norm: float | None = None
    upper_bound: bool = False
    residual: float | None = None
    l2: Bound | None = None
    any_time: Bound | None = None
    peak: Bound | None = None
    printed: Bound | None = None
    printed_peak: Bound | None = None
    measured_l2: float | None = None
    measured_peak: float | None = None
    not_covered: str | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the exact bounds held; None if nothing was measured."""
        bounds = [bound for bound in (self.l2, self.any_time, self.peak) if bound is not None]
        held = [bound.held for bound in bounds if bound.held is not None]
        return all(held) if held else None


@dataclass(frozen=True, repr=False)
class Certificate(
    Shown,
    SavedResult,
    what="a stability certificate",
    format="sj_robust.stability_certificate",
    version=1,
):
    """Result of :func:`perturbation_gains`, as plain data. 稳定性证书。

    Attributes:
        T: Number of time steps.
        samples: Pairs measured.
        margin: Relative amount by which a measured ratio may exceed a bound, since norms are
            approached from below; a larger residual of the layer's norm replaces it.
        layers: One entry per spiking layer, in order of execution.
        no_flip: L2 radius of each measured input within which no spike that the input drives can
            flip, see :func:`no_flip_radius`; empty if nothing was measured.
        no_flip_unknown: The reason if there are no radii although pairs were measured.

    Source: Theorem 3.1 of Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), as far
        as it holds.
    """

    T: int
    samples: int
    margin: float
    layers: tuple[LayerCertificate, ...]
    no_flip: tuple[float, ...] = ()
    no_flip_unknown: str | None = None

    @property
    def holds(self) -> bool | None:
        """Whether every exact bound of every covered layer held; None if nothing was measured."""
        held = [layer.holds for layer in self.layers if layer.holds is not None]
        return all(held) if held else None

    def __getitem__(self, name: str) -> LayerCertificate:
        """The layer of a name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(
            f"no layer {name!r}; the certificate has "
            f"{', '.join(layer.name for layer in self.layers)}"
        )

    def table(self) -> str:
        """Markdown table with a row per layer, followed by the meaning of the columns and what is
        not certified.
        """
        head = [
            "layer",
            "lambda",
            "p",
            "W",
            "measured L2",
            "exact L2",
            "L2, any T",
            "printed (1)",
            "measured peak",
            "exact peak",
            "printed peak",
        ]
        lines = [
            markdown_table(head, [_row(layer) for layer in self.layers]),
            "",
            "L2 is ||eps||_2 / ||Ds||_2, peak max_t ||eps[t]||_2 / ||Ds||_2, W the norm of the "
            "linear map before it.",
            "Measured is the largest of all pairs, - if no spike difference reached the layer.",
            f"Exact L2 and exact peak are for T = {self.T}. ! marks a bound that was exceeded.",
            f"(1) {NOT_L2}.",
        ]
        residual = 0.0
        for layer in self.layers:
            if layer.residual and layer.norm:
                residual = max(residual, layer.residual / layer.norm)
        if residual:
            lines.append(
                f"W is approached from below, to a residual of at most {residual:.1e} of it."
            )
        if any(layer.upper_bound for layer in self.layers):
            lines.append(
                "<= marks an upper bound of the norm: max pooling counts by its Lipschitz constant."
            )
        without = [layer for layer in self.layers if layer.not_covered]
        lines += [f"{layer.name} is not covered: {layer.not_covered}." for layer in without]
        if self.no_flip:
            middle = statistics.median(self.no_flip)
            least = min(self.no_flip)
            lines.append(
                f"No spike that the input drives flips within an L2 distance of {middle:.1e} "
                f"(median), {least:.1e} (least)."
            )
        elif self.no_flip_unknown:
            lines.append(
                f"Within which distance no spike flips is not known: {self.no_flip_unknown}."
            )
        return "\n".join([*lines, f"{self.verdict}.", SCOPE])

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Plot the measured ratios and their bounds, with a row per covered layer, on a logarithmic
        axis. 绘制稳定性证书。

        It needs matplotlib (extra ``recipes``).

        Args:
            path: Also write it to this file, in the format of its suffix, such as ``.pdf`` or
                ``.png``.

        Raises:
            ValueError: If no layer is covered.
        """
        layers = [layer for layer in self.layers if layer.not_covered is None]
        if not layers:
            raise ValueError(
                "no layer of the certificate is covered, so there is nothing to draw; see its "
                "table()"
            )
        with print_style():
            figure = new_figure(6.75, 1.35 + 0.17 * len(layers))
            axes = figure.subplots(1, 2, sharey=True)
            for axis, (title, series) in zip(axes, _PANELS.items(), strict=True):
                for one in series:
                    _draw(axis, one, layers)
                _scale(axis)
                axis.set_xlabel(title)
                if axis.lines:
                    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
            names = [layer.name for layer in layers]
            axes[0].set_yticks(range(len(layers)), names)
            axes[0].set_ylim(len(layers) - 0.5, -0.5)
        if path is not None:
            write_figure(figure, path)
        return figure

    def _content(self) -> dict[str, Any]:
        return {"scope": SCOPE, "printed_is": NOT_L2} | asdict(self)

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Self:
        del content["scope"]
        del content["printed_is"]
        layers = tuple(_layer_from(layer) for layer in content["layers"])
        no_flip = tuple(content.get("no_flip", ()))  # older files have none
        return cls(**content | {"layers": layers, "no_flip": no_flip})

    @property
    def verdict(self) -> str:
        """How many layers are covered and measured, and whether the bounds held."""
        covered = sum(layer.not_covered is None for layer in self.layers)
        measured = sum(layer.holds is not None for layer in self.layers)
        count = (
            f"{covered} of {len(self.layers)} layers covered, {measured} measured on "
            f"{self.samples} pairs"
        )
        if self.holds is None:
            return count
        outcome = "every exact bound held" if self.holds else "AN EXACT BOUND WAS EXCEEDED"
        return (
            f"{count}: {outcome} (relative margin {self.margin:g}, or the norm's residual if it is "
            "larger)"
        )


def _row(layer: LayerCertificate) -> list[str]:
    at_most = "<= " if layer.upper_bound else ""
    return [
        layer.name,
        _number(layer.decay),
        "-" if layer.input_gain is None else _span(layer.input_gain),
        at_most + _number(layer.norm),
        _number(layer.measured_l2),
        _bound(layer.l2),
        _bound(layer.any_time),
        _bound(layer.printed),
        _number(layer.measured_peak),
        _bound(layer.peak),
        _bound(layer.printed_peak),
    ]


def _span(values: tuple[float, ...]) -> str:
    low = _number(min(values))
    high = _number(max(values))
    return low if low == high else f"{low} .. {high}"


def _bound(bound: Bound | None) -> str:
    if bound is None:
        return "-"
    exceeded = " !" if bound.held is False else ""
    return _number(bound.value) + exceeded


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _layer_from(plain: dict[str, Any]) -> LayerCertificate:
    for name in ("l2", "any_time", "peak", "printed", "printed_peak"):
        plain[name] = None if plain[name] is None else Bound(**plain[name])
    plain["feeds"] = tuple(plain["feeds"])
    plain["input_gain"] = None if plain["input_gain"] is None else tuple(plain["input_gain"])
    return LayerCertificate(**plain)


def _draw(axis: "Axes", series: _Series, layers: list[LayerCertificate]) -> None:
    values = []
    rows = []
    for row, layer in enumerate(layers):
        value = _value(getattr(layer, series.name))
        if value is not None:
            values.append(value)
            rows.append(row)
    if values:
        size = 9 if series.marker == "|" else 4.5
        axis.plot(
            values,
            rows,
            series.marker,
            color=series.color,
            label=series.label,
            ms=size,
            mew=1.4,
        )


def _scale(axis: "Axes") -> None:
    """A logarithmic axis with ticks that a reader can tell apart."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    subs = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _value(entry: Bound | float | None) -> float | None:
    """What is drawn of a bound or a measured ratio; nothing where it is missing or zero."""
    value = entry.value if isinstance(entry, Bound) else entry
    return value if value else None
