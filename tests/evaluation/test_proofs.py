"""Proofs in an evaluation: what they spare the attacks, the bracket, and the stop where proof and
attack contradict.
"""

import io
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from evaluation.reports import LINF, clean, member, over_eps, proof, report
from evaluation.short_suite import shortened
from evaluation.suite_run import EPS, Net, batches, classifier, outcome_of
from rich.console import Console

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel, gaussian, pgd
from sj_robust.classifier import PoissonEncoder
from sj_robust.evaluation import Member, Report, compare_reports
from sj_robust.evaluation import assess as assessment
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.result import OVER_EPS
from sj_robust.evaluation.run.proofs import prove
from sj_robust.evaluation.subject import Subject
from sj_robust.proofs import verify
from sj_robust.proofs.soundness import UnprovableError

SMALL = 0.01
slow = pytest.mark.slow


def assess(model=None, *, norm="Linf", change=None, suite="fast", **options):
    subject = Subject("mine", (model or classifier()).eval(), "one layer")
    options = {"classes": 3, "control": False} | options
    with shortened(change):
        request = Request(suite, ThreatModel(norm, SMALL), "made up", **options)
        return assessment.assess(subject, batches(), request)


def first_attack(suite):
    return replace(suite, members=suite.members[:1], control=(), plain=(), search=None)


@pytest.fixture(scope="module")
def proved():
    return assess(control=True)


@slow
def test_images_and_bounds_of_the_potential_are_those_of_verify_over_the_batches(proved):
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    result = verify(classifier().eval(), x, y, SMALL)
    verified = tuple(number for number, one in enumerate(result.verified) if one)
    assert proved.standing("verified") == set(verified)
    assert 0 < len(verified) < len(proved.labels)
    assert prove(classifier().eval(), batches(7), [SMALL]).verified == {"0.01": verified}
    *measured, bound = proved.potential
    assert bound["layers"]["net.parts.1"] == pytest.approx(result.layers[0].potential)
    assert (bound["member"], bound["samples"]) == ("bound of all", 20)
    found = {tuple(row["layers"]) for row in (*measured, bound)}
    assert found == {("net.parts.1",)}


@slow
def test_without_control_the_worst_case_is_the_same_and_everything(proved):
    alone = assess(checks=False)
    assert {row.kind for row in alone.attacks} == {"attack"}
    assert alone.control is None
    assert alone.worst_case.correct == alone.everything.correct == proved.worst_case.correct
    assert len(proved.attacks) == 2 * len(alone.attacks)


@slow
def test_attacks_leave_verified_images_out_and_come_to_the_same_result(proved):
    plain = assess(proofs=False, control=True, checks=False)
    assert plain.verified is plain.bracket is None
    verified = proved.standing("verified")
    first, *others = proved.attacks
    for row in others:
        assert verified.isdisjoint(row.seen)
    assert verified <= set(first.seen)  # a false proof would show there
    assert any(verified.intersection(row.seen) for row in plain.attacks)
    for one in plain.accuracies:
        assert proved.standing(one.name) == plain.standing(one.name)


def test_members_beyond_the_threat_attack_verified_images_too():
    def step(eps):
        return partial(pgd, eps=eps, step_size=eps / 3, steps=2)

    half = ThreatModel("Linf", EPS / 2)
    suite = [
        Member("noise", partial(gaussian, std=EPS), group=""),
        Member("first", step(EPS / 2), threat=half),
        Member("near", step(EPS / 2), seed=1, threat=half),
        Member("far", step(2 * EPS), group="", threat=ThreatModel("Linf", 2 * EPS)),
    ]
    clean, *attacks = outcome_of(suite=suite, verified=range(20)).rows
    right = tuple(sorted(clean.stood))
    assert [row.seen for row in attacks] == [right, right, (), right]


