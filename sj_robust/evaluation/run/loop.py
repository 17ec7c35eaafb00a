"""The loop over the members of an evaluation: resumable, and shared by processes."""

import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust._version import __version__
from sj_robust.attacks.call import Attack, Model
from sj_robust.core.checks import check_labels, check_samples
from sj_robust.core.copies import in_copies, possible_copies
from sj_robust.core.digest import description, fingerprint
from sj_robust.core.environment import device_of, version_of
from sj_robust.core.preserved import evaluation_mode, seeded_network
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.result import DIGITS, Kind, Row
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.draws import BESIDE
from sj_robust.evaluation.run.member import (
    Crafted,
    Member,
    Variant,
    attacked_copy,
    clock,
    crafted,
    scored,
)
from sj_robust.evaluation.run.progress import (
    BatchLog,
    Images,
    Position,
    Progress,
    Step,
    TimeLeft,
    Watch,
    gathered,
    rank_and_world_size,
)
from sj_robust.perturbation import MPPDMonitor

__all__ = ["Asked", "Job", "Outcome", "alone", "releases", "rows_of", "run", "run_batch"]


_RULES = "4"
"""Number of the rules by which images are judged; a folder begun under other rules is not
continued. Under rules 1, every attack was judged with other random numbers; under rules 2, images
of some unusual networks were proved falsely; under rules 3, the attacked network judged itself.
"""


@dataclass(frozen=True)
class Asked:
    """The criterion for a broken image. 判定标准。

    Attributes:
        threat: Norm and size of what counts; None counts everything.
        draws: Forwards in more than half of which a stochastic network must be wrong, with the same
            random numbers for clean images and for every attack.
        may_draw: Whether the network may draw random numbers though one forward judges it.
        verified: Numbers of images that are proved to withstand the threat; members that keep the
            threat omit them, except for the first, so that a false proof is noticed.
    """

    threat: ThreatModel | None = None
    draws: int = 1
    verified: frozenset[int] = frozenset()
    may_draw: bool = False

    def keeps(self, member: Member) -> bool:
        """Whether a member keeps the threat."""
        if member.threat is None or self.threat is None:
            return False
        return self.threat.includes(member.threat)

    def measures_as(self, member: Member) -> bool:
        """Whether the distances of a member are measured as in the threat, whatever the radius."""
        if member.threat is None or self.threat is None:
            return False
        return replace(member.threat, eps=self.threat.eps) == self.threat

    def spared(self, members: Sequence[Member], start: int, y: Tensor) -> dict[str, Tensor]:
        """By name of a member, the images of a batch [N] bool that it leaves out."""
        proved = [start + row in self.verified for row in range(len(y))]
        safe = torch.tensor(proved, dtype=torch.bool, device=y.device)
        keeping = [member.name for member in members if self.keeps(member)]
        return dict.fromkeys(keeping[1:], safe)


