"""Formats of ``ssl3d table``: one function from a :class:`~ssl3d.results.table.TableModel` to text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssl3d.results.store import canonical_json
from ssl3d.results.table import PAPER, Cell, Column, Row, Table, TableModel

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


# --- What every format says the same way ----------------------------------------------------------


def _printable(text: str) -> str:
    """Return ``text`` on one line, without control characters that could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _mean(cell: Cell) -> str:
    return f"{cell.mean:.1f}"


def _sd(cell: Cell) -> str:
    return "" if cell.sd is None else f"±{cell.sd:.1f}"


def _delta(cell: Cell) -> str:
    if cell.delta is None:
        return ""
    # -0.04 is no loss: one decimal is shown, so the sign follows what is shown.
    shown = round(cell.delta, 1) or 0.0
    return f"{shown:+.1f}".replace("-", "−")


def _statistics(cell: Cell) -> list[tuple[str, bool]]:
    """Return (text, whether it is a significant test) of what the statistics found, line by line."""
    lines = []
    if cell.interval:
        lines.append((f"[{cell.interval.low:.1f}, {cell.interval.high:.1f}]", False))
    if cell.comparison:
        p = cell.comparison.p_holm
        text = "n.p." if cell.comparison.powerless else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        lines.append((text, cell.comparison.significant))
    if cell.rank:
        lines.append((f"#{cell.rank.rank} ({cell.rank.low}-{cell.rank.high})", False))
    return lines


def _notes(table: Table) -> list[str]:
    """Return the lines below the legend: footnotes, then what the statistics have to say."""
    notes = [f"{mark} {_printable(text)}." for mark, text in table.footnotes]
    return notes + [f"{_printable(text)}." for text in table.remarks]


def _support(support: tuple[int, int]) -> str:
    return "{}×{}".format(*support)


def _cells(table: Table) -> Iterable[Cell]:
    return (cell for row in table.rows for cell in row.cells.values())


def _heading(model: TableModel, table: Table) -> str:
    """Return the caption, with the number and what differs when there are several tables."""
    if len(model.tables) == 1:
        return _printable(table.caption)
    number = next(n for n, t in enumerate(model.tables, 1) if t is table)
    differs = f" Differs from the others in: {table.differs}." if table.differs else ""
    return _printable(f"Table {number} of {len(model.tables)}. {table.caption}{differs}")


def _legend(table: Table, best: str, second: str) -> str:
    """Return the sentence that explains the signs which occur in ``table``; no sign, no word."""
    cells = list(_cells(table))
    parts = ["Mean over seeds in %"]
    if any(cell.sd is not None for cell in cells):
        parts.append("± standard deviation over seeds")
    if any(cell.delta is not None for cell in cells):
        parts.append("signed: difference to scratch")
    parts.append("n = seeds × test cases")
    if any(cell.best for cell in cells):
        parts.append(f"{best}: best")
    if second and any(cell.second for cell in cells):
        parts.append(f"{second}: second")
    if any(cell.paper is not None for cell in cells):
        parts.append(f"paper: {PAPER}, on the real data sets")
    return "; ".join(parts) + "."


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
            console.print(_heading(model, table), style="bold", markup=False, highlight=False)
            for block in _blocks(table, console):
                console.print()
                console.print(block)
            console.print()
            styled = console.is_terminal
            legend = _legend(table, best="bold" if styled else "*", second="underlined" if styled else "")
            console.print(legend, style="dim", markup=False, highlight=False)
            for note in _notes(table):
                console.print(note, style="dim", markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _standard_console() -> Console:
    import os

    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=120)
    return console


def _blocks(table: Table, console: Console) -> list[RichTable]:
    block = _block(table, table.groups, 2, console.is_terminal)
    width = console.measure(block, options=console.options.update(width=10_000)).maximum
    if width <= console.width:
        return [block]
    if width - len(block.columns) <= console.width:
        return [_block(table, table.groups, 1, console.is_terminal)]
    return [_block(table, [group], 2, console.is_terminal) for group in table.groups]


