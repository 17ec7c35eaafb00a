"""A robustness report as one HTML page that needs nothing else; figures need matplotlib (extra ``recipes``)."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure as Drawing

from sj_robust._saved import write_whole
from sj_robust.evaluation.drawings import BLUE, GREY, ORANGE, robustness_figures
from sj_robust.evaluation.robustness_report import Figure, RobustnessReport

__all__ = ["save_html", "to_html"]

_INK, _LINE = "#010203", "#040506"
"""Stand-ins for the colours of text and grid, which follow the reader's light or dark theme."""

_THEME = {_INK: "currentColor", _LINE: "var(--line)", BLUE: "var(--blue)", ORANGE: "var(--orange)", GREY: "var(--grey)"}

_CAPTIONS = {
    "accuracy_over_eps": (
        "Accuracy over eps",
        "The band is the 95 % interval. Square: the control (training surrogate, restarts, same cost). Diamond: the "
        "worst case of suite and control.",
    ),
    "attacks": (
        "Accuracy left by each attack",
        "Attacks of one group work on what the earlier ones left, so bars fall from top to bottom. Hollow: "
        "beyond the threat. Hatched: the control, the suite's worst case per image, and both together.",
    ),
    "potential": (
        "Perturbation of the membrane potential",
        "MS-MPPD of every spiking layer and time step between clean images and those of an attack, on the first batch.",
    ),
}

_STYLE = """
:root { --page: #fff; --ink: #1c2126; --soft: #59636e; --line: #d5dae0; --panel: #f5f7f9;
  --blue: #0072b2; --orange: #d55e00; --grey: #767676; --alarm: #a4262c; --alarm-page: #fdeeee; }
@media (prefers-color-scheme: dark) { :root { --page: #15191e; --ink: #e3e7eb; --soft: #9fabb7; --line: #39424c;
  --panel: #1d232a; --blue: #56b4e9; --orange: #f0883e; --grey: #9aa4ae; --alarm: #ff9a94; --alarm-page: #3a1d1e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.alarm { border: 2px solid var(--alarm); background: var(--alarm-page); color: var(--alarm); padding: .75rem 1rem;
  border-radius: .4rem; margin: 1rem 0; font-weight: 600; }
.caution { border-left: 4px solid var(--orange); background: var(--panel); padding: .5rem 1rem; margin: .75rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--panel); border-radius: .4rem; padding: .75rem 1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; }
.card.doubtful b { text-decoration: line-through; font-weight: 400; }
.figures { columns: 24rem; column-gap: 2rem; }
figure { margin: 0 0 1.5rem; break-inside: avoid; } figure h2 { margin-top: .5rem; }
svg { width: 100%; height: auto; max-width: 34rem; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td, th { overflow-wrap: normal; } td:first-child { min-width: 8rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .accuracies th:nth-child(2), .accuracies td:nth-child(2), .accuracies th:nth-child(3),
  .accuracies td:nth-child(3), .accuracies th:last-child, .accuracies td:last-child { display: none; } }
th { font-weight: 600; } .number { text-align: right; white-space: nowrap; } tr.sum { font-weight: 600; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .5rem; }
"""


def save_html(report: RobustnessReport, path: Path) -> None:
    """Write the page; the file is whole or not there. 保存 HTML 报告。

    Args:
        report: The report.
        path: The file.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> save_html(RobustnessReport("mine", "digits", "Linf", "0.1", "fast", 2, (0, 1), (0,), ()), path)
        >>> path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        True
    """
    write_whole(path, to_html(report))


