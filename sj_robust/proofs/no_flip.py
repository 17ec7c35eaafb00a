"""The L2 radius within which no spike of the first spiking layer can flip."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sj_robust.classifier import SpikingClassifier, SpikingEventClassifier, check_classifier
from sj_robust.core.broadcast import along
from sj_robust.core.checks import check_count, check_images
from sj_robust.core.environment import device_of
from sj_robust.core.host import first_argument
from sj_robust.core.preserved import other_forward, preserved, sums_of_products
from sj_robust.neuron.charging import Neuron, find_neurons
from sj_robust.ops.recurrence import charge, reset
from sj_robust.proofs.bounds import BoundedRun, LayerCall, Programs, bounded_logits
from sj_robust.proofs.neurons import other_forwards
from sj_robust.proofs.rounding import (
    LEAST_SHARE,
    charge_rounding,
    is_rounding,
    reset_rounding,
    threshold_rounding,
)
from sj_robust.proofs.soundness import check_surrogates
from sj_robust.proofs.spiking import Interval
from sj_robust.proofs.structure import ReadCall

__all__ = ["no_flip_radius"]


def no_flip_radius(model: SpikingClassifier, x: Tensor, *, batch_size: int = 64) -> Tensor:
    """The L2 radius around each image within which no spike driven by the input can flip.
    首层脉冲不翻转的半径。

    Equation, for neuron i with potential h before firing, the row w_i of the linear map from the
    image to its current, and the fraction a[t, k] of the current of step k that remains in h[t]
    (decays and gains since k, 0 before a hard reset)::

        radius = min over i, t of |h_i[t] - v_threshold| / (|sum_k a_i[t, k]| * ||w_i||_2)

    Below it all spikes, and so the logits, stay exactly the same: at this radius the linear regime
    of the perturbation dynamics ends. At the radius there is a direction (along w_i) that brings
    one potential to the threshold, so no larger radius is possible, apart from images that leave
    [0, 1]. That spikes neither gate the image nor change its map is read from the recorded program
    of the network. For event frames, whose steps are perturbed independently,
    ``sqrt(sum_k a^2)`` replaces the sum. The radius is usually tiny.

    Rounding is taken into account: the largest rounding error of h in float32, for any image within
    the radius, is first subtracted from every distance to the threshold, computed as in
    :func:`verify` (sums in any order, no TF32). If nothing remains, the radius is 0.

    Args:
        model: A classifier; it is copied to float64 and runs in evaluation mode.
        x: Images [N, C, H, W] or features [N, F] in [0, 1]; for a ``SpikingEventClassifier``,
            frames [N, T, C, H, W].
        batch_size: Images at a time.

    Returns:
        Radii [N] in float64.

    Raises:
        TypeError: If ``model`` is not a ``SpikingClassifier``.
        ValueError: If images are not finite or outside [0, 1].
        NotImplementedError: If a neuron driven directly by the input has unknown dynamics or no
            bounds, or changes them within a forward, the map to it is not affine, mixes frames of
            events or depends on spikes, the encoder is stochastic, or the input reaches the logits
            without passing a neuron.
        UnsoundBoundsError: If a surrogate is no step.

    Source: derived here; it is the exact range of validity of the perturbation dynamics without
        flips of Ding et al. (ICML 2024).

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), neuron.IFNode(step_mode="m"))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> no_flip_radius(SpikingClassifier(net, T=1), torch.tensor([[0.4], [0.6]]))
        tensor([0.1000, 0.1000], dtype=torch.float64)
    """
    check_classifier(model)
    check_images(x)
    check_count("batch_size", batch_size)
    if model.encoder is not None:
        raise NotImplementedError(
            f"the encoder {type(model.encoder).__name__} draws spikes; no radius is known for it"
        )
    device = device_of(model)
    with sums_of_products(device), torch.no_grad(), preserved(model):
        model.eval()
        given = x.detach().to(device)
        model.find_convention(given)  # before anything is replaced
        exact = copy.deepcopy(model).double()
        rows = _row_norms(exact, given[:1].double(), batch_size)
        neurons, _, _ = find_neurons(model.net)
        driven = {name: neurons[name] for name in rows}
        check_surrogates(model.net, driven, given)
        programs = Programs(model, neurons)
        parts = []
        for images in torch.split(given, batch_size):
            layers = _layers(exact, images.double(), rows)
            radius = images.new_full((len(images),), torch.inf, dtype=torch.float64)
            for layer in layers.values():
                radius = torch.minimum(radius, layer.radius())
            found = _rounding(model, programs, images, radius, list(rows))
            for name, rounding in found.items():
                in_float32 = layers[name].rounded_radius(radius, rounding)
                radius = torch.minimum(radius, in_float32)
            parts.append(radius)
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)


def _row_norms(model: SpikingClassifier, image: Tensor, batch_size: int) -> dict[str, Tensor]:
    """L2 norm of the map from the image to the current of one step, [neurons] by layer that the
    input reaches.

    For event frames the map is from the frame of the step.
    """
    neurons, others, _ = find_neurons(model.net)
    names = [*neurons, *others]
    probes = _probes(model, image)
    black = _currents(model, torch.zeros_like(probes), names)
    sums_of_squares = {}
    for name, currents in _currents(model, probes, names).items():
        change = currents - black[name]
        if bool(change.any()):
            _check_followed(name, neurons, others)
            _check_affine(name, change, currents.abs() + black[name].abs())
            sums_of_squares[name] = torch.zeros_like(change[0, 0])
    for basis in _bases(model, image, batch_size):
        columns = _currents(model, basis, list(sums_of_squares))
        for name, squares in sums_of_squares.items():
            column = columns[name][0] - black[name][0, :1]
            squares += column.square().sum(0)
    return {name: squares.sqrt() for name, squares in sums_of_squares.items()}


def _probes(model: SpikingClassifier, image: Tensor) -> Tensor:
    """Two random images a and b, and ``a + 2 b``, by which an affine map is recognised.

    For event frames they are the same in every step, so that its steps can be compared, and a
    fourth probe, a times :func:`_factors`, shows whether a step gets frames of others.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, *image.shape[1:])
    pair = torch.rand(shape, generator=generator, dtype=torch.float64)
    pair = pair.to(image)
    if not isinstance(model, SpikingEventClassifier):
        return torch.cat((pair, pair[:1] + 2 * pair[1:]))
    pair = pair[:, :1].expand_as(pair)
    a = pair[:1]
    faded = a * along(_factors(model.T).to(image), 1, image.ndim)
    return torch.cat((pair, a + 2 * pair[1:], faded))


