"""DLIFNode as a SpikingJelly citizen on whichever release is installed."""

import copy
import math

import numpy as np
import pytest
import torch
from covering import every_pair
from ops.calls import by_hand, random_call
from spikingjelly.activation_based import base, functional, neuron, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust.neuron import DLIFNode
from sj_robust.neuron.dlif import describe_surrogate
from sj_robust.ops import Surrogate
from sj_robust.ops.dlif.config import HOST_NAMES

HOST_HAS_EXPLICIT_STATES = hasattr(base.MemoryModule, "functional_forward")
needs_explicit_states = pytest.mark.skipif(
    not HOST_HAS_EXPLICIT_STATES,
    reason="SpikingJelly 0.0.0.0.14 has no explicit states and no memory optimisation",
)
needs_set_backend = pytest.mark.skipif(
    not hasattr(functional, "set_backend"), reason="SpikingJelly 2.x removed functional.set_backend"
)


def run(node, x_seq):
    """Spikes of a fresh sequence in the node's own step mode."""
    node.reset()
    if node.step_mode == "m":
        return node(x_seq)
    return torch.stack([node(x) for x in x_seq])


NEURONS = {
    "step_mode": ["m", "s"],
    "v_reset": [0.0, None, -0.25],
    "detach_reset": [False, True],
    "spike": [
        ("triangle", 1.0, surrogate.PiecewiseQuadratic),
        ("atan", 2.0, surrogate.ATan),
        ("sigmoid", 4.0, surrogate.Sigmoid),
    ],
}


