"""Per layer, every bound on the membrane potential perturbation beside what was measured."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust._preserved import preserved
from sj_robust._saved import known_fields, load_saved, saved_content, write_whole
from sj_robust.charging import find_neurons
from sj_robust.classifier import SpikingClassifier
from sj_robust.stability._affine import full_precision
from sj_robust.stability._measure import Moved, first_frame, measure
from sj_robust.stability.gain import NeuronGains, l2_gain_limit, neuron_gains
from sj_robust.stability.operator import InputMap, input_maps

__all__ = ["Bound", "Certificate", "LayerCertificate", "certify"]

_FORMAT = "sj_robust.stability_certificate"
_VERSION = 1

SCOPE = (
    "Bounds are on eps, the perturbation without reset, of one layer, given the spike difference Ds that did reach it. "
    "The true potential difference has no finite gain, since a spike next to the threshold appears or vanishes at "
    "once; for the same reason bounds of layers do not compose to one of the network, and nothing here says that the "
    "class cannot change."
)
"""What every certificate says about itself."""

NOT_L2 = "not a valid L2-to-L2 bound in general; as L2-to-peak it holds for |p| <= 1"
"""What the printed constant of Theorem 3.1 is."""


@dataclass(frozen=True)
class Bound:
    """One bound on one layer.

    Attributes:
        value: Upper bound of the ratio; None where there is none (no leak and any number of steps).
        held: Whether it held on every pair, up to the stated margin; None if nothing was measured or no spike
            difference reached the layer.
    """

    value: float | None
    held: bool | None


@dataclass(frozen=True)
class LayerCertificate:
    """One spiking layer; ratios and bounds are of eps to Ds, the spike differences of all feeding layers together.

    Attributes:
        name: Name in the network.
        neuron: Class of the neuron.
        decay: Fraction of the potential kept per step (lambda); None if it is not known.
        input_gain: Fixed times learnable input gain of every step (p); None likewise.
        feeds: Layers that feed it; ``"input"`` is the normalised input of the network.
        norm: ||W|| of the stacked linear map before it; None if the layer is not covered.
        upper_bound: Whether ``norm`` counts max pooling by its Lipschitz constant, so that it is a bound, not the norm.
        residual: Residual of the estimate of ``norm``.
        l2: Exact gain over T steps times ``norm``: bounds ||eps|| / ||Ds||.
        any_time: The same for any number of steps with gains up to the largest ``|p|``.
        peak: Exact L2-to-peak constant times ``norm``: bounds max_t ||eps[t]|| / ||Ds||.
        printed: sqrt(1 / (1 - decay)) times ``norm`` as the L2-to-L2 bound it is printed as; not valid in general.
        printed_peak: The same as the L2-to-peak bound that it is while ``|p| <= 1``.
        measured_l2: Largest ||eps|| / ||Ds|| over the pairs; None if no spike difference reached the layer.
        measured_peak: Largest max_t ||eps[t]|| / ||Ds|| over the pairs.
        not_covered: Why there are no bounds; None if there are.
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


