"""SpikingJelly 2.x's counters, memory and precision tools with DLIF, and what exports to ONNX and
NIR hold.
"""

import warnings

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust.estimators import estimator
from sj_robust.evaluation import firing
from sj_robust.evaluation.run.faults import Fault, faulty
from sj_robust.neuron import DLIFNode, dlif_to_lif, fuse, replace_neurons
from sj_robust.ops import available_backends
from sj_robust.perturbation import MPPDMonitor

T = 4
PACKAGE = "spikingjelly.activation_based"


def plain(pool=True):
    """Two spiking layers; random running statistics, so that folding batch norm into a convolution
    is seen.
    """
    torch.manual_seed(0)
    layers = []
    for channels in (2, 6):
        lif = neuron.LIFNode(tau=2.0, decay_input=False, surrogate_function=surrogate.ATan())
        layers += [layer.Conv2d(channels, 6, 3, padding=1), layer.BatchNorm2d(6), lif]
        layers += [layer.AvgPool2d(2)] if pool else []
    net = nn.Sequential(*layers, layer.Flatten(), layer.Linear(24 if pool else 384, 5))
    functional.set_step_mode(net, "m")
    for norm in net[1], net[4 + pool]:
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(norm.weight, 2.0, 4.0)
    return net


def with_dlif(fused, **kwargs):
    net = plain(**kwargs)
    replace_neurons(net, T)
    if fused:
        fuse(net)
    return net


