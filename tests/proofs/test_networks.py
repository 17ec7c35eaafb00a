"""Networks of which something false was proved once, or could be: nothing false is proved of any,
by any method, and what has no bounds is refused.
"""

import contextlib
import copy
import itertools
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from covering import each_in_turn
from proofs.formulas import Formula, count_proofs, formula, linear
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as F

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import PoissonEncoder
from sj_robust.core.host import lif_multi_step
from sj_robust.evaluation import evaluate
from sj_robust.proofs import neurons, verify
from sj_robust.proofs.bounds import BoundedRun, bounded_logits, bounded_neurons

METHODS = ("ibp", "joint", "mip")
T = 4
MASK = torch.tensor([0.0, 0.0, -1e9])
"""Added to the logits: a class that is never seen."""


def fires(threshold=1.0):
    return neuron.IFNode(step_mode="m", v_threshold=threshold)


def three(forward, *, T=1, node=None, width=3, **parts):
    """Two maps of three values around a neuron."""
    torch.manual_seed(0)
    parts = {"fc": nn.Linear(3, width), "out": nn.Linear(3, 3)} | parts
    return formula(forward, T=T, node=node or fires(), **parts)


def spikes(net, x):
    return net.node(net.fc(x))


def logits(net, x):
    return net.out(spikes(net, x))


def last_step(mask):
    """The spikes of the last step, not their number, decide; a class may be masked."""
    return formula(
        lambda net, x: logits(net, x)[-1] + mask * MASK,
        T=4,
        fc=linear([[-0.5, -0.5]], [0.61]),
        node=fires(),
        out=linear([[1.0], [0.0], [0.0]], [0.0, 0.1, 0.0]),
    )


def unseen_by_autograd(net, x):
    found = spikes(net, x)
    with torch.no_grad():
        frozen = net.prior(found)
    return net.out(found) + frozen + MASK


def added_in_place(net, x):
    found = spikes(net, x)
    found += 0.5 * x
    return net.out(found)


def step_before(net, x):
    found = spikes(net, x)
    before = torch.cat([torch.zeros_like(found[:1]), found[:-1]])
    return torch.relu(net.out(before + found))


def empty_parts(net, x):
    found = spikes(net, x)
    again = torch.cat([found[:-1], found[-1:]])
    beside = torch.cat([found[..., :0], again, torch.zeros_like(found[..., :0])], -1)
    return torch.relu(net.out(beside + found))


def beside_a_constant(net, x):
    found = spikes(net, x)
    return net.out(torch.cat([found, torch.full_like(found[..., :1], -1e9)], -1))


def compared(net, x):
    first = (x[..., :2] >= 0.5).to(x.dtype)
    second = x[..., 2:] >= 0.5
    chosen = torch.where(second, first, 1.0)
    numbers = first + second.float() * torch.ones(2).type_as(x) + second * 0.5
    return numbers + chosen + net.relu(x[..., :2])


def one_number(net, x):
    rectified = net.relu(x[..., 0])
    return torch.stack([rectified, 0.3 + 0 * rectified], -1)


def soft(threshold):
    return formula(
        lambda net, x: net.out(net.node(net.function(2 * x.sum(-1, keepdim=True)))),
        function=nn.Softplus(1, threshold),
        node=fires(1.2),
        out=linear([[-1.0], [0.0]], [0.5, 0.0]),
    )


def negative_mean(net, x):
    mean = F.avg_pool2d(x.flatten(0, 1), 2, divisor_override=-1)
    return logits_of(net, mean.flatten(1) + 2.5)


def logits_of(net, current):
    return net.out(net.node(current))


def averaged():
    node = neuron.IFNode(step_mode="s")
    return formula(negative_mean, node=node, out=linear([[1.0], [0.0]], [0.0, 0.5]))


C = torch.tensor([0.0, 5.0, 1.0])


def behind(statement, node=None, T=T, **given):
    """A statement on images, and a neuron."""
    model = formula(lambda net, x: net.node(statement(x)), T=T, node=node or fires(), **given)
    model.unused = torch.Generator()  # one that is not drawn from hides no other
    return model


def only_plain(net, x):
    found = spikes(net, x)
    if type(found) is not torch.Tensor:
        raise TypeError("spikes must be a tensor")
    return net.out(found if type(x) is torch.Tensor else x)


def beside_what_is_cut(net, x):
    return logits(net, x) + net.branch(x.detach())


