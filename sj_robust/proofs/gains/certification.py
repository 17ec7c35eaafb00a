"""Bounds of every spiking layer of a network, checked on pairs of inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier, as_classifier, check_classifier
from sj_robust.core.checks import (
    Channels,
    check_channels,
    check_count,
    check_inputs,
    check_network,
    check_number_of_channels,
    check_seed,
    check_size,
    check_steps,
)
from sj_robust.core.preserved import full_precision, preserved
from sj_robust.neuron.charging import find_neurons
from sj_robust.proofs.gains._measure import Moved, first_frame, measure, per_step
from sj_robust.proofs.gains.certificate import Bound, Certificate, LayerCertificate
from sj_robust.proofs.gains.gain import NeuronGains, l2_gain_limit, neuron_gains
from sj_robust.proofs.gains.operator import InputMap, input_maps
from sj_robust.proofs.no_flip import no_flip_radius

__all__ = ["perturbation_gains"]

_MOST_VALUES = 4096
"""Largest number of values of an input whose no-flip radius is computed, one pass per value."""


def perturbation_gains(
    net: nn.Module,
    x: Tensor,
    T: int | None = None,
    *,
    x_perturbed: Tensor | None = None,
    mean: Channels = None,
    std: Channels = None,
    margin: float = 1e-3,
    tolerance: float = 1e-4,
    max_iterations: int = 300,
    seed: int = 0,
) -> Certificate:
    """Bound the perturbation of every spiking layer, and check the bounds on pairs of inputs.
    各层扰动的上界与实测。

    Equation, per layer with decay lambda, input gain p, stacked linear map W before it and the
    spike differences Ds of the layers (for the first one: the difference of the normalised input)
    that feed it::

        eps[t] = lambda * eps[t-1] + p[t] * W Ds[t]
        ||eps||_2 <= ||L_lambda diag(p)||_2 ||W||_2 ||Ds||_2

    and likewise for any T and for the largest step; see :func:`l2_gain_limit`, :func:`peak_gain`
    and :func:`input_maps`. The result also contains the constant printed in Theorem 3.1 and the
    radius within which no spike flips (:func:`no_flip_radius`), where that linear regime ends. A
    bound holds if the ratio of every pair is at most ``bound * (1 + margin)``; rounding of the
    current, 1e-6 of its size, is not counted.

    What it does not certify: the true difference of potentials, with the reset, has no finite gain,
    because an arbitrarily small change next to the threshold makes or removes a spike. The bounds
    of the layers therefore do not compose, and none of them is a radius within which the class
    stays the same.

    The network runs in evaluation mode; its modes, states, hooks and gradients and the random state
    are restored.

    Args:
        net: A ``SpikingClassifier``, or a bare network with ``T``, ``mean`` and ``std``.
        x: Inputs of the classifier, [N, C, H, W] or [N, F]; for a ``SpikingEventClassifier``, event
            frames [N, T, C, H, W].
        T: Number of time steps; None uses the classifier's, or the network's own.
        x_perturbed: Perturbed inputs in the shape of ``x``; None computes only the bounds.
        mean: Mean per channel that a bare network expects to be subtracted.
        std: Standard deviation per channel that it expects to be divided by.
        margin: Relative margin of a bound, since the iteration approaches norms from below; for a
            layer where it stopped at a larger relative residual, this residual.
        tolerance: Relative residual at which the iteration for a norm stops.
        max_iterations: Largest number of iterations.
        seed: Seed of the random start vectors.

    Raises:
        TypeError: If T is a tensor.
        ValueError: If T is missing or differs from the classifier's, if the inputs are empty, not
            finite or of different shapes, if there is no neuron, or if the network cannot run for
            one step and for T.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), Theorem 3.1; gains
        derived here.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), neuron.IFNode(step_mode="m"))
        >>> x = torch.rand(8, 1, 2, 2)
        >>> certificate = perturbation_gains(net, x, T=4, x_perturbed=x + 0.1)
        >>> certificate.holds, certificate["2"].feeds
        (True, ('input',))
    """
    check_network(net)
    check_inputs(x, x_perturbed)
    T = check_steps(T)
    mean = check_channels("mean", mean)
    std = check_channels("std", std, positive=True)
    check_number_of_channels(x, mean=mean, std=std)
    margin = check_size("margin", margin)
    tolerance = check_size("tolerance", tolerance)
    max_iterations = check_count("max_iterations", max_iterations)
    seed = check_seed("seed", seed)
    wrapped = as_classifier(net, T, mean=mean, std=std, images=x)
    classifier = check_classifier(wrapped)
    neurons, unknown, _ = find_neurons(classifier.net)
    gains = {}
    for name, neuron in neurons.items():
        gains[name] = neuron_gains(neuron.charging(), classifier.T)
    moved: dict[str, Moved] | None = None
    with full_precision(x.device), preserved(classifier):
        maps = input_maps(
            classifier.net,
            first_frame(classifier, x),
            takes=per_step(classifier.find_convention(x)),
            T=classifier.T,
            tolerance=tolerance,
            max_iterations=max_iterations,
            seed=seed,
        )
        if x_perturbed is not None:
            covered: dict[str, NeuronGains | None] = dict.fromkeys(maps)
            for name, layer in maps.items():
                if layer.not_covered is None:
                    covered[name] = gains.get(name)
            moved = measure(classifier, x, x_perturbed, covered)
    layers = []
    for name, layer in maps.items():
        kind = type(classifier.net.get_submodule(name)).__name__
        if name in unknown:
            certificate = LayerCertificate(name, kind, feeds=layer.feeds, not_covered=unknown[name])
        else:
            certificate = _layer(kind, layer, gains[name], moved, margin)
        layers.append(certificate)
    no_flip: tuple[float, ...] = ()
    no_flip_unknown = None
    if moved is not None:
        no_flip, no_flip_unknown = _no_flip(classifier, x)
    return Certificate(
        T=classifier.T,
        samples=0 if moved is None else len(x),
        margin=margin,
        layers=tuple(layers),
        no_flip=no_flip,
        no_flip_unknown=no_flip_unknown,
    )


def _no_flip(classifier: SpikingClassifier, x: Tensor) -> tuple[tuple[float, ...], str | None]:
    """No-flip radii of the inputs, or why there are none."""
    values = x[0].numel()
    if values > _MOST_VALUES:
        reason = f"it needs a pass for each of the {values} values; call no_flip_radius for it"
        return (), reason
    try:
        radii = no_flip_radius(classifier, x).tolist()
    except (NotImplementedError, ValueError) as error:
        return (), str(error)  # images outside [0, 1], or a network without one
    if not all(math.isfinite(radius) for radius in radii):
        return (), "the input drives no spike"
    return tuple(radii), None


@dataclass(frozen=True)
class _Pairs:
    """What the pairs of inputs did at one layer; each [N] in float64.

    Attributes:
        spikes: L2 norm of the spike differences of all layers that feed it, Ds.
        l2: L2 norm of eps over time.
        peak: Largest L2 norm of eps in one step.
        rounding: L2 norm by which rounding may change the input current.
    """

    spikes: Tensor
    l2: Tensor
    peak: Tensor
    rounding: Tensor

    @property
    def reached(self) -> Tensor:
        """Pairs of which a spike difference reached the layer, [N] bool."""
        return self.spikes > 0

    def largest_ratio(self, eps: Tensor) -> float | None:
        """Largest ratio of eps to the spike differences; None if none reached the layer."""
        if not bool(self.reached.any()):
            return None
        ratios = eps / self.spikes
        return float(ratios[self.reached].max())

    def bound(self, eps: Tensor, *, gain: float, norm: float, margin: float) -> Bound:
        """The bound ``gain * norm`` on the ratio of eps, and whether all pairs kept it."""
        if not math.isfinite(gain):
            return Bound(None, None)
        value = gain * norm
        if not bool(self.reached.any()):
            return Bound(value, None)
        most = value * (1.0 + margin) * self.spikes + gain * self.rounding
        return Bound(value, bool((eps <= most).all()))


def _pairs_at(layer: InputMap, moved: Mapping[str, Moved] | None) -> _Pairs:
    """What the pairs did at a layer; without pairs, one that moved nothing."""
    if moved is None:
        nothing = torch.zeros(1, dtype=torch.float64)
        return _Pairs(spikes=nothing, l2=nothing, peak=nothing, rounding=nothing)
    own = moved[layer.name]
    squared = torch.stack([moved[feed].spikes for feed in layer.feeds])
    return _Pairs(
        spikes=squared.sum(0).sqrt(),
        l2=own.perturbation.sqrt(),
        peak=own.peak.sqrt(),
        rounding=1e-6 * own.current.sqrt(),
    )


def _layer(
    kind: str, found: InputMap, gains: NeuronGains, moved: Mapping[str, Moved] | None, margin: float
) -> LayerCertificate:
    """The certificate of a layer whose neuron is known."""
    certificate = LayerCertificate(
        name=found.name,
        neuron=kind,
        decay=gains.decay,
        input_gain=tuple(gains.input_gain.tolist()),
        feeds=found.feeds,
        not_covered=found.not_covered,
    )
    norm = found.norm
    if norm is None:
        return certificate
    if norm:
        margin = max(margin, found.residual / norm)
    largest = float(gains.input_gain.abs().max())
    any_time = float(l2_gain_limit(gains.decay)) * largest
    pairs = _pairs_at(found, moved)
    of_l2 = partial(pairs.bound, pairs.l2, norm=norm, margin=margin)
    of_peak = partial(pairs.bound, pairs.peak, norm=norm, margin=margin)
    return replace(
        certificate,
        norm=norm,
        upper_bound=found.upper_bound,
        residual=found.residual,
        l2=of_l2(gain=gains.l2),
        any_time=of_l2(gain=any_time),
        peak=of_peak(gain=gains.peak),
        printed=of_l2(gain=gains.printed),
        printed_peak=of_peak(gain=gains.printed),
        measured_l2=pairs.largest_ratio(pairs.l2),
        measured_peak=pairs.largest_ratio(pairs.peak),
    )
