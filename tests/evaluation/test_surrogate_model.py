"""Attacks that are crafted on a stand-in: which they are, what they find, and the stand-in that a
network of integrate-and-fire neurons has of itself.
"""

import math

import pytest
import torch
from evaluation import masked
from evaluation.short_suite import shortened
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier, evaluate
from sj_robust.attacks import SampleSeeds, ThreatModel
from sj_robust.attacks.logits import margin
from sj_robust.classifier import PoissonEncoder, SpikingEventClassifier
from sj_robust.evaluation import make_suite
from sj_robust.evaluation.run.member import crafted
from sj_robust.models.rates import rate_twin
from sj_robust.training import convert

T = 4
LINF, EVENTS = ThreatModel("Linf", 0.2), ThreatModel("L0", 5)
SOURCE = nn.Flatten()
EVERY = ["apgd_ce", "apgd_dlr", "apgd_t"]


def kinds_of(members, prefix):
    names = [member.name for member in members]
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


@pytest.mark.parametrize(
    ("name", "threat", "classes", "kinds"),
    [
        ("standard", LINF, 10, EVERY),
        ("fast", ThreatModel("L2", 0.2), 3, EVERY[:2]),
        ("gradient", LINF, 2, EVERY[:1]),
        ("paper", LINF, 10, EVERY),
        ("autoattack", LINF, 10, EVERY),
        ("events", EVENTS, 10, ["flips"]),
    ],
)
def test_members_on_the_stand_in_follow_the_first_and_have_a_control(name, threat, classes, kinds):
    if name == "autoattack":
        pytest.importorskip("pyautoattack", reason="needs the extra `attacks`")
    without = make_suite(name, threat, classes=classes)
    suite = make_suite(name, threat, classes=classes, surrogate_model=SOURCE)
    for found, usual, prefix in (
        (suite.members, without.members, "transfer/"),
        (suite.control, without.control, "control/transfer/"),
    ):
        assert kinds_of(found, prefix) == kinds
        assert kinds_of(found[1 : 1 + len(kinds)], prefix) == kinds
        others = [member.name for member in (found[0], *found[1 + len(kinds) :])]
        assert others == [member.name for member in usual]
        assert {member.group for member in found} == {member.group for member in usual}
    for there, own in zip(suite.members[1:], suite.control[1 : 1 + len(kinds)], strict=False):
        assert there.attack.source is SOURCE
        wanted = dict(own.attack.keywords)
        given = dict(there.attack.attack.keywords)
        given.pop("keep_best", None)
        for keywords in (given, wanted):
            keywords.pop("confidence", None)
        assert given == wanted


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_transfer_does_not_end_at_the_border_of_the_source(norm, draws):
    torch.manual_seed(0)
    source = nn.Linear(6, 4).requires_grad_(False)
    x = torch.rand(30, 6)
    y = torch.arange(30) % 4  # three quarters are wrong already
    suite = make_suite(
        "fast", ThreatModel(norm, 0.2), classes=4, eot_samples=draws, surrogate_model=source
    )
    wrong = source(x).argmax(1) != y
    for there, own in zip(suite.members[1:4], suite.control[1:4], strict=True):
        moved = []
        for member, model in ((there, nn.Identity()), (own, source)):
            x_adv = crafted(model, x, y, member, seeds=SampleSeeds(range(30))).x_adv
            moved.append(margin(source(x), y) - margin(source(x_adv), y))
        assert bool((moved[0][wrong] != 0).all())
        assert there.name != "transfer/apgd_ce" or float(moved[0].min()) > 0
        stops = draws == 1  # one forward of a deterministic network says all
        assert bool((moved[1][wrong] == 0).all()) is stops


