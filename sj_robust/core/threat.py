"""What an adversary may do: the one representation of a norm and a radius, and the projection onto
its ball and the box [0, 1].
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sj_robust.core.broadcast import along
from sj_robust.core.checks import check_count, check_size, check_switch
from sj_robust.core.eps import parse_eps
from sj_robust.core.randomness import Private, rand, randn

__all__ = ["NormName", "Threat", "ThreatModel", "as_threat", "linf_bounds", "project_l2"]

NormName = Literal["Linf", "L2", "L0", "moves"]

_LARGEST = 2.0**53
"""Number of events up to which float64 is exact."""
_SAME_SIZE_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ThreatModel:
    """An adversary who may change an image within a ball and within [0, 1], or change or move a few
    events. 威胁模型。

    For ``"moves"``, events keep their pixel and polarity and move in time: at each pixel and
    polarity there are as many removed events as new ones, they are paired in order of time, and
    each pair is one move. Where a pair is farther apart than an event may move, events in between
    move on instead, and each of these counts as a move as well.

    Event frames are binary, and stay so, unless ``counts`` says that they hold numbers of events,
    integers >= 0. Of these a change adds one event to a value or removes one, as often as the
    budget pays, and any number of events may move to one place. It is not found out from the
    frames, so that a sample has the same adversary alone and in any batch.

    Attributes:
        norm: ``"Linf"``, or ``"L2"`` over all elements of an image; for event frames ``"L0"``
            or ``"moves"``.
        eps: Radius in units of [0, 1] images, such as ``8 / 255``; for ``"L0"`` the number of
            elements per sample that may be changed, for ``"moves"`` the number of events that may
            be moved, an integer >= 0.
        largest_shift: For ``"moves"``, the largest number of frames by which an event may be moved;
            None for no limit.
        total_shift: For ``"moves"``, the largest number of frames by which the events of a sample
            may be moved in total; None for no limit.
        counts: For ``"L0"`` and ``"moves"``, whether frames hold numbers of events.

    Raises:
        TypeError: If the radius is not a number, or ``counts`` is not a bool.
        ValueError: If the norm is unknown, if the radius is negative, not finite or (Linf) above 1,
            if a number of events is not an integer >= 0, or if a shift is not one >= 1.

    Examples:
        >>> ThreatModel("Linf", 8 / 255)
        ThreatModel(norm='Linf', eps=0.03137254901960784)
        >>> threat, x = ThreatModel("L0", 2), torch.zeros(1, 4)
        >>> x_adv = threat.project(x, torch.tensor([[0.0, 1.0, 1.0, 1.0]]))
        >>> x_adv, threat.distance(x, x_adv)
        (tensor([[0., 1., 1., 0.]]), tensor([2.], dtype=torch.float64))
        >>> counted = ThreatModel("L0", 3, counts=True)  # of 5 + 1 events the first 3
        >>> counted.project(x, torch.tensor([[0.0, 5.0, 1.0, 0.0]]))
        tensor([[0., 3., 0., 0.]])
    """

    norm: NormName
    eps: float
    largest_shift: int | None = None
    total_shift: int | None = None
    counts: bool = False

    def __repr__(self) -> str:
        shown = []
        for name, value in vars(self).items():
            if value is not None and value is not False:
                shown.append(f"{name}={value!r}")
        return f"ThreatModel({', '.join(shown)})"

    def __post_init__(self) -> None:
        if self.norm not in get_args(NormName):
            raise ValueError(f"norm must be 'Linf', 'L2', 'L0' or 'moves', got {self.norm!r}")
        self._check_limit("largest_shift", self.largest_shift)
        self._check_limit("total_shift", self.total_shift)
        check_switch("counts", self.counts)
        if self.counts and not self.of_events:
            raise ValueError(
                f"counts says what event frames hold, got it for {self.norm}; omit it, or take the "
                "norm 'L0' or 'moves'"
            )
        object.__setattr__(self, "eps", self._checked_eps())

    def _check_limit(self, name: str, shift: int | None) -> None:
        if shift is None:
            return
        if self.norm != "moves":
            raise ValueError(
                f"{name} limits moves of events, got {shift!r} for {self.norm}; omit it"
            )
        check_count(name, shift)

    def _checked_eps(self) -> float:
        if self.norm == "Linf":  # a ball of radius 1 holds all of [0, 1]
            return check_size("eps", self.eps, at_most=1.0)
        if self.norm == "L2":
            return check_size("eps", self.eps, at_most=math.inf)
        if isinstance(self.eps, bool) or self.eps < 0 or self.eps % 1 != 0:
            what = "changed elements" if self.norm == "L0" else "moved events"
            raise ValueError(
                f"eps must be an integer >= 0 for {self.norm}, the number of {what}, got "
                f"{self.eps!r}; for a distance of values use 'Linf' or 'L2'"
            )
        return int(self.eps)

    @property
    def of_events(self) -> bool:
        """Whether the adversary changes or moves events, which have no values between 0 and 1."""
        return self.norm in ("L0", "moves")

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """The image closest to ``x_adv`` that is within the budget around ``x``, exactly and in the
        dtype of ``x``.

        Equation, with ``d = x_adv - x``::

            Linf: clamp(x_adv, max(x - eps, 0), min(x + eps, 1))
            L2:   clamp(x + d * min(1, eps / ||d||), 0, 1)

        rounded towards ``x``: no element is farther away than ``eps`` in Linf, measured in float64
        or in the dtype of ``x``, and the L2 distance is at most ``eps * (1 + 1e-12)``. In L0, the
        ``eps`` elements that changed most stay changed (of equal ones, the first); with ``counts``,
        values are rounded to integers >= 0, and the largest changes stay until ``eps`` events are
        spent, the last one in part. Frames whose moves exceed a budget are replaced by the clean
        frames.
        """
        return self.projection(x)(x_adv)

    def projection(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """:meth:`project` for many ``x_adv``: everything that only depends on ``x`` is computed
        once.
        """
        if self.norm == "Linf":
            lower, upper = linf_bounds(x, eps=self.eps)
            return lambda x_adv: x_adv.to(x.dtype).clamp(lower, upper)
        if self.norm == "L2":
            return lambda x_adv: project_l2(x_adv, x, eps=self.eps)
        if self.norm == "moves":
            return lambda x_adv: self._allowed_moves(x, x_adv)
        fewest = _fewest_added_and_removed if self.counts else _fewest_changes
        return lambda x_adv: fewest(x, x_adv, int(self.eps))

    def distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Distance of every image from its clean image, [N] float64; in L0 the number of elements
        that differ, or infinity if a value is not in [0, 1]; with ``counts`` the number of events
        added and removed.

        For moves, the number of events that moved; infinity if a pixel and polarity has gained or
        lost an event or if a shift exceeds its limit. With ``counts`` and for moves, infinity also
        if a value is not a number of events, or is above 1 in binary frames.
        """
        if self.norm == "moves":
            return self._moves(x, x_adv)
        delta = (x_adv.double() - x.double()).flatten(1)
        if self.norm == "L0" and self.counts:
            held = self.holds_events(x_adv).flatten(1).all(1)
            events = delta.abs().sum(1)
            return torch.where(held, events, torch.inf)
        if self.norm == "L0":
            inside = (x_adv >= 0) & (x_adv <= 1)  # false for NaN
            elements = (delta != 0).sum(1).double()
            return torch.where(inside.flatten(1).all(1), elements, torch.inf)
        if self.norm == "Linf":
            return delta.abs().amax(1)
        return delta.square().sum(1).sqrt()

    def tolerance(self, x: Tensor) -> float:
        """How far beyond ``eps`` an image of another package may lie because of rounding; events
        are not rounded.

        Equation: :func:`rounding`; in L2, where all elements of an image may be rounded in the same
        direction, multiplied by the square root of their number. Images projected by this package
        need no tolerance.
        """
        if self.of_events:
            return 0.0
        if self.norm == "Linf":
            return rounding(x)
        elements = x.flatten(1).shape[1]
        return rounding(x) * math.sqrt(elements)

    def contains(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Whether every image is within the budget, up to :meth:`tolerance`, [N] bool."""
        return self.distance(x, x_adv) <= self.eps + self.tolerance(x)

    def includes(self, other: "ThreatModel") -> bool:
        """Whether all that another threat allows is allowed here: the norm and what frames hold are
        the same, and no limit is narrower. Threats of two norms are never compared.
        是否包含另一威胁模型。

        Examples:
            >>> ThreatModel("Linf", 8 / 255).includes(ThreatModel("Linf", 4 / 255))
            True
            >>> moves = ThreatModel("moves", 3, largest_shift=2)
            >>> moves.includes(ThreatModel("moves", 3)), ThreatModel("moves", 3).includes(moves)
            (False, True)
        """
        if (self.norm, self.counts) != (other.norm, other.counts):
            return False
        limits = [
            (self.eps, other.eps),
            (self.largest_shift, other.largest_shift),
            (self.total_shift, other.total_shift),
        ]
        return all(_no_narrower(own, its) for own, its in limits)

    def holds_events(self, x_adv: Tensor) -> Tensor:
        """Which values are numbers of events, that is 0 or 1 unless frames hold ``counts``."""
        most = torch.inf if self.counts else 1.0
        inside = (x_adv >= 0) & (x_adv <= most) & x_adv.isfinite()
        return inside & (x_adv == x_adv.round())

    def _allowed_moves(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """``x_adv`` where its moves keep the budget, ``x`` elsewhere."""
        allowed = per_sample(self.contains(x, x_adv), x)
        return torch.where(allowed, x_adv.to(x.dtype), x)

    def _moves(self, x: Tensor, x_adv: Tensor) -> Tensor:
        found = moves_of(x, x_adv)
        allowed = found.paired & self.holds_events(x_adv).flatten(1).all(1)
        events = found.events.double()
        if self.largest_shift is not None:
            far = allowed & (found.largest_shift > self.largest_shift)
            for number in far.nonzero().flatten():
                events[number] = _moves_that_make_way(
                    x[number], x_adv[number], self.largest_shift, int(self.eps)
                )
        if self.total_shift is not None:
            allowed &= found.total_shift <= self.total_shift
        return torch.where(allowed, events, torch.inf)


Threat = ThreatModel | float | str
"""What ``eps`` of a public function is: a threat model, or a radius such as ``8 / 255`` or
``"8/255"``.
"""


def as_threat(eps: Threat, *norms: NormName) -> ThreatModel:
    """What an adversary of one of these norms may do; a radius alone is one of the first norm.
    由 eps 得到威胁模型。

    Raises:
        ValueError: If it is no radius, or a threat of another norm.

    Examples:
        >>> as_threat("8/255", "Linf", "L2") == ThreatModel("Linf", 8 / 255)
        True
    """
    if not isinstance(eps, ThreatModel):
        return ThreatModel(norms[0], parse_eps(eps))
    if eps.norm not in norms:
        wanted = " or ".join(f"ThreatModel({norm!r}, ...)" for norm in norms)
        raise ValueError(f"eps must be {wanted} here, got {eps}")
    return eps


def _no_narrower(limit: float | None, other: float | None) -> bool:
    """Whether a limit is at least another; None is no limit."""
    if limit is None:
        return True
    return other is not None and limit >= other


class Moves(NamedTuple):
    """How the events of every sample moved in time. 事件的时间移动。

    Attributes:
        events: Number of events that moved, [N] int64.
        largest_shift: Largest shift of an event in frames, [N] int64.
        total_shift: Sum of all shifts in frames, [N] int64.
        paired: Whether every pixel and polarity has as many events as before, [N] bool.
    """

    events: Tensor
    largest_shift: Tensor
    total_shift: Tensor
    paired: Tensor


def moves_of(x: Tensor, x_adv: Tensor) -> Moves:
    """The moves between frames [N, T, ...]: at each pixel and polarity the k-th event gone became
    the k-th one new.

    Of all ways to pair them this one has the smallest largest shift and the smallest total shift.
    Of samples that do not hold whole numbers, or as many events as before, none is paired.
    """
    difference = x_adv.flatten(2).double() - x.flatten(2).double()
    is_whole = (difference.isfinite() & (difference == difference.round())).flatten(1).all(1)
    paired = is_whole & (difference.sum(1) == 0).all(1)
    removed = (-difference).clamp(min=0).flatten(1).sum(1)
    change = torch.where(along(paired, 0, difference.ndim), difference, 0.0).long()
    gone = (-change).clamp(min=0)
    new = change.clamp(min=0)
    left_until = gone.cumsum(1)
    came_until = new.cumsum(1)
    largest = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    total = torch.zeros_like(largest)
    most = int(gone.sum(1).max()) if change.numel() else 0
    for number in range(1, most + 1):  # the frames that hold event ``number``, T for none
        left = (left_until < number).sum(1)
        came = (came_until < number).sum(1)
        shift = (left - came).abs()
        largest = torch.maximum(largest, shift.amax(1))
        total = total + shift.sum(1)
    return Moves(
        events=as_counts(removed),
        largest_shift=largest,
        total_shift=total,
        paired=paired,
    )


def as_counts(values: Tensor) -> Tensor:
    """Whole numbers as int64; 2**53 where they are no numbers or larger."""
    return values.nan_to_num(_LARGEST).clamp(max=_LARGEST).long()


def _moves_that_make_way(x: Tensor, x_adv: Tensor, shift: int, most: int) -> float:
    """The fewest moves, each by so many frames, that turn a sample [T, *] into another; infinity if
    they are more than ``most``.
    """
    before = x.flatten(1)
    after = x_adv.flatten(1)
    differing = (before != after).any(0)
    lines = before[:, differing].T.long().tolist()
    others = after[:, differing].T.long().tolist()
    total = 0
    for line, other in zip(lines, others, strict=True):
        left: list[int] = []
        came: list[int] = []
        kept: list[int] = []
        for t, (old, new) in enumerate(zip(line, other, strict=True)):
            left += [t] * (old - new)  # none where this is below 0
            came += [t] * (new - old)
            kept += [t] * min(old, new)
        needed = _needed_to_make_way(left, came, kept, shift, most - total - len(left))
        if needed is None:
            return math.inf
        total += len(left) + needed
    return float(total)


def _needed_to_make_way(
    left: list[int], came: list[int], kept: list[int], shift: int, most: int
) -> int | None:
    """How many events of the frames ``kept`` have to move on so that those of ``left`` become those
    of ``came``; None if more than ``most``.
    """

    def are_near(moving_on: Iterable[int]) -> bool:
        """Whether these events of ``kept`` make all moves short enough."""
        sources = sorted([*left, *moving_on])
        targets = sorted([*came, *moving_on])
        return all(abs(a - b) <= shift for a, b in zip(sources, targets, strict=True))

    if not are_near(kept):  # not even if all of them move on
        return None
    for number in range(min(most, len(kept)) + 1):
        if any(are_near(others) for others in set(combinations(kept, number))):
            return number
    return None


def rounding(x: Tensor) -> float:
    """The one tolerance of this package, for an element of images from elsewhere: 1e-6 and two
    units of the dtype.
    """
    return 1e-6 + 2 * float(torch.finfo(x.dtype).eps)


def random_point(
    x: Tensor, threat: ThreatModel, private: Private, *, on_border: bool = False
) -> Tensor:
    """Uniform in the ball around ``x``, or somewhere on its border, then projected into [0, 1]."""
    draw = _l2_offset if threat.norm == "L2" else _linf_offset
    offset = draw(x, threat.eps, private, on_border=on_border)
    return threat.project(x, x + offset)


def _l2_offset(
    x: Tensor,
    eps: float,
    private: Private,
    *,
    on_border: bool,
) -> Tensor:
    normal = randn(x.shape, private, dtype=torch.float64, device=x.device)
    share: Tensor | float = 1.0
    if not on_border:
        images = x.shape[:1]
        uniform = rand(images, private, dtype=torch.float64, device=x.device)
        share = uniform ** (1 / x[0].numel())
    length = eps * share / l2_norm(normal)
    return normal * per_sample(length, x)


def _linf_offset(
    x: Tensor,
    eps: float,
    private: Private,
    *,
    on_border: bool,
) -> Tensor:
    drawn = rand(x.shape, private, dtype=x.dtype, device=x.device)
    uniform = 2 * drawn - 1
    offset = eps * uniform
    if on_border:
        largest = per_sample(uniform.abs().flatten(1).amax(1), x)
        offset = offset / torch.where(largest > 0, largest, 1.0)
    return offset


def _fewest_changes(x: Tensor, x_adv: Tensor, most: int) -> Tensor:
    """``x`` with the ``most`` largest changes of ``x_adv``, clamped to [0, 1]."""
    inside = x_adv.to(x.dtype).clamp(0, 1)
    x_adv = torch.where(x_adv.isnan(), x, inside)
    changes = (x_adv.double() - x.double()).abs().flatten(1)
    _, order = changes.sort(dim=1, descending=True, stable=True)
    nothing = torch.zeros_like(changes, dtype=torch.bool)
    kept = nothing.scatter(1, order[:, :most], True)
    return torch.where(kept.view_as(x), x_adv, x)


def _fewest_added_and_removed(x: Tensor, x_adv: Tensor, most: int) -> Tensor:
    """Numbers of events ``x`` with the ``most`` first events that the largest changes of ``x_adv``,
    rounded and >= 0, add or remove.
    """
    x_adv = torch.where(x_adv.isnan(), x, x_adv.to(x.dtype))
    rounded = x_adv.double().round().clamp(min=0)
    wanted = (rounded - x.double()).clamp(-most, most)
    sizes = wanted.abs().flatten(1)
    ordered, order = sizes.sort(dim=1, descending=True, stable=True)
    spent_before = ordered.cumsum(1) - ordered
    left = (most - spent_before).clamp(min=0)
    spent_in_order = torch.minimum(ordered, left)
    spent = torch.zeros_like(ordered).scatter(1, order, spent_in_order)
    change = wanted.sign() * spent.view_as(wanted)
    return x + change.to(x.dtype)


def linf_bounds(x: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest image within ``eps`` of ``x`` and within [0, 1].

    Equation: ``lower = max(x - eps, 0)``, ``upper = min(x + eps, 1)``, rounded towards ``x``:
    measured in float64 or in the dtype of ``x``, no element is farther away than ``eps``, without
    any tolerance. (Rounding to the nearest would leave the ball by half a unit in the last place.)

    Args:
        x: Images [N, ...] in [0, 1], any floating dtype.
        eps: Radius, >= 0.

    Returns:
        ``lower`` and ``upper``, each in shape, dtype and device of ``x``.

    Source: Linf ball of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> linf_bounds(torch.tensor([[0.125, 0.5]]), eps=0.25)
        (tensor([[0.0000, 0.2500]]), tensor([[0.3750, 0.7500]]))
    """
    radius = _round_down(eps, x.dtype)
    exact = x.double()
    lowest = (exact - radius).clamp(min=0)
    highest = (exact + radius).clamp(max=1)
    lower = _round_towards(x, lowest, limit=radius)
    upper = _round_towards(x, highest, limit=radius)
    return lower, upper


def project_l2(x_adv: Tensor, x: Tensor, *, eps: float) -> Tensor:
    """Image within L2 distance ``eps`` of ``x`` per sample and within [0, 1].

    Equation: ``clamp(x + d * min(1, eps / ||d||), 0, 1)`` with ``d = x_adv - x``. The clamp brings
    every element closer to ``x``, so that the result is within both bounds. It is rounded towards
    ``x``: measured in float64 the distance is at most ``eps * (1 + 1e-12)``.

    Args:
        x_adv: Images to project, in shape and dtype of ``x``.
        x: Centres [N, ...] in [0, 1].
        eps: Radius, >= 0.

    Source: Madry et al. (ICLR 2018), projected gradient descent, for the L2 ball.

    Examples:
        >>> project_l2(torch.tensor([[0.5, 1.5]]), torch.tensor([[0.5, 0.5]]), eps=0.25)
        tensor([[0.5000, 0.7500]])
    """
    centre = x.double()
    delta = x_adv.double() - centre
    length = per_sample(l2_norm(delta), delta)
    length = length.clamp(min=eps if eps > 0 else 1.0)  # shorter ones keep their length
    delta = delta * (eps / length)
    target = (centre + delta).clamp(0, 1)
    return _round_towards(x, target, limit=delta.abs())


def l2_norm(x: Tensor) -> Tensor:
    """L2 norm of every sample, [N], in float64: squares of float32 neither underflow nor overflow
    there.
    """
    flat = x.double().flatten(1)
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norm


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample, [N], in a shape that broadcasts over ``x`` [N, ...]."""
    return along(values, 0, x.ndim)


def _round_towards(x: Tensor, target: Tensor, *, limit: Tensor | float) -> Tensor:
    """Float64 ``target`` in the dtype of ``x``; where rounding took it farther from ``x`` than
    ``limit``, the neighbouring number that is closer to ``x``.
    """
    rounded = target.to(x.dtype)
    back = x.double() - rounded.double()
    too_far = back.abs() > limit
    # The bits of a number >= 0, read as an integer, plus 1 are those of the next larger number of
    # its dtype, and minus 1 those of the next smaller one.
    integer = _SAME_SIZE_INTEGER[x.element_size()]
    bits = rounded.view(integer)
    towards_x = back.sign().to(integer)
    bits = torch.where(too_far, bits + towards_x, bits)
    return bits.view(x.dtype)


def _round_down(eps: float, dtype: torch.dtype) -> float:
    """Largest number of ``dtype`` that is not above ``eps``."""
    nearest = torch.tensor(eps, dtype=dtype)
    if float(nearest) > eps:
        nearest = torch.nextafter(nearest, torch.zeros_like(nearest))
    return float(nearest)
