"""A report for papers and programs: LaTeX, CSV, a pandas data frame, the fields of RobustBench's
model cards, and a model on the Hugging Face Hub (extra ``hub``).
"""

import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sj_robust.core.eps import eps_text
from sj_robust.core.saved import csv_text, markdown_cells, plain
from sj_robust.core.threat import ThreatModel
from sj_robust.data.files import one_line
from sj_robust.evaluation.report.levels import WHATS, intact, levels
from sj_robust.evaluation.report.table import table
from sj_robust.evaluation.report.verdict import alarms, budget, masked, remarks, verdict
from sj_robust.evaluation.result import OVER_EPS, Accuracy, Evaluation

if TYPE_CHECKING:
    import pandas
    from huggingface_hub import EvalResult

__all__ = [
    "COUNTED",
    "DERIVED",
    "Exported",
    "derived",
    "exported",
    "footnote",
    "hub_card",
    "push_to_hub",
    "to_csv",
    "to_dataframe",
    "to_latex",
]

COUNTED = ("clean_acc", "autoattack_acc", "external", "figures", "outcome")
"""What a file holds that must follow from the rows when it is read."""
DERIVED = ("norm", "eps", "architecture", "unreliable", "footnote", *COUNTED)
"""All that a file of a suite of attacks holds beside the fields."""
_TAGS = ["spiking-neural-network", "spikingjelly", "adversarial-robustness"]
_SUMMARIES = {"clean": "clean", "everything": "robust", "verified": "verified"}
"""Kinds of figures that a card of a suite states, and what it calls them."""
_WEIGHTS = "model.pt"
_LOADING = f"""## Weights

`{_WEIGHTS}` is the state dict: `net.load_state_dict(torch.load("{_WEIGHTS}", weights_only=True))`.
"""
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
    seconds: float = 0.0


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
    _check_package("pandas", "to_dataframe", "pandas")
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


def derived(report: Evaluation) -> dict[str, Any]:
    """Accuracies and names of RobustBench: ``external`` is the lowest accuracy known, ``outcome``
    per image the first attack that broke it; a report of several networks has no card.

    Source: ``model_info`` of RobustBench (Croce et al., NeurIPS 2021 Datasets and Benchmarks).
    """
    if not report.is_suite:
        return {}
    figures = [
        asdict(one) | {"accuracy": one.accuracy, "interval": list(one.interval)}
        for one in report.accuracies
    ]
    of_autoattack = report.suite == "autoattack"
    card = {
        "norm": None if report.threat is None else report.threat.norm,
        "eps": report.eps or None,
        "architecture": report.architecture,
        "clean_acc": f"{100 * report.clean.accuracy:.2f}",
        "autoattack_acc": f"{100 * report.worst_case.accuracy:.2f}" if of_autoattack else None,
        "external": f"{100 * report.everything.accuracy:.2f}",
        "unreliable": bool(footnote(report)),
        "footnote": footnote(report),
        "figures": figures,
        "outcome": report.outcome,
    }
    found: dict[str, Any] = plain(card)
    return found


def footnote(report: Evaluation) -> str:
    """The first alarm, if there is one."""
    return next(iter((*alarms(report), *masked(report))), "")


def hub_card(report: Evaluation, *, has_weights: bool = False) -> str:
    """README.md of a model on the Hub: figures that its pages show, the verdict, the table, and how
    it was measured. Hub 模型卡。

    Args:
        report: The report.
        has_weights: Whether the weights lie beside it, so that the card says how to load them.

    Raises:
        ModuleNotFoundError: If huggingface_hub is not installed.
    """
    _check_package("huggingface_hub", "a model card of the Hub", "hub")
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        model_name=report.name,
        library_name="sj_robust",
        pipeline_tag="image-classification",
        tags=_TAGS,
        eval_results=list(_results(report)),
    )
    doubts = [f"**{text}**" for text in (*alarms(report), *masked(report))]
    where = [f"- {name}: {value}" for name, value in report.environment.items()]
    parts = [
        f"# {report.name}",
        verdict(report),
        *doubts,
        f"Measured with sj_robust on {len(report.labels)} images of {report.dataset}: "
        f"{budget(report.threat)}, suite {report.suite}. `report.json` has the outcome per image.",
        table(report),
        *remarks(report),
        *([_LOADING] if has_weights else []),
        "## Environment",
        "\n".join(where),
    ]
    text = "\n\n".join(part for part in parts if part)
    return f"---\n{head.to_yaml()}\n---\n\n{text}\n"


