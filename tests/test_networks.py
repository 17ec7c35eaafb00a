"""Every network as people write it under every public call: it works, or the refusal names what
stands in its way; the network is left as it was.
"""

from dataclasses import replace

import pytest
import torch
from covering import mostly_slow
from evaluation.short_suite import short_suite, shortened
from networks_as_written import ROWS
from spikingjelly.activation_based import functional
from unchanged import unchanged

from sj_robust import SpikingClassifier, compare_potentials, evaluate, perturbation_gains, verify
from sj_robust.attacks import ThreatModel, flip_events, pgd
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.training import Objective

EPS = 0.01
NAMES = [name for name in ROWS if name != "SpikeDHS"]  # which returns a tuple
QUICK_OF_THE_ZOO = {"MSResNet", "Spikformer", "MNISTNet"}
QUICK_LOGITS = {name for name in NAMES if not ROWS[name].module} | QUICK_OF_THE_ZOO


def classifier_of(row):
    if row.frames:
        return SpikingEventClassifier(row.network(), row.T).eval()
    return SpikingClassifier(row.network(), row.T if row.given else None).eval()


def plain_call(row, net, x):
    """What the author of the network does with it."""
    functional.reset_net(net)
    if not row.given:
        outputs = net(x)
    else:
        frames = x.transpose(0, 1) if row.frames else x.expand(row.T, *x.shape)
        modes = {module.step_mode for module in net.modules() if hasattr(module, "step_mode")}
        outputs = torch.stack([net(one) for one in frames]) if modes == {"s"} else net(frames)
    return outputs.mean(0) if outputs.ndim == 3 else outputs


def logits(row, model, x, y):
    for batch in (x, x, x[: row.T]):  # nothing is left of an earlier call; N = T or less
        found = model(batch)
        assert torch.equal(found, plain_call(row, model.net, batch))
    assert model.convention.T == model.T == row.T
    assert (model.convention.takes == "images") == (not row.given)


def attack(row, model, x, y):
    with unchanged(model, hooked=(model.net,), states=False):
        if row.frames:
            x_adv = flip_events(model, x, y, eps=2, steps=2, queries=2, probes=1)
            assert (x_adv != x).flatten(1).sum(1).max() <= 2
        else:
            x_adv = pgd(model, x, y, eps=EPS, steps=2)
            assert (x_adv - x).abs().max() <= EPS


def one_of_each_kind(suite):
    """Its short attacks without their restarts, losses and further estimators."""
    suite = short_suite(suite)
    kinds = {member.attack.func: member for member in suite.members}
    search = suite.search and replace(suite.search, candidates=("atan:2",), steps=2, final_steps=2)
    return replace(suite, members=tuple(kinds.values()), control=(), search=search)


def judged(row, model, x, y):
    eps, suite = (2, "events") if row.frames else (EPS, "fast")
    with unchanged(model, hooked=(model.net,), states=False), shortened(one_of_each_kind):
        report = evaluate(model, x, y, eps=eps, suite=suite, progress=False)
    assert report.clean.correct == len(y)


def monitored(row, model, x, y):
    x_perturbed = 1 - x if row.frames else (x + 0.05).clamp(max=1)
    with unchanged(model, hooked=(model.net,), states=False):
        stats = compare_potentials(model, x, x_perturbed)
    assert all(layer.samples == len(x) for layer in stats.values())


def certified(row, model, x, y):
    found = perturbation_gains(model, x, max_iterations=5)
    assert found.layers


def proved(row, model, x, y):
    eps, norm = (1, "L0") if row.frames else (1e-4, "Linf")
    with unchanged(model, hooked=(model.net,), states=False):
        found = verify(model, x, y, ThreatModel(norm, eps), method="ibp")
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    moved = x if row.frames else (x + eps * (2 * noise - 1)).clamp(0, 1)
    kept = model(moved).argmax(1) == y
    assert kept[list(found.verified)].all()


def trained(row, model, x, y):
    model.train()
    losses = Objective(model, rho=0.0)(x, y, x)
    losses.total.backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in model.parameters())


CALLS = {
    call.__name__: call for call in (logits, attack, judged, monitored, certified, proved, trained)
}
REFUSES = (NotImplementedError, ValueError, RuntimeError)
WITHOUT_GRADIENT = {"OTTTSpikingVGG"}
"""No gradient reaches their images; every other network can be attacked."""
EACH_CONVENTION = {
    "image repeated, mean over time",
    "loop over steps, mean",
    "single steps",
    "sequence, mean over time by a hook",
    "spikes fed back",
    "neurons written by hand, in a loop",
    "MSResNet",
}
OF_THE_ZOO = ("logits", "attack", "monitored")


def is_tried(name, call):
    """The study of supported networks makes the other calls; an evaluation takes seconds, and is
    made of one network for each convention, and of one with attention.
    """
    if name.startswith("SpikeDHS"):  # the largest
        return call == "logits"
    if call == "judged":
        return name in EACH_CONVENTION - {"MSResNet"} or name == "Spikformer"
    return call in OF_THE_ZOO or name in QUICK_OF_THE_ZOO or not ROWS[name].module


CASES = [(name, call) for name in NAMES for call in CALLS if is_tried(name, call)]
QUICK = [
    (name, call)
    for name, call in CASES
    if name in EACH_CONVENTION or (call == "logits" and name in QUICK_LOGITS)
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "call"), mostly_slow(CASES, quick=QUICK))
def test_a_call_works_or_says_what_stands_in_its_way(name, call):
    row = ROWS[name]
    model = classifier_of(row)
    x = row.images(3)
    with torch.no_grad():
        y = model(x).argmax(1)
    try:
        CALLS[call](row, model, x, y)
        return
    except REFUSES as error:
        refused = str(error)
    assert call != "logits", refused
    if call == "attack":
        assert name in WITHOUT_GRADIENT, refused
        assert "no gradient reaches the images" in refused
        return
    modules = {path: type(module).__name__ for path, module in model.net.named_modules() if path}
    assert any(part in refused for part in {*modules.values(), *modules}), refused
