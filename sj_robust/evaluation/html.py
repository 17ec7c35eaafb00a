"""A robustness report as one HTML page that needs nothing else; its figures need matplotlib (extra
``recipes``).
"""

import io
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from torch import nn

from sj_robust.core.saved import write_whole
from sj_robust.core.shown import BLUE, GREY, ORANGE
from sj_robust.evaluation._symptoms import extent
from sj_robust.evaluation.data import Batches
from sj_robust.evaluation.drawings import robustness_figures
from sj_robust.evaluation.pictures import Gallery, gallery_within
from sj_robust.evaluation.robustness_report import RobustnessReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["report_gallery", "save_html", "to_html"]

_TEMPLATE = Path(__file__).with_name("report.html")
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
        "The band is the 95 % interval. Square: the control (training surrogate, restarts, same "
        "cost). Diamond: the worst case of suite and control. Dashed, where the network has "
        "bounds: what is verified at least; the true robust accuracy lies in the hatched band up "
        "to the attack.",
    ),
    "attacks": (
        "Accuracy left by each attack",
        "Attacks of one group work on what the earlier ones left, so bars fall from top to "
        "bottom. Hollow: beyond the threat. Hatched: the control, the suite's worst case per "
        "image, both together, and what is verified whatever the attack.",
    ),
    "potential": (
        "Perturbation of the membrane potential",
        "How far an attack moves the potential of every spiking layer and time step: MS-MPPD, "
        "its mean square, between clean images and those of the attack, on the first batch.",
    ),
    "potential_more": (
        "Perturbation of the membrane potential under the other attacks",
        "Bound of all: between the bounds of the potential, resets included, over all images; "
        "from the proofs.",
    ),
    "gallery": (
        "What the attack does to images",
        "Above clean, below attacked within the ball, with what the network takes each for; last "
        "their difference, made larger, grey for none.",
    ),
    "spikes": (
        "Spikes of both runs",
        "The first image above, clean and attacked: neurons of every layer whose spikes differ "
        "most, over the time steps. The dotted line marks the layer and the step at which the "
        "runs part.",
    ),
    "membrane": (
        "Membrane potentials of both runs",
        "Of the same image, after the reset: per layer the neuron whose spikes differ most; "
        "filled where it fires.",
    ),
}


def report_gallery(report: RobustnessReport, model: nn.Module, batches: Batches) -> Gallery | None:
    """Images under the attack with the strongest gradient of a report, to show beside it.
    报告附带的对抗样本图集。

    Args:
        report: The report.
        model: Its network.
        batches: Its images, of whose first batch some are shown.

    Returns:
        The images; None if the network gets none of the first batch right.

    Examples:
        >>> import torch
        >>> from sj_robust.evaluation import evaluate
        >>> net, batches = (
        ...     nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
        ...     [(torch.rand(6, 1, 2, 2), torch.arange(6) % 2)],
        ... )
        >>> report = evaluate(net, batches, eps=0.1, suite="fast", progress=False)
        >>> shown = report_gallery(report, net, batches)
        >>> shown is None or len(shown.labels) > 0
        True
    """
    x, y = next(iter(batches))[:2]
    if min(report.correct, default=len(y)) >= len(y):
        return None
    chosen = next((row["estimator"] for row in report.estimators if row["chosen"]), "training")
    return gallery_within(
        model, x, y, report.threat, estimator=chosen, draws=report.draws, seed=report.seed
    )


def save_html(report: RobustnessReport, path: Path, gallery: Gallery | None = None) -> None:
    """Write the page; the file is whole or not there. 保存 HTML 报告。

    Args:
        report: The report.
        path: The file.
        gallery: Images under attack to show as well, folded.

    Examples:
        >>> import tempfile
        >>> from sj_robust.attacks import ThreatModel
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> threat = ThreatModel("Linf", 0.1)
        >>> save_html(RobustnessReport("mine", "digits", threat, "fast", 2, (0, 1), (0,), ()), path)
        >>> path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        True
    """
    write_whole(path, to_html(report, gallery))


def to_html(report: RobustnessReport, gallery: Gallery | None = None) -> str:
    """The report as one page without scripts, links to other files or addresses on the net.
    自包含的
    HTML 报告。

    Figures are inline SVG in the colours of the reader's light or dark theme, and every number in
    them is in a table as well.

    Args:
        report: The report.
        gallery: Images under attack to show as well, folded.

    Examples:
        >>> from sj_robust.attacks import ThreatModel
        >>> report = RobustnessReport(
        ...     "mine", "digits", ThreatModel("Linf", 0.1), "fast", 2, (0, 1), (0,), ()
        ... )
        >>> "http" in to_html(report)
        False
    """
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters["short"] = _short
    events = report.threat.of_events
    over_eps = [
        {"events" if name == "eps" and events else name: row[name] for name in row}
        for row in report.over_eps
    ]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        title=f"{report.name} on {report.dataset}: robustness",
        surrogates=sorted(
            {f"{row['neuron']} with {row['surrogate']}" for row in report.network.get("layers", [])}
        ),
        cards={
            "right without an attack": report.clean,
            "right after the suite's attacks (worst case)": report.worst_case,
            "right after as many attacks with the training gradient (control)": report.control,
            "right after all of them: robust accuracy at most": report.everything,
            "proved: robust accuracy at least (verified)": report.bracket and report.bracket[0],
        },
        figures=_figures(report, gallery),
        pictures=("gallery", "spikes", "membrane"),
        members={member.name: member for member in report.members},
        tables={
            "Gradient estimators tried": report.estimators,
            "Firing of every layer": report.firing,
            _caption("accuracy_over_eps", report)[0]: over_eps,
            "Verified images over eps": report.verified_over_eps,
        },
        passed=(sum(row["passed"] for row in report.findings), len(report.findings)),
        extent=extent,
        steps=max(
            (len(values) for row in report.potential for values in row["layers"].values()),
            default=0,
        ),
        lists={
            "Network": report.network,
            "Options": report.configuration,
            "Environment": report.environment,
        },
        split=_split,
    )


def _split(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values of what is no list of rows, lists last; and the lists of rows."""
    nested = [
        name
        for name, value in values.items()
        if isinstance(value, list) and isinstance((value or [0])[0], dict)
    ]
    plain = sorted(
        values.keys() - nested,
        key=lambda name: (isinstance(values[name], list), list(values).index(name)),
    )
    return {
        "plain": [(name, values[name]) for name in plain],
        "nested": [values[name] for name in nested],
    }


def _figures(report: RobustnessReport, gallery: Gallery | None) -> dict[str, tuple[str, str, str]]:
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
        found = robustness_figures(report, columns=1) | (
            {} if gallery is None else gallery.figures()
        )
        return {
            name: (*_caption(name, report), _svg(name, figure, _caption(name, report)[0]))
            for name, figure in found.items()
        }


def _caption(name: str, report: RobustnessReport) -> tuple[str, str]:
    """Title and text of a figure; a budget in L0 is a number of events."""
    title, text = _CAPTIONS[name]
    events = report.threat.of_events
    return (
        title.replace("over eps", "over the number of changed events") if events else title
    ), text


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
