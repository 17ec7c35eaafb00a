"""The monitor's statistics against numpy, and what it must leave alone."""

import copy
import gc
import io
import itertools
import json
import weakref
from functools import partial

import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from perturbation.by_hand import (
    Dynamics,
    assert_stats,
    captured_pair,
    eps_by_hand,
    statistics_by_hand,
)
from perturbation.networks import (
    NEURONS,
    Shared,
    T,
    conv_net,
    images,
    in_chunks,
    in_steps,
    recurrent_net,
    run_pair,
    storage_bytes,
)
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust import SpikingClassifier
from sj_robust.classifier import PoissonEncoder
from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import MPPDMonitor, compare_potentials, spike_traces
from sj_robust.perturbation._statistics import LayerStats, LayerTrace

NAMES = ("2", "4", "8")
assert_near = partial(assert_close, atol=1e-5, rtol=1e-5)


def nodes_of(net):
    """The watched neurons of ``conv_net`` by name."""
    return {name: net.get_submodule(name) for name in NAMES}


def seen_by(net, name, pair):
    """What one neuron saw in a clean and a perturbed run."""
    return captured_pair(net.eval(), [name], *pair)[name]


@pytest.mark.parametrize("kind", NEURONS)
def test_statistics_equal_numpy(kind, pair):
    net = conv_net(NEURONS[kind].build)
    with MPPDMonitor(net) as monitor:
        stats = monitor.compare(*pair)
    assert list(stats) == list(NAMES)
    dynamics = NEURONS[kind].dynamics(v_threshold=net[2].v_threshold)
    seen = captured_pair(net.eval(), NAMES, *pair)
    for name, layer in stats.items():
        assert layer.samples == 3
        assert layer.neuron == type(net[2]).__name__
        expected = statistics_by_hand(seen[name], dynamics)
        assert_stats(layer, expected)
    assert 0 < stats["8"].summary()["spike_distance"] < 1


@pytest.mark.skipif(
    not hasattr(surrogate, "MultiLevelSpikeCount"), reason="this release has one spike per step"
)
def test_a_neuron_that_fires_several_spikes_per_step():
    count = surrogate.MultiLevelSpikeCount(4)
    net = nn.Sequential(neuron.IFNode(v_reset=None, step_mode="m", surrogate_function=count))
    x = 4 * torch.rand(T, 5, 4)
    x_perturbed = x + 0.5 * torch.rand_like(x)
    stats = MPPDMonitor(net).compare(x, x_perturbed)["0"]
    seen = captured_pair(net, ["0"], x, x_perturbed)["0"]
    assert seen.spikes.max() > 1
    dynamics = Dynamics(decay=1.0, gain=[1.0] * T, v_reset=None)
    assert_stats(stats, statistics_by_hand(seen, dynamics))


def test_the_learnable_gain_can_be_left_out(pair):
    net = conv_net(NEURONS["DLIF"].build)
    with MPPDMonitor(net) as monitor:
        usual = monitor.compare(*pair)["8"]
    with MPPDMonitor(net, input_gain=False) as monitor:
        stats = monitor.compare(*pair)["8"]
    assert not torch.allclose(stats.max_abs, usual.max_abs)
    seen = seen_by(net, "8", pair)
    dynamics = Dynamics(decay=0.5, gain=[1.0] * T)
    expected = statistics_by_hand(seen, dynamics)
    assert_allclose(stats.ms_mppd, expected["ms_mppd"], rtol=1e-4)
    assert_allclose(stats.l1, expected["l1"], rtol=1e-4)
    assert_allclose(stats.max_abs, expected["max_abs"], rtol=1e-4)


def potentials_of(net, x):
    """Potentials as the neurons themselves store them."""
    for node in nodes_of(net).values():
        node.store_v_seq = True
    net(x)
    potentials = {}
    for name, node in nodes_of(net).items():
        potentials[name] = node.v_seq.detach().clone()
    functional.reset_net(net)
    return potentials