@slow
def test_the_bracket_and_what_is_undecided(proved):
    low, high = proved.bracket
    verified = proved.standing("verified")
    expected = ("verified", len(verified), proved.everything)
    assert (low.kind, low.correct, high) == expected
    assert low.correct <= high.correct
    assert proved.undecided == proved.standing("everything") - verified
    assert proved.accuracies[-1] == low
    assert low.seconds > 0
    points = {point.eps: point.verified.correct for point in proved.over_eps}
    assert points["0"] == proved.clean.correct
    assert points["0.01"] == low.correct
    expected = sorted(points.values(), reverse=True)
    assert list(points.values()) == expected


@slow
def test_it_is_saved_shown_compared_and_drawn(proved, tmp_path):
    assert Report.from_json(proved.to_json()) == proved
    content = json.loads(proved.to_json())
    row = next(row for row in content["rows"] if row["kind"] == "proof")
    row["fell"] = row["fell"][:-1]
    # The image that the row now verifies may be one that an attack of the report breaks.
    refused = (
        "does not follow from its rows|among those classified|"
        "is verified at eps .* and broken by .*: proof or attack has a bug"
    )
    with pytest.raises(ValueError, match=refused):
        Report.from_json(json.dumps(content))
    console = Console(file=io.StringIO(), width=120)
    proved.show(console)
    assert "verified" in console.file.getvalue()
    assert "proved correct: lower bound of robust accuracy" in proved.page()
    assert "| verified |" in compare_reports(proved, proved).table()
    labels = proved.figures()["accuracy_over_eps"].axes[0].get_legend_handles_labels()[1]
    assert "verified" in labels
    assert "accuracy_over_eps.png" in proved.write(tmp_path)


def test_a_verified_image_that_an_attack_breaks_stops_the_report():
    message = (
        r"image 2 is verified at eps 0\.1 and broken by 'apgd_ce/atan:4/r1': "
        "proof or attack has a bug"
    )
    with pytest.raises(ValueError, match=message):
        report(verified=(2, 5))
    assert report(verified=(7,)).standing("verified") == {7}  # only noise beyond the threat
    with pytest.raises(ValueError, match="among those classified correctly"):
        report(verified=(9,))
    curve = over_eps()  # leaves image 5 at 0.05, and not at 0.1
    at_level = partial(proof, (5,), variant=OVER_EPS)
    assert report(curve=(*curve, at_level(eps=0.05)))
    with pytest.raises(ValueError, match=r"5 is verified at eps 0\.1 and broken by 'apgd20@0\.1'"):
        report(curve=(*curve, at_level(eps=0.1)))
    assert report(curve=(*curve, at_level(eps=0.1, alpha=0.01))).contradicted == (5,)


@slow
def test_a_false_proof_is_found_by_the_attack_over_eps(monkeypatch):
    def everything(*arguments):
        result = prove(*arguments)
        return replace(result, verified=dict.fromkeys(result.verified, result.verified["0.01"]))

    monkeypatch.setattr(assessment, "prove", everything)
    with pytest.raises(ValueError, match=r"is verified at eps 0\.03 and broken by 'apgd20@"):
        assess(change=first_attack)


@slow
def test_in_a_norm_without_bounds_there_are_attacks_alone():
    made = assess(norm="L2", change=first_attack, checks=False, radii=(SMALL,))
    assert {made.verified, *(point.verified for point in made.over_eps)} == {None}


@slow
def test_a_stopped_evaluation_goes_on_with_its_proofs(tmp_path, monkeypatch):
    whole = assess(folder=tmp_path, change=first_attack)
    monkeypatch.setattr(assessment, "prove", lambda *_: pytest.fail("proved again"))
    again = assess(folder=tmp_path, change=first_attack)
    assert again.rows == whole.rows
    assert whole.over_eps[0].verified.total == 20


class Drawing(Net):
    """One whose current holds noise."""

    def forward(self, x_seq):
        return super().forward(x_seq + 0.5 * torch.rand_like(x_seq))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (torch.nn.Linear(4, 3), "model must be a SpikingClassifier, got Linear"),
        (classifier().eval().double(), "model and images must be in float32"),
        (SpikingClassifier(Drawing(), T=3).eval(), "the same logits in every forward"),
    ],
)
def test_a_network_of_which_nothing_can_be_proved_has_an_error_of_its_own(model, reason):
    with pytest.raises(UnprovableError, match=reason):
        prove(model, batches(), [SMALL])


