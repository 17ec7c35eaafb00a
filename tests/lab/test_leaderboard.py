"""The table of stored reports: rebuilt the same, for a telephone too, and what changed is named."""

import csv
import re
from dataclasses import asdict, replace
from pathlib import Path

import evaluate
import pytest
from evaluation.reports import member, report, stress_report
from lab.leaderboard.tables import (
    elsewhere,
    groups_of,
    make_leaderboard,
    read_reports,
    short_name,
)
from narrow_screen import CHROMIUM, measured

from sj_robust.attacks import ThreatModel

ROOT = Path(__file__).parents[2]
FILES = ("leaderboard.md", "leaderboard.html", "reports.csv")
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
    """Reports of two networks, one with the options that made it, and files that are none."""
    monkeypatch.chdir(tmp_path)
    network = {"fingerprint": "other"}
    weaker = report(name="<lif|none>", members=(member("pgd", range(6)),), network=network)
    for name, one in (
        ("b", weaker),
        ("a", replace(report(verified=(7,)), configuration=OPTIONS)),
        ("c/d", replace(report(), threat=ThreatModel("L2", 0.5))),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        one.save(tmp_path / "runs" / name / "report.json")
    (tmp_path / "runs" / "other.json").write_text("[1]")
    stress_report().save(tmp_path / "runs" / "card.json")  # of which there are no figures here
    return tmp_path


def test_rebuilt_from_the_stored_reports_it_is_identical(folder, capsys):
    make_leaderboard(["runs"], folder / "one", USUAL)
    said = "leaderboard.md, leaderboard.html and reports.csv of 3 reports are in"
    assert capsys.readouterr().out == f"{said} {folder / 'one'}\n"
    make_leaderboard(["runs/c", "runs/b/report.json", "runs/a", "runs"], folder / "two", USUAL)
    for name in FILES:
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    text = (folder / "one" / "leaderboard.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## digits, L2 0.5, 10 images", "## digits, Linf 0.1, 10 images"]
    rows = [line for line in text.splitlines() if re.match(r"\| (dlif_at|&lt;lif)", line)]
    bars = ["▒" * 6 + "·" * 14, "█" * 2 + "▒" * 4 + "·" * 14, "▒" * 4 + "·" * 16]
    assert rows == [
        f"| dlif_at<br>`{bars[0]}` | 80.0 |  | 30.0<br>10.8–60.3 | fast * |",
        f"| dlif_at<br>`{bars[1]}` | 80.0 | 10.0 | 30.0<br>10.8–60.3 | fast * |",
        f"| &lt;lif\\|none&gt;<br>`{bars[2]}` | 80.0 |  | 20.0<br>5.7–51.0 | fast * |",
    ]
    command = "python recipes/evaluate.py 'runs/a b' --eps 8/255 --no-proofs --mean 0.5"
    with (folder / "one" / "reports.csv").open(newline="") as file:
        listed = {line["file"]: line for line in csv.DictReader(file)}
    assert listed.keys() == {f"runs/{name}/report.json" for name in ("a", "b", "c/d")}
    assert listed["runs/a/report.json"]["command"] == f"{command} --trust-code"
    assert listed["runs/b/report.json"]["at most, %"] == "20.0"
    page = (folder / "one" / "leaderboard.html").read_text()
    assert "<h2>digits, Linf 0.1, 10 images</h2>" in page
    assert "<td>&lt;lif|none&gt;</td>" in page
    assert "<td>20.0<br><small>5.7\N{EN DASH}51.0</small></td>" in page
    assert 'aria-label="proved 10.0 %, at most 30.0 %, clean 80.0 %"' in page
    assert "http" not in page


def test_few_images_have_a_table_of_their_own(folder):
    stands = member("pgd", seen=range(2))
    lucky = report(name="lucky", members=(stands,), right=range(2), total=2)
    lucky.save(folder / "runs" / "a" / "few.json")
    groups = groups_of(read_reports(["runs/a", "runs/b"], {}))
    titles = [(group.title, [entry.name for entry in group.entries]) for group in groups]
    assert titles == [
        ("digits, Linf 0.1, 10 images", ["dlif_at", "<lif|none>"]),
        ("digits, Linf 0.1, 2 images", ["lucky"]),
    ]


def test_other_images_of_the_same_number_have_a_table_of_their_own(folder):
    others = replace(report(name="others"), data="other")
    others.save(folder / "runs" / "a" / "others.json")
    groups = groups_of(read_reports(["runs/a", "runs/b"], {}))
    titles = [(group.title, [entry.name for entry in group.entries]) for group in groups]
    known = report().data
    assert titles == [
        (f"digits, Linf 0.1, 10 images ({known})", ["dlif_at", "<lif|none>"]),
        ("digits, Linf 0.1, 10 images (other)", ["others"]),
    ]


def test_all_reports_about_a_network_make_one_row(folder):
    harder = replace(report(members=(member("pgd", range(7)),)), suite="standard")
    harder.save(folder / "runs" / "a" / "harder.json")
    group = groups_of(read_reports(["runs/a"], {}))[0]
    (entry,) = group.entries
    assert entry.suites == ("standard", "fast")
    assert (entry.clean, entry.proved, entry.at_most) == (80.0, 10.0, 10.0)


def test_networks_under_weaker_suites_are_listed_apart(folder):
    full = replace(report(name="full", members=(member("pgd", range(7)),)), suite="standard")
    replace(full, network={"fingerprint": "full"}).save("runs/a/full.json")
    ((_, ranked), (above, weaker)) = groups_of(read_reports(["runs/a", "runs/b"], {}))[0].tables
    assert [entry.name for entry in ranked] == ["full"]
    assert [entry.name for entry in weaker] == ["dlif_at", "<lif|none>"]  # which keep more
    make_leaderboard(["runs/a", "runs/b"], folder / "board", USUAL)
    for name, mark in (("leaderboard.md", above), ("leaderboard.html", '<table class="weaker">')):
        first, second = (folder / "board" / name).read_text().split(mark)
        assert "full" in first
        assert "dlif_at" not in first
        assert "dlif_at" in second


def test_reports_that_contradict_each_other_prove_nothing(folder, capsys):
    # "a" proves image 7
    replace(report(members=(member("pgd", (7,)),)), suite="standard").save("runs/a/breaks.json")
    (entry,) = groups_of(read_reports(["runs/a"], {}))[0].entries
    assert entry.disputed
    assert entry.proved is None
    assert entry.cells()[-1] == "fast, standard ? *"
    make_leaderboard(["runs"], folder / "board", USUAL)
    said = "a report proves an image that another breaks, so one of them is wrong; evaluate"
    assert said in capsys.readouterr().out
    own_radius = member("pgd", (7,), eps=0.2, largest=0.2, outside=(7,))
    replace(report(members=(own_radius,)), suite="standard").save("runs/a/breaks.json")
    (entry,) = groups_of(read_reports(["runs/a"], {}))[0].entries
    assert entry.proved == 10.0


def test_what_is_no_report_is_passed_over(folder):
    few = read_reports(["runs"], {})
    (folder / "runs" / "latin.json").write_bytes('{"format": "é"}'.encode("latin-1"))
    (folder / "runs" / "deep.json").write_text("[" * 100_000)
    (folder / "runs" / "long.json").write_text('{"seed": ' + "9" * 5000 + "}")
    (folder / "runs" / "list.json").write_text('{"format": ["x"]}')
    (folder / "runs" / "folder.json").mkdir()
    assert read_reports(["runs"], {}) == few


@pytest.mark.parametrize("change", [{"name": 3}, {"dataset": None}, {"configuration": [1]}])
def test_a_report_with_a_field_of_another_type_is_named(folder, change):
    replace(report(), **change).save("runs/a/report.json")
    (name,) = change
    with pytest.raises(ValueError, match=rf"runs/a/report.json: {name} must be .*was changed"):
        make_leaderboard(["runs/a"], folder / "board", USUAL)


def test_names_are_text_in_markdown(folder):
    replace(report(), name="a <b>\n## c | d [e](f) \\[g](h)").save("runs/a/report.json")
    make_leaderboard(["runs/a"], folder / "board", USUAL)
    text = (folder / "board" / "leaderboard.md").read_text()
    assert "| a &lt;b&gt; ## c \\| d \\[e](f) \\\\\\[g](h)<br>" in text


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
    assert capsys.readouterr().out.startswith("leaderboard.md, leaderboard.html and")
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
    (folder / "reports.csv").write_text("mine\n1\n")
    with pytest.raises(ValueError, match=r"reports\.csv is not that of a leaderboard; remove it"):
        make_leaderboard(["runs"], folder, USUAL)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no robustness report in empty"):
        read_reports(["empty"], {})


def test_the_one_in_the_docs_is_that_of_the_reports_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    home = ROOT / "docs" / "results" / "leaderboard"
    make_leaderboard(["docs/results/leaderboard"], tmp_path, asdict(evaluate.Options()))
    for name in FILES:
        found = (tmp_path / name).read_text(encoding="utf-8")
        expected = (home / name).read_text(encoding="utf-8")
        assert found == expected, (
            "python recipes/evaluate.py --leaderboard docs/results/leaderboard --output "
            "docs/results/leaderboard"
        )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_telephone_shows_four_columns_without_scrolling_sideways(tmp_path):
    page = ROOT / "docs" / "results" / "leaderboard" / "leaderboard.html"
    found = measured(page.read_text(encoding="utf-8"), tmp_path, width=390)
    assert found["width"] == 390
    assert found["scroll"] <= found["client"]
    assert len(found["heads"]) % 5 == 0
    for first in range(0, len(found["heads"]), 5):
        network, clean, proved, at_most = found["heads"][first : first + 4]
        assert 0 < network < clean < proved < at_most <= found["client"]
    assert (tmp_path / "page.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("dataset", "heading"),
    [
        ("digits", "digits"),
        ("saccade:mnist", "saccade:mnist"),
        ("image_folder:data/cifar10_pictures/", "cifar10_pictures"),
    ],
)
def test_a_heading_names_a_folder_by_its_last_part(dataset, heading):
    assert short_name(dataset) == heading


def test_a_report_is_added_to_those_that_the_table_lists(folder):
    board = folder / "board"
    assert elsewhere(board) == []
    make_leaderboard(["runs/a", "runs/b"], board, USUAL)
    report(name="mine").save(board / "mine.json")
    assert elsewhere(board) == ["runs/a/report.json", "runs/b/report.json"]
    make_leaderboard([str(board), *elsewhere(board)], board, USUAL)
    assert "mine" in (board / "leaderboard.md").read_text()
    assert elsewhere(board) == ["runs/a/report.json", "runs/b/report.json"]
    (folder / "runs" / "a" / "report.json").unlink()
    assert elsewhere(board) == ["runs/b/report.json"]
