"""What attacks on events leave of a network, and what is proved of it.

python docs/results/events.py RUN/dlif_certified --data-root FOLDER  # writes events/attacks.csv
python docs/results/events.py RUN/dlif_at --data-root FOLDER --name at --flips 5 --samples 300

Frames are those of the network's training, binary or of counts.
"""

import argparse
import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sj_robust.attacks import (
    ThreatModel,
    flip_events,
    move_events,
    random_flips,
    random_moves,
)
from sj_robust.attacks.call import Attack
from sj_robust.core.randomness import SampleSeeds
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation.run.proofs import verify_within
from sj_robust.evaluation.subject import from_checkpoint

HERE = Path(__file__).parent
ALL = "all attacks"
Method = Literal["ibp", "joint"]


class Found(NamedTuple):
    """Of which samples something is true: they are right, proved or left by an attack."""

    budget: str
    what: str
    left: Tensor


def threat_of(options: argparse.Namespace, budget: str, *, counts: bool) -> ThreatModel:
    """Changed or moved events."""
    if budget == "flips":
        return ThreatModel("L0", options.flips, counts=counts)
    return ThreatModel("moves", options.moves, largest_shift=options.shift, counts=counts)


def attacks_of(threat: ThreatModel) -> dict[str, Attack]:
    """Attacks of equal budget: guided, by gradient alone, and random."""
    events = int(threat.eps)
    if threat.norm == "L0":
        given = {"flips": events, "counts": threat.counts}
        guided = partial(flip_events, **given, reduce=False)
        drawn = partial(random_flips, **given, tries=200)
        return {
            "flip_events": guided,
            "one event per gradient, as SpikeFool": partial(
                guided, steps=events, probes=0, queries=0
            ),
            "random removals, best of 200": partial(drawn, allow="remove"),
            "random flips, best of 200": drawn,
        }
    given = {"moves": events, "largest_shift": threat.largest_shift, "counts": threat.counts}
    guided = partial(move_events, **given, reduce=False)
    return {
        "move_events": guided,
        "gradient alone": partial(guided, probes=0, queries=0),
        "random moves, best of 200": partial(random_moves, **given, tries=200),
    }


def found_of(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    budget: str,
    threat: ThreatModel,
    methods: tuple[Method, ...],
) -> Iterator[Found]:
    """What is clean, proved and left by each attack, and by all of them last."""
    right = model(x).argmax(1) == y
    yield Found(budget, "clean", right)
    verified = torch.zeros_like(right)
    for method in methods:
        verified = torch.tensor(verify_within(model, x, y, threat, method=method).verified)
        yield Found(budget, f"proved, {method}", verified)
    standing = right.clone()
    for attack, attacked in attacks_of(threat).items():
        x_adv = attacked(model, x, y, generator=SampleSeeds(range(len(y))))
        assert bool(threat.contains(x, x_adv).all())
        left = right & (model(x_adv).argmax(1) == y)
        assert not bool((verified & ~left).any()), "a proof is false"
        standing &= left
        yield Found(budget, attack, left)
    yield Found(budget, ALL, standing)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--name", default="attacks", help="of the file in events/")
    parser.add_argument("--flips", type=int, default=10)
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--shift", type=int, default=1)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--moved-samples", type=int, help="None: as many", default=None)
    parser.add_argument("--no-proofs", action="store_true", help="attacks alone")
    options = parser.parse_args()
    methods: tuple[Method, ...] = () if options.no_proofs else ("ibp", "joint")
    subject = from_checkpoint(options.run / "best.pt")
    counts = bool(subject.options.get("counts"))
    samples = {
        "moves": options.samples if options.moved_samples is None else options.moved_samples,
        "flips": options.samples,
    }
    most = max(samples.values())
    splits = load_images(
        subject.options["dataset"],
        root=options.data_root,
        T=subject.spec.T,
        counts=counts,
        test_limit=most,
    )
    x, y = next(iter(image_loader(splits.test, most)))
    path = HERE / "events" / f"{options.name}.csv"
    with path.open("w", encoding="utf-8", newline="") as file, torch.no_grad():
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["budget", "what", "samples", "left"])
        for budget, number in samples.items():
            if not number:
                continue
            threat = threat_of(options, budget, counts=counts)
            model = subject.model.eval()
            for found in found_of(model, x[:number], y[:number], budget, threat, methods):
                left = int(found.left.sum())
                writer.writerow([budget, found.what, number, left])
                share = 100 * left / number
                print(f"{budget:6} {found.what:40} {share:5.1f} %", flush=True)


if __name__ == "__main__":
    main()
