"""What attacks on events leave of a network, and what is proved of it.

python recipes/studies/events.py RUN/dlif_certified --data-root FOLDER --name moves
python recipes/studies/events.py RUN/dlif_at --data-root FOLDER --name at --flips 5 --samples 300

Frames are those of the network's training, binary or of counts. It writes events/attacks.csv, where
the rows of other names stay.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from tables import RESULTS, Row, first_images, replace_rows
from torch import Tensor, nn

from sj_robust.attacks import (
    Attack,
    SampleSeeds,
    ThreatModel,
    flip_events,
    move_events,
    random_flips,
    random_moves,
)
from sj_robust.evaluation import from_checkpoint
from sj_robust.proofs import verify

Budget = Literal["moves", "flips"]


@dataclass(frozen=True)
class Options:
    """What is measured."""

    network: tyro.conf.Positional[Path]
    data_root: str = "data"
    name: str = "mine"
    """Of the rows."""
    flips: int = 10
    moves: int = 10
    shift: int = 1
    samples: int = 100
    moved_samples: int | None = None
    """None: as many."""
    proofs: bool = True
    tries: int = 200
    """Random changes of a sample."""
    output: Path = RESULTS


def main(options: Options) -> None:
    """Measure and write."""
    subject = from_checkpoint(options.network)
    counts = bool(subject.options.get("counts"))
    moved = options.samples if options.moved_samples is None else options.moved_samples
    samples: dict[Budget, int] = {"moves": moved, "flips": options.samples}
    assert subject.spec is not None  # checkpoints of the recipe have one
    x, y = first_images(
        subject.options["dataset"],
        max(samples.values()),
        root=options.data_root,
        T=subject.spec.T,
        counts=counts,
    )
    path = options.output / "events" / "attacks.csv"
    rows: list[Row] = []
    for budget, number in samples.items():
        if not number:
            continue
        found = left_of(subject.model.eval(), x[:number], y[:number], budget, counts, options)
        for what, left in found:
            row = {"budget": budget, "what": what, "samples": str(number)}
            rows.append(row | {"left": str(int(left.sum()))})
            print(", ".join(rows[-1].values()), flush=True)
    replace_rows(path, {"name": options.name}, rows)


def attacks_of(threat: ThreatModel, options: Options) -> dict[str, Attack]:
    """Attacks of equal budget: guided, by gradient alone, and random."""
    if threat.norm == "L0":
        guided = partial(flip_events, eps=threat, reduce=False)
        drawn = partial(random_flips, eps=threat, tries=options.tries)
        greedy = partial(guided, steps=options.flips, probes=0, queries=0)
        return {
            "flip_events": guided,
            "one event per gradient, as SpikeFool": greedy,
            f"random removals, best of {options.tries}": partial(drawn, allow="remove"),
            f"random flips, best of {options.tries}": drawn,
        }
    guided = partial(move_events, eps=threat, reduce=False)
    return {
        "move_events": guided,
        "gradient alone": partial(guided, probes=0, queries=0),
        f"random moves, best of {options.tries}": partial(
            random_moves, eps=threat, tries=options.tries
        ),
    }


@torch.no_grad()
def left_of(
    model: nn.Module, x: Tensor, y: Tensor, budget: Budget, counts: bool, options: Options
) -> Iterable[tuple[str, Tensor]]:
    """What is clean, proved and left by each attack, and by all of them last."""
    if budget == "flips":
        threat = ThreatModel("L0", options.flips, counts=counts)
    else:
        threat = ThreatModel("moves", options.moves, options.shift, counts=counts)
    right = model(x).argmax(1) == y
    yield "clean", right
    verified = torch.zeros_like(right)
    for method in ("ibp", "joint") if options.proofs else ():
        proofs = verify(model, x, y, threat, method=method)
        verified = torch.tensor(proofs.verified)
        yield f"proved, {method}", verified
    standing = right.clone()
    for name, attack in attacks_of(threat, options).items():
        x_adv = attack(model, x, y, generator=SampleSeeds(range(len(y))))
        left = right & (model(x_adv).argmax(1) == y)
        if bool((verified & ~left).any()) or not bool(threat.contains(x, x_adv).all()):
            raise RuntimeError(f"{name} leaves the threat or breaks a proof; please report it")
        standing &= left
        yield name, left
    yield "all attacks", standing


if __name__ == "__main__":
    main(tyro.cli(Options))