@dataclass(frozen=True)
class Certificate:
    """Result of :func:`certify`, plain data throughout. 稳定性证书。

    Attributes:
        T: Number of time steps.
        samples: Pairs measured.
        margin: By how much, relative, a measured ratio may exceed a bound, since norms are approached from below; a
            larger residual of the layer's norm takes its place.
        layers: One entry per spiking layer, in order of execution.

    Source: Theorem 3.1 of Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), and what is true of it.
    """

    T: int
    samples: int
    margin: float
    layers: tuple[LayerCertificate, ...]

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
        raise KeyError(f"no layer {name!r}; the certificate has {', '.join(layer.name for layer in self.layers)}")

    def table(self) -> str:
        """Markdown: a row per layer, then what the columns mean and what is not certified."""
        head = [
            "layer", "lambda", "p", "W", "measured L2", "exact L2", "L2, any T", "printed (1)", "measured peak",
            "exact peak", "printed peak",
        ]  # fmt: skip
        rows = [head, ["---", *["---:"] * (len(head) - 1)]]
        rows += [_row(layer) for layer in self.layers]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines += [
            "",
            "L2 is ||eps||_2 / ||Ds||_2, peak max_t ||eps[t]||_2 / ||Ds||_2, W the norm of the linear map before it.",
            "Measured is the largest of all pairs, - if no spike difference reached the layer.",
            f"Exact L2 and exact peak are for T = {self.T}. ! marks a bound that was exceeded.",
            f"(1) {NOT_L2}.",
        ]
        reached = [layer.residual / layer.norm for layer in self.layers if layer.residual and layer.norm]
        if reached:
            lines.append(f"W is approached from below, to a residual of at most {max(reached):.1e} of it.")
        if any(layer.upper_bound for layer in self.layers):
            lines.append("<= marks an upper bound of the norm: max pooling counts by its Lipschitz constant.")
        lines += [f"{layer.name} is not covered: {layer.not_covered}." for layer in self.layers if layer.not_covered]
        return "\n".join([*lines, self._verdict(), SCOPE])

    def to_json(self) -> str:
        """The certificate as JSON text, which :meth:`from_json` reads back equal."""
        content = {"format": _FORMAT, "version": _VERSION, "scope": SCOPE, "printed_is": NOT_L2, **asdict(self)}
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Certificate":
        """The certificate that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is not JSON, not a certificate or of another version.
        """
        content = saved_content(text, what="a stability certificate", format=_FORMAT, version=_VERSION)
        with known_fields("the certificate"):
            del content["scope"], content["printed_is"]
            content["layers"] = tuple(_layer_from(layer) for layer in content["layers"])
            return cls(**content)

    def save(self, path: str | Path) -> None:
        """Write the certificate; the file is whole or not there."""
        write_whole(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Certificate":
        """The certificate that :meth:`save` wrote; raises as :meth:`from_json`, naming the file."""
        return load_saved(Path(path), cls.from_json)

    def _verdict(self) -> str:
        covered = sum(layer.not_covered is None for layer in self.layers)
        measured = sum(layer.holds is not None for layer in self.layers)
        count = f"{covered} of {len(self.layers)} layers covered, {measured} measured on {self.samples} pairs"
        if self.holds is None:
            return f"{count}."
        outcome = "every exact bound held" if self.holds else "AN EXACT BOUND WAS EXCEEDED"
        return f"{count}: {outcome} (margin {self.margin:g}, or the residual, for the estimate of the norm)."


def certify(
    net: nn.Module,
    x: Tensor,
    T: int | None = None,
    *,
    x_perturbed: Tensor | None = None,
    margin: float = 1e-3,
    tolerance: float = 1e-4,
    max_iterations: int = 300,
    seed: int = 0,
) -> Certificate:
    """Bound the perturbation of every spiking layer, and check the bounds on pairs of inputs. 各层扰动的上界与实测。

    Equation, per layer with decay lambda, input gain p, stacked linear map W before it and the spike differences Ds of
    the layers (for the first one: the difference of the normalised input) that feed it::

        eps[t] = lambda * eps[t-1] + p[t] * W Ds[t]
        ||eps||_2 <= ||L_lambda diag(p)||_2 ||W||_2 ||Ds||_2

    and likewise for any T and for the largest step; see :mod:`sj_robust.stability.gain` and :func:`input_maps`. The
    printed constant of Theorem 3.1 stands beside them under its own name. A bound counts as held if the ratio of every
    pair is at most ``bound * (1 + margin)``, with rounding of the current, 1e-6 of its size, left aside.

    What it does not certify: the true difference of potentials, with the reset, has no finite gain, because an
    arbitrarily small change next to the threshold makes or removes a spike. Bounds of layers therefore do not compose,
    and none of them is a radius within which the class stays.

    The network runs in evaluation mode; modes, states, hooks, random state and gradients are left as they were.

    Args:
        net: A ``SpikingClassifier``, or a bare network that one can be built around.
        x: Inputs as the classifier takes them, [N, C, H, W] or [N, F]; of a ``SpikingEventClassifier`` event frames
            [N, T, C, H, W].
        T: Number of time steps; None takes the classifier's.
        x_perturbed: Perturbed inputs in the shape of ``x``; None gives bounds alone.
        margin: Relative margin for norms being approached from below; where the iteration stopped at a larger residual,
            that counts.
        tolerance: Residual at which the norms' iteration stops.
        max_iterations: Iterations at which it stops anyway.
        seed: Of the random values that it uses.

    Returns:
        :class:`Certificate`.

    Raises:
        TypeError: If T is a tensor.
        ValueError: If T is missing or not the classifier's, the inputs are none, not finite or of different shapes, or
            there is no neuron.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), Theorem 3.1; gains derived here.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), neuron.IFNode(step_mode="m"))
        >>> x = torch.rand(8, 1, 2, 2)
        >>> certificate = certify(net, x, T=4, x_perturbed=x + 0.1)
        >>> certificate.holds, certificate["2"].feeds
        (True, ('input',))
    """
    if isinstance(T, Tensor):
        raise TypeError("T must be a number of time steps, got a tensor; name the argument x_perturbed=...")
    classifier = _classifier(net, T)
    if x_perturbed is not None and x.shape != x_perturbed.shape:
        raise ValueError(
            f"x and x_perturbed must have the same shape, got {tuple(x.shape)} and {tuple(x_perturbed.shape)}"
        )
    if len(x) == 0:
        raise ValueError(f"x must hold a sample, got shape {tuple(x.shape)}")
    if x_perturbed is not None and not bool((x.isfinite() & x_perturbed.isfinite()).all()):
        raise ValueError("x and x_perturbed must be finite, got nan or inf; leave those pairs out")
    neurons, unknown, _ = find_neurons(classifier.net, {}, {})
    gains = {name: neuron_gains(neuron.charging(), classifier.T) for name, neuron in neurons.items()}
    with full_precision(x.device), preserved(classifier):
        maps = input_maps(
            classifier.net,
            first_frame(classifier, x),
            step_mode=classifier.step_mode,
            tolerance=tolerance,
            max_iterations=max_iterations,
            seed=seed,
        )
        moved: dict[str, Moved] | None = None
        if x_perturbed is not None:
            charging = {
                name: (gains[name].decay, gains[name].input_gain)
                if name in gains and layer.not_covered is None
                else None
                for name, layer in maps.items()
            }
            moved = measure(classifier, x, x_perturbed, charging)
    layers = []
    for name, layer in maps.items():
        kind = type(classifier.net.get_submodule(name)).__name__
        if name in unknown:
            layers.append(LayerCertificate(name, kind, feeds=layer.feeds, not_covered=unknown[name]))
        else:
            layers.append(_layer(kind, layer, gains[name], moved, margin))
    return Certificate(classifier.T, 0 if moved is None else len(x), margin, tuple(layers))


def _classifier(net: nn.Module, T: int | None) -> SpikingClassifier:
    if isinstance(net, SpikingClassifier):
        if T is not None and T != net.T:
            raise ValueError(f"T must be the classifier's {net.T} or None, got {T}; build a classifier for another T")
        return net
    if T is None:
        raise ValueError("T must be given for a bare network, got None; it is the number of time steps, such as T=4")
    return SpikingClassifier(net, T)


def _layer(
    kind: str, found: InputMap, gains: NeuronGains, moved: Mapping[str, Moved] | None, margin: float
) -> LayerCertificate:
    """The certificate of a layer whose neuron is known."""
    input_gain = tuple(gains.input_gain.tolist())
    if found.norm is None:
        return LayerCertificate(found.name, kind, gains.decay, input_gain, found.feeds, not_covered=found.not_covered)
    norm = found.norm
    ratios = None if moved is None else _Ratios(found, moved)
    margin = max(margin, found.residual / norm) if norm else margin
    any_time = float(l2_gain_limit(gains.decay)) * max(map(abs, input_gain))

    def bound(gain: float, of_peak: bool) -> Bound:
        value = gain * norm if math.isfinite(gain) else None
        if ratios is None or not ratios.reached or value is None:
            return Bound(value, None)
        return Bound(value, ratios.within(value, gain, margin, of_peak=of_peak))

    return LayerCertificate(
        found.name,
        kind,
        gains.decay,
        input_gain,
        found.feeds,
        norm,
        found.upper_bound,
        found.residual,
        l2=bound(gains.l2, False),
        any_time=bound(any_time, False),
        peak=bound(gains.peak, True),
        printed=bound(gains.printed, False),
        printed_peak=bound(gains.printed, True),
        measured_l2=None if ratios is None else ratios.largest(of_peak=False),
        measured_peak=None if ratios is None else ratios.largest(of_peak=True),
    )


class _Ratios:
    """Norms of one layer on every pair [N], and those of what feeds it."""

    def __init__(self, found: InputMap, moved: Mapping[str, Moved]) -> None:
        own = moved[found.name]
        feeds = torch.stack([torch.as_tensor(moved[feed].spikes) for feed in found.feeds])
        self.spikes = feeds.sum(0).sqrt()
        self.eps = {False: torch.as_tensor(own.perturbation).sqrt(), True: torch.as_tensor(own.peak).sqrt()}
        self.reached = bool((self.spikes > 0).any())
        self.rounding = 1e-6 * torch.as_tensor(own.current).sqrt()

    def largest(self, *, of_peak: bool) -> float | None:
        return float((self.eps[of_peak] / self.spikes)[self.spikes > 0].max()) if self.reached else None

    def within(self, value: float, gain: float, margin: float, *, of_peak: bool) -> bool:
        allowed = value * (1.0 + margin) * self.spikes + gain * self.rounding
        return bool((self.eps[of_peak] <= allowed).all())


def _row(layer: LayerCertificate) -> list[str]:
    p = "-" if layer.input_gain is None else _span(layer.input_gain)
    head = [layer.name, _number(layer.decay), p, ("<= " if layer.upper_bound else "") + _number(layer.norm)]
    l2 = [_number(layer.measured_l2), *map(_bound, (layer.l2, layer.any_time, layer.printed))]
    return [*head, *l2, _number(layer.measured_peak), _bound(layer.peak), _bound(layer.printed_peak)]


def _span(values: tuple[float, ...]) -> str:
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} .. {high}"


def _bound(bound: Bound | None) -> str:
    return "-" if bound is None else _number(bound.value) + (" !" if bound.held is False else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _layer_from(plain: dict[str, Any]) -> LayerCertificate:
    for name in ("l2", "any_time", "peak", "printed", "printed_peak"):
        plain[name] = None if plain[name] is None else Bound(**plain[name])
    plain["feeds"] = tuple(plain["feeds"])
    plain["input_gain"] = None if plain["input_gain"] is None else tuple(plain["input_gain"])
    return LayerCertificate(**plain)
