import signal
from dataclasses import asdict, replace
from functools import partial
from shlex import split

import check_certificate
import evaluate
import launch
import pytest
import torch
from data.event_recordings import pack_n_mnist, trust
from evaluation.recipe_run import SMALL, TWO_BATCHES, in_process, start, undrawn, without_times
from lab.command_line import WrongUse
from launch import finish

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import Fault, Report
from sj_robust.evaluation import assess as assessment
from sj_robust.evaluation.report.levels import intact, levels
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.training import save_checkpoint

pytestmark = pytest.mark.slow

PAPER = (*split("--suite paper --no-control"), *TWO_BATCHES)


@pytest.fixture(scope="module")
def whole(folder):
    """The paper's protocol on the small network, without an interruption."""
    in_process(folder, "runs/one", *PAPER, "--output", "whole")
    return Report.load(folder / "whole" / "report.json")


def test_from_checkpoint_to_report(folder, capsys):
    in_process(folder, *split("runs/one/lif_none/best.pt --suite fast"), *SMALL, draws=True)
    run = folder / "runs" / "evaluate-lif_none-fast-1"
    report = Report.load(run / "report.json")
    expected = {
        "README.md",
        "config.yaml",
        "log.txt",
        "progress",
        "report.html",
        "report.json",
    }
    for plot in (
        "accuracy_over_eps",
        "attacks",
        "potential",
        "potential_more",
        "gallery",
        "spikes",
        "membrane",
    ):
        expected |= {f"{plot}.png", f"{plot}.pdf"}
    assert {path.name for path in run.iterdir()} == expected
    expected = (
        "lif_none",
        "digits",
        ThreatModel("Linf", 0.1),
    )
    assert (report.name, report.dataset, report.threat) == expected
    assert len(report.labels) == 12
    assert {row["neuron"] for row in report.network["layers"]} == {"LIFNode"}
    assert "PiecewiseQuadratic(alpha=1.0" in report.network["layers"][0]["surrogate"]
    assert report.network["T"] == 3
    chosen = [row["estimator"] for row in report.estimators if row["chosen"]]
    assert chosen
    assert report.attacks[0].estimator == chosen[0]
    assert report.worst_case.correct < report.clean.correct
    assert len(report.findings) > 5
    assert report.environment["torch"] == torch.__version__
    output = capsys.readouterr().out
    assert "worst case" in output
    log = (run / "log.txt").read_text()
    assert (
        log.index("environment:") < log.index("configuration:") < log.index("Robust accuracy is ")
    )
    html = (run / "report.html").read_text()
    assert "http" not in html
    before = (run / "report.json").read_bytes()
    # A finished evaluation that is resumed has nothing left to do.
    in_process(folder, *split("runs/one/lif_none/best.pt --suite fast --resume"))
    assert (run / "report.json").read_bytes() == before


def test_the_papers_protocol(whole):
    names = [row.member for row in whole.attacks]
    assert names[:4] == ["gaussian", "fgsm", "pgd7", "pgd7/last"]
    expected = [
        "0",
        *(f"{level}/255" for level in range(10, 101, 10)),
    ]
    assert [point.eps for point in whole.over_eps] == expected
    assert whole.estimators == ()
    assert {row.estimator for row in whole.attacks} == {"training"}
    strong = whole.under("pgd40")
    weak = whole.under("gaussian")
    assert strong.correct < weak.correct <= whole.clean.correct
    known = {whole.attacks[index].member for index in whole.outcome if index >= 0}
    assert "gaussian" not in known


def test_killed_and_resumed(folder, tmp_path, whole):
    options = ("runs/one", *PAPER, "--output", str(tmp_path / "cut"))
    process = start(folder, *options)
    records = tmp_path / "cut" / "progress" / "suite"

    def half_done():
        return sum(path.read_bytes().count(b"\n") for path in records.glob("*.jsonl")) >= 25

    launch.wait_until(half_done, "the middle of the suite", process)
    process.kill()
    finish(process, code=-signal.SIGKILL)
    assert not (tmp_path / "cut" / "report.json").exists()
    with pytest.raises(
        FileExistsError, match="cut is not empty: .* --resume"
    ):  # not overwritten by accident
        in_process(folder, *options)
    in_process(folder, "--output", str(tmp_path / "cut"), "--resume")  # with the options of the run
    resumed = Report.load(tmp_path / "cut" / "report.json")
    assert without_times(resumed) == without_times(
        replace(whole, configuration=resumed.configuration)
    )


