"""A network under every fault of a list, clean and attacked, into one card; resumable, shared by
processes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sj_robust.attacks.threat import ThreatModel, eps_text
from sj_robust.core.environment import device_of, environment
from sj_robust.core.preserved import preserved
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.saved import plain
from sj_robust.evaluation.corruptions import Corruption, corrupted, default_corruptions
from sj_robust.evaluation.data import Batches, Data
from sj_robust.evaluation.estimator_search import short_attack, short_attack_name
from sj_robust.evaluation.faults import Fault, default_faults, faulty
from sj_robust.evaluation.fingerprint import fingerprint
from sj_robust.evaluation.identity import network_key
from sj_robust.evaluation.member import Member, fooled
from sj_robust.evaluation.progress import (
    Position,
    TimeLeft,
    computed_once,
    gathered,
    rank_and_world_size,
)
from sj_robust.evaluation.runner import releases
from sj_robust.evaluation.stress_card import StressCard, StressRow
from sj_robust.evaluation.subject import Subject, describe_network
from sj_robust.evaluation.worst_case import run_members

__all__ = ["stress_network"]

_EOT = 3
"""Forwards that a gradient is averaged over on a network that draws random numbers."""


def stress_network(
    subject: Subject,
    batches: Batches | Data,
    *,
    suite: Literal["stress", "corruptions"] = "stress",
    threat: ThreatModel,
    dataset: str,
    faults: Sequence[Fault | Corruption] | None = None,
    draws: int = 5,
    steps: int = 20,
    seed: int = 0,
    folder: Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_step: Callable[[Position], None] | None = None,
) -> StressCard:
    """Measure a network under faults or corruptions and write the card. 压力测试并生成结果卡。

    Every level of every kind is kept in ``folder`` as it ends, and a call with the same arguments
    goes on where a killed one stopped. Several processes share the levels, and each gets the card.
    The network stays as it was: faults are those of a copy.

    Args:
        subject: The network.
        batches: Images with labels in batches, read once.
        suite: ``"stress"`` for faults of deployment, ``"corruptions"`` for common corruptions.
        threat: Budget of the attack, which is crafted on the faulty network, or from the corrupted
            images.
        dataset: Name of the data set.
        faults: What is measured; None takes every kind at its usual levels.
        draws: Draws of a fault that is random, >= 1.
        steps: Steps of the attack, >= 1, APGD-CE (``flip_events`` or ``move_events`` for events).
        seed: Seeds everything.
        folder: Where progress is kept; None keeps none.
        configuration: Options of the run, for the card.
        say: Called with a line for each part.
        on_step: Called after every level.

    Raises:
        ValueError: If an argument is wrong, or the folder holds the progress of another run.

    Source: as of :func:`sj_robust.evaluation.stress`.

    Examples:
        >>> import torch
        >>> from sj_robust.classifier import SpikingClassifier
        >>> mine = Subject(
        ...     "mine",
        ...     SpikingClassifier(nn.Sequential(nn.Flatten(2), nn.Linear(4, 3)), T=2),
        ...     "one layer",
        ... )
        >>> batches = [(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)]
        >>> threat, few = (
        ...     ThreatModel("Linf", 0.1),
        ...     [Fault("weight_bits", 4), Fault("first_steps", 1)],
        ... )
        >>> stress_network(mine, batches, threat=threat, dataset="noise", faults=few).kinds
        ('weight_bits', 'first_steps')
    """
    data = Data.of(batches)
    if faults is None:
        faults = (
            default_faults(subject.model) if suite == "stress" else default_corruptions(data[0][0])
        )
    attack = short_attack(threat, steps)
    key = {
        "network": network_key(subject.model, data, folder),
        "data": data.fingerprint,
        "threat": repr(threat),
    }
    key |= {
        "seed": str(seed),
        "draws": str(draws),
        "attack": fingerprint(attack),
        "releases": releases(),
    }
    names = ["none", *(f"{fault.kind} {fault.level}" for fault in faults)]
    rank, processes = rank_and_world_size()
    left = TimeLeft(names[rank::processes], 1)
    say(f"{suite}: {len(faults)} levels of {len({fault.kind for fault in faults})} kinds")
    rows: dict[int, dict[str, Any]] = {}
    for number in range(rank, len(names), processes):
        fault = faults[number - 1] if number else None
        began = time.perf_counter()
        path = folder and folder / f"{names[number].replace(' ', '-')}.json"

        def compute(fault: Fault | Corruption | None = fault) -> dict[str, Any]:
            try:
                with preserved(subject.model):
                    counts = [*_counted(subject.model, data, fault, threat, draws, steps, seed)]
            except (ValueError, NotImplementedError) as error:
                if fault is None:
                    raise
                return {"reason": f"{fault.kind} {fault.level:g} was not measured: {error}."}
            clean, attacked = zip(*counts, strict=True)
            return {"clean": clean, "attacked": attacked}

        rows[number] = computed_once(path, key, compute)
        left.add(names[number], time.perf_counter() - began)
        if on_step is not None:
            on_step(
                Position(number, len(names), names[number], left.done, left.total, left.seconds())
            )
    rows = gathered(rows)
    measured = [
        StressRow(fault.kind, fault.level, **row)
        for number, fault in enumerate(faults, 1)
        if "reason" not in (row := rows[number])
    ]
    return StressCard(
        name=subject.name,
        dataset=dataset,
        suite=suite,
        threat=threat,
        attack=f"{short_attack_name(threat)} {steps}",
        images=len(data.labels),
        intact=StressRow("none", 0, **rows[0]),
        rows=tuple(measured),
        seed=seed,
        network={"architecture": subject.architecture, "fingerprint": key["network"]}
        | describe_network(subject.model),
        data=key["data"],
        configuration=dict(plain(configuration or {})),
        environment=environment(device_of(subject.model)) | {"processes": str(processes)},
        warnings=tuple(row["reason"] for row in rows.values() if "reason" in row),
    )


def _counted(
    model: nn.Module,
    data: Data,
    fault: Fault | Corruption | None,
    threat: ThreatModel,
    draws: int,
    steps: int,
    seed: int,
) -> Iterator[tuple[int, int]]:
    """Images right without and under the attack, per draw."""
    noisy = isinstance(fault, Fault) and fault.noisy
    attack = short_attack(threat, steps, draws=_EOT if noisy else 1)
    member = Member(f"short@{eps_text(threat.eps)}", attack, threat=threat)
    for draw in range(draws if isinstance(fault, Fault) and fault.random else 1):
        own = seed * 2**10 + draw
        network = faulty(model, fault, seed=own) if isinstance(fault, Fault) else model
        clean = attacked = start = 0
        for batch in data:
            x, y = (part.to(device_of(model)) for part in batch)
            if isinstance(fault, Corruption):
                x = corrupted(x, fault, seed=seed, start=start)
            seeds = SampleSeeds(range(start, start + len(y))).derived("image", own)
            right = ~fooled(network, x, y, draws=1, seeds=seeds)
            (run,) = run_members(network, x, y, [member], right, seeds=seeds, draws=1)
            clean += int(right.sum())
            attacked += int(right.sum() - run.fooled.sum())
            start += len(y)
        yield clean, attacked
