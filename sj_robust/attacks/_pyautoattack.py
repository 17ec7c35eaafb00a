"""Single runs of pyautoattack's attacks, called so that they touch nothing of the caller's.

The library's ``perturb`` seeds torch's global generators of every device, so it is not called. FAB's gradients, which
the library adds to ``.grad`` of the parameters too, are taken for the images alone.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sj_robust.attacks._square import break_ties, square_rows
from sj_robust.attacks.call import Model
from sj_robust.attacks.checks import check_logits
from sj_robust.attacks.threat import ThreatModel
from sj_robust.randomness import SampleDraws, SampleSeeds, rand, randn

__all__ = ["Log", "Network", "Run", "Settings", "as_images", "library", "runs", "square_run"]

_ITERATIONS = 100
_TARGETS = 9

Run = Callable[[Tensor, Tensor, SampleSeeds | None], Tensor]
"""One run of an attack: images, labels and seeds of the samples to images that nobody has checked."""


@dataclass(frozen=True)
class Settings:
    """What a version of AutoAttack runs."""

    attacks: tuple[str, ...]
    apgd_restarts: int = 1
    fab_restarts: int = 1
    eot_samples: int = 1
    queries: int = 5000


def library() -> ModuleType:
    """pyautoattack, or an error that says how to install it."""
    try:
        import pyautoattack.autopgd_base
        import pyautoattack.checks
        import pyautoattack.fab_pt
        import pyautoattack.square
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"autoattack and square run on pyautoattack, which is not installed ({error}); "
            "use pip install 'sj_robust[attacks]'"
        ) from error
    module: ModuleType = pyautoattack
    return module


class Network:
    """The model as the library sees it: float32 images to float32 logits, checked, in whatever context it is called."""

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
        if y is None and _evidently_logits(logits, images):
            return logits if logits.dtype == torch.float64 else logits.float()
        return check_logits(logits, images.new_zeros(len(images), dtype=torch.int64) if y is None else y)

    @torch.no_grad()
    def right(self, images: Tensor, y: Tensor) -> Tensor:
        """Which images are classified right, [N] bool."""
        return self.logits(images, y).argmax(1) == y


def _evidently_logits(logits: object, images: Tensor) -> bool:
    """Whether the checks of logits would pass, at the cost of one sum; False where it takes all of them to tell."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        return False
    return logits.is_floating_point() and math.isfinite(float(logits.detach().sum()))


class Log:
    """What the library takes for a logger: warnings are kept, progress is dropped."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warning(self, message: str) -> None:
        """Keep it."""
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


def runs(
    name: str, network: Network, ball: ThreatModel, settings: Settings, *, classes: int, log: Log
) -> Iterator[Run]:
    """The runs of an attack one after the other: restarts or target classes."""
    targets = range(2, min(_TARGETS, classes - 1) + 2)  # places among the sorted logits
    if name == "square":
        yield square_run(network, ball, settings.queries)
    elif name.startswith("apgd"):
        module = library().autopgd_base
        options: dict[str, Any] = {
            "n_iter": _ITERATIONS,
            "norm": ball.norm,
            "eps": ball.eps,
            "eot_iter": settings.eot_samples,
            "logger": log,
        }
        if name == "apgd-t":
            targeted = module.APGDAttack_targeted(network, **options)
            yield from (partial(_apgd_run, targeted, target) for target in targets)
        else:
            attack = module.APGDAttack(network, loss=name.removeprefix("apgd-"), **options)
            yield from (partial(_apgd_run, attack, None) for _ in range(settings.apgd_restarts))
    else:
        fab = library().fab_pt.FABAttack_PT(network, norm=ball.norm, n_iter=_ITERATIONS, eps=ball.eps)
        fab.get_diff_logits_grads_batch = partial(_gradients_of_differences, network)
        fab.get_diff_logits_grads_batch_targeted = partial(_gradient_of_difference, network)
        if name == "fab-t":
            yield from (partial(_fab_run, fab, target, restart=0) for target in targets)
        else:
            yield from (partial(_fab_run, fab, None, restart=restart) for restart in range(settings.fab_restarts))


def square_run(network: Network, ball: ThreatModel, queries: int) -> Run:
    """Square Attack on images that are classified right: the library's, or ours where seeds are per sample.

    Ours also takes images that are not float32, so as to search where it ends, and heights for which the library's L2
    tiles do not fit into the image (12, 14, 18, 19, 24).
    """
    module = library().square

    def run(x: Tensor, y: Tensor, seeds: SampleSeeds | None) -> Tensor:
        fits = ball.norm == "Linf" or _tiles_fit(*x.shape[2:])
        if seeds is None and (x.dtype != torch.float32 or not fits):
            seeds = SampleSeeds(torch.randint(2**62, (len(x),)))
        if seeds is not None:
            return square_rows(network.without_ties, x, y, seeds, eps=ball.eps, norm=ball.norm, queries=queries)
        attack = module.SquareAttack(
            network.without_ties,
            norm=ball.norm,
            n_queries=queries,
            eps=ball.eps,
            resc_schedule=False,
        )
        images = as_images(x)
        attack.init_hyperparam(images)
        found: Tensor = attack.attack_single_run(images, y)[1]
        return found

    return run


def _apgd_run(attack: Any, target: int | None, x: Tensor, y: Tensor, seeds: SampleSeeds | None) -> Tensor:
    """One run of the library's APGD, ``target`` being the place of the target class among the sorted logits."""
    images = as_images(x)
    attack.device = x.device
    attack.init_hyperparam(images)
    if target is not None:
        attack.y_target = attack.model(images).sort(dim=1)[1][:, -target]
    start = None
    if seeds is not None:
        noise = _noise(attack.norm, images, seeds)
        start = images + attack.eps * attack.normalize(noise)
    found: Tensor = attack.attack_single_run(images, y, x_init=start)[3]
    return found


