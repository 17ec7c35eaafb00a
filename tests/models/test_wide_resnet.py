import pytest
import torch

from sj_robust import DLIFNode
from sj_robust.models import WIDE_RESNETS, MixedBlock, WideResNet
from sj_robust.training.regularization import retract_


def tiny(step_mode="m", shape=(3, 8, 12), **options):
    torch.manual_seed(0)
    options = {"T": 3, "depth": 10, "widen_factor": 1, "step_mode": step_mode} | options
    return WideResNet(shape, 7, spiking_neuron=DLIFNode, **options).eval()


def test_a_gradient_reaches_every_parameter():
    """What the network computes is compared with the published one in test_published_checkpoint."""
    net = tiny(widen_factor=2).double()
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if name.endswith(("bias", "running_mean")) or (".weight" in name and value.ndim == 1):
                value.add_(torch.rand_like(value))
    net(torch.rand(2, 3, 8, 12, dtype=torch.float64)).square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in net.parameters())


@pytest.mark.parametrize("name", WIDE_RESNETS)
def test_number_of_parameters(name):
    depth, k = WIDE_RESNETS[name]
    with torch.device("meta"):
        net = WideResNet((3, 32, 32), 10, T=8, spiking_neuron=DLIFNode, depth=depth, widen_factor=k)
    # the published WRN without mixing coefficients has 2 748 890 (16-4) and 36 479 194 (28-10)
    # parameters
    of_wrn = {"wrn16_4": 2_748_890, "wrn28_10": 36_479_194}[name]
    blocks = (depth - 4) // 2
    neurons = 2 * blocks + 1
    assert sum(p.numel() for p in net.parameters()) == of_wrn + 2 * blocks + 8 * neurons
    kinds = [type(module) for module in net.modules()]
    assert (kinds.count(MixedBlock), kinds.count(DLIFNode)) == (blocks, neurons)
    shortcuts = [
        m.shortcut for m in net.modules() if isinstance(m, MixedBlock) and m.shortcut is not None
    ]
    assert [(m.in_channels, m.out_channels, m.stride) for m in shortcuts] == [
        (16, 16 * k, (1, 1)),
        (16 * k, 32 * k, (2, 2)),
        (32 * k, 64 * k, (2, 2)),
    ]


def test_retraction_finds_the_mixing_coefficients():
    net = tiny()
    with torch.no_grad():
        net.stages[1].mixing.copy_(torch.tensor([0.9, 0.5]))
    retract_(net, beta=1e-3)
    torch.testing.assert_close(net.stages[1].mixing.detach(), torch.tensor([0.7, 0.3]))


def test_wrong_use():
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 4 .* got 18; pass 16"):
        tiny(depth=18)
    with pytest.raises(ValueError, match="widen_factor must be >= 1, got 0"):
        tiny(widen_factor=0)
    with pytest.raises(ValueError, match="one frame"):
        tiny(step_mode="s")(torch.rand(3, 2, 3, 8, 12))
