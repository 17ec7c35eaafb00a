"""Proving images of the default network, beside attacking them."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lab.benchmarking.task import Task
from sj_robust.attacks import pgd
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.stability import verify


class ProvingTask(Task):
    """Interval bounds, or PGD of 20 steps, on N images of shape [T, N, C, H, W]; labels are the
    network's own classes.

    Neither's time depends on its outcome.
    """

    def __init__(self, shape: Sequence[int], *, prove: bool) -> None:
        """Build the network and draw the images."""
        torch.manual_seed(0)
        T, N, C, H, W = shape
        self._model = build_classifier(NetworkSpec(T=T, image_shape=(C, H, W))).eval()
        self._prove = prove
        self._x = torch.rand(N, C, H, W)
        with torch.no_grad():
            self._y = self._model(self._x).argmax(1)
        self.tensor_bytes = 4 * T * self._x.numel()
        self.inputs = [self._x]

    def forward(self) -> Tensor:
        """Whether each image is verified, or broken."""
        return self._verified(0.1) if self._prove else self._broken(0.1)

    def check(self) -> None:
        """No image is verified and broken; raises ValueError."""
        if bool((self._verified(1e-4) & self._broken(1e-4)).any()):
            raise ValueError("an image is verified and broken: neither way is timed")

    def _verified(self, eps: float) -> Tensor:
        return torch.tensor(verify(self._model, self._x, self._y, eps).verified)

    def _broken(self, eps: float) -> Tensor:
        found = []
        for x, y in zip(torch.split(self._x, 128), torch.split(self._y, 128), strict=True):
            x_adv = pgd(self._model, x, y, eps=eps, step_size=eps / 8, steps=20)
            with torch.no_grad():
                found.append(self._model(x_adv).argmax(1) != y)
        return torch.cat(found)


PROVING = {"verify": partial(ProvingTask, prove=True), "PGD-20": partial(ProvingTask, prove=False)}
"""What is done with the images."""
