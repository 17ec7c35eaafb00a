"""The monitor's statistics against numpy, and what it must leave alone."""

import copy
import gc
import io
import json
import weakref

import numpy as np
import pytest
import torch
from perturbation.by_hand import assert_stats, captured_pair, eps_by_hand, statistics_by_hand
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
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.monitor import BaseMonitor
from torch import nn
from unchanged import unchanged

from sj_robust.neuron import DLIFNode
from sj_robust.perturbation import LayerStats, LayerTrace, MPPDMonitor

NAMES = ("2", "4", "8")


@pytest.mark.parametrize("kind", NEURONS)
def test_statistics_and_traces_equal_numpy(kind, pair):
    make, decay, gain, v_reset = NEURONS[kind]
    gains = list(gain) if isinstance(gain, tuple) else [gain] * T
    net = conv_net(make)
    with MPPDMonitor(net, keep="trace") as monitor, MPPDMonitor(net, input_gain=False) as without:
        stats, stats_without = monitor.compare(*pair), without.compare(*pair)
    assert list(stats) == list(NAMES)
    seen = captured_pair(net.eval(), NAMES, *pair)
    potentials = []
    for a in pair:
        for name in NAMES:
            net[int(name)].store_v_seq = True
        net(a)
        potentials.append({name: net[int(name)].v_seq.detach().clone() for name in NAMES})
        functional.reset_net(net)
    options = {"v_threshold": net[2].v_threshold, "v_reset": v_reset}
    for name in NAMES:
        assert (stats[name].samples, stats[name].neuron) == (3, type(net[2]).__name__)
        both = seen[name]
        assert_stats(stats[name], statistics_by_hand(*both, decay, gains, **options))
        fixed = [1.0] * T if kind == "DLIF" else gains  # the learnable gain can be left out
        of_eps = statistics_by_hand(*both, decay, fixed, **options)
        assert_stats(
            stats_without[name], {key: of_eps[key] for key in ("ms_mppd", "l1", "max_abs")}
        )
        (trace,) = monitor[name]
        assert isinstance(trace, LayerTrace)
        kept = trace.x_seq, trace.spike_seq, trace.x_seq_perturbed, trace.spike_seq_perturbed
        for value, expected in zip(kept, both, strict=True):
            np.testing.assert_array_equal(value, expected)
        np.testing.assert_allclose(
            trace.eps, eps_by_hand(both[0], both[2], decay, gains), atol=1e-5
        )
        assert not trace.eps.requires_grad
        torch.testing.assert_close(trace.v_seq, potentials[0][name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(trace.v_seq_perturbed, potentials[1][name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            trace.full, potentials[0][name] - potentials[1][name], atol=2e-5, rtol=1e-5
        )
    assert 0 < stats["8"].summary()["spike_distance"] < 1
    if kind == "DLIF":
        assert not torch.allclose(stats["8"].max_abs, stats_without["8"].max_abs)
    monitor.clear_recorded_data()
    assert monitor["8"] == []


def test_hand_made_recurrent_container():
    net = recurrent_net().eval()
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.rand(T, 4, 5, generator=generator)
    x_perturbed = x + torch.randn(x.shape, generator=generator)
    monitor = MPPDMonitor(net)
    stats = monitor.compare(x, x_perturbed)
    assert monitor.execution_order == ("1", "2.sn", "3.sub_module", "5")
    seen = captured_pair(net, list(stats), x, x_perturbed)
    of_if = (1.0, 1.0, 0.5)
    dynamics = {"1": (0.5, 0.5, 0.5), "2.sn": (0.5, 1.0, 1.0), "3.sub_module": of_if, "5": of_if}
    for name, (decay, gain, threshold) in dynamics.items():
        assert_stats(
            stats[name], statistics_by_hand(*seen[name], decay, [gain] * T, v_threshold=threshold)
        )
        assert stats[name].summary()["spike_distance"] > 0


def values_of(stats):
    return {key: value.numpy() for key, value in stats._tensors().items()}


@pytest.mark.parametrize("kind", ["LIF", "LIF reset -0.2", "PLIF", "DLIF"])
def test_every_way_of_running_gives_the_same_statistics(kind, pair):
    net = conv_net(NEURONS[kind][0]).eval()
    monitor = MPPDMonitor(net)
    whole = monitor.compare(*pair)
    others = [monitor.compare(*pair, forward=in_chunks(net))]
    for step_mode, run in (("m", net), ("s", in_steps(net))):
        functional.set_step_mode(net, step_mode)
        others.append(monitor.compare(*pair, forward=run))
        monitor.clear_recorded_data()
        run_pair(monitor, net, *pair, "paired", run=run)
        others.append(monitor.statistics())
    for other in others:
        for name in NAMES:
            assert other[name].samples == 3
            assert_stats(other[name], values_of(whole[name]), atol=1e-5)


@pytest.mark.parametrize("kind", ["LIF", "DLIF"])
def test_runs_that_go_on_from_a_state_start_at_it(kind, pair):
    make, decay, gain, v_reset = NEURONS[kind]
    net = conv_net(make).eval()
    monitor = MPPDMonitor(net, keep="trace")

    def start(copies):
        functional.reset_net(net)
        generator = torch.Generator().manual_seed(3)
        for name, shape in zip(NAMES, [(3, 4, 6, 6), (3, 4, 6, 6), (3, 8)], strict=True):
            net[int(name)].v = torch.cat([torch.rand(shape, generator=generator)] * copies)

    with torch.no_grad():
        for run, x in zip((monitor.clean(), monitor.perturbed()), pair, strict=True):
            start(copies=1)
            with run:
                net(x)
        start(copies=2)
        with monitor.paired():
            net(torch.cat(pair, dim=1))
        start(copies=1)
    for name in NAMES:
        v = net[int(name)].v.clone()
        apart, together = monitor[name]
        for trace in (apart, together):
            h = decay * v + (gain[0] if kind == "DLIF" else gain) * trace.x_seq[0]
            torch.testing.assert_close(
                trace.v_seq[0], torch.where(trace.spike_seq[0] == 1, v_reset or 0.0, h)
            )
        torch.testing.assert_close(together.v_seq, apart.v_seq, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            together.v_seq_perturbed, apart.v_seq_perturbed, atol=1e-5, rtol=1e-5
        )
    functional.reset_net(net)


def test_statistics_of_many_pairs_are_those_of_one_large_batch(net, monitor):
    pairs = [images(seed, n) for seed, n in ((1, 3), (2, 1), (3, 4))]
    for pair in pairs:
        monitor.compare(*pair)
    together = MPPDMonitor(net).compare(*(torch.cat(a, dim=1) for a in zip(*pairs, strict=True)))
    for name, stats in monitor.statistics().items():
        assert stats.samples == 8
        assert_stats(stats, values_of(together[name]), atol=1e-5)
    alone = MPPDMonitor(net).compare(*pairs[-1])
    assert_stats(monitor.compare(*pairs[-1])["8"], {"ms_mppd": alone["8"].ms_mppd.numpy()})


def live_tensors():
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("use", ["compare", "contexts", "training"])
def test_memory_does_not_grow_with_batches(net, monitor, use):
    def batch(seed):
        pair = images(seed, n=16)
        if use == "compare":
            monitor.compare(*pair)
            return
        with torch.set_grad_enabled(use == "training"):
            run_pair(monitor, net, *pair)
        if use == "training":
            monitor.loss(layers="all", retain=False).backward()
        functional.reset_net(net)

    for seed in range(2):
        batch(seed)
    tensors = live_tensors()
    held = sum(storage_bytes(monitor))
    for seed in range(6):
        batch(seed)
    assert live_tensors() <= tensors  # other tests' may go meanwhile
    assert sum(storage_bytes(monitor)) == held
    # Far less than the input current of one layer, 4 steps of 16 samples of 4 x 6 x 6 in float32.
    assert held < T * 16 * 144 * 4 / 2


def test_a_state_from_before_the_pair_does_not_stay(net, monitor):
    net.eval()
    x, x_perturbed = images(n=16)
    with torch.no_grad():
        net(x)
        states = {name: net[int(name)].v.clone() for name in NAMES}
        with monitor.clean():
            net(x)
        for name, v in states.items():
            net[int(name)].v = v
        with monitor.perturbed():
            net(x_perturbed)
    functional.reset_net(net)
    # Less than the potential of one layer before the pair, 16 samples of 4 x 6 x 6 in float32.
    assert sum(storage_bytes(monitor)) < 16 * 144 * 4


def train_once(net, x):
    functional.reset_net(net)
    net.zero_grad()
    out = net(x)
    nn.functional.cross_entropy(out.mean(0), torch.tensor([0, 1, 2])).backward()
    return out.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["LIF", "PLIF", "DLIF"])
def test_outputs_and_gradients_of_the_network_are_unchanged(kind, pair):
    plain, watched = (conv_net(NEURONS[kind][0]) for _ in range(2))
    runs = [train_once(plain, x) for x in pair]
    monitor = MPPDMonitor(watched, keep="trace")
    with monitor.clean():
        seen = [train_once(watched, pair[0])]
    with monitor.perturbed():
        seen.append(train_once(watched, pair[1]))
    for (out, grads), (out_seen, grads_seen) in zip(runs, seen, strict=True):
        assert torch.equal(out, out_seen)
        assert len(grads) == len(grads_seen) >= 8
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_seen, strict=True))


