"""Evaluates the trained networks and writes their cards.

python docs/results/pretrained.py                       # every network that has a card
python docs/results/pretrained.py digits/lif            # only this one; the other cards stay
python docs/results/pretrained.py --train digits/lif    # trained anew first

Weights are rounded to half precision before they are evaluated. A network that is too large for the
wheel goes into runs/assets, with SHA256SUMS, for a release. runs/pretrained keeps the trainings,
runs/standard the evaluations. Stopped at any time, the same command goes on where it was. Training
takes minutes on one core for digits, MNIST and Fashion-MNIST (files in data and
data/fashion_mnist), and half an hour or more for CIFAR-10 (pictures in data/cifar10_pictures).
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sj_robust.evaluation import Report
from sj_robust.models.assets import Asset
from sj_robust.training import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
RUNS = Path("runs", "pretrained")
EVALUATIONS = Path("runs", "standard")
ASSETS = Path("runs", "assets")
SHIPPED = Path("sj_robust", "models", "trained")
CERTIFIED = "--config recipes/configs/certified"
CIFAR10_DATA = "--dataset image_folder:data/cifar10_pictures"
CIFAR10 = f"--config recipes/configs/cifar10.yaml {CIFAR10_DATA}"
CIFAR10_STATISTICS = "--mean 0.4914 0.4822 0.4465 --std 0.2023 0.1994 0.2010"
FASHION_DATA = "--data-root data/fashion_mnist"


@dataclass(frozen=True)
class Network:
    """What a network is.

    Attributes:
        summary: Neuron and training.
        training: Options of adv_train.py that differ from the defaults.
        evaluation: Options of evaluate.py; empty for what docs/results/standard.py does.
        in_wheel: False for a file of a release.
    """

    summary: str
    training: str = ""
    evaluation: str = ""
    in_wheel: bool = True


NETWORKS = {
    "digits/lif": Network("LIF, undefended", "--neuron lif --mode none"),
    "digits/lif-at": Network("LIF, adversarial training", "--neuron lif --rho 0"),
    "digits/dlif-at": Network("DLIF, adversarial training", "--rho 0"),
    "digits/dlif-at-mppd": Network("DLIF, adversarial training with MS-MPPD"),
    "digits/dlif-certified": Network(
        "DLIF, trained for proofs", f"{CERTIFIED}/digits_0.1_augmented.yaml"
    ),
    "mnist/certified-0.1": Network(
        "DLIF, trained for proofs at 0.1", f"{CERTIFIED}/mnist_0.1.yaml", "--eps 0.1"
    ),
    "mnist/certified-0.3": Network(
        "DLIF, trained for proofs at 0.3", f"{CERTIFIED}/mnist_0.3.yaml", "--eps 0.3"
    ),
    "fashion_mnist/certified-0.1": Network(
        "DLIF, trained for proofs at 0.1",
        f"{CERTIFIED}/fashion_mnist_0.1.yaml {FASHION_DATA}",
        f"--eps 0.1 {FASHION_DATA}",
    ),
    "fashion_mnist/certified-8": Network(
        "DLIF, trained for proofs at 8/255",
        f"{CERTIFIED}/fashion_mnist_8.yaml {FASHION_DATA}",
        f"--eps 8/255 {FASHION_DATA}",
    ),
    "cifar10/dlif-at": Network("DLIF, adversarial training", f"{CIFAR10} --rho 0"),
    "cifar10/dlif-at-mppd": Network("DLIF, adversarial training with MS-MPPD", CIFAR10),
    "cifar10/certified-2": Network(
        "DLIF, trained for proofs at 2/255",
        f"{CERTIFIED}/cifar10_2.yaml {CIFAR10_DATA}",
        f"--eps 2/255 {CIFAR10_DATA}",
    ),
    "cifar10/certified-8-small": Network(
        "DLIF, trained for proofs at 8/255",
        f"{CERTIFIED}/cifar10_8_small.yaml {CIFAR10_DATA}",
        f"--eps 8/255 {CIFAR10_DATA}",
    ),
    "cifar10/certified-8": Network(
        "DLIF, trained for proofs at 8/255",
        f"{CERTIFIED}/cifar10_8.yaml {CIFAR10_DATA} {CIFAR10_STATISTICS}",
        f"--eps 8/255 {CIFAR10_DATA}",
        in_wheel=False,
    ),
}
EVALUATION = "--suite fast --no-control --test-limit 1000 --batch-size 1000"
"""Options of evaluate.py for networks with an evaluation of their own."""
MADE_WITH = ("sj_robust", "spikingjelly", "torch", "commit")


def main() -> None:
    """Train if asked to, evaluate what has no report yet, and write the cards."""
    cards = json.loads((ROOT / SHIPPED / "cards.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all that have a card by default")
    parser.add_argument("--train", action="store_true", help="train and replace the weights first")
    options = parser.parse_args()
    names = options.names or list(cards)
    unknown = set(names) - set(NETWORKS)
    if unknown:
        parser.error(f"names must be among {', '.join(NETWORKS)}; got {', '.join(unknown)}")
    if options.train:
        for name in names:
            train(name)
    usual = [name for name in names if not NETWORKS[name].evaluation]
    if usual:
        run("docs/results/standard.py", *usual)
    for name in names:
        if name not in usual:
            evaluate(name)
        cards[name] = card(name)
    in_order = {name: cards[name] for name in NETWORKS if name in cards}
    text = json.dumps(in_order, indent=2, ensure_ascii=False)
    (ROOT / SHIPPED / "cards.json").write_text(f"{text}\n", encoding="utf-8")


def train(name: str) -> None:
    """Train a network, or go on with it, and put its rounded weights where they belong."""
    folder = RUNS / name
    if not (ROOT / folder / "report.json").exists():
        run(*training_command(name), "--output", folder)
    (best,) = (ROOT / folder).glob("*/best.pt")
    content = load_checkpoint(best)
    kept = {"description": content["description"], "model": rounded(content["model"])}
    before = [file.read_bytes() for file in files(name)]
    place = ROOT / SHIPPED / f"{name}.pt"
    if not NETWORKS[name].in_wheel:
        place = ROOT / ASSETS / "new.pt"
    place.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(place, kept)
    if not NETWORKS[name].in_wheel:
        add_asset(name, place)
    if [file.read_bytes() for file in files(name)] != before:  # what was evaluated before
        shutil.rmtree(ROOT / EVALUATIONS / name, ignore_errors=True)


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are stored."""
    return {key: in_half(value) for key, value in weights.items()}