RELU = partial(formula, relu=nn.ReLU())
X = torch.rand(64, 3, generator=torch.Generator().manual_seed(1))
FEW, TWO = X[:4], X[:2]
SUMS = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.15, 0.2]])
NEAR = torch.tensor([[0.3, 0.3], [0.31, 0.29]])
PAIRS = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.9, 0.2, 0.8, 0.1]])
EVEN = torch.full((1, 1, 2, 2), 0.38)
SOME = range(1, 65)
ROWS = {
    "the last step decides": (lambda: last_step(0.0), NEAR, 0.05, [0]),
    "a mask hides it": (lambda: last_step(1.0), NEAR, 0.05, [0]),
    "a mask hides what has no graph": (
        lambda: three(unseen_by_autograd, T=2, prior=nn.Linear(3, 3)),
        X,
        0.1,
        SOME,
    ),
    "a mask": (lambda: three(lambda net, x: logits(net, x) + MASK, T=3), X[:8], 0.01, SOME),
    "added in place": (lambda: three(added_in_place, T=3, node=fires(0.3)), FEW, 0.01, SOME),
    "the step before": (lambda: three(step_before, T=2), TWO, 0.001, SOME),
    "no step before": (lambda: three(step_before), TWO, 0.001, SOME),
    "empty parts, T = 1": (lambda: three(empty_parts), TWO, 0.001, SOME),
    "empty parts, T = 2": (lambda: three(empty_parts, T=2), TWO, 0.001, SOME),
    "a large constant": (
        lambda: three(beside_a_constant, T=2, node=fires(0.3), width=5, out=nn.Linear(6, 3)),
        FEW,
        0.01,
        SOME,
    ),
    "comparisons": (lambda: RELU(compared), PAIRS, 0.05, [2]),
    "one number of a sample": (lambda: RELU(one_number), PAIRS[:, ::3], 0.05, [2]),
    "ReLU in place": (
        lambda: behind(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), fires(0.1)),
        X,
        0.01,
        range(65),
    ),
    "asks for its type": (lambda: three(only_plain, T=2), X, 0.01, SOME),
    "a branch that is cut": (
        lambda: three(beside_what_is_cut, T=2, branch=nn.Linear(3, 3)),
        X,
        0.01,
        SOME,
    ),
    "two levels": (lambda: with_node(fires(0.9), v_reset=0.8), FEW, 0.01, SOME),
    "softplus": (lambda: soft(20.0), SUMS, 0.1, SOME),
    "a negative divisor, far": (averaged, 0.5 * EVEN, 0.02, [1]),
    "a negative divisor, near": (averaged, EVEN, 0.02, [0]),
}
"""By name a network, images, a radius and how many are proved."""
WITHOUT_PROGRAM = {"the step before", "empty parts, T = 1", "empty parts, T = 2", "comparisons"}
WITHOUT_PROGRAM |= {"one number of a sample", "softplus", "ReLU in place", "no step before"}
CASES = [(name, method) for name in ROWS for method in METHODS[:2]]
CASES += [(name, "mip") for name in ROWS if name not in WITHOUT_PROGRAM]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_nothing_false_is_proved(name, method):
    build, x, eps, proofs = ROWS[name]
    assert count_proofs(build(), x[:8] if method == "mip" else x, eps, method=method) in proofs


def pooled(T):
    """Max pooling of one channel, [T * N, 1, H, W]."""
    fc = nn.Linear(4, 4)
    fc.weight.data.mul_(3)
    return formula(
        lambda net, x: logits(net, F.max_pool2d(x.flatten(0, 1), 2).view(T, -1, 4)),
        T=T,
        fc=fc,
        node=fires(0.5),
        out=nn.Linear(4, 3),
    )


def in_one_dimension():
    """A function of [N * values]."""
    return formula(
        lambda net, x: logits(net, x[0].flatten().sigmoid().view(-1, 4)),
        fc=nn.Linear(4, 4),
        node=neuron.IFNode(step_mode="s", v_threshold=0.5),
        out=nn.Linear(4, 3),
    )


def before_a_parallel_neuron():
    """A neuron that multiplies [T, N * values] by a matrix."""
    node = neuron.PSN(T=2)
    node.weight.data.uniform_(-1, 2)
    node.bias.data.uniform_(-1, 1)
    fc = nn.Linear(3, 4)
    fc.weight.data.mul_(4)
    return SpikingClassifier(nn.Sequential(fc, node, nn.Linear(4, 3)), T=2).eval()


SINGLE = [  # some of these seeds were proved falsely
    (partial(pooled, 1), (2, 6, 12, 13), (1, 4, 4), 0.3, "joint"),
    (partial(pooled, 2), (2, 6, 12, 13), (1, 4, 4), 0.3, "mip"),
    (in_one_dimension, (0, 1, 22), (4,), 0.3, "ibp"),
    (in_one_dimension, (0, 1, 22), (4,), 0.3, "joint"),
]
if lif_multi_step is not None:  # PSN has bounds on SpikingJelly 2
    SINGLE.append((before_a_parallel_neuron, (0, 1, 10, 20, 28, 109, 166), (3,), 0.4, "joint"))


