"""How well each indicator predicts the size of a perturbation and its success."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sj_robust.core.checks import check_counts
from sj_robust.core.eps import Radii, parse_radii
from sj_robust.core.preserved import evaluation_mode, seeded_network
from sj_robust.core.saved import SavedResult, markdown_table
from sj_robust.perturbation import dynamics
from sj_robust.perturbation._recording import Layers
from sj_robust.perturbation._statistics import LayerTrace
from sj_robust.perturbation.monitor import MPPDMonitor

__all__ = [
    "INDICATORS",
    "Association",
    "IntensityCorrelation",
    "Perturbation",
    "intensity_correlation",
    "neuron_indicators",
]

Perturbation = Callable[[Tensor, Tensor, float], Tensor]
"""Images, their classes and a size to perturbed images."""

INDICATORS = ("mppd_l1", "mppd_l2", "mppd_max", "full", "std", "tasad")
"""Names of the indicators, see :func:`neuron_indicators`."""

_MEASURES = ("spearman", "pearson", "per_image", "auroc", "auroc_same_size", "per_neuron")
_MOST_NEURONS = 64


@dataclass(frozen=True)
class Association:
    """One figure with its 95 % bootstrap interval; None where it is not defined.
    关联度及其置信区间。

    Attributes:
        value: On all images.
        low: Lower end.
        high: Upper end.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class IntensityCorrelation(
    SavedResult, what="an intensity study", format="sj_robust.intensity", version=1
):
    """Result of :func:`intensity_correlation`, as plain data. 扰动强度相关性研究的结果。

    Attributes:
        eps: Sizes in increasing order.
        samples: Number of images in the study, those that are classified correctly without
            perturbation.
        left_out: Number of images that are misclassified without perturbation.
        resamples: Bootstrap samples behind every interval.
        accuracy: Per direction, the share of the images still classified correctly at each size.
        means: Per direction, layer and indicator, its mean over the images at each size.
        per_step: Per direction and layer, MS-MPPD at each size and time step.
        associations: Per direction, layer, indicator and measure, one :class:`Association`.

    Source: the indicators are those of Ding et al., "Robust Stable Spiking Neural Networks" (ICML
        2024).
    """

    eps: list[float]
    samples: int
    left_out: int
    resamples: int
    accuracy: dict[str, list[float]]
    means: dict[str, dict[str, dict[str, list[float]]]]
    per_step: dict[str, dict[str, list[list[float]]]]
    associations: dict[str, dict[str, dict[str, dict[str, Association]]]]

    @property
    def directions(self) -> tuple[str, ...]:
        """Names of the kinds of perturbation."""
        return tuple(self.means)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the spiking layers, in order of execution."""
        return tuple(self.means[self.directions[0]])

    def table(self, direction: str) -> str:
        """Markdown table of one direction: a row per layer and indicator, a column per measure.

        Raises:
            KeyError: If there is no such direction.
        """
        rows = []
        for layer, indicators in self.associations[direction].items():
            for indicator, measures in indicators.items():
                texts = [_text(measures[name]) for name in _MEASURES]
                rows.append([layer, indicator, *texts])
        return markdown_table(["layer", "indicator", *_MEASURES], rows, words=2)

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Self:
        return cls(**content | {"associations": _associations_from(content["associations"])})


def intensity_correlation(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    perturb: Mapping[str, Perturbation],
    eps: Radii,
    layers: Layers = "all",
    input_gain: bool = True,
    batch_size: int = 64,
    resamples: int = 200,
    seed: int = 0,
    say: Callable[[str], object] = lambda text: None,
) -> IntensityCorrelation:
    """Perturb images by increasing amounts and compute each indicator for each layer.
    扰动指标与强度的相关性。

    Measures, over all pairs of an image and a size:

    - ``spearman`` and ``pearson``: correlation of the indicator with the size;
    - ``per_image``: Spearman's correlation over the sizes of one image, averaged over the images; 0
      for an image that does not change the indicator at all;
    - ``auroc``: probability that the indicator is larger for an image that is fooled than for one
      that is not;
    - ``auroc_same_size``: the same among images perturbed by the same size, so that the size gives
      no information;
    - ``per_neuron``: as ``spearman`` for the indicator of one neuron, averaged over 64 neurons of
      the layer; 0 for a neuron whose indicator does not change at all.

    Only images that are classified correctly without perturbation are used. Intervals are
    percentile bootstrap intervals that resample whole images with all their sizes, or the neurons
    of ``per_neuron``. A network that draws random numbers draws the same for both runs of a pair,
    so that indicators show the perturbation alone; whether an image is fooled is judged by one
    draw, which blurs both measures of fooled images.

    Args:
        model: Images to logits, such as ``SpikingClassifier``; runs in evaluation mode.
        x: Images [N, ...], in [0, 1].
        y: Classes [N].
        perturb: For the name of every direction, a callable from images, classes and size to
            perturbed images of the same shape, such as ``lambda x, y, eps: x + eps *
            torch.randn_like(x)``.
        eps: At least two sizes > 0.
        layers: Spiking layers, as in ``MPPDMonitor``.
        input_gain: Whether a DLIF neuron's learnable gain is part of the perturbation.
        batch_size: Images at a time; the traces of all layers are kept for one batch.
        resamples: Bootstrap samples.
        seed: Seed of the bootstrap, of the choice of neurons, and of what the network draws.
        say: Called with lines that report the progress.

    Returns:
        The result.

    Raises:
        ValueError: If there is no direction, sizes are not positive or fewer than two, a count is
            below 1, ``x`` and ``y`` differ in length, no image is classified correctly, or the
            network has no neuron to follow.

    Source: the claim that MPPD conveys the intensity of a perturbation is by Ding et al., "Robust
        Stable Spiking Neural Networks" (ICML 2024); bootstrap of Efron (1979), resampled by image.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> from sj_robust import SpikingClassifier
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(
        ...     nn.Flatten(2), nn.Linear(4, 8), neuron.IFNode(step_mode="m"), nn.Linear(8, 2)
        ... )
        >>> model = SpikingClassifier(net, T=4).eval()
        >>> x = torch.rand(8, 1, 2, 2)
        >>> brighter = {"brighter": lambda x, y, eps: x + eps}
        >>> study = intensity_correlation(
        ...     model, x, model(x).argmax(1), perturb=brighter, eps=[0.1, 0.2, 0.4]
        ... )
        >>> round(study.associations["brighter"]["net.2"]["mppd_l1"]["per_image"].value, 6)
        1.0
    """
    check_counts(batch_size=batch_size, resamples=resamples)
    sizes = _checked_sizes(eps)
    if not perturb:
        raise ValueError("perturb must name at least one direction, such as {'gaussian': ...}")
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(
            f"x and y must hold as many images as classes, at least one, got {len(x)} and {len(y)}"
        )
    with evaluation_mode(model), torch.no_grad(), seeded_network(model, seed, x.device):
        predicted = []
        for part in torch.split(x, batch_size):
            logits = model(part)
            predicted.append(logits.argmax(1))
    right = torch.cat(predicted) == y
    if not bool(right.any()):
        raise ValueError(
            f"the network misclassifies all of the {len(x)} images: use a trained network"
        )
    x = x[right]
    y = y[right]
    study = IntensityCorrelation(
        eps=sizes,
        samples=len(x),
        left_out=int((~right).sum()),
        resamples=resamples,
        accuracy={},
        means={},
        per_step={},
        associations={},
    )
    measured: dict[str, list[_Measured]] = {}
    with (
        evaluation_mode(model),
        seeded_network(model, seed, x.device),
        MPPDMonitor(model, layers=layers, input_gain=input_gain, keep="trace") as monitor,
    ):
        probe = _Probe(
            monitor=monitor,
            model=model,
            x=x,
            y=y,
            batch_size=batch_size,
            seed=seed,
        )
        for direction, function in perturb.items():
            measured[direction] = []
            for size in sizes:
                say(f"{direction} at eps {size:.4g}: {len(x)} images")
                measured[direction].append(probe.measure(function, size))
    say(f"intervals from {resamples} bootstrap samples")
    for direction, parts in measured.items():
        _summarise(study, direction, parts, seed)
    return study


@dataclass(frozen=True, eq=False)
class _Measured:
    """One direction at one size.

    Attributes:
        indicators: Of whole layers [N], by layer and name.
        single: Of single neurons [N, K], by layer and name.
        wrong: Who is fooled [N].
        per_step: MS-MPPD [T] by layer.
    """

    indicators: dict[tuple[str, str], Tensor]
    single: dict[tuple[str, str], Tensor]
    wrong: Tensor
    per_step: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Probe:
    """A monitored network and the images that are perturbed; see :func:`intensity_correlation`."""

    monitor: MPPDMonitor
    model: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int
    seed: int

    def measure(self, function: Perturbation, size: float) -> _Measured:
        indicators: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        single: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        per_step: dict[str, Tensor] = {}
        wrong = []
        outputs: list[Tensor] = []

        def forward(x: Tensor) -> None:
            outputs.append(self.model(x))

        x_batches = torch.split(self.x, self.batch_size)
        y_batches = torch.split(self.y, self.batch_size)
        for images, classes in zip(x_batches, y_batches, strict=True):
            perturbed = function(images, classes, size).detach()
            stats = self.monitor.compare(images, perturbed, forward=forward)
            fooled = outputs[-1].argmax(1) != classes
            wrong.append(fooled.cpu())
            outputs.clear()
            for layer, figures in stats.items():
                before = per_step.get(layer, torch.zeros(figures.T))
                per_step[layer] = before + figures.ms_mppd * len(images) / len(self.x)
                for name, found in neuron_indicators(self.monitor[layer][0]).items():
                    value = found.cpu()
                    # In float64 the sum is exact enough that equal samples stay equal, which
                    # ranks depend on.
                    of_layer = _over_neurons(name, value.double())
                    indicators[layer, name].append(of_layer)
                    drawn = self._drawn_of(value.shape[1])
                    single[layer, name].append(value[:, drawn])
            self.monitor.clear_recorded_data()
        return _Measured(
            indicators=_joined(indicators),
            single=_joined(single),
            wrong=torch.cat(wrong),
            per_step=per_step,
        )

    def _drawn_of(self, neurons: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(neurons, generator=generator)[:_MOST_NEURONS]


def _joined(kinds: Mapping[tuple[str, str], list[Tensor]]) -> dict[tuple[str, str], Tensor]:
    return {key: torch.cat(parts) for key, parts in kinds.items()}


def _summarise(
    study: IntensityCorrelation, direction: str, parts: Sequence[_Measured], seed: int
) -> None:
    """Write into the study what was measured of one direction."""
    sizes = study.eps
    study.accuracy[direction] = []
    for part in parts:
        share_of_wrong = part.wrong.double().mean().item()
        study.accuracy[direction].append(1.0 - share_of_wrong)
    study.per_step[direction] = {}
    for layer in parts[0].per_step:
        study.per_step[direction][layer] = [part.per_step[layer].tolist() for part in parts]
    means: dict[str, dict[str, list[float]]] = defaultdict(dict)
    associations: dict[str, dict[str, dict[str, Association]]] = defaultdict(dict)
    names = list(parts[0].indicators)
    by_name = []
    for key in names:
        by_size = [part.indicators[key] for part in parts]
        by_name.append(torch.stack(by_size))
    values = torch.stack(by_name)  # [names, sizes, N]
    wrong = torch.stack([part.wrong for part in parts])
    found = _with_intervals(values, wrong, sizes, study.resamples, seed)
    for row, (layer, name) in enumerate(names):
        means[layer][name] = values[row].mean(1).tolist()
        single = torch.stack([part.single[layer, name] for part in parts])
        per_neuron = _per_neuron(single, sizes, study.resamples, seed)
        associations[layer][name] = found[row] | {"per_neuron": per_neuron}
    study.means[direction] = dict(means)
    study.associations[direction] = dict(associations)


def _with_intervals(
    values: Tensor, wrong: Tensor, sizes: Sequence[float], resamples: int, seed: int
) -> list[dict[str, Association]]:
    """Every measure of whole layers by name, of each row of :func:`_measures`."""
    whole = _measures(values, wrong, sizes)
    drawn = _drawn_again(values.shape[2], resamples, seed)
    resampled = [_measures(values[..., index], wrong[:, index], sizes) for index in drawn]
    again = torch.stack(resampled)
    low, high = again.nanquantile(_ends(again.dtype), dim=0)
    found = []
    for row in range(len(values)):
        of_row = {}
        for column, measure in enumerate(_MEASURES[:-1]):
            of_row[measure] = Association(
                value=_number(whole[row, column]),
                low=_number(low[row, column]),
                high=_number(high[row, column]),
            )
        found.append(of_row)
    return found


def _per_neuron(single: Tensor, sizes: Sequence[float], resamples: int, seed: int) -> Association:
    """Mean over neurons of the correlation of their indicator [sizes, N, K] with the size."""
    size = torch.tensor(sizes).repeat_interleave(single.shape[1])
    by_neuron = single.flatten(0, 1).T
    each = _spearman(by_neuron, size).nan_to_num(0.0)
    drawn = _drawn_again(len(each), resamples, seed)
    again = each[drawn].mean(1)
    low, high = again.quantile(_ends(again.dtype)).tolist()
    return Association(each.mean().item(), low, high)


def _drawn_again(count: int, resamples: int, seed: int) -> Tensor:
    """Bootstrap samples [resamples, count] of indices."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (resamples, count), generator=generator)


