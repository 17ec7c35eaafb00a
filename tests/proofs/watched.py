"""Runs on bounds that keep those of every value, to hold the network against them at points."""

import torch
from torch import nn

from sj_robust.core.host import functional
from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.joint import JointRun
from sj_robust.proofs.neurons import counts
from sj_robust.proofs.program import plain
from sj_robust.proofs.rounding import FLOAT64_GAP
from sj_robust.proofs.rules import moved
from sj_robust.proofs.values import Bounds, interval, rule_of


class WatchedRun(BoundedRun):
    """Keeps bounds of every value that the program computes, and of the potentials."""

    def __init__(self, *args, **given):
        super().__init__(*args, **given)
        self.seen = []

    def apply(self, operation, args, kwargs):
        found = super().apply(operation, args, kwargs)
        func = operation.func
        values = []
        if isinstance(func, nn.Module | Neuron) or rule_of(func) is not moved:
            parts = found if isinstance(found, tuple | list) else (found,)
            values = [interval(part) if isinstance(part, Bounds) else None for part in parts]
        potential = self.potential(func) if isinstance(func, Neuron) else None
        self.seen.append((values, potential))
        return found

    def potential(self, neuron):
        return self._spiking(neuron).reset(*self.layers[neuron.name].last_step)


class WatchedJointRun(WatchedRun, JointRun):
    """The same of bounds that hold together over time."""

    def potential(self, neuron):
        steps = self.memories[neuron.name].steps
        return steps[-1].v if steps else super().potential(neuron)

    def check_sums(self, neuron, spikes):
        """Counts and random sums over time of a layer's spikes [T, N, *] are within bounds."""
        if counts(neuron) is not None:
            return
        generator = torch.Generator().manual_seed(len(spikes))
        weights = torch.randn(4, len(spikes), generator=generator, dtype=torch.float64)
        weights[0] = 1.0
        bounds = self.memories[neuron.name].trains.bounds(weights)
        sums = weights @ spikes.double().flatten(1)
        wider = bounds.widened(FLOAT64_GAP * len(spikes))
        assert wider.holds(sums.view(bounds.low.shape)), f"a sum over time of {neuron.name}"


def check_point(model, run, logits, point):
    """Logits of the network at a point of the ball; all that runs must be within bounds."""
    expected = iter(run.seen)
    fired = {}

    def apply(operation, args, kwargs):
        found = plain(operation, args, kwargs)
        func = operation.func
        if isinstance(func, Neuron):
            steps = found if func.module.step_mode == "m" else found.unsqueeze(0)
            fired.setdefault(func.name, (func, []))[1].append(steps)
        values, potential = next(expected)
        parts = found if isinstance(found, tuple | list) else (found,)
        for value, part in zip(values, parts, strict=False):
            assert value is None or value.holds(part), f"a value of {operation}"
        assert potential is None or potential.holds(func.module.v), f"a potential of {func.name}"
        return found

    with torch.no_grad():
        found = model(point.clone())
        functional.reset_net(model.net)
        assert torch.equal(found, run.program.run(point.clone(), apply)), "another program"
        functional.reset_net(model.net)
    assert interval(logits).holds(found), "a logit"
    for neuron, parts in fired.values():
        if isinstance(run, WatchedJointRun):
            run.check_sums(neuron, torch.cat(parts))
    return found