def test_two_processes(folder, tmp_path, capfd):
    few = split("--suite fast --no-proofs --no-control --test-limit 2 --batch-size 1 --output")
    work = partial(in_process, folder, "runs/one", *few, str(tmp_path / "two"))
    assert launch.two_processes(work) == [0, 0]  # that they find what one finds: test_loop
    assert capfd.readouterr().out.count("Robust accuracy is ") == 1
    report = Report.load(tmp_path / "two" / "report.json")
    assert report.environment["processes"] == "2"
    assert len(report.labels) == 2


@pytest.mark.parametrize(
    ("function", "extra"),
    [("dead", split("--T 3 --mean 0.5 --std 0.5")), ("wrapped", ())],
)
def test_somebodys_own_network(folder, tmp_path, capsys, function, extra):
    own = (
        "--network",
        f"own_net.py:{function}",
        *split("--eps 8/255 --suite paper --no-control"),
        *SMALL,
    )
    in_process(folder, *own, *extra, "--output", str(tmp_path / "own"), "--name", function)
    report = Report.load(tmp_path / "own" / "report.json")
    assert (report.name, report.eps, report.network["T"]) == (function, "8/255", 3)
    assert report.network["layers"][0]["neuron"] == "LIFNode"
    assert report.footnote.startswith(
        "DEAD NETWORK: 100.0% of the neurons"
    )  # neither was ever trained
    out = capsys.readouterr().out
    html = (tmp_path / "own" / "report.html").read_text()
    assert "`. DEAD NETWORK" in out
    for text in (out, html):
        assert "NOT ROBUST: clean accuracy" in text
        assert "DEAD NETWORK" in text


def test_the_data_root_is_that_of_the_run(tmp_path):
    checkpoint = tmp_path / "run" / "lif" / "best.pt"
    checkpoint.parent.mkdir(parents=True)
    assert evaluate.data_root(evaluate.Options(str(checkpoint))) == "data"
    (tmp_path / "run" / "config.yaml").write_text("data_root: elsewhere\n")
    for given in (checkpoint, checkpoint.parent, tmp_path / "run"):
        assert evaluate.data_root(evaluate.Options(str(given))) == "elsewhere"
    found = evaluate.data_root(evaluate.Options(str(checkpoint), data_root="mine"))
    assert found == "mine"
    assert evaluate.data_root(evaluate.Options(network="mynet.py:build")) == "data"


def test_l2_and_transfer(folder, tmp_path):
    options = (
        *split("--norm L2 --eps 0.25,0.5 --surrogate-model runs/two/a --suite fast"),
        *SMALL,
    )
    in_process(folder, "runs/one", *options, "--output", str(tmp_path / "l2"))
    report = Report.load(tmp_path / "l2" / "report.json")
    assert report.threat == ThreatModel("L2", 0.5)
    assert {row.eps for row in report.rows if "@" in row.member} == {0.25, 0.5}
    transferred = report.under("transfer/apgd_ce")  # from the very same weights
    assert transferred.correct < report.clean.correct
    for row in report.attacks:
        assert row.largest <= 0.5 + 1e-5
    assert any(row.member == "control/transfer/apgd_ce" for row in report.attacks)