def _ends(dtype: torch.dtype) -> Tensor:
    """Quantiles that end a 95 % CI."""
    return torch.tensor([0.025, 0.975], dtype=dtype)


def _measures(values: Tensor, wrong: Tensor, sizes: Sequence[float]) -> Tensor:
    """Every measure of whole layers [rows, measures], of values [rows, sizes, N]; NaN where one is
    not defined.
    """
    size = torch.tensor(sizes, dtype=values.dtype)
    flat = values.flatten(1)
    flat_size = size[:, None].expand_as(wrong).flatten()
    per_image = _spearman(values.transpose(1, 2), size).nan_to_num(0.0)
    measures = (
        _spearman(flat, flat_size),
        _pearson(flat, flat_size),
        per_image.mean(1),
        _auroc(flat[:, None], wrong.flatten()[None]),
        _auroc(values, wrong),
    )
    return torch.stack(measures, dim=1)


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def _text(association: Association) -> str:
    value = association.value
    low = association.low
    high = association.high
    if value is None or low is None or high is None:
        return "not defined"
    return f"{value:.2f} ({low:.2f}, {high:.2f})"


def _associations_from(plain: dict[str, Any]) -> dict[str, Any]:
    """Associations where the plain data holds theirs."""
    if "value" in plain:
        return Association(**plain)  # type: ignore[return-value]  # the innermost level
    return {key: _associations_from(value) for key, value in plain.items()}