def images(classes=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(24, 1, 3, 3, generator=generator)
    torch.manual_seed(0)
    honest = nn.Sequential(nn.Flatten(), nn.Linear(9, classes))
    return honest, x, honest(x).argmax(1)


def test_what_masks_its_gradients_falls_by_the_stand_in():
    honest, x, y = images()
    model = masked.Before(masked.turned_everywhere, honest)
    given = {"eps": 0.1, "suite": "fast", "progress": False}
    with shortened():
        fair = evaluate(honest, x, y, **given)
        report = evaluate(model, x, y, surrogate_model=honest, **given)
    first, found = report.attacks[:2]
    assert len(first.fell) < len(fair.attacks[0].fell) / 2
    assert {*first.fell, *found.fell} >= {*fair.attacks[0].fell}
    assert found.member in report.description
    assert "crafted on the surrogate model" in report.description
    failed = {row["name"] for row in report.findings if not row["passed"]}
    assert "transfer_beats_white_box" in failed


@pytest.mark.parametrize(
    ("stand_in", "error", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 5)), ValueError, "surrogate_model"),
        (nn.Linear(8, 4), ValueError, "surrogate_model"),
        (masked.Before(masked.stepped, nn.Flatten()), ValueError, "surrogate_model"),
        (lambda x: x.flatten(1), TypeError, "surrogate_model"),
    ],
)
def test_a_stand_in_that_does_not_fit_is_refused(stand_in, error, said):
    honest, x, y = images()
    with pytest.raises(error, match=said):
        evaluate(honest, x, y, eps=0.1, surrogate_model=stand_in, progress=False)


def dlif(**options):
    return DLIFNode(T=T, **{"tau": math.inf, "v_reset": None} | options)


def spiking(node=None, kind=SpikingClassifier, **options):
    torch.manual_seed(0)
    parts = [nn.Flatten(2), nn.Linear(9, 16), node or dlif(), nn.Linear(16, 4)]
    return kind(nn.Sequential(*parts), T, **options).eval()


def with_gains(*gains):
    node = dlif()
    node.input_gain = nn.Parameter(torch.tensor(gains))
    return node


@pytest.mark.parametrize(
    ("node", "rate"),
    [
        (dlif(), lambda x: x - 1 / 8),
        (dlif(v_threshold=2.0), lambda x: x / 2 - 1 / 8),
        (with_gains(3.0, 3.0, 3.0, 3.0), lambda x: 3 * x - 1 / 8),
        (with_gains(1.3, 1.1, 0.9, 0.7), lambda x: x - 1 / 8),
        (neuron.IFNode(v_reset=None, step_mode="m"), lambda x: x - 1 / 8),
    ],
)
def test_the_rates_of_a_network_are_those_of_its_neurons_but_for_rounding(node, rate):
    net = spiking(node)
    twin = rate_twin(net)
    x = images()[1]
    current = net.net[1](x.flatten(1)).detach()
    wanted = net.net[3](rate(current).clamp(0, 1))
    torch.testing.assert_close(twin(x), wanted)
    node.reset()
    spikes = node(current.expand(T, *current.shape)).mean(0).detach()
    assert float((spikes - rate(current).clamp(0, 1)).abs().max()) <= 1 / 8 + 1e-6
    assert twin.net[1].weight is net.net[1].weight
    assert net.net[2] is node
    assert (net.T, twin.T) == (T, 1)


def test_the_rates_of_a_converted_network_are_the_network_that_it_was():
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.ReLU()]
    relus = nn.Sequential(*first, nn.Flatten(), nn.Linear(4, 3)).eval()
    x = images()[1]
    twin = rate_twin(convert(relus, x, T=8, quantile=1.0))
    torch.testing.assert_close(twin(x), relus(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "net",
    [
        nn.Flatten(),
        spiking(dlif(tau=2.0)),
        spiking(dlif(v_reset=0.0)),
        spiking(with_gains(-1.0, -1.0, -1.0, -1.0)),
        spiking(dlif(surrogate_function=surrogate.ATan(spiking=False))),
        spiking(nn.Sequential(dlif(), neuron.LIFNode(v_reset=None, step_mode="m"))),
        spiking(nn.Sequential(dlif(), neuron.QIFNode(v_reset=None, step_mode="m"))),
        spiking(encoder=PoissonEncoder()),
        spiking(kind=SpikingEventClassifier),
        spiking(nn.ReLU()),
    ],
)
def test_other_networks_have_no_rates(net):
    assert rate_twin(net) is None


@pytest.mark.parametrize(("node", "has_rates"), [(dlif(), True), (dlif(tau=2.0), False)])
def test_the_rates_are_attacked_where_there_are_any(node, has_rates):
    net = spiking(node)
    x = images()[1]
    with shortened():
        report = evaluate(net, x, net(x).argmax(1), eps=0.1, suite="fast", progress=False)
    names = [row.member for row in report.rows]
    assert ("transfer/apgd_t" in names) is has_rates
    assert ("control/transfer/apgd_t" in names) is has_rates
    assert ("crafted on the network of its rates" in report.description) is has_rates
