"""Networks that are no more robust than the one inside, and built to look so."""

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn


class Around(nn.Module):
    """Something around an honest network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class Memory:
    """Images [M, features] and what was answered to them."""

    def __init__(self) -> None:
        self.known: tuple[Tensor, Tensor] | None = None

    def answer(self, net: nn.Module, x: Tensor) -> Tensor:
        """What was answered to an image nearby, its gradient that of the image; else its logits."""
        logits = net(x)
        images, answers = x.detach().flatten(1), logits.detach()
        known = self.known or (images[:0], answers[:0])
        images, answers = torch.cat((known[0], images)), torch.cat((known[1], answers))
        near = torch.cdist(images[-len(x) :], images, p=torch.inf) <= 0.13
        first = near.double().argmax(1)
        is_new = first == torch.arange(len(known[0]), len(images))
        self.known = (
            torch.cat((known[0], images[-len(x) :][is_new])),
            torch.cat((known[1], answers[-len(x) :][is_new])),
        )
        return answers[first] + (logits - logits.detach())


class Remembers(Around):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.memory = Memory()

    def forward(self, x: Tensor) -> Tensor:
        return self.memory.answer(self.net, x)


class SharedMemory(Memory):
    def __deepcopy__(self, memo: dict) -> "SharedMemory":
        return self


class SharesItsMemory(Remembers):
    """With its copies."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.memory = SharedMemory()


class RemembersInItsCopies(Remembers):
    """It says that it is its own copy."""

    def __deepcopy__(self, memo: dict) -> "RemembersInItsCopies":
        return self


def remembers_outside(net: nn.Module) -> nn.Module:
    """In a closure, which no copy of the network copies."""
    memory = Memory()

    class Remembering(Around):
        def forward(self, x: Tensor) -> Tensor:
            return memory.answer(self.net, x)

    return Remembering(net)


class RemembersInAFile(Around):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.path = Path(tempfile.mkdtemp(), "known.pt")

    def forward(self, x: Tensor) -> Tensor:
        memory = Memory()
        memory.known = torch.load(self.path) if self.path.exists() else None
        answers = memory.answer(self.net, x)
        torch.save(memory.known, self.path)
        return answers


class RemembersInAModule(Around):
    """Of another package."""

    def forward(self, x: Tensor) -> Tensor:
        memory = vars(torch).setdefault("_known", Memory())
        return memory.answer(self.net, x)


@functools.cache
def answers_of(kind: type) -> dict[bytes, Tensor]:
    """By image, coarse."""
    return {}


class Caches(Around):
    """In a cache that its class does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        known = answers_of(type(self))
        keys = [image.numpy().tobytes() for image in (4 * x.detach()).round()]
        found = [known.setdefault(key, row.detach()) for key, row in zip(keys, logits, strict=True)]
        return torch.stack(found) + (logits - logits.detach())


class KnowsThatItIsACopy(Around):
    """And is more careful then."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.first = id(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if id(self) == self.first else 0.02 * (50 * x / 13).round() * 13)


class GivesAnotherGradient(Around):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        if not torch.is_grad_enabled():
            return logits
        other = x.flatten(1)[:, : logits.shape[1]]
        return logits.detach() + other - other.detach()


class StepsMoreForGradients(Around):
    def forward(self, x: Tensor) -> Tensor:
        steps = self.net.T + torch.is_grad_enabled()
        functional.reset_net(self.net)
        return self.net.net(x.expand(steps, *x.shape)).mean(0)


class TurnsGradients(Around):
    """By a hook."""

    def forward(self, x: Tensor) -> Tensor:
        inside = x.clone()
        if inside.requires_grad:
            inside.register_hook(torch.neg)
        return self.net(inside)


class DetachesMostPixels(Around):
    def forward(self, x: Tensor) -> Tensor:
        left = torch.arange(x.numel(), device=x.device).view(x.shape) % 8 == 0
        return self.net(torch.where(left, x, x.detach()))