@pytest.mark.parametrize(("network", "seeds", "shape", "largest", "method"), SINGLE)
def test_a_single_sample_lies_where_those_of_a_batch_do(network, seeds, shape, largest, method):
    proofs = 0
    for seed in seeds:
        torch.manual_seed(seed)
        model = network()
        x = torch.rand(1, *shape)
        eps = largest * float(torch.rand(()))
        proofs += count_proofs(model, x, eps, method=method, time_limit=5.0)
    assert proofs > 0


def mixing(net, x):
    found = logits(net, x)
    return found + 0.2 * found.mean(1, keepdim=True) + MASK


def mixing_beside_large_weights(net, x):
    found = spikes(net, x)
    mixed = net.out(found)
    mixed = mixed + 0.4 * mixed.mean(1, keepdim=True)
    return torch.cat([mixed, -1e12 * (1 + found.sum(-1, keepdim=True))], -1)


def reads_a_potential(net, x):
    """Logits from the potential that the neuron is left with."""
    spikes(net, x)
    return net.out(net.node.v)


BOTH = {
    "sum": lambda a, b: a + b,
    "in place": lambda a, b: a.clone().__iadd__(b),
    "product": lambda a, b: a * b + (a * b),
    "views": lambda a, b: a.view(a.shape) + torch.stack([b]).squeeze(0),
    "choice": lambda a, b: torch.where(a, a, b),
    "largest": lambda a, b: torch.maximum(a, b),
    "device": lambda a, b: a.to(a.device) + b.to(b.device),
    "own dtype": lambda a, b: a.to(a.dtype) + b.to(b.dtype),
    "like itself": lambda a, b: a.to(a) + b.to(b),
    "own type": lambda a, b: a.type_as(a) + b.type_as(b),
}
"""True and True are not two."""


def of_truths(both, net, x):
    return both(x >= 0.5, x >= 0.4).to(x.dtype) + net.relu(x)


def beside(way):
    """A branch beside spikes, in some way."""
    branch = linear([[0.5, -0.3, 0.2]] * 3, [0.1, 0.2, 0.3])
    return three(lambda net, x: logits(net, x) + way(net.branch, x), T=2, branch=branch)


def caught(use):
    """A branch that is lost where a use of it raises an error, as it does on bounds alone."""

    def way(part, x):
        found = part(x)
        try:
            use(found)
        except Exception:
            return 0 * found
        return found

    return way


LEAVING = {
    "data": lambda part, x: part(x.data),
    "numpy": lambda part, x: torch.from_numpy(part(x).detach().numpy()),
    "caught numpy": caught(lambda x: x.detach().numpy()),
    "caught tolist": caught(lambda x: x.tolist()),
    "caught number": caught(lambda x: float(x.sum())),
    "caught truth": caught(lambda x: bool((x > 0).all())),
    "caught storage": caught(lambda x: x.untyped_storage()),
}
"""Ways out of torch."""


def caught_potential(net, x):
    found = logits(net, x)
    try:
        return found + net.node.v.sum()
    except NotImplementedError:
        return found


def batch_statistics(x):
    return F.batch_norm(x.flatten(0, 1), None, None, training=True).view(x.shape)


STATEMENTS = {
    "out=": (lambda x: torch.mul(x, C, out=x * 1.0), "by keyword"),
    "data": (lambda x: x + x.data, "the operation data"),
    "alpha": (lambda x: torch.add(x, C, alpha=2), "a sum with alpha"),
    "out": (lambda x: torch.neg(x, out=None), "the operation neg as it is called here"),
    "a sum's dtype": (lambda x: x.unsqueeze(-1).sum(-1, dtype=torch.half), "torch.float16"),
    "bfloat16": (lambda x: x.to(torch.zeros(1).bfloat16()).float(), "torch.bfloat16"),
    "type_as": (lambda x: x.type_as(torch.zeros(1).half()).float(), "torch.float16"),
    "number": (lambda x: x * float(x.sum()), "a number that depends on the input"),
    "one class": (lambda x: x[..., :1], "at least 2 classes"),
    "random": (lambda x: x + 0 * torch.rand(x.shape), "draws random numbers inside"),
    "batch": (batch_statistics, "the statistics of the batch"),
    "mean": (lambda x: x - x.mean(1, keepdim=True), "samples"),
    "number of samples": (lambda x: x / x.shape[1], "samples"),
    "order of samples": (lambda x: x.flip(1), "samples"),
    "weights of samples": (lambda x: x * torch.arange(x.shape[1]).view(1, -1, 1), "samples"),
    "shifts of samples": (lambda x: x + torch.arange(x.shape[1]).view(1, -1, 1), "samples"),
    "product of samples": (lambda x: x @ x.transpose(-1, -2), "samples"),
}