def to_html(report: RobustnessReport) -> str:
    """The report as one page without scripts, links to other files or addresses on the net. 自包含的 HTML 报告。

    Figures are inline SVG in the colours of the reader's light or dark theme, and every number in them is in a table as
    well.

    Args:
        report: The report.

    Returns:
        The page.

    Examples:
        >>> report = RobustnessReport("mine", "digits", "Linf", "0.1", "fast", 2, (0, 1), (0,), ())
        >>> "http" in to_html(report)
        False
    """
    title = f"{report.name} on {report.dataset}: robustness"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_subtitle(report))}</p>',
        *(f'<p class="alarm" role="alert">{escape(text)}</p>' for text in report.alarms),
        _cards(report),
        *(f'<p class="caution">{escape(text)}</p>' for text in report.masked),
        _drawings(report),
        "<h2>Accuracies</h2>",
        _accuracies(report),
        *(f'<p class="soft">{escape(text)}</p>' for text in report.remarks),
        _details(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def _subtitle(report: RobustnessReport) -> str:
    surrogates = sorted({f"{row['neuron']} with {row['surrogate']}" for row in report.network.get("layers", [])})
    trained = f"; {'; '.join(surrogates)}" if surrogates else ""
    return (
        f"{report.budget}; suite {report.suite}; {len(report.labels)} test images; seed "
        f"{report.seed}; {report.architecture}{trained}"
    )


def _cards(report: RobustnessReport) -> str:
    named = [("clean accuracy", report.clean), ("worst case of the suite", report.worst_case)]
    named += [("control: training surrogate, restarts", report.control)] if report.control else []
    named += [("everything together", report.everything)]
    cards = []
    for name, figure in named:
        low, high = (100 * end for end in figure.interval)
        doubtful = " doubtful" if report.alarms and figure.kind != "clean" else ""
        cards.append(
            f'<div class="card{doubtful}"><span>{escape(name)}</span><b>{100 * figure.accuracy:.1f} %</b>'
            f'<span class="soft">95 %: {low:.1f} to {high:.1f}; {figure.correct} of {figure.total}</span></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _accuracies(report: RobustnessReport) -> str:
    groups = {member.name: (member.estimator, member.group or "each for itself") for member in report.members}
    rows = []
    for figure in report.figures:
        low, high = (100 * end for end in figure.interval)
        estimator, group = groups.get(figure.name, ("", ""))
        cells = [figure.name, estimator, group, f"{100 * figure.accuracy:.1f}", f"{low:.1f} to {high:.1f}"]
        rows.append([*cells, str(figure.correct), f"{figure.seconds:.1f}"])
    headings = ["after", "estimator", "group", "%", "95 % interval", "right", "seconds"]
    sums = [index for index, figure in enumerate(report.figures) if _is_sum(figure)]
    caption = f"of {len(report.labels)} images"
    return f'<div class="accuracies">{_table(headings, rows, caption=caption, numbers=range(3, 7), sums=sums)}</div>'


def _details(report: RobustnessReport) -> str:
    """What is not everybody's first question, folded."""
    return "\n".join(
        [
            _folded(
                "Signs of gradient masking", _findings(report), unfold=any(not f["passed"] for f in report.findings)
            ),
            _folded("Gradient estimators tried", _rows(report.estimators)),
            _folded("Firing of every layer", _rows(report.firing)),
            _folded(_caption("accuracy_over_eps", report)[0], _rows(_named(report.over_eps, report))),
            _folded("MS-MPPD per layer and time step", _steps(report)),
            _folded("Network", _pairs(report.network)),
            _folded("Options", _pairs(report.configuration)),
            _folded("Environment", _pairs(report.environment)),
        ]
    )


def _findings(report: RobustnessReport) -> str:
    rows = [
        [
            "passed" if row["passed"] else "FAILED",
            row["name"],
            f"{row['value']:.3g}",
            f"{row['threshold']:.3g}",
            row["meaning"] if row["passed"] else f"{row['meaning']} {row['remedy']}",
        ]
        for row in report.findings
    ]
    return _table(["", "finding", "value", "at most", "meaning"], rows, numbers=(2, 3)) if rows else ""


def _steps(report: RobustnessReport) -> str:
    rows = [
        [row["member"], layer, *(f"{value:.3g}" for value in values)]
        for row in report.potential
        for layer, values in row["layers"].items()
    ]
    steps = max((len(row) - 2 for row in rows), default=0)
    rows = [[*row, *[""] * (steps + 2 - len(row))] for row in rows]
    headings = ["attack", "layer", *(f"step {step}" for step in range(steps))]
    return _table(headings, rows, numbers=range(2, steps + 2)) if rows else ""


def _rows(rows: Sequence[dict[str, object]]) -> str:
    """A table of rows with the same keys."""
    if not rows:
        return ""
    headings = list(rows[0])
    numbers = [index for index, name in enumerate(headings) if isinstance(rows[0][name], int | float)]
    return _table(headings, [[_short(row.get(name)) for name in headings] for row in rows], numbers=numbers)


def _pairs(values: Mapping[str, object]) -> str:
    flat = [[name, _short(value)] for name, value in values.items() if not isinstance(value, list)]
    lists = [
        _rows(value) for value in values.values() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    flat += [[n, _short(v)] for n, v in values.items() if isinstance(v, list) and not (v and isinstance(v[0], dict))]
    return (_table(["", ""], flat) if flat else "") + "".join(lists)


def _table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    numbers: Iterable[int] = (),
    sums: Iterable[int] = (),
) -> str:
    right, bold, found = set(numbers), set(sums), list(rows)

    def cells(tag: str, values: Sequence[str]) -> str:
        marks = (' class="number"' if index in right else "" for index in range(len(values)))
        return "".join(f"<{tag}{mark}>{escape(value)}</{tag}>" for mark, value in zip(marks, values, strict=True))

    marks = (' class="sum"' if index in bold else "" for index in range(len(found)))
    body = "".join(f"<tr{mark}>{cells('td', row)}</tr>" for mark, row in zip(marks, found, strict=True))
    head = f"<thead><tr>{cells('th', headings)}</tr></thead>" if any(headings) else ""
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{named}{head}<tbody>{body}</tbody></table></div>'


def _folded(title: str, body: str, *, unfold: bool = False) -> str:
    return f"<details{' open' if unfold else ''}><summary>{escape(title)}</summary>{body}</details>" if body else ""


def _drawings(report: RobustnessReport) -> str:
    ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK
    )
    look = ink | {"grid.color": _LINE, "legend.framealpha": 0.0, "svg.fonttype": "none", "svg.hashsalt": "sj_robust"}
    with rc_context(look | {"hatch.linewidth": 0.6}):
        drawings = robustness_figures(report, columns=1)
        drawn = {name: _svg(name, drawing, _caption(name, report)[0]) for name, drawing in drawings.items()}
    parts = []
    for name, svg in drawn.items():
        title, text = _caption(name, report)
        parts.append(f"<figure><h2>{title}</h2>{svg}<figcaption>{escape(text)}</figcaption></figure>")
    return f'<div class="figures">{"".join(parts)}</div>'


def _caption(name: str, report: RobustnessReport) -> tuple[str, str]:
    """Title and text of a figure; a budget in L0 is a number of events."""
    title, text = _CAPTIONS[name]
    return (title.replace("over eps", "over the number of changed events") if report.threat == "L0" else title), text


def _named(rows: Sequence[dict[str, object]], report: RobustnessReport) -> list[dict[str, object]]:
    """Rows of accuracy over eps, with the word for a number of events in L0."""
    return [{"events" if name == "eps" and report.threat == "L0" else name: row[name] for name in row} for row in rows]


def _svg(name: str, drawing: Drawing, title: str) -> str:
    """The drawing as an element of the page: names of its own, no addresses, colours of the theme."""
    file = io.StringIO()
    drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, themed in _THEME.items():
        text = text.replace(color, themed)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _is_sum(figure: Figure) -> bool:
    return figure.kind in ("control", "worst case", "everything")


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
