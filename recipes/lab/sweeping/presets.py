"""Presets of the paper's tables, one file per cell, and the sweeps over them: written here, so that none is mistyped.

python -m lab.sweeping.presets recipes/configs
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["preset_files", "write_presets"]

_DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
_MODELS = {"vgg11": ("VGG-11", 1e-3), "wrn16_4": ("WRN-16-4", 4e-3)}
"""Title and strength of the retraction."""
_MODES = {
    "none": ("no defence", "4/255", 5e-4),
    "gaussian": ("Gaussian noise", "8/255", 5e-4),
    "at": ("single-step adversarial training", "4/255", 5e-4),
    "rat": ("single-step adversarial training and retraction (SNN-RAT)", "4/255", 0.0),
}
"""Title, radius of the training, weight decay."""
_INDICATORS = {"mppd": "MS-MPPD", "tasad": "TASAD in its place", "std": "STD in its place"}
_NEURONS = ("lif", "dlif")
_RHOS = (0.0, 1.0)

_RECIPE = {
    "T": 8,
    "tau": 100.0,
    "augment": True,
    "eval_eps": "8/255",
    "kappa": 0.5,
    "epochs": 100,
    "batch_size": 64,
    "lr": 0.1,
    "momentum": 0.9,
    "mixed_precision": "fp16",
    "reference": False,
}
"""What all cells share; the decay of the potential is 1 - 1 / tau = 0.99."""

_NOTES = """\
# Needs a GPU for fp16; elsewhere add --mixed-precision no. --download true fetches the data set.
# The epoch is chosen on a tenth of the training images, by PGD-7 accuracy (clean accuracy with mode none), where the
# published code chooses on the test images.
"""
_ATTACK_NOTE = """\
# project false is the paper's form: its attack may leave the ball of eps by the noise at its start.
"""


def preset_files() -> dict[str, str]:
    """Text of every generated file by its name below ``recipes/configs``. 生成全部预设文件。

    Returns:
        ``paper/DATASET_MODEL_MODE_NEURON_rhoR.yaml`` for each cell of the paper's tables (without ``rhoR`` for mode
        none, where it changes nothing), ``paper/cifar10_vgg5_at_dlif_INDICATOR.yaml``, and
        ``sweeps/DATASET_MODEL_sweep.yaml``, ``sweeps/cifar10_vgg5_indicators_sweep.yaml`` with all cells of a table.

    Source: Ding et al. (ICML 2024), section 5 and appendix; hyperparameters of their published code.

    Examples:
        >>> files = preset_files()
        >>> yaml.safe_load(files["paper/cifar10_wrn16_4_rat_dlif_rho1.yaml"])["beta"]
        0.004
    """
    files = {}
    for dataset, model in itertools.product(_DATASETS, _MODELS):
        for mode, neuron, rho in itertools.product(_MODES, _NEURONS, _RHOS):
            if mode == "none" and rho == 0:
                continue
            name = f"{dataset}_{model}_{mode}_{neuron}" + ("" if mode == "none" else f"_rho{rho:g}")
            files[f"paper/{name}.yaml"] = _cell(dataset, model, mode, neuron, rho)
        files[f"sweeps/{dataset}_{model}_sweep.yaml"] = _table(dataset, model)
    for indicator in ("none", *_INDICATORS):
        name = "rho0" if indicator == "none" else indicator
        files[f"paper/cifar10_vgg5_at_dlif_{name}.yaml"] = _indicator(indicator)
    files["sweeps/cifar10_vgg5_indicators_sweep.yaml"] = _indicators()
    return files


def write_presets(folder: Path) -> list[Path]:
    """Write the generated files. 写出预设文件。

    Args:
        folder: ``recipes/configs``.

    Returns:
        The files.
    """
    paths = []
    for name, text in preset_files().items():
        paths.append(folder / name)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def _cell(dataset: str, model: str, mode: str, neuron: str, rho: float) -> str:
    regularised = f", rho {rho:g}" if mode != "none" else ""
    title = f"{_DATASETS[dataset]}, {_MODELS[model][0]}, {neuron.upper()}, {_MODES[mode][0]}{regularised}"
    options = _options(dataset, model, mode, neuron) | ({} if mode == "none" else {"rho": rho})
    if mode == "rat":
        options["beta"] = _MODELS[model][1]
    return _text(f"A cell of the paper's tables: {title}.", options, attacks=mode in ("at", "rat"))


def _indicator(indicator: str) -> str:
    options = _options("cifar10", "vgg5", "at", "dlif")
    options |= {"rho": 0.0} if indicator == "none" else {"rho": 1.0, "indicator": indicator}
    what = "neither MS-MPPD nor another" if indicator == "none" else _INDICATORS[indicator]
    return _text(f"The paper's study of indicators: CIFAR-10, VGG-5, DLIF, {what}.", options, attacks=True)


def _options(dataset: str, model: str, mode: str, neuron: str) -> dict[str, Any]:
    _, eps, weight_decay = _MODES[mode]
    options: dict[str, Any] = {"dataset": dataset, "model": model, "neuron": neuron, "mode": mode, "eps": eps}
    options |= {"project": False} if mode in ("at", "rat") else {}
    return options | _RECIPE | {"weight_decay": weight_decay}


def _text(title: str, options: dict[str, Any], *, attacks: bool) -> str:
    return f"# {title}\n{_NOTES}{_ATTACK_NOTE if attacks else ''}{_yaml(options)}"


def _table(dataset: str, model: str) -> str:
    title, beta = _MODELS[model]
    content = {
        "base": f"paper/{dataset}_{model}_at_dlif_rho1",
        "options": {"beta": beta},
        "grid": {
            "neuron": list(_NEURONS),
            "mode,eps,weight_decay": [[mode, eps, decay] for mode, (_, eps, decay) in _MODES.items()],
            "rho": list(_RHOS),
        },
        "evaluate": ["paper", "standard"],
        "contrast": ["rho"],
    }
    return f"# Every cell of the paper's table on {_DATASETS[dataset]} with {title}: 14 runs a seed.\n{_yaml(content)}"


def _indicators() -> str:
    content = {
        "base": "paper/cifar10_vgg5_at_dlif_mppd",
        "grid": {"rho": list(_RHOS), "indicator": list(_INDICATORS)},
        "evaluate": ["paper", "standard"],
        "contrast": ["indicator"],
    }
    return f"# The paper's study of indicators on CIFAR-10 with VGG-5: 4 runs a seed.\n{_yaml(content)}"


def _yaml(content: dict[str, Any]) -> str:
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110))


class _Dumper(yaml.SafeDumper):
    """Short lists in one line, and 1.0e-3 as 0.001."""


def _sequence(dumper: _Dumper, values: Sequence[Any]) -> Any:
    flat = not any(isinstance(value, list) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flat)


_Dumper.add_representer(list, _sequence)


if __name__ == "__main__":
    print(f"{len(write_presets(Path(sys.argv[1])))} files in {sys.argv[1]}")