@dataclass(frozen=True)
class Job:
    """A variant on one batch.

    Attributes:
        variant: The variant.
        model: Its network.
        x: Its images.
        y: Their labels.
        start: Number of the first image.
        seeds: One per image.
        asked: The criterion for a broken image.
        probed: Whether the perturbation of the potential is measured.
        plain: What judges beside the network itself: a copy that no attack has asked.
    """

    variant: Variant
    model: Model
    x: Tensor
    y: Tensor
    start: int
    seeds: SampleSeeds
    asked: Asked
    probed: bool = False
    plain: Model | None = None

    def clean(self) -> Step:
        """Which images are wrong without an attack."""
        began = time.perf_counter()
        known = self.variant.wrong
        seen = list(range(len(self.y)))
        if known is None:
            wrong = self._judged(self.x, self.y, self._judging)
            fell = wrong.nonzero()[:, 0].tolist()
        else:
            fell = [row for row in seen if self.start + row in known]
        seconds = time.perf_counter() - began
        return Step("clean", seen, fell, seconds=seconds)

    @property
    def _judging(self) -> SampleSeeds:
        """Seeds of the forwards that judge, the same for clean images and for every attack:
        otherwise each attack would be one more chance of unlucky numbers.
        """
        return self.seeds.derived("score")

    @property
    def _may_draw(self) -> bool:
        """Whether the network may draw random numbers."""
        return self.asked.draws > 1 or self.asked.may_draw or self.variant.may_draw

    def _hit(self, rows: Tensor, x_adv: Tensor) -> Tensor:
        """Which images of the rows are wrong, each beside those of other images.

        A network that draws gets the whole batch, the other images as they are, so that every image
        meets the numbers that it met before; any other one gets as few of them as makes
        ``BESIDE``.
        """
        if len(rows) == 0:
            return torch.zeros_like(rows, dtype=torch.bool)
        whole = self.x.clone()
        whole[rows] = x_adv.to(whole)
        if self._may_draw:
            return self._judged(whole, self.y, self._judging)[rows]
        others = torch.ones_like(self.y, dtype=torch.bool)
        others[rows] = False
        more = others.nonzero()[:, 0][: max(0, BESIDE - len(rows))]
        among = torch.cat((rows, more))
        judged = self._judged(whole[among], self.y[among], self._judging.rows(among))
        return judged[: len(rows)]

    def _judged(self, x: Tensor, y: Tensor, seeds: SampleSeeds) -> Tensor:
        """Whether the copy, or the network itself, gets each image wrong."""
        judge = partial(self.variant.judge, x=x, y=y, draws=self.asked.draws, seeds=seeds)
        wrong = judge(self.model)
        if self.plain is None or self.plain is self.model:
            return wrong
        return wrong | judge(self.plain)

    @cached_property
    def _copy(self) -> Model:
        """What the attacks ask."""
        return self.model if self._may_draw else attacked_copy(self.model, self.x)

    def _attacked(
        self, member: Member, rows: Tensor, starts: Tensor | None
    ) -> tuple[Crafted, Tensor]:
        """Images of a member, and which of them are wrong. Where rounding alone has fooled the
        copy, the network itself is attacked.
        """
        made = self._crafted(self._copy, member, rows, starts)
        hit = self._hit(rows, made.x_adv)
        if self._copy is self.model or len(rows) == 0:
            return made, hit
        logits = scored(self._copy, made.x_adv, self.y[rows], seed=0)
        missed = ((logits.argmax(1) != self.y[rows]) & ~hit).nonzero()[:, 0]
        if len(missed) == 0:
            return made, hit
        few = rows[missed]
        again = self._crafted(
            self.model, member, few, None if starts is None else starts[:, missed]
        )
        hit[missed] = self._hit(few, again.x_adv)
        distance = made.distance
        if distance is not None and again.distance is not None:
            distance = distance.index_copy(0, missed, again.distance)
        return Crafted(made.x_adv.index_copy(0, missed, again.x_adv), distance), hit

    def _crafted(
        self, model: Model, member: Member, rows: Tensor, starts: Tensor | None
    ) -> Crafted:
        """What a member makes of the images ``rows``."""
        x, y = self.x[rows], self.y[rows]
        return crafted(model, x, y, member, seeds=self.seeds.rows(rows), starts=starts)

    def attacked(
        self, member: Member, rows: Tensor, starts: Tensor | None = None
    ) -> tuple[Step, Images]:
        """What a member does to the images ``rows``, and what it makes of them."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x = self.x[rows]
            began = clock(x.device)
            made, hit = self._attacked(member, rows, starts)
            seconds = clock(x.device) - began
        distance = made.distance
        outside = torch.zeros_like(hit)
        if (threat := self.asked.threat) is not None:
            if distance is None or not self.asked.measures_as(member):
                distance = threat.distance(x, made.x_adv)
            outside = hit & (distance > threat.eps + threat.tolerance(x))
        potential = {}
        if self.probed and len(rows) and isinstance(self.model, nn.Module):
            potential = _layer_perturbation(self.model, x, made.x_adv)
        step = Step(
            member.name,
            seen=rows.tolist(),
            fell=rows[hit].tolist(),
            outside=rows[outside].tolist(),
            digests="".join(fingerprint(image)[:DIGITS] for image in made.x_adv[hit].cpu()),
            largest=0.0 if distance is None else max(distance.tolist(), default=0.0),
            seconds=seconds,
            warnings=sorted({str(warning.message) for warning in caught}),
            potential=potential,
        )
        return step, Images(rows, made.x_adv)


def run_batch(job: Job, log: BatchLog, members: Sequence[Member] | None = None) -> Iterator[Step]:
    """Run members of the variant, all of them or those given, in order, each on the images that are
    still correct in its group; members that are already in the log are not run again. Yields every
    step.
    """
    if members is None:
        members = job.variant.members
    if not log.steps:
        log.append(job.clean())
    yield log.steps[0]
    right = torch.ones_like(job.y, dtype=torch.bool)
    right[log.steps[0].fell] = False
    standing = {member.group: right.clone() for member in members}
    spared = job.asked.spared(job.variant.members, job.start, job.y)
    taking = [number for number, member in enumerate(members, 1) if member.takes_starts]
    last = max(taking, default=0)
    for number, member in enumerate(members, 1):
        if number == len(log.steps):
            left = standing[member.group]
            if member.name in spared:
                left = left & ~spared[member.name]
            rows = left.nonzero()[:, 0]
            starts = _starts(job, log, members[:number], rows) if member.takes_starts else None
            step, images = job.attacked(member, rows, starts)
            if number < last:
                log.keep(number, images)
            log.append(step)
        if member.group:
            standing[member.group][log.steps[number].fell] = False
        yield log.steps[number]
    if last:
        log.forget()


def _starts(job: Job, log: BatchLog, members: Sequence[Member], rows: Tensor) -> Tensor:
    """What the members of its group before the last one made of the images ``rows`` within its
    threat, [S, n, ...]; only those since the last one that took starts itself, if there are any.
    """
    taker = members[-1]
    allowed = Asked(taker.threat)
    giving, last = [], 0
    for earlier, member in enumerate(members[:-1], 1):
        if member.group != taker.group:
            continue
        if member.takes_starts:
            last = earlier
        if allowed.threat is None or allowed.keeps(member):
            giving.append(earlier)
    found = []
    for earlier in [one for one in giving if one > last] or giving:
        images = log.kept(earlier)
        whole = job.x.clone()
        whole[images.rows.to(whole.device)] = images.x_adv.to(whole)
        found.append(whole[rows])
    if not found:
        return job.x.new_empty((0, *job.x[rows].shape))
    return torch.stack(found)


@dataclass(frozen=True)
class Outcome:
    """Result of :func:`run`. 运行结果。

    Attributes:
        rows: Per variant one row of the clean images, and one per member.
        potential: MS-MPPD per layer and step under each member, on the first batch.
        warnings: What attacks and network warned of, each text once; and which variants could not
            be measured.
    """

    rows: tuple[Row, ...]
    potential: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


def run(
    model: nn.Module,
    data: Data,
    variants: Sequence[Variant],
    *,
    asked: Asked,
    network: str,
    plain: nn.Module | None = None,
    folder: Path | None = None,
    watch: Watch | None = None,
    shared: bool = True,
) -> Outcome:
    """Run every member of every variant on every batch and keep what happened to each image.
    在数据集上运行评估。

    Every step is written down as it ends: the same call with the same folder continues where a
    killed one stopped, and comes to the same result (times aside). A step is one member on one
    batch.

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
        data: The images.
        variants: What is run.
        asked: The criterion for a broken image.
        network: Fingerprint of the network.
        plain: What judges beside a network that a variant keeps, a copy that nothing has asked.
        folder: Where progress is kept; None keeps none.
        watch: Who watches.
        shared: Whether processes share the batches; False where one of them evaluates alone.

    Raises:
        ValueError: If the folder holds the progress of another network, suite, threat, seed or data
            set, or two members have one name.
        BlockingIOError: If another process works in the same folder.
    """
    for variant in variants:
        variant.check_names()
    rank, processes = rank_and_world_size() if shared else (0, 1)
    jobs = list(product(variants, range(len(data))))
    chains = [
        (number, chain)
        for number in range(rank, len(jobs), processes)
        for chain in range(len(_chains(jobs[number][0])))
    ]
    planned = [_chains(jobs[number][0])[chain] for number, chain in chains]
    clock_of_steps = _Steps(planned, len(jobs), watch or Watch())
    latest, changed = None, model  # a variant and its network, which is the one at hand
    kept: dict[str, Progress] = {}
    for variant in variants:
        place = folder
        if folder is not None and len(variants) > 1:
            place = folder / _slug(variant.name)
        key = {} if place is None else _key(data, variant, asked, network)
        kept[variant.name] = Progress(place, key)

    def one(index: int, tell: Callable[..., object]) -> list[Step] | str:
        nonlocal changed, latest
        number, chain = chains[index]
        variant, batch = jobs[number]
        try:
            if variant is not latest:
                changed, latest = variant.network(model), variant
            job = _job(changed, data, variant, batch, asked)
            if variant.keeps_network:
                job = replace(job, plain=plain)
            with kept[variant.name].batch(batch, chain) as log:
                for step in run_batch(job, log, _chains(variant)[chain]):
                    tell(number, variant.name, step.member, step.seconds)
                return log.steps
        except (ValueError, NotImplementedError) as error:
            if variant.is_plain:
                raise
            return f"{variant.name} was not measured: {error}."

    copies = possible_copies()
    found: dict[int, list[list[Step] | str]] = {}
    with evaluation_mode(model):
        for index, steps in in_copies(one, len(chains), copies, clock_of_steps.tell):
            number, chain = chains[index]
            found.setdefault(number, [[]] * len(_chains(jobs[number][0])))[chain] = steps
    parts = {number: _merged(jobs[number][0], steps) for number, steps in found.items()}
    if shared:
        parts = gathered(parts)
    return _outcome(data.sizes, variants, parts)


def _chains(variant: Variant) -> list[list[Member]]:
    """The members of each group, none of which depends on those of another group."""
    groups: dict[str, list[Member]] = {}
    for member in variant.members:
        groups.setdefault(member.group, []).append(member)
    return list(groups.values()) or [[]]


def _merged(variant: Variant, chains: Sequence[list[Step] | str]) -> list[Step] | str:
    """The steps of a batch in the order of the members, of each chain's; or why there are none."""
    known: list[list[Step]] = []
    for chain in chains:
        if isinstance(chain, str):
            return chain
        known.append(chain)
    steps = {step.member: step for chain in known for step in chain}
    return [known[0][0], *(steps[member.name] for member in variant.members)]


