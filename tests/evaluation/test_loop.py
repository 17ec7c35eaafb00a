import json
import signal
from functools import partial

import pytest
import torch
from evaluation import masked, suite_run

from sj_robust.attacks import fgsm
from sj_robust.core.digest import fingerprint
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation import Member, worst_case
from sj_robust.evaluation.run import loop
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.loop import Asked
from sj_robust.evaluation.run.member import crafted
from sj_robust.evaluation.run.progress import Progress, TimeLeft, computed_once
from sj_robust.models import NetworkSpec, build_classifier

STEPS = 4 * 9  # batches times members, and the clean images once for each group


@pytest.fixture(scope="module")
def whole():
    """The result of a run that nothing interrupts."""
    return suite_run.without_times(suite_run.outcome_of())


def test_members_and_groups_by_hand(margins):
    model, x, y = margins
    members = [
        Member("small", partial(fgsm, eps=0.1)),
        Member("rest", partial(fgsm, eps=0.2)),
        Member("far", partial(fgsm, eps=0.3)),
        Member("alone", partial(fgsm, eps=0.2), group=""),
        Member("control", partial(fgsm, eps=0.1), group="control"),
    ]
    given = [(x[:2], y[:2]), (x[2:], y[2:])]
    outcome = suite_run.suite_outcome(model, given, members, threat=ThreatModel("Linf", 0.2))
    found = {row.member: (row.seen, row.fell, row.outside) for row in outcome.rows}
    assert found == {
        "clean": ((0, 1, 2, 3, 4), (4,), ()),
        "small": ((0, 1, 2, 3), (0,), ()),
        "rest": ((1, 2, 3), (1,), ()),
        "far": ((2, 3), (2,), (2,)),
        "alone": ((0, 1, 2, 3), (0, 1), ()),
        "control": ((0, 1, 2, 3), (0,), ()),
    }
    alone = crafted(model, x, y, members[3], seeds=SampleSeeds(range(5)).derived("image", 0)).x_adv
    assert outcome.rows[4].digests == "".join(fingerprint(image)[:8] for image in alone[:2])
    assert outcome.rows[0].digests == ""
    largest = [round(row.largest, 6) for row in outcome.rows[1:]]
    assert largest == [0.1, 0.2, 0.3, 0.2, 0.1]
    assert [row.kind for row in outcome.rows] == ["clean", *["attack"] * 4, "control"]
    assert outcome.potential == ()  # no neuron


def test_one_batch_is_the_worst_case_function():
    x, y = suite_run.images()
    members = [member for member in suite_run.members() if member.group == "suite"]
    seeds = SampleSeeds(range(len(y))).derived("image", 3)
    expected = worst_case(suite_run.classifier(), x, y, members, seeds=seeds)
    outcome = suite_run.outcome_of(size=20, suite=members)
    for known, row in zip(expected.rows, outcome.rows, strict=True):
        assert (row.member, row.seen, row.fell) == (known.member, known.seen, known.fell)
    assert 0 < len(outcome.rows[1].fell) < len(outcome.rows[0].stood)


@pytest.mark.parametrize("lies", [False, True])
def test_images_that_fool_the_copy_are_tried_on_the_network(margins, monkeypatch, lies):
    model, x, y = margins
    members = [Member("small", partial(fgsm, eps=0.1)), Member("rest", partial(fgsm, eps=0.2))]
    expected = suite_run.suite_outcome(model, [(x, y)], members)
    asked = []

    def copy(images):
        asked.append(len(images))
        logits = model(images)
        return logits.roll(1, 1) if lies else logits

    monkeypatch.setattr(loop, "attacked_copy", lambda *given: copy)
    found = suite_run.suite_outcome(model, [(x, y)], members)
    assert asked
    for row, known in zip(found.rows, expected.rows, strict=True):
        assert (row.fell, row.digests, row.largest) == (known.fell, known.digests, known.largest)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 20])
def test_the_batch_size_does_not_matter(whole, size):
    found = suite_run.without_times(suite_run.outcome_of(size=size))[0]
    assert found == whole[0]


def test_copies_of_the_process_find_what_it_finds(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(loop, "possible_copies", lambda: 2)
    positions = []
    outcome = suite_run.outcome_of(tmp_path, on_step=positions.append)
    assert suite_run.without_times(outcome) == whole
    assert positions[-1].done == positions[-1].total == len(positions)


def test_potential_under_each_attack(whole):
    (_, *attacks), potential = whole
    assert [row["member"] for row in potential] == [attack["member"] for attack in attacks]
    for row, attack in zip(potential, attacks, strict=True):
        assert row["samples"] == sum(number < 6 for number in attack["seen"])
        assert list(row["layers"]) == ["net.parts.1"]
        assert len(row["layers"]["net.parts.1"]) == 3
        assert min(row["layers"]["net.parts.1"]) > 0


def test_a_network_that_draws_is_compared_under_equal_draws():
    spec = NetworkSpec("mlp", "tgo", (1, 4, 4), T=2, hidden=(8,))
    model = build_classifier(spec).eval()
    x = torch.rand(3, 1, 4, 4)
    found = loop._layer_perturbation(model, x, x)
    assert found["layers"]
    assert all(layer == [0.0, 0.0] for layer in found["layers"].values())


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, whole):
    steps = (1, 9, STEPS - 1)
    assert suite_run.killed_at(tmp_path, steps) == [-signal.SIGKILL] * 3
    for step in steps:
        positions = []
        outcome = suite_run.outcome_of(tmp_path / str(step), on_step=positions.append)
        assert suite_run.without_times(outcome) == whole
        assert [position.done for position in positions] == list(range(1, STEPS + 1))
        assert positions[-1].seconds_left == 0
        assert positions[-1].batch == 3