def held(part):
    """A part of a network before a neuron."""
    return formula(lambda net, x: net.node(net.part(x)), T=T, node=fires(), part=part)


class BatchFirst(nn.Module):
    """A max pooling of frames of one sample after the other."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool1d(1)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.pool(x.flatten(0, 1)).view(x.shape).transpose(0, 1)


class AlwaysTraining(nn.Linear):
    def train(self, mode=True):
        return super().train()


def sets_v(net, x):
    net.node.v = x[0] + 0.4
    return net.node(x)


def with_node(node, **attributes):
    """A network whose neuron has other attributes than it was built with."""
    vars(node).update(attributes)
    return three(logits, node=node)


def weights_of(value):
    model = three(logits)
    model.net.fc.weight.data.fill_(value)
    return model


class TwoLevels(surrogate.ATan):
    """No step: 2 from 0.5 on."""

    @staticmethod
    def spiking_function(x, alpha):
        return (x >= 0).to(x) + (x >= 0.5).to(x)

    def forward(self, x):
        return self.spiking_function(x, self.alpha)


class Early(surrogate.ATan):
    """A step, but below the threshold."""

    def forward(self, x):
        return (x >= -0.1).to(x)


def other_method(kind, name, step_mode="m"):
    """A neuron one of whose methods is another one."""
    node = kind(step_mode=step_mode)
    own = getattr(node, name, None)
    return three(logits, T=T, node=setattr(node, name, lambda x: own(1.5 * x)) or node)


def late():
    """A network of which some forwards leave all as it is."""
    calls = itertools.count()

    def forward(net, x):
        if next(calls) > 11:
            net.unused.weight.data.add_(1.0)
        return logits(net, x)

    return three(forward, unused=nn.Linear(1, 1))


def lowered(x):
    with torch.autocast("cpu", torch.bfloat16):
        return 1.0 * (x @ torch.ones(3, 3)).float()


KINDS = {
    "IF": neuron.IFNode,
    "LIF": neuron.LIFNode,
    "PLIF": neuron.ParametricLIFNode,
    "DLIF": partial(DLIFNode, T=T),
}
METHODS_OF_NEURONS = ("neuronal_charge", "neuronal_fire", "neuronal_reset")
SMOOTH = surrogate.ATan(spiking=False)
REFUSED = {
    "mixed samples beside a mask": (lambda: three(mixing), "samples"),
    "mixed samples beside large weights": (
        lambda: three(mixing_beside_large_weights, T=2, node=fires(0.3)),
        "samples",
    ),
    "a softplus that jumps down": (lambda: soft(10.0), "softplus"),
    "another precision": (
        lambda: RELU(lambda net, x: net.relu(x).softmax(-1, dtype=torch.bfloat16).float()),
        "bfloat16",
    ),
    "a potential that is read": (lambda: three(reads_a_potential, T=2), "potential v"),
    "a potential that is read, caught": (lambda: three(caught_potential, T=2), "potential"),
    "batch first": (lambda: behind(BatchFirst()), "samples"),
    "a container of a neuron": (
        lambda: SpikingClassifier(
            layer.SeqToANNContainer(nn.Flatten(), neuron.IFNode(step_mode="s")),
            T,
            takes="sequence",
        ).eval(),
        "samples",
    ),
    "a change after some forwards": (late, "must not change during a forward"),
    "no classifier": (nn.Flatten, "wrap the network"),
    "training mode": (
        lambda: three(logits, fc=AlwaysTraining(3, 3)),
        "got net.fc in training mode",
    ),
    "an encoder": (
        lambda: SpikingClassifier(three(logits).net, T, PoissonEncoder()).eval(),
        "the encoder PoissonEncoder",
    ),
    "smooth": (lambda: with_node(neuron.IFNode(surrogate_function=SMOOTH)), "does not spike"),
    "a potential that is set": (lambda: three(sets_v), "set .* no v in a forward"),
    "a negative decay": (lambda: with_node(neuron.LIFNode(), tau=0.5), "decay is negative"),
    "two thresholds": (
        lambda: with_node(neuron.IFNode(), v_threshold=torch.ones(2)),
        "v_threshold is not one finite number",
    ),
    "NaN": (lambda: weights_of(torch.nan), "weights must be finite, .* in net.fc.weight"),
    "large": (lambda: weights_of(3e38), "may be beyond 1e30"),
    "autocast": (lambda: behind(lowered), "torch.bfloat16"),
    "a surrogate": (lambda: held(TwoLevels()), "is not a step at 0"),
}
"""By name a network and a word of its refusal."""
REFUSED |= {f"by {name}": (partial(beside, way), "no bounds") for name, way in LEAVING.items()}
REFUSED |= {
    f"true and true, {name}": (partial(RELU, partial(of_truths, both)), "comparison")
    for name, both in BOTH.items()
}
REFUSED |= {name: (partial(behind, one), message) for name, (one, message) in STATEMENTS.items()}
for name, kind in KINDS.items():
    for method in METHODS_OF_NEURONS:
        REFUSED[f"{name} {method}"] = (partial(other_method, kind, method), f"a {method} of its")
    for mode, method in (("m", "multi_step_forward"), ("s", "single_step_forward")):
        build = partial(other_method, kind, method, mode)
        REFUSED[f"{name} {method}"] = (build, f"{method} is not that of its class")
    for function in (TwoLevels, Early):
        build = partial(kind, surrogate_function=function(), step_mode="m")
        REFUSED[f"{name} {function.__name__}"] = (
            lambda build=build: three(logits, T=T, node=build()),
            "is not a step at 0",
        )


class Surrogate(torch.autograd.Function):
    """The identity, as torch's dispatcher sees it."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def with_hidden(take):
    """A branch that is lost in a way of its own."""

    def forward(net, x):
        found = logits(net, x)
        try:
            hidden = take(x)
        except Exception:
            hidden = 0.0
        return found + hidden * C

    return forward


