"""How good a network in training is, after every epoch."""

from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from sj_robust.attacks import Attack
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.host import is_neuron
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.randomness import SampleSeeds
from sj_robust.data import image_loader
from sj_robust.evaluation.run.loop import alone
from sj_robust.perturbation import MPPDMonitor
from sj_robust.perturbation.gains import perturbation_gains
from sj_robust.perturbation.gains.design import gain_scalars
from sj_robust.proofs import verify
from sj_robust.training.processes import mixed

__all__ = ["Validation"]

_BATCH = 128


class Validation:
    """Accuracy on the validation images, the same figure on any number of processes.
    多进程分担的验证。

    The images come in fixed batches, each with its own seed, of which process r of P takes r, r +
    P, ...; the counts are summed. ``seed`` is that of the attacks; ``pin_memory`` as in
    :func:`image_loader`.

    Examples:
        >>> images = torch.utils.data.TensorDataset(
        ...     torch.eye(2).view(2, 1, 1, 2), torch.tensor([0, 0])
        ... )
        >>> Validation(images, Accelerator(cpu=True), seed=0).accuracy(nn.Flatten(), {})
        {'clean': 0.5}
    """

    def __init__(
        self,
        images: Dataset[tuple[Tensor, ...]],
        accelerator: Accelerator,
        *,
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        """Choose this process's share; see the class."""
        self._accelerator = accelerator
        self._seed = seed
        self._size = len(images)  # type: ignore[arg-type]  # every set here has a length
        self._numbers = range(
            accelerator.process_index, -(-self._size // _BATCH), accelerator.num_processes
        )
        mine = [
            i
            for number in self._numbers
            for i in range(number * _BATCH, min(self._size, (number + 1) * _BATCH))
        ]
        self._loader = image_loader(Subset(images, mine), _BATCH, pin_memory=pin_memory)

    def accuracy(
        self, model: nn.Module, attacks: Mapping[str, Attack], verified_eps: float | None = None
    ) -> dict[str, float]:
        """Accuracy in [0, 1] on clean images and under each attack; every process gets the same
        figures.

        With ``verified_eps`` also the share of images that are ``"verified"`` at that radius.
        """
        names = ("clean", *attacks, *(() if verified_eps is None else ("verified",)))
        correct = torch.zeros(len(names), dtype=torch.int64)
        for number, (x, y) in zip(self._numbers, self._batches(), strict=True):
            seeds = _seeds(len(y), mixed(self._seed, number))
            counts = alone(model, x, y, attacks, seeds=seeds)
            correct += torch.tensor([counts.get(name, 0) for name in names])
        if verified_eps is not None and self._numbers:
            assert isinstance(model, SpikingClassifier)
            x, y = (torch.cat(parts) for parts in zip(*self._batches(), strict=True))
            with evaluation_mode(model):  # of all batches at once: the network is checked once
                correct[-1] = sum(verify(model, x, y, verified_eps, batch_size=_BATCH).verified)
        total = self._accelerator.reduce(correct.to(self._accelerator.device), "sum")
        return dict(zip(names, (count / self._size for count in total.tolist()), strict=True))

    def scalars(
        self, classifier: SpikingClassifier, attack: Attack, *, bounds: bool = False
    ) -> dict[str, float]:
        """Scalars for the log: MS-MPPD per layer under ``attack`` on this process's first images,
        and every gain; of a network without spiking neurons there are none.

        With ``bounds`` so is the exact L2 bound of every covered layer, its gain times the norm of
        the map before it.
        """
        net = classifier.net
        x, y = next(self._batches())
        if not any(map(is_neuron, net.modules())):
            return {}
        x_adv = attack(classifier, x, y, generator=torch.Generator().manual_seed(self._seed))
        with MPPDMonitor(net) as monitor:
            stats = monitor.compare(x, x_adv, forward=classifier)
        scalars = {f"ms_mppd/{name}": float(layer.ms_mppd.mean()) for name, layer in stats.items()}
        for name, module in net.named_modules():
            gains = getattr(module, "input_gain", None)
            if isinstance(gains, nn.Parameter):
                scalars |= {
                    f"input_gain/{name}/t{t}": gain for t, gain in enumerate(gains.tolist())
                }
        if bounds:  # a log needs no more than two digits
            for layer in perturbation_gains(classifier, x[:1], tolerance=1e-2).layers:
                if layer.l2 is not None and layer.l2.value is not None:
                    scalars[f"l2_bound/{layer.name}"] = layer.l2.value
        return scalars | gain_scalars(net, classifier.T)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._accelerator.device
        for x, y in self._loader:
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def _seeds(images: int, seed: int) -> SampleSeeds:
    return SampleSeeds(range(images)).derived("validation", seed % 2**31)