def _factors(T: int) -> Tensor:
    """Random factors of the T frames of a probe."""
    return 0.5 + torch.rand(T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _check_followed(name: str, neurons: dict[str, Neuron], others: dict[str, str]) -> None:
    """Raise NotImplementedError for a layer whose spikes do not follow from its potential."""
    reason = others.get(name)
    if reason is None and not neurons[name].binary:
        reason = "its surrogate does not give spikes of 0 and 1 by the potential alone"
    elif reason is None and other_forwards(neurons[name].module):
        reason = "a forward of the neuron was replaced"
    if reason is not None:
        raise NotImplementedError(f"{name}, which the input drives, cannot be followed: {reason}")


def _check_affine(name: str, change: Tensor, size: Tensor) -> None:
    """Raise NotImplementedError if the currents [T, P, *] of the probes, less those of a black
    image, are not those of one affine map of the step's own frame in every step; ``size`` is what
    they round by.
    """
    a, b, both, *faded = change.unbind(1)
    largest = size.amax((0, 1)) + LEAST_SHARE * change.abs().amax()
    is_linear = is_rounding(both - (a + 2 * b), 3 * largest)
    constant = change[:, :3]
    is_constant = is_rounding(constant - constant[:1], largest)
    factors = along(_factors(len(a)).to(a), 0, a.ndim)
    is_of_its_frame = all(is_rounding(currents - factors * a, 3 * largest) for currents in faded)
    if not (is_linear and is_constant and is_of_its_frame):
        raise _NotAffineError(name)


class _NotAffineError(NotImplementedError):
    """The input drives a layer in a way of which no radius is known."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"what leads from the input to {name} is not one affine map of the frame of its own "
            "time step, the same at every step and for all spikes"
        )


def _bases(model: SpikingClassifier, image: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches of images with a single one in them; for event frames it is in every step."""
    frames = isinstance(model, SpikingEventClassifier)
    elements = image[0, :1].numel() if frames else image.numel()
    for start in range(0, elements, batch_size):
        count = min(batch_size, elements - start)
        row = torch.arange(count, device=image.device)
        basis = torch.zeros((count, elements), dtype=image.dtype, device=image.device)
        basis[row, start + row] = 1.0
        if frames:
            one_step = basis.view(count, 1, *image.shape[2:])
            basis = one_step.expand(count, *image.shape[1:])
        yield basis.reshape(count, *image.shape[1:])


@dataclass(frozen=True)
class _Rounding:
    """Of a layer's current in a ball: how far float32's is off, and its largest size, [T, N, *]."""

    error: Tensor
    size: Tensor


@dataclass(frozen=True)
class _Step:
    """A layer in one step of an exact run, [N, *].

    Attributes:
        gain: Gain of the current.
        before: Potential before the charge.
        h: Potential before firing.
        slope: By how much an image of distance 1 moves h at most.
    """

    gain: float
    before: Tensor
    h: Tensor
    slope: Tensor


@dataclass(frozen=True)
class _Layer:
    """A layer that the input drives, in an exact run.

    Attributes:
        neuron: The neuron.
        steps: Its steps.
    """

    neuron: Neuron
    steps: list[_Step]

    def radius(self) -> Tensor:
        """Radius [N] in exact arithmetic."""
        threshold = float(self.neuron.module.v_threshold)
        ratios = []
        for step in self.steps:
            distance = (step.h - threshold).abs()
            ratio = distance / step.slope
            ratios.append(ratio.nan_to_num(torch.inf))
        return _least(ratios)

    def rounded_radius(self, widest: Tensor, rounding: _Rounding) -> Tensor:
        """Radius [N] in float32; ``widest`` [N] is that of the ball in which rounding is known."""
        module = self.neuron.module
        decay = self.neuron.charging().decay_value
        rest = float(module.v_reset or 0.0)
        threshold = float(module.v_threshold)
        like = self.steps[0].h
        far = along(widest, 0, like.ndim)
        off = torch.zeros_like(like)  # how far float32's potential is from the exact one
        moved = off  # how far either is from the one without a perturbation
        ratios = []
        for t, step in enumerate(self.steps):
            gain = abs(step.gain)
            size = step.before.abs() + moved + gain * rounding.size[t] + abs(rest)
            off = decay * off + gain * rounding.error[t] + charge_rounding(size)
            distance = (step.h - threshold).abs() - off - threshold_rounding(threshold)
            ratios.append(torch.where(distance > 0, distance / step.slope, 0.0))
            moved = (step.slope * far).nan_to_num() + off
            off = off + reset_rounding(step.h.abs() + moved, rest, threshold)
            moved = moved + off
        return _least(ratios)


def _least(ratios: list[Tensor]) -> Tensor:
    """Least value of every sample, [N], of values [N, *]."""
    return torch.stack(ratios, 1).flatten(1).amin(1)


def _layers(model: SpikingClassifier, images: Tensor, rows: dict[str, Tensor]) -> dict[str, _Layer]:
    """The layers that the input drives, in a run of the exact network."""
    neurons, _, _ = find_neurons(model.net)
    currents: dict[str, list[Tensor]] = {name: [] for name in rows}
    spikes: dict[str, list[Tensor]] = {name: [] for name in rows}

    def note(name: str, module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        currents[name].append(first_argument(args, kwargs).clone())
        spikes[name].append(output.clone())  # the network may add to them in place

    with ExitStack() as stack:
        for name in rows:
            module: Any = neurons[name].module
            hook = module.register_forward_hook(partial(note, name), with_kwargs=True)
            stack.callback(hook.remove)
        model(images)
    apart = isinstance(model, SpikingEventClassifier)
    found = {}
    for name, norms in rows.items():
        joined = torch.cat if neurons[name].module.step_mode == "m" else torch.stack
        x_seq = joined(currents[name])
        spike_seq = joined(spikes[name])
        steps = list(_steps(neurons[name], x_seq, spike_seq, norms, apart=apart))
        found[name] = _Layer(neurons[name], steps)
    return found


def _steps(
    neuron: Neuron, x_seq: Tensor, spike_seq: Tensor, norms: Tensor, *, apart: bool
) -> Iterator[_Step]:
    """Steps of a layer; ``norms`` are those of the map from the image to one step's current.

    With ``apart``, the steps of the input are perturbed apart from each other.
    """
    module = neuron.module
    charging = neuron.charging()
    decay = charging.decay_value
    v = torch.full_like(x_seq[0], neuron.initial)
    reach = torch.zeros_like(v)  # squared, where the steps are perturbed apart
    for t, (x, spike) in enumerate(zip(x_seq, spike_seq, strict=True)):
        gain = float(charging.gain_at(t, input_gain=True))
        h = charge(v, x, decay=decay, gain=gain, v_reset=module.v_reset)
        if apart:
            reach = decay**2 * reach + gain**2
            slope = reach.sqrt() * norms
        else:
            reach = decay * reach + gain
            slope = reach.abs() * norms
        yield _Step(gain=gain, before=v, h=h, slope=slope)
        v = reset(h, spike, v_threshold=module.v_threshold, v_reset=module.v_reset)
        if module.v_reset is not None:
            reach = (1.0 - spike) * reach


class _CurrentsRun(BoundedRun):
    """A run that notes the currents of some layers, in which any spike may be there."""

    def __init__(self, neurons: dict[str, Neuron], samples: int, names: list[str]) -> None:
        super().__init__(neurons, samples)
        self.currents: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
        self.of_input = {0}
        """Leaves to which the input leads past all spiking layers."""

    def passes_functions(self, read: ReadCall) -> bool:
        """Whether the input reaches a call through something other than affine maps, such as a
        product with spikes, and past all spiking layers.
        """
        return bool(read.leaves & (self.of_input - {0}))

    def _reached(self, call: LayerCall) -> None:
        x = call.current
        if call.by is None:
            if call.read.leaves & self.of_input:
                self.of_input.add(call.read.leaf)
            return
        if self.passes_functions(call.read):
            raise _NotAffineError(call.by.name)
        if call.by.name not in self.currents:
            return
        size = Interval(x.lower, x.upper).size()
        currents = self.currents[call.by.name]
        if call.batch_dim:
            currents += zip(x.error, size, strict=True)
        else:
            currents.append((x.error, size))

    def spikes(self, neuron: Neuron, x_seq: Interval) -> Interval:
        return Interval(torch.zeros_like(x_seq.low), torch.ones_like(x_seq.high))


def _rounding(
    model: SpikingClassifier,
    programs: Programs,
    images: Tensor,
    radius: Tensor,
    names: list[str],
) -> dict[str, _Rounding]:
    """What float32 rounds of the currents of layers, for images within a radius [N] of each."""
    run = _CurrentsRun(programs.neurons, len(images), names)
    bounded_logits(model, run, images, along(radius, 0, images.ndim), programs=programs)
    if run.structure.calls[-1].leaves & run.of_input:
        raise NotImplementedError(
            "the input reaches the logits past all spiking layers, so no radius keeps them"
        )
    found = {}
    for name, steps in run.currents.items():
        errors, sizes = zip(*steps, strict=True)
        found[name] = _Rounding(error=torch.stack(errors), size=torch.stack(sizes))
    return found


class _FoundError(Exception):
    """The rest of the network need not run."""


def _currents(model: SpikingClassifier, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Currents [T, N, *] of layers that stay silent, of those that the network calls."""
    with _silent(model, names) as noted, suppress(_FoundError):
        model(images)
    return noted.stacked()


class _NotedCurrents:
    """Currents of layers, step by step; the last one ends the run."""

    def __init__(self, names: list[str], T: int) -> None:
        self.steps: dict[str, list[Tensor]] = {name: [] for name in names}
        self.T = T

    def note(self, name: str, steps: Iterable[Tensor]) -> None:
        """Keep some more."""
        self.steps[name].extend(steps)
        is_complete = all(len(found) == self.T for found in self.steps.values())
        if is_complete:
            raise _FoundError

    def stacked(self) -> dict[str, Tensor]:
        """All of each layer that ran, [T, N, *]."""
        return {name: torch.stack(steps) for name, steps in self.steps.items() if steps}


@contextmanager
def _silent(model: SpikingClassifier, names: list[str]) -> Iterator[_NotedCurrents]:
    """Context in which layers give no spikes, and their currents are noted."""
    noted = _NotedCurrents(names, model.T)

    def forward(name: str, single: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        noted.note(name, [x] if single else x.unbind(0))
        return torch.zeros_like(x)

    with ExitStack() as stack:
        for name in names:
            module: Any = model.net.get_submodule(name)
            single = getattr(module, "step_mode", "m") != "m"
            stack.enter_context(other_forward(module, partial(forward, name, single)))
        yield noted