def unrecorded(x):
    with torch._C.DisableTorchFunction():
        return torch.sum(x)


def script_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum()


LIES = {
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()).sum(),
    "tolist": lambda x: sum(x.flatten().tolist()),
    "item": lambda x: x.sum().item(),
    "truth": lambda x: 1.0 if (x > 0.5).any() else 0.0,
    "storage": lambda x: torch.tensor(list(x.contiguous().untyped_storage())).sum(),
    "dlpack": lambda x: torch.from_dlpack(x.contiguous().detach()).sum(),
    "equal": lambda x: float(torch.equal(x, x.round())),
    "allclose": lambda x: float(torch.allclose(x, x.round())),
    "nonzero": lambda x: float(len(x.nonzero())),
    "mask": lambda x: float(len(x[x > 0.5])),
    "argmax": lambda x: x.argmax().float(),
    "indices": lambda x: x.max(-1).indices.sum().float(),
    "repr": lambda x: float(len(repr(x))),
    "grad mode": lambda x: float(torch.is_grad_enabled()),
    "requires grad": lambda x: float((x * torch.ones(3, requires_grad=True)).requires_grad),
    "around the functions": unrecorded,
    "custom function": lambda x: Surrogate.apply(x).sum(),
    "script": lambda x: torch.jit.script(script_sum)(x),
    "set": lambda x: torch.empty(0).set_(x.contiguous()).sum(),
    "into a constant's data": lambda x: torch.zeros(3).data.copy_(x[0, 0]).sum(),
    "histogram": lambda x: torch.histc(x, 3)[0],
    "deep copy": lambda x: copy.deepcopy(x).sum(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)).sum(),
    "filled": lambda x: torch.full_like(x, x.sum()).sum(),
    "shape": lambda x: float(len(x.new_zeros(int((x > 0.5).sum())))),
    "shape by a tensor": lambda x: float(x.new_zeros((x > 0.5).sum()).shape[0]),
    "thread": lambda x: ThreadPoolExecutor(1).submit(torch.sum, x).result() * 1.0,
    "another storage": lambda x: torch.from_dlpack(x.contiguous().detach()).amax() * 1.0,
    "gradient": lambda x: torch.autograd.functional.vjp(torch.sum, x)[0],
}
"""Ways to carry values of the input past what is recorded, under ``try``."""
for name, take in LIES.items():
    REFUSED[f"lie: {name}"] = (partial(three, with_hidden(take), T=2), "no bounds are known")


def asks_for_a_mode(net, x):
    found = logits(net, x)
    return found if torch.overrides.has_torch_function((x,)) else found + net.branch(x)


def asks_for_gradients(net, x):
    found = logits(net, x)
    return found if torch.is_grad_enabled() else found + net.branch(x)


def asks_for_the_batch(net, x):
    found = logits(net, x)
    return found if x.shape[1] > 1 else found + net.branch(x)


def reads_old_potentials(net, x):
    net.node.store_v_seq = True
    return logits(net, x) + (net.node.v_seq.amax(0) > 0.5).to(x.dtype)


