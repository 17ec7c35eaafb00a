"""A suite of attacks on a whole data set: resumable after a kill, shared by several processes."""

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.attacks.threat import ThreatModel
from sj_robust.core.environment import device_of, environment
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.randomness import SampleSeeds, seeded_globals
from sj_robust.evaluation.data import Batches, Data
from sj_robust.evaluation.fingerprint import description, fingerprint
from sj_robust.evaluation.identity import network_key
from sj_robust.evaluation.member import Member, fooled
from sj_robust.evaluation.outcome import MemberOutcome, SuiteOutcome
from sj_robust.evaluation.progress import (
    BatchLog,
    Position,
    Progress,
    TimeLeft,
    gathered,
    rank_and_world_size,
)
from sj_robust.evaluation.worst_case import MemberRun, run_members
from sj_robust.perturbation import MPPDMonitor

__all__ = ["releases", "run_on_data", "run_suite"]


def run_suite(
    model: nn.Module,
    batches: Batches | Data,
    members: Sequence[Member],
    *,
    threat: ThreatModel,
    seed: int = 0,
    folder: Path | None = None,
    draws: int = 1,
    verified: Collection[int] = (),
    on_step: Callable[[Position], None] | None = None,
) -> SuiteOutcome:
    """Run every member of a suite on every batch and keep what happened to each image.
    在数据集上运行攻击套件。

    Every step is written down as it ends: the same call with the same folder goes on where a killed
    one stopped, and comes to the same result (times aside). A step is one member on one batch.

    Where ``torch.distributed`` is initialised (``torchrun``, ``accelerate launch``), process r of W
    takes the batches r, r + W, ...; all of them return the whole result, the same as one process. A
    process that is done waits for the others, so give the process group a timeout as long as the
    evaluation.

    Seeds belong to images by their number in the data set, so no result depends on the batch size,
    with two exceptions: a network that draws random numbers itself, and the estimator ``pdsg``,
    whose gradient is one of a whole batch.

    Args:
        model: Images [N, C, H, W] in [0, 1] to logits; runs in evaluation mode, and gets its modes
            back.
        batches: Batches (images, labels), a list or a loader; they are read once, see
            :class:`sj_robust.evaluation.data.Data`.
        members: The attacks, budgets inside; all that belong to the group ``"control"`` included.
        threat: Norm and size of what counts as broken.
        seed: Seeds everything.
        folder: Where progress is kept; None keeps none.
        draws: Fresh forwards in each of which a stochastic network must be wrong to be broken.
        verified: Numbers of images that are proved to withstand the threat; members that keep the
            threat leave them out, but for the first, so that a false proof is noticed.
        on_step: Called after every step.

    Raises:
        ValueError: If the folder holds the progress of another network, suite, threat, seed or data
            set, batches are not images and labels, or two members have one name.
        BlockingIOError: If another process works in the same folder.

    Examples:
        >>> from functools import partial
        >>> from sj_robust.attacks import fgsm
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> model[1].weight = nn.Parameter(torch.eye(2))
        >>> batches = [(torch.tensor([[[[0.6, 0.5]]], [[[0.9, 0.1]]]]), torch.tensor([0, 0]))]
        >>> members = [Member("fgsm", partial(fgsm, eps=0.1))]
        >>> outcome = run_suite(model, batches, members, threat=ThreatModel("Linf", 0.1))
        >>> outcome.correct, outcome.members[0].fooled
        ((0, 1), (0,))
    """
    data = Data.of(batches)
    return run_on_data(
        model,
        data,
        members,
        network=network_key(model, data, folder),
        threat=threat,
        seed=seed,
        folder=folder,
        draws=draws,
        verified=verified,
        on_step=on_step,
    )


def run_on_data(
    model: nn.Module,
    data: Data,
    members: Sequence[Member],
    *,
    network: str,
    threat: ThreatModel,
    seed: int,
    folder: Path | None,
    draws: int,
    verified: Collection[int] = (),
    on_step: Callable[[Position], None] | None = None,
) -> SuiteOutcome:
    """:func:`run_suite` for whoever knows the ``network`` by its key already."""
    names = [member.name for member in members]
    if len(set(names)) < len(names) or "clean" in names:
        raise ValueError(
            f"members must have names of their own, and none may be 'clean', got {names}"
        )
    key = {
        "network": network,
        "suite": fingerprint([description(member) for member in members]),
        "threat": description(threat),
        "seed": str(seed),
        "draws": str(draws),
        "data": data.fingerprint,
        "batch sizes": fingerprint(list(data.sizes)),
        "verified": fingerprint(sorted(verified)),
        "releases": releases(),
    }
    rank, processes = rank_and_world_size()
    progress = Progress(folder, key)
    own = range(rank, len(data), processes)
    left = TimeLeft(("clean", *names), len(own))
    run = _Run(
        model, tuple(members), threat, seed, draws, frozenset(verified), len(data), left, on_step
    )
    records: dict[int, list[dict[str, Any]]] = {}
    with evaluation_mode(model):
        for number in own:
            with progress.batch(number) as log:
                run.batch(number, sum(data.sizes[:number]), *data[number], log)
            records[number] = log.records
    return _outcome(data.labels, data.sizes, members, gathered(records))


