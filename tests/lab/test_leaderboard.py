"""The table of stored reports: rebuilt the same, sorted, and what changed is named."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import evaluate
import pytest
from evaluation.reports import member, report, stress_report
from lab.leaderboard import make_leaderboard, read_reports

from sj_robust.attacks import ThreatModel

ROOT = Path(__file__).parents[2]
USUAL = {
    "checkpoint": None,
    "network": None,
    "eps": None,
    "proofs": True,
    "mean": None,
    "trust_code": False,
    "seed": 0,
}
OPTIONS = USUAL | {
    "checkpoint": "runs/a b",
    "eps": "8/255",
    "proofs": False,
    "mean": [0.5],
    "trust_code": True,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three reports, one with the options that made it, and files that are none."""
    monkeypatch.chdir(tmp_path)
    weaker = report(name="<lif|none>", members=(member("pgd", range(6)),))
    for name, one in (
        ("b", weaker),
        ("a", replace(report(), configuration=OPTIONS)),
        ("c/d", replace(report(), threat=ThreatModel("L2", 0.5))),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        one.save(tmp_path / "runs" / name / "report.json")
    (tmp_path / "runs" / "other.json").write_text("[1]")
    stress_report().save(tmp_path / "runs" / "card.json")  # of which there are no figures here
    return tmp_path


def test_rebuilt_from_the_stored_reports_it_is_identical(folder, capsys):
    make_leaderboard(["runs"], folder / "one", USUAL)
    assert (
        capsys.readouterr().out
        == f"leaderboard.md and leaderboard.html of 3 reports are in {folder / 'one'}\n"
    )
    make_leaderboard(["runs/c", "runs/b/report.json", "runs/a", "runs"], folder / "two", USUAL)
    for name in ("leaderboard.md", "leaderboard.html"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    text = (folder / "one" / "leaderboard.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| (dlif_at|<lif)", line)]
    assert [row[0][2:] for row in rows] == [
        "dlif_at",
        "dlif_at",
        "<lif\\|none>",
    ]  # by threat, then by what is left
    assert "| 80.0 |" in text  # clean
    assert (
        rows[1][-1] == "python recipes/evaluate.py 'runs/a b' --eps 8/255 --no-proofs --mean 0.5 "
        "--trust-code |"
    )
    page = (folder / "one" / "leaderboard.html").read_text()
    assert "<td>&lt;lif|none&gt;</td>" in page
    assert "http" not in page


def test_a_changed_report_is_named(folder, capsys):
    make_leaderboard(["runs"], folder / "one", USUAL)
    replace(report(), seed=8).save(folder / "runs" / "a" / "report.json")
    (folder / "runs" / "b" / "report.json").unlink()
    capsys.readouterr()
    make_leaderboard(["runs"], folder / "one", USUAL)
    found = capsys.readouterr().out.splitlines()[:-1]
    assert found == [
        "gone since the last leaderboard: runs/b/report.json",
        "changed since the last leaderboard: runs/a/report.json",
    ]
    make_leaderboard(["runs"], folder / "one", USUAL)
    assert capsys.readouterr().out.startswith("leaderboard.md and")
    path = folder / "runs" / "a" / "report.json"
    path.write_text(path.read_text().replace('"clean_acc": "80.00"', '"clean_acc": "99.00"'))
    with pytest.raises(
        ValueError,
        match=r"a/report.json: clean_acc of the report does not follow from its rows",
    ):
        read_reports(["runs"], {})


def test_wrong_use(folder):
    with pytest.raises(
        FileNotFoundError, match="nowhere does not exist; --leaderboard takes folders"
    ):
        read_reports(["runs", "nowhere"], {})
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no robustness report in empty"):
        read_reports(["empty"], {})


def test_the_one_in_the_docs_is_that_of_the_reports_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    home = ROOT / "docs" / "results" / "leaderboard"
    make_leaderboard(["docs/results/leaderboard"], tmp_path, asdict(evaluate.Options()))
    for name in ("leaderboard.md", "leaderboard.html"):
        found = (tmp_path / name).read_text(encoding="utf-8")
        expected = (home / name).read_text(encoding="utf-8")
        assert found == expected, (
            "python recipes/evaluate.py --leaderboard docs/results/leaderboard --output "
            "docs/results/leaderboard"
        )
