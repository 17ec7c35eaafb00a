"""Search for few changes of binary frames that fool a model: growth by gradient, random exchanges,
reduction.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sj_robust.attacks.call import Loss, Model, Objective, Randomness, crafting
from sj_robust.attacks.logits import likeliest_wrong, margin, of_class
from sj_robust.core.checks import check_count, check_logits, check_size
from sj_robust.core.randomness import Private, SampleDraws, private_generator, rand

_TIE = 1e-12  # gains closer than this share of the largest one count as equal
_EXCHANGED = (
    0.3  # share of the changes that the first random exchange replaces; falls to a single one
)


class Settings(NamedTuple):
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


class FewestFlips:
    """Best changes so far per sample: fooling before not fooling, then fewer of them, or a higher
    loss.
    """

    def __init__(self, x: Tensor) -> None:
        self.flipped = torch.zeros_like(x.flatten(1), dtype=torch.bool)
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.loss = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)

    def offer(self, rows: Tensor, flipped: Tensor, fooled: Tensor, loss: Tensor) -> None:
        """Take the changes of the samples ``rows`` that beat what is kept."""
        kept, loss = self.fooled[rows], loss.double()
        fewer = flipped.sum(1) < self.flipped[rows].sum(1)
        better = (fooled & (~kept | fewer)) | (~fooled & ~kept & (loss > self.loss[rows]))
        rows = rows[better]
        self.flipped[rows], self.fooled[rows], self.loss[rows] = (
            flipped[better],
            fooled[better],
            loss[better],
        )


@dataclass
class Search:
    """One run over the samples of a batch; ``rows`` are always indices into that batch."""

    objective: Objective
    x: Tensor
    """Frames [N, ...] of zeros and ones."""
    y: Tensor
    flippable: Tensor
    """Where a change is allowed, [N, D] with D elements per sample."""
    settings: Settings
    private: Private
    scaled: bool = False
    """Whether random factors scale the gains, for a run that differs from others."""
    target: Tensor | None = None
    """Class [N] whose lead over the label is climbed; None for the loss of ``objective``."""

    def __post_init__(self) -> None:
        self.flipped = torch.zeros_like(self.flippable)
        self.order = uniform(self.x, self.private)  # decides between equal gains

    def run(self, budget: Tensor, best: FewestFlips) -> None:
        """Grow the changes of every sample up to ``budget`` [N], reduce those that fool, and offer
        them to ``best``.
        """
        fooled = self._grow(budget, best)
        if self.settings.reduce and len(fooled):
            self._put_back_prefix(fooled, rank := self._ranks(fooled))
            self._put_back_singles(fooled, rank)
            best.offer(
                fooled,
                self.flipped[fooled],
                torch.ones_like(fooled, dtype=torch.bool),
                best.loss[fooled],
            )

    def _grow(self, budget: Tensor, best: FewestFlips) -> Tensor:
        """Largest first-order gains first, with fresh gradients in every step; samples that were
        fooled.
        """
        standing = budget > 0
        fooled = torch.zeros_like(standing)
        steps = self.settings.steps
        for step in range(steps):
            size = (budget * (step + 1) + steps - 1) // steps - self.flipped.sum(1)
            rows = (standing & (size > 0)).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            gradient, loss, done = self._gradient(rows)
            shown = done | self.settings.keep_best
            best.offer(rows[shown], self.flipped[rows[shown]], done[shown], loss[shown])
            fooled[rows] = done
            rows, gradient, loss = rows[~done], gradient[~done], loss[~done]
            if len(rows):
                self._flip_largest(rows, gradient, loss, size[rows])
            standing &= ~fooled
        rows = standing.nonzero().squeeze(1)
        if len(rows):
            loss, done = self._score(rows, self.flipped[rows])
            best.offer(rows, self.flipped[rows], done, loss)
            fooled[rows] = done
            fooled[self._exchange(rows[~done], loss[~done], budget, best)] = True
        return fooled.nonzero().squeeze(1)

    def _flip_largest(self, rows: Tensor, gradient: Tensor, loss: Tensor, size: Tensor) -> None:
        """Change the ``size`` [n] elements of every sample that promise most, none that promises a
        loss.
        """
        gain = gradient * self._direction(rows)
        if self.scaled:
            gain = gain * self.order[rows]
        ranked = self._ranked(rows, gain).masked_fill(
            ~self.flippable[rows] | self.flipped[rows], -torch.inf
        )
        wide = min(int(size.max()) + self.settings.probes, ranked.shape[1])
        ranked, index = ranked.topk(wide, dim=1)
        promise = torch.where(ranked.isinf(), ranked, gain.double().gather(1, index))
        self._take(rows, index[..., None], promise, loss, size)

    def _ranked(self, rows: Tensor, gain: Tensor) -> Tensor:
        """The gains, those that are equal in random order."""
        scale = gain.masked_fill(gain.isinf(), 0.0).abs().amax(1, keepdim=True)
        return gain.double() + _TIE * torch.where(scale > 0, scale, 1.0) * self.order[rows]

    def _take(
        self, rows: Tensor, index: Tensor, promise: Tensor, loss: Tensor, size: Tensor
    ) -> None:
        """Make the best ``size`` [n] changes, probed first; ``index`` [n, K, m]: the elements of
        each, best first.
        """
        number = torch.arange(index.shape[1], device=index.device)
        if self.settings.probes:
            # The width is the sample's own: that of the batch would let neighbours decide what is
            # probed.
            promise = promise.masked_fill(
                number >= (size + self.settings.probes)[:, None], -torch.inf
            )
            promise, index, size = self._probe(rows, index, promise, loss, size)
        self.flipped[rows] |= made(
            index, self._allowed(rows, index, promise >= 0), size, like=self.flipped[rows]
        )

    def _allowed(self, rows: Tensor, index: Tensor, wanted: Tensor) -> Tensor:
        """Which of the wanted changes [n, K] may be made together, if their number may."""
        return wanted

    def _probe(
        self, rows: Tensor, index: Tensor, promise: Tensor, loss: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What every candidate alone really gains, best first; a sample that one of them fools
        takes that one only.
        """
        real = torch.full_like(promise, -torch.inf)
        size = size.clone()
        for column in range(index.shape[1]):
            tried = (~promise[:, column].isinf()).nonzero().squeeze(1)
            if len(tried) == 0:
                break
            trial = self.flipped[rows[tried]].scatter(1, index[tried, column], True)
            after, fooled = self._score(rows[tried], trial)
            real[tried, column] = torch.where(fooled, torch.inf, (after - loss[tried]).double())
            size[tried[fooled]] = 1
        real, order = real.sort(dim=1, descending=True, stable=True)
        return real, index.gather(1, order[..., None].expand_as(index)), size

    def _exchange(self, rows: Tensor, loss: Tensor, budget: Tensor, best: FewestFlips) -> Tensor:
        """Exchange changes for random others, kept where the loss does not fall; samples that were
        fooled.
        """
        fooled = []
        for query in range(self.settings.queries):
            if len(rows) == 0:
                break
            draw = uniform(self.x, self.private)[rows]
            trial = self._exchanged(
                rows, draw, budget[rows], _EXCHANGED * (1 - query / self.settings.queries)
            )
            after, done = self._score(rows, trial)
            better = done | (after >= loss)
            self.flipped[rows[better]], loss = trial[better], torch.where(better, after, loss)
            best.offer(rows[better], trial[better], done[better], after[better])
            fooled.append(rows[done])
            rows, loss = rows[~done], loss[~done]
        return torch.cat(fooled) if fooled else rows[:0]

    def _exchanged(self, rows: Tensor, draw: Tensor, budget: Tensor, share: float) -> Tensor:
        """The changes with a random share of them replaced; additions and removals are equally
        likely to come in.
        """
        flipped = self.flipped[rows]
        many = flipped.sum(1)
        kept = flipped & ~largest(
            draw.masked_fill(~flipped, -torch.inf), (share * many).round().long().clamp(min=1)
        )
        event, free = self.x[rows].flatten(1) == 1, self.flippable[rows]
        kinds = torch.where(
            event, (event & free).sum(1, keepdim=True), (~event & free).sum(1, keepdim=True)
        )
        draw = (draw.log() * kinds).masked_fill(flipped | ~free, -torch.inf)
        return kept | largest(draw, budget - kept.sum(1))

    def _ranks(self, rows: Tensor) -> Tensor:
        """Rank of every change by importance at the end of growth, the least important 0; -1:
        none.
        """
        gradient, _, _ = self._gradient(rows)
        importance = (
            (gradient * self._direction(rows)).double().masked_fill(~self.flipped[rows], torch.inf)
        )
        many = int(self.flipped[rows].sum(1).max())
        lowest, index = importance.topk(many, dim=1, largest=False, sorted=True)
        number = torch.arange(many, device=rows.device).expand_as(index)
        ranks = torch.full_like(importance, -1, dtype=torch.int64)
        return ranks.scatter(1, index, torch.where(lowest.isinf(), -1, number))

    def _put_back_prefix(self, rows: Tensor, rank: Tensor) -> None:
        """Undo the longest run of least important changes, found by bisection, that leaves the
        sample fooled.
        """
        undone = torch.zeros_like(rows)
        chunk = 2 ** (int(rank.max()) + 1).bit_length() // 2
        while chunk:
            undo = (rank >= undone[:, None]) & (rank < (undone + chunk)[:, None])
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
        """Undo the changes ``undo`` [n, D] of the samples that stay fooled without them; for which
        that was so, [n].
        """
        undo = undo & self.flipped[rows]
        undone = undo.any(1)
        if undone.any():
            tried = rows[undone]
            trial = self.flipped[tried] & ~undo[undone]
            _, fooled = self._score(tried, trial)
            self.flipped[tried[fooled]] = trial[fooled]
            undone[undone.clone()] = fooled
        return undone

    def _gradient(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient [n, D], loss [n] and whether the model is fooled [n], at the frames as changed
        so far.
        """
        gradient, score = self._objective(rows).gradient(
            apply_flips(self.x[rows], self.flipped[rows]), self.y[rows]
        )
        return gradient.flatten(1), score.loss, self._confident(score.loss, score.fooled)

    def _score(self, rows: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor]:
        score = self._objective(rows).score(apply_flips(self.x[rows], flipped), self.y[rows])
        return score.loss, self._confident(score.loss, score.fooled)

    def _confident(self, loss: Tensor, fooled: Tensor) -> Tensor:
        return fooled & (loss >= self.settings.confidence) if self.settings.confidence else fooled

    def _objective(self, rows: Tensor) -> Objective:
        return (
            self.objective
            if self.target is None
            else replace(self.objective, loss=_lead_of(self.target[rows]))
        )

    def _direction(self, rows: Tensor) -> Tensor:
        """How a change moves an element: +1 where there is no event, -1 where there is one."""
        return 1 - 2 * self.x[rows].flatten(1)


def searched(
    model: Model,
    x: Tensor,
    y: Tensor,
    make: Callable[..., Search],
    settings: Settings,
    *,
    budget: int,
    generator: Randomness,
) -> Tensor:
    """Frames of an attack that runs searches made by ``make``, each of at most ``budget`` changed
    elements.

    ``make`` takes what a :class:`Search` does, ``flippable`` aside.
    """
    for name in ("steps", "restarts", "eot_samples"):
        check_count(name, getattr(settings, name))
    for name in ("probes", "queries", "target_classes"):
        check_count(name, getattr(settings, name), least=0)
    confidence = check_size("confidence", settings.confidence)
    if budget == 0 or x.numel() == 0:
        return x
    settings = settings._replace(steps=min(settings.steps, budget), confidence=confidence)
    loss = lead if settings.loss is None else settings.loss
    objective = Objective(model, loss, eot_samples=settings.eot_samples)
    with crafting(model, x.device, generator) as private:
        y = y.clone()  # no tensor of the caller's inference mode, which no graph can hold
        best = _start(objective, x, y, settings)
        targets = _likeliest_others(model, x, y, settings.target_classes)
        for run in range(len(targets) + settings.restarts):
            towards = targets[run - 1] if 1 <= run <= len(targets) else None
            own, scaled = _own(private, x.device), run > len(targets)
            search = make(
                objective=objective,
                x=x,
                y=y,
                settings=settings,
                private=own,
                scaled=scaled,
                target=towards,
            )
            size = torch.full_like(y, budget)
            size[best.fooled] = best.flipped[best.fooled].sum(1) - 1 if settings.reduce else 0
            search.run(size, best)
    return apply_flips(x, best.flipped)


def first_that_fools(
    model: Model | None,
    x: Tensor,
    y: Tensor | None,
    draw: Callable[[Private], Tensor],
    *,
    tries: int,
    generator: Randomness,
) -> Tensor:
    """Of several draws for every sample the first that fools the model, or else the last; model and
    y for several.
    """
    if tries == 1 or model is None or y is None:
        with torch.inference_mode(False):
            return draw(private_generator(generator, x.device))
    with crafting(model, x.device, generator) as private, torch.no_grad():
        x_adv, standing = x.clone(), torch.ones_like(y, dtype=torch.bool)
        for _ in range(tries):
            drawn = draw(private)
            x_adv[standing] = drawn[standing]
            standing[standing.clone()] = (
                check_logits(model(x_adv[standing]), y[standing]).argmax(1) == y[standing]
            )
            if not standing.any():
                break
    return x_adv


def check_tries(tries: int, model: Model | None, y: Tensor | None) -> None:
    """Refuse several draws where nothing tells which of them fools."""
    check_count("tries", tries)
    if tries > 1 and (model is None or y is None):
        raise ValueError(
            f"tries > 1 need model and y to know which draw fools, got tries={tries} without them"
        )


def apply_flips(x: Tensor, flipped: Tensor) -> Tensor:
    """Frames with the elements ``flipped`` [N, D] changed from 0 to 1 or from 1 to 0."""
    return torch.where(flipped.view_as(x), 1 - x, x)


def made(index: Tensor, wanted: Tensor, size: Tensor, *, like: Tensor) -> Tensor:
    """Mask like ``like`` [n, D] of the first ``size`` [n] wanted changes [n, K] of the elements
    ``index`` [n, K, m].
    """
    chosen = (wanted & (wanted.cumsum(1) <= size[:, None]))[..., None].expand_as(index)
    counts = torch.zeros_like(like, dtype=torch.int64)
    return counts.scatter_add(1, index.flatten(1), chosen.flatten(1).long()) > 0


def largest(values: Tensor, size: Tensor) -> Tensor:
    """Mask [n, D] of the ``size`` [n] largest values of every sample, none of them minus
    infinity.
    """
    highest, index = values.topk(int(size.max()), dim=1)
    chosen = (torch.arange(highest.shape[1], device=size.device) < size[:, None]) & (
        highest > -torch.inf
    )
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, index, chosen)


def uniform(x: Tensor, private: Private) -> Tensor:
    """Uniform numbers [N, D]; drawn for all samples, so that those of one do not depend on how many
    are left.
    """
    return rand(x.flatten(1).shape, private, dtype=torch.float32, device=x.device)


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


def _lead_of(target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Lead of the classes ``target`` [n] over the labels, as a loss."""
    return lambda logits, y: of_class(logits, target) - of_class(logits, y)


def _own(private: Private, device: torch.device) -> Private:
    """Randomness of one run, whose length depends on the other samples and must not move that of
    the next run.
    """
    return private_generator(
        private.next() if isinstance(private, SampleDraws) else private, device
    )


def _start(objective: Objective, x: Tensor, y: Tensor, settings: Settings) -> FewestFlips:
    """The frames themselves as the first candidates: what is wrong already needs no change."""
    best, score = FewestFlips(x), objective.score(x, y)
    best.fooled = (
        score.fooled & (score.loss >= settings.confidence)
        if settings.confidence
        else score.fooled.clone()
    )
    if settings.keep_best:
        best.loss = score.loss.double()
    return best


@torch.no_grad()
def _likeliest_others(model: Model, x: Tensor, y: Tensor, count: int) -> list[Tensor]:
    """The ``count`` likeliest classes other than the label, each [N]."""
    if count == 0:
        return []
    logits = check_logits(model(x), y)
    if count >= logits.shape[1]:
        raise ValueError(
            f"target_classes must be < {logits.shape[1]}, the number of classes, got {count}"
        )
    return likeliest_wrong(logits, y, count)
