"""Search for few changes of binary frames that fool a model: growth by gradient, random exchanges,
reduction.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sj_robust.attacks._planes import Planes, taking_planes
from sj_robust.attacks.call import (
    Loss,
    Model,
    Objective,
    Randomness,
    averaged,
    crafting,
    lowest_loss,
)
from sj_robust.attacks.logits import likeliest_wrong, margin, of_class
from sj_robust.core.checks import check_counts, check_size, logits_of
from sj_robust.core.randomness import Private, SampleDraws, private_generator, rand

_TIE = 1e-12  # gains closer than this share of the largest one count as equal
_EXCHANGED = 0.3
"""Share of the changes that the first random exchange replaces; falls to a single one."""


@dataclass(frozen=True)
class Settings:
    """How long the search looks; see ``flip_events``."""

    steps: int
    probes: int
    queries: int
    target_classes: int
    restarts: int
    eot_samples: int
    confidence: float
    reduce: bool
    keep_best: bool
    loss: Loss | None


class FewestChanges:
    """Best changes so far per sample: fooling before not fooling, then fewer of them, or a higher
    loss.
    """

    def __init__(self, x: Tensor) -> None:
        self.changed = torch.zeros_like(x.flatten(1), dtype=torch.bool)
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.loss = lowest_loss(x)

    def offer(
        self,
        rows: Tensor,
        changed: Tensor,
        fooled: Tensor,
        loss: Tensor,
    ) -> None:
        """Take the changes of the samples ``rows`` that beat what is kept."""
        loss = loss.double()
        kept = self.fooled[rows]
        fewer = changed.sum(1) < self.changed[rows].sum(1)
        higher = loss > self.loss[rows]
        better = torch.where(fooled, ~kept | fewer, ~kept & higher)
        rows = rows[better]
        self.changed[rows] = changed[better]
        self.fooled[rows] = fooled[better]
        self.loss[rows] = loss[better]


class Seen(NamedTuple):
    """Predictions of the model for frames."""

    loss: Tensor
    """What the search climbs, [n]."""
    fooled: Tensor
    """Whether the model is fooled, by the confidence that is asked for, [n] bool."""


@dataclass
class Candidates:
    """Changes that a step may make, K per sample, the best first."""

    index: Tensor
    """The m elements that each of them changes, [n, K, m]."""
    promise: Tensor
    """By how much each of them should raise the loss, [n, K]; minus infinity for none at all."""


@dataclass
class EventSearch:
    """One run over the samples of a batch; ``rows`` are always indices into that batch."""

    objective: Objective
    x: Tensor
    """Frames [N, ...] of zeros and ones, but for elements that are not changeable."""
    y: Tensor
    changeable: Tensor
    """Where a change is allowed, [N, D] with D elements per sample."""
    settings: Settings
    private: Private
    scaled: bool = False
    """Whether random factors scale the gains, for a run that differs from others."""
    target: Tensor | None = None
    """Class [N] whose lead over the label is climbed; None for the loss of ``objective``."""

    def __post_init__(self) -> None:
        self.changed = torch.zeros_like(self.changeable)
        self.order = self._drawn()  # decides between equal gains

    def run(self, budget: Tensor, best: FewestChanges) -> None:
        """Grow the changes of every sample up to ``budget`` [N], reduce those that fool, and offer
        them to ``best``.
        """
        rows = self._grow(budget, best)
        if not self.settings.reduce or len(rows) == 0:
            return
        rank = self._ranks(rows)
        self._put_back_prefix(rows, rank)
        self._put_back_singles(rows, rank)
        fooled = torch.ones_like(rows, dtype=torch.bool)
        best.offer(rows, self.changed[rows], fooled, best.loss[rows])

    def _grow(self, budget: Tensor, best: FewestChanges) -> Tensor:
        """Largest first-order gains first, with fresh gradients in every step; samples that were
        fooled.
        """
        standing = budget > 0
        fooled = torch.zeros_like(standing)
        steps = self.settings.steps
        for step in range(steps):
            reached = (budget * (step + 1) + steps - 1) // steps
            size = reached - self.changed.sum(1)
            rows = (standing & (size > 0)).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            gradient, seen = self._gradient(rows)
            shown = seen.fooled | self.settings.keep_best
            best.offer(
                rows[shown],
                self.changed[rows[shown]],
                seen.fooled[shown],
                seen.loss[shown],
            )
            fooled[rows] = seen.fooled
            left = ~seen.fooled
            rows = rows[left]
            if len(rows):
                self._change_largest(rows, gradient[left], seen.loss[left], size[rows])
            standing &= ~fooled
        rows = standing.nonzero().squeeze(1)
        if len(rows):
            seen = self._score(rows, self.changed[rows])
            best.offer(rows, self.changed[rows], seen.fooled, seen.loss)
            fooled[rows] = seen.fooled
            left = ~seen.fooled
            exchanged = self._exchange(rows[left], seen.loss[left], budget, best)
            fooled[exchanged] = True
        return fooled.nonzero().squeeze(1)

    def _change_largest(
        self,
        rows: Tensor,
        gradient: Tensor,
        loss: Tensor,
        size: Tensor,
    ) -> None:
        """Change the ``size`` [n] most promising elements of every sample, none with a negative
        gain.
        """
        gain = gradient * self._direction(rows)
        if self.scaled:
            gain = gain * self.order[rows]
        free = self._free(rows, self.changed[rows])
        ranked = self._ranked(rows, gain).masked_fill(~free, -torch.inf)
        ranked, index = ranked.topk(self._many(size, ranked), dim=1)
        promise = gain.double().gather(1, index)
        promise = torch.where(ranked.isinf(), ranked, promise)
        self._take(rows, Candidates(index[..., None], promise), loss, size)

    def _many(self, size: Tensor, ranked: Tensor) -> int:
        """Number of candidates for the ``size`` [n] changes of a step."""
        most = int(size.max()) + self.settings.probes
        return min(most, ranked.shape[1])

    def _ranked(self, rows: Tensor, gain: Tensor) -> Tensor:
        """The gains, equal ones in random order."""
        finite = gain.masked_fill(gain.isinf(), 0.0)
        scale = finite.abs().amax(1, keepdim=True)
        scale = torch.where(scale > 0, scale, 1.0)
        return gain.double() + _TIE * scale * self.order[rows]

    def _take(
        self,
        rows: Tensor,
        candidates: Candidates,
        loss: Tensor,
        size: Tensor,
    ) -> None:
        """Make the best ``size`` [n] of the candidates, probed first."""
        probes = self.settings.probes
        if probes:
            # The width is the sample's own: that of the batch would let neighbours decide what is
            # probed.
            number = torch.arange(candidates.promise.shape[1], device=size.device)
            beyond = number >= (size + probes)[:, None]
            promise = candidates.promise.masked_fill(beyond, -torch.inf)
            candidates = self._probed(rows, Candidates(candidates.index, promise), loss)
            fooling = candidates.promise[:, 0] == torch.inf
            size = torch.where(fooling, 1, size)
        wanted = self._allowed(rows, candidates.index, candidates.promise >= 0)
        changed = self.changed[rows]
        self.changed[rows] = changed | made(candidates.index, wanted, size, like=changed)

    def _allowed(
        self,
        rows: Tensor,
        index: Tensor,
        wanted: Tensor,
    ) -> Tensor:
        """Which of the wanted changes [n, K] may be made together, if their number may."""
        return wanted

    def _probed(
        self,
        rows: Tensor,
        candidates: Candidates,
        loss: Tensor,
    ) -> Candidates:
        """The true gain of every candidate alone, best first; infinity if it fools."""
        index = candidates.index
        gained = torch.full_like(candidates.promise, -torch.inf)
        for column in range(index.shape[1]):
            there = ~candidates.promise[:, column].isinf()
            tried = there.nonzero().squeeze(1)
            if len(tried) == 0:
                break
            before = self.changed[rows[tried]]
            trial = before.scatter(1, index[tried, column], True)
            after = self._score(rows[tried], trial)
            rise = (after.loss - loss[tried]).double()
            gained[tried, column] = torch.where(after.fooled, torch.inf, rise)
        gained, order = gained.sort(dim=1, descending=True, stable=True)
        by_gain = order[..., None].expand_as(index)
        return Candidates(index.gather(1, by_gain), gained)

    def _exchange(
        self,
        rows: Tensor,
        loss: Tensor,
        budget: Tensor,
        best: FewestChanges,
    ) -> Tensor:
        """Exchange changes for random others, kept where the loss does not fall; samples that were
        fooled.
        """
        fooled = [rows[:0]]
        for query in range(self.settings.queries):
            if len(rows) == 0:
                break
            draw = self._drawn()[rows]
            share = _EXCHANGED * (1 - query / self.settings.queries)
            trial = self._exchanged(rows, draw, budget[rows], share)
            after = self._score(rows, trial)
            better = after.fooled | (after.loss >= loss)
            self.changed[rows[better]] = trial[better]
            loss = torch.where(better, after.loss, loss)
            best.offer(
                rows[better],
                trial[better],
                after.fooled[better],
                after.loss[better],
            )
            fooled.append(rows[after.fooled])
            left = ~after.fooled
            rows = rows[left]
            loss = loss[left]
        return torch.cat(fooled)

    def _exchanged(
        self,
        rows: Tensor,
        draw: Tensor,
        budget: Tensor,
        share: float,
    ) -> Tensor:
        """The changes with a random share of them replaced; additions and removals are equally
        likely to come in.
        """
        changed = self.changed[rows]
        many = share_of(changed, share)
        undone = largest(draw.masked_fill(~changed, -torch.inf), many)
        kept = changed & ~undone
        event = self.x[rows].flatten(1) == 1
        at_first = self._free(rows, torch.zeros_like(changed))
        removable = (event & at_first).sum(1, keepdim=True)
        addable = (~event & at_first).sum(1, keepdim=True)
        kinds = torch.where(event, removable, addable)
        free = self._free(rows, kept) & ~changed
        draw = (draw.log() * kinds).masked_fill(~free, -torch.inf)
        return kept | largest(draw, budget - kept.sum(1))

    def _drawn(self) -> Tensor:
        """Uniform numbers for all samples, [N, D]."""
        return uniform(self.x, self.private)

    def _free(self, rows: Tensor, changed: Tensor) -> Tensor:
        """Which elements may be changed next, given the changes so far, [n, D] bool."""
        return self.changeable[rows] & ~changed

    def _ranks(self, rows: Tensor) -> Tensor:
        """Rank of every change by importance at the end of growth, the least important 0; -1:
        none.
        """
        gradient, _ = self._gradient(rows)
        changed = self.changed[rows]
        importance = (gradient * self._direction(rows)).double()
        importance = importance.masked_fill(~changed, torch.inf)
        many = int(changed.sum(1).max())
        lowest, index = importance.topk(many, dim=1, largest=False, sorted=True)
        number = torch.arange(many, device=rows.device).expand_as(index)
        number = torch.where(lowest.isinf(), -1, number)
        ranks = torch.full_like(importance, -1, dtype=torch.int64)
        return ranks.scatter(1, index, number)

    def _put_back_prefix(self, rows: Tensor, rank: Tensor) -> None:
        """Undo the longest run of least important changes, found by bisection, that leaves the
        sample fooled.
        """
        undone = torch.zeros_like(rows)
        chunk = 2 ** (int(rank.max()) + 1).bit_length() // 2
        while chunk:
            start = undone[:, None]
            undo = (rank >= start) & (rank < start + chunk)
            undone += chunk * self._try_to_undo(rows, undo)
            chunk //= 2

    def _put_back_singles(self, rows: Tensor, rank: Tensor) -> None:
        """Undo change after change, least important first, until no single one can be undone."""
        changed = torch.ones_like(rows, dtype=torch.bool)
        while changed.any():
            again = torch.zeros_like(changed)
            for number in range(int(rank.max()) + 1):
                again |= self._try_to_undo(rows, (rank == number) & changed[:, None])
            changed = again

    def _try_to_undo(self, rows: Tensor, undo: Tensor) -> Tensor:
        """Undo the changes ``undo`` [n, D] of the samples that stay fooled without them; returns
        these samples, [n].
        """
        undo = undo & self.changed[rows]
        undone = undo.any(1)
        if undone.any():
            tried = rows[undone]
            trial = self.changed[tried] & ~undo[undone]
            fooled = self._score(tried, trial).fooled
            self.changed[tried[fooled]] = trial[fooled]
            undone[undone.clone()] = fooled
        return undone

    def _gradient(self, rows: Tensor) -> tuple[Tensor, Seen]:
        """Gradient [n, D] and predictions at the frames as changed so far."""
        frames = apply_changes(self.x[rows], self.changed[rows])
        gradient, score = self._objective(rows).gradient(frames, self.y[rows])
        fooled = confident(score.loss, score.fooled, self.settings)
        return gradient.flatten(1), Seen(score.loss, fooled)

    def _score(self, rows: Tensor, changed: Tensor) -> Seen:
        frames = apply_changes(self.x[rows], changed)
        score = self._objective(rows).score(frames, self.y[rows])
        return Seen(score.loss, confident(score.loss, score.fooled, self.settings))

    def _objective(self, rows: Tensor) -> Objective:
        if self.target is None:
            return self.objective
        return replace(self.objective, loss=partial(_lead_of, self.target[rows]))

    def _direction(self, rows: Tensor) -> Tensor:
        """How a change moves an element: +1 where there is no event, -1 where there is one."""
        return 1 - 2 * self.x[rows].flatten(1)


@dataclass(kw_only=True)
class CountSearch(EventSearch):
    """One run over numbers of events, in planes."""

    planes: Planes

    def _drawn(self) -> Tensor:
        return units(self.planes, self.private)

    def _free(self, rows: Tensor, changed: Tensor) -> Tensor:
        return super()._free(rows, changed) & self.planes.next_in_turn(changed)


def searched(
    model: Model,
    x: Tensor,
    y: Tensor,
    make: Callable[..., EventSearch],
    settings: Settings,
    *,
    budget: int,
    planes: int,
    generator: Randomness,
) -> Tensor:
    """Frames of an attack that runs searches made by ``make``, each of at most ``budget`` changed
    elements.

    ``make`` takes what an :class:`EventSearch` does, ``changeable`` aside. Frames come and go in
    so many planes, of which the model sees the sum.
    """
    settings = _checked(settings)
    if budget == 0 or x.numel() == 0:
        return x
    settings = replace(settings, steps=min(settings.steps, budget))
    loss = lead if settings.loss is None else settings.loss
    seen = taking_planes(model, planes)
    objective = Objective(seen, loss, eot_samples=settings.eot_samples)
    with crafting(model, x.device, generator) as private:
        y = y.clone()  # no tensor of the caller's inference mode, which no graph can hold
        best = _start(objective, x, y, settings)
        targets = _likeliest_others(seen, x, y, settings.target_classes)
        runs = [None, *targets, *[None] * (settings.restarts - 1)]
        for number, target in enumerate(runs):
            search = make(
                objective=objective,
                x=x,
                y=y,
                settings=settings,
                private=_own(private, x.device),
                scaled=number > len(targets),
                target=target,
            )
            size = torch.full_like(y, budget)
            fewer = best.changed[best.fooled].sum(1) - 1
            size[best.fooled] = fewer if settings.reduce else 0
            search.run(size, best)
    return apply_changes(x, best.changed)


def first_that_fools(
    model: Model | None,
    x: Tensor,
    y: Tensor | None,
    draw: Callable[[Private], Tensor],
    *,
    tries: int,
    planes: int,
    generator: Randomness,
    eot_samples: int = 1,
) -> Tensor:
    """For every sample, the first of several draws that fools the model by its mean logits, or else
    the last; model and y for several.
    """
    if tries == 1 or model is None or y is None:
        with torch.inference_mode(False):
            return draw(private_generator(generator, x.device))
    with crafting(model, x.device, generator) as private, torch.no_grad():
        seen = averaged(taking_planes(model, planes), eot_samples)
        x_adv = x.clone()
        standing = torch.ones_like(y, dtype=torch.bool)
        for _ in range(tries):
            drawn = draw(private)
            x_adv[standing] = drawn[standing]
            logits = logits_of(seen, x_adv[standing], y[standing])
            standing[standing.clone()] = logits.argmax(1) == y[standing]
            if not standing.any():
                break
    return x_adv


def check_tries(tries: int, eot_samples: int, model: Model | None, y: Tensor | None) -> None:
    """Raise an error for several draws without model and labels."""
    check_counts(tries=tries, eot_samples=eot_samples)
    if tries > 1 and (model is None or y is None):
        raise ValueError(
            f"tries > 1 need model and y to know which draw fools, got tries={tries} without them"
        )


def apply_changes(x: Tensor, changed: Tensor) -> Tensor:
    """Frames with the elements ``changed`` [N, D] turned from 0 to 1 or from 1 to 0."""
    return torch.where(changed.view_as(x), 1 - x, x)


def made(
    index: Tensor,
    wanted: Tensor,
    size: Tensor,
    *,
    like: Tensor,
) -> Tensor:
    """Mask like ``like`` [n, D] of the first ``size`` [n] wanted changes [n, K] of the elements
    ``index`` [n, K, m].
    """
    first = wanted & (wanted.cumsum(1) <= size[:, None])
    chosen = first[..., None].expand_as(index).flatten(1).long()
    counts = torch.zeros_like(like, dtype=torch.int64)
    return counts.scatter_add(1, index.flatten(1), chosen) > 0


def largest(values: Tensor, size: Tensor) -> Tensor:
    """Mask [n, D] of the ``size`` [n] largest values of every sample, none of them minus
    infinity.
    """
    highest, index = values.topk(min(int(size.max()), values.shape[1]), dim=1)
    number = torch.arange(highest.shape[1], device=size.device)
    chosen = (number < size[:, None]) & (highest > -torch.inf)
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, index, chosen)


def share_of(changed: Tensor, share: float) -> Tensor:
    """How many changes are a share of all of each sample, at least one, [n]."""
    many = share * changed.sum(1)
    return many.round().long().clamp(min=1)


def uniform(x: Tensor, private: Private) -> Tensor:
    """Uniform numbers [N, D]; drawn for all samples, so that those of one do not depend on how many
    are left.
    """
    return rand(x.flatten(1).shape, private, dtype=torch.float32, device=x.device)


def units(planes: Planes, private: Private) -> Tensor:
    """Uniform numbers [N, D] of planes: one for an event that is added to a value, and one for an
    event that is removed.
    """
    N, T = planes.frames.shape[:2]
    size = planes.by_plane(planes.frames.flatten(1)).shape[3]
    shape = (N, T * 2 * size)
    drawn = rand(shape, private, dtype=torch.float32, device=planes.frames.device)
    return planes.of_units(drawn)


def uniform_by_plane(x: Tensor, private: Private, planes: int) -> Tensor:
    """Uniform numbers [N, D] of frames in planes; those of a plane do not depend on how many there
    are.
    """
    own = _own(private, x.device)
    shape = (len(x), x[0].numel() // planes)
    parts = [rand(shape, own, dtype=torch.float32, device=x.device) for _ in range(planes)]
    by_frame = [part.view(len(x), x.shape[1], -1) for part in parts]
    return torch.cat(by_frame, 2).flatten(1)


def lead(logits: Tensor, y: Tensor) -> Tensor:
    """Lead of the strongest other class over the label, [N]; unlike cross entropy it never
    saturates.
    """
    if logits.shape[1] < 2:
        raise ValueError(
            f"logits must be of at least 2 classes, got {logits.shape[1]}; one class cannot be "
            "confused"
        )
    return -margin(logits, y)


def confident(loss: Tensor, fooled: Tensor, settings: Settings) -> Tensor:
    """Which fooled samples count as such, [n] bool."""
    if not settings.confidence:
        return fooled
    return fooled & (loss >= settings.confidence)


def _lead_of(target: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Lead of the classes ``target`` [n] over the labels, as a loss."""
    return of_class(logits, target) - of_class(logits, y)