def _fab_run(fab: Any, target: int | None, x: Tensor, y: Tensor, seeds: SampleSeeds | None, *, restart: int) -> Tensor:
    """One run of the library's FAB; all but the first start at a random point."""
    images = as_images(x)
    fab.device, fab.target_class = x.device, target
    options = {"use_rand_start": restart > 0, "is_targeted": target is not None}
    found: Tensor
    if seeds is None or restart == 0:
        found = fab.attack_single_run(images, y, **options)
    else:
        uniform = rand if fab.norm == "Linf" else randn
        noise = uniform(images.shape, SampleDraws(seeds), dtype=images.dtype, device=images.device)
        with _GivenNoise(noise, fab.predict):
            found = fab.attack_single_run(images, y, **options)
    return found


class _GivenNoise(TorchFunctionMode):
    """Answers the library's next torch.rand or torch.randn, but not the network's, with numbers drawn before."""

    def __init__(self, noise: Tensor, network: Network) -> None:
        super().__init__()
        self.noise: Tensor | None = noise
        self.network = network

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        noise = self.noise
        if noise is None or self.network.running or func not in (torch.rand, torch.randn) or args[0] != noise.shape:
            return func(*args, **(kwargs or {}))
        self.noise = None
        return noise


def _gradients_of_differences(network: Network, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of all logits to the label's, [N, classes], and their gradients, nothing else's .grad touched."""
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


def _gradient_of_difference(network: Network, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Difference of the target's logit to the label's, [N, 1], and its gradient, nothing else's .grad touched."""
    images = images.clone().requires_grad_()
    rows = torch.arange(len(labels), device=labels.device)
    with torch.enable_grad():
        logits = network(images)
        difference = logits[rows, targets] - logits[rows, labels]
        gradient = torch.autograd.grad(difference.sum(), images)[0]
    return difference.detach().unsqueeze(1), gradient.unsqueeze(1)


def _noise(norm: str, images: Tensor, seeds: SampleSeeds) -> Tensor:
    """Direction of APGD's start."""
    draws = SampleDraws(seeds)
    if norm == "Linf":
        return 2 * rand(images.shape, draws, dtype=images.dtype, device=images.device) - 1
    return randn(images.shape, draws, dtype=images.dtype, device=images.device)


def as_images(x: Tensor) -> Tensor:
    """Float32 in the memory layout that the library's views need."""
    return x.float().contiguous()


def _tiles_fit(height: int, width: int) -> bool:
    """Whether the library's first L2 perturbation stays within the image."""
    side = height // 5
    if side == 0:
        return False
    start = (height - 5 * side) // 2
    return side == 1 or all(start + size // side * side <= size for size in (height, width))
