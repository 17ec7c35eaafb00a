"""Numbers of the figures of one neuron, input gains and training curves."""

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

_DECAY = 0.9
"""Decay of the neuron of figure 1."""
_THRESHOLD = 1.0
"""Its threshold."""


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

    Equation, with ``x`` the currents, ``u`` the potentials, ``s`` the spikes and ``~`` for those of
    the perturbed run::

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
    """The gain p[t] of every DLIF layer of networks, as in figure 4 of the paper; networks without
    a DLIF layer are left out.

    Raises:
        ValueError: If no network has a DLIF neuron.

    Examples:
        >>> input_gains({"mine": nn.Sequential(DLIFNode(T=2))}).networks
        {'mine': {'0': [1.0, 1.0]}}
    """
    found = {}
    for name, model in models.items():
        layers = _gains_of(model)
        if layers:
            found[name] = layers
    if not found:
        raise ValueError(
            f"none of the networks {', '.join(models)} has a DLIF neuron, whose gain p[t] is "
            "drawn; train one with --neuron dlif"
        )
    return InputGains(found)


def training_curves(folder: Path) -> TrainingCurves:
    """The records of every epoch of a run of ``recipes/adv_train.py``.

    They are the curves in its ``report.json``; of a run that is not finished, and in the folder of
    a single network, the histories in the files ``last.pt``.

    Raises:
        ValueError: If the folder holds no history.
    """
    networks: dict[str, list[dict[str, Any]]] = {}
    report = folder / "report.json"
    if report.is_file():
        networks = Report.load(report).curves
    if not networks:
        for path in (*folder.glob("last.pt"), *sorted(folder.glob("*/last.pt"))):
            checkpoint = load_checkpoint(path)
            networks[path.parent.name] = plain(checkpoint.get("history", []))
    networks = {name: records for name, records in networks.items() if records}
    if not networks:
        raise ValueError(
            f"{folder} holds no training history, neither curves in report.json nor a last.pt "
            "with epochs; give the folder of a run of recipes/adv_train.py that finished at "
            "least one epoch"
        )
    return TrainingCurves(networks)


def _gains_of(model: nn.Module) -> dict[str, list[float]]:
    """Gains of every DLIF layer, a number per step."""
    return {
        layer: module.input_gain.detach().double().tolist()
        for layer, module in model.named_modules()
        if isinstance(module, DLIFNode)
    }


def _case(x: Tensor, x_perturbed: Tensor) -> dict[str, list[float]]:
    """Everything that figure 1 shows of two currents [T, 1], a number per step."""
    v = membrane_potential(x, decay=_DECAY, v_threshold=_THRESHOLD)
    v_perturbed = membrane_potential(x_perturbed, decay=_DECAY, v_threshold=_THRESHOLD)
    spike = _spikes(x, v)
    spike_perturbed = _spikes(x_perturbed, v_perturbed)
    difference = spike - spike_perturbed
    steps = torch.arange(1, len(x) + 1)[:, None]
    series = {
        "v": v,
        "v_perturbed": v_perturbed,
        "spike": spike,
        "spike_perturbed": spike_perturbed,
        "full": full_perturbation(v, v_perturbed),
        "simplified": simplified_perturbation(x, x_perturbed, decay=_DECAY),
        "std": difference.abs().cumsum(0) / steps,
        "tasad": difference.cumsum(0).abs() / steps,
    }
    return {name: values.flatten().tolist() for name, values in series.items()}


def _spikes(x: Tensor, v: Tensor) -> Tensor:
    """Spikes of a neuron whose potentials after the reset are ``v``."""
    before = torch.cat((torch.zeros_like(v[:1]), v[:-1]))
    charged = _DECAY * before + x
    return (charged >= _THRESHOLD).to(x.dtype)
