"""Networks that draw random numbers: neither a lucky draw of the attack nor one of the network
decides.
"""

import warnings

import pytest
from evaluation.suite_run import THREAT, Net, batches, classifier, images

from sj_robust import SpikingClassifier
from sj_robust.classifier import PoissonEncoder
from sj_robust.evaluation import Member, ThreatModel, make_suite, run_suite
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.subject import Subject


def test_gradient_attacks_average_and_go_on():
    for name in ("fast", "standard", "gradients"):
        suite = make_suite(name, THREAT, classes=10, eot_samples=4)
        attacks = [
            member.attack
            for member in (*suite.members, *suite.control)
            if "square" not in member.name
        ]
        assert attacks
        assert all(attack.keywords["eot_samples"] == 4 for attack in attacks)
        assert not any(attack.keywords["keep_best"] for attack in attacks)
        plain = make_suite(name, THREAT, classes=10)
        assert not any("eot_samples" in member.attack.keywords for member in plain.members)
    paper = make_suite("paper", THREAT, classes=10, eot_samples=4).members
    assert {
        m.attack.keywords["eot_samples"] for m in paper if m.name.startswith(("pgd", "apgd"))
    } == {4}
    (whole,) = make_suite("autoattack", THREAT, classes=10, eot_samples=4).members
    assert whole.attack.keywords["version"] == "rand"
    events = make_suite("events", ThreatModel("L0", 5), classes=4, eot_samples=4).members
    assert all(m.attack.keywords["confidence"] > 0 for m in events if m.name.startswith("flips"))
    with pytest.raises(ValueError, match="eot_samples must be >= 1, got 0"):
        make_suite("fast", THREAT, classes=10, eot_samples=0)


@pytest.mark.slow
def test_a_network_that_draws_needs_several_draws():
    subject = Subject("mine", SpikingClassifier(Net(), 3, PoissonEncoder()), "one layer")
    options = {
        "suite": "fast",
        "threat": THREAT,
        "dataset": "noise",
        "classes": 3,
        "control": False,
    }
    with pytest.raises(ValueError, match=r"draws random numbers.*--draws 10"):
        assess(subject, batches(12, 12), **options)
    assert assess(subject, batches(12, 12), draws=3, **options).draws == 3


def test_averaging_finds_what_lasts():
    """An image that one lucky draw breaks is right again in the next; averaged gradients find ones
    that stay broken.
    """
    model, (x, y) = SpikingClassifier(Net(), 3, PoissonEncoder()), images(60)
    broken, threat = [], ThreatModel("Linf", 0.2)
    for samples in (1, 5):
        member = make_suite("fast", threat, classes=10, eot_samples=samples).members[0]
        outcome = run_suite(model, [(x, y)], [member], threat=threat, draws=5)
        broken.append(len(outcome.members[0].fooled))
    assert broken[1] > broken[0] + 5


def test_warnings_of_an_attack_are_kept(tmp_path):
    def loud(model, x, y, *, generator):
        warnings.warn(f"only {len(x)} images", UserWarning, stacklevel=1)
        return x

    for _ in range(2):  # the second time from the progress
        outcome = run_suite(
            classifier(), batches(6, 8), [Member("loud", loud)], threat=THREAT, folder=tmp_path
        )
        model = classifier()
        right = [int((model(x).argmax(1) == y).sum()) for x, y in batches(6, 8)]
        assert outcome.warnings == tuple(
            sorted({f"only {count} images" for count in right if count})
        )
        assert outcome.warnings