def releases() -> str:
    """Releases that a result depends on, as part of a key. 结果所依赖的版本。"""
    found = environment()
    names = ("sj_robust", "spikingjelly", "torch")
    python = found["python"].rpartition(".")[0]
    return ", ".join([*(f"{name} {found[name]}" for name in names), f"python {python}"])


@dataclass(frozen=True)
class _Run:
    """One process's part of a run over so many batches."""

    model: nn.Module
    members: tuple[Member, ...]
    threat: ThreatModel
    seed: int
    draws: int
    verified: frozenset[int]
    batches: int
    time_left: TimeLeft
    on_step: Callable[[Position], None] | None

    def batch(self, number: int, start: int, x: Tensor, y: Tensor, log: BatchLog) -> None:
        """Do what is not yet in the log of a batch."""
        x, y = x.to(device_of(self.model)), y.to(device_of(self.model))
        seeds = SampleSeeds(range(start, start + len(y))).derived("image", self.seed)
        if not log.records:
            began = time.perf_counter()
            right = ~fooled(self.model, x, y, draws=1, seeds=seeds)
            seconds = time.perf_counter() - began
            log.append(
                {"member": "clean", "right": right.nonzero()[:, 0].tolist(), "seconds": seconds}
            )
        for record in log.records:
            self._tell(number, record)
        correct = torch.zeros_like(y, dtype=torch.bool)
        correct[log.records[0]["right"]] = True
        known = [record["fooled"] for record in log.records[1:]]
        safe = torch.tensor(
            [start + row in self.verified for row in range(len(y))], device=y.device
        )
        within = {
            member.name: safe for member in [*filter(self._keeps_the_threat, self.members)][1:]
        }
        runs = run_members(
            self.model,
            x,
            y,
            self.members,
            correct,
            seeds=seeds,
            draws=self.draws,
            known=known,
            spared=within,
        )
        for _ in self.members[len(known) :]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run = next(runs)
            texts = sorted({str(warning.message) for warning in caught})
            log.append(self._record(run, x[run.rows], texts, probe=number == 0))
            self._tell(number, log.records[-1])

    def _keeps_the_threat(self, member: Member) -> bool:
        threat = member.threat
        return (
            threat is not None and threat.norm == self.threat.norm and threat.eps <= self.threat.eps
        )

    def _record(
        self, run: MemberRun, x: Tensor, texts: list[str], *, probe: bool
    ) -> dict[str, Any]:
        """What a member did to its clean images ``x``, as plain data."""
        distance = self.threat.distance(x, run.x_adv)
        outside = run.fooled & (distance > self.threat.eps + self.threat.tolerance(x))
        record = {
            "member": run.member.name,
            "attacked": run.rows.tolist(),
            "fooled": run.rows[run.fooled].tolist(),
            "outside": run.rows[outside].tolist(),
            "largest": max(distance.tolist(), default=0.0),
            "seconds": run.seconds,
            "warnings": texts,
        }
        if probe and len(x):
            record["potential"] = _layer_perturbation(self.model, x, run.x_adv)
        return record

    def _tell(self, number: int, record: Mapping[str, Any]) -> None:
        left = self.time_left
        left.add(record["member"], record["seconds"])
        if self.on_step is not None:
            self.on_step(
                Position(
                    number, self.batches, record["member"], left.done, left.total, left.seconds()
                )
            )


def _layer_perturbation(model: nn.Module, x: Tensor, x_adv: Tensor) -> dict[str, Any]:
    """MS-MPPD of every spiking layer per time step: number of samples, layers in order of
    execution, and warnings of neurons that cannot be followed; empty if the network has no neuron
    that can.
    """
    with warnings.catch_warnings(record=True) as caught, seeded_globals(0, x.device):
        warnings.simplefilter("always")
        try:
            with MPPDMonitor(model) as monitor:
                stats = monitor.compare(x, x_adv, forward=model)
        except (ValueError, RuntimeError):  # there is no neuron to follow, or none that runs
            return {}
    layers = {name: layer.ms_mppd.tolist() for name, layer in stats.items()}
    return {
        "samples": len(x),
        "layers": layers,
        "warnings": sorted({str(warning.message) for warning in caught}),
    }


def _outcome(
    labels: tuple[int, ...],
    sizes: Sequence[int],
    members: Sequence[Member],
    records: Mapping[int, list[dict[str, Any]]],
) -> SuiteOutcome:
    """Put the batches together; numbers within a batch become numbers within the data set."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]

    def numbers(index: int, what: str) -> tuple[int, ...]:
        return tuple(
            start + row
            for number, start in enumerate(starts)
            for row in records[number][index][what]
        )

    outcomes = []
    for index, member in enumerate(members, start=1):
        rows = [records[number][index] for number in range(len(sizes))]
        outcomes.append(
            MemberOutcome(
                member.name,
                member.estimator,
                member.group,
                eps=member.eps,
                attacked=numbers(index, "attacked"),
                fooled=numbers(index, "fooled"),
                outside=numbers(index, "outside"),
                largest=max(row["largest"] for row in rows),
                seconds=sum(row["seconds"] for row in rows),
            )
        )
    potential = tuple(
        {"member": record["member"], **record["potential"]}
        for record in records[0]
        if record.get("potential")
    )
    said = sorted(
        {
            text
            for rows in records.values()
            for record in rows
            for text in record.get("warnings", ())
        }
    )
    return SuiteOutcome(labels, numbers(0, "right"), tuple(outcomes), potential, tuple(said))