LEAKY = {
    "asks for the batch": (asks_for_the_batch, "treats them differently"),
    "reads old potentials": (reads_old_potentials, "unknown origin"),
    "asks for a mode": (asks_for_a_mode, "something else in a plain call"),
    "asks for gradients": (asks_for_gradients, "where gradients are on"),
}
for name, (forward, message) in LEAKY.items():
    REFUSED[name] = (partial(three, forward, T=2, branch=nn.Linear(3, 3)), message)
NEWEST = hasattr(neuron, "PSN")
OTHER_NEURONS = {} if NEWEST else {"KLIFNode": "TorchScript function"}
OTHER_NEURONS |= {
    "QIFNode": "the square of its potential",
    "EIFNode": "an exponential of its potential",
    "TernaryLIFNode": "its spikes have signs",
    "RAFNode": "its potential oscillates",
    "ComplementaryLIFNode": "its second state",
}
for name, reason in OTHER_NEURONS.items():
    if hasattr(neuron, name):
        build = partial(getattr(neuron, name), step_mode="m")
        REFUSED[name] = (
            lambda build=build: three(logits, T=T, node=build()),
            rf"node \({name}\): .*{reason}",
        )


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_bounds_is_refused(name):
    build, message = REFUSED[name]
    with pytest.raises((NotImplementedError, ValueError, TypeError), match=message):
        verify(build(), TWO, torch.tensor([0, 0]), 0.1)


@pytest.mark.skipif(not NEWEST, reason="this release of SpikingJelly has none of them")
def test_every_reason_is_one_of_a_neuron_of_the_newest_release():
    assert all(hasattr(neuron, name) for name in (*neurons.NO_BOUNDS, *neurons.OPEN))


@pytest.mark.slow
def test_an_evaluation_goes_on_without_proofs():
    model = three(reads_a_potential, T=2)
    y = model(X[:6]).argmax(1).detach()
    report = evaluate(model, X[:6], y, eps=0.05, suite="fast", progress=False)
    assert any("Nothing could be proved" in warning for warning in report.warnings)


def test_a_neuron_that_no_forward_uses_changes_nothing():
    model = three(logits, T=4, node=DLIFNode(T=4), unused=DLIFNode(T=4))
    y = model(TWO).argmax(1)
    first, second = (verify(model, TWO, y, 0.01).verified for _ in range(2))
    assert first == second


SWAPS = {
    "other data": lambda net, t: setattr(net.fc.weight, "data", net.weights[t % 2].clone()),
    "written data": lambda net, t: net.fc.weight.data.copy_(net.weights[t % 2]),
}


@pytest.mark.parametrize(("name", "method"), each_in_turn(SWAPS, ("ibp", "joint")))
def test_weights_that_a_forward_puts_in_are_seen(name, method):
    def forward(net, x):
        found = []
        for t, frame in enumerate(x):
            SWAPS[name](net, t)
            found.append(logits(net, frame))
        return torch.stack(found)

    weights = torch.tensor([[[0.6, 0.6, 0.0]], [[0.6, 0.0, 0.6]]])
    model = formula(
        forward,
        T=2,
        fc=linear([[0.6, 0.6, 0.0]]),
        node=neuron.IFNode(step_mode="s"),
        out=linear([[1.0], [0.0]], [0.0, 0.25]),
        weights=nn.Parameter(weights, requires_grad=False),
    )
    model.net.fc.weight.requires_grad_(False)
    x = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    x[::2] = 0
    assert count_proofs(model, x, 0.08, method=method, batch_size=2) > 0


SIGNS = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
"""A direction in which random corners hardly move."""


def pixels():
    torch.manual_seed(0)
    return 0.2 + 0.6 * torch.rand(1, 64)


def across(x, current, slope):
    """A layer whose current is this for an image, and moves with the signs of its pixels."""
    return linear([(slope * SIGNS).tolist()], [current - slope * float(x[0] @ SIGNS)])


def worst(x, eps):
    """The corner in which :func:`across` gives least."""
    return x - 0.999 * eps * SIGNS


def a_threshold_of_each_step(net, x):
    """The second one decides."""
    net.node.v_threshold = 2.0
    spikes(net, x[0])
    net.node.v_threshold = 1.0
    return logits_of(net, 0.0 * net.fc(x[1]) - 0.1)


def a_threshold_put_back(net, x):
    spikes(net, x[0])
    net.node.v_threshold = 2.0
    found = logits(net, x[1])
    net.node.v_threshold = 1.0
    return found


def a_threshold_for_one_call(net, x):
    net.node.v_threshold = 2.0
    found = logits(net, x)
    net.node.v_threshold = 1.0
    return found