def push_to_hub(
    report: Evaluation,
    text: str,
    repo_id: str,
    *,
    network: nn.Module | str | Path | None = None,
    token: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> str:
    """Upload card, report and network, in one commit; returns the address. 上传到 Hub。

    Args:
        report: The report.
        text: The report as JSON.
        repo_id: ``"OWNER/NAME"`` of the model, which is made if it is not there.
        network: A network, whose state dict is uploaded, or a file such as ``best.pt``; None for
            none.
        token: Token of the Hub; None takes that of ``hf auth login``.
        private: Whether a new model is private.
        endpoint: Address of another Hub; None for the public one.

    Raises:
        ModuleNotFoundError: If huggingface_hub is not installed.
        TypeError: If ``network`` is neither a network nor a path.
        FileNotFoundError: If there is no such file.
        ConnectionError: If the Hub cannot be reached.
    """
    _check_package("huggingface_hub", "a model card of the Hub", "hub")
    from huggingface_hub import HfApi

    if network is not None and not isinstance(network, nn.Module | str | Path):
        raise TypeError(
            f"network must be a network or the path of a file, got {type(network).__name__}; give "
            "the network that was evaluated, or its best.pt"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        is_module = isinstance(network, nn.Module)
        card = hub_card(report, has_weights=is_module)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "report.json").write_text(text, encoding="utf-8")
        if isinstance(network, nn.Module):
            torch.save(network.state_dict(), folder / _WEIGHTS)
        elif network is not None:
            shutil.copy2(network, folder)
        hub = HfApi(endpoint=endpoint, token=token)
        try:
            address = hub.create_repo(repo_id, private=private, exist_ok=True)
        except Exception as error:  # its class changes with the client that huggingface_hub has
            if not _is_of_connection(error):
                raise
            raise ConnectionError(
                f"{hub.endpoint} cannot be reached ({one_line(error)}); push again with a "
                "connection, or give another endpoint: Report.save keeps the report until then"
            ) from error
        hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Report of sj_robust: suite {report.suite}",
        )
    return str(address)


def _check_package(name: str, what: str, extra: str) -> None:
    if find_spec(name) is None:
        raise ModuleNotFoundError(
            f"{what} needs {name}, which is not installed: pip install 'sj_robust[{extra}]'",
            name=name,
        )


def _results(report: Evaluation) -> Iterable["EvalResult"]:
    """Figures as the Hub shows them beside the card."""
    from huggingface_hub import EvalResult

    rows = exported(report)
    summaries = [row for row in rows if row.kind in _SUMMARIES and row.variant == report.main]
    for row in summaries if report.is_suite else rows:
        yield EvalResult(
            task_type="image-classification",
            dataset_type=report.dataset,
            dataset_name=report.dataset,
            metric_type="accuracy",
            metric_name=_metric(row, is_suite=report.is_suite),
            metric_value=round(100 * row.accuracy, 2),
        )


def _metric(row: Exported, *, is_suite: bool) -> str:
    """Name of a figure, with the threat that it is under."""
    name = _SUMMARIES[row.kind] if is_suite else " ".join(filter(None, (row.variant, row.name)))
    threat = f", {row.norm} {row.eps}" if row.eps else ""
    suite = f", suite {row.suite}" if row.kind == "everything" else ""
    return f"{name} accuracy, %{threat}{suite}"


def _is_of_connection(error: BaseException | None) -> bool:
    """Whether what a client raises comes from a connection that failed."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


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
            yield Exported(
                network=report.name,
                dataset=report.dataset,
                suite=report.suite,
                norm=_norm(threat),
                eps=_eps(threat),
                variant="none" if one.kind == "none" else f"{one.kind}:{one.level:g}",
                name=what,
                kind="member",
                correct=one.mean(what),
                total=one.images,
                accuracy=one.mean(what) / one.images,
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
    return Exported(
        network=report.name,
        dataset=report.dataset,
        suite=report.suite,
        norm="" if is_clean else norm,
        eps="" if is_clean else eps,
        variant=variant,
        name=one.name,
        kind=one.kind,
        correct=one.correct,
        total=one.total,
        accuracy=one.accuracy,
        low=low,
        high=high,
        seconds=one.seconds,
    )
