"""What a network of clipped ReLUs keeps when spikes run its weights, beside trainings with spikes.

python recipes/studies/twins.py digits                           # each takes hours on a core
python recipes/studies/twins.py fashion_mnist --root FOLDER '--more=--data-root FOLDER'
python recipes/studies/twins.py cifar10 '--more=--dataset image_folder:FOLDER'

It trains as twins.yaml says, and evaluates with the suite standard and its control. runs/twins
keeps trainings and reports; a stopped command goes on. It writes twins.csv and the tables of
twins.md.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from spikingjelly.activation_based import neuron
from tables import RESULTS, ROOT, first_images, once, run_recipe, write_page
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from twins_tables import PAGE, tables

from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import Report, evaluate, from_checkpoint
from sj_robust.evaluation.run.suites import SuiteName
from sj_robust.ops import keep_heap
from sj_robust.training import convert

STUDY = Path(__file__).with_suffix(".yaml")
START = "{start}"
FEW_STEPS, GAIN_FALL = 4, 0.3
"""Up to how many steps gains that fall are tried, and how far, as validation images chose."""


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
        for network, T in networks(training, options.steps or study["steps"]):
            grid.append({"data": options.data, "network": network, "T": T, "seed": seed})
    once(options.output / "twins.csv", grid, partial(measured, study=study, options=options))
    write_page(options.output / PAGE, tables(options.output))


def networks(training: str, steps: Sequence[int]) -> list[tuple[str, str]]:
    """Networks with the weights of a training, each with the steps in which spikes run a twin."""
    if training != "twin":
        return [(training, "")]
    falling = [("falling", str(T)) for T in steps if T <= FEW_STEPS]
    return [("relu", ""), *((training, str(T)) for T in steps), *falling]


def measured(
    data: str, network: str, T: str, seed: int, study: dict[str, Any], options: Options
) -> dict[str, object]:
    """The figures of one network: accuracies in per cent, spikes and operations per image."""
    training = "twin" if network in ("relu", "falling") else network
    run = options.runs / data / f"{training}-{seed}"
    start = options.runs / data / f"start-{seed}"
    words = study["trainings"][training]
    given = f"--judged 0 --seed {seed} {options.more}"
    if START in words:
        run_recipe("adv_train.py", shlex.split(f"{study['start']} {given}"), start)
        words = words.replace(START, shlex.quote(str(start / "dlif_twin_at" / "best.pt")))
    run_recipe("adv_train.py", shlex.split(f"{words} {given}"), run)
    trained = from_checkpoint(min(run.glob("*/best.pt")).parent)  # of a twin, its ReLUs: by name
    dataset, count = trained.options["dataset"], options.images or study["images"]
    x, y = first_images(dataset, count, root=options.root)
    model = trained.model.eval()
    if T:
        fall = GAIN_FALL if network == "falling" else 0.0
        model = convert(model, x[:1], T=int(T), gain_fall=fall)
    judge = partial(evaluate, model, eps=study["eps"], progress=False)
    path = run / f"{options.suite}-{network}{T}-{count}.json"
    if not path.exists():
        judge(x, y, suite=options.suite).save(path)
    report = Report.load(path)
    found = {"suite": options.suite, "images": len(report.labels), "eps": study["eps"]}
    shares = {"clean": report.clean, "left": report.everything, "proved": report.verified}
    found |= {name: percent(share) for name, share in shares.items()}
    found |= cost(model, x)
    known = None
    if not T:  # on training images: the training gradient alone, and every gradient
        train = load_images(dataset, root=options.root, augment=False).train
        known = judge(*next(iter(image_loader(train, min(128, count)))), suite="fast")
    found["learned"] = percent(known and known.control)
    return found | {"learned_left": percent(known and known.everything)}


def percent(share: Any) -> str:
    """An accuracy as the table has it, nothing for None."""
    return "" if share is None else f"{100 * share.accuracy:.1f}"


@torch.no_grad()
def cost(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Spikes per image, and synaptic operations: weights that spikes, or for ReLUs numbers other
    than zero, meet in the layers behind the first.
    """
    model(x[:1])  # may try how the network is called
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    seen = register_module_forward_hook(lambda layer, x, y: calls.append((layer, x[0], y)))
    with seen:
        model(x)
    fired = [y.count_nonzero() for layer, _, y in calls if isinstance(layer, neuron.BaseNode)]
    weighted = [call for call in calls if isinstance(call[0], nn.Conv2d | nn.Linear)]
    met = []
    for layer, given, _ in weighted[1:]:  # weights of 1 count what they meet
        ones = {name: torch.full_like(p, name == "weight") for name, p in layer.named_parameters()}
        met.append(functional_call(layer, ones, (given != 0).float()).sum(dtype=torch.float64))
    sums = {"spikes": fired, "operations": met}
    return {name: f"{float(sum(parts)) / len(x):.0f}" for name, parts in sums.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_heap()
    main(tyro.cli(Options))
