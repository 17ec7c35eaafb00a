"""AutoAttack of pyautoattack run by our own loop: its single runs are the library's, all around
them is not.

The library's own loop seeds torch's global generators of every device, takes away the tracer of
``sys.settrace``, fails with fewer than ten classes, and trusts an attack's word. FAB's gradients,
which the library adds to ``.grad`` of the parameters too, are taken for the images alone.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sj_robust.attacks._square import break_ties, square_rows
from sj_robust.attacks.call import Model, Objective
from sj_robust.attacks.threat import ThreatModel
from sj_robust.core.checks import check_logits
from sj_robust.core.randomness import (
    Private,
    SampleDraws,
    SampleSeeds,
    draw_seed,
    rand,
    randn,
    seeded_globals,
)

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # which the denominators of the DLR losses need
_CHECKED_IMAGES = 250  # AutoAttack's own batch size
_ITERATIONS = 100
_TARGETS = 9

_Run = Callable[[Tensor, Tensor, SampleSeeds | None], Tensor]
"""One run of an attack: images, labels and seeds of the samples to images that nobody has
checked.
"""


@dataclass(frozen=True)
class Settings:
    """What a version of AutoAttack runs."""

    attacks: tuple[str, ...]
    apgd_restarts: int = 1
    fab_restarts: int = 1
    eot_samples: int = 1
    queries: int = 5000


VERSIONS = {
    "standard": Settings(("apgd-ce", "apgd-t", "fab-t", "square")),
    "plus": Settings(
        ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"), apgd_restarts=5, fab_restarts=5
    ),
    "rand": Settings(("apgd-ce", "apgd-dlr"), eot_samples=20),
}


class AutoAttackWarning(UserWarning):
    """What AutoAttack's checks say about the network: its result may be unreliable."""


def library() -> ModuleType:
    """pyautoattack, or an error that says how to install it."""
    try:
        import pyautoattack.autopgd_base
        import pyautoattack.checks
        import pyautoattack.fab_pt
        import pyautoattack.square
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"autoattack runs on pyautoattack, which is not installed ({error}); "
            "use pip install 'sj_robust[attacks]'"
        ) from error
    module: ModuleType = pyautoattack
    return module


class _Network:
    """The model as the library sees it: float32 images to float32 logits, checked, in whatever
    context it is called.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.running = False

    def __call__(self, images: Tensor) -> Tensor:
        """Logits in float32, on the graph of the images if there is one."""
        return self.logits(images).float()

    def without_ties(self, images: Tensor) -> Tensor:
        """Logits in float32 whose winner stands alone."""
        logits = self.logits(images)
        return break_ties(logits.float(), logits.argmax(1))

    def logits(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        """Checked logits in float32 or float64."""
        self.running = True
        try:
            logits = self.model(images.to(self.dtype))
        finally:
            self.running = False
        return check_logits(
            logits, images.new_zeros(len(images), dtype=torch.int64) if y is None else y
        )

    @torch.no_grad()
    def right(self, images: Tensor, y: Tensor) -> Tensor:
        """Which images are classified right, [N] bool."""
        return self.logits(images, y).argmax(1) == y


class _Log:
    """What the library takes for a logger: warnings are kept, progress is dropped."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warning(self, message: str) -> None:
        self.messages.append(message)

    def summary(self) -> list[str]:
        """The first of all messages that differ in their numbers alone, and how many there were."""
        alike: dict[str, list[str]] = {}
        for message in self.messages:
            alike.setdefault(re.sub(r"\d+", "#", message), []).append(message)
        return [
            group[0] if len(group) == 1 else f"{group[0]} ({len(group)} times, with other numbers)"
            for group in alike.values()
        ]


@torch.no_grad()
def run_attacks(
    model: Model, x: Tensor, y: Tensor, *, ball: ThreatModel, settings: Settings, private: Private
) -> tuple[Tensor, list[str]]:
    """Images that fool where an attack found some, ``x`` elsewhere; and what the library has to
    say.
    """
    network, log, x_adv = _Network(model, x.dtype), _Log(), x.clone()
    logits = _clean_logits(network, x, y)
    standing, classes = logits.argmax(1) == y, logits.shape[1]
    if not bool(standing.any()):
        return x_adv, []
    settings = _possible(settings, classes, log)
    _check(network, x[:_CHECKED_IMAGES], y[:_CHECKED_IMAGES], settings, log)
    seed, seeds = draw_seed(private), _sample_seeds(private)
    accuracy = {"clean": float(standing.double().mean())}
    for name in settings.attacks:
        if not bool(standing.any()):
            break
        if name != "square":
            with (
                torch.enable_grad()
            ):  # the errors of our attacks where there is no gradient, or one that is not finite
                Objective(model).gradient(x[standing][:1], y[standing][:1])
        with seeded_globals(seed, x.device):
            for number, run in enumerate(
                _runs(name, network, ball, settings, classes=classes, log=log)
            ):
                rows = standing.nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                picked = None if seeds is None else seeds.rows(rows).derived(name, number)
                found = ball.project(x[rows], _finite(run(x[rows], y[rows], picked), name))
                fooled = ~network.right(found, y[rows])
                x_adv[rows[fooled]] = found[fooled]
                standing[rows[fooled]] = False
        accuracy[name] = float(standing.double().mean())
    library().checks.check_square_sr(accuracy, logger=log)
    return x_adv, log.summary()


