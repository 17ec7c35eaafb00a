"""What the figures show, as plain numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.saved import SavedResult, plain
from sj_robust.evaluation import Report
from sj_robust.models.checkpoint import load_checkpoint
from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import membrane_potential, simplified_perturbation
from sj_robust.perturbation.dynamics import full_perturbation

_DECAY, _THRESHOLD = 0.9, 1.0
"""Of the neuron of figure 1."""


@dataclass(frozen=True)
class OneNeuron(
    SavedResult, what="the numbers of a figure", format="sj_robust.figure.neuron", version=1
):
    """One neuron under two perturbations of its input current.

    Attributes:
        settings: Neuron, current and perturbations, steps and seed.
        cases: For ``"constant"`` and ``"gaussian"``, per step: ``v`` and ``v_perturbed`` (after the
            reset), ``spike`` and ``spike_perturbed``, ``full``, ``simplified``, ``std`` and
            ``tasad`` (of the steps so far).
    """

    settings: dict[str, float]
    cases: dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class InputGains(
    SavedResult, what="the numbers of a figure", format="sj_robust.figure.gains", version=1
):
    """The learnable input gain p[t] of every DLIF layer: by network and layer, a number per
    step.
    """

    networks: dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class TrainingCurves(
    SavedResult, what="the numbers of a figure", format="sj_robust.figure.curves", version=1
):
    """Losses and validation accuracy: by network, a record per epoch with the fields of
    ``EpochRecord``.
    """

    networks: dict[str, list[dict[str, Any]]]


def one_neuron(*, steps: int = 30, seed: int = 0) -> OneNeuron:
    """Perturb the constant input current of one LIF neuron by a constant and by Gaussian noise.

    Equation, with ``s`` the spikes, ``u`` the potentials and ``eps`` the simplified perturbation::

        full[t] = u[t] - u~[t],    simplified[t] = eps[t] = decay * eps[t-1] + x[t] - x~[t]
        std[t] = mean_{k <= t} |s[k] - s~[k]|
        tasad[t] = |mean_{k <= t} s[k] - mean_{k <= t} s~[k]|

    The clean current is 0.3; 0.1 is added, or noise of standard deviation 0.3. The decay is 0.9,
    the threshold 1.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), figure 1.

    Examples:
        >>> case = one_neuron(steps=3).cases["constant"]
        >>> [round(value, 3) for value in case["simplified"]]
        [-0.1, -0.19, -0.271]
    """
    settings = {
        "decay": _DECAY,
        "v_threshold": _THRESHOLD,
        "current": 0.3,
        "shift": 0.1,
        "std": 0.3,
    }
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((steps, 1), settings["current"], dtype=torch.float64)
    noise = settings["std"] * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    perturbed = {"constant": x + settings["shift"], "gaussian": x + noise}
    cases = {name: _case(x, other) for name, other in perturbed.items()}
    return OneNeuron(settings | {"steps": steps, "seed": seed}, cases)


def input_gains(models: Mapping[str, nn.Module]) -> InputGains:
    """The gain p[t] of every DLIF layer of networks, as in figure 4 of the paper; those without one
    are left out.

    Raises:
        ValueError: If no network has a DLIF neuron.

    Examples:
        >>> input_gains({"mine": nn.Sequential(DLIFNode(T=2))}).networks
        {'mine': {'0': [1.0, 1.0]}}
    """
    found = {name: _gains_of(model) for name, model in models.items()}
    found = {name: layers for name, layers in found.items() if layers}
    if not found:
        raise ValueError(
            f"none of the networks {', '.join(models)} has a DLIF neuron, whose gain p[t] is "
            "drawn; train one with --neuron dlif"
        )
    return InputGains(found)


def training_curves(folder: Path) -> TrainingCurves:
    """What a run of ``recipes/adv_train.py`` kept of every epoch: the curves in its
    ``report.json``.

    For a run that is not finished, or a network's own folder, the histories in its ``last.pt`` are
    taken.

    Raises:
        ValueError: If the folder holds no history.
    """
    report = folder / "report.json"
    networks: dict[str, list[dict[str, Any]]] = (
        Report.load(report).curves if report.is_file() else {}
    )
    if not networks:
        for path in (*folder.glob("last.pt"), *sorted(folder.glob("*/last.pt"))):
            networks[path.parent.name] = plain(load_checkpoint(path).get("history", []))
    networks = {name: records for name, records in networks.items() if records}
    if not networks:
        raise ValueError(
            f"{folder} holds no training history, neither curves in report.json nor a last.pt "
            "with epochs; give the folder of a run of recipes/adv_train.py that finished at "
            "least one epoch"
        )
    return TrainingCurves(networks)


def _gains_of(model: nn.Module) -> dict[str, list[float]]:
    return {
        layer: module.input_gain.detach().double().tolist()
        for layer, module in model.named_modules()
        if isinstance(module, DLIFNode)
    }


def _case(x: Tensor, x_perturbed: Tensor) -> dict[str, list[float]]:
    v, v_perturbed = (
        membrane_potential(a, decay=_DECAY, v_threshold=_THRESHOLD) for a in (x, x_perturbed)
    )
    spike, spike_perturbed = _spikes(x, v), _spikes(x_perturbed, v_perturbed)
    so_far = torch.arange(1, len(x) + 1)[:, None]
    series = {
        "v": v,
        "v_perturbed": v_perturbed,
        "spike": spike,
        "spike_perturbed": spike_perturbed,
        "full": full_perturbation(v, v_perturbed),
        "simplified": simplified_perturbation(x, x_perturbed, decay=_DECAY),
        "std": (spike - spike_perturbed).abs().cumsum(0) / so_far,
        "tasad": (spike - spike_perturbed).cumsum(0).abs() / so_far,
    }
    return {name: values.flatten().tolist() for name, values in series.items()}


def _spikes(x: Tensor, v: Tensor) -> Tensor:
    """Spikes of the potentials ``v`` after the reset."""
    before = torch.cat((torch.zeros_like(v[:1]), v[:-1]))
    return (_DECAY * before + x >= _THRESHOLD).to(x.dtype)
