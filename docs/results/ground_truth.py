"""Trains the small networks whose exact robust accuracy is known, and asks the program about every
image.

python docs/results/ground_truth.py             # all of them
python docs/results/ground_truth.py dlif-T2     # only this one
python docs/results/ground_truth.py --again     # ask again about undecided images, with more time

It writes weights and verdicts into tests/attacks/ground_truth, which tests of attacks and suites
read. A network takes half a minute of training and up to an hour of the program on one core;
images whose verdict is written already are not asked again.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, spike_search
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import from_checkpoint
from sj_robust.proofs import verify
from sj_robust.training import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
RUNS = Path("runs", "ground_truth")
KEPT = ROOT / "tests" / "attacks" / "ground_truth"
NETWORKS = {
    "dlif-T2": "--T 2 --channels 4",
    "dlif-T4": "--T 4 --channels 3",
    "lif-T2": "--T 2 --channels 4 --neuron lif",
    "dlif-T2-two-layers": "--T 2 --channels 2 4",
}
"""The options of adv_train.py that differ from the defaults, 30 epochs aside."""
RADII = (0.05, 0.1)
IMAGES = 128
SECONDS = 30.0  # of the program, per image
SECONDS_AGAIN = 300.0  # when it is asked again


def main() -> None:
    """Whatever is not there yet is trained and asked."""
    KEPT.mkdir(parents=True, exist_ok=True)
    once_more = "--again" in sys.argv
    names = [word for word in sys.argv[1:] if word != "--again"] or list(NETWORKS)
    for eps in RADII:
        for name in names:
            weights = KEPT / f"{name}.pt"
            options = f"--epochs 30 --no-reference {NETWORKS[name]}"
            if not weights.exists():
                train(name, options, weights)
            verdicts = KEPT / f"{name}.json"
            content: dict[str, Any] = {"command": f"python recipes/adv_train.py {options}"}
            if verdicts.exists():
                content = json.loads(verdicts.read_text(encoding="utf-8"))
            known = letters = content.get(str(eps), "")
            rounds = asked_again if once_more else asked
            for letters in rounds(weights, eps, known):
                content[str(eps)] = letters
                verdicts.write_text(f"{json.dumps(content, indent=1)}\n", encoding="utf-8")
            print(name, eps, letters, flush=True)


def train(name: str, options: str, weights: Path) -> None:
    """Train a network, and keep its best weights."""
    run = RUNS / name
    words = [sys.executable, "recipes/adv_train.py", *options.split(), "--output", str(run)]
    subprocess.run(words, cwd=ROOT, check=True)
    (best,) = (ROOT / run).glob("*/best.pt")
    content = load_checkpoint(best)
    save_checkpoint(weights, {key: content[key] for key in ("description", "model")})


def asked(weights: Path, eps: float, letters: str) -> Iterator[str]:
    """The letters of the images, one more each time, after those that are known: v verified,
    b broken, w wrong without a perturbation, u unknown. The program is asked about what an attack
    leaves.
    """
    model, x, y = network_and_images(weights)
    rest = range(len(letters), IMAGES)
    if not rest:
        return
    x, y = x[rest.start :], y[rest.start :]
    x_adv = spike_search(model, x, y, eps=eps, forwards=10_000, generator=SampleSeeds(rest))
    with torch.no_grad():
        right = model(x).argmax(1) == y
        broken = model(x_adv).argmax(1) != y
    for number in range(len(rest)):
        if not right[number]:
            letters += "w"
        elif broken[number]:
            letters += "b"
        else:
            one = slice(number, number + 1)
            letters += verdict(model, x[one], y[one], eps, SECONDS)
        yield letters


def asked_again(weights: Path, eps: float, letters: str) -> Iterator[str]:
    """The letters after every image that was unknown and is asked about with more time."""
    model, x, y = network_and_images(weights)
    for number in [number for number, letter in enumerate(letters) if letter == "u"]:
        one = slice(number, number + 1)
        letter = verdict(model, x[one], y[one], eps, SECONDS_AGAIN)
        letters = letters[:number] + letter + letters[number + 1 :]
        yield letters


def network_and_images(weights: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The network of a file, and the test images [N, 1, 8, 8] with labels [N]."""
    test = load_images("digits", test_limit=IMAGES).test
    x, y = next(iter(image_loader(test, IMAGES)))
    return from_checkpoint(weights).model, x, y


def verdict(model: nn.Module, x: Tensor, y: Tensor, eps: float, seconds: float) -> str:
    """The program's letter for one image [1, 1, 8, 8]."""
    found = verify(model, x, y, eps, method="mip", time_limit=seconds)
    if found.verified[0]:
        return "v"
    return "b" if found.broken[0] else "u"


if __name__ == "__main__":
    main()
