import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from data.event_recordings import pack_n_mnist, sums
from evaluation.recipe_run import ENVIRONMENT, RECIPE, SMALL, evaluate, finish, in_process, start, without_times
from evaluation.test_event_suite import short_suite
from lab.command_line import read_options
from PIL import Image

from sj_robust.attacks import ThreatModel
from sj_robust.data import events
from sj_robust.evaluation import assess as whole_assessment
from sj_robust.evaluation.robustness_report import RobustnessReport
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.training import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(folder):
    """The paper's protocol on the small network, without an interruption."""
    patch = pytest.MonkeyPatch()
    in_process(patch, folder, "runs/one", "--suite", "paper", *SMALL, "--output", "whole")
    patch.undo()
    return RobustnessReport.load(folder / "whole" / "report.json")


def test_from_checkpoint_to_report(folder, monkeypatch, capsys):
    in_process(monkeypatch, folder, "runs/one/lif_none/best.pt", "--suite", "fast", *SMALL)
    run = folder / "runs" / "evaluate-lif_none-fast-1"
    report = RobustnessReport.load(run / "report.json")
    plots = {f"{name}.{end}" for name in ("accuracy_over_eps", "attacks", "potential") for end in ("png", "pdf")}
    files = {path.name for path in run.iterdir()}
    assert files == {"README.md", "config.yaml", "log.txt", "progress", "report.html", "report.json"} | plots
    assert (report.name, report.dataset, report.threat) == ("lif_none", "digits", ThreatModel("Linf", 0.1))
    assert len(report.labels) == 12
    assert {row["neuron"] for row in report.network["layers"]} == {"LIFNode"}
    assert "PiecewiseQuadratic(alpha=1.0" in report.network["layers"][0]["surrogate"]
    assert report.network["T"] == 3
    chosen = [row["estimator"] for row in report.estimators if row["chosen"]]
    assert chosen
    assert report.members[0].estimator == chosen[0]
    assert report.control is not None
    assert report.everything.correct <= min(report.worst_case.correct, report.control.correct)
    assert report.worst_case.correct < report.clean.correct
    assert report.over_eps[0]["eps"] == "0"
    falling = [row["correct"] for row in report.over_eps]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == report.clean.correct
    assert {row["member"] for row in report.potential} <= {member.name for member in report.members}
    assert set(report.potential[0]["layers"]) == {row["layer"] for row in report.firing}
    assert all(len(values) == 3 for values in report.potential[0]["layers"].values())
    assert len(report.findings) > 5
    assert report.environment["torch"] == torch.__version__
    output = capsys.readouterr().out
    assert "worst case" in output
    log = (run / "log.txt").read_text()
    assert log.index("environment:") < log.index("configuration:") < log.index("robust accuracy at most")
    html = (run / "report.html").read_text()
    assert "http" not in html
    before = (run / "report.json").read_bytes()
    # A finished evaluation that is resumed has nothing left to do.
    in_process(monkeypatch, folder, "runs/one/lif_none/best.pt", "--suite", "fast", "--resume")
    assert (run / "report.json").read_bytes() == before


def test_the_papers_protocol(whole):
    names = [member.name for member in whole.members]
    assert names[:4] == ["gaussian", "fgsm", "pgd7", "pgd7/last"]
    assert [row["eps"] for row in whole.over_eps] == ["0", *(f"{level}/255" for level in range(10, 101, 10))]
    assert whole.estimators == ()
    assert {member.estimator for member in whole.members} == {"training"}
    strong, weak = whole.under("pgd40"), whole.under("gaussian")
    assert strong.correct < weak.correct <= whole.clean.correct
    assert "gaussian" not in {whole.members[index].name for index in whole.outcome if index >= 0}


def test_killed_and_resumed(folder, tmp_path, whole):
    options = ("runs/one", "--suite", "paper", *SMALL, "--output", str(tmp_path / "cut"))
    process = start(folder, *options)
    deadline = time.monotonic() + 300
    progress = tmp_path / "cut" / "progress" / "suite"
    while sum(path.read_bytes().count(b"\n") for path in progress.glob("*.jsonl")) < 45:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "report.json").exists()
    _, err = finish(start(folder, *options), code=1)  # a run is not overwritten by accident
    assert re.search(r"^error: .*cut is not empty: .* --resume.*\n\Z", err, re.MULTILINE)
    finish(start(folder, "--output", str(tmp_path / "cut"), "--resume"))  # with the options of the run
    resumed = RobustnessReport.load(tmp_path / "cut" / "report.json")
    assert without_times(resumed) == without_times(replace(whole, configuration=resumed.configuration))


