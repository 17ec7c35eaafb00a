"""What a network of clipped ReLUs keeps when spikes run its weights, beside trainings with spikes.

python recipes/studies/twins.py digits                           # each takes hours on a core
python recipes/studies/twins.py fashion_mnist --root FOLDER '--more=--data-root FOLDER'
python recipes/studies/twins.py cifar10 '--more=--dataset image_folder:FOLDER'

It trains as twins.yaml says, and evaluates with the suite standard and its control. runs/twins
keeps trainings and reports; a stopped command goes on. It writes twins.csv and the tables of
twins.md.
"""

import shlex
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro
import yaml
from tables import (
    RESULTS,
    ROOT,
    Row,
    first_images,
    groups,
    numbers,
    once,
    read_table,
    run_recipe,
    with_spread,
    write_page,
)
from torch import Tensor, nn
from torch.nn import functional

from sj_robust.core.host import is_neuron
from sj_robust.core.preserved import from_reset
from sj_robust.core.saved import markdown_table
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import Report, evaluate, from_checkpoint
from sj_robust.evaluation.run.suites import SuiteName
from sj_robust.ops import keep_heap
from sj_robust.training import convert

PAGE = "twins.md"
STUDY = Path(__file__).with_suffix(".yaml")
NAMES = {
    "relu": "clipped ReLUs (twin)",
    "twin": "the twin's weights, DLIF",
    "at": "AT, LIF",
    "ms_mppd_at": "AT with MS-MPPD, DLIF",
    "mtl_ibp": "MTL-IBP, DLIF",
    "certified": "certified, DLIF",
}


@dataclass(frozen=True)
class Options:
    """What is trained and evaluated."""

    data: tyro.conf.Positional[str]
    seeds: tuple[int, ...] = (0, 1, 2)
    trainings: tuple[str, ...] = ()
    """Without names, all of twins.yaml."""
    steps: tuple[int, ...] = ()
    """Without numbers, those of twins.yaml."""
    images: int | None = None
    suite: SuiteName = "standard"
    more: str = ""
    """Further options of adv_train.py."""
    root: str = "data"
    """Of the images."""
    runs: Path = ROOT / "runs" / "twins"
    output: Path = RESULTS


def main(options: Options) -> None:
    """Train and evaluate what is not in the table."""
    study = yaml.safe_load(STUDY.read_text(encoding="utf-8"))[options.data]
    grid = []
    for seed, training in product(options.seeds, options.trainings or study["trainings"]):
        names: list[tuple[str, int | None]] = [(training, None)]
        if training == "twin":
            steps = options.steps or study["steps"]
            names = [("relu", None), *((training, T) for T in steps)]
        for name, T in names:
            grid.append({"data": options.data, "network": name, "T": T or "", "seed": seed})
    once(options.output / "twins.csv", grid, partial(measured, study=study, options=options))
    write_page(options.output / PAGE, tables(options.output))


def measured(
    data: str, network: str, T: int | str, seed: int, study: dict[str, Any], options: Options
) -> dict[str, object]:
    """The figures of one network: accuracies in per cent, spikes and operations per image."""
    training = "twin" if network == "relu" else network
    run = options.runs / data / f"{training}-{seed}"
    words = shlex.split(f"{study['trainings'][training]} --judged 0 {options.more}")
    run_recipe("adv_train.py", [*words, "--seed", str(seed)], run)
    # a twin is the first of its run's networks by name, any other the only one
    subject = from_checkpoint(sorted(run.glob("*/best.pt"))[0].parent)
    count = options.images or int(study["images"])
    x, y = first_images(subject.options["dataset"], count, root=options.root)
    model = subject.model if network != "twin" else convert(subject.model, x[:1], T=int(T))
    path = run / f"{options.suite}-{network}{T}.json"
    if path.exists():
        report = Report.load(path)
    else:
        report = evaluate(model, x, y, eps=study["eps"], suite=options.suite, progress=False)
        report.save(path)
    spikes, operations = cost(model.eval(), x)
    gap = {"learned": "", "learned_left": ""}
    if network != "twin":  # on training images: the training gradient alone, and every gradient
        splits = load_images(subject.options["dataset"], root=options.root, augment=False)
        x, y = next(iter(image_loader(splits.train, min(128, count))))
        known = evaluate(model, x, y, eps=study["eps"], suite="fast", progress=False)
        assert known.control is not None  # fast has one
        gap = {
            "learned": f"{100 * known.control.accuracy:.1f}",
            "learned_left": f"{100 * known.everything.accuracy:.1f}",
        }
    return {
        "suite": options.suite,
        "images": len(report.labels),
        "eps": study["eps"],
        "clean": f"{100 * report.clean.accuracy:.1f}",
        "left": f"{100 * report.everything.accuracy:.1f}",
        "proved": "" if report.verified is None else f"{100 * report.verified.accuracy:.1f}",
        "spikes": f"{spikes:.0f}",
        "operations": f"{operations:.0f}",
        **gap,
    }


def cost(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Spikes per image, and synaptic operations: weights that spikes, or for ReLUs numbers other
    than zero, meet in the layers behind the first.
    """
    counts = {"spikes": 0.0, "operations": 0.0}
    called: list[nn.Module] = []

    def fired(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts["spikes"] += float((output != 0).sum())

    def weighted(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        called.append(module)
        if module is called[0]:
            return
        given = (inputs[0] != 0).float()
        ones = torch.ones_like(module.weight[:1])  # every output channel meets the same inputs
        given = given.flatten(0, given.ndim - (4 if ones.ndim == 4 else 2))
        if ones.ndim == 4:
            met = functional.conv2d(given, ones, None, module.stride, module.padding)
        else:
            met = functional.linear(given, ones)
        counts["operations"] += float(met.sum()) * len(module.weight)

    handles = []
    for module in model.modules():
        if is_neuron(module):
            handles.append(module.register_forward_hook(fired))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(weighted))
    with torch.no_grad(), from_reset(model, 0, x.device):
        model(x)
    for handle in handles:
        handle.remove()
    return counts["spikes"] / len(x), counts["operations"] / len(x)


def tables(folder: Path) -> dict[str, str]:
    """A table for every data set, the most robust network first."""
    found, gaps = {}, []
    heads = ["network", "T", "seeds", "clean, %", "left, %", "proved, %", "spikes", "operations"]
    for (data,), of_data in groups(read_table(folder / "twins.csv"), "data").items():
        cells = []
        for (network, T), rows in groups(of_data, "network", "T").items():
            line = [NAMES[network], T, str(len(rows))]
            line += [with_spread(numbers(rows, name)) for name in ("clean", "left", "proved")]
            if network != "twin":
                learned = [with_spread(numbers(rows, name)) for name in ("learned", "learned_left")]
                gaps.append([data, NAMES[network], *learned])
            cells.append([*line, *(mean(rows, name) for name in ("spikes", "operations"))])
        found[data] = markdown_table(heads, cells)
    heads = ["data", "network", "training gradient, %", "all attacks, %"]
    return found | {"learned": markdown_table(heads, gaps, words=2)}


def mean(rows: list[Row], column: str) -> str:
    """The mean of a column, nothing for zero."""
    value = fmean(numbers(rows, column))
    return f"{value:,.0f}" if value else ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_heap()
    main(tyro.cli(Options))
