"""No map that differs between time steps, samples or batches is taken for one that does not,
however large the weights beside it; and loops over single steps have the bounds of sequences.
"""

import pytest
import torch
from proofs.formulas import formula
from spikingjelly.activation_based import neuron
from torch import nn
from torch.testing import assert_close

from sj_robust.core.threat import linf_bounds
from sj_robust.proofs import verify

T = 3
STEPS = torch.arange(1.0, T + 1).view(T, 1, 1)
CLASSES = torch.tensor([0.0, 1.0, -1.0, 0.3])


def uncounted(net, s, x):
    with torch.no_grad():
        return net.branch(s) * STEPS


def joined(*parts):
    return torch.stack(parts).sum(0)


def of_batch(x):
    return x.sum(1, keepdim=True).expand(x.shape)


ATTACKS = {
    "weights of steps": lambda net, s, x: s * STEPS,
    "the last step": lambda net, s, x: torch.cat([0 * s[:-1], 3 * s[-1:]]),
    "shifts of steps": lambda net, s, x: s + STEPS * CLASSES,
    "order": lambda net, s, x: s + 2 * s.flip(0) * STEPS,
    "the step before": lambda net, s, x: torch.cat([s[-1:], s[:-1]]) - s,
    "another layer of a step": lambda net, s, x: torch.stack([net.branch(s[0]), *s[1:]]),
    "another bias of a step": lambda net, s, x: torch.stack([*s[:-1], s[-1] + 0.4 * CLASSES]),
    "no graph": uncounted,
    "detached": lambda net, s, x: s - 2 * (s * STEPS).detach(),
    "the image": lambda net, s, x: s + STEPS * net.fc(x),
    "a sum without a step": lambda net, s, x: (s[0] + s[1]).expand(s.shape),
    "a sum with a step twice": lambda net, s, x: (s[0] + s[1] + s[1]).expand(s.shape),
    "a sum of other steps in a part": lambda net, s, x: (
        s[0] + torch.cat([s[1, :, :2], s[2, :, 2:]], -1) + s[2]
    ).expand(s.shape),
    "a difference of steps": lambda net, s, x: (s[0] - s[1] + s[2]).expand(s.shape),
    "a mean and a step": lambda net, s, x: s.mean(0, keepdim=True) * STEPS - s,
    "a product of steps": lambda net, s, x: s * s.flip(0),
    "the largest step": lambda net, s, x: s.amax(0, keepdim=True).expand(s.shape),
    "pixels as steps": lambda net, s, x: s.permute(2, 1, 0)[:T].repeat(1, 1, 2)[..., :4],
    "in place": lambda net, s, x: s.clone().mul_(STEPS),
    "a view": lambda net, s, x: (s * 1.0)[1].add_(CLASSES).expand(s.shape),
    "samples as steps": lambda net, s, x: s.reshape(-1, T, 4).transpose(0, 1).reshape(s.shape),
    "mean of samples": lambda net, s, x: s + of_batch(s) / s.shape[1],
    "order of samples": lambda net, s, x: s - s.flip(1),
    "number of samples": lambda net, s, x: s / s.shape[1] - 0.3 * s,
    "the first sample": lambda net, s, x: s - s[:, :1],
    "weights of samples": lambda net, s, x: s * torch.arange(s.shape[1]).view(1, -1, 1),
}
"""By name a value [T, N, 4] from spikes and images."""
TRIED = [("ibp", 1e20), ("joint", 1e8), ("joint", 1e14), ("mip", 1e12)]


def beside_a_weight(attack, size, *, behind):
    """Logits, or the current of another layer, beside a weight of a spike that never comes."""

    def forward(net, x):
        found = attack(net, net.node(net.fc(x)), x)
        never = net.never(net.fc(x)).sum(-1, keepdim=True)
        found = found + size * never
        return net.out(net.last(found)) if behind else found

    parts = {"fc": nn.Linear(2, 4), "branch": nn.Linear(4, 4), "out": nn.Linear(4, 4)}
    for part in parts.values():
        nn.init.normal_(part.weight, 0.3, 2.0)
    nodes = {name: neuron.IFNode(step_mode="m") for name in ("node", "last")}
    nodes["never"] = neuron.IFNode(step_mode="m", v_threshold=1e6)
    return formula(forward, T=T, **parts, **nodes)


def least_leads(model, x, y, eps, *, points=150):
    """What the right class leads by at points of the ball of each image at least."""
    low, high = linf_bounds(x, eps=eps)
    share = torch.rand(points, 1, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    share[::2] = share[::2].round()
    drawn = (low + share * (high - low)).clamp(low, high)
    with torch.no_grad():
        found = model(drawn.flatten(0, 1)).double().unflatten(0, (points, len(x)))
    right = y.view(1, -1, 1).expand(points, -1, -1)
    lead = found.gather(2, right) - found.scatter(2, right, -torch.inf).amax(2, keepdim=True)
    return lead.amin(0).squeeze(1)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_large_weight_hides_what_depends_on_steps_or_samples(name, behind):
    x = torch.rand(3, 2, generator=torch.Generator().manual_seed(2))
    refused = ""
    for seed, (method, size) in enumerate(TRIED[:-1] if behind else TRIED):
        torch.manual_seed(seed)
        model = beside_a_weight(ATTACKS[name], size, behind=behind)
        y = model(x).argmax(1)
        try:
            result = verify(model, x, y, 0.1, method=method)
        except NotImplementedError as error:
            refused = str(error)
            break
        margin = torch.tensor(result.margin, dtype=torch.float64)
        assert (least_leads(model, x, y, 0.1) >= margin).all()
    assert not refused or "sample" in name or "no program" in refused


@pytest.mark.parametrize("name", [name for name in ATTACKS if name.startswith("a sum")])
def test_a_sum_that_is_not_of_all_steps_is_no_count(name):
    torch.manual_seed(0)
    model = beside_a_weight(ATTACKS[name], 1.0, behind=False)
    x = torch.rand(3, 2)
    told = verify(model, x, torch.zeros(3, dtype=torch.int64), 0.1).stepwise
    assert any("no map of counts" in one for one in told)


def steps_of(net, x):
    """The same as for a sequence, step by step."""
    return [net.last(net.second(net.node(net.first(step)))) for step in x]


def running(net, x):
    total = 0.0
    for step in steps_of(net, x):
        total = total + net.out(step)
    return total / len(x)


LOOPS = {
    "a list": lambda net, x: torch.stack([net.out(step) for step in steps_of(net, x)]),
    "a mean of spikes": lambda net, x: net.out(torch.stack(steps_of(net, x)).mean(0)),
    "a running sum": running,
    "a sum": lambda net, x: sum(map(net.out, steps_of(net, x))) / len(x),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_over_single_steps_is_bounded_as_the_sequence_is(loop):
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    found = []
    for forward, mode in (
        (lambda net, x: net.out(net.last(net.second(net.node(net.first(x))))), "m"),
        (LOOPS[loop], "s"),
    ):
        torch.manual_seed(0)
        parts = {name: nn.Linear(3, 3) for name in ("first", "second", "out")}
        for part in parts.values():
            part.weight.data.mul_(3)
        nodes = {name: neuron.LIFNode(step_mode=mode) for name in ("node", "last")}
        model = formula(forward, T=T, **parts, **nodes)
        result = verify(model, x, model(x).argmax(1), 0.03)
        assert result.stepwise == ()
        found.append(torch.tensor(result.margin))
    assert_close(found[0], found[1])