@pytest.mark.parametrize("kind", NEURONS)
def test_traces_are_what_the_neurons_did(kind, pair):
    net = conv_net(NEURONS[kind].build)
    with MPPDMonitor(net, keep="trace") as monitor:
        monitor.compare(*pair)
    net.eval()
    neurons = NEURONS[kind]
    potentials = potentials_of(net, pair[0])
    potentials_perturbed = potentials_of(net, pair[1])
    for name, seen in captured_pair(net, NAMES, *pair).items():
        (trace,) = monitor[name]
        assert isinstance(trace, LayerTrace)
        assert_array_equal(trace.x_seq, seen.x)
        assert_array_equal(trace.spike_seq, seen.spikes)
        assert_array_equal(trace.x_seq_perturbed, seen.x_perturbed)
        assert_array_equal(trace.spike_seq_perturbed, seen.spikes_perturbed)
        eps = eps_by_hand(seen.x, seen.x_perturbed, neurons.decay, neurons.gains)
        assert_allclose(trace.eps, eps, atol=1e-5)
        assert not trace.eps.requires_grad
        v = potentials[name]
        v_perturbed = potentials_perturbed[name]
        assert_near(trace.v_seq, v)
        assert_near(trace.v_seq_perturbed, v_perturbed)
        assert_near(trace.full, v - v_perturbed, atol=2e-5)
    monitor.clear_recorded_data()
    assert monitor["8"] == []


def lose_half(module, inputs, output):
    """A forward hook that changes what a neuron puts out, though not its reset."""
    return output * (torch.arange(output.shape[-1]) % 2)


@pytest.mark.parametrize("registered", ["before", "after"])
@pytest.mark.parametrize("kind", ["LIF", "LIF soft"])
def test_potentials_are_the_neurons_own_whatever_a_hook_makes_of_their_spikes(
    kind, registered, pair
):
    net = conv_net(NEURONS[kind].build).eval()
    if registered == "before":
        net[2].register_forward_hook(lose_half)
    monitor = MPPDMonitor(net, keep="trace")
    if registered == "after":
        net[2].register_forward_hook(lose_half)
    stats = monitor.compare(*pair)
    monitor.close()
    clean, perturbed = (potentials_of(net, x) for x in pair)
    for name in NAMES:
        assert_near(monitor[name][0].v_seq, clean[name])
        full = (clean[name] - perturbed[name]).double().square().flatten(1).mean(1)
        assert_near(stats[name].full_ms_mppd, full)


def test_hand_made_recurrent_container():
    net = recurrent_net().eval()
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.rand(T, 4, 5, generator=generator)
    x_perturbed = x + torch.randn(x.shape, generator=generator)
    monitor = MPPDMonitor(net)
    stats = monitor.compare(x, x_perturbed)
    expected = {
        "1": Dynamics(decay=0.5, gain=[0.5] * T, v_threshold=0.5),
        "2.sn": Dynamics(decay=0.5, gain=[1.0] * T),
        "3.sub_module": Dynamics(decay=1.0, gain=[1.0] * T, v_threshold=0.5),
        "5": Dynamics(decay=1.0, gain=[1.0] * T, v_threshold=0.5),
    }
    assert monitor.execution_order == tuple(expected)
    seen = captured_pair(net, list(stats), x, x_perturbed)
    for name, dynamics in expected.items():
        assert_stats(stats[name], statistics_by_hand(seen[name], dynamics))
        assert stats[name].summary()["spike_distance"] > 0


def values_of(stats):
    per_step = stats.to_dict()["per_step"]
    return {name: torch.tensor(values) for name, values in per_step.items()}


@pytest.mark.parametrize("kind", ["LIF", "LIF reset -0.2", "PLIF", "DLIF"])
def test_every_way_of_running_gives_the_same_statistics(kind, pair):
    net = conv_net(NEURONS[kind].build).eval()
    monitor = MPPDMonitor(net)
    whole = monitor.compare(*pair)
    others = [monitor.compare(*pair, forward=in_chunks(net))]
    for step_mode, run in (("m", net), ("s", in_steps(net))):
        functional.set_step_mode(net, step_mode)
        others.append(monitor.compare(*pair, forward=run))
        monitor.clear_recorded_data()
        run_pair(monitor, net, *pair, "paired", run=run)
        others.append(monitor.statistics())
    for other, name in itertools.product(others, NAMES):
        assert other[name].samples == 3
        assert_stats(other[name], values_of(whole[name]), atol=1e-5)


STATE_SHAPES = {
    "2": (3, 4, 6, 6),
    "4": (3, 4, 6, 6),
    "8": (3, 8),
}


def set_state(net, copies=1):
    """The same potentials for each of so many copies of the batch."""
    functional.reset_net(net)
    generator = torch.Generator().manual_seed(3)
    for name, node in nodes_of(net).items():
        v = torch.rand(STATE_SHAPES[name], generator=generator)
        node.v = torch.cat([v] * copies)


