"""The monitor's statistics and traces against numpy, and what it must leave alone."""

import copy
import gc
import io
import itertools
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from perturbation.by_hand import (
    Dynamics,
    assert_stats,
    captured_pair,
    eps_by_hand,
    statistics_by_hand,
)
from perturbation.networks import (
    NAMES,
    NEURONS,
    Leaky,
    Shared,
    T,
    conv_net,
    images,
    in_chunks,
    in_steps,
    inputs,
    linear_net,
    recurrent_net,
    run_pair,
)
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust import SpikingClassifier
from sj_robust.classifier import PoissonEncoder
from sj_robust.perturbation import MPPDMonitor, compare_potentials, spike_traces

assert_near = partial(assert_close, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Case:
    """A network, and the dynamics of its neurons in the order of their execution."""

    build: Callable[[], nn.Module]
    dynamics: Mapping[str, Dynamics]
    pair: Callable[[], Any] = images
    run: Callable[[nn.Module], Any] = lambda net: net
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tolerances: tuple[float, float] = (1e-4, 1e-5)


def several_spikes():
    if not hasattr(surrogate, "MultiLevelSpikeCount"):
        pytest.skip("SpikingJelly 0.0.0.0.14 has one spike per step")
    count = surrogate.MultiLevelSpikeCount(4)
    return nn.Sequential(neuron.IFNode(v_reset=None, step_mode="m", surrogate_function=count))


def shared():
    torch.manual_seed(0)
    return Shared(nn.Linear(4, 4), nn.Linear(4, 4))


CASES = {
    kind: Case(partial(conv_net, kind), dict.fromkeys(NAMES, dynamics))
    for kind, (_, dynamics) in NEURONS.items()
}
STATED = Case(
    lambda: linear_net(Leaky(), neuron.IFNode()),
    {"1": Dynamics(0.6, 0.5, v_reset=None), "3": Dynamics(1.0)},
    lambda: inputs(5, 6, noise=0.5),
)
of_dlif = partial(Case, partial(conv_net, "DLIF"), CASES["DLIF"].dynamics)
CASES |= {
    "without the learnable gain": of_dlif(options={"input_gain": False}),
    "float64": of_dlif(dtype=torch.float64, tolerances=(1e-12, 1e-12)),
    "bfloat16": of_dlif(dtype=torch.bfloat16),
    "several spikes": Case(
        several_spikes, {"0": Dynamics(1.0, v_reset=None)}, lambda: inputs(5, 4, scale=4.0)
    ),
    "recurrent": Case(
        recurrent_net,
        {
            "1": Dynamics(0.5, 0.5, v_threshold=0.5),
            "2.sn": Dynamics(0.5),
            "3.sub_module": Dynamics(1.0, v_threshold=0.5),
            "5": Dynamics(1.0, v_threshold=0.5),
        },
        lambda: inputs(4, 5, scale=3.0),
    ),
    "twice per step": Case(
        shared, {"sn": Dynamics(0.5)}, lambda: inputs(5, 4, scale=3.0), run=in_steps
    ),
    "stated by name": replace(STATED, options={"decay": {"1": 0.6}, "gain": {"1": 0.5}}),
    "stated by class": replace(STATED, options={"decay": {Leaky: 0.6}, "gain": {Leaky: 0.5}}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_statistics_and_traces_are_those_of_numpy(case):
    net = case.build().to(case.dtype).train()  # which a comparison is not done in
    pair = [x.to(case.dtype) for x in case.pair()]
    run = case.run(net)
    monitor = MPPDMonitor(net, keep="trace", **case.options)
    stats = monitor.compare(*pair, forward=run)
    assert monitor.unsupported == {}
    assert tuple(stats) == monitor.execution_order == tuple(case.dynamics)
    seen = captured_pair(net.eval(), list(stats), *pair, run)
    rtol, atol = case.tolerances
    for name, dynamics in case.dynamics.items():
        found = stats[name]
        learned = case.options.get("input_gain", True)
        expected, traced = statistics_by_hand(*seen[name], dynamics, learned)
        assert_stats(found, expected, rtol, atol)
        assert (found.samples, found.T) == (pair[0].shape[1], len(traced["eps"]))
        assert found.neuron == type(net.get_submodule(name)).__name__
        assert found.ms_mppd.dtype == torch.float64
        (trace,) = monitor[name]
        for tensor, value in traced.items():
            assert_allclose(getattr(trace, tensor).double(), value, rtol, 2 * atol, err_msg=tensor)
            assert not getattr(trace, tensor).requires_grad
    assert found.summary()["spike_distance"] > 0
    monitor.clear_recorded_data()
    assert monitor[name] == []


def lose_half(module, inputs, output):
    """A forward hook that changes what a neuron puts out, though not its reset."""
    return output * (torch.arange(output.shape[-1]) % 2)


@pytest.mark.parametrize("registered", ["before", "after"])
def test_potentials_are_the_neurons_own_whatever_a_hook_makes_of_their_spikes(registered, pair):
    net = conv_net("LIF soft").eval()
    net[2].store_v_seq = True
    if registered == "before":
        net[2].register_forward_hook(lose_half)
    monitor = MPPDMonitor(net, keep="trace")
    if registered == "after":
        net[2].register_forward_hook(lose_half)
    monitor.compare(*pair)
    net(pair[0])
    assert_near(monitor["2"][0].v_seq, net[2].v_seq)


def values_of(stats):
    per_step = stats.to_dict()["per_step"]
    return {name: torch.tensor(values) for name, values in per_step.items()}


@pytest.mark.parametrize("kind", ["LIF", "LIF reset -0.2", "PLIF", "DLIF"])
def test_every_way_of_running_gives_the_same_statistics(kind, pair):
    net = conv_net(kind).eval()
    monitor = MPPDMonitor(net)
    whole = monitor.compare(*pair)
    others = [monitor.compare(*pair, forward=in_chunks(net))]
    for step_mode, run in (("m", net), ("s", in_steps(net))):
        functional.set_step_mode(net, step_mode)
        others.append(monitor.compare(*pair, forward=run))
    for other, name in itertools.product(others, NAMES):
        assert other[name].samples == 3
        assert_stats(other[name], values_of(whole[name]), atol=1e-5)


@pytest.mark.slow
def test_compiled_network(net, pair, monitor):
    expected = monitor.compare(*pair)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager")
    stats = monitor.compare(*pair, forward=compiled)
    torch.compiler.reset()
    for name in NAMES:
        assert_stats(stats[name], values_of(expected[name]))


@pytest.mark.parametrize("kind", ["LIF", "DLIF"])
def test_runs_that_go_on_from_a_state_start_at_it(kind, pair):
    dynamics = NEURONS[kind][1]
    net = conv_net(kind).eval()
    monitor = MPPDMonitor(net, keep="trace")
    first = images()[0][:1]
    rest = [x[1:] for x in pair]
    with torch.no_grad():
        for context, x in zip((monitor.clean, monitor.perturbed), rest, strict=True):
            functional.reset_net(net)
            net(first)
            with context():
                net(x)
        loss = monitor.loss("all", input_gain=True)
        functional.reset_net(net)
        net(first)
    sizes = []
    for name in NAMES:
        (trace,) = monitor[name]
        gains = dynamics.gains(T)[1:]
        h = dynamics.decay * net[int(name)].v + gains[0] * trace.x_seq[0]
        assert_near(trace.v_seq[0], torch.where(trace.spike_seq[0] == 1, 0.0, h))
        eps = eps_by_hand(trace.x_seq, trace.x_seq_perturbed, dynamics.decay, gains)
        assert_near(trace.eps.double(), eps)
        sizes.append(eps.square().mean())
    assert_near(loss.double(), torch.stack(sizes).mean())


def test_statistics_of_many_pairs_are_those_of_one_large_batch(net, monitor):
    batches = [images(seed, n) for seed, n in ((1, 3), (2, 1), (3, 4))]
    for pair in batches:
        monitor.compare(*pair)
    together = MPPDMonitor(net).compare(
        *(torch.cat(parts, 1) for parts in zip(*batches, strict=True))
    )
    for name, stats in monitor.statistics().items():
        assert stats.samples == 8
        assert_stats(stats, values_of(together[name]), atol=1e-5)
    alone = MPPDMonitor(net).compare(*pair)["8"]
    assert_close(monitor.compare(*pair)["8"].ms_mppd, alone.ms_mppd)
    assert monitor.compare(*images(n=0))["8"].samples == 0


def live_tensors():
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return len(tensors)


def take_batches(count, net, monitor, use):
    for seed in range(count):
        pair = images(seed)
        if use == "compare":
            monitor.compare(*pair)
            continue
        with torch.set_grad_enabled(use == "training"):
            run_pair(monitor, net, *pair)
        if use == "training":
            monitor.loss(layers="all", retain=False).backward()
        functional.reset_net(net)


@pytest.mark.parametrize("use", ["compare", "contexts", "training"])
def test_memory_does_not_grow_with_batches(net, monitor, use):
    take_batches(2, net, monitor, use)
    tensors = live_tensors()
    take_batches(4, net, monitor, use)
    assert live_tensors() <= tensors  # other tests' may go meanwhile


@pytest.mark.parametrize("end", ["retain", "clear", "close", "next", "exception"])
def test_no_graph_stays(net, pair, end):
    currents = []
    handle = net[8].register_forward_pre_hook(
        lambda module, inputs: currents.append(weakref.ref(inputs[0]))
    )
    monitor = MPPDMonitor(net, keep="trace")
    run_pair(monitor, net, *pair)
    handle.remove()
    functional.reset_net(net)
    assert currents[1]() is not None
    if end == "retain":
        monitor.loss(retain=False)
    elif end == "clear":
        monitor.clear_recorded_data()
    elif end == "close":
        monitor.close()
    elif end == "next":
        with monitor.clean():
            net(pair[0])
    else:
        failing = net[9].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), monitor.clean():
            net(pair[0])
        failing.remove()
        functional.reset_net(net)
    gc.collect()
    assert [current() for current in currents] == [None, None]


def train_once(net, x):
    functional.reset_net(net)
    net.zero_grad()
    out = net(x)
    nn.functional.cross_entropy(out.mean(0), torch.arange(3)).backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ["LIF", "PLIF", "DLIF"])
def test_outputs_and_gradients_of_the_network_are_unchanged(kind, pair):
    plain, watched = conv_net(kind), conv_net(kind)
    monitor = MPPDMonitor(watched, keep="trace")
    for run, x in zip((monitor.clean, monitor.perturbed), pair, strict=True):
        with run():
            found = train_once(watched, x)
        assert_close(found, train_once(plain, x), rtol=0, atol=0)
        assert len(found) > 8


def leave(monitor):
    with monitor:
        pass


def leave_by_an_exception(monitor):
    with pytest.raises(ZeroDivisionError), monitor:
        1 / 0  # noqa: B018  # any exception


@pytest.mark.parametrize(
    "end", [MPPDMonitor.close, MPPDMonitor.remove_hooks, leave, leave_by_an_exception, None]
)
def test_hooks_go_with_the_monitor(end, net):
    monitor = MPPDMonitor(net)
    assert net[2]._forward_hooks
    assert net[2]._forward_pre_hooks
    if end is None:
        del monitor
    else:
        end(monitor)
    with unchanged(net):
        pass


@pytest.mark.parametrize("where", [1, 2, None])
def test_compare_leaves_the_network_and_the_monitor_as_they_were(net, pair, monitor, where):
    net[6].eval()
    monitor.disable()
    calls = []

    def forward(x):
        calls.append(net(x).shape)
        if len(calls) == where:
            raise KeyboardInterrupt

    with unchanged(net, hooked=[net[2], net[4], net[8]]):
        if where is None:
            monitor.compare(*pair)
        else:
            with pytest.raises(KeyboardInterrupt):
                monitor.compare(*pair, forward=forward)
            assert monitor.statistics() == {}
    assert not monitor.is_enable()
    with pytest.raises(RuntimeError, match="two complete runs"):
        monitor.loss()


def test_it_is_used_as_a_spikingjelly_monitor(net, pair, monitor):
    assert monitor.monitored_layers == list(NAMES)
    assert monitor.is_enable()
    assert monitor["2"] == []
    monitor.compare(*pair)
    monitor.compare(*pair)
    (record,) = monitor["4"]
    assert record.samples == 6
    assert [monitor[i].name for i in range(3)] == list(NAMES)
    monitor.disable()
    run_pair(monitor, net, *pair)
    monitor.enable()
    functional.reset_net(net)
    net(pair[0])  # outside the contexts nothing is recorded
    assert monitor["4"][0].samples == 6
    monitor.clear_recorded_data()
    assert monitor["4"] == []
    assert monitor.statistics() == {}
    with pytest.raises(KeyError, match="'3'"):
        monitor["3"]


def test_stats_can_be_read_and_saved(monitor, pair):
    stats = monitor.compare(*pair)["8"]
    saved = json.loads(json.dumps(stats.to_dict()))
    assert saved["per_step"]["ms_mppd"] == stats.ms_mppd.tolist()
    summary = saved.pop("summary")
    assert summary["ms_mppd"] == pytest.approx(float(stats.ms_mppd.mean()))
    assert summary["max_abs"] == float(stats.max_abs.max())
    assert summary["tasad"] == float(stats.tasad[-1])
    del saved["per_step"]
    assert saved == {"name": "8", "neuron": "LIFNode", "samples": 3, "T": 4}


def test_copies_of_a_watched_network_are_free(net, pair):
    x, x_perturbed = pair
    monitor = MPPDMonitor(net)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(net), torch.load(buffer, weights_only=False)]
    with monitor.clean():
        net(x)
        for twin in copies:
            twin(x_perturbed)
    functional.reset_net(net)
    with monitor.perturbed():
        net(x_perturbed)
    assert monitor.statistics()["2"].samples == 3
    alive = weakref.ref(monitor)
    del monitor
    assert alive() is None


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
