"""A foreign report on its way into the leaderboard: what is checked, taken and refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation.reports import member, proof, report
from evaluation.short_suite import short_suite, shortened
from lab.evaluating import read_once
from lab.leaderboard import submission
from lab.leaderboard.submission import (
    check_report,
    checklist,
    compared,
    evaluated_again,
    refusing,
    shuffled,
    take,
)
from lab.leaderboard.tables import make_leaderboard
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.environment import environment
from sj_robust.data import image_loader, load_images
from sj_robust.defences import SmoothingEncoder
from sj_robust.evaluation import EstimatorSearch, Report, make_suite
from sj_robust.evaluation import assess as whole
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.result import Row
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.subject import Subject, from_checkpoint
from sj_robust.models import pretrained
from sj_robust.models.shipped import pretrained_file
from sj_robust.training import convert

THREAT = ThreatModel("Linf", 0.1)
SHIPPED = Path(__file__).parents[2] / "docs" / "results" / "leaderboard" / "dlif-at.json"


def marks(checks):
    """By the first word of each check whether it passed."""
    return {check.text.partition(":")[0]: check.passed for check in checks}


def short(suite):
    """A suite of few steps before its search, and of two estimators to choose among."""
    few = EstimatorSearch(candidates=("atan:2",), images=8, steps=5, count=2, final_steps=6)
    shorter = short_suite(suite)
    return replace(shorter, members=(*shorter.members[:-1], suite.members[-1]), search=few)


@pytest.fixture(scope="module", autouse=True)
def short_suites():
    """Reports are made and checked with few steps."""
    with shortened(short), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            submission, "make_suite", lambda *given, **more: short(make_suite(*given, **more))
        )
        for place in (submission, whole):
            patch.setattr(place, "DIAGNOSED", 12)
        yield


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
    make_leaderboard([str(tmp_path / "board")], tmp_path / "board", {})
    assert " | fast |" in (tmp_path / "board" / "leaderboard.md").read_text()  # without a star
    assert path.read_bytes() == given.read_bytes()
    assert take(given, checks, tmp_path / "board") == path
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds another report of this name; give the network a"):
        take(given, checks, tmp_path / "board")


def test_a_converted_network_meets_the_attacks_on_its_rates_again():
    torch.manual_seed(0)
    relus = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.rand(4, 1, 2, 2)
    mine = Subject("mine", convert(relus, x, T=4), "two layers")
    data = Data.of_tensors(x, torch.arange(4), 4)
    asked = Request("fast", THREAT, "noise", 4, proofs=False, control=False, checks=False)
    made = assess(mine, data, asked)
    again = [one.name for one in submission.Rerun.of(made, mine, data).members]
    assert [row.member for row in made.attacks] == again
    assert "transfer/apgd_ce" in again


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


def test_a_network_at_another_number_of_time_steps_is_the_reports(saved):
    shipped = from_checkpoint(pretrained_file("digits/lif"), T=2)
    images = load_images("digits", test_limit=4).test
    asked = Request("fast", THREAT, "digits", 10, proofs=False, control=False, checks=False)
    one = assess(shipped, image_loader(images, 4), asked)
    one = replace(one, configuration={"checkpoint": "digits/lif", "T": 2})
    checks = check_report(saved(one))
    assert marks(checks)["network"] is True, checklist(checks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"configuration": {"checkpoint": ["a"]}}, "must be text, got ['a']; evaluate"),
        ({"name": "digits/lif", "network": {"T": "two"}}, "T must be an integer, got str"),
    ],
)
def test_a_network_that_is_named_wrongly_is_a_failed_check(saved, change, said):
    *_, last = check_report(saved(replace(Report.load(SHIPPED), **{"configuration": {}} | change)))
    assert last.passed is False
    assert said in last.text


# What becomes of a report: each takes one and returns another.


def rows(change):
    """Every row of the main variant changed."""

    def changed(one):
        found = [change(row) if row.variant == one.main else row for row in one.rows]
        return replace(one, rows=found)

    return changed


def attacks(change):
    return rows(lambda row: change(row) if row.attacks else row)


def together(*changes):
    def changed(one):
        for change in changes:
            one = change(one)
        return one

    return changed


def fields(**values):
    return lambda one: replace(one, **values)


def standing(count, *, last):
    """Images that were broken are said to stand."""

    def changed(one):
        broken = [number for row in one.attacks for number in row.fell]
        images = set(broken[-count:] if last else broken[:count])
        later = set()

        def without(row):
            kept = [place for place, number in enumerate(row.fell) if number not in images]
            digests = "".join(row.digests[8 * place : 8 * place + 8] for place in kept)
            seen = sorted(later.union(row.seen))
            later.update(images.intersection(row.fell))
            fell = [row.fell[place] for place in kept]
            return replace(row, seen=seen, fell=fell, outside=(), digests=digests)

        return attacks(without)(one)

    return changed


def wrong(count):
    """Images that stand are said to be misclassified."""

    def changed(one):
        images = set(sorted(one.standing("everything"))[:count])

        def without(row):
            if row.kind == "clean":
                return replace(row, fell=sorted(images.union(row.fell)))
            return replace(row, seen=sorted(set(row.seen) - images))

        return rows(without)(one)

    return changed


def all_proved(one):
    """Every image that is classified correctly is said to be proved, so that none was attacked."""
    clean, *others = one.of(one.main)
    kept = [replace(row, seen=(), fell=(), digests="", largest=0.0) for row in others]
    proof = Row("verify", "proof", clean.seen, clean.fell, threat=one.threat)
    return replace(one, rows=(clean, *kept, proof))


def unsure(one):
    """A proof that may be wrong covers what attacks break."""
    seen = one.rows[0].seen
    return replace(
        one, rows=(*one.rows, Row("verify", "proof", seen, (), threat=one.threat, alpha=0.001))
    )


def renamed(one):
    layers = [row | {"layer": f"net.{place}"} for place, row in enumerate(one.network["layers"])]
    return replace(one, network=one.network | {"layers": layers})


SPOILT = attacks(lambda row: replace(row, digests="f" * len(row.digests)))
UNSAID = attacks(lambda row: replace(row, digests=""))
ONE_SPOILT = attacks(
    lambda row: replace(row, digests="ffff" + row.digests[4:] if row.digests else "")
)
ANOTHER_RELEASE = together(renamed, fields(name="another", warnings=("free text",)))
ROUNDED = together(wrong(1), ONE_SPOILT)
ELSEWHERE = attacks(lambda row: replace(row, threat=ThreatModel("Linf", 1e-9)))
BEYOND = attacks(lambda row: replace(row, largest=2 * row.largest))
NEGATIVE = rows(lambda row: replace(row, seconds=-1))

CHANGES = {
    "names of modules, its own name and free text": (ANOTHER_RELEASE, None),
    "a digest and a clean prediction, as where torch rounds in another way": (ROUNDED, None),
    "all digests, as on a GPU": (SPOILT, None),
    "three clean predictions": (wrong(3), "clean predictions"),
    "three clean predictions and draws": (together(wrong(3), fields(draws=5)), "clean predictions"),
    "images": (fields(data="0" * 16), "images"),
    "suite": (fields(suite="stress"), "suite"),
    "sizes of changes": (BEYOND, "budget"),
    "no network": (fields(network={}), "fingerprint of the network is in the report"),
    "no attack": (lambda one: replace(one, rows=one.rows[:1]), "attacks"),
    "another radius": (ELSEWHERE, "attacks"),
    "a name that is none": (fields(name=5), "schema"),
    "an empty name": (fields(name="\n"), "schema"),
    "environment": (fields(environment=["x"]), "schema"),
    "no draws": (fields(draws=0), "schema"),
    "true draws": (fields(draws=True), "schema"),
    "images by number": (fields(data=5), "schema"),
    "layers": (fields(network={"layers": [1]}), "schema"),
    "seconds": (NEGATIVE, "schema"),
    "a proof that may err": (unsure, "schema"),
    "all proved": (all_proved, "proofs again"),
    "first broken images": (standing(4, last=False), "attack again"),
    "last broken images": (standing(4, last=True), "attack again"),
    "no digests": (UNSAID, "digests of adversarial images are in the report"),
    "last broken images, all digests": (together(standing(4, last=True), SPOILT), "attack again"),
    "last broken images, a digest of each attack": (
        together(standing(4, last=True), ONE_SPOILT),
        "attack again",
    ),
    "last broken images, all digests, draws": (
        together(standing(4, last=True), SPOILT, fields(draws=10)),
        "members",
    ),
    "no search": (
        lambda one: replace(one, rows=[row for row in one.rows if "spike" not in row.member]),
        "members",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_forgeries_are_refused_and_honest_reports_are_not(saved, tmp_path, quick, what):
    change, point = CHANGES[what]
    path = saved(change(quick))
    checks = check_report(path, secret=b"of a test")
    refusals = [check.text.partition(":")[0] for check in refusing(checks)]
    if point is None:
        assert refusals == [], checklist(checks)
        assert take(path, checks, tmp_path / "board").is_file()
        return
    assert point in refusals, checklist(checks)
    assert "- [ ] " in checklist(checks)
    with pytest.raises(ValueError, match="is refused: "):
        take(path, checks, tmp_path / "board")
    assert not (tmp_path / "board").exists()


class Coarse(nn.Module):
    """A network whose gradient is masked by rounding."""

    def __init__(self):
        super().__init__()
        self.net = pretrained("digits/lif")
        self.net(torch.rand(2, 1, 8, 8))  # how it is called is found once, not in every copy

    def forward(self, x):
        return self.net((4 * x).round() / 4)


def test_a_masked_network_needs_the_attacks_on_its_plain_copy(saved):
    subject = Subject("mine", Coarse().eval(), "rounded")
    data = read_once(load_images("digits", test_limit=16).test, 16)
    threat = ThreatModel("Linf", 0.2)
    asked = Request("fast", threat, "digits", 10, proofs=False, control=False, radii=(0.1,))
    honest = assess(subject, data, asked)
    without = replace(honest, rows=[row for row in honest.rows if "plain" not in row.member])
    idle = attacks(lambda row: replace(row, fell=(), digests="") if "plain" in row.member else row)
    for one, points in (
        (honest, []),
        (without, ["members"]),
        (replace(without, findings=()), ["masking"]),
        (idle(honest), ["attack again"]),
    ):
        checks = check_report(saved(one), subject, secret=b"of a test")
        assert [check.text.partition(":")[0] for check in refusing(checks)] == points


def test_a_report_that_is_no_whole_one_makes_no_leaderboard(saved, tmp_path, quick):
    saved(unsure(quick))
    with pytest.raises(ValueError, match=r"report.json: alpha of verify must be 0"):
        make_leaderboard([str(tmp_path)], tmp_path / "board", {})


def test_which_images_are_attacked_again_follows_from_outcomes_and_the_secret(quick):
    order = shuffled(range(64), quick, b"1")
    assert sorted(order) == list(range(64))
    assert (
        shuffled(range(64), replace(quick, name="another", warnings=("free text",)), b"1") == order
    )
    assert shuffled(range(64), quick, b"2") != order
    assert shuffled(range(64), standing(1, last=False)(quick), b"1") != order


def test_what_was_not_measured_is_no_good_sign(saved, quick):
    path = saved(replace(quick, firing=(), findings=(), dataset="cifar10"))
    found = marks(check_report(path, data_root="nowhere"))
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