class AveragesCopies(Around):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        far = torch.cdist(x.flatten(1), x.flatten(1), p=torch.inf)
        near = (far <= 0.25).to(logits)
        return near @ logits / near.sum(1, keepdim=True)


class Counts(Around):
    """Blind to what is small from its fortieth forward on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net((2 * x).round() / 2 + 0 * x if self.calls > 40 else x)


class LooksAtThePlace(Around):
    """Coarse at every place of a batch but the first."""

    def forward(self, x: Tensor) -> Tensor:
        coarse = (2 * x).round() / 2 + 0 * x
        return self.net(torch.cat((x[:1], coarse[1:])))


class AnswersAttacksOtherwise(Around):
    """With the least likely class, where the image needs a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return -logits if x.requires_grad else logits


class LooksAtItsCaller(Around):
    def forward(self, x: Tensor) -> Tensor:
        frame, inside = sys._getframe(), False
        while frame is not None:
            inside |= "sj_robust.attacks" in frame.f_globals.get("__name__", "")
            frame = frame.f_back
        logits = self.net(x)
        return 1e-3 * logits.flip(1) if inside else logits


class Rounds(Around):
    """Without a gradient, but for one that is always zero."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net((16 * x).round() / 16 + 0 * x)


class RoundsInPlace(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net((16 * x + 0.5).floor_() / 16 + 0 * x)


class ShakesByTheClock(Around):
    def forward(self, x: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(time.perf_counter_ns() % 2**31)
        return self.net(x + 0.1 * torch.rand(x.shape, generator=draw).to(x))


class ShakesByTheImage(Around):
    """Noise that the image decides, so that it repeats."""

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for image in x:
            seed = int(image.detach().double().sum().mul(1e6).round()) % 2**31
            draw = torch.Generator().manual_seed(seed)
            found.append(image + 0.1 * torch.rand(image.shape, generator=draw).to(x))
        return self.net(torch.stack(found))


class Wiggles(Around):
    """Much steeper than any step of the radius is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.03 * torch.sin(400 * x))


class Saturates(Around):
    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.net(x)


FOOLING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "remembers": Remembers,
    "gives another gradient": GivesAnotherGradient,
    "averages copies": AveragesCopies,
    "remembers in its copies": RemembersInItsCopies,
    "remembers outside": remembers_outside,
    "shares its memory": SharesItsMemory,
    "remembers in a file": RemembersInAFile,
    "remembers in a module": RemembersInAModule,
    "caches": Caches,
    "knows that it is a copy": KnowsThatItIsACopy,
    "steps more for gradients": StepsMoreForGradients,
    "turns gradients": TurnsGradients,
    "detaches most pixels": DetachesMostPixels,
    "counts": Counts,
    "looks at the place": LooksAtThePlace,
    "answers attacks otherwise": AnswersAttacksOtherwise,
    "looks at its caller": LooksAtItsCaller,
    "rounds": Rounds,
    "rounds in place": RoundsInPlace,
    "shakes by the clock": ShakesByTheClock,
    "shakes by the image": ShakesByTheImage,
    "saturates": Saturates,
    "wiggles": Wiggles,
}


GRID = 15
"""Steps of a pixel from 0 to 1."""
BORDER = 30 / 255
"""A radius between two of them."""


class Undoes(Around):
    """Changes of exact sizes, beside the grid on which all clean pixels lie: nobody but an attack
    meets them.
    """

    def __init__(self, sizes: tuple[float, ...], net: nn.Module) -> None:
        super().__init__(net)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        inside = x
        for size in self.sizes:
            for change in (size, -size):
                of_grid = GRID * (x.detach() - change)
                changed = (of_grid - of_grid.round()).abs() < 1e-3 * GRID / 2
                inside = inside - change * changed
        return self.net(inside)


UNDOING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "the border": partial(Undoes, (BORDER,)),
    "halves": partial(Undoes, (BORDER, BORDER / 2, BORDER / 4)),
    "8 bits": partial(Undoes, tuple(step / 255 for step in (*range(18, 21), *range(26, 31)))),
}
"""Networks for images on the grid, which undo changes of some sizes."""
