import pytest
import torch

from sj_robust import DLIFNode
from sj_robust.models import WideResNet
from sj_robust.models.wide_resnet import WIDE_RESNETS, MixedBlock

PUBLISHED = {"wrn16_4": 2_748_890, "wrn28_10": 36_479_194}
"""Parameters of the published networks, without mixing coefficients."""


def tiny(step_mode="m", shape=(3, 8, 12), **options):
    torch.manual_seed(0)
    usual = {"T": 3, "depth": 10, "widen_factor": 1}
    net = WideResNet(
        shape,
        classes=7,
        spiking_neuron=DLIFNode,
        step_mode=step_mode,
        **usual | options,
    )
    return net.eval()


def test_a_gradient_reaches_every_parameter():
    """What the network computes is compared with the published one in test_published_checkpoint."""
    net = tiny(widen_factor=2).double()
    for name, value in net.state_dict().items():
        if value.ndim == 1 and name.endswith(("weight", "bias", "running_mean")):
            value.add_(torch.rand_like(value))
    logits = net(torch.rand(2, 3, 8, 12).double())
    logits.square().sum().backward()
    for value in net.parameters():
        assert value.grad.any()


@pytest.mark.parametrize("name", WIDE_RESNETS)
def test_number_of_parameters(name):
    depth, k = WIDE_RESNETS[name]
    with torch.device("meta"):
        net = WideResNet(
            (3, 32, 32),
            10,
            T=8,
            spiking_neuron=DLIFNode,
            depth=depth,
            widen_factor=k,
        )
    blocks = [module for module in net.modules() if isinstance(module, MixedBlock)]
    neurons = [module for module in net.modules() if isinstance(module, DLIFNode)]
    assert len(blocks) == (depth - 4) // 2
    assert len(neurons) == 2 * len(blocks) + 1
    count = sum(parameter.numel() for parameter in net.parameters())
    expected = PUBLISHED[name] + 2 * len(blocks) + 8 * len(neurons)
    assert count == expected
    first, second, third = [block.shortcut for block in blocks if block.shortcut is not None]
    assert first.weight.shape == (16 * k, 16, 1, 1)
    assert second.weight.shape == (32 * k, 16 * k, 1, 1)
    assert third.weight.shape == (64 * k, 32 * k, 1, 1)
    assert first.stride == (1, 1)
    assert second.stride == (2, 2)
    assert third.stride == (2, 2)
