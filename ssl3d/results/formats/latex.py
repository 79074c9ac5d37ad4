"""``--format latex``: booktabs tables for a paper, in packages that every TeX distribution has."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

from ssl3d.results.formats import wording
from ssl3d.results.formats.wording import Kind
from ssl3d.results.table.model import Cell, Column, Row, Table, TableModel

PREAMBLE = "% \\usepackage[T1]{fontenc}\n% \\usepackage{booktabs}\n% \\usepackage{graphicx}\n% \\usepackage{xcolor}\n"

# The colours of the paper's table 1, dark enough for print.
_BETTER, _WORSE = "red!75!black", "blue!75!black"

_SIGNS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}", '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
    "†": r"\ensuremath{{}^{\dagger}}", "‡": r"\ensuremath{{}^{\ddagger}}", "§": r"\ensuremath{{}^{\S}}",
    "¶": r"\ensuremath{{}^{\P}}", "‖": r"\ensuremath{{}^{\Vert}}", "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}", "−": r"\ensuremath{-}", "–": "--", "—": "---", "≤": r"\ensuremath{\leq}",
    "≥": r"\ensuremath{\geq}", "’": "'", "…": r"\dots{}",
}  # fmt: skip
# The letters up to U+017F that the T1 encoding has.
_LETTERS = {c for c in map(chr, range(0xC0, 0x180)) if c.isalpha()} - set("ĦħĸĿŀŉŦŧſ")


def escape(text: str) -> str:
    r"""Return ``text`` as LaTeX that shows it; what pdfLaTeX cannot show is named by its code point.

    >>> print(escape("50% of a_b & \\c"))
    50\% of a\_b \& \textbackslash{}c
    """
    runs = re.findall(r"\*+|.", unicodedata.normalize("NFC", wording.printable(text)))
    return "".join(_superscript(run) if run[0] == "*" else _character(run) for run in runs)


def _superscript(text: str) -> str:
    return rf"\ensuremath{{{{}}^{{{text}}}}}"


def _character(c: str) -> str:
    if c in _SIGNS:
        return _SIGNS[c]
    if c.isascii() or c in _LETTERS:
        return c
    return f"{{[}}U+{ord(c):04X}{{]}}"


def render_latex(model: TableModel) -> str:
    """Return one ``table*`` a table, with the packages that it needs in comments above.

    Best bold, second underlined, differences to scratch in the paper's red and blue.
    """
    return PREAMBLE + "\n".join(_table(model, table) for table in model.tables)


def _table(model: TableModel, table: Table) -> str:
    groups = table.groups
    lines = [
        r"\begin{table*}", r"\centering", rf"\caption{{{_caption(model, table)}}}", r"\small",
        r"\setlength{\tabcolsep}{4pt}", r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{@{{}}l{'r' * len(table.columns)}@{{}}}}", r"\toprule",
        " & ".join(["", *(rf"\multicolumn{{{len(g)}}}{{c}}{{{escape(g[0].group)}}}" for g in groups)]) + r" \\",
    ]  # fmt: skip
    first = 2
    for group in groups:
        lines.append(rf"\cmidrule(lr){{{first}-{first + len(group) - 1}}}")
        first += len(group)
    lines += [
        " & ".join(["Method", *(escape(c.title) for c in table.columns)]) + r" \\",
        *_under_titles(table.columns),
        r"\midrule",
    ]
    for number, row in enumerate(table.rows):
        lines += [r"\addlinespace"] * bool(number) + _row(row, table)
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if costs := wording.cost_lines(table):
        lines += [
            "", r"\medskip", "", r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            r"\begin{tabular}{@{}lrrrrrrl@{}}", r"\toprule",
            " & ".join(map(escape, wording.COST_HEADERS)) + r" \\", r"\midrule",
            *(" & ".join(map(escape, line)) + r" \\" for line in costs), r"\bottomrule", r"\end{tabular}}",
        ]  # fmt: skip
    return "\n".join([*lines, r"\end{table*}", ""])


def _under_titles(columns: Sequence[Column]) -> list[str]:
    """Return the lines of the header below the titles."""
    lines = zip_longest(*(wording.under_title(column) for column in columns), fillvalue="")
    texts = [[re.sub(r"^n\b", "$n$", escape(text)) for text in line] for line in lines]
    return [
        " & ".join(["", *(rf"\scriptsize {text}" if text else "" for text in line)]) + r" \\"
        for line in texts
    ]


def _caption(model: TableModel, table: Table) -> str:
    legend = wording.legend(table, "bold", "underlined", colours="red: better, blue: worse", starred=True)
    parts = [wording.heading(model, table), legend, *wording.notes(table)]
    if wording.cost_lines(table):
        parts.append(wording.COST_LEGEND)
    return " ".join(map(escape, parts))


def _row(row: Row, table: Table) -> list[str]:
    """Return the lines of a method: its means, then one line for each kind of detail that it has."""
    means = [escape(wording.row_title(row))]
    below: dict[Kind, dict[int, str]] = {}
    for place, column in enumerate(table.columns):
        cell = row.cells.get(column.key)
        means.append(_mean(cell, column) if cell else row.absent(column.key, "--"))
        for detail in wording.details(cell, column) if cell else ():
            below.setdefault(detail.kind, {})[place] = _detail(detail, cell, column)
    order = [kind for kind in wording.KINDS if kind in below]
    lines = [" & ".join(means)]
    lines += [
        " & ".join(["", *(below[kind].get(i, "") for i in range(len(table.columns)))]) for kind in order
    ]
    return [line + r" \\" for line in lines]


def _mean(cell: Cell, column: Column) -> str:
    mean = wording.mean(cell, column)
    mean = rf"\textbf{{{mean}}}" if cell.best else rf"\underline{{{mean}}}" if cell.second else mean
    deviation = rf" {{\scriptsize {escape(wording.sd(cell, column))}}}" if wording.sd(cell, column) else ""
    significance = escape(wording.stars(cell))
    return f"{mean}{deviation}{significance}{escape(cell.marks)}"


def _detail(detail: wording.Detail, cell: Cell | None, column: Column) -> str:
    text = escape(detail.text)
    if detail.kind == "delta" and cell:
        colour = {1: _BETTER, 0: "black", -1: _WORSE}[wording.gain(cell, column)]
        text = rf"\textcolor{{{colour}}}{{{text}}}"
    if detail.strong:
        text = rf"\textbf{{{text}}}"
    return rf"{{\scriptsize {text}}}"