@torch.no_grad()
def search_squares(
    model: Model, x: Tensor, y: Tensor, *, ball: ThreatModel, queries: int, private: Private
) -> Tensor:
    """Best images of the Square Attack; ``x`` where the model is wrong already."""
    network, x_adv, seeds = _Network(model, x.dtype), x.clone(), _sample_seeds(private)
    rows = (_clean_logits(network, x, y).argmax(1) == y).nonzero().squeeze(1)
    if len(rows):
        seed = draw_seed(private)
        numbered = SampleSeeds(range(len(x))).derived(seed) if seeds is None else seeds
        picked = numbered.rows(rows).derived("square", 0)
        with seeded_globals(seed, x.device):
            found = square_rows(
                network.without_ties, x[rows], y[rows], picked, ball=ball, queries=queries
            )
        x_adv[rows] = ball.project(x[rows], found)
    return x_adv


def _clean_logits(network: _Network, x: Tensor, y: Tensor) -> Tensor:
    logits = network.logits(x, y)
    if logits.shape[1] < 2:
        raise ValueError(
            f"the model must return at least 2 classes, got {logits.shape[1]}; return one logit "
            "per class"
        )
    return logits


def _sample_seeds(private: Private) -> SampleSeeds | None:
    return private.seeds if isinstance(private, SampleDraws) else None


def _possible(settings: Settings, classes: int, log: _Log) -> Settings:
    """Without the attacks that the number of classes does not allow, each with a warning."""
    left_out = [name for name in settings.attacks if classes < _LEAST_CLASSES.get(name, 2)]
    for name in left_out:
        log.warning(
            f"{name} is left out: it needs at least {_LEAST_CLASSES[name]} classes, the model "
            f"has {classes}"
        )
    kept = tuple(name for name in settings.attacks if name not in left_out)
    if not kept:
        raise ValueError(
            f"none of the attacks {settings.attacks} can attack {classes} classes; add 'apgd-ce' "
            "or 'fab'"
        )
    return replace(settings, attacks=kept)


def _check(network: _Network, x: Tensor, y: Tensor, settings: Settings, log: _Log) -> None:
    """The library's checks of the network, which leave its counters and the caller's tracer as they
    were.
    """
    checks = library().checks
    images = _as_images(x)
    if settings.eot_samples == 1:
        checks.check_randomized(network, images, y, logger=log)
    checks.check_range_output(network, images, logger=log)
    counts, tracer = dict(checks.funcs), sys.gettrace()
    checks.funcs.update(
        dict.fromkeys(counts, 0)
    )  # else a dynamic network seen before marks all later ones
    try:
        checks.check_dynamic(network, images, logger=log)
    finally:
        sys.settrace(tracer)
        checks.funcs.update(counts)


def _finite(images: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            f"{name} must find finite images, got NaN or infinity: the gradient was not finite; "
            "craft in float32"
        )
    return images


def _runs(
    name: str, network: _Network, ball: ThreatModel, settings: Settings, *, classes: int, log: _Log
) -> Iterator[_Run]:
    """The runs of an attack one after the other: restarts or target classes."""
    targets = range(2, min(_TARGETS, classes - 1) + 2)  # places among the sorted logits
    if name == "square":
        yield partial(_square_run, network, ball, settings.queries)
    elif name.startswith("apgd"):
        module = library().autopgd_base
        options: dict[str, Any] = {"n_iter": _ITERATIONS, "norm": ball.norm, "eps": ball.eps}
        options |= {"eot_iter": settings.eot_samples, "logger": log}
        if name == "apgd-t":
            targeted = module.APGDAttack_targeted(network, **options)
            yield from (partial(_apgd_run, targeted, target) for target in targets)
        else:
            attack = module.APGDAttack(network, loss=name.removeprefix("apgd-"), **options)
            yield from (partial(_apgd_run, attack, None) for _ in range(settings.apgd_restarts))
    else:
        fab = library().fab_pt.FABAttack_PT(
            network, norm=ball.norm, n_iter=_ITERATIONS, eps=ball.eps
        )
        fab.get_diff_logits_grads_batch = partial(_gradients_of_differences, network)
        fab.get_diff_logits_grads_batch_targeted = partial(_gradient_of_difference, network)
        if name == "fab-t":
            yield from (partial(_fab_run, fab, target, restart=0) for target in targets)
        else:
            yield from (
                partial(_fab_run, fab, None, restart=restart)
                for restart in range(settings.fab_restarts)
            )


