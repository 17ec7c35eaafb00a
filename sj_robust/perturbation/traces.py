"""Two runs of a network, compared spike by spike."""

from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from sj_robust.core.checks import check_choice
from sj_robust.core.saved import markdown_table
from sj_robust.core.shown import BLUE, GREY, ORANGE, Shown, new_figure, print_style
from sj_robust.perturbation._statistics import LayerTrace, counted
from sj_robust.perturbation.monitor import MPPDMonitor, as_watched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Traces", "spike_traces"]

_LAYERS = 8
"""Layers that are drawn at most."""

_NEURONS = 40
"""Neurons of each that are drawn at most."""

_ACROSS = 4
"""Panels side by side at most."""

_STEPS_ACROSS = 48
"""Time steps that fit side by side, so that the marks of a raster stay apart."""

_WIDTH = 6.8
"""Inches of panels side by side, for many steps."""

_FIRED = {BLUE: "clean only", ORANGE: "perturbed only", GREY: "both"}
"""What the colours of a raster mean."""

_LETTERS = 24
"""Letters of a layer's name above its panel at most."""


class Traces(Shown, dict[str, LayerTrace]):
    """Currents, spikes and potentials of both runs by layer, in order of execution.
    两次运行的逐层轨迹。

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> x = torch.full((2, 1, 1), 0.9)
        >>> spike_traces(nn.Sequential(neuron.IFNode(step_mode="m")), x, x + 0.2)
        <Traces: 1 spiking layer, T = 2, 1 pair of inputs; spikes first diverge in layer 0
        at step 0 (1 of 1 pair)>
    """

    def parting(self, sample: int = 0) -> tuple[str, int] | None:
        """Layer and step, from 0, of the first spike that only one of the two runs of a sample has;
        None if they agree.

        It is the earliest step, and of the layers that diverge at that step the one that is
        executed first.
        """
        first: tuple[str, int] | None = None
        for name, layer in self.items():
            step = _parted(layer, sample)
            if step is not None and (first is None or step < first[1]):
                first = name, step
        return first

    @property
    def verdict(self) -> str:
        """Number of layers and pairs, and where most of the pairs diverge."""
        if not self:
            return "no spiking layer"
        first = next(iter(self.values()))
        steps, count = first.spike_seq.shape[:2]
        layers = counted(len(self), "spiking layer")
        pairs = counted(count, "pair")
        partings = Counter(self.parting(sample) for sample in range(count))
        place, times = partings.most_common(1)[0]
        where = "no spike differs"
        if place is not None:
            where = f"spikes first diverge in layer {place[0]} at step {place[1]}"
        return f"{layers}, T = {steps}, {pairs} of inputs; {where} ({times} of {pairs})"

    def table(self) -> str:
        """Markdown: the verdict, then per layer the share of spikes that differ at every step, in
        per cent.
        """
        rows = []
        for name, layer in self.items():
            shares = _differing(layer).flatten(1).double().mean(1)
            per_cent = [f"{100 * share:.1f}" for share in shares.tolist()]
            rows.append([name, *per_cent])
        steps = max((len(layer.spike_seq) for layer in self.values()), default=0)
        heads = ["spikes that differ, %"]
        heads += [f"step {step}" for step in range(steps)]
        return f"{self.verdict}.\n\n{markdown_table(heads, rows)}"

    @print_style()
    def plot(
        self, which: Literal["spikes", "potential"] = "spikes", *, sample: int = 0
    ) -> "Figure":
        """Spikes or membrane potentials of both runs, a panel per layer, with a line where they
        diverge. 绘制脉冲与膜电位。

        It needs matplotlib (extra ``recipes``). If there are more than 8 layers, the first and the
        last ones are drawn; in each layer, the neurons whose spikes differ most (for
        ``"potential"``, one of them).

        Args:
            which: ``"spikes"``, a raster of neurons and steps, or ``"potential"``, after the reset.
            sample: Number of the pair.

        Raises:
            ValueError: If there is no such drawing or pair.
        """
        check_choice("which", which, ("spikes", "potential"))
        count = next(iter(self.values())).spike_seq.shape[1] if self else 0
        if not 0 <= sample < count:
            raise ValueError(f"sample must be from 0 to {count - 1}, got {sample}")
        names = list(self)
        if len(names) > _LAYERS:
            first = names[: _LAYERS // 2]
            last = names[-_LAYERS // 2 :]
            names = first + last
        if which == "spikes":
            draw = _raster
            height = 2.2
            label = "neuron"
        else:
            draw = _potential
            height = 1.5
            label = "membrane potential"
        steps = len(self[names[0]].spike_seq)
        across = min(_ACROSS, len(names), max(1, _STEPS_ACROSS // steps))
        down = ceil(len(names) / across)
        is_wide = steps > _STEPS_ACROSS // _ACROSS
        width = _WIDTH if is_wide else 1.7 * across
        figure = new_figure(0.4 + width, 0.4 + height * down)
        panels = figure.subplots(down, across, squeeze=False)
        parting = self.parting(sample)
        for axes, name in zip(panels.flat, names, strict=False):
            draw(axes, self[name], sample)
            title = name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"
            if parting is not None and parting[0] == name:
                step = parting[1]
                title += f"\ndiverges at step {step}"
                axes.axvline(step, color=GREY, linestyle=":", linewidth=1.2)
            axes.set_title(title, loc="left")
            axes.set_xlabel("time step")
            axes.set_xlim(-0.5, len(self[name].spike_seq) - 0.5)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in panels.flat[len(names) :]:
            axes.set_axis_off()
        for row in panels:
            row[0].set_ylabel(label)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        return figure


def spike_traces(
    net: nn.Module,
    x: Tensor,
    x_perturbed: Tensor,
    *,
    T: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Traces:
    """The clean and the perturbed run of a network, layer by layer.
    记录并对比两次运行的脉冲与膜电位。

    It keeps 7 tensors of the size of every layer's output, so call it with only a few images.

    Args:
        net: A network, as in :func:`compare_potentials`.
        x: Clean images.
        x_perturbed: Perturbed images.
        T: Number of time steps, for a bare network; None if it has its own.
        mean: Mean per channel that a bare network expects to be subtracted.
        std: Standard deviation per channel that it expects to be divided by.

    Raises:
        ValueError: As for :func:`compare_potentials`.

    Source: as drawn for two runs of one neuron in Figure 1 of Ding et al. (ICML 2024), here for a
        whole network.

    Examples:
        >>> from sj_robust.models import pretrained
        >>> x = torch.rand(2, 1, 8, 8)
        >>> spike_traces(pretrained("digits/lif"), x, x).parting() is None
        True
    """
    watched, forward = as_watched(net, x, T, mean, std)
    with MPPDMonitor(watched, keep="trace") as monitor:
        layers = monitor.compare(x, x_perturbed, forward=forward)
        return Traces({name: monitor[name][-1] for name in layers})


def _differing(layer: LayerTrace) -> Tensor:
    """Where only one run has a spike, [T, N, *] bool."""
    return layer.spike_seq != layer.spike_seq_perturbed


def _parted(layer: LayerTrace, sample: int) -> int | None:
    """First step at which the spikes of a sample differ."""
    steps = _of_sample(_differing(layer), sample).any(1).nonzero()
    return int(steps[0]) if len(steps) else None


def _raster(axes: "Axes", layer: LayerTrace, sample: int) -> None:
    """A cell per neuron and step: its left half is filled if the neuron fires in the clean run, its
    right half if it does in the perturbed one.
    """
    clean = _of_sample(layer.spike_seq, sample) != 0
    perturbed = _of_sample(layer.spike_seq_perturbed, sample) != 0
    differing = (clean != perturbed).sum(0)
    firing = (clean | perturbed).sum(0)
    order = (differing * 1000 + firing).argsort(descending=True, stable=True)
    chosen = order[:_NEURONS].sort().values
    clean = clean[:, chosen]
    perturbed = perturbed[:, chosen]
    from matplotlib.colors import ListedColormap

    cells = torch.stack([clean * 1, perturbed * 2], 1)  # [T, halves, neurons]
    in_both = (clean & perturbed).unsqueeze(1)
    cells[in_both.expand_as(cells)] = 3
    axes.imshow(
        cells.flatten(0, 1).T.numpy(),
        cmap=ListedColormap(["none", *_FIRED]),
        vmin=0,
        vmax=3,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, len(clean) - 0.5, -0.5, len(chosen) - 0.5),
    )
    for color, label in _FIRED.items():
        axes.plot([], [], "s", color=color, label=label)
    axes.set_yticks([])
    axes.grid(visible=False)


def _potential(axes: "Axes", layer: LayerTrace, sample: int) -> None:
    """Potential of the neuron whose spikes differ most, and of those the one that moves most;
    filled where it fires.
    """
    moved = _of_sample(layer.full, sample).abs().amax(0)
    below_one = moved / (1 + moved.max())
    differing = _of_sample(_differing(layer), sample).sum(0)
    neuron = int((differing + below_one).argmax())
    values = _of_sample(layer.v_seq, sample)[:, neuron]
    spikes = _of_sample(layer.spike_seq, sample)[:, neuron]
    _line(axes, values, spikes, line="o-", label="clean", color=BLUE)
    values = _of_sample(layer.v_seq_perturbed, sample)[:, neuron]
    spikes = _of_sample(layer.spike_seq_perturbed, sample)[:, neuron]
    _line(axes, values, spikes, line="s--", label="perturbed", color=ORANGE)


def _line(
    axes: "Axes", values: Tensor, spikes: Tensor, *, line: str, label: str, color: str
) -> None:
    """The potential of a neuron, with filled markers at its spikes."""
    fired = torch.nonzero(spikes)[:, 0].tolist()
    axes.plot(values.tolist(), line, color=color, label=label, markerfacecolor="none")
    at_spikes = values[fired].tolist()
    axes.plot(fired, at_spikes, line[0], color=color)


def _of_sample(seq: Tensor, sample: int) -> Tensor:
    """One sample of a sequence [T, N, *], as [T, neurons]."""
    return seq[:, sample].flatten(1)
