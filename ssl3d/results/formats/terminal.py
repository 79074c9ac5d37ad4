"""Formats of ``ssl3d table``: one function from a :class:`~ssl3d.results.table.model.TableModel` to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssl3d.results import scores
from ssl3d.results.formats import wording
from ssl3d.results.formats.wording import printable
from ssl3d.results.store.record import canonical_json
from ssl3d.results.table.model import Column, Row, Table, TableModel

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segments
    from rich.table import Table as RichTable


# --- Terminal --------------------------------------------------------------------------------------


def render_rich(model: TableModel, console: Console | None = None) -> str:
    """Return the tables for a terminal: one block where the width allows, else one for each mode.

    Args:
        model: the tables.
        console: decides width and colours; default: standard output's, and 120 columns without
            colours when that is no terminal (a log, a pipe) and COLUMNS is not set.
    """
    console = console or _standard_console()
    styled = console.is_terminal

    def say(text: str, style: str) -> None:
        # A line of a log or a pipe stays one, as searching it needs.
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=not styled)

    with console.capture() as capture:
        for number, table in enumerate(model.tables):
            if number:
                console.print("\n")
            say(wording.heading(model, table), "bold")
            for block in _blocks(table, console):
                console.print()
                console.print(block)
            console.print()
            say(
                wording.legend(table, best="bold" if styled else "*", second="underlined" if styled else ""),
                "dim",
            )
            for note in wording.notes(table):
                say(note, "dim")
            if lines := wording.cost_lines(table):
                console.print()
                console.print(_cost_block(lines))
                say(wording.COST_LEGEND, "dim")
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _standard_console() -> Console:
    import os

    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=120)
    return console


Lines = list[list[tuple[str, str]]]
"""A cell of a terminal's table: lines of (text, style)."""


def _blocks(table: Table, console: Console) -> list[Segments | RichTable]:
    cells = {
        column.key: [_rich_cell(row, column, console.is_terminal) for row in table.rows]
        for column in table.columns
    }
    for gap in (3, 2):
        columns = _columns(table, cells, table.groups)
        if _width(columns, gap) <= console.width:
            return [_block(columns, gap, console)]
    blocks: list[Segments | RichTable] = []
    for group in table.groups:
        columns = _columns(table, cells, [group])
        narrow = _width(columns, 3) > console.width
        blocks.append(_shrinking_block(columns) if narrow else _block(columns, 3, console))
    return blocks


def _columns(
    table: Table, cells: Mapping[tuple[str, str], list[Lines]], groups: Sequence[Sequence[Column]]
) -> list[list[Lines]]:
    """Return the columns of ``groups`` behind that of the methods, each with its header in front."""
    bold = "bold default"
    deep = max(len(wording.under_title(column)) for group in groups for column in group)
    columns: list[list[Lines]] = [
        [
            [[], [], *[[] for _ in range(deep - 1)], [("Method", bold)]],
            *([[(wording.row_title(row), "")]] for row in table.rows),
        ]
    ]
    for group in groups:
        if group is not groups[0]:
            columns.append([[[(" ", "")]]] + [[] for _ in table.rows])
        for place, column in enumerate(group):
            header = [
                [(printable(column.group) if place == 0 else "", "bold cyan")],
                [(printable(column.title), bold)],
                *([(line, "dim default")] for line in wording.under_title(column)),
            ]
            columns.append([header, *cells[column.key]])
    return columns


def _line_width(line: Sequence[tuple[str, str]]) -> int:
    from rich.cells import cell_len

    return sum(cell_len(text) for text, _ in line)


def _widths(columns: Sequence[Sequence[Lines]]) -> list[int]:
    return [max(_line_width(line) for cell in column for line in cell) for column in columns]


def _width(columns: Sequence[Sequence[Lines]], gap: int) -> int:
    return sum(_widths(columns)) + gap * (len(columns) - 1)


def _block(columns: Sequence[Sequence[Lines]], gap: int, console: Console) -> Segments:
    """Lay the columns out side by side, ``gap`` spaces between them; a rule below the headers.

    rich's own tables measure, wrap and crop every cell, which takes seconds for thousands of records.
    """
    from rich.segment import Segment, Segments

    widths = _widths(columns)
    styles = {
        style: console.get_style(style)
        for style in {s for c in columns for cell in c for ln in cell for _, s in ln}
    }
    segments = []
    for number, row in enumerate(zip(*columns, strict=True)):
        for place in range(max(map(len, row))):
            behind = 0  # spaces that are due before the next text
            for cell, width in zip(row, widths, strict=True):
                line = cell[place] if place < len(cell) else []
                for text, style in line:
                    if text:
                        segments += [Segment(" " * behind), Segment(text, styles[style])]
                        behind = 0
                behind += width - _line_width(line) + gap
            segments.append(Segment.line())
        if number == 0:
            segments += [Segment("─" * _width(columns, gap)), Segment.line()]
    return Segments(segments)


def _shrinking_block(columns: Sequence[Sequence[Lines]]) -> RichTable:
    """Lay the columns out for a terminal that is too narrow for them."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    def text(cell: Lines) -> Text:
        return Text("\n").join(Text.assemble(*line) for line in cell)

    block = RichTable(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="")
    for place, (header, *_) in enumerate(columns):
        block.add_column(text(header), no_wrap=place > 0, overflow="ellipsis" if place else "fold")
    for place in range(1, len(columns[0])):
        block.add_row(*(text(column[place]) for column in columns))
    return block


def _rich_cell(row: Row, column: Column, styled: bool) -> Lines:
    cell = row.cells.get(column.key)
    if cell is None:
        return [[(f"{row.absent(column.key):>5}", "red" if column.key in row.failed else "dim")]]
    # So many characters before the deviation, signs included, put the decimal points in one line.
    width = 4 + column.digits
    mean = wording.mean(cell, column)
    first = [
        (" " * (width - len(mean)), ""),
        (mean, "bold" if cell.best else "underline" if cell.second else ""),
    ]
    if not styled:
        first.append(("*" if cell.best else " ", ""))
    if deviation := wording.sd(cell, column):
        first.append((f" {deviation}", "dim"))
    lines = [[*first, (cell.marks, "")]]
    for detail in wording.details(cell, column):
        line, style = detail.text, "" if detail.strong else _RICH_STYLES.get(detail.kind, "dim")
        if detail.kind == "delta":
            line, style = f"{line:>{width}}", _RICH_GAIN[wording.gain(cell, column)]
        elif detail.kind == "paper":
            line = f"{cell.paper:5.1f} paper"  # its decimal point below that of the mean
        lines += [[(part, style)] for part in line.split("\n")]
    return lines


_RICH_GAIN = {1: "green", 0: "dim", -1: "red"}
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


# --- CSV -------------------------------------------------------------------------------------------


def _csv_head(number: int, table: Table, row: Row, column: Column) -> dict[str, Any]:
    return {
        "table": number, "preset": printable(table.facets["preset"]),
        "method": printable(row.method), "title": printable(row.title),
        "method_config": canonical_json(row.config), "trains": row.trains,
        "label_fraction": table.facets.get("label_fraction", 1.0),
        "mode": column.mode, "task": column.task, "metric": column.metric,
        "unit": scores.unit(column.metric) or "value",
    }  # fmt: skip