def alone(
    model: nn.Module, x: Tensor, y: Tensor, attacks: Mapping[str, Attack], *, seeds: SampleSeeds
) -> dict[str, int]:
    """Images of one batch that are right, ``"clean"`` and under each attack by itself, counted by
    the loop; for use during training.
    """
    check_samples(x)
    check_labels(y, x)
    members = [Member(name, attack, group="") for name, attack in attacks.items()]
    job = Job(Variant(members), model, x, y, 0, seeds, Asked(may_draw=True))
    with evaluation_mode(model):
        steps = list(run_batch(job, BatchLog()))
    return {step.member: len(step.seen) - len(step.fell) for step in steps}


def rows_of(
    variant: Variant, steps: Sequence[Sequence[Step]], starts: Sequence[int]
) -> tuple[Row, ...]:
    """The rows of a variant from the steps of its batches, which begin at the images ``starts``."""

    def numbers(index: int, what: str) -> tuple[int, ...]:
        found = []
        for start, batch in zip(starts, steps, strict=True):
            found += [start + row for row in getattr(batch[index], what)]
        return tuple(found)

    rows = []
    for index, member in enumerate((None, *variant.members)):
        batches = [batch[index] for batch in steps]
        row = Row(
            member=batches[0].member,
            kind=_kind(member),
            seen=numbers(index, "seen"),
            fell=numbers(index, "fell"),
            outside=numbers(index, "outside"),
            digests="".join(batch.digests for batch in batches),
            variant=variant.name,
            threat=None if member is None else member.threat,
            group="" if member is None else member.group,
            estimator="" if member is None else member.estimator,
            largest=max(step.largest for step in batches),
            seconds=sum(step.seconds for step in batches),
        )
        rows.append(row)
    return tuple(rows)


