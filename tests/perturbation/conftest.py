"""A network of LIF neurons, a clean and a perturbed input of it, and a monitor on it."""

import pytest
from perturbation.networks import conv_net, images

from sj_robust.perturbation import MPPDMonitor


@pytest.fixture
def net():
    return conv_net("LIF")


@pytest.fixture
def pair():
    return images()


@pytest.fixture
def monitor(net):
    return MPPDMonitor(net)