def test_a_torn_end_is_cut_off_and_only_what_is_missing_is_computed(tmp_path, monkeypatch, whole):
    suite_run.outcome_of(tmp_path)
    path = tmp_path / "batch-000001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    ran = []

    crafted = loop.crafted

    def counting(model, x, y, member, **options):
        ran.append(member.name)
        return crafted(model, x, y, member, **options)

    monkeypatch.setattr(loop, "crafted", counting)
    for torn in (lines[2][:-9], b'{"member":"pg', b"\n", b"\x00\x00\x00", b"[1]\n"):
        path.write_bytes(b"".join(lines[:2]) + torn)
        ran.clear()
        assert suite_run.without_times(suite_run.outcome_of(tmp_path)) == whole
        assert ran == ["gaussian"]
        left = path.read_bytes().splitlines(keepends=True)
        found = (left[:2], len(left))
        expected = (lines[:2], len(lines))
        assert found == expected


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder that belongs to one run."""
    folder = tmp_path_factory.mktemp("begun")
    suite_run.outcome_of(folder)
    return folder


def changed_network():
    net = suite_run.classifier()
    with torch.no_grad():
        net.net.parts[2].bias[0] += 1e-6
    return net


def changed_data():
    batches = suite_run.batches()
    batches[2][0][0, 0, 3, 3] += 1e-3
    return batches


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"seed": 4}, "seed"),
        ({"threat": ThreatModel("L2", suite_run.EPS)}, "threat"),
        ({"net": changed_network()}, "network"),
        ({"suite": suite_run.members()[:-1]}, "suite"),
        ({"size": 5}, "batch sizes"),
        ({"draws": 2}, "draws"),
        ({"data": changed_data()}, "data"),
    ],
)
def test_other_runs_are_never_mixed(begun, options, what):
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    with pytest.raises(ValueError, match=rf"another evaluation \({what} changed.*another folder"):
        suite_run.outcome_of(begun, **options)
    found = {path.name: path.read_bytes() for path in begun.iterdir()}
    assert found == before


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path, whole):
    codes = suite_run.in_two_processes(tmp_path, killed_at=11)  # both in their second batch
    assert codes == [-signal.SIGKILL] * 2
    assert 4 <= len(list(tmp_path.glob("batch-*.jsonl"))) <= 8
    assert suite_run.in_two_processes(tmp_path) == [0, 0]
    assert json.loads((tmp_path / "outcome.json").read_text()) == whole
    assert (
        suite_run.without_times(suite_run.outcome_of(tmp_path)) == whole
    )  # one process takes up what two have done


def test_a_folder_is_written_by_one_run_at_a_time(tmp_path):
    progress = Progress(tmp_path, {})
    with (
        progress.batch(0),
        pytest.raises(BlockingIOError, match="running already"),
        Progress(tmp_path, {}).batch(0),
    ):
        pass


def test_stages_are_kept(tmp_path):
    path = tmp_path / "progress" / "estimators.json"
    found = computed_once(path, {"seed": "0"}, lambda: [1.5])
    assert found == [1.5]
    found = computed_once(path, {"seed": "0"}, lambda: 1 / 0)
    assert found == [1.5]
    with pytest.raises(ValueError, match="seed changed"):
        computed_once(path, {"seed": "1"}, lambda: [2.5])
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        computed_once(path, {"seed": "0"}, lambda: [1.5])


def test_time_left_weighs_members():
    left = TimeLeft(10 * ["clean", "long"])
    left.add("clean", 1.0)
    assert left.seconds() == pytest.approx(9 * 1 + 10 * 1)  # nothing else is known yet
    left.add("long", 100.0)
    assert left.seconds() == pytest.approx(9 * 101)


def test_fingerprints():
    batches = suite_run.batches()
    data = Data.of(batches).fingerprint
    assert data == Data.of(suite_run.batches(20)).fingerprint
    assert data != Data.of([(x, (y + 1) % 3) for x, y in batches]).fingerprint
    net = suite_run.classifier()
    other = suite_run.classifier()
    assert fingerprint(net) == fingerprint(suite_run.classifier().train())
    other.net.parts[1].tau = 4.5
    assert fingerprint(net) != fingerprint(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(whole, dtype):
    half = masked.Before(lambda x: x.to(dtype), suite_run.classifier().to(dtype))
    (clean, *attacks), _ = suite_run.without_times(suite_run.outcome_of(net=half))
    flipped = {*clean["fell"]} ^ {*whole[0][0]["fell"]}
    assert len(flipped) <= 2  # spikes at the threshold may flip
    for row, single in zip(attacks, whole[0][1:], strict=True):
        found = abs(len(row["fell"]) - len(single["fell"]))
        assert found <= 4
        assert row["member"] == "gaussian" or row["largest"] <= suite_run.EPS + 1e-6
    assert attacks[2]["fell"]


@pytest.mark.parametrize(
    ("own", "keeps"),
    [
        (ThreatModel("moves", 2, largest_shift=1), True),
        (ThreatModel("moves", 2, largest_shift=2), False),
        (ThreatModel("moves", 2), False),
        (ThreatModel("moves", 2, largest_shift=1, counts=True), False),
        (None, False),
    ],
)
def test_only_members_within_the_threat_omit_what_is_proved(own, keeps):
    asked = Asked(ThreatModel("moves", 2, largest_shift=1), verified=frozenset([0]))
    members = [Member(name, fgsm, threat=own) for name in ("first", "second")]
    assert list(asked.spared(members, 0, torch.tensor([0]))) == (["second"] if keeps else [])
