"""How often an evaluation checks and hashes what it was given: counted, whatever the clock says."""

import sys
from collections import Counter

import pytest
from evaluation.short_suite import shortened
from evaluation.suite_run import classifier, images

import sj_robust
from sj_robust.core import checks
from sj_robust.evaluation.run import data as data_file


@pytest.fixture
def counts(monkeypatch):
    """Calls of checks and digests, each counted wherever the package has imported it."""
    found = Counter()

    def counted(function, name):
        def call(*arguments, **options):
            crafting = " while crafting" if checks.is_checked() else ""
            found[name + crafting] += 1
            return function(*arguments, **options)

        return call

    for name in ("check_images", "check_labels", "check_logits"):
        function = getattr(checks, name)
        for module in [*sys.modules.values()]:
            if getattr(module, name, None) is function:
                monkeypatch.setattr(module, name, counted(function, name))
    monkeypatch.setattr(data_file, "fingerprint", counted(data_file.fingerprint, "fingerprint"))
    return found


def count_forwards(model, found):
    def hook(module, inputs):
        found["forward while crafting" if checks.is_checked() else "forward"] += 1

    model.register_forward_pre_hook(hook)
    return model


def check_budgets(found, hashed):
    assert found["check_images"] <= 20
    assert found["check_images while crafting"] == found["check_labels while crafting"] == 0
    assert found["check_logits while crafting"] == 0
    assert found["check_logits"] <= found["forward"]
    assert found["forward while crafting"] > 0.5 * found["forward"]  # a copy judges as well
    assert found["fingerprint"] == hashed


def test_images_are_checked_and_hashed_once_and_logits_where_they_are_scored(counts):
    model = count_forwards(classifier(), counts)
    with shortened():
        sj_robust.evaluate(model, *images(8), eps=0.1, suite="fast", progress=False)
    check_budgets(counts, hashed=8 + 1)  # every image, and all of them together


def test_outside_an_evaluation_an_attack_checks_every_answer(counts):
    x, y = images(4)
    model = classifier().eval()
    sj_robust.attacks.pgd(model, x, y, eps=0.1, step_size=0.05, steps=3)
    assert counts["check_images"] == 1
    assert counts["check_logits"] == 5
    with pytest.raises(ValueError, match="logits must be finite"):
        sj_robust.attacks.pgd(lambda x: model(x) / 0, x, y, eps=0.1, step_size=0.05, steps=3)
