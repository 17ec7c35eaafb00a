import json

import pytest

from sj_robust.evaluation import Report, Score, ThreatModel
from sj_robust.evaluation.drawings import plot_report


def report():
    record = {
        "epoch": 1,
        "losses": {"total": 1.25},
        "validation": {"clean": 0.5, "pgd": 0.1 + 0.2},
        "lr": 0.1,
    }
    return Report(
        ThreatModel("Linf", 8 / 255),
        (
            Score("dlif at", "clean", 97, 100),
            Score("dlif at", "pgd20", 50, 100),
            Score("lif", "clean", 1, 3),
        ),
        curves={"dlif at": [record]},
        configuration={"channels": (16, 32), "tau": float("inf"), "layers": ["a"], "output": None},
        environment={"torch": "2.13"},
        notes=("扰动",),
    )


def test_a_report_saved_and_loaded_is_equal(tmp_path):
    report().save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    content = json.loads(
        report().to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert (content["format"], content["version"]) == ("sj_robust.report", 1)
    assert content["configuration"]["tau"] == "inf"


def test_table_and_lookup():
    assert report().table().splitlines() == [
        "| accuracy, % | dlif at | lif |",
        "| --- | ---: | ---: |",
        "| clean | 97.0 | 33.3 |",
        "| pgd20 | 50.0 |  |",
    ]
    assert report().accuracy("lif", "clean") == 1 / 3
    with pytest.raises(KeyError, match="pgd20"):
        report().accuracy("lif", "pgd20")


def test_merging():
    other = Report(ThreatModel("Linf", 8 / 255), (Score("if", "clean", 1, 2),), notes=("b",))
    merged = report().merged(other)
    assert merged.networks == ("dlif at", "lif", "if")
    assert merged.notes == ("扰动", "b")
    assert merged.configuration == report().configuration
    with pytest.raises(ValueError, match="same threat"):
        report().merged(Report(ThreatModel("L2", 8 / 255), ()))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "must be JSON"),
        ("[1]", "not a report"),
        ('{"format": "other"}', "not a report"),
        ('{"format": "sj_robust.report", "version": 9}', "version must be 1, got 9"),
        (
            '{"format": "sj_robust.report", "version": 1}',
            r"missing or unknown \('threat'\); the file is damaged",
        ),
    ],
)
def test_foreign_text(text, match):
    with pytest.raises(ValueError, match=match):
        Report.from_json(text)


def test_data_that_json_cannot_hold():
    with pytest.raises(TypeError, match="plain data only, got object"):
        Report(ThreatModel("Linf", 0.1), (), configuration={"x": object()})


def test_the_plot_is_drawn_from_the_report_alone(tmp_path):
    plot_report(Report.from_json(report().to_json()), tmp_path / "a.png")
    plot_report(
        Report(ThreatModel("Linf", 0.1), (Score("lif", "clean", 1, 3),)), tmp_path / "b.png"
    )
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="without scores"):
        plot_report(Report(ThreatModel("Linf", 0.1), ()), tmp_path / "c.png")