def _checked(settings: Settings) -> Settings:
    given = settings
    check_counts(steps=given.steps, restarts=given.restarts, eot_samples=given.eot_samples)
    check_counts(
        least=0, probes=given.probes, queries=given.queries, target_classes=given.target_classes
    )
    return replace(settings, confidence=check_size("confidence", settings.confidence))


def _own(private: Private, device: torch.device) -> Private:
    """Randomness of one run, whose length depends on the other samples and must not move that of
    the next run.
    """
    source = private.next() if isinstance(private, SampleDraws) else private
    return private_generator(source, device)


def _start(
    objective: Objective,
    x: Tensor,
    y: Tensor,
    settings: Settings,
) -> FewestChanges:
    """The frames themselves as the first candidates: misclassified samples need no change."""
    best = FewestChanges(x)
    score = objective.score(x, y)
    best.fooled = confident(score.loss, score.fooled, settings).clone()
    if settings.keep_best:
        best.loss = score.loss.double()
    return best


@torch.no_grad()
def _likeliest_others(
    model: Model,
    x: Tensor,
    y: Tensor,
    count: int,
) -> list[Tensor]:
    """The ``count`` likeliest classes other than the label, each [N]."""
    if count == 0:
        return []
    logits = logits_of(model, x, y)
    if count >= logits.shape[1]:
        raise ValueError(
            f"target_classes must be < {logits.shape[1]}, the number of classes, got {count}"
        )
    return likeliest_wrong(logits, y, count)
