"""Chains of small moves that lower the margin of a network: in stages, and per sample."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sj_robust.attacks._moves import FLIPS, Moves, Place
from sj_robust.attacks.call import wide
from sj_robust.attacks.logits import leads
from sj_robust.core.checks import logits_of
from sj_robust.core.randomness import SampleDraws, SampleSeeds, rand
from sj_robust.core.threat import ThreatModel, linf_bounds

__all__ = ["STAGES", "Plan", "SpikeSearch", "Stage"]

_BLOCK = 16  # turns whose numbers are drawn at once
_WARM = 0.8  # share of a stage after which nothing worse is taken any more
_NOTHING = 1e-12  # keeps a length of 0 from being divided by
_TYPICAL = 0.08  # least size of a typical change, as a share of the image's own margin
_NO_CHANGE = 1e-4  # share of that margin up to which a change is rounding


class Stage(NamedTuple):
    """A part of a search.

    Attributes:
        chains: Chains of every sample.
        near: Typical changes of a margin that a sample's smallest one may be, if it is to take
            part.
        length: Share of the plan's turns.
    """

    chains: int
    near: float
    length: float = 1.0


STAGES = (
    Stage(2, math.inf, 0.25),
    Stage(2, 3.0),
    Stage(3, 1.8),
    Stage(5, 1.4),
    Stage(8, 1.2),
    Stage(12, 1.0),
    Stage(18, 0.7),
)
"""Few samples go on to many chains, so that forwards go where they may change something."""


@dataclass(frozen=True)
class Plan:
    """How a search distributes its forward passes.

    Attributes:
        moves: Kinds of moves, which take turns.
        forwards: Images of a sample that are judged, if it goes on to the end.
        stages: The parts of the search.
        run: How many of them are run.
        heat: How much worse a move may be on average, as a share of a typical change.
        rivals: Classes that the chains of a sample head for, the nearest ones.
        choice: Moves that are drawn, of which the one that promises most is tried; not of flips.
        rate: How fast the belief about the elements follows what was seen; 0 for none.
        batch_size: Images of one forward.
    """

    moves: tuple[str, ...]
    forwards: int
    stages: tuple[Stage, ...] = STAGES
    run: int = len(STAGES)
    heat: float = 0.1
    rivals: int = 3
    choice: int = 4
    rate: float = 0.5
    batch_size: int = 512

    def turns(self, stage: Stage) -> int:
        """Moves of every chain in a stage."""
        together = sum(one.chains * one.length for one in self.stages)
        return max(1, int(self.forwards * stage.length / together))


@dataclass
class SpikeSearch:
    """A search over samples [N] that none of their first images has fooled.

    Attributes:
        network: Images to logits.
        quicker: A faster copy, the same up to rounding, or the network itself; an image that fools
            the copy counts only if it fools the network.
        moves: What may be proposed.
        plan: How forwards are spent.
        ball: The threat.
        x: The images, [N, ...].
        y: Their labels.
        pool: Images found for each of them, [N, S, P].
        leads: By how much the label leads over every class on them, [N, S, classes].
        clean: Margins of the images themselves, [N].
    """

    network: Callable[[Tensor], Tensor]
    quicker: Callable[[Tensor], Tensor]
    moves: Moves
    plan: Plan
    ball: ThreatModel
    x: Tensor
    y: Tensor
    pool: Tensor
    leads: Tensor
    clean: Tensor

    def __post_init__(self) -> None:
        self.fooled = torch.zeros_like(self.y, dtype=torch.bool)
        self.best = self.leads.amin((1, 2))
        self.changed = _TYPICAL * self.clean
        self.changes = torch.ones_like(self.clean)
        self.slope = torch.zeros_like(self.pool[:, 0])
        self.x_adv = self.x.clone()

    @property
    def typical(self) -> Tensor:
        """Mean size of the changes of a margin that moves have made, at least 8 % of the image's
        own margin, [N].
        """
        return torch.maximum(self.changed / self.changes, _TYPICAL * self.clean)

    def run(self, seeds: SampleSeeds) -> Tensor:
        """All stages that are run; images that fool, and elsewhere those of the smallest margin."""
        for number, stage in enumerate(self.plan.stages[: self.plan.run]):
            is_near = self.best <= stage.near * self.typical
            rows = (~self.fooled & is_near).nonzero().squeeze(1)
            samples = max(1, self.plan.batch_size // stage.chains)
            for part in torch.split(rows, samples):
                if len(part):
                    walk = _Walk(
                        search=self, rows=part, chains=stage.chains, turns=self.plan.turns(stage)
                    )
                    walk.run(seeds.rows(part).derived(number))
        least = self.leads.amin(2).argmin(1)
        every = torch.arange(len(least), device=least.device)
        nearest = self.pool[every, least].view_as(self.x)
        nearest = nearest.to(self.x.dtype)
        standing = ~self.fooled
        self.x_adv[standing] = nearest[standing]
        return self.x_adv


class _Walk:
    """Some samples in one stage: S samples with C chains each, on images of P elements.

    Its nearest rivals, the classes that come closest to the label on an image of the pool, are
    dealt out to the chains; each chain lowers the lead over its own one.
    """

    def __init__(self, search: SpikeSearch, rows: Tensor, chains: int, turns: int) -> None:
        self.search = search
        self.turns = turns
        self.chains = chains
        self.rows = rows
        of_pool = search.leads[rows]
        _, images, classes = of_pool.shape
        rivals = min(search.plan.rivals, chains, classes - 1)
        number = torch.arange(chains, device=rows.device)
        nearest_classes = of_pool.amin(1).argsort(1)
        self.rival = nearest_classes[:, number % rivals]  # [S, C]
        rival_on_each = self.rival[:, None].expand(-1, images, -1)
        over_rival = of_pool.gather(2, rival_on_each)
        starts = min(images, max(1, chains // (2 * rivals)))
        rank = number // rivals % starts
        source = over_rival.argsort(1)[:, rank, number]
        self.x = search.pool[rows[:, None], source]  # [S, C, P]
        self.leads = search.leads[rows[:, None], source]  # [S, C, classes]
        self.value = self.over_rival(self.leads)  # [S, C]
        self.slope = search.slope[rows]  # [S, P]
        self.centre = search.x[rows].repeat_interleave(chains, 0)
        self.y = search.y[rows].repeat_interleave(chains)
        lower, upper = linf_bounds(self.centre, eps=search.ball.eps)
        self.low = wide(lower).flatten(1)
        self.high = wide(upper).flatten(1)

    def over_rival(self, every: Tensor) -> Tensor:
        """Of leads over every class [S, C, classes] that of each chain over its rival, [S, C]."""
        of_rival = every.gather(2, self.rival[:, :, None])
        return of_rival.squeeze(2)

    def keep(self, stays: Tensor) -> None:
        """Continue with some of the samples, given by their indices."""
        self.rows = self.rows[stays]
        self.rival = self.rival[stays]
        self.x = self.x[stays]
        self.leads = self.leads[stays]
        self.value = self.value[stays]
        self.slope = self.slope[stays]
        every = torch.arange(self.chains, device=stays.device)
        chains = (stays[:, None] * self.chains + every).flatten()
        self.centre = self.centre[chains]
        self.y = self.y[chains]
        self.low = self.low[chains]
        self.high = self.high[chains]

    def run(self, seeds: SampleSeeds) -> None:
        """All turns of the stage."""
        plan = self.search.plan
        for turn in range(self.turns):
            place = turn % _BLOCK
            if place == 0:
                numbers = self.draw(seeds, turn)
            drawn = numbers[2 * place]
            heat = numbers[2 * place + 1]
            cooled = max(0.0, 1 - turn / (_WARM * self.turns))
            kind = plan.moves[turn % len(plan.moves)]
            fell = self.turn(kind, drawn, heat, cooled)
            if fell is not None:
                stays = (~fell).nonzero().squeeze(1)
                self.keep(stays)
                numbers = [part[stays] for part in numbers]
                seeds = seeds.rows(stays)
                if len(self.rows) == 0:
                    return
        self.hand_over()

    def draw(self, seeds: SampleSeeds, turn: int) -> list[Tensor]:
        """Random numbers of the next turns: for each, those of its moves and those of its
        temperature.
        """
        plan = self.search.plan
        widths = []
        for number in range(turn, turn + _BLOCK):
            kind = plan.moves[number % len(plan.moves)]
            widths += [self.choice(kind) * self.search.moves.numbers(kind), 1]
        shape = (len(self.rows), self.chains, sum(widths))
        draws = SampleDraws(seeds.derived(turn))
        numbers = rand(shape, draws, dtype=torch.float32, device=self.x.device)
        return list(torch.split(numbers, widths, dim=2))

    def choice(self, kind: str) -> int:
        """Candidate moves of a kind, one of which is tried."""
        return 1 if kind in FLIPS else self.search.plan.choice

    def turn(self, kind: str, drawn: Tensor, heat: Tensor, cooled: float) -> Tensor | None:
        """One move of every chain; which samples have fallen, [S], or None if none has."""
        search = self.search
        images = self.propose(kind, drawn)
        logits = logits_of(search.quicker, images.view_as(self.centre), self.y)
        shape = self.value.shape
        found = wide(leads(logits, self.y)).view_as(self.leads)
        value = self.over_rival(found)
        proposal = wide(images).view_as(self.x)
        self.learn(proposal - self.x, value - self.value)
        mean_rise = search.plan.heat * cooled * search.typical[self.rows, None]
        allowed_rise = -mean_rise * torch.log1p(-heat.squeeze(2))
        taken = value <= self.value + allowed_rise
        self.x = torch.where(taken.unsqueeze(2), proposal, self.x)
        self.leads = torch.where(taken.unsqueeze(2), found, self.leads)
        self.value = torch.where(taken, value, self.value)
        least = found.amin((1, 2))
        before = search.best[self.rows]
        search.best[self.rows] = torch.minimum(before, least)
        is_wrong = logits.argmax(1) != self.y
        wrong_ones = self.confirmed(images, is_wrong.nonzero().squeeze(1))
        if len(wrong_ones) == 0:
            return None
        wrong = torch.zeros_like(is_wrong)
        wrong[wrong_ones] = True
        wrong = wrong.view(shape)
        fell = wrong.any(1)
        fallen = fell.nonzero().squeeze(1)
        first_wrong = wrong.int().argmax(1)
        rows = self.rows[fallen]
        images_of_fallen = images.view_as(self.x)[fallen, first_wrong[fallen]]
        search.x_adv[rows] = images_of_fallen.view_as(search.x[rows])
        search.fooled[rows] = True
        return fell

    def confirmed(self, images: Tensor, wrong: Tensor) -> Tensor:
        """Indices of the images that the network gets wrong, among those of the copy, ``wrong``."""
        search = self.search
        if search.quicker is search.network or len(wrong) == 0:
            return wrong
        asked = images.view_as(self.centre)[wrong]
        labels = self.y[wrong]
        logits = logits_of(search.network, asked, labels)
        return wrong[logits.argmax(1) != labels]

    def propose(self, kind: str, drawn: Tensor) -> Tensor:
        """An image of every chain, [n, P], inside the ball and in the dtype of the images."""
        search = self.search
        chains = Place(
            x=self.x.flatten(0, 1),
            low=self.low,
            high=self.high,
            slope=self.slope.repeat_interleave(self.chains, 0),
            rows=self.rows.repeat_interleave(self.chains),
            pool=search.pool,
        )
        choice = self.choice(kind)
        place = chains.repeated(choice)
        numbers = drawn.reshape(len(place.x), -1)
        proposed = search.moves.propose(kind, place, numbers)
        images = proposed.clamp(place.low, place.high)
        if choice > 1:
            change = images - place.x
            promise = (change * place.slope).sum(1)
            stays = (change == 0).all(1)
            promise = torch.where(stays, torch.inf, promise)
            most_promising = promise.view(-1, choice).argmin(1)
            first = torch.arange(0, len(images), choice, device=images.device)
            images = images[first + most_promising]
        if search.ball.norm == "L2":
            projected = search.ball.project(self.centre, images.view_as(self.centre))
            images = projected.flatten(1)
        return images.to(search.x.dtype)

    def learn(self, change: Tensor, gain: Tensor) -> None:
        """Update the estimates of the elements, and of the size of a change, from the moves of all
        chains.

        Equation: ``slope += rate * mean_c (gain_c - slope change_c) change_c / |change_c|^2``.
        """
        search = self.search
        size = gain.abs()
        changed = size > _NO_CHANGE * search.clean[self.rows, None]
        sizes = torch.where(changed, size, 0.0)
        search.changed[self.rows] += sizes.sum(1)
        search.changes[self.rows] += changed.sum(1)
        rate = search.plan.rate
        if rate == 0:
            return
        believed = torch.einsum("scp,sp->sc", change, self.slope)
        length = change.square().sum(2)
        off_per_length = (gain - believed) / length.clamp(min=_NOTHING)
        off = torch.where(length > _NOTHING, off_per_length, 0.0)
        correction = torch.einsum("sc,scp->sp", off, change)
        self.slope = self.slope + rate / self.chains * correction

    def hand_over(self) -> None:
        """The best half of the chains replaces the worst images of the pool."""
        search = self.search
        search.slope[self.rows] = self.slope
        margins = search.leads[self.rows].amin(2)
        many = min(self.chains, math.ceil(margins.shape[1] / 2))
        top = self.value.argsort(1)[:, :many]
        worst = margins.argsort(1, descending=True)[:, :many]
        every = torch.arange(len(top), device=top.device)[:, None]
        rows = self.rows[:, None]
        search.pool[rows, worst] = self.x[every, top]
        search.leads[rows, worst] = self.leads[every, top]