@pytest.mark.parametrize("kind", ["LIF", "DLIF"])
def test_runs_that_go_on_from_a_state_start_at_it(kind, pair):
    neurons = NEURONS[kind]
    net = conv_net(neurons.build).eval()
    monitor = MPPDMonitor(net, keep="trace")
    with torch.no_grad():
        set_state(net)
        with monitor.clean():
            net(pair[0])
        set_state(net)
        with monitor.perturbed():
            net(pair[1])
        set_state(net, copies=2)
        with monitor.paired():
            net(torch.cat(pair, dim=1))
        set_state(net)
    for name, node in nodes_of(net).items():
        apart, together = monitor[name]
        for trace in (apart, together):
            h = neurons.decay * node.v + neurons.gains[0] * trace.x_seq[0]
            fired = trace.spike_seq[0] == 1
            assert_close(trace.v_seq[0], torch.where(fired, 0.0, h))
        assert_near(together.v_seq, apart.v_seq)
        assert_near(together.v_seq_perturbed, apart.v_seq_perturbed)
    functional.reset_net(net)


def test_statistics_of_many_pairs_are_those_of_one_large_batch(net, monitor):
    clean = []
    perturbed = []
    for seed, n in ((1, 3), (2, 1), (3, 4)):
        x, x_perturbed = images(seed, n)
        monitor.compare(x, x_perturbed)
        clean.append(x)
        perturbed.append(x_perturbed)
    whole = MPPDMonitor(net)
    together = whole.compare(torch.cat(clean, 1), torch.cat(perturbed, 1))
    for name, stats in monitor.statistics().items():
        assert stats.samples == 8
        assert_stats(stats, values_of(together[name]), atol=1e-5)
    alone = MPPDMonitor(net).compare(x, x_perturbed)["8"]
    again = monitor.compare(x, x_perturbed)["8"]
    assert_close(again.ms_mppd, alone.ms_mppd)


def live_tensors():
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return len(tensors)


def take_batches(count, net, monitor, use):
    for seed in range(count):
        pair = images(seed, n=16)
        if use == "compare":
            monitor.compare(*pair)
            continue
        with torch.set_grad_enabled(use == "training"):
            run_pair(monitor, net, *pair)
        if use == "training":
            monitor.loss(layers="all", retain=False).backward()
        functional.reset_net(net)


@pytest.mark.slow
@pytest.mark.parametrize("use", ["compare", "contexts", "training"])
def test_memory_does_not_grow_with_batches(net, monitor, use):
    take_batches(2, net, monitor, use)
    tensors = live_tensors()
    held = storage_bytes(monitor)
    take_batches(6, net, monitor, use)
    assert live_tensors() <= tensors  # other tests' may go meanwhile
    assert storage_bytes(monitor) == held
    # Far less than the input current of one layer, 4 steps of 16 samples of 4 x 6 x 6 in float32.
    assert held < T * 16 * 144 * 4 / 2


def test_a_state_from_before_the_pair_does_not_stay(net, monitor):
    net.eval()
    x, x_perturbed = images(n=16)
    nodes = list(nodes_of(net).values())
    with torch.no_grad():
        net(x)
        states = [node.v.clone() for node in nodes]
        with monitor.clean():
            net(x)
        for node, v in zip(nodes, states, strict=True):
            node.v = v
        del node, v, states
        with monitor.perturbed():
            net(x_perturbed)
    functional.reset_net(net)
    # Less than the potential of one layer before the pair, 16 samples of 4 x 6 x 6 in float32.
    assert storage_bytes(monitor) < 16 * 144 * 4


def train_once(net, x):
    functional.reset_net(net)
    net.zero_grad()
    out = net(x)
    y = torch.tensor([0, 1, 2])
    nn.functional.cross_entropy(out.mean(0), y).backward()
    grads = [parameter.grad for parameter in net.parameters()]
    return out.detach(), [grad.clone() for grad in grads if grad is not None]


@pytest.mark.parametrize("kind", ["LIF", "PLIF", "DLIF"])
def test_outputs_and_gradients_of_the_network_are_unchanged(kind, pair):
    plain = conv_net(NEURONS[kind].build)
    watched = conv_net(NEURONS[kind].build)
    monitor = MPPDMonitor(watched, keep="trace")
    for run, x in zip((monitor.clean, monitor.perturbed), pair, strict=True):
        with run():
            out_seen, grads_seen = train_once(watched, x)
        out, grads = train_once(plain, x)
        assert torch.equal(out, out_seen)
        assert len(grads) >= 8
        assert_close(grads, grads_seen, rtol=0, atol=0)


def hook_count(net):
    count = 0
    for module in net.modules():
        count += len(module._forward_hooks)
        count += len(module._forward_pre_hooks)
        count += len(module._forward_hooks_with_kwargs)
    return count