@pytest.mark.parametrize(
    ("stand_in", "error"),
    [(lambda model: None, TypeError), (lambda *_: int("no number"), ValueError)],
)
def test_a_mistake_of_ours_is_not_taken_for_a_network_without_bounds(monkeypatch, stand_in, error):
    monkeypatch.setattr(assessment, "prove", stand_in)
    with pytest.raises(error):
        assess(change=first_attack)


@slow
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)), "a SpikingClassifier"),
        (SpikingClassifier(Drawing(), T=3), "the same logits in every forward"),
        (SpikingClassifier(Net(), T=3, encoder=PoissonEncoder()), "PoissonEncoder"),
    ],
)
def test_what_is_not_proved_is_attacked_alone_and_the_report_says_why(model, reason):
    made = assess(model, draws=2, change=first_attack, checks=False)
    assert made.verified is None
    (text,) = [text for text in made.warnings if text.startswith("Nothing could be proved: ")]
    assert reason in text


def test_what_is_not_proved_beyond_the_radius_ends_no_evaluation(monkeypatch):
    def stand_in(model, data, radii, threat):
        if max(radii) > SMALL:
            raise UnprovableError("other time steps there")
        return prove(model, data, radii, threat)

    monkeypatch.setattr(assessment, "prove", stand_in)
    made = assess(change=first_attack)
    assert made.verified is not None
    assert any("over eps: other time steps there" in text for text in made.warnings)


MOVES = ThreatModel("moves", 3, largest_shift=1, total_shift=4)


@pytest.mark.parametrize(
    ("proved", "attacked", "contradict"),
    [
        (LINF, LINF, True),
        (LINF, ThreatModel("Linf", 0.05), True),
        (LINF, ThreatModel("Linf", 0.2), False),
        (ThreatModel("L2", 0.1), ThreatModel("Linf", 0.05), False),
        (MOVES, replace(MOVES, eps=2), True),
        (MOVES, replace(MOVES, largest_shift=None), False),
        (MOVES, replace(MOVES, total_shift=5), False),
        (MOVES, replace(MOVES, counts=True), False),
        (replace(MOVES, largest_shift=None), MOVES, True),
        (ThreatModel("L0", 3), MOVES, False),
    ],
)
def test_only_an_attack_within_the_ball_of_a_proof_contradicts_it(proved, attacked, contradict):
    rows = [clean(), member("attack", (1,), threat=attacked)]
    certified = replace(proof((1,)), threat=proved)
    for threat in (None, proved):
        unsure = report(rows=[*rows, replace(certified, alpha=0.01)], threat=threat)
        assert unsure.contradicted == ((1,) if contradict else ())
        refused = pytest.raises(ValueError, match="proof or attack has a bug")
        with refused if contradict else nullcontext():
            report(rows=[*rows, certified], threat=threat)


@pytest.mark.parametrize(
    ("attacked", "proved", "contradict"),
    [(0.1, 0.1, False), (0.05, 0.1, False), (0.1, 0.2, False), (0.2, 0.2, True)],
)
def test_an_image_beyond_the_threat_of_its_own_attack_contradicts_no_proof(
    attacked, proved, contradict
):
    """An attack at 0.2 may exceed the threat of the report, here 0.1."""
    attack = member("own", (1, 2), eps=attacked, outside=(1, 2), largest=0.3)
    rows = (clean(), attack, proof((1, 3), eps=proved))
    if contradict:
        with pytest.raises(ValueError, match="proof or attack has a bug"):
            report(rows=rows)
        return
    made = report(rows=rows)
    assert made.contradicted == ()
    assert [one.correct for one in made.bracket_at(proved)] == [2, 8]