def releases() -> str:
    """Releases that a result depends on, as part of a key. 结果所依赖的版本。"""
    python = platform.python_version().rpartition(".")[0]
    found = {
        "sj_robust": __version__,
        "spikingjelly": version_of("spikingjelly") or "unknown",
        "torch": torch.__version__,
        "python": python,
        "rules": _RULES,
    }
    return ", ".join(f"{name} {release}" for name, release in found.items())


class _Steps:
    """The steps of this process as they are done, told to whoever watches."""

    def __init__(self, chains: Sequence[Sequence[Member]], jobs: int, watch: Watch) -> None:
        names: list[str] = []
        for chain in chains:
            names += ["clean", *(member.name for member in chain)]
        self._left = TimeLeft(names)
        self._jobs = jobs
        self._watch = watch

    def tell(self, job: int, variant: str, member: str, seconds: float) -> None:
        """Count a step."""
        left = self._left
        left.add(member, seconds)
        if self._watch.on_step is not None:
            name = f"{variant}, {member}" if variant else member
            seconds = left.seconds()
            position = Position(job, self._jobs, name, left.done, left.total, seconds)
            self._watch.on_step(position)


def _job(model: nn.Module, data: Data, variant: Variant, batch: int, asked: Asked) -> Job:
    start = sum(data.sizes[:batch])
    x, y = (part.to(device_of(model)) for part in data[batch])
    numbers = range(start, start + len(y))
    return Job(
        variant,
        model,
        x=variant.images(x, start),
        y=y,
        start=start,
        seeds=SampleSeeds(numbers).derived("image", variant.seed),
        asked=asked,
        probed=batch == 0 and not variant.name,
    )