def _block(table: Table, groups: Sequence[Sequence[Column]], gap: int, styled: bool) -> RichTable:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    block = RichTable(box=SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    block.add_column(Text("\n\nMethod"), overflow="fold")
    for group in groups:
        for place, column in enumerate(group):
            header = Text(_printable(column.group) if place == 0 else "", style="bold cyan")
            header.append(f"\n{_printable(column.title)}\n", style="bold default")
            header.append(f"n = {_support(column.support)}", style="dim default not bold")
            block.add_column(header, no_wrap=True)
        if group is not groups[-1]:
            block.add_column("", width=1)
    for row in table.rows:
        line: list[Text] = [Text(_printable(row.title))]
        for group in groups:
            line += [_rich_cell(row.cells.get(column.key), column, styled) for column in group]
            if group is not groups[-1]:
                line.append(Text(""))
        block.add_row(*line)
    return block


def _rich_cell(cell: Cell | None, column: Column, styled: bool) -> Text:
    from rich.text import Text

    if cell is None:
        return Text("    –", style="dim")
    # Five characters before the deviation, signs included, put the decimal points in one line.
    text = Text(" " * (5 - len(_mean(cell))))
    text.append(_mean(cell), style="bold" if cell.best else "underline" if cell.second else "")
    if not styled:
        text.append("*" if cell.best else " ")
    if cell.sd is not None:
        text.append(f" {_sd(cell)}", style="dim")
    text.append(cell.marks)
    if cell.delta is not None:
        shown = round(cell.delta, 1)
        colour = "green" if shown > 0 else "red" if shown < 0 else "dim"
        text.append(f"\n{_delta(cell):>5}", style=colour)
    for line, significant in _statistics(cell):
        text.append(f"\n{line}", style="" if significant else "dim")
    if cell.paper is not None:
        text.append(f"\n{cell.paper:5.1f} paper", style="dim italic")
    if cell.support != column.support:
        text.append(f"\nn = {_support(cell.support)}", style="yellow")
    return text


# --- Markdown --------------------------------------------------------------------------------------


def render_markdown(model: TableModel) -> str:
    """Return GitHub-flavoured Markdown: one table, the modes side by side."""
    return "\n".join(_markdown_table(model, table) for table in model.tables)


def _escape_markdown(text: str) -> str:
    text = _printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def _markdown_table(model: TableModel, table: Table) -> str:
    headers = [
        f"{_escape_markdown(column.group)} {_escape_markdown(column.title)}<br>n = {_support(column.support)}"
        for column in table.columns
    ]
    lines = [
        _escape_markdown(_heading(model, table)), "",
        f"| Method | {' | '.join(headers)} |",
        f"|:--{'|--:' * len(headers)}|",
    ]  # fmt: skip
    for row in table.rows:
        cells = [_markdown_cell(row.cells.get(column.key), column) for column in table.columns]
        lines.append(f"| {_escape_markdown(row.title)} | {' | '.join(cells)} |")
    notes = [_escape_markdown(note) for note in (_legend(table, "bold", "underlined"), *_notes(table))]
    return "\n".join([*lines, "", "<br>".join(notes), ""])


def _markdown_cell(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return "–"
    mean = f"**{_mean(cell)}**" if cell.best else f"<u>{_mean(cell)}</u>" if cell.second else _mean(cell)
    lines = [" ".join(filter(None, (mean, _sd(cell)))) + _escape_markdown(cell.marks), _delta(cell)]
    lines += [f"**{line}**" if significant else line for line, significant in _statistics(cell)]
    if cell.paper is not None:
        lines.append(f"paper {cell.paper:.1f}")
    if cell.support != column.support:
        lines.append(f"n = {_support(cell.support)}")
    return "<br>".join(filter(None, lines))


# --- CSV -------------------------------------------------------------------------------------------

CSV_FIELDS = (
    "table", "preset", "method", "title", "method_config", "trains", "label_fraction",
    "mode", "task", "metric",
    "mean", "sd", "delta", "n_seeds", "n_cases", "best", "second", "notes", "missing_folds", "paper",
    "ci_low", "ci_high", "p", "p_holm", "effect", "rank", "rank_low", "rank_high", "rank_first",
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
        for row in table.rows:
            for column in table.columns:
                if column.key in row.cells:
                    writer.writerow(_csv_line(number, table, row, column, row.cells[column.key]))
    return text.getvalue()


def _csv_line(number: int, table: Table, row: Row, column: Column, cell: Cell) -> dict[str, Any]:
    notes = [_printable(text) for mark, text in table.footnotes if mark in cell.marks]
    return {
        "table": number, "preset": _printable(table.facets["preset"]),
        "method": _printable(row.method), "title": _printable(row.title),
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
    }  # fmt: skip


BUILTIN_FORMATS = (
    TableFormat("rich", "For the terminal, in colour", render_rich),
    TableFormat("markdown", "GitHub-flavoured Markdown", render_markdown),
    TableFormat("csv", "Tidy: one line for each method, mode and task, unrounded", render_csv),
)