def in_half(value: Tensor) -> Tensor:
    """A tensor of numbers in half precision, or one of counters."""
    return value.half() if value.is_floating_point() else value


def files(name: str) -> list[Path]:
    """The file of a network, none before it is trained."""
    if NETWORKS[name].in_wheel:
        return list((ROOT / SHIPPED).glob(f"{name}.pt"))
    return list((ROOT / ASSETS).glob(f"{name.replace('/', '-')}-????????.pt"))


def add_asset(name: str, new: Path) -> None:
    """Give a file the name that the release has for it, and write the digests of all files."""
    for old in files(name):
        old.unlink()
    new.rename(new.with_name(asset(name, new).file_name))
    assets = sorted((ROOT / ASSETS).glob("*.pt"))
    sums = "".join(f"{digest(file)}  {file.name}\n" for file in assets)
    (ROOT / ASSETS / "SHA256SUMS").write_text(sums, encoding="utf-8")


def evaluate(name: str) -> None:
    """Proofs and attacks, or go on with them."""
    folder = EVALUATIONS / name / "fast"
    if (ROOT / folder / "report.json").exists():
        return
    (file,) = files(name)
    words = [*EVALUATION.split(), *NETWORKS[name].evaluation.split(), "--output", folder]
    if (ROOT / folder).exists():
        words.append("--resume")
    run("recipes/evaluate.py", file, *words)


def card(name: str) -> dict[str, object]:
    """What the report of a network says of it, its file, and the command that trained it."""
    suite = "fast" if NETWORKS[name].evaluation else "standard"
    report = Report.load(ROOT / EVALUATIONS / name / suite / "report.json")
    least, most = report.bracket
    found = asset(name, *files(name))
    return {
        "summary": NETWORKS[name].summary,
        "size": found.size,
        "sha256": found.sha256,
        "command": " ".join(["python", *training_command(name)]),
        "clean": float(report.clean.percent),
        "at_most": float(most.percent),
        "at_least": float(least.percent),
        "found": report.verdict,
        "made_with": {key: report.environment[key] for key in MADE_WITH},
    }


def asset(name: str, file: Path) -> Asset:
    """A file as its card tells it."""
    return Asset(name, file.stat().st_size, digest(file))


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def training_command(name: str) -> list[str]:
    """The recipe and its options."""
    return ["recipes/adv_train.py", "--no-reference", *NETWORKS[name].training.split()]


def run(*words: object) -> None:
    """Run a script from the root of the repository."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
