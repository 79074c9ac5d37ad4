"""Formats of ``ssl3d table``: one function from a :class:`~ssl3d.results.table.TableModel` to text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssl3d.results import wording
from ssl3d.results.convergence import best_score, steps_to_reach
from ssl3d.results.cost import cost_of
from ssl3d.results.html import render_html
from ssl3d.results.latex import render_latex
from ssl3d.results.store import canonical_json
from ssl3d.results.table import BASELINE, Cell, Column, Row, Table, TableModel
from ssl3d.results.wording import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text


@dataclass(frozen=True)
class TableFormat:
    """A format of ``ssl3d table --format NAME``.

    Attributes:
        name: unique name on the command line.
        summary: one line for listings.
        render: returns the text to print.
    """

    name: str
    summary: str
    render: Callable[[TableModel], str]


# --- Terminal --------------------------------------------------------------------------------------


def render_rich(model: TableModel, console: Console | None = None) -> str:
    """Return the tables for a terminal: one block where the width allows, else one for each mode.

    Args:
        model: the tables.
        console: decides width and colours; default: standard output's, and 120 columns without
            colours when that is no terminal (a log, a pipe) and COLUMNS is not set.
    """
    console = console or _standard_console()
    with console.capture() as capture:
        for number, table in enumerate(model.tables):
            if number:
                console.print("\n")
            console.print(wording.heading(model, table), style="bold", markup=False, highlight=False)
            for block in _blocks(table, console):
                console.print()
                console.print(block)
            console.print()
            styled = console.is_terminal
            legend = wording.legend(
                table, best="bold" if styled else "*", second="underlined" if styled else ""
            )
            console.print(legend, style="dim", markup=False, highlight=False)
            for note in wording.notes(table):
                console.print(note, style="dim", markup=False, highlight=False)
            if lines := wording.cost_lines(table):
                console.print()
                console.print(_cost_block(lines))
                console.print(wording.COST_LEGEND, style="dim", markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _standard_console() -> Console:
    import os

    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=120)
    return console


Texts = dict[tuple[int, tuple[str, str]], "Text"]
"""The cells of a table by (row, key of the column)."""


def _blocks(table: Table, console: Console) -> list[RichTable]:
    texts: Texts = {
        (place, column.key): _rich_cell(row.cells.get(column.key), column, console.is_terminal)
        for place, row in enumerate(table.rows)
        for column in table.columns
    }

    def width(block: RichTable) -> int:
        return console.measure(block, options=console.options.update(width=10_000)).maximum

    for gap in (2, 1):
        block = _block(table, texts, table.groups, gap)
        if width(block) <= console.width:
            return [block]
    blocks = [_block(table, texts, [group], 2) for group in table.groups]
    # Columns of a given width do not shrink, so a terminal too narrow even for one mode gets others.
    return [
        block if width(block) <= console.width else _block(table, texts, [group], 2, given_widths=False)
        for block, group in zip(blocks, table.groups, strict=True)
    ]


def _block(
    table: Table, texts: Texts, groups: Sequence[Sequence[Column]], gap: int, given_widths: bool = True
) -> RichTable:
    """Return the columns of ``groups``.

    Args:
        table: the table.
        texts: its cells.
        groups: columns by mode.
        gap: spaces between columns.
        given_widths: compute the widths of the columns here, which spares rich a search through every
            cell, twice.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table as RichTable
    from rich.text import Text

    block = RichTable(box=SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    block.add_column(Text("\n\nMethod"), overflow="fold")
    for group in groups:
        for place, column in enumerate(group):
            header = Text(printable(column.group) if place == 0 else "", style="bold cyan")
            header.append(f"\n{printable(column.title)}\n", style="bold default")
            header.append(f"n = {wording.support(column.support)}", style="dim default not bold")
            width = None
            if given_widths:
                cells = (texts[row, column.key] for row in range(len(table.rows)))
                width = max(cell_len(line) for text in (header, *cells) for line in text.plain.split("\n"))
            block.add_column(header, no_wrap=True, width=width)
        if group is not groups[-1]:
            block.add_column("", width=1)
    for number, row in enumerate(table.rows):
        line: list[Text] = [Text(printable(row.title))]
        for group in groups:
            line += [texts[number, column.key] for column in group]
            if group is not groups[-1]:
                line.append(Text(""))
        block.add_row(*line)
    return block


def _rich_cell(cell: Cell | None, column: Column, styled: bool) -> Text:
    from rich.text import Text

    if cell is None:
        return Text("    –", style="dim")
    # Five characters before the deviation, signs included, put the decimal points in one line.
    text = Text(" " * (5 - len(wording.mean(cell))))
    text.append(wording.mean(cell), style="bold" if cell.best else "underline" if cell.second else "")
    if not styled:
        text.append("*" if cell.best else " ")
    if cell.sd is not None:
        text.append(f" {wording.sd(cell)}", style="dim")
    text.append(cell.marks)
    for detail in wording.details(cell, column):
        line, style = detail.text, "" if detail.strong else _RICH_STYLES.get(detail.kind, "dim")
        if detail.kind == "delta":
            shown = wording.shown_delta(cell) or 0.0
            line, style = f"{line:>5}", "green" if shown > 0 else "red" if shown < 0 else "dim"
        elif detail.kind == "paper":
            line = f"{cell.paper:5.1f} paper"  # its decimal point below that of the mean
        text.append(f"\n{line}", style=style)
    return text


_RICH_STYLES = {"paper": "dim italic", "support": "yellow"}


def _cost_block(lines: Sequence[Sequence[str]]) -> RichTable:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    block = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for number, header in enumerate(wording.COST_HEADERS):
        block.add_column(header, overflow="fold", justify="right" if 0 < number < 7 else "left")
    for line in lines:
        block.add_row(*(Text(text) for text in line))
    return block


# --- Markdown --------------------------------------------------------------------------------------


def render_markdown(model: TableModel) -> str:
    """Return GitHub-flavoured Markdown: one table, the modes side by side."""
    return "\n".join(_markdown_table(model, table) for table in model.tables)


def _escape_markdown(text: str) -> str:
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def _markdown_table(model: TableModel, table: Table) -> str:
    headers = [
        f"{_escape_markdown(column.group)} {_escape_markdown(column.title)}<br>n = {wording.support(column.support)}"
        for column in table.columns
    ]
    lines = [
        _escape_markdown(wording.heading(model, table)), "",
        f"| Method | {' | '.join(headers)} |",
        f"|:--{'|--:' * len(headers)}|",
    ]  # fmt: skip
    for row in table.rows:
        cells = [_markdown_cell(row.cells.get(column.key), column) for column in table.columns]
        lines.append(f"| {_escape_markdown(row.title)} | {' | '.join(cells)} |")
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


def _markdown_cell(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return "–"
    mean = wording.mean(cell)
    mean = f"**{mean}**" if cell.best else f"<u>{mean}</u>" if cell.second else mean
    lines = [" ".join(filter(None, (mean, wording.sd(cell)))) + _escape_markdown(cell.marks)]
    lines += [f"**{d.text}**" if d.strong else d.text for d in wording.details(cell, column)]
    return "<br>".join(lines)


# --- CSV -------------------------------------------------------------------------------------------

CSV_FIELDS = (
    "table", "preset", "method", "title", "method_config", "trains", "label_fraction",
    "mode", "task", "metric",
    "mean", "sd", "delta", "n_seeds", "n_cases", "best", "second", "notes", "missing_folds", "paper",
    "ci_low", "ci_high", "p", "p_holm", "effect", "rank", "rank_low", "rank_high", "rank_first",
    "steps_to_scratch_best", "pretrain_steps", "voxels_seen", "pretrain_seconds", "downstream_seconds",
    "peak_memory_mib", "pretrain_parameters", "devices",
)  # fmt: skip


def render_csv(model: TableModel) -> str:
    """Return one line for each method, mode and task (tidy), unrounded, with a header.

    Figures are in percent, sd and delta in percentage points; an empty field is "does not exist".
    """
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for number, table in enumerate(model.tables, 1):
        scratch = next((row.cells for row in table.rows if row.method == BASELINE), {})
        targets = {key: best_score(cell) for key, cell in scratch.items()}
        for row in table.rows:
            for column in table.columns:
                if column.key in row.cells:
                    target = targets.get(column.key)
                    writer.writerow(_csv_line(number, table, row, column, row.cells[column.key], target))
    return text.getvalue()


def _csv_line(
    number: int, table: Table, row: Row, column: Column, cell: Cell, target: float | None
) -> dict[str, Any]:
    cost = cost_of(cell.records)
    notes = [printable(text) for mark, text in table.footnotes if mark in cell.marks]
    return {
        "table": number, "preset": printable(table.facets["preset"]),
        "method": printable(row.method), "title": printable(row.title),
        "method_config": canonical_json(row.config), "trains": row.trains,
        "label_fraction": table.facets.get("label_fraction", 1.0),
        "mode": column.mode, "task": column.task, "metric": column.metric,
        "mean": cell.mean, "sd": cell.sd, "delta": cell.delta,
        "n_seeds": cell.n_seeds, "n_cases": cell.n_cases, "best": int(cell.best), "second": int(cell.second),
        "notes": "; ".join(notes), "missing_folds": " ".join(cell.missing_folds), "paper": cell.paper,
        **{f"ci_{side}": getattr(cell.interval, side, None) for side in ("low", "high")},
        **{name: getattr(cell.comparison, name, None) for name in ("p", "p_holm", "effect")},
        "rank": getattr(cell.rank, "rank", None),
        **{f"rank_{name}": getattr(cell.rank, name, None) for name in ("low", "high", "first")},
        "steps_to_scratch_best": steps_to_reach(cell, target),
        **{name: getattr(cost, name, None) for name in _COST_FIELDS},
        "devices": printable("; ".join(cost.devices)) if cost else None,
    }  # fmt: skip


_COST_FIELDS = CSV_FIELDS[CSV_FIELDS.index("pretrain_steps") : -1]

BUILTIN_FORMATS = (
    TableFormat("rich", "For the terminal, in colour", render_rich),
    TableFormat("markdown", "GitHub-flavoured Markdown", render_markdown),
    TableFormat("latex", "For a paper: booktabs, differences to scratch in red and blue", render_latex),
    TableFormat("html", "One page without scripts, light and dark", render_html),
    TableFormat("csv", "Tidy: one line for each method, mode and task, unrounded", render_csv),
)
