"""A foreign report on its way into the leaderboard: what is checked, taken and refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation.reports import member, proof, report
from lab.evaluating import read_once
from lab.leaderboard.again import compared, evaluated_again, shuffled
from lab.leaderboard.check import checklist, refusing
from lab.leaderboard.submission import check_report, take
from lab.leaderboard.tables import make_leaderboard
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.environment import environment
from sj_robust.data import image_loader, load_images
from sj_robust.defences import SmoothingEncoder
from sj_robust.evaluation import Report
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.subject import Subject, from_checkpoint
from sj_robust.models import pretrained
from sj_robust.models.shipped import pretrained_file

THREAT = ThreatModel("Linf", 0.1)
SHIPPED = Path(__file__).parents[2] / "docs" / "results" / "leaderboard" / "dlif-at.json"


def marks(checks):
    """By the first word of each check whether it passed."""
    return {check.text.partition(":")[0]: check.passed for check in checks}


@pytest.fixture(scope="module")
def quick():
    """The report of a quick check of a shipped network."""
    shipped = from_checkpoint(pretrained_file("digits/dlif-at"))
    images = load_images("digits", test_limit=64).test
    asked = Request("fast", THREAT, "digits", 10, proofs=False, control=False, checks=False)
    found = assess(shipped, image_loader(images, 64), asked)
    return replace(found, configuration={"checkpoint": "digits/dlif-at"})


@pytest.fixture
def saved(tmp_path):
    """A function that writes a report and returns its path."""

    def save(one, name="report.json"):
        one.save(tmp_path / name)
        return tmp_path / name

    return save


def test_a_report_of_a_shipped_network_is_attacked_again_and_taken(saved, tmp_path, quick):
    given = saved(quick)
    checks = check_report(given)
    found = marks(checks)
    for point in ("schema", "suite", "bracket", "budget", "images", "clean predictions", "members"):
        assert found[point] is True, checklist(checks)
    assert found["attack again"] is True
    assert check_report(given) == checks
    path = take(given, checks, tmp_path / "board")
    assert path.name == "digits-dlif-at-Linf-0.1-fast.json"
    assert path.read_bytes() == given.read_bytes()
    assert take(given, checks, tmp_path / "board") == path
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds another report of this name; give the network a"):
        take(given, checks, tmp_path / "board")


def test_another_network_than_the_reports_is_found(tmp_path):
    other = from_checkpoint(Path("digits/lif"))
    right = SHIPPED.with_name("dlif-certified.json")
    checks = check_report(right, other)
    found = marks(checks)
    assert found["network"] is None  # another commit
    assert found["T, number of parameters, neurons"] is False
    assert found["clean predictions"] is False
    assert found["attack again"] is None
    with pytest.raises(ValueError, match=r"is refused: .*clean predictions: \d+ of \d+ as the"):
        take(right, checks, tmp_path)
    alike = from_checkpoint(pretrained_file("digits/dlif-at-mppd"))
    checks = check_report(SHIPPED, alike)
    assert marks(checks)["T, number of parameters, neurons"] is True
    here = tmp_path / "here.json"
    replace(Report.load(SHIPPED), environment=environment()).save(here)
    assert marks(check_report(here, alike))["network"] is False
    assert pretrained("digits/lif").T > 0


def test_the_network_of_the_package_is_taken_and_no_folder_of_its_name(
    saved, quick, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    other = pretrained_file("digits/lif").read_bytes()
    (tmp_path / "digits" / "dlif-at").write_bytes(other)
    assert quick.configuration["checkpoint"] == "digits/dlif-at"
    found = marks(check_report(saved(quick)))
    assert found["clean predictions"] is True
    assert found["attack again"] is True


def test_a_network_at_another_number_of_time_steps_is_the_reports(saved):
    shipped = from_checkpoint(pretrained_file("digits/lif"), T=2)
    images = load_images("digits", test_limit=50).test
    threat = ThreatModel("Linf", 0.1)
    asked = Request("fast", threat, "digits", 10, proofs=False, control=False, checks=False)
    one = assess(shipped, image_loader(images, 50), asked)
    one = replace(one, configuration={"checkpoint": "digits/lif", "T": 2})
    checks = check_report(saved(one))
    assert marks(checks)["network"] is True, checklist(checks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"configuration": {"checkpoint": ["a"]}}, "must be text, got ['a']; evaluate"),
        ({"name": "digits/lif", "network": {"T": "two"}}, "T must be an integer >= 1, got 'two'"),
    ],
)
def test_a_network_that_is_named_wrongly_is_a_failed_check(saved, change, said):
    *_, last = check_report(saved(replace(Report.load(SHIPPED), **{"configuration": {}} | change)))
    assert last.passed is False
    assert said in last.text


@pytest.mark.parametrize(
    ("change", "point"),
    [
        (lambda one: replace(one, data="0" * 16), "images"),
        (lambda one: replace(one, suite="stress"), "suite"),
        (lambda one: replace(one, rows=(*one.rows[:1], beyond(one.rows[1]))), "budget"),
        (lambda one: replace(one, network={}), "fingerprint of the network is in the report"),
        (lambda one: replace(one, rows=one.rows[:1]), "attacks"),
        (lambda one: replace(one, rows=[at_another_radius(row) for row in one.rows]), "attacks"),
        (lambda one: replace(one, name=5), "schema"),
        (lambda one: replace(one, name="\n"), "schema"),
        (lambda one: replace(one, environment=["x"]), "schema"),
        (lambda one: replace(one, draws=0), "schema"),
        (lambda one: replace(one, data=5), "schema"),
        (lambda one: replace(one, network=one.network | {"layers": [1]}), "schema"),
        (lambda one: replace(one, rows=[replace(row, seconds=-1) for row in one.rows]), "schema"),
    ],
)
def test_what_contradicts_is_refused(saved, tmp_path, change, point):
    path = saved(change(Report.load(SHIPPED)))
    checks = check_report(path)
    assert point in [check.text.partition(":")[0] for check in refusing(checks)]
    assert "- [ ] " in checklist(checks)
    with pytest.raises(ValueError, match="is refused: "):
        take(path, checks, tmp_path / "board")
    assert not (tmp_path / "board").exists()


def beyond(row):
    """The row of an attack that left its ball without saying so."""
    return replace(row, largest=2 * row.largest)


def at_another_radius(row):
    if row.attacks and not row.variant:
        return replace(row, threat=ThreatModel("Linf", 1e-9))
    return row


def test_a_proof_of_what_falls_is_refused(saved):
    shipped = Report.load(SHIPPED)
    clean, *rows = shipped.of(shipped.main)
    untried = {"seen": (), "fell": (), "outside": (), "largest": 0.0}
    rows = [replace(row, **untried) if row.attacks else row for row in rows]
    (all_proved,) = (row for row in rows if row.kind == "proof")
    rows[rows.index(all_proved)] = replace(all_proved, fell=clean.fell)
    rows.insert(0, clean)
    checks = check_report(saved(replace(shipped, rows=rows)))
    found = marks(checks)
    assert found["attacks"] is True
    assert found["bracket"] is True
    assert found["attack again"] is False
    assert "of them proved" in checklist(checks)
    assert found["proofs again"] is False


def forged(honest, images, digests=True):
    """The report with rows by which attacks have not broken some images."""
    rows = []
    later = set()
    for row in honest.rows:
        if row.attacks:
            fell = [number for number in row.fell if number not in images]
            kept = [place for place, number in enumerate(row.fell) if number in fell]
            parts = [row.digests[8 * place : 8 * place + 8] for place in kept]
            seen = sorted(later.union(row.seen))
            later |= images.intersection(row.fell)
            told = "".join(parts) if digests else ""
            row = replace(row, seen=seen, fell=fell, outside=(), digests=told)
        rows.append(row)
    return replace(honest, rows=rows)


@pytest.mark.parametrize(("last", "digests"), [(True, True), (False, True), (False, False)])
def test_images_that_are_said_to_stand_are_attacked_again(saved, quick, last, digests):
    """Five points more than were found, whichever attack broke the images."""
    broken = [number for row in quick.attacks for number in row.fell]
    images = set(broken[-4:] if last else broken[:4])
    one = forged(quick, images, digests)
    assert one.everything.correct == quick.everything.correct + 4
    checks = check_report(saved(one), secret=b"of a test")
    assert [check.text.partition(":")[0] for check in refusing(checks)] == ["attack again"]


def test_an_attack_of_the_suite_that_is_missing_is_named(saved, quick):
    few = replace(quick, rows=[row for row in quick.rows if "spike_search" not in row.member])
    (check,) = refusing(check_report(saved(few)))
    assert "missing: spike_search/training/r0" in check.text


def test_which_images_are_attacked_again_follows_from_outcomes_and_the_secret(quick):
    order = shuffled(range(64), quick, b"1")
    assert sorted(order) == list(range(64))
    assert (
        shuffled(range(64), replace(quick, name="another", warnings=("free text",)), b"1") == order
    )
    assert shuffled(range(64), quick, b"2") != order
    assert shuffled(range(64), forged(quick, {quick.attacks[0].fell[0]}), b"1") != order


def test_no_proof_of_a_suite_may_err(saved, tmp_path):
    """A proof that may be wrong could cover what the attacks of its report break."""
    shipped = Report.load(SHIPPED)
    broken = shipped.standing("clean") - shipped.standing("everything")
    (all_proved,) = (row for row in shipped.of(shipped.main) if row.kind == "proof")
    left = sorted(set(all_proved.seen) - broken)
    rows = [row for row in shipped.rows if row is not all_proved]
    forged = replace(shipped, rows=(*rows, replace(all_proved, fell=left, alpha=0.001)))
    (check,) = check_report(saved(forged))
    assert "alpha of verify must be 0, as the proofs of a suite never err, got 0.001" in check.text
    with pytest.raises(ValueError, match=r"report.json: alpha of verify must be 0"):
        make_leaderboard([str(tmp_path)], tmp_path / "board", {})


def test_what_was_not_measured_is_no_good_sign(saved, quick):
    path = saved(replace(quick, firing=(), findings=()))
    found = marks(check_report(path))
    assert found["network alive"] is None
    assert found["signs of gradient masking"] is None


def test_reports_that_contradict_the_board_are_refused(saved, tmp_path):
    one = report(name="mine", verified=(4, 5))
    take(saved(one), [], tmp_path / "board")
    other = replace(report(name="mine", members=(member("pgd", (5,)),)), suite="standard")
    path = saved(other, "other.json")
    message = r"about the same network, and one proves 1 images that the other breaks, .* image 5"
    with pytest.raises(ValueError, match=message):
        take(path, [], tmp_path / "board")
    another = replace(other, network=other.network | {"fingerprint": "another"})
    take(saved(another, "other.json"), [], tmp_path / "board")


@pytest.mark.parametrize("names", [("脉冲", "网络"), ("net_a", "net a"), ("n" * 300, "n" * 299)])
def test_networks_have_files_of_their_own(saved, tmp_path, names):
    taken = {take(saved(report(name=name)), [], tmp_path / "board") for name in names}
    assert len(taken) == 2


def event_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(200, 10), neuron.IFNode(step_mode="m"))
    return Subject("mine", SpikingEventClassifier(net, T=4).eval(), "linear")


def test_event_frames_and_their_network_are_checked(saved):
    data = read_once(load_images("saccade:digits", T=4, test_limit=50).test, 50)
    subject = event_network()
    threat = ThreatModel("L0", 2)
    asked = Request("events", threat, "saccade:digits", 10, proofs=False, control=False)
    path = saved(assess(subject, data, replace(asked, checks=False)))
    found = marks(check_report(path, subject))
    points = ("images", "network", "T, number of parameters, neurons", "clean predictions")
    assert [found[point] for point in points] == [True] * 4
    assert found["attack again"] is None  # it guesses
    again = marks(evaluated_again(Report.load(path), subject, data))
    assert again == {"members": True, "attack again": True}
    without = marks(check_report(path))
    assert without["images"] is None
    other = check_report(path, from_checkpoint(Path("digits/lif")))
    assert "it does not take the images of the report" in checklist(other)


def test_names_of_modules_are_those_of_a_release(saved, quick):
    layers = [row | {"layer": f"net.{i}"} for i, row in enumerate(quick.network["layers"])]
    older = replace(quick, network=quick.network | {"layers": layers})
    checks = check_report(saved(older))
    assert marks(checks)["T, number of parameters, neurons"] is True, checklist(checks)


@pytest.mark.parametrize(
    ("draws", "wrong", "passed"), [(1, 10, True), (1, 12, False), (5, 12, False)]
)
def test_few_clean_predictions_may_differ(draws, wrong, passed):
    shipped = Report.load(SHIPPED)
    clean, *rows = shipped.rows
    more = sorted(set(clean.seen) - set(clean.fell))[:wrong]
    clean = replace(clean, fell=sorted({*clean.fell, *more}))
    rows = [clean, *(without_images(row, more) for row in rows)]
    network = from_checkpoint(pretrained_file("digits/dlif-at"))
    data = read_once(load_images("digits").test, 360)
    found = marks(compared(replace(shipped, rows=rows, draws=draws), network, data))
    assert found["clean predictions"] is passed


@pytest.mark.parametrize(("draws", "passed"), [(1, False), (9, False), (10, True)])
def test_whether_a_network_draws_is_seen_and_not_believed(draws, passed):
    trained = pretrained("digits/lif")
    model = SpikingClassifier(trained.net, T=trained.T, encoder=SmoothingEncoder(0.2))
    subject = Subject("mine", model.eval(), "with noise")
    data = read_once(load_images("digits", test_limit=50).test, 50)
    one = replace(report(right=range(41), total=50), draws=draws)
    found = marks(list(compared(one, subject, data)))
    assert found["draws"] is passed
    assert found["clean predictions"] is True


def test_a_network_that_carries_state_is_a_failed_check():
    trained = pretrained("digits/lif")

    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return trained(x) * (-1) ** self.calls

    data = read_once(load_images("digits", test_limit=50).test, 50)
    *_, last = compared(report(total=50), Subject("mine", Counting(), "counting"), data)
    assert last.passed is False
    assert "carries state from one forward into the next" in last.text


@pytest.mark.parametrize("error", [TypeError, AssertionError, IndexError, KeyError])
def test_a_network_that_fails_is_a_failed_check(saved, error):
    class Failing(nn.Module):
        def forward(self, x):
            raise error("not these")

    *_, last = check_report(saved(Report.load(SHIPPED)), Subject("mine", Failing(), "none"))
    assert last.passed is False
    assert f"it does not take the images of the report ({error.__name__}: " in last.text


@pytest.mark.parametrize("fails", [lambda x: len(x) > 20, lambda x: x.requires_grad])
def test_a_network_that_fails_later_is_one_too(saved, fails):
    trained = pretrained("digits/dlif-at")

    class Failing(nn.Module):
        def forward(self, x):
            assert not fails(x)
            return trained(x)

    *_, last = check_report(saved(Report.load(SHIPPED)), Subject("mine", Failing(), "none"))
    assert last.passed is False
    assert "it cannot be evaluated (AssertionError: " in last.text


def without_images(row, numbers):
    """A row that was not run on some images, of the main variant."""
    if row.variant:
        return row
    seen, fell = (sorted(set(part) - set(numbers)) for part in (row.seen, row.fell))
    if row.kind == "proof":
        return replace(row, fell=sorted({*row.fell, *numbers}))
    return replace(row, seen=seen, fell=fell, outside=sorted(set(row.outside) - set(numbers)))


def test_changed_figures_and_other_files_are_refused(tmp_path):
    text = json.loads(SHIPPED.read_text())
    text["clean_acc"] = "99.99"
    (tmp_path / "report.json").write_text(json.dumps(text))
    (check,) = check_report(tmp_path)
    assert check.passed is False
    assert "clean_acc of the report does not follow from its rows" in check.text
    (tmp_path / "report.json").write_text("[1]")
    (check,) = check_report(tmp_path)
    assert check.text == "schema: it is not a report of sj_robust"
    with pytest.raises(FileNotFoundError, match="give the report.json of an evaluation"):
        check_report(tmp_path / "nowhere.json")


def test_without_network_or_images_the_rest_is_checked(saved):
    right = report(name="mine", verified=(4, 5))
    found = marks(check_report(saved(replace(right, dataset="cifar10")), data_root="nowhere"))
    assert found["images"] is None
    assert found["network"] is None
    assert found["bracket"] is True
    assert "- [x] bracket: proved <= at most <= clean, 20.0 <= 30.0 <= 80.0 %" in checklist(
        check_report(saved(right))
    )


def test_proofs_at_another_radius_are_no_end_of_the_bracket(saved):
    one = report(name="mine")
    checks = check_report(saved(replace(one, rows=(*one.rows, proof((4, 5), eps=0.01)))))
    wanted = "- [x] bracket: nothing proved at Linf 0.1; at most <= clean, 30.0 <= 80.0 %"
    assert wanted in checklist(checks)