def between(change):
    """Two calls of a neuron, and what is done to it between them."""

    def forward(net, x):
        first = net.node(0.0 * net.fc(x) + 0.3)
        change(net, x)
        return logits(net, x) + 0.0 * first

    return forward


def take_the_state_of_another(net, x):
    net.other(0.0 * net.fc(x))
    net.node.v = net.other.v


def roll_back(net, x):
    before = net.node.v
    net.node(0.0 * net.fc(x) + 0.3)
    net.node.v = before


def at_step_0_again(net, x):
    net.dlif(0.0 * net.fc(x[0]))
    net.dlif.time_step = 0
    return net.out(net.dlif(net.fc(x[1])))


def reading_the_potential(net, x):
    return net.out(spikes(net, x) + net.node.v)


twice = between(lambda net, x: None)
with_reset = between(lambda net, x: functional.reset_net(net.node))
CHANGES = {
    "threshold": (a_threshold_of_each_step, 2, "s"),
    "threshold put back": (a_threshold_put_back, 2, "s"),
    "one threshold": (a_threshold_for_one_call, 1, "m"),
    "reset": (with_reset, 1, "m"),
    "potential": (between(lambda net, x: setattr(net.node, "v", 0.0)), 1, "m"),
    "state of another": (between(take_the_state_of_another), 1, "m"),
    "rolled back": (between(roll_back), 1, "m"),
    "time step": (at_step_0_again, 2, "s"),
    "read": (reading_the_potential, 1, "m"),
}


def changing(forward, x, *, T, step_mode):
    node = neuron.IFNode(step_mode=step_mode)
    out = linear([[1.0], [0.0]], [0.0, 0.5])
    net = Formula(forward, fc=across(x, 1.2, 0.1), node=node, out=out)
    net.other = neuron.IFNode(step_mode=step_mode)
    net.dlif = DLIFNode(T=T, tau=2.0, step_mode=step_mode)
    return SpikingClassifier(net, T=T, takes="sequence").eval()


@pytest.mark.parametrize(("what", "method"), each_in_turn(CHANGES, METHODS))
def test_a_neuron_that_is_changed_within_a_forward_has_no_bounds(what, method):
    forward, T, step_mode = CHANGES[what]
    x = pixels()
    model = changing(forward, x, T=T, step_mode=step_mode)
    with pytest.raises(NotImplementedError, match="changes within|is set, between|potential v"):
        verify(model, x, model(x).argmax(1), 0.05, method=method)


def with_a_cut_graph(net, x):
    first = net.node(x=0.0 * net.fc(x[0]) + 0.3)
    functional.detach_net(net.node)
    return net.out(net.node(x=net.fc(x[1]))) + 0.0 * first


@pytest.mark.parametrize("method", METHODS)
def test_a_neuron_that_runs_twice_or_whose_graph_is_cut_has_bounds(method):
    x = pixels()
    for forward, T, step_mode in ((twice, 1, "m"), (with_a_cut_graph, 2, "s")):
        model = changing(forward, x, T=T, step_mode=step_mode)
        assert verify(model, x, model(x).argmax(1), 0.05, method=method).verified == (True,)


@pytest.mark.parametrize("forward", [twice, with_reset, reading_the_potential])
def test_neurons_hold_after_a_run_on_bounds_what_a_reset_leaves(forward):
    x = pixels()
    model = changing(forward, x, T=1, step_mode="m")
    inside = []
    model.net.fc.register_forward_pre_hook(lambda module, args: inside.append(model.net.node.v))
    with contextlib.suppress(NotImplementedError):
        bounded_logits(model, BoundedRun(bounded_neurons(model), 1), x, 0.05)
    assert model.net.node.v == 0.0
    assert len(inside) >= 1


class Binary(nn.Linear):
    """Binary weights in the forward alone, as BinaryConnect has them."""

    def forward(self, x):
        real = self.weight.data
        self.weight.data = real.sign()
        found = super().forward(x)
        self.weight.data = real
        return found


