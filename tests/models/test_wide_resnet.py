import pytest
import torch
from torch.nn import functional as F

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.models import WIDE_RESNETS, MixedBlock, WideResNet
from sj_robust.training.regularization import retract_


def tiny(step_mode="m", shape=(3, 8, 12), **options):
    torch.manual_seed(0)
    options = {"T": 3, "depth": 10, "widen_factor": 1, "step_mode": step_mode} | options
    return WideResNet(shape, 7, spiking_neuron=DLIFNode, **options).eval()


def spikes_by_hand(x, gain):
    """DLIF with decay 0.99 and threshold 1, one step after the other."""
    v, spikes = torch.zeros_like(x[0]), []
    for current, p in zip(x, gain, strict=True):
        h = 0.99 * v + p * current
        spikes.append((h >= 1).to(x))
        v = h * (1 - spikes[-1])
    return torch.stack(spikes)


def by_hand(state, images, T, blocks_per_stage):
    """The network of method section 3 from its parameters alone, without a module."""

    def over_time(function, x):
        return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return over_time(lambda y: F.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2), x)

    def bn_neuron(x, bn, node):
        names = ("running_mean", "running_var", "weight", "bias")
        x = over_time(lambda y: F.batch_norm(y, *(state[f"{bn}.{name}"] for name in names)), x)
        return spikes_by_hand(x, state[f"{node}.input_gain"])

    x = conv(images.expand(T, *images.shape), "first")
    for index in range(3 * blocks_per_stage):
        block, begins = f"stages.{index}", index % blocks_per_stage == 0
        stride = 2 if begins and index else 1
        active = bn_neuron(x, f"{block}.activation.0", f"{block}.activation.1")
        inner = conv(active, f"{block}.residual.0", stride)
        inner = conv(bn_neuron(inner, f"{block}.residual.1", f"{block}.residual.2"), f"{block}.residual.3")
        changes = f"{block}.shortcut.weight" in state
        assert changes == (begins and x.shape[2] != inner.shape[2])
        through = conv(active, f"{block}.shortcut", stride) if changes else x
        a, b = state[f"{block}.mixing"]
        x = a * through + b * inner
    last = 3 * blocks_per_stage
    x = bn_neuron(x, f"stages.{last}", f"stages.{last + 1}").mean((3, 4))
    return x @ state[f"stages.{last + 4}.weight"].T + state[f"stages.{last + 4}.bias"]


@pytest.mark.parametrize("widen_factor", [1, 2])
def test_forward_and_gradients_against_a_computation_by_hand(widen_factor):
    torch.manual_seed(1)
    net = WideResNet((3, 32, 32), 5, T=2, spiking_neuron=DLIFNode, depth=16, widen_factor=widen_factor)
    net = net.double().eval()
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if name.endswith(("input_gain", "mixing", "bias", "running_mean")):
                value.add_(0.3 * torch.rand_like(value))
            if ".weight" in name and value.ndim == 1:
                value.add_(1)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    state = {name: value.detach() for name, value in net.state_dict().items()}
    outputs, expected = net(images), by_hand(state, images, T=2, blocks_per_stage=2)
    assert outputs.std() > 0.01
    torch.testing.assert_close(outputs.detach(), expected, rtol=1e-9, atol=1e-9)
    outputs.square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for _, value in net.named_parameters())


@pytest.mark.parametrize("name", WIDE_RESNETS)
def test_number_of_parameters(name):
    depth, k = WIDE_RESNETS[name]
    with torch.device("meta"):
        net = WideResNet((3, 32, 32), 10, T=8, spiking_neuron=DLIFNode, depth=depth, widen_factor=k)
    # the published WRN without mixing coefficients has 2 748 890 (16-4) and 36 479 194 (28-10) parameters
    of_wrn = {"wrn16_4": 2_748_890, "wrn28_10": 36_479_194}[name]
    blocks = (depth - 4) // 2
    neurons = 2 * blocks + 1
    assert sum(p.numel() for p in net.parameters()) == of_wrn + 2 * blocks + 8 * neurons
    kinds = [type(module) for module in net.modules()]
    assert (kinds.count(MixedBlock), kinds.count(DLIFNode)) == (blocks, neurons)
    shortcuts = [m.shortcut for m in net.modules() if isinstance(m, MixedBlock) and m.shortcut is not None]
    assert [(m.in_channels, m.out_channels, m.stride) for m in shortcuts] == [
        (16, 16 * k, (1, 1)), (16 * k, 32 * k, (2, 2)), (32 * k, 64 * k, (2, 2)),
    ]  # fmt: skip


def test_retraction_finds_the_mixing_coefficients():
    net = tiny()
    with torch.no_grad():
        net.stages[1].mixing.copy_(torch.tensor([0.9, 0.5]))
    retract_(net, beta=1e-3)
    torch.testing.assert_close(net.stages[1].mixing.detach(), torch.tensor([0.7, 0.3]))


@pytest.mark.parametrize("size", [5, 28, 64])
def test_sizes(size):
    net = tiny(shape=(1, size, size))
    with torch.no_grad():
        assert SpikingClassifier(net, 3)(torch.rand(2, 1, size, size)).shape == (2, 7)


def test_wrong_use():
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 4 .* got 18; pass 16"):
        tiny(depth=18)
    with pytest.raises(ValueError, match="widen_factor must be >= 1, got 0"):
        tiny(widen_factor=0)
    with pytest.raises(ValueError, match="one frame"):
        tiny(step_mode="s")(torch.rand(3, 2, 3, 8, 12))
