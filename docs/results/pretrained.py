"""Evaluates the networks that come with the package, and writes their cards.

python docs/results/pretrained.py                       # cards from the suite standard
python docs/results/pretrained.py digits/lif            # only this one; the other cards stay
python docs/results/pretrained.py --train digits/lif    # trained anew first

Evaluations are those of docs/results/standard.py, in runs/standard; runs/pretrained keeps the
trainings. After a stop, run the same command to continue. Training takes minutes on
one core for digits, half an hour for CIFAR-10, which needs pictures in data/cifar10_pictures.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from sj_robust.evaluation import Report
from sj_robust.training import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
RUNS = Path("runs", "pretrained")
EVALUATIONS = Path("runs", "standard")
SHIPPED = Path("sj_robust", "models", "trained")
CIFAR10 = "--config recipes/configs/cifar10.yaml --dataset image_folder:data/cifar10_pictures"
NETWORKS = {
    "digits/lif": ("LIF, undefended", "--neuron lif --mode none"),
    "digits/lif-at": ("LIF, adversarial training", "--neuron lif --rho 0"),
    "digits/dlif-at": ("DLIF, adversarial training", "--rho 0"),
    "digits/dlif-at-mppd": ("DLIF, adversarial training with MS-MPPD", ""),
    "digits/dlif-certified": (
        "DLIF, trained for proofs",
        "--config recipes/configs/certified/digits_0.1.yaml",
    ),
    "cifar10/dlif-at": ("DLIF, adversarial training", f"{CIFAR10} --rho 0"),
    "cifar10/dlif-at-mppd": ("DLIF, adversarial training with MS-MPPD", CIFAR10),
}
"""What each is, and the options of adv_train.py that differ from the defaults."""
MADE_WITH = ("sj_robust", "spikingjelly", "torch", "commit")


def main() -> None:
    """Train if asked to, evaluate what has no report yet, and write the cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all networks by default")
    parser.add_argument("--train", action="store_true", help="train and replace the weights first")
    options = parser.parse_args()
    unknown = set(options.names) - set(NETWORKS)
    if unknown:
        parser.error(f"names must be among {', '.join(NETWORKS)}; got {', '.join(unknown)}")
    names = options.names or list(NETWORKS)
    if options.train:
        for name in names:
            train(name)
    run("docs/results/standard.py", *names)
    cards = json.loads((ROOT / SHIPPED / "cards.json").read_text(encoding="utf-8"))
    for name in names:
        cards[name] = card(name)
    text = json.dumps(cards, indent=2, ensure_ascii=False)
    (ROOT / SHIPPED / "cards.json").write_text(f"{text}\n", encoding="utf-8")


def train(name: str) -> None:
    """Train a network, or go on with it, and put its weights into the package."""
    folder = RUNS / name
    if not (ROOT / folder / "report.json").exists():
        run(*training_command(name), "--output", folder)
    (best,) = (ROOT / folder).glob("*/best.pt")
    content = load_checkpoint(best)
    kept = {key: content[key] for key in ("description", "model")}
    file = ROOT / SHIPPED / f"{name}.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_bytes() if file.exists() else b""
    save_checkpoint(file, kept)
    if file.read_bytes() != before:  # which an evaluation that is there was of
        shutil.rmtree(ROOT / EVALUATIONS / name, ignore_errors=True)


def card(name: str) -> dict[str, object]:
    """What the report of the suite standard says of a network, and the command that trained it."""
    report = Report.load(ROOT / EVALUATIONS / name / "standard" / "report.json")
    least, most = report.bracket
    return {
        "summary": NETWORKS[name][0],
        "command": " ".join(["python", *training_command(name)]),
        "clean": float(report.clean.percent),
        "at_most": float(most.percent),
        "at_least": float(least.percent),
        "found": report.verdict,
        "made_with": {key: report.environment[key] for key in MADE_WITH},
    }


def training_command(name: str) -> list[str]:
    """The recipe and its options."""
    return ["recipes/adv_train.py", "--no-reference", *NETWORKS[name][1].split()]


def run(*words: object) -> None:
    """Run a script from the root of the repository."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
