"""Is a network easier to prove robust if MS-MPPD was part of its training? What bounds prove over
eps, what attacks leave, and whether the measured perturbation of the potential predicts its bounds.

python recipes/sweep.py --sweep recipes/studies/proved_digits.yaml --jobs 2
python recipes/studies/proved.py digits          # half a minute per network on one core
python recipes/studies/proved.py fashion_mnist   # after proved_fashion_mnist.yaml
python recipes/studies/proved.py cifar10         # networks that are there; pictures in data/

Networks of which a table has all rows are not proved again, so that a stopped command continues.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import tyro
from proved_tables import PAGE, RADII, draw, tables
from tables import RESULTS, ROOT, Row, first_images, once, replace_rows, write_page
from torch import Tensor, nn

from sj_robust import compare_potentials
from sj_robust.attacks import SampleSeeds, ThreatModel, pgd
from sj_robust.core.eps import parse_eps
from sj_robust.evaluation import from_checkpoint, make_suite, search_estimators, worst_case
from sj_robust.proofs import verify

MEASURED = {"digits": "0.008", "fashion_mnist": "0.008", "cifar10": "1/255"}
"""The radius of the perturbations whose effect on the potential is measured."""
IMAGES = {"digits": 360, "fashion_mnist": 200, "cifar10": 100}


@dataclass(frozen=True)
class Options:
    """What is proved."""

    data: tyro.conf.Positional[Literal["digits", "fashion_mnist", "cifar10"]]
    images: int | None = None
    """Test images; None: those of the page."""
    pictures: str = "image_folder:data/cifar10_pictures"
    runs: Path = ROOT / "runs"
    output: Path = RESULTS


def main(options: Options) -> None:
    """Prove and attack the networks that are missing, then write the page and the figure."""
    path = options.output / "proved" / "networks.csv"
    of_layers = path.with_name("layers.csv")
    known = {found[0]["network"]: found for found in networks(options)}

    def measured(data: str, network: str) -> list[Row]:
        settings, dataset, root = known[network]
        x, y = first_images(dataset, options.images or IMAGES[data], root=root)
        model = from_checkpoint(settings.pop("checkpoint")).model.eval()
        rows, layers = proved(model, x, y, RADII[data], MEASURED[data])
        replace_rows(of_layers, {"data": data, "network": network}, layers)
        return [settings | row for row in rows]

    once(path, ({"data": options.data, "network": name} for name in known), measured)
    draw(options.data, options.output)
    write_page(options.output / PAGE, tables(options.output))


def networks(options: Options) -> Iterator[tuple[Row, str, str]]:
    """Those of a sweep that are trained, or those for CIFAR-10 that are there; their data."""
    if options.data == "cifar10":
        kept = RESULTS / "cifar10" / "networks"
        for neuron, rho in (("lif", "0.0"), ("lif", "1.0"), ("dlif", "0.0"), ("dlif", "1.0")):
            name = f"{neuron}-at{'-mppd' if rho == '1.0' else ''}"
            place = str(kept / f"{name}.pt") if neuron == "lif" else f"cifar10/{name}"
            where = {"layers": "last", "norm": "l2"} if rho == "1.0" else {"layers": "", "norm": ""}
            row = {"network": name, "neuron": neuron, "rho": rho, **where, "seed": "0"}
            yield row | {"checkpoint": place}, options.pictures, "data"
        return
    for record in sorted(options.runs.glob(f"proved_{options.data}/runs/*/run.json")):
        content = json.loads(record.read_text(encoding="utf-8"))
        given = content["options"]
        names = ("neuron", "rho", "layers", "norm", "seed")
        row = {"network": content["name"]} | {name: str(given[name]) for name in names}
        if not given["rho"]:
            row |= {"layers": "", "norm": ""}
        trained = record.parent / "training" / f"{given['neuron']}_{given['mode']}"
        yield row | {"checkpoint": str(trained)}, given["dataset"], given["data_root"]


def proved(
    model: nn.Module, x: Tensor, y: Tensor, radii: Sequence[str], measured: str
) -> tuple[list[Row], list[Row]]:
    """Prove a network at all radii, attack what is not proved, and measure its layers at one."""
    rows, layers = [], []
    fallen = torch.zeros(len(y), dtype=torch.bool)
    few = slice(0, 64)
    trials = search_estimators(
        model,
        x[few],
        y[few],
        threat=ThreatModel("Linf", parse_eps(radii[-1])),
        seeds=SampleSeeds(range(len(y[few]))),
    )
    chosen = [trial.estimator for trial in trials if trial.chosen]
    for eps in radii:
        began = time.process_time()
        threat = ThreatModel("Linf", parse_eps(eps))
        bounds = verify(model, x, y, threat)
        intervals = torch.tensor(verify(model, x, y, threat, method="ibp").verified)
        right, safe = torch.tensor(bounds.correct), torch.tensor(bounds.verified)
        fallen |= ~right
        standing = (~safe & ~fallen).nonzero().squeeze(1)
        if len(standing):
            suite = make_suite("fast", threat, chosen=chosen, classes=10)
            report = worst_case(model, x[standing], y[standing], suite.members, threat=threat)
            for attack in report.attacks:
                fallen[standing[list(attack.broken)]] = True
        if bool((fallen & safe).any()):
            raise RuntimeError(f"an image proved at {eps} falls at a smaller eps; please report it")
        if eps == measured:
            layers = layers_at(model, x, y, bounds)
        shares = {"clean": right, "intervals": intervals, "proved": safe, "left": ~fallen}
        row = {"eps": eps, "images": str(len(y))}
        for name, holds in shares.items():
            row[name] = str(round(100 * float(holds.double().mean()), 1))
        rows.append(row | {"seconds": str(round(time.process_time() - began, 1))})
    return rows, layers


def layers_at(model: nn.Module, x: Tensor, y: Tensor, bounds: Any) -> list[Row]:
    """MS-MPPD of every layer under PGD-20, beside the bounds of its potential: means over images,
    neurons and steps.
    """
    seeds = SampleSeeds(range(len(y)))
    x_adv = pgd(
        model, x, y, eps=bounds.threat, step_size=bounds.threat.eps / 8, steps=20, generator=seeds
    )
    moved = compare_potentials(model, x, x_adv)
    rows = []
    for layer in bounds.layers:
        row = {"layer": layer.name, "mppd": f"{float(moved[layer.name].ms_mppd.mean()):.4g}"}
        width, undecided = fmean(layer.potential), round(fmean(layer.undecided), 4)
        rows.append(row | {"width": f"{float(f'{width:.4g}')}", "undecided": str(undecided)})
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Options))
