"""Proofs in an evaluation: what they spare the attacks, the bracket, and the stop where proof and
attack contradict.
"""

import io
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from evaluation.reports import report
from evaluation.short_suite import shortened
from evaluation.suite_run import EPS, Net, batches, classifier, run
from rich.console import Console

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel, gaussian, pgd
from sj_robust.classifier import PoissonEncoder
from sj_robust.evaluation import Member
from sj_robust.evaluation import assess as assessment
from sj_robust.evaluation.comparison import compare_reports
from sj_robust.evaluation.drawings import plot_robustness, robustness_figures
from sj_robust.evaluation.html import to_html
from sj_robust.evaluation.proofs import prove
from sj_robust.evaluation.robustness_report import RobustnessReport
from sj_robust.evaluation.subject import Subject
from sj_robust.evaluation.terminal import show_report
from sj_robust.proofs import verify

pytestmark = pytest.mark.slow
SMALL = 0.01


def assess(model=None, *, norm="Linf", change=None, **options):
    subject = Subject("mine", (model or classifier()).eval(), "one layer")
    options = {"suite": "fast", "control": False} | options
    with shortened(change):
        return assessment.assess(
            subject,
            batches(),
            threat=ThreatModel(norm, SMALL),
            dataset="made up",
            classes=3,
            **options,
        )


def first_attack(suite):
    return replace(suite, members=suite.members[:1], control=())


@pytest.fixture(scope="module")
def proved():
    return assess(control=True)


def test_images_and_bounds_of_the_potential_are_those_of_verify_over_the_batches(proved):
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    result = verify(classifier().eval(), x, y, SMALL)
    assert proved.verified == tuple(number for number, one in enumerate(result.verified) if one)
    assert 0 < len(proved.verified) < len(proved.labels)
    assert prove(classifier().eval(), batches(7), [SMALL]).verified == {"0.01": proved.verified}
    *measured, bound = proved.potential
    assert bound["layers"]["net.parts.1"] == pytest.approx(result.layers[0].potential)
    assert (bound["member"], bound["samples"]) == ("bound of all", 20)
    assert {tuple(row["layers"]) for row in (*measured, bound)} == {("net.parts.1",)}


def test_without_control_the_worst_case_is_the_same_and_everything(proved):
    alone = assess()
    assert [member.group for member in alone.members] == ["suite"] * len(alone.members)
    assert alone.control is None
    assert alone.worst_case.correct == alone.everything.correct == proved.worst_case.correct
    assert len(proved.members) == 2 * len(alone.members)


def test_attacks_leave_verified_images_out_and_come_to_the_same_result(proved):
    plain = assess(proofs=False, control=True)
    assert plain.verified is plain.bracket is None
    first, *others = proved.members
    assert all(set(member.attacked).isdisjoint(proved.verified) for member in others)
    assert set(first.attacked) >= set(proved.verified)  # a false proof would show there
    assert any(set(member.attacked) & set(proved.verified) for member in plain.members)
    for one in plain.accuracies:
        assert proved.standing(one.name) == plain.standing(one.name)


def test_members_beyond_the_threat_attack_verified_images_too():
    def step(eps):
        return partial(pgd, eps=eps, step_size=eps / 3, steps=2)

    suite = [
        Member("noise", partial(gaussian, std=EPS), group=""),
        Member("first", step(EPS / 2), threat=ThreatModel("Linf", EPS / 2)),
        Member("near", step(EPS / 2), seed=1, threat=ThreatModel("Linf", EPS / 2)),
        Member("far", step(2 * EPS), group="", threat=ThreatModel("Linf", 2 * EPS)),
    ]
    outcome = run(suite=suite, verified=range(20))
    assert [member.attacked for member in outcome.members] == [
        *[outcome.correct] * 2,
        (),
        outcome.correct,
    ]


def test_the_bracket_and_what_is_undecided(proved):
    low, high = proved.bracket
    assert (low.kind, low.correct, high) == ("verified", len(proved.verified), proved.everything)
    assert low.correct <= high.correct
    assert proved.undecided == proved.standing("everything") - set(proved.verified)
    assert proved.accuracies[-1] == low
    assert low.seconds > 0
    rows = {row["eps"]: row["verified"] for row in proved.verified_over_eps}
    assert list(rows) == [row["eps"] for row in proved.over_eps]
    assert rows["0"] == proved.clean.correct
    assert rows["0.01"] == low.correct
    assert list(rows.values()) == sorted(rows.values(), reverse=True)


def test_it_is_saved_shown_compared_and_drawn(proved, tmp_path):
    assert RobustnessReport.from_json(proved.to_json()) == proved
    content = json.loads(proved.to_json())
    content["verified"] = content["verified"][:-1]
    with pytest.raises(ValueError, match="figures of the report does not follow from its outcomes"):
        RobustnessReport.from_json(json.dumps(content))
    console = Console(file=io.StringIO(), width=120)
    show_report(proved, console)
    assert "verified" in console.file.getvalue()
    assert "proved: robust accuracy at least (verified)" in to_html(proved)
    assert "| verified |" in compare_reports(proved, proved).table()
    labels = robustness_figures(proved)["accuracy_over_eps"].axes[0].get_legend_handles_labels()[1]
    assert "verified" in labels
    assert (tmp_path / "accuracy_over_eps.png") in plot_robustness(proved, tmp_path)


def test_a_verified_image_that_an_attack_breaks_stops_the_report():
    message = (
        r"image 2 is verified at eps 0\.1 and broken by 'apgd_ce/atan:4/r1': "
        "proof or attack has a bug"
    )
    with pytest.raises(ValueError, match=message):
        report(verified=(2, 5))
    assert report(verified=(7,)).verified == (7,)  # only noise beyond the threat turns it
    with pytest.raises(ValueError, match="among those classified right"):
        report(verified=(9,))


def test_a_false_proof_is_found_by_the_attack_over_eps(monkeypatch):
    def everything(model, data, radii):
        result = prove(model, data, radii)
        return replace(result, verified=dict.fromkeys(result.verified, result.verified["0.01"]))

    monkeypatch.setattr(assessment, "prove", everything)
    with pytest.raises(ValueError, match=r"is verified at eps 0\.03 and broken by 'apgd20@"):
        assess()


def test_a_network_or_norm_without_bounds_is_attacked_alone_and_the_report_says_why():
    made = assess(
        SpikingClassifier(Net(), T=3, encoder=PoissonEncoder()), draws=2, change=first_attack
    )
    assert made.verified is None
    assert made.verified_over_eps == ()
    (text,) = [text for text in made.warnings if text.startswith("Nothing is proved: ")]
    assert "PoissonEncoder" in text
    assert assess(norm="L2", change=first_attack).verified is None


def test_a_stopped_evaluation_goes_on_with_its_proofs(tmp_path, monkeypatch):
    whole = assess(folder=tmp_path, suite="paper")
    monkeypatch.setattr(assessment, "prove", lambda *_: pytest.fail("proved again"))
    again = assess(folder=tmp_path, suite="paper")
    assert again.verified == whole.verified
    assert again.verified_over_eps == whole.verified_over_eps
