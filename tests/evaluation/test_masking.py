"""Every symptom of gradient masking is found where it was planted, and none where it was not."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from evaluation import masked
from evaluation.short_suite import shortened
from spikingjelly.activation_based import surrogate
from torch import nn

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import diagnose, evaluate
from sj_robust.evaluation.diagnosis._probe import Probe
from sj_robust.evaluation.diagnosis.masking import (
    ESTIMATORS_COMPARED,
    THRESHOLDS,
    Finding,
    estimators_searched,
)
from sj_robust.evaluation.run.estimator_search import EstimatorTrial

torch.set_num_threads(1)

THREAT = ThreatModel("Linf", 0.1)
LAYERS = {"silent_layers", "saturated_layers", "other_estimator_stronger"}


@pytest.fixture
def honest(trained) -> nn.Module:
    return trained.model


@pytest.fixture(scope="module")
def linear(trained) -> nn.Module:
    """Ridge regression on one-hot labels, about as right as the spiking network."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, target = trained.x.flatten(1), nn.functional.one_hot(trained.y, 10).float()
    ridge = torch.linalg.solve(x.T @ x + torch.eye(64), x.T @ (target - 0.1))
    model.load_state_dict({"1.weight": 10 * ridge.T, "1.bias": torch.zeros(10)})
    return model.eval()


@pytest.fixture
def batch(trained):
    return trained.x[:24], trained.y[:24]


def findings(model, batch, threat=THREAT, **options) -> dict[str, Finding]:
    return {f.name: f for f in diagnose(model, *batch, threat=threat, seed=0, steps=10, **options)}


def failed(found) -> set[str]:
    return {name for name, finding in found.items() if not finding.passed}


@pytest.mark.slow
@pytest.mark.parametrize("threat", [THREAT, ThreatModel("L2", 1.0)], ids=str)
def test_an_honest_spiking_network_passes_every_finding(honest, batch, threat):
    found = findings(honest, batch, threat)
    assert list(found) == list(THRESHOLDS)
    assert failed(found) == set()
    assert all(
        0 <= finding.value <= 1 and finding.meaning and finding.remedy for finding in found.values()
    )
    assert all(name in found["other_estimator_stronger"].meaning for name in ESTIMATORS_COMPARED)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [THREAT, ThreatModel("L2", 0.7)], ids=str)
def test_an_honest_linear_network_passes_without_findings_of_spikes(linear, batch, threat):
    found = findings(linear, batch, threat)
    assert set(found) == set(THRESHOLDS) - LAYERS
    assert failed(found) == set()
    saved = json.loads(json.dumps([asdict(finding) for finding in found.values()]))  # plain data
    assert [Finding(**entry) for entry in saved] == [*found.values()]


def with_neurons(what, value):
    return lambda model: masked.with_neurons(model, what, value)


def before(function):
    return lambda model: masked.Before(function, model)


def scaled(model):
    return nn.Sequential(model, type("Scale", (nn.Module,), {"forward": lambda self, z: 100 * z})())


