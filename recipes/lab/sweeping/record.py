"""One run of a sweep as a file: what it was, and what came out."""

from dataclasses import dataclass, field
from typing import Any

from sj_robust.core.saved import SavedResult, plain

RECORD_FILE = "run.json"


@dataclass(frozen=True)
class RunRecord(SavedResult, what="a run of a sweep", format="sj_robust.sweep_run", version=1):
    """Options and accuracies of one run of a sweep.

    Attributes:
        name: Name of the run's folder.
        options: All options of the training; a number that is not finite is text, such as "inf", as
            on a command line.
        training: Counts of the recipe's own report by attack: ``{"correct": ..., "total": ...}``.
        evaluations: Per suite its ``options``, ``eps`` and ``figures``, counts like those of
            ``training``; ``alarm`` is the reason for which they mean nothing, empty if there is
            none.
        seconds: Time of the training and of each suite, of the last attempt where one was killed.
        cpu_seconds: Processor time of the same.
        cell: Name of the cell where the sweep's cells have names.
        validation: Accuracies on the validation images of the epoch that was selected, that which
            selected it first.
        ms_mppd: Per suite the MS-MPPD of the last spiking layer under each of its attacks, mean
            over time.
        trained_in: Versions, device, commit of the training, with the digest of the code of a
            network of one's own; empty in records of earlier versions.
        environment: The same of the last part of the run.
        notes: Warnings of the training.

    Examples:
        >>> record = RunRecord(
        ...     "at-seed0", {"mode": "at", "seed": 0}, {"clean": {"correct": 9, "total": 10}}
        ... )
        >>> record.accuracies, record.seed
        ({'clean': 0.9}, 0)
    """

    name: str
    options: dict[str, Any]
    training: dict[str, dict[str, int]] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    cell: str = ""
    validation: dict[str, float] = field(default_factory=dict)
    ms_mppd: dict[str, dict[str, float]] = field(default_factory=dict)
    trained_in: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", plain(self.options))
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.options["seed"])

    @property
    def accuracies(self) -> dict[str, float]:
        """Shares in [0, 1] by column: ``pgd20`` of the recipe's own report, ``paper/pgd20`` of the
        suite paper.
        """
        counts = dict(self.training)
        for suite, result in self.evaluations.items():
            for name, found in result["figures"].items():
                counts[f"{suite}/{name}"] = found
        shares = {}
        for name, found in counts.items():
            shares[name] = found["correct"] / found["total"]
        return shares

    @property
    def measures(self) -> dict[str, float]:
        """Figures that are no accuracies of the test, by column: ``validation/pgd``,
        ``paper/pgd20/ms_mppd``, ``training/cpu_seconds``.
        """
        found = {f"validation/{name}": share for name, share in self.validation.items()}
        for suite, layers in self.ms_mppd.items():
            found |= {f"{suite}/{attack}/ms_mppd": value for attack, value in layers.items()}
        return found | {f"{part}/cpu_seconds": value for part, value in self.cpu_seconds.items()}

    @property
    def headline(self) -> str:
        """Clean accuracy and the lowest of the training's report, and the worst case of every
        suite.
        """
        found = self.accuracies
        lowest = min(self.training, key=lambda name: found[name])
        shown = dict.fromkeys(["clean", lowest])
        texts = [f"{name} {found[name]:.1%}" for name in shown if name in found]
        for suite in self.evaluations:
            worst = found[f"{suite}/everything"]
            texts.append(f"{suite} worst {worst:.1%}")
        return ", ".join(texts)
