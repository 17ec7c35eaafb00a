"""What of a network is as before after it was used."""

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust.core.preserved import RandomNumbers, preserved


def network():
    net = nn.Sequential(nn.BatchNorm1d(3), neuron.IFNode(), nn.Dropout().eval())
    net.generator = torch.Generator().manual_seed(0)
    net(torch.rand(4, 3))
    return net


SEEN = {
    "modes": lambda net: [module.training for module in net.modules()],
    "states": lambda net: net[1].v.detach().clone(),
    "generators": lambda net: net.generator.get_state(),
    "buffers": lambda net: net[0].running_mean.clone(),
    "attributes": lambda net: sorted(vars(net)),
}
KEPT = {"modes": 1, "states": 3, "all": 5}
"""How many of these are kept, from the first on."""


@pytest.mark.parametrize("what", KEPT)
def test_what_is_kept_is_put_back_and_nothing_else(what):
    net = network()
    before = {name: see(net) for name, see in SEEN.items()}
    with preserved(net, what):
        assert not any(module.training for module in net.modules())
        net.train()
        net(torch.rand(4, 3, generator=net.generator))
        net.more = 1
    for place, (name, see) in enumerate(SEEN.items()):
        same = torch.equal if isinstance(before[name], torch.Tensor) else list.__eq__
        assert same(see(net), before[name]) == (place < KEPT[what]), name


def test_numbers_are_drawn_again_and_go_on():
    net = network()
    numbers = RandomNumbers(net, torch.device("cpu"))
    assert not numbers.drawn()
    first = torch.rand(3, generator=net.generator)
    after = RandomNumbers(net, torch.device("cpu"))
    with numbers.again():
        assert torch.equal(torch.rand(3, generator=net.generator), first)
    assert numbers.drawn()
    assert not after.drawn()