# What masks the honest network, symptoms that must be found, and the remedy that each of the first
# names.
MASKS = {
    "narrow surrogate": (
        with_neurons("surrogate_function", masked.NARROW),
        {
            "tiny_gradients": "wider surrogates",
            "flat_loss": "other surrogates",
            "other_estimator_stronger": "worst case",
        },
    ),
    "rather narrow surrogate": (
        with_neurons("surrogate_function", surrogate.ATan(alpha=100.0)),
        {"other_estimator_stronger": "suites fast and standard"},
    ),
    "narrow triangle": (
        with_neurons("surrogate_function", surrogate.PiecewiseQuadratic(alpha=100.0)),
        {
            "zero_gradients": "wider surrogates",
            "unbounded_attack_fails": "wider surrogates",
            "other_estimator_stronger": "worst case",
            "transfer_beats_white_box": "other estimators",
        },
    ),
    "clamped input": (
        before(masked.clamped),
        {
            "zero_gradients": "clamp",
            "flat_loss": "transfer",
            "loss_does_not_rise": "finite differences",
            "noise_beats_attack": "Square",
            "unbounded_attack_fails": "identity in the backward pass",
            "transfer_beats_white_box": "Square",
        },
    ),
    "compared input": (
        before(masked.stepped),
        {"zero_gradients": "rounding", "unbounded_attack_fails": "identity in the backward pass"},
    ),
    "steep input": (before(masked.steep), {"tiny_gradients": "input layer is saturated"}),
    "random input": (before(masked.shaken), {"random_outputs": "eot_samples"}),
    "dead network": (
        with_neurons("v_threshold", 1e4),
        {
            "silent_layers": "v_threshold",
            "clean_errors": "weights",
            "unbounded_attack_fails": "transfer",
        },
    ),
    "restless network": (
        with_neurons("v_threshold", -1e4),
        {"saturated_layers": "Raise v_threshold"},
    ),
    "large logits": (scaled, {"saturated_loss": "APGD-DLR"}),
    "gradient turned round": (
        before(masked.turned_everywhere),
        {"loss_does_not_rise": "other estimators"},
    ),
    "gradient turned round beside the images": (
        before(masked.turned_beside_the_levels),
        {"single_step_beats_iterative": "random starts"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_what_masks_is_found_and_the_remedy_named(honest, batch, name):
    mask, expected = MASKS[name]
    options = (
        {} if "other_estimator_stronger" in expected else {"estimators": None}
    )  # which take half of the time
    found = findings(mask(honest), batch, **options)
    assert set(expected) <= failed(found)
    assert ("other_estimator_stronger" in found) is not bool(options)
    if name == "narrow surrogate":  # which would pass a test for zeros alone
        assert found["zero_gradients"].passed
        assert found["zero_gradients"].value < 0.01
        assert found["tiny_gradients"].value > 0.5
    for symptom, remedy in expected.items():
        assert remedy in found[symptom].remedy
        assert found[symptom].remedy in str(found[symptom])


def test_random_outputs_are_no_sign_where_attacks_average():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.rand(12, 1, 8, 8)
    shaken = masked.Before(masked.shaken, net)
    found = findings(shaken, (x, net(x).argmax(1)), estimators=None, eot_samples=3)
    random = found["random_outputs"]
    assert random.passed
    assert random.value > 0.9
    assert "average over 3" in random.meaning


def test_shares_of_elements_by_hand():
    """Two pixels: a third of the slope, nothing; an image at the far end is out of reach."""
    weight = torch.tensor([[0.0, 0.0], [0.3, 0.0]])
    model = nn.Linear(2, 2)
    model.weight, model.bias = nn.Parameter(weight), nn.Parameter(torch.tensor([0.0, 5.0]))
    found = findings(model, (torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([1, 1])))
    assert found["zero_gradients"].value == 0.5
    assert found["tiny_gradients"].value == 0
    assert found["flat_loss"].value == 1.0  # 0.15 and 0.3 of margins 5.15 and 5.3
    assert found["unbounded_attack_fails"].value == 1.0
    assert not found["flat_loss"].passed


@pytest.mark.slow
def test_an_attack_that_larger_budgets_or_more_steps_mislead(honest, batch, monkeypatch):
    attack = Probe.attack

    def misled(probe, *, eps=None, steps=None, source=None):
        lost = (eps is not None and eps > THREAT.eps) or (steps is not None and steps > 10)
        return probe.x if lost else attack(probe, eps=eps, steps=steps, source=source)

    monkeypatch.setattr(Probe, "attack", misled)
    found = findings(honest, batch, estimators=None)
    assert failed(found) == {
        "larger_budget_fools_fewer",
        "more_steps_fool_fewer",
        "unbounded_attack_fails",
    }
    assert "APGD" in found["larger_budget_fools_fewer"].remedy
    assert "step size" in found["more_steps_fool_fewer"].remedy
    share = found["more_steps_fool_fewer"].value
    assert found["larger_budget_fools_fewer"].value == share > 0.2
    assert f"{share:.0%}" in found["more_steps_fool_fewer"].meaning


@pytest.mark.slow
def test_a_source_network_is_a_better_witness_than_the_stand_in(honest, batch):
    """A clamped input in front of the very network that crafts: nothing transfers better."""
    model = masked.Before(masked.clamped, honest)
    stand_in, source = (
        findings(model, batch, source=source, estimators=None) for source in (None, honest)
    )
    assert (
        source["transfer_beats_white_box"].value >= stand_in["transfer_beats_white_box"].value > 0
    )
    assert "the source network" in source["transfer_beats_white_box"].meaning
    assert "substitute network" in stand_in["transfer_beats_white_box"].meaning


@pytest.mark.slow
def test_one_image_alone_is_no_evidence_and_none_is_no_attack(honest, batch):
    x, y = batch
    found = findings(honest, (x[:5], y[:5]), estimators=None)
    assert found["noise_beats_attack"].total == 5
    assert found["zero_gradients"].threshold == THRESHOLDS["zero_gradients"]
    found = findings(honest, (x, (y + 1) % 10))  # nothing is classified correctly
    assert found["clean_errors"].value > 0.9
    assert failed(found) == {"clean_errors"}
    assert "unbounded_attack_fails" not in found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions(linear, batch, dtype):
    found = findings(copy.deepcopy(linear).to(dtype), (batch[0].to(dtype), batch[1]))
    assert failed(found) == set()


@pytest.mark.slow
def test_any_callable_will_do_and_so_does_inference_mode(linear, batch):
    expected = findings(linear, batch)
    assert findings(lambda x: linear(x), batch) == expected
    with torch.inference_mode():
        assert findings(linear, [tensor.clone() for tensor in batch]) == expected


def trial(name, left, gained=0, lost=0, note="", steps=60):
    return EstimatorTrial(name, left, left, 0.0, 40, gained, lost, note=note, steps=steps)


def test_a_search_is_not_attacked_again_but_counted():
    usual = trial("training", 0.5)
    none = [trial("atan:4", 1.0, lost=20, note="ValueError: no spiking neuron")]
    assert estimators_searched([usual]) == estimators_searched([usual, *none]) == []
    (found,) = estimators_searched([trial("atan:4", 0.1, gained=18, lost=2), usual, *none])
    assert (found.name, found.value) == ("other_estimator_stronger", 16 / 40)
    assert not found.passed
    assert "training 50%, atan:4 10%" in found.meaning
    assert "start with atan:4." in found.remedy
    short = trial("atan:8", 0.0, gained=40, steps=20)  # of the short attack, which is not compared
    assert estimators_searched([usual, short]) == []
    assert estimators_searched([trial("atan:4", 0.1, gained=18, lost=2), usual, short]) == [found]
    for gained, lost in ((4, 2), (2, 4)):  # chance, and a search that found nothing better
        (found,) = estimators_searched([usual, trial("assg", 0.5, gained, lost)])
        assert found.passed
        assert found.value == max(0, gained - lost) / 40
    weaker = [trial(f"atan:{number}", 0.6, lost=number) for number in range(1, 9)]
    (found,) = estimators_searched([*weaker, usual])
    assert "atan:4" in found.meaning
    assert "atan:5" not in found.meaning  # the strongest ones alone are told


@pytest.mark.slow
def test_an_evaluation_takes_from_its_search_what_another_estimator_is_worth(
    honest, batch, monkeypatch
):
    strong_attack = Probe.strong_attack

    def attacked_again(probe, name="training", **options):
        assert name == "training"
        return strong_attack(probe, name, **options)

    monkeypatch.setattr(Probe, "strong_attack", attacked_again)
    model = masked.with_neurons(honest, "surrogate_function", surrogate.ATan(alpha=100.0))
    x, y = batch
    with shortened():
        report = evaluate(model, x[:10], y[:10], eps=0.1, suite="fast", progress=False)
    assert [row["name"] for row in report.findings] == [*THRESHOLDS]
    stronger = report.findings[-1]
    trials = {row["estimator"]: row for row in report.estimators}
    gained = max(row["gained"] - row["lost"] for row in trials.values())
    assert stronger["value"] == gained / trials["training"]["images"] > 0
