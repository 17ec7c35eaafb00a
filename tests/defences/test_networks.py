"""Networks with the neurons of defences: by name, from checkpoints, in training, and judged."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from defences.neurons_by_hand import numbers
from evaluation.short_suite import short_suite, shortened
from evaluation.suite_run import THREAT, Net, batches
from spikingjelly.activation_based import functional
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier, evaluate, verify
from sj_robust.classifier import PoissonEncoder
from sj_robust.core.preserved import seeded_network
from sj_robust.core.randomness import SampleSeeds
from sj_robust.defences import (
    HomeostaticNode,
    NoisyLIFNode,
    SmoothingEncoder,
    StochasticGate,
)
from sj_robust.estimators import estimator
from sj_robust.evaluation import from_checkpoint
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.training import save_checkpoint, training_attack
from sj_robust.training._run import _groups

KINDS = {
    "tgo": ({"neuron": "tgo"}, "NoisyLIFNode"),
    "feel": (
        {"neuron": "feel", "encoder": "feel", "encoder_options": {"narrowing": 0.2}},
        "EvolvingLeakNode",
    ),
    "hosnn": ({"neuron": "hosnn"}, "HomeostaticNode"),
    "stog": ({"neuron": "stog"}, "StochasticGate"),
    "poisson": ({"encoder": "poisson"}, "PoissonEncoder"),
    "rsc": ({"encoder": "rsc", "encoder_options": {"std": 0.2}}, "SmoothingEncoder"),
    "stod": ({"encoder": "stod", "encoder_options": {"patch": 2}}, "OrthogonalEncoder"),
}
RANDOM = {"tgo", "stog", "poisson", "rsc"}
NEURONS = ("tgo", "feel", "hosnn")
T = 3


def spec_of(kind, **options):
    return NetworkSpec(channels=(4, 8), tau=4.0, T=T, **KINDS[kind][0] | options)


def build(kind, **options):
    torch.manual_seed(0)
    model = build_classifier(spec_of(kind, **options))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that untrained neurons fire
            module.weight.data.fill_(2.0)
            module.bias.data.fill_(0.5)
    return model


def images(n=4):
    return numbers(n, 1, 8, 8, seed=1).float()


def seeded(model, x, seed=0):
    with seeded_network(None, seed, x.device):
        return model(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_by_name_has_all_its_shapes_and_trains(kind):
    model = build(kind)
    assert model.training
    assert all(parameter.numel() for parameter in model.parameters())
    for _ in range(2):  # the first batch shows HoSNN what is usual
        model.zero_grad()
        logits = model(images())
        loss = nn.functional.cross_entropy(logits, torch.arange(4))
        loss.backward()
    unmoved = [name for name, p in model.named_parameters() if p.grad is None]
    assert unmoved == []
    assert KINDS[kind][1] in {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_the_network_back(kind, tmp_path):
    model = build(kind)
    for _ in range(2):
        model(images())
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.rand_like(parameter))
    description = {"network": vars(spec_of(kind)), "options": {}}
    content = {"description": description, "model": model.state_dict()}
    save_checkpoint(tmp_path / "best.pt", content)
    other = from_checkpoint(tmp_path / "best.pt")
    assert torch.equal(seeded(other.model, images()), seeded(model, images()))
    encoder = KINDS[kind][0].get("encoder", "none")
    assert (f"encoder {encoder}" in other.architecture) == (encoder != "none")


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_draws_only_where_its_defence_does(kind):
    model = build(kind)
    model(images())
    model.eval()
    if kind == "stog":
        for module in model.modules():
            if isinstance(module, StochasticGate):
                module.rate.data.fill_(0.6)
    first = seeded(model, images())
    assert torch.equal(seeded(model, images()), first)
    assert torch.equal(seeded(model, images(), seed=1), first) == (kind not in RANDOM)
    if kind in RANDOM:
        with pytest.raises(ValueError, match="draws"):
            evaluate(model, images(), torch.arange(4), eps=0.1, suite="fast", draws=1)


@pytest.mark.filterwarnings("default")  # torch warns of its own attributes
@pytest.mark.parametrize("build", [NoisyLIFNode, StochasticGate, SmoothingEncoder, PoissonEncoder])
def test_what_draws_compiles_for_batches_of_any_size(build):
    """As it draws without being compiled."""
    module = build()
    module(torch.rand(2, 5))  # finds its shapes
    functional.reset_net(module)
    compiled = torch.compile(module, backend="eager")
    for size in (8, 5, 3):
        x = torch.rand(size, 5)
        outputs = []
        for run in (module, compiled):
            functional.reset_net(module)
            outputs.append(seeded(run, x))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_attacks_repeat_and_estimators_take_hold(kind):
    model = build(kind)
    model(images())
    model.eval()
    attack = training_attack("pgd_at", eps=0.1, steps=2)
    y = torch.arange(4)
    seeds = SampleSeeds(range(4))
    found = attack(model, images(), y, generator=seeds)
    assert torch.equal(attack(model, images(), y, generator=seeds), found)
    assert (found - images()).abs().max() <= 0.1 + 1e-6
    gradients = []
    for name in ("training", "atan:4"):
        with estimator(name)(model) as crafting:
            x = images().requires_grad_()
            logits = seeded(crafting, x)
            (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        gradients.append(gradient)
    assert torch.equal(logits, seeded(model, images()))
    assert not torch.allclose(gradients[0], gradients[1])
    if kind in NEURONS:  # the others have LIF or DLIF
        message = "needs the dynamics of every neuron"
        with pytest.raises(ValueError, match=message), estimator("rga")(model):
            pass


@pytest.mark.parametrize("kind", ["stog", *NEURONS])
def test_nothing_is_proved_of_them(kind):
    model = build(kind).eval()
    with pytest.raises((NotImplementedError, ValueError)) as refused:
        verify(model, images(), torch.arange(4), 0.001)
    wanted = {"tgo": "NoisyLIFNode", "feel": "FrequencyEncoder", "hosnn": "HomeostaticNode"}
    assert wanted.get(kind, "draws random numbers inside") in str(refused.value)


def test_a_network_of_ones_own_gets_its_shapes_too(tmp_path):
    file = tmp_path / "with_neurons_of_defences.py"
    file.write_text(
        "from spikingjelly.activation_based import functional, layer\n"
        "from torch import nn\n"
        "def build(classes, spiking_neuron):\n"
        "    first = layer.Conv2d(1, 4, 3, stride=2)\n"
        "    last = layer.Linear(36, classes)\n"
        "    net = nn.Sequential(first, spiking_neuron(), layer.Flatten(), last)\n"
        "    functional.set_step_mode(net, 'm')\n"
        "    return net\n"
    )
    for kind in ("feel", "stog"):
        model = build_classifier(NetworkSpec(f"{file}:build", T=T, **KINDS[kind][0]))
        shapes = {tuple(p.shape) for p in model.parameters()}
        assert ((T, 4, 3, 3) if kind == "feel" else (4, 3, 3)) in shapes
        assert model(images()).shape == (4, 10)


def test_weight_decay_leaves_the_rates_of_gates_alone():
    model = build("stog")
    rates = [module.rate for module in model.modules() if isinstance(module, StochasticGate)]
    others, kept = _groups(model)
    assert kept["weight_decay"] == 0
    assert [id(one) for one in kept["params"]] == [id(rate) for rate in rates]
    found = {id(one) for one in (*others["params"], *kept["params"])}
    assert found == {id(one) for one in model.parameters()}
    assert "weight_decay" not in others
    (group,) = _groups(build("feel"))
    assert len(group["params"]) == len(list(build("feel").parameters()))


def defended(kind):
    """A network that tells three classes apart, with noise, gates or homeostasis."""
    net = Net()
    if kind == "noise":
        net.parts[1] = NoisyLIFNode(4.0)
        return SpikingClassifier(net, 3)
    if kind == "homeostasis":
        net.parts[1] = HomeostaticNode(3)
        model = SpikingClassifier(net, 3)
        model(batches(12, 12)[0][0])  # shows it what is usual
        return model
    gate = StochasticGate()
    net.parts[1] = nn.Sequential(DLIFNode(T=3, tau=4.0), gate)
    model = SpikingClassifier(net, 3)
    model(batches(12, 12)[0][0])
    gate.rate.data.fill_(0.8)
    return model


@pytest.mark.slow
def test_an_evaluation_takes_the_expectation_over_draws_and_proves_nothing():
    model = defended("gates")
    members = []

    def noted(suite):
        members.extend(suite.members)
        return short_suite(suite)

    settings = {"eps": THREAT.eps, "suite": "fast", "draws": 3, "progress": False}
    with shortened(noted):
        report = evaluate(model, batches(6, 6), **settings)
    assert report.draws == 3
    samples = [m.attack.keywords["eot_samples"] for m in members if "apgd" in m.name]
    assert set(samples) == {2}  # a third, two at least
    names = [row.member for row in report.rows]
    assert any("apgd" in name for name in names)
    assert not any("spike_search" in name for name in names)  # other spikes in every forward
    assert not any(row.kind == "proof" for row in report.rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "suite"),
    [
        ("noise", "standard"),
        ("homeostasis", "gradient"),
        ("noise", "gradients"),
        ("homeostasis", "long"),
    ],
)
def test_no_suite_takes_an_estimator_that_the_neurons_refuse(kind, suite):
    settings = {"eps": THREAT.eps, "suite": suite, "progress": False}
    if kind == "noise":
        settings["draws"] = 2
    with shortened(short_attacks):
        report = evaluate(defended(kind), batches(6, 6), **settings)
    names = [row.member for row in report.rows]
    assert any("apgd" in name or "sapgd" in name for name in names)
    assert not any("assg" in name for name in names)
    left_out = [text for text in report.warnings if text.startswith("Estimator assg was left out")]
    assert len(left_out) == (suite in ("gradient", "gradients"))
    if suite == "gradient":
        assert any(name.startswith("sapgd/") for name in names)
    noted = {trial["estimator"]: trial["note"] for trial in report.estimators}
    if suite == "gradients":
        assert noted == {}
        assert not any("bptr" in name for name in names)
    else:
        assert "needs the dynamics of every neuron" in noted["assg"]


def short_attacks(suite):
    """Its attacks in steps, of which there are few, ASSG among its candidates."""
    in_steps = [one for one in suite.members if "steps" in getattr(one.attack, "keywords", {})]
    members = [replace(one, attack=partial(one.attack, steps=3)) for one in in_steps]
    search = suite.search
    if search is not None:
        search = replace(short_suite(suite).search, candidates=("atan:2", "assg"))
    return replace(suite, members=tuple(members), control=(), plain=(), search=search)
