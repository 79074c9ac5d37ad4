"""Tables in Markdown."""

from __future__ import annotations

import re

from ssl3d.results.formats import wording
from ssl3d.results.formats.wording import printable
from ssl3d.results.table.model import Column, Row, Table, TableModel


def render_markdown(model: TableModel) -> str:
    """Return GitHub-flavoured Markdown: one table, the modes side by side."""
    return "\n".join(_markdown_table(model, table) for table in model.tables)


def _escape_markdown(text: str) -> str:
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def _markdown_table(model: TableModel, table: Table) -> str:
    headers = [
        "<br>".join(
            [
                f"{_escape_markdown(column.group)} {_escape_markdown(column.title)}",
                *wording.under_title(column),
            ]
        )
        for column in table.columns
    ]
    lines = [
        _escape_markdown(wording.heading(model, table)), "",
        f"| Method | {' | '.join(headers)} |",
        f"|:--{'|--:' * len(headers)}|",
    ]  # fmt: skip
    for row in table.rows:
        cells = [_markdown_cell(row, column) for column in table.columns]
        lines.append(f"| {_escape_markdown(wording.row_title(row))} | {' | '.join(cells)} |")
    notes = [
        _escape_markdown(note)
        for note in (wording.legend(table, "bold", "underlined"), *wording.notes(table))
    ]
    lines += ["", "<br>".join(notes), ""]
    if costs := wording.cost_lines(table):
        lines += [f"| {' | '.join(wording.COST_HEADERS)} |", "|:--|--:|--:|--:|--:|--:|--:|:--|"]
        lines += [f"| {' | '.join(_escape_markdown(text) for text in line)} |" for line in costs]
        lines += ["", _escape_markdown(wording.COST_LEGEND), ""]
    return "\n".join(lines)


def _markdown_cell(row: Row, column: Column) -> str:
    cell = row.cells.get(column.key)
    if cell is None:
        return row.absent(column.key)
    mean = wording.mean(cell, column)
    mean = f"**{mean}**" if cell.best else f"<u>{mean}</u>" if cell.second else mean
    lines = [" ".join(filter(None, (mean, wording.sd(cell, column)))) + _escape_markdown(cell.marks)]
    lines += [f"**{d.text}**" if d.strong else d.text for d in wording.details(cell, column)]
    return "<br>".join(lines)