def _square_run(
    network: _Network,
    ball: ThreatModel,
    queries: int,
    x: Tensor,
    y: Tensor,
    seeds: SampleSeeds | None,
) -> Tensor:
    """Square Attack on images that are classified right: the library's, or ours where seeds are per
    sample.

    Ours also takes images that are not float32, so as to search where it ends, and heights for
    which the library's L2 tiles do not fit into the image (12, 14, 18, 19, 24).
    """
    fits = ball.norm == "Linf" or _tiles_fit(*x.shape[2:])
    if seeds is None and (x.dtype != torch.float32 or not fits):
        seeds = SampleSeeds(torch.randint(2**62, (len(x),)))
    if seeds is not None:
        return square_rows(network.without_ties, x, y, seeds, ball=ball, queries=queries)
    options = {"norm": ball.norm, "n_queries": queries, "eps": ball.eps, "resc_schedule": False}
    attack = library().square.SquareAttack(network.without_ties, **options)
    images = _as_images(x)
    attack.init_hyperparam(images)
    found: Tensor = attack.attack_single_run(images, y)[1]
    return found


def _apgd_run(
    attack: Any, target: int | None, x: Tensor, y: Tensor, seeds: SampleSeeds | None
) -> Tensor:
    """One run of the library's APGD, ``target`` being the place of the target class among the
    sorted logits.
    """
    images = _as_images(x)
    attack.device = x.device
    attack.init_hyperparam(images)
    if target is not None:
        attack.y_target = attack.model(images).sort(dim=1)[1][:, -target]
    start = None
    if seeds is not None:
        noise = _noise(attack.norm, images, seeds)
        start = images + attack.eps * attack.normalize(
            2 * noise - 1 if attack.norm == "Linf" else noise
        )
    found: Tensor = attack.attack_single_run(images, y, x_init=start)[3]
    return found


def _fab_run(
    fab: Any, target: int | None, x: Tensor, y: Tensor, seeds: SampleSeeds | None, *, restart: int
) -> Tensor:
    """One run of the library's FAB; all but the first start at a random point."""
    images = _as_images(x)
    fab.device, fab.target_class = x.device, target
    drawn: AbstractContextManager[object] = nullcontext()
    if seeds is not None and restart > 0:
        drawn = _GivenNoise(_noise(fab.norm, images, seeds), fab.predict)
    with drawn:
        found: Tensor = fab.attack_single_run(
            images, y, use_rand_start=restart > 0, is_targeted=target is not None
        )
    return found


class _GivenNoise(TorchFunctionMode):
    """Answers the library's next torch.rand or torch.randn, but not the network's, with numbers
    drawn before.
    """

    def __init__(self, noise: Tensor, network: _Network) -> None:
        super().__init__()
        self.noise: Tensor | None = noise
        self.network = network

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        noise = self.noise
        if (
            noise is None
            or self.network.running
            or func not in (torch.rand, torch.randn)
            or args[0] != noise.shape
        ):
            return func(*args, **(kwargs or {}))
        self.noise = None
        return noise


def _gradients_of_differences(
    network: _Network, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Differences of all logits to the label's, [N, classes], and their gradients, nothing else's
    .grad touched.
    """
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        logits = network(images)
        sums = [column.sum() for column in logits.unbind(1)]
    columns = [torch.autograd.grad(total, images, retain_graph=True)[0] for total in sums]
    gradients, rows = torch.stack(columns, 1), torch.arange(len(labels), device=labels.device)
    logits = logits.detach()
    differences = logits - logits[rows, labels].unsqueeze(1)
    differences[rows, labels] = 1e10  # the label itself is never the nearest other class
    return differences, gradients - gradients[rows, labels].unsqueeze(1)


def _gradient_of_difference(
    network: _Network, images: Tensor, labels: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Difference of the target's logit to the label's, [N, 1], and its gradient, nothing else's
    .grad touched.
    """
    images = images.clone().requires_grad_()
    rows = torch.arange(len(labels), device=labels.device)
    with torch.enable_grad():
        logits = network(images)
        difference = logits[rows, targets] - logits[rows, labels]
        gradient = torch.autograd.grad(difference.sum(), images)[0]
    return difference.detach().unsqueeze(1), gradient.unsqueeze(1)


def _noise(norm: str, images: Tensor, seeds: SampleSeeds) -> Tensor:
    """What the library draws where a run starts, per sample: uniform in [0, 1) for Linf, normal for
    L2.
    """
    draw = rand if norm == "Linf" else randn
    return draw(images.shape, SampleDraws(seeds), dtype=images.dtype, device=images.device)


def _as_images(x: Tensor) -> Tensor:
    """Float32 in the memory layout that the library's views need."""
    return x.float().contiguous()


def _tiles_fit(height: int, width: int) -> bool:
    """Whether the library's first L2 perturbation stays within the image."""
    side = height // 5
    if side == 0:
        return False
    start = (height - 5 * side) // 2
    return side == 1 or all(start + size // side * side <= size for size in (height, width))
