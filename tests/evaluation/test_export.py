"""What leaves a report for papers and programs is what the report says."""

import csv
import io
import re
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
from evaluation.reports import LINF, member, over_eps, proof, report, stress_report

from sj_robust.attacks import ThreatModel
from sj_robust.core.saved import SavedResult
from sj_robust.evaluation import Report
from sj_robust.evaluation.report import export
from sj_robust.evaluation.report.levels import WHATS, levels
from sj_robust.evaluation.result import Row


def of_a_suite():
    return report(verified=(4, 7), curve=over_eps())


def of_a_training():
    rows = []
    for variant, fallen in (("before", (0, 1)), ("after", (0,))):
        rows.append(Row("clean", "clean", (0, 1, 2), fallen[:1], variant=variant))
        rows.append(Row("gaussian", "attack", (1, 2), (), variant=variant))
        more = {"variant": variant, "threat": LINF, "seconds": 0.1}
        rows.append(Row("pgd20", "attack", (1, 2), fallen[1:], **more))
    return Report("a_net", "digits", "training", (0, 1, 2), rows, threat=LINF)


def of_a_vote():
    rows = [Row("clean", "clean", (0, 1, 2), (0,))]
    for eps, left in ((0.0, (0,)), (0.25, (0, 1))):
        threat = ThreatModel("L2", eps)
        rows.append(Row("smooth", "proof", (0, 1, 2), left, threat=threat, alpha=0.001))
    return Report("votes", "digits", "vote", (0, 1, 2), rows, threat=ThreatModel("L2", 0.25))


@dataclass
class Margin(SavedResult, what="a margin", format="mine", version=1):
    value: float


KINDS = {
    "suite": of_a_suite,
    "stress": stress_report,
    "training": of_a_training,
    "vote": of_a_vote,
}


@pytest.fixture(params=KINDS)
def one(request):
    return KINDS[request.param]()


def lines_of(one):
    return list(csv.DictReader(io.StringIO(one.to_csv())))


def test_a_csv_gives_every_number_back_as_it_was(one, tmp_path):
    lines = lines_of(one)
    rows = export.exported(one)
    assert len(lines) == len(rows) > 1
    for line, row in zip(lines, rows, strict=True):
        read = {name: type(value)(line[name]) for name, value in vars(row).items()}
        assert read == vars(row)
        assert row.accuracy == row.correct / row.total
        assert 0 <= row.low <= row.accuracy <= row.high <= 1
    assert one.to_csv(tmp_path / "figures.csv") == (tmp_path / "figures.csv").read_text()


@pytest.mark.parametrize(
    ("ending", "begins"),
    [("json", "{"), ("html", "<!DOCTYPE html>"), ("CSV", "network,"), ("tex", "\\begin{table}")],
)
def test_a_report_is_saved_as_its_file_is_called(ending, begins, tmp_path):
    name = f"{'é' * 120}.{ending}"  # of 245 bytes at most
    of_a_suite().save(str(tmp_path / name))
    assert (tmp_path / name).read_text().startswith(begins)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("report.pdf", ValueError, "path"),
        ("report.txt", ValueError, "path"),
        ("report", ValueError, "path"),
        ("missing/report.json", FileNotFoundError, "missing is no folder"),
        (f"{'n' * 300}.json", ValueError, "255 bytes"),
    ],
)
def test_a_report_is_saved_under_known_endings_in_folders_that_exist(name, error, said, tmp_path):
    for result in (of_a_suite(), Margin(0.5)):
        with pytest.raises(error, match=said):
            result.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("writes", "ending"), [("page", ".html"), ("to_csv", ".csv"), ("to_latex", ".tex")]
)
@pytest.mark.parametrize("name", ["report.pdf", "report.json", f"{'n' * 300}{{ending}}"])
def test_a_file_of_another_format_or_too_long_a_name_is_refused_at_once(
    writes, ending, name, tmp_path
):
    empty = Report.__new__(Report)  # of which nothing can be made
    with pytest.raises(ValueError, match="path"):
        getattr(empty, writes)(tmp_path / name.format(ending=ending))
    assert list(tmp_path.iterdir()) == []


def test_a_csv_holds_every_figure_of_a_suite():
    suite = of_a_suite()
    rows = export.exported(suite)
    said = {(row.name, row.correct, row.total) for row in rows if row.variant == ""}
    assert said == {(found.name, found.correct, found.total) for found in suite.accuracies}
    clean, *curve = suite.over_eps
    members = [row for row in rows if row.variant == "over eps" and row.kind == "member"]
    assert [row.correct for row in members] == [clean.correct, *(one.correct for one in curve)]
    assert [row.eps for row in members] == ["", *(one.eps for one in curve)]