def hook_count(net):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs)
        for m in net.modules()
    )


def test_hooks_go_with_close_with_exit_and_with_the_monitor(net):
    for end in (
        MPPDMonitor.close,
        MPPDMonitor.remove_hooks,
        lambda monitor: monitor.__exit__(None, None, None),
        None,
    ):
        monitor = MPPDMonitor(net)
        assert hook_count(net) > 0
        if end is None:
            del monitor
        else:
            end(monitor)
        assert hook_count(net) == 0
    with pytest.raises(ZeroDivisionError), MPPDMonitor(net):
        1 / 0  # noqa: B018  # any exception
    assert hook_count(net) == 0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["clean", "perturbed"])
def test_an_exception_leaves_nothing_behind(net, pair, monitor, where):
    net[3].eval()
    modes = [m.training for m in net.modules()]
    monitor.disable()
    calls = []

    def forward(a):
        calls.append(a)
        net(a)
        if len(calls) == (1 if where == "clean" else 2):
            raise KeyboardInterrupt

    before = live_tensors()
    with pytest.raises(KeyboardInterrupt):
        monitor.compare(*pair, forward=forward)
    calls.clear()
    assert live_tensors() == before
    assert [m.training for m in net.modules()] == modes
    assert not monitor.is_enable()
    assert monitor.statistics() == {}
    assert isinstance(net[2].v, float)
    monitor.enable()
    with pytest.raises(RuntimeError, match="two complete runs"):
        monitor.loss()
    seen = captured_pair(net.eval(), ("8",), *pair)["8"]
    assert_stats(monitor.compare(*pair)["8"], statistics_by_hand(*seen, 0.75, [1.0] * T))


