"""Memory format of images and convolution weights: channels first or last."""

import time

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from sj_robust.core.host import from_reset

__all__ = ["choose_channels_last", "is_measured", "store_channels_last"]

_ROUNDS = 3
_GAIN = 0.95  # of the time, so that a change of order is worth its rounding


def is_measured(images: Tensor, accelerator: Accelerator) -> bool:
    """Whether the order is chosen by a measurement, as on a CPU in half precision.

    In float32 the order on a CPU is never changed, so that a run can be repeated bit by bit.
    """
    on_gpu = accelerator.device.type == "cuda"
    return not on_gpu and accelerator.mixed_precision != "no" and images.ndim == 4


def choose_channels_last(
    classifier: nn.Module, images: Tensor, accelerator: Accelerator, seed: int
) -> bool:
    """Whether the network is to be stored channels last: always on CUDA; where it is measured, if
    it is faster.

    It is measured by passes forward and backward over ``images``; the main process decides for all,
    since their gradients are summed as they lie in memory.
    """
    if not is_measured(images, accelerator):
        return bool(accelerator.device.type == "cuda")
    choice = [
        _is_faster(classifier, images, accelerator, seed) if accelerator.is_main_process else False
    ]
    broadcast_object_list(choice)
    return bool(choice[0])


def store_channels_last(module: nn.Module) -> None:
    """Put the weights of two-dimensional convolutions into this order; the parameters stay the same
    objects.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _is_faster(classifier: nn.Module, images: Tensor, accelerator: Accelerator, seed: int) -> bool:
    weights = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    originals = [(parameter, parameter.data) for parameter in classifier.parameters()]
    times: dict[bool, list[float]] = {False: [], True: []}
    with from_reset(classifier, seed, images.device):
        for channels_last in (False, True) * _ROUNDS:
            if channels_last:
                store_channels_last(classifier)
            x = images.contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )
            start = time.perf_counter()
            with accelerator.autocast():
                total = classifier(x).float().sum()
            torch.autograd.grad(total, weights, allow_unused=True)
            times[channels_last].append(time.perf_counter() - start)
            for parameter, data in originals:
                parameter.data = data
    return min(times[True]) < _GAIN * min(times[False])