@pytest.mark.parametrize("end", [MPPDMonitor.close, MPPDMonitor.remove_hooks])
def test_hooks_go_when_the_monitor_is_told_to(end, net):
    monitor = MPPDMonitor(net)
    assert hook_count(net) > 0
    end(monitor)
    assert hook_count(net) == 0


def test_hooks_go_with_the_monitor_and_with_its_context(net):
    monitor = MPPDMonitor(net)
    del monitor
    assert hook_count(net) == 0
    with MPPDMonitor(net):
        assert hook_count(net) > 0
    assert hook_count(net) == 0
    with pytest.raises(ZeroDivisionError), MPPDMonitor(net):
        1 / 0  # noqa: B018  # any exception
    assert hook_count(net) == 0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["clean", "perturbed"])
def test_an_exception_leaves_nothing_behind(net, pair, monitor, where):
    net[3].eval()
    modes = [module.training for module in net.modules()]
    monitor.disable()
    last = {"clean": 1, "perturbed": 2}[where]
    calls = []

    def forward(x):
        calls.append(x)
        net(x)
        if len(calls) == last:
            raise KeyboardInterrupt

    before = live_tensors()
    with pytest.raises(KeyboardInterrupt):
        monitor.compare(*pair, forward=forward)
    calls.clear()
    assert live_tensors() == before
    assert [module.training for module in net.modules()] == modes
    assert not monitor.is_enable()
    assert monitor.statistics() == {}
    assert isinstance(net[2].v, float)
    monitor.enable()
    with pytest.raises(RuntimeError, match="two complete runs"):
        monitor.loss()
    stats = monitor.compare(*pair)["8"]
    seen = seen_by(net, "8", pair)
    expected = statistics_by_hand(seen, NEURONS["LIF"].dynamics())
    assert_stats(stats, expected)


def test_compare_leaves_the_network_as_it_was(net, pair, monitor):
    net[6].eval()
    watched = list(nodes_of(net).values())
    with unchanged(net, hooked=watched):
        monitor.compare(*pair)


def test_it_is_used_as_a_spikingjelly_monitor(net, pair, monitor):
    assert monitor.monitored_layers == list(NAMES)
    assert monitor.is_enable()
    assert monitor["2"] == []
    monitor.compare(*pair)
    monitor.compare(*pair)
    (record,) = monitor["4"]
    assert isinstance(record, LayerStats)
    assert record.samples == 6
    found = [monitor[i].name for i in range(3)]
    assert found == list(NAMES)
    monitor.disable()
    run_pair(monitor, net, *pair)
    monitor.enable()
    functional.reset_net(net)
    net(pair[0])  # outside the contexts nothing is recorded
    assert monitor["4"][0].samples == 6
    monitor.clear_recorded_data()
    assert monitor["4"] == []
    assert monitor.statistics() == {}
    with pytest.raises(KeyError, match="no monitored layer '3'"):
        monitor["3"]


def test_stats_can_be_read_and_saved(monitor, pair):
    stats = monitor.compare(*pair)["8"]
    assert repr(stats).startswith("LayerStats('8', LIFNode, T=4, samples=3: firing_rate 0.")
    saved = json.loads(json.dumps(stats.to_dict()))
    assert saved["per_step"]["ms_mppd"] == stats.ms_mppd.tolist()
    summary = saved["summary"]
    assert summary["ms_mppd"] == pytest.approx(float(stats.ms_mppd.mean()))
    assert summary["max_abs"] == float(stats.max_abs.max())
    assert summary["tasad"] == float(stats.tasad[-1])
    assert saved["name"] == "8"
    assert saved["neuron"] == "LIFNode"
    assert saved["T"] == 4
    assert saved["samples"] == 3


def test_copies_of_a_watched_network_are_free(net, pair):
    x, x_perturbed = pair
    monitor = MPPDMonitor(net)
    twin = copy.deepcopy(net)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with monitor.clean():
        net(x)
        twin(x_perturbed)
        loaded(x_perturbed)
    functional.reset_net(net)
    with monitor.perturbed():
        net(x_perturbed)
    assert monitor.statistics()["2"].samples == 3
    alive = weakref.ref(monitor)
    del monitor
    assert alive() is None


