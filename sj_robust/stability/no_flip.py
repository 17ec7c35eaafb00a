"""The L2 radius in which no spike of the first spiking layer can flip, so that the network's output
stays as it is.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from sj_robust._checks import check_count, check_images
from sj_robust._environment import device_of
from sj_robust._preserved import full_precision, preserved
from sj_robust.classifier import SpikingClassifier, SpikingEventClassifier, check_classifier
from sj_robust.neuron.charging import Neuron, find_neurons
from sj_robust.stability._affine import other_forward

__all__ = ["no_flip_radius"]


def no_flip_radius(model: SpikingClassifier, x: Tensor, *, batch_size: int = 64) -> Tensor:
    """Largest L2 perturbation of each image below which no spike that the input drives can flip.
    首层脉冲不翻转的半径。

    Equation, for neuron i with potential h before firing, w_i the row of the linear map from the
    image to its current and a[t, k] the part of the current of step k that is left in h[t] (decays
    and gains since k, 0 before a hard reset)::

        radius = min over i, t of |h_i[t] - v_threshold| / (|sum_k a_i[t, k]| * ||w_i||_2)

    Below it all spikes, and so the logits, stay exactly as they are: this is where the linear
    regime of the perturbation dynamics ends. At the radius there is a direction (along w_i) that
    brings one potential to the threshold, so it is the largest of its kind, up to images leaving
    [0, 1]. For event frames, whose steps are perturbed apart, ``sqrt(sum_k a^2)`` stands in place
    of the sum. Usually it is tiny. Computed in float64; in float32 a spike within rounding of the
    threshold can differ.

    Args:
        model: A classifier; it is copied to float64 and runs in evaluation mode.
        x: Images [N, C, H, W] or features [N, F] in [0, 1]; of a ``SpikingEventClassifier`` frames
            [N, T, C, H, W].
        batch_size: Images at a time.

    Returns:
        Radii [N] in float64.

    Raises:
        TypeError: If ``model`` is no ``SpikingClassifier``.
        ValueError: If images are not finite or outside [0, 1].
        NotImplementedError: If a neuron that the input drives has no known dynamics, the map to it
            is not affine, an encoder draws, or the input reaches the logits past all neurons.

    Source: derived here; it is the exact range of the perturbation dynamics without flips of Ding
        et al. (ICML 2024).

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
    with full_precision(device_of(model)), torch.no_grad(), preserved(model):
        exact = copy.deepcopy(model).double().eval()
        images = x.detach().to(device_of(model)).double()
        exact.find_convention(images)  # before anything is replaced
        rows = _row_norms(exact, images[:1], batch_size)
        parts = [_radii(exact, part, rows) for part in torch.split(images, batch_size)]
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)


def _row_norms(model: SpikingClassifier, image: Tensor, batch_size: int) -> dict[str, Tensor]:
    """L2 norm of the map from the image to the current of one step, [neurons] by layer that the
    input reaches.

    For event frames the map is from the frame of the step.
    """
    neurons, others, _ = find_neurons(model.net, {}, {})
    frames = isinstance(model, SpikingEventClassifier)
    at_zero, logits = _currents(model, torch.zeros_like(image), [*neurons, *others])
    generator = torch.Generator().manual_seed(0)
    probes = torch.rand((2, *image.shape[1:]), generator=generator, dtype=torch.float64).to(image)
    if frames:  # the same frame in every step, so that its steps can be compared
        probes = probes[:, :1].expand_as(probes).contiguous()
    found, moved = _currents(
        model, torch.cat((probes, probes[:1] + 2 * probes[1:])), [*neurons, *others]
    )
    if not _close(moved, logits):
        raise NotImplementedError(
            "the input reaches the logits past all spiking layers, so no radius keeps them"
        )
    reached = {}
    for name, current in found.items():
        change = current - at_zero[name]
        if not bool(change.any()):
            continue
        if name not in neurons or not neurons[name].binary:
            reason = others.get(name, "its surrogate does not spike")
            raise NotImplementedError(
                f"{name}, which the input drives, cannot be followed: {reason}"
            )
        if not (
            _close(change[:, 2], change[:, 0] + 2 * change[:, 1]) and _close(change, change[:1])
        ):
            raise NotImplementedError(
                f"what leads from the input to {name} is not one affine map for every time step"
            )
        reached[name] = torch.zeros_like(at_zero[name][0, 0])
    elements = image[0, :1].numel() if frames else image.numel()
    for start in range(0, elements, batch_size):
        numbers = torch.arange(start, min(start + batch_size, elements), device=image.device)
        basis = torch.zeros((len(numbers), elements), dtype=image.dtype, device=image.device)
        basis[range(len(numbers)), numbers] = 1.0
        if frames:
            basis = basis.view(len(numbers), 1, *image.shape[2:]).expand(
                len(numbers), *image.shape[1:]
            )
        currents, _ = _currents(
            model, basis.reshape(len(numbers), *image.shape[1:]), list(reached), whole=False
        )
        for name, squares in reached.items():
            squares += (currents[name][0] - at_zero[name][0]).square().sum(0)
    return {name: squares.sqrt() for name, squares in reached.items()}


