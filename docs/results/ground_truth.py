"""Trains the small networks whose exact robust accuracy is known, and asks the program about every
image.

python docs/results/ground_truth.py             # all of them
python docs/results/ground_truth.py dlif-T2     # only this one

It writes weights and verdicts into tests/attacks/ground_truth, which a test of the attacks reads. A
network takes half a minute of training and up to an hour of the program on one core; radii that
are written already are not asked again.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sj_robust.data import load_images
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.proofs import verify
from sj_robust.training import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
RUNS = Path("runs", "ground_truth")
KEPT = ROOT / "tests" / "attacks" / "ground_truth"
NETWORKS = {
    "dlif-T2": "--T 2 --channels [4]",
    "dlif-T4": "--T 4 --channels [3]",
    "lif-T2": "--T 2 --channels [4] --neuron lif",
    "dlif-T2-two-layers": "--T 2 --channels [3,4]",
}
"""The options of adv_train.py that differ from the defaults, 30 epochs aside."""
RADII = (0.05, 0.1)
IMAGES = 128
SECONDS = 30.0  # of the program, per image


def main() -> None:
    """Whatever is not there yet is trained and asked."""
    KEPT.mkdir(parents=True, exist_ok=True)
    names = sys.argv[1:] or list(NETWORKS)
    for eps in RADII:
        for name in names:
            weights = KEPT / f"{name}.pt"
            options = f"--epochs 30 --reference false {NETWORKS[name]}"
            if not weights.exists():
                train(name, options, weights)
            verdicts = KEPT / f"{name}.json"
            content: dict[str, Any] = {"command": f"python recipes/adv_train.py {options}"}
            if verdicts.exists():
                content = json.loads(verdicts.read_text(encoding="utf-8"))
            if str(eps) not in content:
                content[str(eps)] = asked(weights, eps)
                verdicts.write_text(f"{json.dumps(content, indent=1)}\n", encoding="utf-8")
                print(name, eps, content[str(eps)], flush=True)


def train(name: str, options: str, weights: Path) -> None:
    """Train a network, and keep its best weights."""
    run = RUNS / name
    words = [sys.executable, "recipes/adv_train.py", *options.split(), "--output", str(run)]
    subprocess.run(words, cwd=ROOT, check=True)
    (best,) = (ROOT / run).glob("*/best.pt")
    content = load_checkpoint(best)
    save_checkpoint(weights, {key: content[key] for key in ("description", "model")})


def asked(weights: Path, eps: float) -> str:
    """A letter per image: v verified, b broken, w wrong without a perturbation, u unknown."""
    content = load_checkpoint(weights)
    model = build_classifier(NetworkSpec(**content["description"]["network"]))
    model.load_state_dict(content["model"])
    test = load_images("digits", test_limit=IMAGES).test
    x, y = (torch.stack(part) for part in zip(*(test[i] for i in range(IMAGES)), strict=True))
    found = verify(model.eval(), x, y, eps, method="mip", time_limit=SECONDS)
    letters = []
    for correct, verified, broken in zip(found.correct, found.verified, found.broken, strict=True):
        if not correct:
            letters.append("w")
        elif verified:
            letters.append("v")
        else:
            letters.append("b" if broken else "u")
    return "".join(letters)


if __name__ == "__main__":
    main()
