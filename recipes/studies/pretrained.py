"""Evaluates the trained networks that come with the package, and writes their cards.

python recipes/studies/pretrained.py                            # every network that has a card
python recipes/studies/pretrained.py --names digits/lif         # only this one; other cards stay
python recipes/studies/pretrained.py --names digits/lif --train # trained anew first

The command of a card trains its network; weights are rounded to half precision before they are
evaluated. runs/pretrained keeps trainings, runs/standard evaluations; a stopped command goes on.
Training takes minutes on one core for digits, MNIST and Fashion-MNIST (files in data and
data/fashion_mnist), and half an hour or more for CIFAR-10 (pictures in data/cifar10_pictures).
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from standard import commands
from tables import RESULTS, ROOT, run_recipe, write_page
from torch import Tensor

from sj_robust.core.saved import markdown_table, write_whole
from sj_robust.evaluation import Report
from sj_robust.training import load_checkpoint, save_checkpoint

PAGE = "pretrained.md"
SHIPPED = ROOT / "sj_robust" / "models" / "trained"
DATA = {
    "mnist": "",
    "fashion_mnist": "--data-root data/fashion_mnist",
    "cifar10": "--dataset image_folder:data/cifar10_pictures",
}
SHORT = "--suite fast --no-control --test-limit 1000 --batch-size 1000"
"""Evaluation of networks that are trained for proofs, but for that of the digits."""
TABLES = {
    "digits": ("digits, Linf 0.1, all 360 test images", ("digits/",)),
    "certified": ("first 1,000 test images, Linf", ("mnist/", "fashion_mnist/")),
    "cifar10": ("CIFAR-10 (JPEG), Linf 8/255, 500 test images", ("cifar10/dlif",)),
    "cifar10 certified": ("CIFAR-10 (JPEG), first 1,000 test images", ("cifar10/certified",)),
}
"""First heads of the tables of the page, and how the names of their networks begin."""


@dataclass(frozen=True)
class Options:
    """What is evaluated."""

    names: tuple[str, ...] = ()
    """None: all that have a card."""
    train: bool = False
    """Train and replace the weights first."""
    more: str = ""
    """Further options of evaluate.py."""
    runs: Path = ROOT / "runs"
    shipped: Path = SHIPPED
    output: Path = RESULTS


def main(options: Options) -> None:
    """Train if asked to, evaluate what has no report yet, and write the cards."""
    path = options.shipped / "cards.json"
    cards = json.loads(path.read_text(encoding="utf-8"))
    for name in options.names or list(cards):
        file = options.shipped / f"{name}.pt"
        if options.train:
            train(cards[name]["command"], options.runs / "pretrained" / name, file)
            shutil.rmtree(options.runs / "standard" / name, ignore_errors=True)
        cards[name] |= found(name, file, options)
    write_whole(path, f"{json.dumps(cards, indent=2, ensure_ascii=False)}\n")
    write_page(options.output / PAGE, tables(options.shipped))


def train(command: str, run: Path, file: Path) -> None:
    """Train a network by the command of its card, and keep its rounded weights."""
    run_recipe("adv_train.py", command.split()[2:], run)
    best = sorted(run.glob("*/best.pt"))[-1]  # behind that of a twin of ReLUs
    content = load_checkpoint(best)
    weights: dict[str, Tensor] = content["model"]
    for name, value in weights.items():
        weights[name] = value.half() if value.is_floating_point() else value
    save_checkpoint(file, {"description": content["description"], "model": weights})


def evaluation(name: str, file: Path) -> str:
    """Network and options of evaluate.py."""
    data, _, kind = name.partition("/")
    if name in commands():
        return f"{commands()[name]} --suite standard"
    eps = kind.split("-")[1]
    return f"{file} {SHORT} --eps {eps if '.' in eps else f'{eps}/255'} {DATA[data]}"


def found(name: str, file: Path, options: Options) -> dict[str, Any]:
    """What the report of a network says of it, and its file."""
    words = evaluation(name, file)
    suite = "standard" if words.endswith("--suite standard") else "fast"
    run = options.runs / "standard" / name / suite
    run_recipe("evaluate.py", f"{words} {options.more}".split(), run)
    report = Report.load(run / "report.json")
    if report.bracket is None:
        raise ValueError(f"the evaluation of {name} has no proofs")
    least, most = report.bracket
    content = file.read_bytes()
    return {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "clean": float(report.clean.percent),
        "at_most": float(most.percent),
        "at_least": float(least.percent),
        "found": report.verdict,
        "made_with": {
            key: report.environment[key] for key in ("sj_robust", "spikingjelly", "torch", "commit")
        },
    }


def tables(shipped: Path = SHIPPED) -> dict[str, str]:
    """What the cards say of every network."""
    cards = json.loads((shipped / "cards.json").read_text(encoding="utf-8"))
    written = {}
    for table, (head, starts) in TABLES.items():
        cells = []
        for name, card in cards.items():
            if name.startswith(starts):
                figures = [f"{card[key]:.1f}" for key in ("clean", "at_most", "at_least")]
                cells.append([card["summary"], f"`{name}`", *figures])
        heads = [head, "name", "clean, %", "robust at most, %", "proved robust, %"]
        written[table] = markdown_table(heads, cells, words=2)
    return written


if __name__ == "__main__":
    main(tyro.cli(Options))
