"""Trains the networks that come with the package, evaluates them, and writes weights and cards into
it.

python docs/results/pretrained.py                 # runs/pretrained keeps what is finished
python docs/results/pretrained.py digits/lif      # only this one; the cards of the others stay

Those for digits take minutes on one core, those for CIFAR-10 half an hour each and pictures in
data/cifar10_pictures.
"""

import json
import subprocess
import sys
from pathlib import Path

from sj_robust.evaluation import Report
from sj_robust.training import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
RUNS = Path("runs", "pretrained")
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
SUITE = "fast"
EVALUATION = {"digits": "--eps 0.1", "cifar10": "--eps 8/255 --test-limit 500"}
MADE_WITH = ("sj_robust", "spikingjelly", "torch", "commit")


def main() -> None:
    """Whatever is not there yet is trained and evaluated; weights and cards are written anew."""
    cards = json.loads((ROOT / SHIPPED / "cards.json").read_text(encoding="utf-8"))
    for name in sys.argv[1:] or NETWORKS:
        summary, options = NETWORKS[name]
        words = ["recipes/adv_train.py", "--no-reference", *options.split()]
        run, evaluation = RUNS / name, RUNS / f"{name}-{SUITE}"
        dataset = Path(name).parent.name
        if not (run / "report.json").exists():
            recipe(*words, "--output", run)
        if not (evaluation / "report.json").exists():
            words_of_it = [
                "--suite",
                SUITE,
                "--name",
                name,
                *EVALUATION[dataset].split(),
                "--output",
                evaluation,
            ]
            recipe("recipes/evaluate.py", run, *words_of_it)
        (best,) = (ROOT / run).glob("*/best.pt")
        content = load_checkpoint(best)
        (ROOT / SHIPPED / dataset).mkdir(parents=True, exist_ok=True)
        kept = {key: content[key] for key in ("description", "model")}
        save_checkpoint(ROOT / SHIPPED / f"{name}.pt", kept)
        report = Report.load(ROOT / evaluation / "report.json")
        least, most = report.bracket
        cards[name] = {
            "summary": summary,
            "command": " ".join(["python", *words]),
            "clean": float(report.clean.percent),
            "at_most": float(most.percent),
            "at_least": float(least.percent),
            "found": report.verdict,
            "made_with": {key: report.environment[key] for key in MADE_WITH},
        }
    text = json.dumps(cards, indent=2, ensure_ascii=False)
    (ROOT / SHIPPED / "cards.json").write_text(f"{text}\n", encoding="utf-8")


def recipe(*words: object) -> None:
    """Run a recipe from the root of the repository."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