class Scaled(nn.Linear):
    """A buffer that is written in place for the forward alone."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x):
        self.scale.data.fill_(1 / 0.6)
        found = super().forward(x * self.scale)
        self.scale.data.fill_(1.0)
        return found


@pytest.mark.parametrize(
    ("kind", "method", "dtype"),
    each_in_turn([Binary, Scaled], METHODS, [torch.float32, torch.float64]),
)
def test_bounds_take_the_weights_of_the_forward(kind, method, dtype):
    last = kind(64, 2)
    last.weight.data = torch.stack([0.6 * SIGNS, -0.6 * SIGNS])
    last.bias.data = torch.tensor([14.0, 0.0])
    net = nn.Sequential(linear(torch.eye(64).tolist()), fires(), last)
    model = SpikingClassifier(net, T=4).eval().to(dtype)
    torch.manual_seed(0)
    x = 0.5 + 0.02 * torch.rand(1, 64, dtype=dtype)
    found = verify(model, x, model(x).argmax(1), 0.03, method=method, time_limit=1.0)
    with torch.no_grad():
        first, second = model(worst(x, 0.03))[0]
    assert float(first - second) >= found.margin[0]
    assert found.verified == (False,)


@pytest.mark.parametrize(
    ("dtype", "method"), each_in_turn([torch.float32, torch.int64, torch.bool], METHODS)
)
def test_joined_constants_have_no_radius(dtype, method):
    places = torch.tensor([-1, 0, 1, -3]).to(dtype)
    x = pixels()
    weight = torch.cat([torch.stack([SIGNS, -SIGNS]), torch.full((2, 4), 0.2)], 1)
    shift = 0.2 * float(places.sum())
    middle = 1.2 - float(x[0] @ SIGNS)
    model = formula(
        lambda net, x: net.node(
            net.fc(torch.cat([x, places.expand_as(x[..., :1].expand(*x.shape[:-1], 4))], -1))
        ),
        fc=linear(weight.tolist(), [middle - shift, -middle - shift]),
        node=fires(0.2),
    )
    y = model(x).argmax(1)
    proved = []
    for eps in (0.01, 0.02):  # 64 pixels move a current by 0.64 and by 1.28
        still = model(worst(x, eps)).argmax(1) == y
        (verified,) = verify(model, x, y, eps, method=method).verified
        assert still or not verified
        proved.append(verified)
    assert proved == [True, False]


def mixed(seed, kind):
    """A network whose layers run on whole sequences and step by step."""
    chosen = random.Random(seed)
    torch.manual_seed(seed)

    def drawn():
        v_reset = chosen.choice([0.0, 0.0, None])
        return {"v_reset": v_reset, "v_threshold": chosen.choice([0.5, 1.0])}

    inner = neuron.LIFNode(tau=2.0, step_mode="s", **drawn())
    if kind == "container":
        parts = [layer.MultiStepContainer(nn.Linear(1, 3), inner)]
    elif kind == "recurrent":
        again = layer.LinearRecurrentContainer(inner, 3, 3)
        again.step_mode = "m"
        parts = [nn.Linear(1, 3), again]
    else:
        before = neuron.IFNode(step_mode="m", **drawn())
        parts = [nn.Linear(1, 3), before, layer.MultiStepContainer(nn.Linear(3, 3), inner)]
    last = neuron.IFNode(step_mode="m", **drawn())
    net = nn.Sequential(*parts, nn.Linear(3, 3), last, nn.Linear(3, 2))
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 3
            module.bias.data *= 2
    return SpikingClassifier(net, T=chosen.choice([2, 3, 4]), takes="sequence").eval()


@pytest.mark.parametrize("kind", ["container", "recurrent", "sequence first"])
def test_layers_of_both_step_modes(kind):
    grid = torch.linspace(0, 1, 501)[:, None]
    looked_at = 0
    for seed in range(60):
        model = mixed(seed, kind)
        with torch.no_grad():
            classes = model(grid).argmax(1)
        if classes.min() == classes.max():
            continue
        x = torch.rand(1, 1)
        y = model(x).argmax(1)
        distance = (grid[classes != y] - x).abs()
        eps = float(distance.min()) + 1e-6
        looked_at += 1
        assert verify(model, x, y, eps).verified == (False,), seed
    assert looked_at > 2


def test_a_layer_of_another_step_mode_is_bounded_step_by_step():
    model = mixed(0, "container")
    x = torch.rand(1, 1)
    found = verify(model, x, model(x).argmax(1), 0.01)
    last = str(len(model.net) - 2)
    assert any(entry.startswith(f"{last}: ") for entry in found.stepwise)


class Clamped(nn.Linear):
    """Weights that every forward writes to, so that autograd has no gradient."""

    def forward(self, x):
        found = super().forward(x)
        with torch.no_grad():
            self.weight.clamp_(-1.0, 1.0)
        return found


@pytest.mark.parametrize("method", METHODS)
def test_a_network_without_a_backward_pass_is_proved(method):
    torch.manual_seed(0)
    net = nn.Sequential(Clamped(4, 3), fires(), Clamped(3, 3))
    model = SpikingClassifier(net, T=2).eval()
    x = torch.rand(3, 4)
    assert any(verify(model, x, model(x).argmax(1), 1e-3, method=method).verified)