def _checked_sizes(eps: Radii) -> list[float]:
    sizes = parse_radii(eps)
    if len(sizes) < 2 or sizes[0] <= 0:
        raise ValueError(
            f"eps must be at least two sizes > 0, got {sizes}; such as [0.05, 0.1, 0.2]"
        )
    return sizes


def neuron_indicators(trace: LayerTrace) -> dict[str, Tensor]:
    """Every indicator of a layer's perturbation for every sample and neuron. 逐神经元的扰动指标。

    Equation, with ``eps`` the simplified perturbation, ``d`` the full one and means over time::

        mppd_l1 = mean |eps|    mppd_l2 = mean eps^2    mppd_max = max |eps|    full = mean d^2
        std = mean |s - s~|     tasad = |mean s - mean s~|

    Args:
        trace: One pair of runs of the layer, from :func:`spike_traces` or
            ``MPPDMonitor(net, keep="trace")``.

    Returns:
        Tensors [N, features] by the names in :data:`INDICATORS`.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024).

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import neuron
        >>> from sj_robust.perturbation import spike_traces
        >>> net = torch.nn.Sequential(neuron.IFNode(step_mode="m"))
        >>> layer = spike_traces(net, torch.full((2, 1, 1), 0.5), torch.full((2, 1, 1), 0.75))["0"]
        >>> {name: value.item() for name, value in neuron_indicators(layer).items()}
        {'mppd_l1': 0.375, 'mppd_l2': 0.15625, 'mppd_max': 0.5, 'full': 0.03125,
        'std': 0.0, 'tasad': 0.0}
    """
    eps = trace.eps.flatten(2)
    size = eps.abs()
    full = trace.full.flatten(2)
    spikes = trace.spike_seq.float().flatten(2)
    spikes_perturbed = trace.spike_seq_perturbed.float().flatten(2)
    return {
        "mppd_l1": size.mean(0),
        "mppd_l2": eps.square().mean(0),
        "mppd_max": size.amax(0),
        "full": full.square().mean(0),
        "std": dynamics.spike_train_distance(spikes, spikes_perturbed),
        "tasad": dynamics.tasad(spikes, spikes_perturbed),
    }


