"""Bounds of the logits with gradients, for training."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import cycle
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.host import first_argument
from sj_robust.core.preserved import evaluation_mode, full_precision, other_forward, preserved
from sj_robust.proofs.bounds import BoundedRun, bounded_neurons
from sj_robust.proofs.differentiable_joint import DifferentiableJointRun
from sj_robust.proofs.joint import OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.moves import EVENTS, Events
from sj_robust.proofs.soundness import check_kept, check_stated, check_surrogates

__all__ = ["BatchStatistics", "DifferentiableBounds", "TrainedMethod", "batch_statistics"]

TrainedMethod = Literal["ibp", "joint"]
"""Methods of ``verify`` whose bounds can be trained."""

BatchNorm = nn.modules.batchnorm._BatchNorm
BatchStatistics = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""Mean and variance of every channel, for a batch norm and its input [N, C, *]."""


def batch_statistics(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance that a batch norm in training mode takes of its input [N, C, *], in float32
    or wider. 批统计量。
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [0, *range(2, x.ndim)]
    mean = x.mean(dims, keepdim=True)
    return mean.flatten(), (x - mean).square().mean(
        dims
    )  # torch.var_mean takes several times as long


class DifferentiableBounds:
    """Upper bounds of what every class's logit is above the right one's, with a gradient to the
    weights. 可微的上界。

    They are those of :func:`sj_robust.proofs.verify` with the same method in real arithmetic,
    computed in the precision of the images, so they are for a loss and prove nothing. In intervals
    over an Linf ball, autocast lowers the precision of products. The network is the one of
    evaluation mode, without dropout, except for a batch norm that takes the statistics of the
    batch: it has those of the clean pass that ran last inside :meth:`watching`, as functions of the
    weights.

    Args:
        classifier: The network.
        statistics: The statistics of its input that a batch norm uses.
        surrogate_width: Width w of the surrogate in the bounds, relative to the neurons' own, > 0:
            g(z / w) / w replaces the surrogate g(z).
        method: ``"ibp"`` or ``"joint"``. How the network treats time is found out at the first
            images.

    Raises:
        NotImplementedError: If something in the network has no bounds, or, at the first images, if
            it mixes those of a batch; it is named.
        ValueError: At the first images, if a forward changes a value that the network holds.
        UnsoundBoundsError: At the first images, if a surrogate is no step.

    Source: Gowal et al., arXiv 1810.12715; batch norm as in Shi et al. (NeurIPS 2021).

    Examples:
        >>> import torch
        >>> from sj_robust.models import NetworkSpec, build_classifier
        >>> bounds = DifferentiableBounds(build_classifier(NetworkSpec()))
        >>> with bounds.watching():
        ...     logits = bounds.classifier(x := torch.rand(2, 1, 8, 8))
        >>> y = torch.tensor([3, 7])
        >>> lead = bounds.lead(x, y, eps=0.0)
        >>> torch.allclose(lead, logits - logits.gather(1, y.unsqueeze(1)), atol=1e-5)
        True
    """

    def __init__(
        self,
        classifier: SpikingClassifier,
        statistics: BatchStatistics = batch_statistics,
        *,
        surrogate_width: float = 1.0,
        method: TrainedMethod = "ibp",
    ) -> None:
        """Find the neurons; see the class."""
        self._surrogate_width = surrogate_width
        self._method = method
        self._over_time: OverTime | None = None
        self._maps: Maps | None = None
        self.classifier = classifier
        self._neurons = bounded_neurons(classifier)
        self._statistics = statistics
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._checked = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context of the clean pass; of several, the last one counts."""
        self._seen = {}
        with ExitStack() as stack:
            for name, module in self.classifier.net.named_modules():
                if isinstance(module, BatchNorm) and _uses_the_batch(module):
                    hook = module.register_forward_pre_hook(self._watch(name), with_kwargs=True)
                    stack.callback(hook.remove)
            yield

    def lead(self, x: Tensor, y: Tensor, eps: float | Events) -> Tensor:
        """Upper bounds [N, classes] for images [N, ...] with labels [N], over an Linf ball or for
        changed or moved events; those of the labels are 0.
        """
        self.classifier.find_convention(x, again=False)  # before anything is replaced
        if not self._checked:
            self._check(x)
        with ExitStack() as stack:
            for name, seen in self._seen.items():
                stack.enter_context(self._given(name, seen))
            stack.enter_context(evaluation_mode(self.classifier))
            if self._method == "joint" or isinstance(eps, EVENTS):  # made for one precision
                stack.enter_context(torch.autocast(x.device.type, enabled=False))
            run = self._run(len(x))
            assert self._maps is not None  # found out when the network was checked
            return run.lead(self._maps.bounded(run, x, eps), y)

    def _given(self, name: str, seen: list[tuple[Tensor, Tensor]]) -> AbstractContextManager[None]:
        """Context in which a batch norm has these statistics, call by call."""
        module: Any = self.classifier.net.get_submodule(name)
        return other_forward(module, _with_statistics(module, cycle(seen)))

    def _check(self, x: Tensor) -> None:
        """Check the network on its first images, and find out how it treats time."""
        with ExitStack() as stack:
            for name, seen in self._seen.items():
                without_graph = [(mean.detach(), variance.detach()) for mean, variance in seen]
                stack.enter_context(self._given(name, without_graph))
            stack.enter_context(evaluation_mode(self.classifier))
            stack.enter_context(full_precision(x.device))
            with preserved(self.classifier, "all", hooks=False):
                check_kept(self.classifier, x)
            self._maps = Maps(self.classifier, self._neurons, x[0])
            self._maps.structure()
            check_stated(self._neurons, self.classifier.T, x)
            check_surrogates(self.classifier.net, self._neurons, x)
            if self._method == "joint":
                self._over_time = OverTime(self._maps, self.classifier.T)
        self._checked = True

    def _run(self, samples: int) -> BoundedRun:
        width = self._surrogate_width
        if self._over_time is None:
            return BoundedRun(self._neurons, samples, differentiable=True, surrogate_width=width)
        return DifferentiableJointRun(
            self._neurons, samples, over_time=self._over_time, surrogate_width=width
        )

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_argument(args, kwargs)
            if _takes_time(module):
                x = x.flatten(0, 1)
            self._seen.setdefault(name, []).append(self._statistics(module, x))

        return hook


def _uses_the_batch(module: Any) -> bool:
    return module.training or module.running_mean is None or module.running_var is None


def _takes_time(module: Any) -> bool:
    """Whether a batch norm is one of SpikingJelly's in step mode ``"m"``, which takes [T, N, C,
    *].
    """
    return getattr(module, "step_mode", "s") == "m"


def _with_statistics(
    module: Any, calls: Iterator[tuple[Tensor, Tensor]]
) -> Callable[[Tensor], Tensor]:
    """The forward of a batch norm that has been given its statistics, call by call."""

    def forward(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1) if _takes_time(module) else x
        out = F.batch_norm(flat, *next(calls), module.weight, module.bias, False, 0.0, module.eps)
        if _takes_time(module):
            return out.view(-1, *x.shape[1:])
        return out

    return forward
