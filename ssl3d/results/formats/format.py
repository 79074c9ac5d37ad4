"""Table formats by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ssl3d.results.formats.csv import render_csv
from ssl3d.results.formats.html import render_html
from ssl3d.results.formats.latex import render_latex
from ssl3d.results.formats.markdown import render_markdown
from ssl3d.results.formats.structured import render_json
from ssl3d.results.formats.terminal import render_rich
from ssl3d.results.table.model import TableModel


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


BUILTIN_FORMATS = (
    TableFormat("rich", "For the terminal, in colour", render_rich),
    TableFormat("markdown", "GitHub-flavoured Markdown", render_markdown),
    TableFormat("latex", "For a paper: booktabs, differences to scratch in red and blue", render_latex),
    TableFormat("html", "One page without scripts, light and dark", render_html),
    TableFormat("csv", "Tidy: one line for each method, mode and task, unrounded", render_csv),
    TableFormat("json", "For other programs: captions, notes, and one object a cell, unrounded", render_json),
)
