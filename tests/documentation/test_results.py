"""Scripts in docs/results: what earlier runs have found stays in their tables."""

import importlib
import shlex
from hashlib import sha256
from pathlib import Path

import adv_train
import pytest
import torch
from accelerate.state import AcceleratorState
from lab.command_line import read_options

from sj_robust.models.checkpoint import load_checkpoint, save_checkpoint

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_the_page_shows_the_record_as_the_table_of_figures_has_it(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    record = importlib.import_module("record")
    rows = record.read_rows(record.FOLDER / "record.csv", record.Row)
    page = record.PAGE.read_text(encoding="utf-8")
    shown = page.split(record.BEGINS)[1].split(record.ENDS)[0]
    assert shown == record.tables(rows), "write it anew: python docs/results/record.py"
    for row in rows:
        figures = [float(text) for text in (row.proved, row.attacked, row.clean) if text]
        assert figures == sorted(figures), row
        assert row.source


def test_the_page_of_proofs_shows_its_tables(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    script = importlib.import_module("proved")
    page = script.PAGE.read_text(encoding="utf-8")
    measured = [name for name in script.STUDIES if (script.FOLDER / f"{name}.csv").exists()]
    assert measured
    for name in measured:
        for (begins, ends), table in script.page_tables(name).items():
            shown = page.split(begins)[1].split(ends)[0]
            assert shown == table, "write it anew: python docs/results/proved.py"
        rows, layers = script.tables(name)
        radii = script.STUDIES[name].radii
        for network in {row.network for row in rows}:
            ours = [row for row in rows if row.network == network]
            assert [row.eps for row in ours] == list(radii)
            for row in ours:
                assert row.intervals <= row.proved <= row.left <= row.clean
            assert any(layer.network == network for layer in layers)


@pytest.mark.parametrize("name", ["standard", "spikes_case", "spike_search"])
def test_a_table_is_read_and_written_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    rows = importlib.import_module("rows")
    script = importlib.import_module(name)
    again = tmp_path / "again.csv"
    rows.write_rows(again, rows.read_rows(script.TABLE, script.Row))
    assert again.read_bytes() == script.TABLE.read_bytes()


def test_suites_on_one_network_leave_the_rows_of_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(RESULTS)
    script = importlib.import_module("standard")
    table = tmp_path / "standard.csv"
    before = script.TABLE.read_text(encoding="utf-8").splitlines()
    table.write_bytes(script.TABLE.read_bytes())
    found = {field: "made up" for field in script.Row.__dataclass_fields__ if field != "network"}

    def evaluated(name, suite, options, run):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "report.json").touch()

    def row(name, suite, report):
        return script.Row(**found | {"network": name, "suite": suite})

    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "TABLE", table)
    monkeypatch.setattr(script, "evaluate", evaluated)
    monkeypatch.setattr(script, "row", row)
    monkeypatch.setattr(script.Report, "load", lambda path: None)
    monkeypatch.setattr("sys.argv", ["standard.py", "digits/lif-at"])
    script.main()
    after = table.read_text(encoding="utf-8").splitlines()
    assert len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert ("made up" in new) == old.startswith("digits/lif-at,")
        assert new == old or "made up" in new
    assert "digits/lif-at | made up" in capsys.readouterr().out


