"""A robustness report as a self-contained HTML page; its figures need matplotlib (extra
``recipes``).
"""

import io
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from sj_robust.core.shown import BLUE, GREY, ORANGE, coded
from sj_robust.evaluation.intervals import extent
from sj_robust.evaluation.report.figures import figures
from sj_robust.evaluation.report.pictures import Gallery
from sj_robust.evaluation.report.verdict import alarms, budget, masked, remarks, verdict
from sj_robust.evaluation.result import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["to_html"]

_TEMPLATE = Path(__file__).with_name("page.html")
_INK, _LINE = "#010203", "#040506"
"""Stand-ins for the colours of text and grid, which follow the reader's light or dark theme."""
_THEME = {
    _INK: "currentColor",
    _LINE: "var(--line)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREY: "var(--grey)",
}
_CAPTIONS = {
    "accuracy_over_eps": (
        "Accuracy over eps",
        "Band: 95 % CI. Square: control (training surrogate, restarts, same cost). Diamond: worst "
        "case of suite and control. Both are shifted sideways so that neither hides the other. "
        "Dashed: verified accuracy, if the network has bounds; the true robust accuracy lies in "
        "the hatched band.",
    ),
    "attacks": (
        "Accuracy under each attack",
        "Attacks of a group run only on images that the earlier ones did not break, so the bars "
        "get shorter from top to bottom. Hollow bars exceed the threat model. Hatched bars are "
        "totals.",
    ),
    "potential": (
        "Perturbation of the membrane potential",
        "How far an attack moves the potential in every spiking layer and time step: MS-MPPD, the "
        "mean-square difference between clean and attacked images, on the first batch.",
    ),
    "potential_more": (
        "Perturbation of the membrane potential under the other attacks",
        "Bound over all perturbations: the distance between the proved bounds of the potential, "
        "over all images.",
    ),
    "gallery": (
        "Images under attack",
        "Top: clean images. Middle: attacked images, with the class that the network predicts. "
        "Bottom: their difference, magnified; grey is no change.",
    ),
    "spikes": (
        "Spikes of the clean and the attacked run",
        "The first image above: in each layer, the neurons whose spikes differ most, over time. "
        "The left half of a cell is the clean run, the right half the attacked run. The dotted "
        "line marks the layer and the step at which the runs diverge.",
    ),
    "membrane": (
        "Membrane potentials of the clean and the attacked run",
        "The same image, after the reset: in each layer, the neuron whose spikes differ most; "
        "filled markers are spikes.",
    ),
}


def to_html(report: Evaluation, gallery: Gallery | None = None) -> str:
    """The report as one page without scripts, links to other files or addresses on the net.
    自包含的
    HTML 报告。

    Figures are inline SVG in the colours of the reader's light or dark theme, and every number in
    them is in a table as well.

    Args:
        report: The report.
        gallery: Images under attack to show as well, folded.

    Raises:
        ValueError: If the report is not of a suite of attacks.

    Examples:
        >>> from sj_robust.evaluation import Report
        >>> from sj_robust.evaluation.result import Row
        >>> rows = [Row("clean", "clean", (0, 1), (1,))]
        >>> "http" in to_html(Report("mine", "digits", "fast", (0, 1), rows))
        False
    """
    if not report.is_suite:
        raise ValueError(
            f"pages are made for suites of attacks, not for {report.suite!r}; use table() and "
            "plot()"
        )
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters |= {"short": _short, "coded": coded}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        title=f"{report.name} on {report.dataset}: robustness",
        budget=budget(report.threat),
        verdict=verdict(report),
        alarms=alarms(report),
        masked=masked(report),
        remarks=remarks(report),
        surrogates=_surrogates(report),
        cards={
            "correct without attack": report.clean,
            "still correct under the suite (worst case per image)": report.worst_case,
            "still correct under the control: as many attacks, training gradient only": (
                report.control
            ),
            "still correct under all attacks: upper bound of robust accuracy": report.everything,
            "proved correct: lower bound of robust accuracy": report.verified,
        },
        figures=_figures(report, gallery),
        pictures=("gallery", "spikes", "membrane"),
        members={row.member: row for row in report.attacks},
        tables={
            "Gradient estimators tried": report.estimators,
            "Firing rates by layer": report.firing,
            _caption("accuracy_over_eps", report)[0]: _over_eps(report),
        },
        passed=(sum(row["passed"] for row in report.findings), len(report.findings)),
        extent=extent,
        steps=_steps(report),
        lists={
            "Network": report.network,
            "Options": report.configuration,
            "Environment": report.environment,
        },
        split=_split,
    )


def _surrogates(report: Evaluation) -> list[str]:
    layers = report.network.get("layers", [])
    return sorted({f"{row['neuron']} with {row['surrogate']}" for row in layers})


def _over_eps(report: Evaluation) -> list[dict[str, Any]]:
    """Rows of accuracy over eps; without proofs there is no column for them."""
    rows = []
    proofs = any(point.verified is not None for point in report.over_eps)
    of_events = report.threat is not None and report.threat.of_events
    for point in report.over_eps:
        row: dict[str, Any] = {"events" if of_events else "eps": point.eps}
        row |= {"attack": point.attack, "correct": point.correct, "total": point.total}
        if proofs:
            of = point.verified
            row |= {"verified": of and of.correct, "of": of and of.total}
        rows.append(row)
    return rows


def _steps(report: Evaluation) -> int:
    """The most time steps of any layer."""
    steps = 0
    for row in report.potential:
        layers = row["layers"].values()
        steps = max([steps, *map(len, layers)])
    return steps


def _split(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values of what is not a list of rows, lists last; and the lists of rows."""
    single = []
    lists = []
    nested = []
    for name, value in values.items():
        if not isinstance(value, list):
            single.append((name, value))
        elif value and isinstance(value[0], dict):
            nested.append(value)
        else:
            lists.append((name, value))
    return {"plain": single + lists, "nested": nested}


def _figures(report: Evaluation, gallery: Gallery | None) -> dict[str, tuple[str, str, str]]:
    """Title, caption and drawing of every figure, by name."""
    from matplotlib import rc_context

    parts = (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    )
    look = dict.fromkeys(parts, _INK) | {
        "grid.color": _LINE,
        "legend.framealpha": 0.0,
        "hatch.linewidth": 0.6,
    }
    with rc_context(look | {"svg.fonttype": "none", "svg.hashsalt": "sj_robust"}):
        found = figures(report, columns=1)
        if gallery is not None:
            found |= gallery.figures()
        drawn = {}
        for name, figure in found.items():
            title, text = _caption(name, report)
            drawn[name] = title, text, _svg(name, figure, title)
        return drawn


def _caption(name: str, report: Evaluation) -> tuple[str, str]:
    """Title and text of a figure; a budget in L0 is a number of events."""
    title, text = _CAPTIONS[name]
    if report.threat is not None and report.threat.of_events:
        title = title.replace("over eps", "over the number of changed events")
    return title, text


def _svg(name: str, figure: "Figure", title: str) -> str:
    """The drawing as an element of the page: names of its own, no addresses, colours of the
    theme.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, themed in _THEME.items():
        text = text.replace(color, themed)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