def inputs():
    return torch.randn(T, 3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def counted(net, x, backward):
    """Totals of every counter, the states in detail, and what each module was counted for."""
    counters = pytest.importorskip(f"{PACKAGE}.op_counter")
    kinds = [
        getattr(counters, f"{kind}Counter")
        for kind in ("Flop", "MemoryAccess", "AC", "MAC", "SynOp", "NeuronState")
    ]
    found = [kind() for kind in kinds]
    with counters.DispatchCounterMode(found):
        y = net(x)
        if backward:
            y.sum().backward()
    functional.reset_net(net)
    totals = {type(counter).__name__: counter.get_total() for counter in found}
    return totals, found[-1].get_metric_counts()["Global"], set(found[0].get_counts())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_counters_give_the_figures_of_lif(fused, train):
    x = inputs()
    net = with_dlif(fused).train(train)
    lif = plain().train(train)
    totals, states, scopes = counted(net, x, False)
    wanted, wanted_states, wanted_scopes = counted(lif, x, False)
    assert states == wanted_states
    assert states["state_reads"] > 0
    currents = (
        T * 3 * 6 * (64 + 16)
    )  # of both layers: each is multiplied by its gain, which LIF has not
    wanted["FlopCounter"] += currents
    wanted["MemoryAccessCounter"] += 4 * (2 * currents + 2 * T)
    assert totals == wanted
    if not fused:
        assert scopes == wanted_scopes
    else:  # every child of a stage is counted by itself
        assert {f"Sequential.{part}" for part in ("1.norm", "1.node", "1.pool")} <= scopes
    if train:
        totals, states, _ = counted(net, x, True)
        wanted, wanted_states, _ = counted(lif, x, True)
        assert states == wanted_states
        for name in ("MACCounter", "SynOpCounter"):
            assert totals[name] == wanted[name]
        assert totals["FlopCounter"] > wanted["FlopCounter"]  # the gradient of the gain


@pytest.mark.parametrize("mode", ["DispatchCounterMode", "FunctionCounterMode"])
def test_the_kernel_runs_again_once_nothing_is_counted(mode):
    counters = pytest.importorskip(f"{PACKAGE}.op_counter")
    node = DLIFNode(T)
    x = inputs()
    with getattr(counters, mode)([counters.FlopCounter()]):
        assert node.chosen_backend(x) == "spikingjelly"
        assert DLIFNode(T, backend="eager").chosen_backend(x) == "eager"
    expected = "cpp" if available_backends()["cpp"] == "available" else "eager"
    assert node.chosen_backend(x) == expected


@pytest.mark.parametrize("fused", [False, True])
def test_energy_models_give_the_figures_of_lif(fused):
    counters = pytest.importorskip(f"{PACKAGE}.op_counter")
    x = inputs()
    net = with_dlif(fused, pool=False).eval()
    lif = plain(pool=False).eval()
    reports = {}
    for name in net, lif:
        simple = counters.estimate_simple_energy(name, x).counts
        functional.reset_net(name)
        runtime = counters.estimate_neuromc_runtime_energy(name, x)
        functional.reset_net(name)
        reports[name] = simple, runtime.energy_total_pj
    assert reports[net] == reports[lif]
    with pytest.raises(ValueError, match="IF/LIF"):
        counters.estimate_spikesim_energy(net, x)
    dlif_to_lif(net)
    wanted = counters.estimate_spikesim_energy(lif, x).energy_total_pj
    assert counters.estimate_spikesim_energy(net, x).energy_total_pj == wanted > 0


@pytest.mark.parametrize("targets", [DLIFNode, layer.Conv2d])
def test_memory_optimisation_keeps_outputs_and_gradients(targets):
    memopt = pytest.importorskip(f"{PACKAGE}.memopt")
    x = inputs()
    net = with_dlif(True)
    wanted = with_dlif(True)

    def example(model):
        functional.reset_net(model)
        return model(x)

    memopt.optimize_memory(net, targets, example, level=1)
    wrapped = net[1].node if targets is DLIFNode else net[0]
    assert type(wrapped).__name__ == "CheckpointWrapper"
    functional.reset_net(net)
    given = net(x)
    expected = wanted(x)
    assert_close(given, expected)
    found = torch.autograd.grad(given.sum(), list(net.parameters()))
    assert_close(
        found, torch.autograd.grad(expected.sum(), list(wanted.parameters())), rtol=1e-4, atol=1e-4
    )


NEED_HOOKS = {
    "monitor": MPPDMonitor,
    "estimator": lambda net: estimator("atan:4")(net).__enter__(),
    "rectifier": lambda net: estimator("cba")(net).__enter__(),
    "fault": lambda net: faulty(net, Fault("stuck_at_zero", 0.1)),
    "firing": lambda net: firing(net, inputs()),
    "replacement": lambda net: replace_neurons(net, T),
    "and back": dlif_to_lif,
}


@pytest.mark.parametrize("use", NEED_HOOKS)
def test_what_changes_or_watches_neurons_refuses_those_of_memopt(use):
    memopt = pytest.importorskip(f"{PACKAGE}.memopt")
    net = with_dlif(False)
    net[6] = memopt.checkpoint_module(net[6])
    with pytest.raises(ValueError, match=r"without SpikingJelly's memopt, which runs '6'"):
        NEED_HOOKS[use](net)
    net[6] = nn.Sequential(nn.Identity(), with_dlif(False)[6])
    net = memopt.checkpoint_module(net)
    with pytest.raises(ValueError, match=r"without SpikingJelly's memopt, which runs 'it'"):
        NEED_HOOKS[use](net)


@pytest.mark.parametrize("use", NEED_HOOKS)
def test_memopt_of_other_layers_stops_what_copies_the_network(use):
    memopt = pytest.importorskip(f"{PACKAGE}.memopt")
    net = with_dlif(False)
    net[0] = memopt.checkpoint_module(net[0])
    if use in ("rectifier", "fault"):  # whose copy would run the layer of the network itself
        with pytest.raises(ValueError, match=r"without SpikingJelly's memopt, which runs '0'"):
            NEED_HOOKS[use](net)
    else:
        NEED_HOOKS[use](net)


def test_precision_is_torchs_autocast():
    precision = pytest.importorskip(f"{PACKAGE}.precision")
    x = inputs()
    net = with_dlif(True)
    prepared = precision.prepare_model_for_precision(net, "cpu", "bf16")
    with prepared.autocast_context():
        given = prepared.model(x)
    functional.reset_net(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(given, net(x))
    assert given.dtype == torch.bfloat16
    assert net[1].node.v.dtype == torch.float32
    expected = set(prepared.describe()["conversion_report"]["high_precision_modules"])
    assert {"1.node", "5.node"} <= expected
    storage = precision.PrecisionConfig(mode="bf16", neuron_storage="bf16")
    with pytest.raises(RuntimeError, match="IF/LIF/PLIF"):
        precision.prepare_model_for_precision(with_dlif(False), "cpu", storage)


class Reset(nn.Module):
    """Images [N, C, H, W] to the mean over time."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        functional.reset_net(self.net)
        return self.net(images.expand(T, *images.shape)).mean(0)


@pytest.mark.parametrize("exporting", [False, True])
def test_an_onnx_model_holds_torchs_operators_alone(exporting, monkeypatch):
    """Without the packages for ONNX: torch's older exporter begins with a trace."""
    net = Reset(with_dlif(True)).eval()
    images = inputs()[0]
    kernel = available_backends()["cpp"] == "available"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = net(images)
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: exporting)
        traced = torch.jit.trace(net, images, check_trace=False)
        assert ("sj_robust::" in str(traced.inlined_graph)) == (kernel and not exporting)
        assert_close(traced(images), wanted, rtol=1e-4, atol=1e-4)
        net.net[1].node.backend = "cpp" if kernel else "eager"
        if exporting:
            with pytest.raises(ValueError, match="ONNX model holds torch's own operators"):
                torch.jit.trace(net, images, check_trace=False)


def test_nir_has_constant_gains_and_refuses_learned_ones():
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    exchange = pytest.importorskip(f"{PACKAGE}.nir_exchange")
    from spikingjelly.activation_based.functional.conv_bn_fusion import fuse_conv_bn_eval_modules

    x = inputs()
    net = with_dlif(True).eval()
    with torch.no_grad():
        net[1].node.input_gain.fill_(1.3)
        net[5].node.input_gain.fill_(0.5)
        wanted = net(x)
    functional.reset_net(net)
    dlif_to_lif(net)
    folded = fuse_conv_bn_eval_modules(net)
    graph = exchange.export_to_nir(folded, x)
    loaded = exchange.import_from_nir(graph, step_mode="m")
    given, _ = loaded(x)
    assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.01
    learned = nn.Sequential(layer.Linear(2, 2), DLIFNode(T))
    nn.init.uniform_(learned[1].input_gain, 0.5, 1.5)
    with pytest.raises(TypeError, match="dlif_to_lif"):
        exchange.export_to_nir(learned, torch.rand(T, 1, 2))
    with pytest.raises(ValueError, match=r"gains of '1'.*fill_"):
        dlif_to_lif(learned)