def test_compare_leaves_the_network_as_it_was(net, pair, monitor):
    net[6].eval()
    with unchanged(net, hooked=[net[int(name)] for name in NAMES]):
        monitor.compare(*pair)


def test_it_is_a_spikingjelly_monitor(net, pair, monitor):
    assert isinstance(monitor, BaseMonitor)
    assert monitor.monitored_layers == list(NAMES)
    assert monitor.is_enable()
    assert monitor["2"] == []
    monitor.compare(*pair)
    monitor.compare(*pair)
    (record,) = monitor["4"]
    assert isinstance(record, LayerStats)
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
    with pytest.raises(KeyError, match="no monitored layer '3'"):
        monitor["3"]


def test_stats_can_be_read_and_saved(monitor, pair):
    stats = monitor.compare(*pair)["8"]
    assert repr(stats).startswith("LayerStats('8', LIFNode, T=4, samples=3: firing_rate 0.")
    saved = json.loads(json.dumps(stats.to_dict()))
    assert saved["per_step"]["ms_mppd"] == stats.ms_mppd.tolist()
    assert saved["summary"]["ms_mppd"] == pytest.approx(float(stats.ms_mppd.mean()))
    assert saved["summary"]["max_abs"] == float(stats.max_abs.max())
    assert saved["summary"]["tasad"] == float(stats.tasad[-1])
    assert (saved["name"], saved["neuron"], saved["T"], saved["samples"]) == ("8", "LIFNode", 4, 3)


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
    x, x_perturbed = 3 * torch.rand(2, T, 5, 4)
    monitor = MPPDMonitor(net)
    stats = monitor.compare(x, x_perturbed, forward=in_steps(net))
    assert monitor.monitored_layers == ["sn"]
    assert stats["sn"].T == 2 * T
    seen = captured_pair(net, ("sn",), x, x_perturbed, in_steps(net))["sn"]
    assert_stats(stats["sn"], statistics_by_hand(*seen, 0.5, [1.0] * 2 * T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype, pair):
    net = conv_net(lambda: DLIFNode(T=T, tau=4.0)).to(dtype)
    pair = [x.to(dtype) for x in pair]
    stats = MPPDMonitor(net).compare(*pair)["4"]
    assert stats.ms_mppd.dtype == torch.float64
    seen = captured_pair(net.eval(), ("4",), *pair)["4"]
    tolerances = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"atol": 1e-5}
    assert_stats(stats, statistics_by_hand(*seen, 0.75, [1.0] * T), **tolerances)


def test_empty_batch_and_autocast(net, pair):
    assert MPPDMonitor(net).compare(*(x[:, :0] for x in pair))["8"].samples == 0
    with torch.autocast("cpu", torch.bfloat16):
        stats = MPPDMonitor(net).compare(*pair)
    exact = MPPDMonitor(net).compare(*pair)
    assert stats["2"].summary()["ms_mppd"] == pytest.approx(
        exact["2"].summary()["ms_mppd"], rel=0.05
    )


@pytest.mark.slow
def test_compiled_network(net, pair, monitor):
    expected = monitor.compare(*pair)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager")
    stats = monitor.compare(*pair, forward=compiled)
    for name in NAMES:
        assert_stats(
            stats[name],
            {"ms_mppd": expected[name].ms_mppd.numpy(), "tasad": expected[name].tasad.numpy()},
        )
    torch.compiler.reset()


def test_neurons_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.sn = neuron.IFNode()

        def forward(self, x):
            return self.sn(x=x)

    net = Keyword()
    x, x_perturbed = torch.rand(2, 2, 3)
    stats = MPPDMonitor(net).compare(x, x_perturbed, forward=lambda x: [net(x) for _ in range(2)])
    shift = float((x - x_perturbed).double().square().mean())
    assert stats["sn"].ms_mppd.tolist() == pytest.approx([shift, 4 * shift], rel=1e-5)


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
