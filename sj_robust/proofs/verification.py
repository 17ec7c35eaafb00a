"""Proofs that no perturbation within a ball changes the class of an image."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sj_robust.classifier import (
    SpikingClassifier,
    SpikingEventClassifier,
    as_classifier,
    check_classifier,
)
from sj_robust.core.checks import (
    Channels,
    check_channels,
    check_choice,
    check_classes,
    check_count,
    check_events,
    check_function,
    check_images,
    check_labels,
    check_network,
    check_number_of_channels,
    check_samples,
    check_size,
    check_steps,
    is_compiled,
)
from sj_robust.core.environment import device_of
from sj_robust.core.eps import eps_text
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.saved import markdown_table
from sj_robust.core.shown import Shown, heat_map, new_figure
from sj_robust.core.threat import NormName, Threat, ThreatModel, as_threat
from sj_robust.neuron.charging import Neuron, NeuronKey, is_neuron, stated
from sj_robust.proofs._scipy import scipy_module
from sj_robust.proofs.batches import METHODS, BatchProofs, BoundedLayer, Method
from sj_robust.proofs.bounds import bounded_neurons
from sj_robust.proofs.certificates import Proof
from sj_robust.proofs.changes import Flips
from sj_robust.proofs.moves import Events, MovedEvents
from sj_robust.proofs.soundness import UnprovableError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PROVABLE", "Verification", "ball_of", "verify"]

PROVABLE: tuple[NormName, ...] = ("Linf", "L0", "moves")
"""Norms of the balls in which something is proved."""


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """Result of :func:`verify`. 验证结果。

    Attributes:
        threat: The ball, in Linf, L0 or moves.
        correct: Whether each image is classified correctly without a perturbation.
        margin: For every image, a lower bound of the lead of the true class's logit over every
            other one, under any perturbation; > 0 is a proof.
        layers: Spiking layers in order of execution, bounded by intervals, or by joint bounds if
            the method has them.
        x_adv: The images; each one that is ``broken`` is replaced by an image of its ball that the
            network misclassifies.
        broken: Whether such an image is known; it is the image itself if that is misclassified.
        stepwise: Layers whose joint bounds are those of single steps, with the reason.
        apart: For L0 and moves, layers whose bounds give single values or steps their own budgets,
            with the reason.
        proof: What :meth:`save_certificate` writes.
    """

    threat: ThreatModel
    correct: tuple[bool, ...]
    margin: tuple[float, ...]
    layers: tuple[BoundedLayer, ...]
    x_adv: Tensor = field(repr=False, compare=False)
    broken: tuple[bool, ...]
    stepwise: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    proof: Proof | None = field(default=None, repr=False, compare=False)

    @property
    def verified(self) -> tuple[bool, ...]:
        """Whether each image is proved to be classified correctly everywhere in the ball."""
        return tuple(margin > 0 for margin in self.margin)

    @property
    def accuracy(self) -> float:
        """Share of images that are verified, a lower bound of the robust accuracy."""
        return sum(self.verified) / len(self.margin)

    @property
    def unknown(self) -> tuple[bool, ...]:
        """Whether each image is neither verified nor broken."""
        return tuple(
            not (good or bad) for good, bad in zip(self.verified, self.broken, strict=True)
        )

    @property
    def verdict(self) -> str:
        """Numbers of verified, broken and unknown images."""
        return (
            f"{self._threat}: {sum(self.verified)} of {len(self.margin)} images "
            f"verified, {sum(self.broken)} broken, {sum(self.unknown)} unknown; "
            f"{sum(self.correct)} classified correctly without a perturbation"
        )

    @property
    def _threat(self) -> str:
        """The ball in words."""
        threat = self.threat
        limits = ""
        if threat.largest_shift is not None:
            limits += f" by {threat.largest_shift} frames at most"
        if threat.total_shift is not None:
            limits += f", by {threat.total_shift} frames in total"
        counted = " in frames of event counts" if threat.counts else ""
        return f"{threat.norm} {eps_text(threat.eps)}{limits}{counted}"

    def table(self) -> str:
        """Markdown: the share of images, then a row per spiking layer."""
        rows = []
        for layer in self.layers:
            undecided = " ".join(f"{100 * share:.1f}" for share in layer.undecided)
            potential = " ".join(f"{value:.3g}" for value in layer.potential)
            rows.append([layer.name, undecided, potential])
        heads = [
            "layer",
            "undecided spikes, % per step",
            "bounded perturbation of h, mean square per step",
        ]
        notes = []
        if self.stepwise:
            notes.append(f"Bounded step by step: {', '.join(self.stepwise)}.")
        if self.apart:
            notes.append(f"Not bounded by one budget for all changes: {', '.join(self.apart)}.")
        found = markdown_table(heads, rows, words=3)
        return "\n\n".join([f"{self.verdict}.", found, *notes])

    def save_certificate(self, path: str | Path) -> str:
        """Save what somebody else needs to check the proofs of the verified images, with
        ``recipes/check_certificate.py`` and without this package. 保存可独立检验的证书。

        It holds the recorded operations with their weights, the verified images, their labels and
        the radius, and no bounds: these are computed anew.

        Args:
            path: File to write, an archive of numpy (``.npz``) without pickled objects.

        Returns:
            SHA-256 of the network, by which whoever checks the file knows that it is this one.

        Raises:
            NotImplementedError: For the method "mip", for events, and for a network with another
                operation than those of a certificate; it is named.
        """
        if self.proof is None:
            raise NotImplementedError("no certificates are known for results that were loaded")
        return self.proof.save(path, torch.tensor(self.verified))

    def plot(self) -> "Figure":
        """The margin of every image, and the share of undecided spikes. 绘制验证结果。

        It needs matplotlib (extra ``recipes``).
        """
        from matplotlib.colors import Normalize

        figure = new_figure(7.0, 2.6 + 0.16 * len(self.layers))
        images, spikes = figure.subplots(1, 2)
        images.plot(sorted(self.margin, reverse=True), ".", color="#0072b2")
        images.axhline(0, color="#767676", linewidth=1)
        images.set_xlabel("images, sorted")
        images.set_ylabel("margin of the true class (> 0: proved)")
        images.set_title(
            f"{self._threat}: {sum(self.verified)} of {len(self.margin)} proved",
            fontsize=9,
        )
        mesh = heat_map(
            spikes, {layer.name: layer.undecided for layer in self.layers}, Normalize(0, 1)
        )
        spikes.set_xlabel("time step")
        spikes.set_title("share of undecided spikes", fontsize=9)
        figure.colorbar(mesh, ax=spikes)
        return figure


def verify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Threat,
    *,
    T: int | None = None,
    mean: Channels = None,
    std: Channels = None,
    method: Method = "joint",
    time_limit: float = 10.0,
    batch_size: int = 64,
    decay: Mapping[NeuronKey, float] | None = None,
    gain: Mapping[NeuronKey, float] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Verification:
    """Prove, image by image, that no perturbation of at most ``eps`` changes the class.
    证明图像在扰动球内不被误分类。

    With ``ThreatModel("L0", k)`` images are binary event frames, of which at most k values change.
    With ``ThreatModel("moves", k, largest_shift=s)`` at most k events of event frames move in time,
    each by at most s frames; a total shift of S frames allows S moves at most, each by S frames at
    most, which is what is proved. With ``counts``, frames hold numbers of events; each change adds
    or removes one event, and any number may move to one place. ``docs/concepts/verified_events.md``
    derives how far this can change the currents of the first layer.

    Equation: the input lies in ``[max(x - eps, 0), min(x + eps, 1)]``. Bounds are propagated
    through the layers one by one; with bounds l and u on a neuron's current, its input gain p, its
    decay lambda and its threshold theta::

        h_lo = lambda v_lo + min(p l, p u)   (+ (1 - lambda) v_reset)
        h_hi = lambda v_hi + max(p l, p u)   (+ (1 - lambda) v_reset)
        h_lo >= theta: it fires for sure;  h_hi < theta: it cannot fire;  else its spike is
        undecided, in [0, 1]

    and v after the reset covers what either case allows. An image is verified if the logit of every
    other class stays below that of the true class; the difference of the two is bounded as a whole.
    Every bound covers the rounding of float32 in any order of summation
    (:class:`sj_robust.proofs.rules.Bounds`), so the proof holds for the network that actually runs.
    It assumes rounding to nearest and sums of products: no TF32, no bfloat16 or float16, no
    Winograd convolutions.

    A verified image cannot be fooled; one that is not verified may still be robust. Every method
    starts from the result of the one before it, and its margins are never smaller:

    - ``"ibp"``: the intervals above.
    - ``"joint"``: bounds over all time steps together. A neuron whose current is the same in every
      step has a chain of possible spike trains; a potential is bounded as one sum over the steps
      since the last reset; the logits are bounded by spike counts. Operations that are not sums of
      spikes over time, such as max pooling, keep the intervals, and the result says where.
    - ``"mip"``: a mixed-integer program with one binary variable per undecided spike and joint
      bounds as its constants, for small networks; needs scipy. It also runs the network itself on
      points along its own gradients and on solutions of the program; misclassified images are in
      ``x_adv`` of the result.

    Args:
        model: A classifier in float32, without a stochastic encoder, which runs in evaluation mode;
            or a bare network, with ``T``, ``mean`` and ``std``.
        x: Images [N, C, H, W] or features [N, F] in [0, 1]; for a ``SpikingEventClassifier``,
            frames [N, T, C, H, W].
        y: Labels [N] int64.
        eps: Linf radius, >= 0, a number or a string such as ``"8/255"``; or a ``ThreatModel`` in
            Linf, L0 or moves.
        T: Number of time steps, for a bare network; None if it has its own.
        mean: Mean per channel that a bare network expects to be subtracted.
        std: Standard deviation per channel that it expects to be divided by.
        method: "ibp", "joint" or "mip".
        time_limit: Seconds per image for mip; an image that needs more counts as unknown.
        batch_size: Images at a time; memory grows with it, not with N.
        decay: Fraction of the potential kept per step by neurons whose dynamics are not known, as
            in ``sj_robust.MPPDMonitor``; their firing and reset must be those of a BaseNode.
        gain: Their input gain.
        on_batch: Called after every batch with the number of images done so far.

    Returns:
        :class:`Verification`.

    Raises:
        TypeError: If ``model`` has no spiking neurons and is not a ``SpikingClassifier``.
        ValueError: If a bare network comes without T; if the model is in training mode, is not in
            float32, draws random numbers or changes its own parameters or buffers in a forward; if
            images or labels do not fit, ``eps`` is out of range or in L2, or the method is unknown;
            for L0 and moves, if the frames are not binary, or with ``counts`` not numbers of
            events.
        UnsoundBoundsError: If the network contradicts its bounds: a neuron does not follow the
            charge equation that was stated, a surrogate is no step, or for the images the network
            differs from its recorded program, or lies outside the bounds.
        ModuleNotFoundError: If scipy is missing for mip.
        NotImplementedError: If there are no bounds for a part of the network (a stochastic encoder,
            a neuron with unknown dynamics, an operation); the message names it.

    Source: interval bounds of spiking networks as in Liang et al. (NeurIPS 2022), here with input
        gains, resets in time and rounding; Gowal et al., arXiv 1810.12715, for the last layer.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode(step_mode="m"))
        >>> _ = net[0].weight.data.copy_(torch.eye(2))
        >>> model = SpikingClassifier(net, T=4).eval()
        >>> result = verify(
        ...     model, torch.tensor([[0.9, 0.1], [0.3, 0.2]]), torch.tensor([0, 0]), eps=0.05
        ... )
        >>> result.verified
        (True, False)
        >>> verify(
        ...     model, torch.tensor([[0.3, 0.2]]), torch.tensor([0]), eps=0.1, method="mip"
        ... ).broken
        (True,)
    """
    check_network(model, "model")
    threat = as_threat(eps, *PROVABLE)
    T = check_steps(T)
    mean, std = check_channels("mean", mean), check_channels("std", std, positive=True)
    batch_size = check_count("batch_size", batch_size)
    check_choice("method", method, METHODS)
    if method == "mip":
        scipy_module("optimize", wanted_by='method "mip"')
    time_limit = check_size("time_limit", time_limit, positive=True)
    check_function("on_batch", on_batch)
    classifier = check_classifier(as_classifier(model, T, mean=mean, std=std))
    with stated(classifier.net, decay, gain), evaluation_mode(classifier):
        neurons = _checked(classifier, x, y, of_events=threat.of_events)
        if threat.norm == "moves" and not isinstance(classifier, SpikingEventClassifier):
            raise ValueError(
                "moves are those of event frames; wrap the network in a "
                f"SpikingEventClassifier, got a {type(classifier).__name__}"
            )
        ball = ball_of(threat, x)
        check_number_of_channels(x, mean=mean, std=std)
        classifier.find_convention(x.to(device_of(classifier)))
        first = slice(0, batch_size)
        proofs = BatchProofs(
            classifier, neurons, ball, x[first], y[first], method=method, time_limit=time_limit
        )
        check_classes(y, proofs.classes)
        for start in range(0, len(x), proofs.size):
            part = slice(start, start + proofs.size)
            proofs.add(x[part], y[part])
            if on_batch is not None:
                on_batch(min(part.stop, len(x)))
    return Verification(
        threat=threat,
        correct=tuple(proofs.correct),
        margin=tuple(proofs.margins),
        layers=proofs.layers,
        x_adv=torch.cat(proofs.x_adv),
        broken=tuple(proofs.broken),
        stepwise=proofs.stepwise,
        apart=proofs.apart,
        proof=Proof.of(proofs.program(), threat, x, y, method=method),
    )


def ball_of(threat: ThreatModel, x: Tensor, radius: float | None = None) -> float | Events:
    """What a threat allows for images, or for frames that are binary or numbers of events; with a
    ``radius`` instead of its own, which may lie between two numbers of events.
    """
    eps = threat.eps if radius is None else radius
    if threat.norm == "Linf":
        return eps
    check_events(x, counts=threat.counts)
    if threat.norm == "L0":
        return Flips(eps if threat.counts else min(eps, x[0].numel()), threat.counts)
    limits = [limit for limit in (threat.largest_shift, threat.total_shift) if limit is not None]
    moves = eps if threat.total_shift is None else min(eps, threat.total_shift)
    return MovedEvents.of(x, moves, min(limits, default=None), counts=threat.counts)


def _checked(
    model: SpikingClassifier, x: Tensor, y: Tensor, *, of_events: bool
) -> dict[str, Neuron]:
    """The network's neurons by name, if all that is given fits; values of frames may be above 1."""
    if of_events:
        check_samples(x)
    else:
        check_images(x)
    check_labels(y, x)
    if len(x) == 0:
        raise ValueError("x must contain at least one image, got none")
    if is_compiled(model):
        raise UnprovableError(
            "model must be given before torch.compile, got a compiled network, whose layers take "
            "no bounds; give the network as it is before it is compiled"
        )
    surrogates: set[int] = set()  # shared by neurons, whatever mode these are in
    for module in filter(is_neuron, model.modules()):
        surrogates |= set(map(id, module.children()))
    for name, module in model.named_modules():
        if module.training and id(module) not in surrogates:
            raise UnprovableError(
                f"model must be in evaluation mode, got {name or 'it'} in training mode after "
                "model.eval(); let its train() set the mode of all its parts"
            )
    values = model.state_dict()
    dtypes = {value.dtype for value in values.values() if value.is_floating_point()}
    dtypes.add(x.dtype)
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise UnprovableError(
            "model and images must be in float32, whose rounding is covered, or both in float64, "
            f"which rounds less; got {', '.join(sorted(map(str, dtypes)))}; use .float()"
        )
    odd = [name for name, value in values.items() if not _is_finite(value)]
    if odd:
        raise UnprovableError(
            f"weights must be finite, got NaN or infinity in {odd[0]}; load an undamaged checkpoint"
        )
    return bounded_neurons(model)


def _is_finite(value: Tensor) -> bool:
    """Whether all elements are finite; without a copy, as weights may be large."""
    if not value.is_floating_point() or not value.numel():
        return bool(value.isfinite().all())
    return all(bool(end.isfinite()) for end in value.aminmax())
