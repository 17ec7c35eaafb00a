"""The leaderboard as a page, for a telephone first: a table and a bar for every network, the rest
unfolds.
"""

from collections.abc import Sequence
from html import escape

from lab.leaderboard.entries import DETAILS, HEADS, Entry, Group

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1rem auto; padding: 0 .6rem;
  max-width: 60rem; color-scheme: light dark; }}
table {{ border-collapse: collapse; width: 100%; margin-bottom: 2rem; }}
th, td {{ padding: .25rem .3rem; text-align: right; vertical-align: top; }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left; }}
small {{ white-space: nowrap; }}
h2, td {{ overflow-wrap: anywhere; }}
td:nth-child(n + 2):nth-child(-n + 4) {{ overflow-wrap: normal; }}
tbody {{ border-top: 1px solid #8888; }}
th button {{ all: unset; cursor: pointer; font-weight: 600; }}
th button:focus-visible {{ outline: 2px solid; }}
svg {{ display: inline-block; width: calc(100% - 1.5rem); height: .7rem; vertical-align: middle; }}
.broken {{ fill: #8884; }} .open {{ fill: #d9822b; }} .proved {{ fill: #2b7a4b; }}
.clean {{ stroke: currentColor; }} .weaker {{ color: #888; }} .weaker svg {{ opacity: .4; }}
dl {{ display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; margin: .3rem 0; }}
dt {{ font-weight: 600; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
</style></head><body><h1>Leaderboard</h1><p>{note} A line in a bar is the clean accuracy. Click a
column heading to sort, a bar for details.</p>
{groups}
<script>
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {{
  const head = button.parentElement, column = head.cellIndex, table = head.closest("table");
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (body) => body.rows[0].cells[column].firstChild?.textContent ?? "";
  const sign = down ? -1 : 1;
  const order = (a, b) => sign * value(a).localeCompare(value(b), "en", {{ numeric: true }});
  [...table.tBodies].sort(order).forEach((body) => table.append(body));
}}));
</script></body></html>
"""


def page(groups: Sequence[Group], note: str) -> str:
    """The whole page, without anything from elsewhere."""
    shown = "\n".join(_group(group) for group in groups)
    return _PAGE.format(note=escape(note), groups=shown)


def _group(group: Group) -> str:
    cells = [f'<th><button type="button">{escape(head)}</button></th>' for head in HEADS]
    head = f"<thead><tr>{''.join(cells)}</tr></thead>"
    parts = [f"<h2>{escape(group.title)}</h2>"]
    for above, entries in group.tables:
        if above:
            parts.append(f'<p class="weaker">{escape(above)}</p>')
        style = ' class="weaker"' if above else ""
        bodies = "\n".join(map(_entry, entries))
        parts.append(f"<table{style}>{head}\n{bodies}\n</table>")
    return "\n".join(parts)


def _entry(entry: Entry) -> str:
    """Two rows: figures, and a bar that unfolds into the reports."""
    name, clean, proved, at_most, checked = map(escape, entry.cells())
    at_most += f"<br><small>{entry.interval}</small>"
    cells = "".join(f"<td>{cell}</td>" for cell in (name, clean, proved, at_most, checked))
    lists = "".join(_report(one.details()) for one in entry.reports)
    return (
        f"<tbody><tr>{cells}</tr>"
        f'<tr><td colspan="5"><details><summary>{_bar(entry)}</summary>{lists}</details></td></tr>'
        "</tbody>"
    )


def _report(cells: Sequence[str]) -> str:
    pairs = zip(DETAILS, cells, strict=True)
    items = [f"<dt>{escape(head)}</dt><dd>{escape(cell)}</dd>" for head, cell in pairs if cell]
    return f"<dl>{''.join(items)}</dl>"


def _bar(entry: Entry) -> str:
    """The bracket, drawn to scale: what is proved, what is open, what is broken."""
    proved = entry.proved or 0.0
    said = f"proved {proved:.1f} %, at most {entry.at_most:.1f} %, clean {entry.clean:.1f} %"
    open_ = max(entry.at_most - proved, 0.0)
    return (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{said}">'
        '<rect class="broken" width="100" height="10"/>'
        f'<rect class="proved" width="{proved:.1f}" height="10"/>'
        f'<rect class="open" x="{proved:.1f}" width="{open_:.1f}" height="10"/>'
        f'<path class="clean" d="M{entry.clean:.1f} 0V10" vector-effect="non-scaling-stroke"/>'
        "</svg>"
    )