def test_a_neuron_that_is_called_twice_per_step_is_followed_call_by_call():
    torch.manual_seed(0)
    net = Shared(nn.Linear(4, 4), nn.Linear(4, 4))
    run = in_steps(net)
    x, x_perturbed = 3 * torch.rand(2, T, 5, 4)
    monitor = MPPDMonitor(net)
    stats = monitor.compare(x, x_perturbed, forward=run)["sn"]
    assert monitor.monitored_layers == ["sn"]
    assert stats.T == 2 * T
    seen = captured_pair(net, ["sn"], x, x_perturbed, run)
    dynamics = Dynamics(decay=0.5, gain=[1.0] * 2 * T)
    expected = statistics_by_hand(seen["sn"], dynamics)
    assert_stats(stats, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype, pair):
    net = conv_net(partial(DLIFNode, T=T, tau=4.0)).to(dtype)
    pair = [x.to(dtype) for x in pair]
    stats = MPPDMonitor(net).compare(*pair)["4"]
    assert stats.ms_mppd.dtype == torch.float64
    seen = seen_by(net, "4", pair)
    dynamics = Dynamics(decay=0.75, gain=[1.0] * T)
    expected = statistics_by_hand(seen, dynamics)
    if dtype == torch.float64:
        assert_stats(stats, expected, rtol=1e-12, atol=1e-12)
    else:
        assert_stats(stats, expected, atol=1e-5)


def test_empty_batch(monitor):
    stats = monitor.compare(*images(n=0))
    assert stats["8"].samples == 0


@pytest.mark.slow
def test_compiled_network(net, pair, monitor):
    expected = monitor.compare(*pair)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager")
    stats = monitor.compare(*pair, forward=compiled)
    torch.compiler.reset()
    for name in NAMES:
        assert_close(stats[name].ms_mppd, expected[name].ms_mppd)
        assert_close(stats[name].tasad, expected[name].tasad)


def test_neurons_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.sn = neuron.IFNode()

        def forward(self, x):
            return self.sn(x=x)

    net = Keyword()
    x, x_perturbed = torch.rand(2, 1, 2, 3).expand(2, 2, 2, 3)
    stats = MPPDMonitor(net).compare(x, x_perturbed, forward=in_steps(net))
    first = (x - x_perturbed)[0].double()
    shift = first.square().mean()
    expected = torch.stack([shift, 4 * shift])
    assert_close(stats["sn"].ms_mppd, expected, rtol=1e-5, atol=0)


def test_copies_and_exchanged_neurons_are_told(net, pair, monitor):
    with pytest.raises(RuntimeError, match=r"is a copy.*build a new one"):
        copy.deepcopy(monitor).compare(*pair)
    net[2] = neuron.IFNode(step_mode="m")
    with pytest.raises(RuntimeError, match=r"exchanged, added or removed .*\(2\); build a new one"):
        monitor.compare(*pair)
    assert "2" in MPPDMonitor(net).compare(*pair)


def test_a_network_resets_itself_if_it_is_a_classifier_whatever_its_attributes_say():
    """What a network calls its own does not keep the monitor from looking at its steps."""
    net = nn.Sequential(nn.Linear(2, 3), DLIFNode(T, step_mode="s"))
    net.resets_itself = True
    x = torch.rand(5, 2)
    with MPPDMonitor(net) as monitor, pytest.raises(ValueError, match="called the network once"):
        monitor.compare(x, 0.9 * x)


class OwnNoise(nn.Module):
    """An encoder that draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return x + torch.rand(x.shape, generator=self.generator)


@pytest.mark.parametrize("encoder", [PoissonEncoder(), OwnNoise()])
def test_both_runs_draw_the_same_numbers(encoder):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), neuron.IFNode(step_mode="m"))
    net[2].v_threshold = 0.2
    model = SpikingClassifier(net, T=3, encoder=encoder).eval()
    x = torch.rand(5, 1, 4, 4)
    same = compare_potentials(model, x, x)["2"]
    assert not same.ms_mppd.any()
    assert spike_traces(model, x, x).parting() is None
    drawn = torch.rand(3)
    assert not torch.equal(drawn, torch.rand(3))  # the generators go on
    moved = compare_potentials(model, x, (x + 0.05).clamp(max=1))["2"]
    assert 0 < float(moved.ms_mppd.mean()) < 0.05


def test_dropout_in_training_is_no_perturbation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.Dropout(), neuron.IFNode(step_mode="m"))
    x = torch.rand(3, 5, 16)
    noise = []
    with MPPDMonitor(net) as monitor:
        for change in (0.0, 0.05):
            functional.reset_net(net)
            with monitor.clean():
                clean = net(x)
            torch.rand(7)  # as an attack may draw
            functional.reset_net(net)
            with monitor.perturbed():
                noise.append(torch.rand(3))  # before the first forward: not the network's
                perturbed = net(x + change)
            assert bool(monitor.loss()) is bool(change)
            assert change or torch.equal(clean, perturbed)
        functional.reset_net(net)
        with monitor.clean():
            assert not torch.equal(net(x), clean)  # another step, another mask
    assert not torch.equal(*noise)
    assert not net._forward_pre_hooks
