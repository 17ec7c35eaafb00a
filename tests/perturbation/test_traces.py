"""Drawings of two runs: which neurons and layers are drawn, and where."""

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust.perturbation import spike_traces

LITTLE = 44
ENOUGH = 48
SILENT = 46
"""Of 50 neurons those whose input is perturbed: too little to move a spike, enough, and more where
none fires.
"""


def neurons_in_a_row(count):
    nodes = [neuron.IFNode(step_mode="m") for _ in range(count)]
    return nn.Sequential(*nodes)


@pytest.fixture(scope="module")
def found():
    x = torch.full((1, 50), 0.3)
    x[0, 1::2] = 0.5  # these fire at step 1 and 3, the others at step 3
    x[0, SILENT] = -1.0
    perturbed = x.clone()
    perturbed[0, SILENT] = -2.0
    perturbed[0, LITTLE] += 0.02
    perturbed[0, ENOUGH] += 0.4
    return spike_traces(neurons_in_a_row(5), x, perturbed, T=4)


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_neurons_that_differ_are_among_those_that_are_drawn(found):
    (raster,) = found.plot().axes[0].images
    cells = torch.as_tensor(raster.get_array().data)
    nothing, clean, perturbed, both = range(4)
    assert cells.shape == (40, 2 * 4), "a half per run"
    assert cells[38].tolist() == [*[nothing] * 3, perturbed, *[nothing] * 2, both, both]
    assert int((cells == perturbed).sum()) == 1, "neuron 48, the last but one of 40"
    assert int((cells == clean).sum()) == 0
    # All that fire twice, and neuron 48 and the first ones of those that fire once.
    assert int((cells == both).sum()) == 2 * (25 * 2 + 15)


def test_the_potential_is_that_of_the_neuron_whose_spikes_differ_most(found):
    axes = found.plot("potential").axes[0]
    clean, _, perturbed, fired = axes.lines[:4]
    layer = found["0"]
    v_seq = layer.v_seq[:, 0, ENOUGH].tolist()
    v_seq_perturbed = layer.v_seq_perturbed[:, 0, ENOUGH].tolist()
    assert clean.get_ydata() == pytest.approx(v_seq)
    assert perturbed.get_ydata() == pytest.approx(v_seq_perturbed)
    assert list(fired.get_xdata()) == [1, 3]


def test_where_no_spike_differs_the_potential_is_that_of_the_neuron_that_moves_most():
    x = torch.zeros(1, 3)
    perturbed = torch.tensor([[0.1, 0.9, 0.5]])
    node = neuron.IFNode(v_threshold=10.0, step_mode="m")
    found = spike_traces(node, x, perturbed, T=4)
    axes = found.plot("potential").axes[0]
    moved = axes.lines[2]
    assert moved.get_ydata() == pytest.approx([0.9, 1.8, 2.7, 3.6])


def test_of_many_layers_the_first_and_the_last_are_drawn():
    x = torch.full((1, 2), 0.6)
    found = spike_traces(neurons_in_a_row(9), x, x, T=2)
    assert titles(found.plot()) == ["0", "1", "2", "3", "5", "6", "7", "8"]
