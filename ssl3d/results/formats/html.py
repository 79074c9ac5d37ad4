"""``--format html``: one page that works offline and without scripts, in light, in dark and printed."""

from __future__ import annotations

from html import escape

from ssl3d.results.formats import wording
from ssl3d.results.table.model import Column, Row, Table, TableModel

# Red is better and blue is worse, as in the paper; both keep a contrast of 4.5 on their background.
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --line: #d1d9e0; --paper: #ffffff;
  --band: #f6f8fa; --better: #b3261e; --worse: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa4af; --line: #3a424b;
  --paper: #14171b; --band: #1c2127; --better: #ff8a80; --worse: #8ab4ff; } }
@media print { :root { --ink: #000; --dim: #444; --line: #999; --paper: #fff; --band: #fff;
  --better: #b3261e; --worse: #0b57d0; } }
body { margin: 2rem auto; padding: 0 1rem; max-width: 80rem; color: var(--ink); background: var(--paper);
  font: 15px/1.45 system-ui, sans-serif; }
figure { margin: 0 0 3rem; }
figcaption { font-weight: 600; margin-bottom: .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--dim); font-size: .85em; caption-side: bottom; padding-top: .5rem; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead { border-bottom: 1px solid var(--ink); }
table { border-top: 2px solid var(--ink); border-bottom: 2px solid var(--ink); }
thead th { font-weight: 600; vertical-align: bottom; }
th[scope=row], th.left, td.left { text-align: left; }
th[scope=row] { font-weight: 500; position: sticky; left: 0; background: var(--paper); white-space: normal; }
th[scope=colgroup] { text-align: center; border-bottom: 1px solid var(--line); }
tbody tr + tr { border-top: 1px solid var(--line); }
tbody tr:hover td, tbody tr:hover th { background: var(--band); }
td div { font-size: .82em; color: var(--dim); }
td div.better { color: var(--better); } td div.worse { color: var(--worse); } td div.strong { font-weight: 700; }
.sd, thead small { font-size: .82em; font-weight: 400; color: var(--dim); }
.note { color: var(--dim); font-size: .85em; margin: .6rem 0 0; max-width: 60rem; }
"""


def render_html(model: TableModel) -> str:
    """Return one HTML page with every table; nothing in it is loaded from elsewhere or executed."""
    title = "ssl3d: self-supervised learning on 3D medical images"
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>",
        *(_figure(model, table) for table in model.tables), "</body>", "</html>", "",
    ])  # fmt: skip


def _text(text: str) -> str:
    return escape(wording.printable(text))


def _figure(model: TableModel, table: Table) -> str:
    groups = "".join(
        f'<th scope="colgroup" colspan="{len(group)}">{_text(group[0].group)}</th>' for group in table.groups
    )
    columns = "".join(
        f'<th scope="col">{_text(c.title)}<br><small>{"<br>".join(map(_text, wording.under_title(c)))}</small></th>'
        for c in table.columns
    )
    legend = wording.legend(table, "bold", "underlined", colours="red: better, blue: worse", starred=True)
    return "\n".join([
        "<figure>", f"<figcaption>{_text(wording.heading(model, table))}</figcaption>", '<div class="scroll">',
        "<table>", "<thead>", f'<tr><th class="left" rowspan="2">Method</th>{groups}</tr>',
        f"<tr>{columns}</tr>", "</thead>", "<tbody>", *(_row(row, table) for row in table.rows), "</tbody>",
        "</table>", "</div>", *(f'<p class="note">{_text(n)}</p>' for n in (legend, *wording.notes(table))),
        *_costs(table), "</figure>",
    ])  # fmt: skip


def _row(row: Row, table: Table) -> str:
    cells = "".join(_cell(row, column) for column in table.columns)
    return f'<tr><th scope="row">{_text(wording.row_title(row))}</th>{cells}</tr>'


def _cell(row: Row, column: Column) -> str:
    cell = row.cells.get(column.key)
    if cell is None:
        return f"<td>{row.absent(column.key)}</td>"
    mean = wording.mean(cell, column)
    mean = f"<strong>{mean}</strong>" if cell.best else f"<u>{mean}</u>" if cell.second else mean
    deviation = f' <span class="sd">{wording.sd(cell, column)}</span>' if wording.sd(cell, column) else ""
    signs = "".join(f"<sup>{_text(text)}</sup>" for text in (wording.stars(cell), cell.marks) if text)
    lines = []
    for detail in wording.details(cell, column):
        look = "strong" if detail.strong else ""
        if detail.kind == "delta":
            look = {1: "better", 0: "", -1: "worse"}[wording.gain(cell, column)]
        css = f' class="{look}"' if look else ""
        lines.append(f"<div{css}>{_text(detail.text)}</div>")
    return f"<td>{mean}{deviation}{signs}{''.join(lines)}</td>"


def _costs(table: Table) -> list[str]:
    lines = wording.cost_lines(table)
    if not lines:
        return []
    last = len(wording.COST_HEADERS) - 1
    side = {0: ' class="left"', last: ' class="left"'}
    head = "".join(f'<th scope="col"{side.get(i, "")}>{h}</th>' for i, h in enumerate(wording.COST_HEADERS))
    body = [
        f'<tr><th scope="row">{_text(line[0])}</th>'
        + "".join(f"<td{side.get(i, '')}>{_text(text)}</td>" for i, text in enumerate(line[1:], 1))
        + "</tr>"
        for line in lines
    ]
    return [
        '<div class="scroll">', "<table>", f"<caption>{_text(wording.COST_LEGEND)}</caption>",
        f"<thead><tr>{head}</tr></thead>", "<tbody>", *body, "</tbody>", "</table>", "</div>",
    ]  # fmt: skip