def _radii(model: SpikingClassifier, images: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """Radius of every image [N]."""
    neurons = find_neurons(model.net, {}, {})[0]
    apart = isinstance(model, SpikingEventClassifier)
    radius = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in rows}
    with ExitStack() as stack:
        for name, seen in calls.items():
            hook = neurons[name].module.register_forward_hook(
                lambda _, args, output, seen=seen: seen.append((args[0], output))
            )
            stack.callback(hook.remove)
        model(images)
    for name, norms in rows.items():
        joined = torch.cat if neurons[name].module.step_mode == "m" else torch.stack
        x_seq, spike_seq = (joined(parts) for parts in zip(*calls[name], strict=True))
        for distance, reach in _steps(neurons[name], x_seq, spike_seq, apart):
            radius = torch.minimum(
                radius, (distance / (reach * norms)).nan_to_num(torch.inf).flatten(1).amin(1)
            )
    return radius


def _steps(
    neuron: Neuron, x_seq: Tensor, spike_seq: Tensor, apart: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per step, the distance of h from the threshold and how much of the currents' perturbation is
    in it, [N, *].
    """
    module, charging = neuron.module, neuron.charging()
    decay = charging.decay
    hard = module.v_reset is not None
    v = torch.full_like(x_seq[0], module.v_reset or 0.0)
    reach = torch.zeros_like(v)  # squared, where the steps are perturbed apart
    for t, (x, spike) in enumerate(zip(x_seq, spike_seq, strict=True)):
        gain = charging.gain_at(t, input_gain=True)
        h = decay * v + gain * x + ((1.0 - decay) * module.v_reset if hard else 0.0)
        reach = decay**2 * reach + gain**2 if apart else decay * reach + gain
        yield (h - module.v_threshold).abs(), reach.sqrt() if apart else reach.abs()
        v = (1.0 - spike) * h + spike * module.v_reset if hard else h - spike * module.v_threshold
        reach = (1.0 - spike) * reach if hard else reach


class _FoundError(Exception):
    """What lies behind need not run."""


def _currents(
    model: SpikingClassifier, images: Tensor, names: list[str], *, whole: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Currents [T, N, *] of layers, and the logits, of a run in which these layers stay silent.

    If it need not be the ``whole`` run, it ends with the last of these currents, and there are no
    logits.
    """
    currents: dict[str, list[Tensor]] = {name: [] for name in names}

    def silent(name: str, multi_step: bool) -> Any:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            currents[name].extend(x.unbind(0) if multi_step else [x])
            if not whole and all(len(steps) == model.T for steps in currents.values()):
                raise _FoundError
            return torch.zeros_like(x)

        return forward

    with ExitStack() as stack:
        for name in names:
            module: Any = model.net.get_submodule(name)
            stack.enter_context(
                other_forward(module, silent(name, getattr(module, "step_mode", "m") == "m"))
            )
        logits = torch.empty(0)
        with suppress(_FoundError):
            logits = model(images)
    return {name: torch.stack(steps) for name, steps in currents.items() if steps}, logits


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-9 * (1 + b.abs().max())).all())