def _key(data: Data, variant: Variant, asked: Asked, network: str) -> dict[str, str]:
    """What decides the result of a variant, by name."""
    changes = [variant.name, variant.network, variant.images, variant.judge]
    return {
        "network": network,
        "suite": fingerprint([description(member) for member in variant.members]),
        "variant": fingerprint(changes),
        "threat": description(asked.threat),
        "seed": str(variant.seed),
        "draws": str(asked.draws),
        "data": data.fingerprint,
        "batch sizes": fingerprint(list(data.sizes)),
        "verified": fingerprint(sorted(asked.verified)),
        "releases": releases(),
    }


def _slug(name: str) -> str:
    return re.sub("[:/ ]", "-", name)


def _kind(member: Member | None) -> Kind:
    if member is None:
        return "clean"
    return "control" if member.group == "control" else "attack"


def _outcome(
    sizes: Sequence[int], variants: Sequence[Variant], parts: Mapping[int, list[Step] | str]
) -> Outcome:
    """Put the batches together; numbers within a batch become numbers within the data set."""
    starts = [sum(sizes[:batch]) for batch in range(len(sizes))]
    rows: list[Row] = []
    potential: list[dict[str, Any]] = []
    said: set[str] = set()
    left_out: list[str] = []
    for place, variant in enumerate(variants):
        first = place * len(sizes)
        batches = [parts[first + batch] for batch in range(len(sizes))]
        reasons = [batch for batch in batches if isinstance(batch, str)]
        if reasons:
            left_out.append(reasons[0])
            continue
        steps = [batch for batch in batches if not isinstance(batch, str)]
        rows += rows_of(variant, steps, starts)
        potential += [
            {"member": step.member, **step.potential} for step in steps[0] if step.potential
        ]
        for batch in steps:
            said.update(text for step in batch for text in step.warnings)
    return Outcome(tuple(rows), tuple(potential), (*sorted(said), *left_out))


def _layer_perturbation(model: nn.Module, x: Tensor, x_adv: Tensor) -> dict[str, Any]:
    """MS-MPPD of every spiking layer per time step: number of samples, layers in order of
    execution, and warnings of neurons that cannot be followed; empty if the network has no neuron
    that can.

    A network that draws does so equally in both runs, which differ in the images alone.
    """

    def with_equal_draws(images: Tensor) -> Tensor:
        with seeded_network(model, 0, x.device):
            logits: Tensor = model(images)
        return logits

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with MPPDMonitor(model) as monitor:
                stats = monitor.compare(x, x_adv, forward=with_equal_draws)
        except (ValueError, RuntimeError):  # there is no neuron to follow, or none that runs
            return {}
    layers = {name: layer.ms_mppd.tolist() for name, layer in stats.items()}
    return {
        "samples": len(x),
        "layers": layers,
        "warnings": sorted({str(warning.message) for warning in caught}),
    }