def _over_neurons(name: str, value: Tensor) -> Tensor:
    """One number per sample of an indicator [N, features]: its mean, for ``mppd_max`` the
    maximum.
    """
    return value.amax(1) if name == "mppd_max" else value.mean(1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension; equal values share the mean of their ranks."""
    ordered = values.sort(-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2


def _pearson(first: Tensor, second: Tensor) -> Tensor:
    """Linear correlation along the last dimension; NaN where one side does not vary."""
    first = first.double()
    second = second.double()
    first = first - first.mean(-1, keepdim=True)
    second = second - second.mean(-1, keepdim=True)
    scale = first.norm(dim=-1) * second.norm(dim=-1)
    correlation = (first * second).sum(-1) / scale
    return torch.where(scale > 0, correlation.clamp(-1, 1), torch.nan)


def _spearman(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of the ranks along the last dimension; NaN where one side does not vary."""
    return _pearson(_ranks(first), _ranks(second))


def _auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Probability that a positive scores higher than a negative of the same stratum, ties counting
    a half.

    Equation: ``sum_k U_k / sum_k P_k N_k`` with Mann and Whitney's U of each stratum.

    Args:
        scores: [*, strata, N].
        positive: [strata, N], boolean.

    Returns:
        [*]; NaN without a pair of a positive and a negative.
    """
    count = positive.double().sum(-1)
    rank_sum = (_ranks(scores) * positive).sum(-1)
    above = rank_sum - count * (count + 1) / 2
    pairs = count * (positive.shape[-1] - count)
    return above.sum(-1) / pairs.sum()
