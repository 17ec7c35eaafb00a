"""Every measurement leaves the network and the random state alone, runs in evaluation mode and
follows its seed.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from evaluation.suite_run import suite_outcome
from evaluation.test_activity import T, images, network
from torch import nn
from unchanged import unchanged

from sj_robust import SpikingClassifier
from sj_robust.attacks import SampleSeeds, ThreatModel, fgsm, gaussian, pgd
from sj_robust.classifier import PoissonEncoder
from sj_robust.evaluation import Member, diagnose, evaluate, firing, worst_case
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.draws import settled_draws
from sj_robust.evaluation.run.loop import alone

THREAT = ThreatModel("Linf", 0.1)


def careless(model, x, y, *, generator):
    torch.rand(3)
    model.train()
    return x


def members():
    step = partial(pgd, eps=0.1, step_size=0.03, steps=3)
    return [Member("pgd", step), Member("careless", careless)]


def without_times(rows):
    return [replace(row, seconds=0.0) for row in rows]


def worst(model, x, y, seed):
    seeds = SampleSeeds(range(len(x))).derived(seed)
    return without_times(worst_case(model, x, y, members(), draws=2, seeds=seeds).rows)


MEASUREMENTS = {
    "firing": lambda model, x, y, seed: firing(model, x, seed=seed),
    "worst_case": worst,
    "diagnose": lambda model, x, y, seed: diagnose(
        model, x, y, threat=THREAT, seed=seed, steps=2, estimators=["atan:4"]
    ),
    "suite": lambda model, x, y, seed: without_times(
        suite_outcome(model, [(x, y)], members(), threat=THREAT, seed=seed, draws=2).rows
    ),
}


PROBES = ("firing", "diagnose")
"""They restore the neurons' states and seed an encoder's own generator as well."""


def labelled(n=40):
    """Images with the answers of the network as labels, every seventh of them wrong."""
    x = images(n)
    with torch.no_grad():
        y = SpikingClassifier(network(), T=T).eval()(x).argmax(1)
    y[::7] = (y[::7] + 1) % 3
    return x, y


@pytest.mark.parametrize("fail", [False, True], ids=["ends", "raises"])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_everything_stays_as_it_was(name, fail):
    net = network()
    x, y = labelled(8)
    own = [torch.Generator().manual_seed(3)] if name in PROBES else []
    model = SpikingClassifier(net, T=T, encoder=PoissonEncoder(*own)).train()
    net[1].eval()
    model(x)  # leaves a state with a graph in the neurons
    before = x.clone()
    if fail:
        net[6].register_forward_hook(lambda *_: 1 / 0)
    same = unchanged(model, *own, hooked=[net[6]], states=name in PROBES)
    with same, pytest.raises(ZeroDivisionError) if fail else nullcontext():
        assert MEASUREMENTS[name](model, x, y, 0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_the_network_runs_in_evaluation_mode(measure):
    x, y = labelled(12)
    model = SpikingClassifier(network(), T=T)
    found = measure(model.train(), x, y, 0)
    expected = measure(model.eval(), x, y, 0)
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "own"), [*((name, False) for name in MEASUREMENTS), *((name, True) for name in PROBES)]
)
def test_the_seed_decides_what_a_stochastic_encoder_draws(name, own):
    measure = MEASUREMENTS[name]
    x, y = labelled()
    model = SpikingClassifier(
        network(), T=T, encoder=PoissonEncoder(torch.Generator() if own else None)
    )
    first = measure(model, x, y, 1)
    torch.rand(3)
    assert measure(model, x, y, 1) == first
    assert measure(model, x, y, 2) != first


def test_an_attack_scores_the_same_beside_others_and_counts_are_those_of_the_loop(margins):
    x, y = labelled()
    model = SpikingClassifier(network(), T=T, encoder=PoissonEncoder())
    attacks = {"fgsm": partial(fgsm, eps=0.1)}
    noise = {"noise": partial(gaussian, std=0.1)}
    seeds = SampleSeeds(range(len(x)))
    counts, beside = (alone(model, x, y, more | attacks, seeds=seeds) for more in ({}, noise))
    assert counts["fgsm"] == beside["fgsm"]
    counts = alone(*margins, {"fgsm": partial(fgsm, eps=0.2)}, seeds=SampleSeeds(range(5)))
    assert counts == {"clean": 4, "fgsm": 2}  # within 0.2 of the border are two of the four


WRONG = [
    (lambda x, y: (x[:0], y[:0]), ValueError, "at least one image"),
    (lambda x, y: (x * 255, y), ValueError, r"must lie in \[0, 1\]"),
    (lambda x, y: (x - 1, y), ValueError, r"must lie in \[0, 1\]"),
    (lambda x, y: (x / 0, y), ValueError, "must be finite"),
    (lambda x, y: (x, y.float()), TypeError, "int64"),
]


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_wrong_images_and_labels(name):
    model = SpikingClassifier(network(), T=T)
    x, y = labelled(4)
    named = WRONG[:1] if name == "firing" else WRONG  # it takes any inputs and no labels
    for spoil, error, message in named:
        with pytest.raises(error, match=message):
            MEASUREMENTS[name](model, *spoil(x, y), 0)


class Centred(nn.Module):
    """Subtracts the mean image of the batch."""

    def forward(self, images):
        return (images - images.mean(0)).flatten(1)


class KeptTraining(nn.BatchNorm1d):
    """Normalises by the batch in evaluation mode, too."""

    def train(self, mode=True):
        return super().train(True)


class PerImage(nn.Module):
    """Divides every image by its largest value."""

    def forward(self, images):
        return images / images.amax(1, keepdim=True)


class Counts(nn.Module):
    """Draws as often as its images ask for."""

    def forward(self, images):
        return torch.poisson(5 * images.detach()) + images


@pytest.mark.parametrize(("layer", "draws"), [(PerImage(), 1), (Counts(), 10)])
@pytest.mark.parametrize("size", [1, 5])
def test_networks_that_answer_for_every_image_alone(layer, draws, size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 10))
    x, y = torch.rand(10, 1, 8, 8), torch.arange(10)
    data = Data.of(zip(x.split(size), y.split(size), strict=True))
    assert settled_draws(net, data, None) == draws


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.BatchNorm1d(64, track_running_stats=False), 8),
        (KeptTraining(64), 8),
        (Centred(), 8),
        (Centred(), 1),
    ],
)
def test_a_network_whose_rows_depend_on_each_other_is_refused(layer, size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 10))
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    message = "logits of an image depend on the other images of its batch"
    with pytest.raises(ValueError, match=message):
        evaluate(net, x, y, eps=0.1, suite="fast", batch_size=size, progress=False)
