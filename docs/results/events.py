"""What attacks on events leave of a network, and what is proved of it.

python docs/results/events.py RUN/dlif_certified --data-root FOLDER  # writes events/attacks.csv
"""

import argparse
import csv
from functools import partial
from pathlib import Path

import torch

from sj_robust.attacks import (
    ThreatModel,
    flip_events,
    move_events,
    random_flips,
    random_moves,
)
from sj_robust.core.randomness import SampleSeeds
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation.run.proofs import verify_within
from sj_robust.evaluation.subject import from_checkpoint

HERE = Path(__file__).parent
EVENTS = 10
SHIFT = 1

FLIPS = {
    "flip_events": partial(flip_events, flips=EVENTS, reduce=False),
    "one event per gradient, as SpikeFool": partial(
        flip_events, flips=EVENTS, steps=EVENTS, probes=0, queries=0, reduce=False
    ),
    "random removals, best of 200": partial(random_flips, flips=EVENTS, allow="remove", tries=200),
    "random flips, best of 200": partial(random_flips, flips=EVENTS, tries=200),
}
MOVED = {"moves": EVENTS, "largest_shift": SHIFT}
MOVES = {
    "move_events": partial(move_events, **MOVED, reduce=False),
    "gradient alone": partial(move_events, **MOVED, probes=0, queries=0, reduce=False),
    "random moves, best of 200": partial(random_moves, **MOVED, tries=200),
}
THREATS = {
    "moves": (ThreatModel("moves", EVENTS, largest_shift=SHIFT), MOVES),
    "flips": (ThreatModel("L0", EVENTS), FLIPS),
}


def rows_of(model, x, y):
    """One row for the clean frames, and for every proof and attack; the worst case last."""
    logits = model(x)
    right = logits.argmax(1) == y
    yield "", "clean", right
    for name, (threat, attacks) in THREATS.items():
        for method in ("ibp", "joint"):
            verified = verify_within(model, x, y, threat, method=method).verified
            yield name, f"proved, {method}", torch.tensor(verified)
        standing = right.clone()
        for attack, attacked in attacks.items():
            x_adv = attacked(model, x, y, generator=SampleSeeds(range(len(y))))
            assert bool(threat.contains(x, x_adv).all())
            left = right & (model(x_adv).argmax(1) == y)
            assert not bool((torch.tensor(verified) & ~left).any()), "a proof is false"
            standing &= left
            yield name, attack, left
        yield name, "all attacks", standing


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--samples", type=int, default=100)
    options = parser.parse_args()
    subject = from_checkpoint(options.run / "best.pt")
    splits = load_images(
        subject.options["dataset"],
        root=options.data_root,
        T=subject.spec.T,
        test_limit=options.samples,
    )
    x, y = next(iter(image_loader(splits.test, options.samples)))
    with (HERE / "events" / "attacks.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["budget", "what", "samples", "left"])
        for name, what, left in rows_of(subject.model.eval(), x, y):
            writer.writerow([name, what, len(y), int(left.sum())])
            print(f"{name:6} {what:40} {100 * float(left.double().mean()):5.1f} %", flush=True)


if __name__ == "__main__":
    main()