def test_two_processes(folder, tmp_path, whole):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    options = ("runs/one", "--suite", "paper", *SMALL, "--output", str(tmp_path / "two"))
    command = [sys.executable, *launcher, str(RECIPE), *options]
    result = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("robust accuracy at most") == 1
    report = RobustnessReport.load(tmp_path / "two" / "report.json")
    assert report.environment["processes"] == "2"
    assert without_times(report) == without_times(whole)


def test_interrupted_by_hand(folder, tmp_path):
    process = start(folder, "runs/one", "--suite", "paper", "--output", str(tmp_path / "stopped"))
    deadline = time.monotonic() + 300
    # Once a record is there: in the moment in which its file is opened, a signal leaves that file to the interpreter.
    while not any(path.stat().st_size for path in (tmp_path / "stopped" / "progress").glob("suite/*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    assert "continue with --resume" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("function", "extra"), [("build", ("--T", "3")), ("wrapped", ())])
def test_somebodys_own_network(folder, tmp_path, monkeypatch, capsys, function, extra):
    output = ("--output", str(tmp_path / "own"))
    options = ("--network", f"own_net.py:{function}", "--eps", "8/255", "--suite", "paper", *SMALL, *extra, *output)
    in_process(monkeypatch, folder, *options)
    report = RobustnessReport.load(tmp_path / "own" / "report.json")
    assert (report.name, report.eps, report.network["T"]) == (function, "8/255", 3)
    assert report.network["layers"][0]["neuron"] == "LIFNode"
    assert "NOT ROBUST: clean accuracy" in capsys.readouterr().out  # it was never trained


def test_a_dead_network_is_called_dead(folder, tmp_path, monkeypatch, capsys):
    output = ("--output", str(tmp_path / "dead"))
    own = ("--network", "own_net:dead", "--T", "3", "--mean", "[0.5]", "--std", "[0.5]")
    in_process(monkeypatch, folder, *own, "--eps", "0.1", "--suite", "fast", *SMALL, *output)
    report = RobustnessReport.load(tmp_path / "dead" / "report.json")
    assert report.unreliable
    assert report.footnote.startswith("DEAD NETWORK: 100.0% of layer")
    assert report.clean.correct == report.worst_case.correct
    assert "NOT RELIABLE, DEAD NETWORK" in capsys.readouterr().out
    assert "DEAD NETWORK" in (tmp_path / "dead" / "report.html").read_text()


def test_l2_and_transfer(folder, tmp_path, monkeypatch):
    options = ("--norm", "L2", "--eps", "0.5", "--transfer", "runs/two/a", "--suite", "fast", *SMALL)
    in_process(monkeypatch, folder, "runs/one", *options, "--output", str(tmp_path / "l2"))
    report = RobustnessReport.load(tmp_path / "l2" / "report.json")
    assert report.threat == ThreatModel("L2", 0.5)
    transferred = report.under("transfer/apgd_ce")  # from the very same weights
    assert transferred.correct < report.clean.correct
    for member in report.members:
        assert member.largest <= 0.5 + 1e-5
    assert any(member.name == "control/transfer" for member in report.members)


def test_a_checkpoint_at_other_time_steps(folder, tmp_path, monkeypatch):
    options = ("--T", "5", "--suite", "paper", "--test-limit", "3", "--output", str(tmp_path / "longer"))
    in_process(monkeypatch, folder, "runs/one", *options)
    report = RobustnessReport.load(tmp_path / "longer" / "report.json")
    assert report.network["T"] == 5
    assert ", T 5," in report.network["architecture"]


@pytest.fixture
def event_data(tmp_path, monkeypatch):
    """Tiny recordings that are taken for N-MNIST, in a data root."""
    pack_n_mnist(tmp_path / "data" / "NMNIST", train=2, test=1)
    host = events._host_class("n_mnist", "NMNIST")
    listed = sums(host, tmp_path / "data" / "NMNIST")
    monkeypatch.setattr(host, "resource_url_md5", staticmethod(lambda: listed))
    return tmp_path / "data"


def test_event_data(folder, tmp_path, monkeypatch, capsys, event_data):
    spec = NetworkSpec(image_shape=(2, 34, 34), T=2, channels=(3,), frames=True)
    torch.manual_seed(0)
    description = {"network": asdict(spec), "options": {"dataset": "n_mnist", "eps": 0.1}}
    path = tmp_path / "nets" / "events" / "best.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, {"description": description, "model": build_classifier(spec).state_dict()})
    monkeypatch.setattr(whole_assessment, "make_suite", short_suite)
    options = (str(path), "--data-root", str(event_data), "--eps", "3", "--test-limit", "6", "--batch-size", "4")
    in_process(monkeypatch, folder, *options)
    run = folder / "runs" / "evaluate-events-1"
    report = RobustnessReport.load(run / "report.json")
    assert (report.suite, report.threat, report.dataset) == ("events", ThreatModel("L0", 3), "n_mnist")
    assert len(report.labels) == 6
    assert report.budget == "L0, at most 3 events added or removed"
    assert "robust accuracy at most" in capsys.readouterr().out
    in_process(monkeypatch, folder, *options, "--resume")
    assert without_times(RobustnessReport.load(run / "report.json")) == without_times(report)
    # At another T the recordings are integrated anew.
    in_process(monkeypatch, folder, *options, "--T", "3", "--output", str(tmp_path / "three"))
    assert RobustnessReport.load(tmp_path / "three" / "report.json").network["T"] == 3
    assert (event_data / "NMNIST" / "frames_number_3_split_by_number").is_dir()
    with pytest.raises(ValueError, match=r"events takes frames \(2, 2, 34, 34\), those of digits are \(1, 8, 8\)"):
        in_process(monkeypatch, folder, *options, "--dataset", "digits", "--eps", "0.1", "--output", "none")


def test_pictures_that_cannot_be_read(folder, tmp_path, monkeypatch):
    pictures = torch.randint(256, (24, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, picture in enumerate(pictures):
        home = tmp_path / "pictures" / ("test" if number < 4 else "train") / f"c{number % 2}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(home / f"{number}.png")
    (tmp_path / "pictures" / "test" / "c0" / "2.png").write_bytes(b"")
    own = ("--network", "own_net.py:pictures", "--T", "2", "--eps", "0.1", "--suite", "paper")
    options = (*own, "--dataset", f"image_folder:{tmp_path / 'pictures'}", "--output", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"test/c0/2.png.*on_unreadable='skip'"):
        in_process(monkeypatch, folder, *options)
    with pytest.warns(UserWarning, match="1 of 4 files"):
        in_process(monkeypatch, folder, *options, "--on-unreadable", "skip")
    report = RobustnessReport.load(tmp_path / "out" / "report.json")
    assert (len(report.labels), report.dataset) == (3, f"image_folder:{tmp_path / 'pictures'}")


def test_compare(folder, monkeypatch, capsys, whole):
    monkeypatch.chdir(folder)
    whole.save(folder / "other.json")
    evaluate.main(["--compare", "whole", "other.json"])
    out = capsys.readouterr().out
    assert "same weights" in out
    assert "lif_none (second) minus lif_none (first)" in out
    changed = replace(whole, threat=ThreatModel("Linf", 8 / 255), name="other")
    changed.save(folder / "other.json")
    evaluate.main(["--compare", "whole/report.json", "other.json"])
    assert "DIFFERENT eps: 0.1 and 8/255" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(FileNotFoundError, match=r"nothing.json does not exist; --compare takes two"):
        evaluate.main(["--compare", "whole/report.json", "nothing.json"])
    with pytest.raises(ValueError, match="takes two reports, got 1"):
        evaluate.main(["--compare", "whole/report.json"])


def test_changed_weights_are_not_resumed(folder, tmp_path, monkeypatch):
    path = tmp_path / "mine" / "best.pt"
    path.parent.mkdir()
    content = load_checkpoint(folder / "runs" / "one" / "lif_none" / "best.pt")
    save_checkpoint(path, {name: content[name] for name in ("description", "model")})
    options = (str(path), "--suite", "paper", "--test-limit", "6", "--output", str(tmp_path / "run"))
    in_process(monkeypatch, folder, *options)
    name = next(name for name in content["model"] if name.endswith("weight"))
    content["model"][name] = content["model"][name] * 1.01
    save_checkpoint(path, {name: content[name] for name in ("description", "model")})
    before = json.loads((tmp_path / "run" / "report.json").read_text())
    with pytest.raises(ValueError, match=r"another evaluation \(network changed\)"):
        in_process(monkeypatch, folder, *options, "--resume")
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == before


def test_options_in_any_order():
    words = ["--suite", "fast", "runs/one", "--test-limit", "5", "--trust-code", "--data-root=x", "--compare", "a", "b"]
    expected = evaluate.Options("runs/one", suite="fast", test_limit=5, trust_code=True, data_root="x")
    assert read_options(evaluate.Options, words) == replace(expected, compare=["a", "b"])