def test_a_csv_holds_every_figure_of_the_others():
    found = {(row.variant, row.name): row for row in export.exported(of_a_training())}
    assert found["before", "pgd20"].correct == 1
    assert found["after", "pgd20"].correct == 2
    votes = [(row.eps, row.kind, row.correct) for row in export.exported(of_a_vote())]
    expected = [("0", "verified", 2), ("0", "everything", 2), ("0.25", "verified", 1)]
    assert votes[:3] == expected
    stressed = stress_report()
    found = {(row.variant, row.name): row.correct for row in export.exported(stressed)}
    for level in levels(stressed):
        for what in WHATS:
            assert found[f"{level.kind}:{level.level:g}", what] == level.mean(what)


def test_latex_is_a_table_that_any_paper_can_take(one, tmp_path):
    text = one.to_latex(tmp_path / "table.tex")
    assert (tmp_path / "table.tex").read_text() == text
    begun = re.findall(r"\\begin\{(\w+)\}", text)
    assert begun == re.findall(r"\\end\{(\w+)\}", text)[::-1] == ["table", "tabular"]
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert text.count(rule) == 1
    columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1])
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(body) > 1
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
    shown = [line for line in one.table().splitlines() if line.startswith("| ")]
    assert len(body) == len(shown) - 1  # without the marks of the columns


def test_latex_escapes_what_it_would_read_as_a_command():
    text = replace(of_a_training(), name="a_b & 5% #1 $x$ {y} ~z^2 \\cite <c> |d|").to_latex()
    escaped = (
        r"a\_b \& 5\% \#1 \$x\$ \{y\} \textasciitilde{}z\textasciicircum{}2 \textbackslash{}cite "
    )
    escaped += r"\textless{}c\textgreater{} \textbar{}d\textbar{}"
    assert rf"\caption{{{escaped} on digits: suite training" in text


@pytest.mark.skipif(find_spec("pandas") is None, reason="needs pandas, of the extra test")
def test_a_data_frame_holds_the_same(one):
    frame = one.to_dataframe()
    rows = export.exported(one)
    assert frame.to_dict("records") == [vars(row) for row in rows]


def test_without_pandas_the_remedy_is_named(one, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sj_robust\[pandas\]'"):
        one.to_dataframe()


def test_a_proof_is_exported_with_its_radius():
    proved = report(verified=(4, 7))
    (row,) = [row for row in export.exported(proved) if row.kind == "verified"]
    assert (row.eps, row.correct) == ("0.1", len(proof((4, 7)).stood))
    curve = (*over_eps(), replace(proof((4, 7), eps=0.05), variant="over eps"))
    rows = [row for row in export.exported(report(curve=curve)) if row.kind == "verified"]
    assert [(row.variant, row.eps, row.correct) for row in rows] == [("over eps", "0.05", 2)]


def test_what_has_no_threat_is_exported_without_one():
    rows = export.exported(of_a_training())
    found = {row.name: (row.norm, row.eps) for row in rows}
    assert found == {"clean": ("", ""), "gaussian": ("", ""), "pgd20": ("Linf", "0.1")}
    other = member("l2", (4,), norm="L2", eps=0.5, outside=(4,))
    suite = report(members=(*report().rows[1:], other))
    found = {row.name: (row.norm, row.eps) for row in export.exported(suite)}
    assert found["clean"] == found["gaussian"] == ("", "")
    assert found["l2"] == ("L2", "0.5")
    assert found["everything"] == found["apgd_ce/atan:4/r0"] == ("Linf", "0.1")


def test_a_bar_in_a_name_splits_no_column():
    name = "net | one"
    rows = [replace(row, variant=name) for row in (*of_a_suite().rows[:1], member("a|b", (1,)))]
    one = Report(name, "digits", "training", (0,) * 10, rows, threat=LINF)
    head, _, *lines = one.table().splitlines()
    assert head == r"| accuracy, % | net \| one |"
    assert lines[1] == r"| a\|b | 70.0 |"
    body = [line for line in one.to_latex().splitlines() if line.endswith(r" \\")]
    assert body[0] == r"accuracy, \% & net \textbar{} one \\"
    assert body[-1] == r"a\textbar{}b & 70.0 \\"
    assert "<th>accuracy, %</th><th>net | one</th></tr>" in one._repr_html_()