def test_an_evaluation_is_kept_until_training_changes_the_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    script = importlib.import_module("pretrained")
    trained = script.ROOT / script.SHIPPED / "digits" / "lif.pt"
    monkeypatch.setattr(script, "ROOT", tmp_path)
    best = tmp_path / script.RUNS / "digits" / "lif" / "lif" / "best.pt"
    best.parent.mkdir(parents=True)
    best.write_bytes(trained.read_bytes())
    (best.parents[1] / "report.json").touch()
    report = tmp_path / script.EVALUATIONS / "digits" / "lif" / "standard" / "report.json"
    script.train("digits/lif")
    report.parent.mkdir(parents=True)
    report.touch()
    script.train("digits/lif")
    assert report.exists()
    content = load_checkpoint(best)
    next(iter(content["model"].values())).add_(1)
    save_checkpoint(best, {key: content[key] for key in ("description", "model")})
    script.train("digits/lif")
    assert not report.exists()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The script, with a folder of its own, and a network that it takes for trained."""
    monkeypatch.syspath_prepend(RESULTS)
    script = importlib.import_module("pretrained")
    read = load_checkpoint(script.ROOT / script.SHIPPED / "digits" / "lif.pt")
    content = {key: read[key] for key in ("description", "model")}
    monkeypatch.setattr(script, "ROOT", tmp_path)

    def train(name):
        run = tmp_path / script.RUNS / name
        (run / "lif").mkdir(parents=True, exist_ok=True)
        (run / "report.json").touch()
        save_checkpoint(run / "lif" / "best.pt", content)
        script.train(name)
        (file,) = script.files(name)
        return file

    return script, content["model"], train


def test_weights_are_rounded_and_put_into_the_package(trained):
    script, weights, train = trained
    file = train("mnist/certified-0.1")
    assert file == script.ROOT / script.SHIPPED / "mnist" / "certified-0.1.pt"
    assert not (script.ROOT / script.ASSETS).exists()
    stored = load_checkpoint(file)["model"]
    assert stored.keys() == weights.keys()
    for name, value in weights.items():
        expected = value.half() if value.is_floating_point() else value
        assert torch.equal(stored[name], expected)


def test_large_files_are_put_with_their_digests_under_names_of_their_own(trained):
    script, weights, train = trained
    other = train("cifar10/certified-8")
    weights["net.first.weight"].add_(1)
    file = train("cifar10/certified-8")
    digest = sha256(file.read_bytes()).hexdigest()
    assets = script.ROOT / script.ASSETS
    assert other != file == assets / f"cifar10-certified-8-{digest[:8]}.pt"
    assert sorted(assets.iterdir()) == [assets / "SHA256SUMS", file]
    assert (assets / "SHA256SUMS").read_text() == f"{digest}  {file.name}\n"


def test_every_command_that_trains_a_network_has_options_of_the_recipe(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    script = importlib.import_module("pretrained")
    monkeypatch.chdir(script.ROOT)
    for name in script.NETWORKS:
        recipe, *words = script.training_command(name)
        assert Path(recipe).exists()
        adv_train.completed(read_options(adv_train.Options, words))


def test_a_report_of_trainings_has_commands_options_commits_and_every_epoch(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    script = importlib.import_module("trainings")
    run = tmp_path / "run"
    small = "--train-limit 80 --test-limit 8 --epochs 2 --channels 2 2 --mode certified"
    words = f"--no-reference {small} --output {run}".split()
    try:
        adv_train.main(words)
    finally:
        AcceleratorState._reset_state(True)
    target = tmp_path / "report.txt"
    monkeypatch.setattr("sys.argv", ["trainings.py", str(run), "--output", str(target)])
    script.main()
    command, options, versions, *epochs = target.read_text().splitlines()
    assert command == shlex.join(["python", "recipes/adv_train.py", *words])
    assert options.startswith(
        "options: train_limit 80, test_limit 8, channels [2, 2], mode certified,"
    )
    assert "threads" not in options
    assert f"torch {torch.__version__}, " in versions
    assert [line.split(" epoch ")[1][:3] for line in epochs[:2]] == ["1/2", "2/2"]
    assert epochs[2] == "| accuracy, % | dlif certified |"
    assert "verified at Linf" in epochs[-1]

    log = run / "log.txt"
    text = log.read_text()
    log.write_text(text.replace("  commit: ", "  commit: other\n  commit: ", 1))
    assert "commit other then " in script.report(run)
    log.write_text(text.split("evaluating")[0])
    with pytest.raises(SystemExit, match="is not finished; finish it with adv_train.py --resume"):
        script.report(run)
