"""Trains the small networks whose exact robust accuracy is known, and asks the program about every
image.

python recipes/studies/ground_truth.py                     # all of them
python recipes/studies/ground_truth.py --names dlif-T2     # only this one
python recipes/studies/ground_truth.py --again --seconds 300   # undecided images once more

It writes weights and verdicts into tests/attacks/ground_truth, which tests of attacks and suites
read: v verified, b broken, w wrong without a perturbation, u unknown. A network takes half a minute
of training and up to an hour of the program on one core; verdicts that are there are kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tables import ROOT, first_images, run_recipe
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, spike_search
from sj_robust.core.saved import write_whole
from sj_robust.evaluation import from_checkpoint
from sj_robust.proofs import verify
from sj_robust.training import load_checkpoint, save_checkpoint

NETWORKS = {
    "dlif-T2": "--T 2 --channels 4",
    "dlif-T4": "--T 4 --channels 3",
    "lif-T2": "--T 2 --channels 4 --neuron lif",
    "dlif-T2-two-layers": "--T 2 --channels 2 4",
}
"""The options of adv_train.py that differ from the defaults, those of all networks aside."""


@dataclass(frozen=True)
class Options:
    """What is asked."""

    names: tuple[str, ...] = tuple(NETWORKS)
    radii: tuple[float, ...] = (0.05, 0.1)
    images: int = 128
    training: str = "--epochs 30 --no-reference"
    forwards: int = 10_000
    """Of the search that comes before the program, for each image."""
    seconds: float = 30.0
    """Of the program, for each image."""
    again: bool = False
    """Ask again about images that are undecided."""
    runs: Path = ROOT / "runs" / "ground_truth"
    output: Path = ROOT / "tests" / "attacks" / "ground_truth"


def main(options: Options) -> None:
    """Whatever is not there yet is trained and asked."""
    options.output.mkdir(parents=True, exist_ok=True)
    x, y = first_images("digits", options.images)
    for name in options.names:
        words = f"{options.training} {NETWORKS[name]}"
        weights = options.output / f"{name}.pt"
        if not weights.exists():
            run_recipe("adv_train.py", words.split(), options.runs / name)
            (best,) = (options.runs / name).glob("*/best.pt")
            content = load_checkpoint(best)
            save_checkpoint(weights, {key: content[key] for key in ("description", "model")})
        verdicts = weights.with_suffix(".json")
        content = {"command": f"python recipes/adv_train.py {words}"}
        if verdicts.exists():
            content = json.loads(verdicts.read_text(encoding="utf-8"))
        model = from_checkpoint(weights).model
        for eps in options.radii:
            known = content.get(str(eps), "")
            known = known.replace("u", "?") if options.again else known
            ask(model, x, y, eps, known.ljust(len(y), "?"), content, verdicts, options)
            print(name, eps, content[str(eps)], flush=True)


def ask(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    letters: str,
    content: dict[str, Any],
    verdicts: Path,
    options: Options,
) -> None:
    """Decide the images whose letter is "?", and write the verdicts after every image."""
    for number, letter in enumerate(letters):
        if letter == "?":
            one = slice(number, number + 1)
            letters = letters[:number] + verdict(model, x[one], y[one], eps, number, options)
        content[str(eps)] = letters
        text = {key: value.replace("?", "u") for key, value in content.items()}
        write_whole(verdicts, f"{json.dumps(text, indent=1)}\n")


def verdict(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, number: int, options: Options
) -> str:
    """The letter of one image [1, 1, 8, 8]: the program is asked about what an attack leaves."""
    with torch.no_grad():
        if model(x).argmax(1) != y:
            return "w"
        seeds = SampleSeeds([number])
        x_adv = spike_search(model, x, y, eps=eps, forwards=options.forwards, generator=seeds)
        if model(x_adv).argmax(1) != y:
            return "b"
    found = verify(model, x, y, eps, method="mip", time_limit=options.seconds)
    if found.verified[0]:
        return "v"
    return "b" if found.broken[0] else "u"


if __name__ == "__main__":
    main(tyro.cli(Options))