@pytest.mark.parametrize(tuple(NEURONS), every_pair(NEURONS))
def test_equals_bptt_by_hand_in_both_step_modes(step_mode, v_reset, detach_reset, spike):
    kind, alpha, surrogate_class = spike
    (x_seq, gain, v_init), (weights, grad_v, grad_v_seq) = random_call((6, 2, 3, 5))
    inputs = (x_seq, gain, v_init.fill_(v_reset or 0.0))
    grads = (weights, grad_v.zero_(), grad_v_seq.zero_())
    constants = {"v_reset": v_reset, "detach_reset": detach_reset, "kind": kind, "alpha": alpha}
    expected = by_hand(inputs, grads, decay=0.8, v_threshold=1.0, **constants)
    node = DLIFNode(
        6,
        tau=5.0,
        v_reset=v_reset,
        surrogate_function=surrogate_class(alpha=alpha),
        detach_reset=detach_reset,
        step_mode=step_mode,
        store_v_seq=True,
    ).double()
    node.input_gain.data.copy_(gain)
    spikes = run(node, x_seq.requires_grad_())
    spikes.backward(weights)
    np.testing.assert_array_equal(spikes.detach(), expected.spikes)
    np.testing.assert_allclose(node.v_seq.detach(), expected.potentials, atol=1e-12)
    np.testing.assert_allclose(x_seq.grad, expected.grad_x, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(node.input_gain.grad, expected.grad_gain, rtol=1e-9, atol=1e-11)


def test_surrogates_are_recognised_by_exact_class_and_constant_sharpness():
    for kind, name in HOST_NAMES.items():
        if hasattr(surrogate, name):  # 0.0.0.0.14 has no SuperSpike
            function = getattr(surrogate, name)(alpha=3)
            assert describe_surrogate(function) == Surrogate(kind, 3)
            function.alpha = nn.Parameter(torch.tensor(3.0))
            assert describe_surrogate(function).function is function
            assert describe_surrogate(getattr(surrogate, name)(spiking=False)).kind == "custom"
    assert describe_surrogate(surrogate.LeakyKReLU()).kind == "custom"


@pytest.mark.parametrize("v_reset", [0.0, None, 0.25])
@pytest.mark.parametrize(("training", "v_init"), [(True, None), (False, 0.4)])
def test_gains_of_one_are_lif_without_decay_input(v_reset, training, v_init):
    torch.manual_seed(0)
    T = 8
    arguments = {"tau": 4.0, "v_reset": v_reset, "step_mode": "m", "store_v_seq": True}
    lif = neuron.LIFNode(decay_input=False, **arguments).train(training)
    if v_init is not None:
        lif.set_reset_value("v", v_init)
    dlif = DLIFNode(T=T, v_init=v_init, **arguments).train(training)
    x = torch.randn(T, 3, 400, dtype=torch.float64) * 0.7 + 0.2
    assert torch.equal(run(dlif, x), run(lif, x))
    assert_close(dlif.v_seq, lif.v_seq, rtol=0, atol=1e-12)


class TestState:
    def test_gain_follows_the_sequence_not_the_call(self):
        torch.manual_seed(0)
        node = DLIFNode(6, tau=2.0)
        node.input_gain.data.copy_(torch.tensor([0.5, 2.0, 0.1, 3.0, 1.0, 0.7]))
        x = torch.randn(6, 4, 9)
        whole = run(node, x)
        node.reset()
        chunks = torch.cat([node(x[:1]), node(x[1:4]), node(x[4:])])
        assert torch.equal(chunks, whole)
        for step_mode in ("s", "m"):
            node.step_mode = step_mode
            assert torch.equal(run(node, x), whole)

    def test_reset_net_detach_net_and_state_dict(self):
        net = nn.Sequential(nn.Linear(3, 5), DLIFNode(4, store_v_seq=True))
        x = torch.randn(2, 2, 3)
        net(x)
        assert net[1].time_step == 2
        assert list(net.state_dict()) == ["0.weight", "0.bias", "1.input_gain"]
        functional.detach_net(net)
        assert not net[1].v_seq.requires_grad
        net(x).sum().backward()  # second chunk, cut from the first
        functional.reset_net(net)
        assert net[1].time_step == 0
        assert net[1].v == 0.0
        copy.deepcopy(net)

    def test_a_given_initial_potential_is_used(self):
        node = DLIFNode(1, tau=2.0)
        x_seq = torch.full((1, 1, 2), 0.6)
        for v in (torch.full((1, 2), 0.8), 0.8):
            node.v = v
            assert node(x_seq).sum() == 2
            node.reset()
        assert node(x_seq).sum() == 0

    def test_half_precision_keeps_a_float32_state(self):
        node = DLIFNode(3).half()
        spikes = node(torch.rand(3, 2, 4, dtype=torch.float16))
        assert (spikes.dtype, node.v.dtype, node.input_gain.dtype) == (
            torch.float16,
            torch.float32,
            torch.float16,
        )
        with torch.autocast("cpu", torch.bfloat16):
            net = nn.Sequential(nn.Linear(4, 4), DLIFNode(3))
            assert net(torch.rand(3, 2, 4)).dtype == torch.bfloat16
            assert net[1].v.dtype == torch.float32

    def test_surrogates_are_not_shared_and_gains_begin_where_they_are_told(self):
        assert DLIFNode(1).surrogate_function is not DLIFNode(1).surrogate_function
        found = DLIFNode(3, input_gain_init=0.25).input_gain.tolist()
        assert found == [0.25] * 3

    def test_smooth_mode_of_a_surrogate_is_honoured(self):
        node = DLIFNode(1, surrogate_function=surrogate.Sigmoid(spiking=False))
        value = node(torch.full((1, 1, 1), 1.5)).item()
        assert value == pytest.approx(1 / (1 + math.exp(-4 * 0.5)))


class TestBackends:
    def test_every_available_backend_gives_the_same_network(self):
        torch.manual_seed(0)
        x = torch.randn(4, 3, 20)
        node = DLIFNode(4)
        wanted = run(node, x)
        for name in ("auto", "torch", "eager", "reference"):
            node.backend = name
            assert torch.equal(run(node, x), wanted), name
        node.backend = "torch"
        assert node.chosen_backend(x) == "eager"
        node.backend = "auto"
        assert node.chosen_backend(x) in ("cpp", "eager")

    @needs_set_backend
    def test_set_backend_of_the_host(self):
        net = nn.Sequential(nn.Linear(3, 3), DLIFNode(2))
        functional.set_backend(net, "reference", instance=DLIFNode)
        assert net[1].backend == "reference"
        assert set(net[1].supported_backends) >= {
            "auto",
            "reference",
            "eager",
            "torch",
            "cpp",
            "cupy",
            "triton",
        }

    def test_host_operator(self):
        if not HOST_HAS_EXPLICIT_STATES:
            with pytest.raises(RuntimeError, match="SpikingJelly 2.x"):
                DLIFNode(2, backend="spikingjelly")
            return
        torch.manual_seed(0)
        for v_reset in (0.0, None, 0.25):
            x = torch.randn(5, 3, 30, dtype=torch.float64, requires_grad=True)
            node = DLIFNode(5, tau=3.0, v_reset=v_reset, store_v_seq=True).double()
            nn.init.uniform_(node.input_gain, 0.5, 1.5)
            results = []
            for backend in ("reference", "spikingjelly"):
                node.backend = backend
                spikes = run(node, x)
                grads = torch.autograd.grad((spikes * x.detach()).sum(), [x, node.input_gain])
                results.append((spikes, node.v_seq, *grads))
            assert_close(*results, rtol=1e-9, atol=1e-11)
        assert node.chosen_backend(x) == "spikingjelly"


class TestHost:
    @needs_explicit_states
    def test_functional_forward_leaves_the_module_alone(self):
        net = nn.Sequential(nn.Linear(3, 4), DLIFNode(4))
        x = torch.randn(4, 2, 3)
        wanted = net(x)
        functional.reset_net(net)
        forward = base.to_functional_forward(net)
        states = tuple(base.extract_memories(net))
        (first,), states = forward((x[:3],), states)
        (second,), states = forward((x[3:],), states)
        assert torch.equal(torch.cat([first, second]), wanted)
        assert net[1].time_step == 0
        assert states[1] == 4

    @needs_explicit_states
    @pytest.mark.parametrize("chunks", [1, 2])
    def test_memory_optimisation(self, chunks):
        from spikingjelly.activation_based.memopt import checkpoint_module

        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(3, 4), DLIFNode(4, tau=2.0))
        optimised = copy.deepcopy(plain)
        wrapped = checkpoint_module(optimised[1], chunks=chunks)
        x = torch.randn(4, 2, 3)
        wanted = plain(x)
        wanted.sum().backward()
        spikes = wrapped(optimised[0](x))
        spikes.sum().backward()
        assert torch.equal(spikes, wanted)
        assert_close(optimised[1].input_gain.grad, plain[1].input_gain.grad)
        assert_close(optimised[0].weight.grad, plain[0].weight.grad)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_recomputes_from_a_reset_and_is_refused_elsewhere(self, use_reentrant):
        node = DLIFNode(4, tau=2.0)
        nn.init.uniform_(node.input_gain, 0.5, 1.5)
        x = torch.randn(2, 3, 5, requires_grad=True)

        def from_reset(x):
            functional.reset_net(node)
            return node(x)

        wanted = torch.autograd.grad(from_reset(x).sum(), x)[0]
        found = torch.utils.checkpoint.checkpoint(from_reset, x, use_reentrant=use_reentrant)
        found.sum().backward()
        assert_close(x.grad, wanted)
        functional.reset_net(node)
        spikes = torch.utils.checkpoint.checkpoint(node, x, use_reentrant=use_reentrant)
        with pytest.raises(RuntimeError, match="activation checkpointing.*step 2"):
            spikes.sum().backward()

    def test_a_gain_changed_between_the_chunks_is_no_forgotten_reset(self):
        node = DLIFNode(4, tau=2.0)
        first = node(torch.randn(2, 3))
        with torch.no_grad():
            node.input_gain.mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (first + node(torch.randn(2, 3))).sum().backward()

    # Dynamo itself instantiates the autograd function that torch asks users not to instantiate
    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("function", [surrogate.PiecewiseQuadratic, surrogate.Sigmoid])
    def test_compiles_to_one_graph(self, function):
        torch.manual_seed(0)
        torch._dynamo.reset()
        net = nn.Sequential(nn.Linear(3, 8), DLIFNode(4, tau=2.0, surrogate_function=function()))
        x = torch.randn(4, 2, 3)
        wanted = net(x)
        gradients = list(torch.autograd.grad(wanted.sum(), list(net.parameters())))
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            functional.reset_net(net)
            net.zero_grad()
            spikes = compiled(x)
            spikes.sum().backward()
            assert torch.equal(spikes, wanted)
            assert_close([p.grad for p in net.parameters()], gradients)

    def test_data_parallel_is_refused(self):
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            DLIFNode(2)._replicate_for_data_parallel()


class TestWrongUse:  # of a neuron alone; what a network says is in test_stage.py
    def test_numbers_of_numpy_and_torch(self):
        node = DLIFNode(2, tau=np.float32(2.0), v_threshold=torch.tensor(0.5), v_reset=0)
        assert (node.tau, node.v_threshold, node.v_reset) == (2.0, 0.5, 0.0)

    def test_backend_is_checked_after_construction_too(self):
        node = DLIFNode(2)
        with pytest.raises(ValueError, match="backend must be one of .*'spikingjelly'"):
            node.backend = "numpy"
        assert node.backend == "auto"
