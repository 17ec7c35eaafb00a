"""The report: an evaluation with its views, which can be saved and loaded."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sj_robust.core.folders import check_file
from sj_robust.core.saved import SavedResult, write_whole
from sj_robust.core.shown import Shown, shown_html, write_figure
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.report import export, figures, verdict
from sj_robust.evaluation.report.export import COUNTED, DERIVED, derived, footnote
from sj_robust.evaluation.report.levels import What, fall, mean_accuracy
from sj_robust.evaluation.report.table import accuracies_table, table
from sj_robust.evaluation.result import Evaluation, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.console import Console
    from torch import nn

    from sj_robust.evaluation.report.pictures import Gallery

__all__ = ["Report"]

_STEMS = {"stress": "card", "corruptions": "card", "vote": "smoothed"}
"""Names of files, by suite."""
_REMEDY = (
    "save(path) writes .json, .html, .csv and .tex as the ending says, figures are written by "
    "plot(path=...), all that there is by write(folder)"
)
_NUMBERS = re.compile(r"\[\n\s+[-+.\deE]+(?:,\n\s+[-+.\deE]+)*\n\s*\]")
"""A list of numbers over several lines, some as long as the data set; no text in JSON holds a bare
line break.
"""


@dataclass(frozen=True, repr=False)
class Report(
    Shown,
    SavedResult,
    Evaluation,
    what="a report of sj_robust",
    format="sj_robust.report",
    version=4,
):
    """Result of an evaluation, image by image. 评估报告。

    Suites of attacks, stress tests, smoothed classifiers and trainings all return this report: one
    row per attack with the images that it broke, from which every figure is computed. The JSON of a
    suite also holds the accuracies under the names of RobustBench's model cards (``clean_acc``,
    ``autoattack_acc``, ``external``, ``unreliable``, ``footnote``).

    Examples:
        >>> clean, pgd = Row("clean", "clean", range(3), (2,)), Row("pgd", "attack", (0, 1), (1,))
        >>> report = Report("mine", "digits", "fast", (0, 1, 2), (clean, pgd))
        >>> report.clean.correct, report.worst_case.correct, report.outcome
        (2, 1, (-1, 0, -2))
        >>> Report.from_json(report.to_json()) == report
        True
    """

    @property
    def budget(self) -> str:
        """Norm and radius, or the number of changes, as text for readers."""
        return verdict.budget(self.threat)

    @property
    def verdict(self) -> str:
        """Bounds of the robust accuracy, the attacks that were run, and caveats."""
        return verdict.verdict(self)

    @property
    def caveats(self) -> str:
        """Reasons to distrust the figures, in a few words."""
        return verdict.caveats(self)

    @property
    def alarms(self) -> tuple[str, ...]:
        """Reasons why the network must not be called robust: dead layers, or accuracy at chance."""
        return verdict.alarms(self)

    @property
    def masked(self) -> tuple[str, ...]:
        """Signs of gradient masking, which inflates robust accuracy."""
        return verdict.masked(self)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Further remarks."""
        return verdict.remarks(self)

    @property
    def footnote(self) -> str:
        """The first alarm, if there is one."""
        return footnote(self)

    def fall(self, what: What, *, points: float = 5.0) -> dict[str, float | None]:
        """For every kind of fault, the first level at which accuracy is ``points`` lower than
        without faults; None if there is none.
        """
        return fall(self, what, points)

    def mean_accuracy(self, what: What, kind: str | None = None) -> float:
        """Mean share over the levels of a kind of fault, or of all.

        Raises:
            KeyError: If the report has no such kind.
        """
        return mean_accuracy(self, what, kind)

    def table(self) -> str:
        """Markdown table of all figures."""
        return table(self)

    def figures(self, *, columns: int = 2) -> dict[str, "Figure"]:
        """All figures by name, not saved to files; needs matplotlib (extra ``recipes``).
        报告的全部图。

        Args:
            columns: Number of panels side by side in a figure with several panels.
        """
        return figures.figures(self, columns=columns)

    def plot(self, which: str | None = None, path: str | Path | None = None) -> "Figure":
        """One of the figures. 绘制报告的一张图。

        Args:
            which: Name of the figure, such as ``"accuracy_over_eps"``, ``"attacks"`` (accuracy
                under each) or ``"potential"`` (MS-MPPD of every layer and step); None draws the
                first figure for which the report has numbers.
            path: File to write to, in the format of its suffix.

        Raises:
            ValueError: If the report has no numbers for it.
        """
        found = figures.figures(self)
        name = next(iter(found)) if which is None else which
        if name not in found:
            raise ValueError(f"which must be one of {', '.join(found)}, got {which!r}")
        if path is not None:
            write_figure(found[name], path)
        return found[name]

    def page(self, path: str | Path | None = None, gallery: "Gallery | None" = None) -> str:
        """The report as a self-contained HTML page. 自包含的 HTML 报告。

        Args:
            path: Also write it to this file, which ends in ``.html``.
            gallery: Images under attack to include.

        Raises:
            ValueError: If the report is not of a suite of attacks, or the file ends otherwise.
        """
        from sj_robust.evaluation.report.page import to_html  # imports jinja2

        return _written(partial(to_html, self, gallery), path, ".html")

    def to_latex(self, path: str | Path | None = None) -> str:
        """The table for a paper, in LaTeX with the package booktabs; special characters are
        escaped. LaTeX 表格。

        Args:
            path: Also write it to this file, which ends in ``.tex``.

        Examples:
            >>> rows = [Row("clean", "clean", (0, 1), ())]
            >>> report = Report("my_net", "digits", "fast", (0, 1), rows)
            >>> "clean & 100.0" in report.to_latex()
            True
        """
        return _written(partial(export.to_latex, self), path, ".tex")

    def to_csv(self, path: str | Path | None = None) -> str:
        """Every figure as CSV, one per line; numbers are read back exactly. CSV 文本。

        Args:
            path: Also write it to this file, which ends in ``.csv``.

        Examples:
            >>> rows = [Row("clean", "clean", (0, 1), ())]
            >>> report = Report("mine", "digits", "fast", (0, 1), rows)
            >>> report.to_csv().splitlines()[1].startswith(
            ...     "mine,digits,fast,,,,clean,clean,2,2,1.0"
            ... )
            True
        """
        return _written(partial(export.to_csv, self), path, ".csv")

    def to_dataframe(self) -> "DataFrame":
        """Every figure in a pandas data frame (extra ``pandas``), one per row. pandas 数据表。

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        return export.to_dataframe(self)

    def model_card(self) -> str:
        """The README.md of a model on the Hugging Face Hub (extra ``hub``). Hub 模型卡。

        Raises:
            ModuleNotFoundError: If huggingface_hub is not installed.
        """
        return export.hub_card(self)

    def push_to_hub(
        self,
        repo_id: str,
        network: "nn.Module | str | Path | None" = None,
        *,
        token: str | None = None,
        private: bool = False,
        endpoint: str | None = None,
    ) -> str:
        """Upload model card, report and network to the Hugging Face Hub (extra ``hub``).
        上传到 Hub。

        Args:
            repo_id: ``"OWNER/NAME"`` of the model, which is created if it does not exist.
            network: The network, whose state dict is uploaded, or a file such as ``best.pt``; None
                uploads no weights.
            token: Token of the Hub; None uses that of ``hf auth login``.
            private: Whether a new model is private.
            endpoint: URL of another Hub; None for the public one.

        Returns:
            The URL of the model.

        Raises:
            ModuleNotFoundError: If huggingface_hub is not installed.
            TypeError: If ``network`` is neither a network nor a path.
            FileNotFoundError: If there is no such file.
            ConnectionError: If the Hub cannot be reached.
        """
        return export.push_to_hub(
            self,
            self.to_json(),
            repo_id,
            network=network,
            token=token,
            private=private,
            endpoint=endpoint,
        )

    def show(self, console: "Console") -> None:
        """Print the verdict, accuracies and remarks. 在终端显示报告。"""
        from sj_robust.evaluation.report.terminal import show_report  # imports rich

        show_report(self, console)

    def save(self, path: str | Path) -> None:
        """Write the report in the format that the file's ending names: ``.json``, which
        :meth:`load` reads back equal, ``.html`` (:meth:`page`), ``.csv`` or ``.tex``. 保存报告。

        Raises:
            ValueError: If the ending is another one, the name is too long for a file system, or
                there is no page of such a report.
        """
        writers: dict[str, Callable[[str | Path], object]] = {
            ".json": super().save,
            ".html": self.page,
            ".csv": self.to_csv,
            ".tex": self.to_latex,
        }
        file = check_file(path, writers, _REMEDY)
        writers[file.suffix.lower()](file)

    def write(self, folder: str | Path, gallery: "Gallery | None" = None) -> tuple[str, ...]:
        """Write JSON and figures into a folder, and the page of a suite or the table of a stress
        test; returns their names. 写入报告的全部文件。
        """
        folder = Path(folder)
        stem = _STEMS.get(self.suite, "report")
        self.save(folder / f"{stem}.json")
        names = [f"{stem}.json"]
        if self.of_levels:
            write_whole(folder / f"{stem}.md", f"{self.verdict}\n\n{self.table()}\n")
            names.append(f"{stem}.md")
        elif self.suite not in ("vote", "training"):
            self.page(folder / f"{stem}.html", gallery)
            names.append(f"{stem}.html")
        found = self.figures() | ({} if gallery is None else gallery.figures())
        for name, figure in found.items():
            for ending in ("png", "pdf"):
                names.append(f"{stem if name == '' else name}.{ending}")
                write_figure(figure, folder / names[-1])
        return tuple(names)

    def to_json(self) -> str:
        """The report as JSON; :meth:`from_json` reads back an equal report, and refuses one of
        another version.
        """
        text = super().to_json()
        return _NUMBERS.sub(_in_one_line, text)

    def _repr_html_(self) -> str:
        if not self.is_suite:
            return shown_html(self.table())
        summaries = [one for one in self.accuracies if one.kind != "member"]
        lines = [self.verdict, *self.alarms, *self.masked, accuracies_table(summaries)]
        return shown_html("\n".join([*lines, *self.remarks]))

    def _content(self) -> dict[str, Any]:
        return derived(self) | asdict(self)

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Self:
        """The report; accuracies that do not follow from its rows are a ValueError."""
        stated = {name: content.pop(name) for name in DERIVED if name in content}
        threat = content.pop("threat")
        rows = [_row(row) for row in content.pop("rows")]
        given = None if threat is None else ThreatModel(**threat)
        report = cls(rows=tuple(rows), threat=given, **content)
        counted = derived(report)
        for name in COUNTED:
            if name in stated and stated[name] != counted.get(name):
                raise ValueError(
                    f"{name} of the report does not follow from its rows; the file was changed"
                )
        return report


def _written(make: Callable[[], str], path: str | Path | None, ending: str) -> str:
    """A text, which is written to a file of this ending if one is named."""
    if path is None:
        return make()
    file = check_file(path, [ending], _REMEDY)
    text = make()
    write_whole(file, text)
    return text


def _row(content: dict[str, Any]) -> Row:
    threat = content.pop("threat")
    return Row(threat=threat and ThreatModel(**threat), **content)


def _in_one_line(match: re.Match[str]) -> str:
    return " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]")
