"""The figures of a report as LaTeX, CSV or a pandas data frame."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sj_robust.attacks.threat import ThreatModel, eps_text
from sj_robust.core.saved import csv_text, markdown_cells
from sj_robust.evaluation.report.levels import WHATS, intact, levels
from sj_robust.evaluation.report.table import table
from sj_robust.evaluation.report.verdict import budget
from sj_robust.evaluation.result import OVER_EPS, Accuracy, Evaluation

if TYPE_CHECKING:
    import pandas

__all__ = ["Exported", "exported", "to_csv", "to_dataframe", "to_latex"]

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}
_ESCAPES = str.maketrans(_ESCAPED)


@dataclass(frozen=True)
class Exported:
    """A figure of a report with all that it is a figure of: a line of the CSV. 导出的一行。

    Attributes:
        network: Name of the network.
        dataset: Name of the data set.
        suite: Name of the suite.
        norm: Norm of the threat; empty where there is none, as for clean images and noise.
        eps: Radius as text, such as ``"8/255"``; likewise.
        variant: Variant of the network or the images, such as a fault.
        name: What it is the accuracy under.
        kind: ``"member"`` for one attack, else the name of a summary.
        correct: Images classified right, or proved; a mean where there are several draws.
        total: Images.
        accuracy: Share in [0, 1].
        low: Lower end of its 95 % interval.
        high: Upper end.
        seconds: Time that it took.
    """

    network: str
    dataset: str
    suite: str
    norm: str
    eps: str
    variant: str
    name: str
    kind: str
    correct: float
    total: int
    accuracy: float
    low: float
    high: float
    seconds: float


def exported(report: Evaluation) -> list[Exported]:
    """Every figure of a report, one after the other. 报告的全部数值。"""
    if report.of_levels:
        found = _of_levels(report)
    elif report.suite == "vote":
        found = _of_the_vote(report)
    elif report.suite == "training":
        found = _of_a_training(report)
    else:
        found = _of_a_suite(report)
    return list(found)


def to_csv(report: Evaluation) -> str:
    """The figures as CSV with a head; numbers are written so that they are read back equal.
    CSV 文本。
    """
    return csv_text([field.name for field in fields(Exported)], map(asdict, exported(report)))


def to_dataframe(report: Evaluation) -> "pandas.DataFrame":
    """The figures as a data frame of pandas, a row each. pandas 数据表。

    Raises:
        ModuleNotFoundError: If pandas is not installed.
    """
    if find_spec("pandas") is None:
        raise ModuleNotFoundError(
            "to_dataframe needs pandas, which is not installed: pip install 'sj_robust[pandas]'",
            name="pandas",
        )
    from pandas import DataFrame

    columns = [one.name for one in fields(Exported)]
    return DataFrame(map(asdict, exported(report)), columns=columns)


def to_latex(report: Evaluation) -> str:
    """The table of the report for LaTeX, which needs the package booktabs. LaTeX 表格。"""
    heads, marks, *rows = _cells(table(report))
    columns = "".join("r" if mark.endswith(":") else "l" for mark in marks)
    caption = f"{report.name} on {report.dataset}: suite {report.suite}"
    if report.threat is not None:
        caption = f"{caption}, {budget(report.threat)}"
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _line(heads),
        r"\midrule",
        *map(_line, rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cells(markdown: str) -> list[list[str]]:
    """Cells of the table in a text: heads, marks of the columns, rows."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return list(map(markdown_cells, lines))


def _line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(map(_escaped, cells))} \\"


def _escaped(text: str) -> str:
    """A text without what means something to LaTeX."""
    return text.translate(_ESCAPES)


def _of_a_suite(report: Evaluation) -> Iterator[Exported]:
    """All accuracies, and those over the radius."""
    yield from _of_a_variant(report, report.main, report.accuracies)
    for point in report.over_eps:
        left = Accuracy(name=point.attack, kind="member", correct=point.correct, total=point.total)
        at = {"norm": _norm(report.threat), "eps": point.eps, "variant": OVER_EPS}
        yield _row(report, left, **at)
        if point.verified is not None:
            yield _row(report, point.verified, **at)


def _of_a_training(report: Evaluation) -> Iterator[Exported]:
    """The accuracies of every network."""
    for network in report.variants:
        yield from _of_a_variant(report, network, report.single_accuracies(network))


def _of_a_variant(
    report: Evaluation, variant: str, accuracies: Sequence[Accuracy]
) -> Iterator[Exported]:
    """Accuracies with the threat that each is under: that of its attack, for a summary that of the
    report, none for clean images.
    """
    threats = {row.member: row.threat for row in report.of(variant) if row.attacks}
    for one in accuracies:
        threat = threats.get(one.name, report.threat)
        yield _row(report, one, norm=_norm(threat), eps=_eps(threat), variant=variant)


def _of_the_vote(report: Evaluation) -> Iterator[Exported]:
    """What is certified and what is left, by radius."""
    for row in report.rows:
        if row.kind == "proof":
            norm, eps = _norm(row.threat), eps_text(row.eps or 0.0)
            for one in report.bracket_at(row.eps or 0.0):
                yield _row(report, one, norm=norm, eps=eps, variant=report.main)


def _of_levels(report: Evaluation) -> Iterator[Exported]:
    """Clean and attacked, by level of every fault."""
    for one in (intact(report), *levels(report)):
        for what in WHATS:
            low, high = one.interval(what)
            threat = None if what == "clean" else report.threat
            yield _made(
                report,
                norm=_norm(threat),
                eps=_eps(threat),
                variant="none" if one.kind == "none" else f"{one.kind}:{one.level:g}",
                name=what,
                kind="member",
                correct=one.mean(what),
                total=one.images,
                low=low / 100,
                high=high / 100,
            )


def _norm(threat: ThreatModel | None) -> str:
    return "" if threat is None else threat.norm


def _eps(threat: ThreatModel | None) -> str:
    return "" if threat is None else eps_text(threat.eps)


def _row(report: Evaluation, one: Accuracy, *, norm: str, eps: str, variant: str) -> Exported:
    low, high = one.interval
    is_clean = "clean" in (one.kind, one.name)  # which is under no threat
    return _made(
        report,
        norm="" if is_clean else norm,
        eps="" if is_clean else eps,
        variant=variant,
        name=one.name,
        kind=one.kind,
        correct=one.correct,
        total=one.total,
        low=low,
        high=high,
        seconds=one.seconds,
    )


def _made(
    report: Evaluation,
    *,
    norm: str,
    eps: str,
    variant: str,
    name: str,
    kind: str,
    correct: float,
    total: int,
    low: float,
    high: float,
    seconds: float = 0.0,
) -> Exported:
    return Exported(
        network=report.name,
        dataset=report.dataset,
        suite=report.suite,
        norm=norm,
        eps=eps,
        variant=variant,
        name=name,
        kind=kind,
        correct=correct,
        total=total,
        accuracy=correct / total,
        low=low,
        high=high,
        seconds=seconds,
    )