def test_a_smoothed_classifier_has_a_bracket_of_its_own(folder, tmp_path, capsys):
    vote = split("--smooth 0.1 --smooth-draws 100 --smooth-alpha 0.01")
    few = split("--test-limit 2 --draws 7 --no-control --output")
    in_process(folder, "runs/one", *vote, *few, str(tmp_path / "vote"))
    found = Report.load(tmp_path / "vote" / "smoothed.json")
    radii = [row.eps for row in found.rows if row.kind == "proof"]
    assert radii == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert found.network["vote"] == {"sigma": 0.1, "n": 100, "alpha": 0.01}
    assert found.clean.total == 2
    assert found.bracket_at(0.0)[0].accuracy > 0.5
    drawn = {"smoothed.json", "smoothed.png", "smoothed.pdf"}
    seen = {path.name for path in (tmp_path / "vote").iterdir()}
    assert seen == (
        {
            "README.md",
            "config.yaml",
            "log.txt",
        }
        | drawn
    )
    out = capsys.readouterr().out
    assert found.table() in out
    assert found.verdict in out
    assert "ignored with the other options given: control, draws\n" in out
    assert "worst case" not in out


@pytest.mark.parametrize(
    ("given", "switches"),
    [
        ("--suite fast", True),
        ("--suite fast --no-proofs", False),
        ("--suite fast --norm L2 --eps 1", False),
        ("--suite stress", False),
        ("--smooth 0.1", False),
    ],
)
def test_products_are_exact_where_there_are_proofs(folder, tmp_path, monkeypatch, given, switches):
    told = []
    monkeypatch.setattr(torch.backends.nnpack, "set_flags", told.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(evaluate, "load_images", lambda *_, **options: None)
    with pytest.raises(AttributeError, match="test"):
        in_process(folder, "runs/one", *split(given), "--output", str(tmp_path / "none"))
    assert told == [False] * switches
    assert torch.backends.cudnn.allow_tf32 is not switches


def test_the_certificate_holds_the_proofs_of_the_report(folder, tmp_path):
    run = tmp_path / "run"
    given = "runs/one --suite fast --no-control --test-limit 8 --eps 0.001 --certificate --output"
    in_process(folder, *split(given), str(run))
    proved = Report.load(run / "report.json").standing("verified")
    network, _, eps, (images, labels, numbers) = check_certificate.read(
        str(run / "certificate.npz")
    )
    assert proved
    assert eps == 0.001
    assert set(numbers.tolist()) == proved
    assert (check_certificate.proved(network, images, labels, eps) > 0).all()


@pytest.fixture
def event_data(tmp_path, monkeypatch):
    """Tiny recordings that are taken for N-MNIST, in a data root."""
    pack_n_mnist(tmp_path / "data" / "NMNIST", train=2, test=1)
    trust(monkeypatch, "n_mnist", tmp_path / "data" / "NMNIST")
    return tmp_path / "data"


def test_event_data(folder, tmp_path, capsys, event_data):
    spec = NetworkSpec(image_shape=(2, 34, 34), T=2, channels=(3,), frames=True)
    torch.manual_seed(0)
    description = {"network": asdict(spec), "options": {"dataset": "n_mnist", "eps": 0.1}}
    path = tmp_path / "nets" / "events" / "best.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(
        path, {"description": description, "model": build_classifier(spec).state_dict()}
    )
    options = (
        str(path),
        "--data-root",
        str(event_data),
        *split("--eps 3 --test-limit 6 --batch-size 4"),
    )
    in_process(folder, *options)
    run = folder / "runs" / "evaluate-events-1"
    report = Report.load(run / "report.json")
    expected = (
        "events",
        ThreatModel("L0", 3),
        "n_mnist",
    )
    assert (report.suite, report.threat, report.dataset) == expected
    assert len(report.labels) == 6
    assert report.budget == "at most 3 events added or removed"
    assert "Robust accuracy is " in capsys.readouterr().out
    # At another T the recordings are integrated anew.
    in_process(folder, *options, *split("--T 3 --output"), str(tmp_path / "three"))
    assert Report.load(tmp_path / "three" / "report.json").network["T"] == 3
    assert (event_data / "NMNIST" / "frames_number_3_split_by_number").is_dir()
    moves = (
        *split("--norm moves --eps 3 --largest-shift 1 --output"),
        str(tmp_path / "moves"),
    )
    in_process(folder, *options[:3], *options[5:], *moves)
    report = Report.load(tmp_path / "moves" / "report.json")
    assert report.threat == ThreatModel("moves", 3, largest_shift=1)
    assert (
        "3 events moved in time, each by at most 1 frame"
        in (tmp_path / "moves" / "report.html").read_text()
    )
    with pytest.raises(
        ValueError, match=r"events takes frames \(2, 2, 34, 34\), those of digits are \(1, 8, 8\)"
    ):
        in_process(folder, *options, *split("--dataset digits --eps 0.1 --output none"))


def test_stress(folder, tmp_path, capsys, monkeypatch):
    few = (Fault("weight_bits", 2), Fault("stuck_at_zero", 0.5), Fault("first_steps", 1))
    monkeypatch.setattr(assessment, "default_faults", lambda model: few)
    options = (
        *split("runs/one --suite stress --fault-draws 2 --T 5"),
        *SMALL,
        "--output",
        str(tmp_path / "card"),
    )
    in_process(folder, *options)
    card = Report.load(tmp_path / "card" / "card.json")
    found = [len(level.clean) for level in levels(card)]
    assert found == [1, 2, 1]
    assert (card.threat, card.configuration["fault_draws"]) == (ThreatModel("Linf", 0.1), 2)
    assert card.network["T"] == 5  # and 3 in the training
    assert ", T 5," in card.network["architecture"]
    whole = intact(card)
    assert whole.images == 12
    assert whole.clean[0] > whole.attacked[0]
    assert card.table() in capsys.readouterr().out
    drawn = {f"card.{end}" for end in ("json", "md", "png", "pdf")}
    files = {path.name for path in (tmp_path / "card").iterdir()}
    assert files == {"README.md", "config.yaml", "log.txt", "progress"} | drawn


def test_leaderboard(folder, tmp_path, capsys, whole):
    in_process(folder, *split("--leaderboard whole --output"), str(tmp_path / "board"))
    told = capsys.readouterr().out
    assert "of 1 reports are in" in told
    assert "ignored" not in told
    text = (tmp_path / "board" / "leaderboard.md").read_text()
    assert "## digits, Linf 0.1, 12 images" in text
    at_most = f"{whole.everything.percent}<br>"
    at_most += whole.everything.interval_text.replace(" to ", "\N{EN DASH}")
    proved = "" if whole.verified is None else whole.verified.percent
    row = f"` | {whole.clean.percent} | {proved} | {at_most} | paper"
    assert any(line.startswith("| lif_none<br>") and row in line for line in text.splitlines())
    command = "python recipes/evaluate.py runs/one --suite paper --no-control --test-limit 12,"
    assert command in (tmp_path / "board" / "reports.csv").read_text()


def test_a_report_is_checked_and_added(folder, tmp_path, capsys):
    board, few = str(tmp_path / "added"), str(tmp_path / "few")
    options = "runs/one --suite fast --no-proofs --test-limit 50 --output"
    with undrawn():  # whole attacks: what short ones leave, they would break
        launch.in_process("evaluate", folder, *split(options), few)
    in_process(folder, *split("runs/one --leaderboard add"), few, "--output", board)
    out = capsys.readouterr().out
    assert "attack again: of " in out
    assert "\nadded as " in out
    assert "leaderboard.md, leaderboard.html and reports.csv of 1 reports are in" in out
    with pytest.raises(WrongUse, match="--leaderboard add takes one report, got 0"):
        in_process(folder, *split("--leaderboard add --output"), board)


def test_compare(folder, capsys, whole):
    whole.save(folder / "other.json")
    in_process(folder, *split("--compare whole other.json --eps 0.2"))
    assert "ignored with the other options given: eps\n" in capsys.readouterr().out
    in_process(folder, *split("--compare whole other.json"))
    out = capsys.readouterr().out
    assert "same network" in out
    assert "lif_none (second) minus lif_none (first)" in out
    replace(whole, threat=ThreatModel("Linf", 8 / 255), name="other").save(folder / "other.json")
    in_process(folder, *split("--compare whole/report.json other.json"))
    assert "DIFFERENT eps: 0.1 and 8/255" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="takes two reports, got 1"):
        in_process(folder, "--compare", "whole/report.json")
