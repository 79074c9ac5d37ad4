"""What every table format says the same way: figures, details of a cell, headings, legends, costs.

A format decides only how these look; which of them exist, and their words, are decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ssl3d.results import scores
from ssl3d.results.table.model import Cell, Column, Cost, Row, Table, TableModel
from ssl3d.results.table.published import PAPER

Kind = Literal["delta", "interval", "p", "rank", "paper", "support"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order in which they are shown."""


@dataclass(frozen=True)
class Detail:
    """One line below the mean of a cell.

    Attributes:
        kind: what it says, for a format to colour or align.
        text: the line, plain.
        strong: it is a significant test.
    """

    kind: Kind
    text: str
    strong: bool = False


def printable(text: str) -> str:
    """Return ``text`` on one line, without control characters that could steer a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def unscored(cell: Cell, column: Column) -> bool:
    """Whether the cell has no score: an AUC of outputs that do not differ between cases."""
    return cell.constant and scores.of_classes(column.metric)


def mean(cell: Cell, column: Column) -> str:
    return "const." if unscored(cell, column) else f"{cell.mean:.{column.digits}f}"


def sd(cell: Cell, column: Column) -> str:
    return "" if cell.sd is None or unscored(cell, column) else f"±{cell.sd:.{column.digits}f}"


def under_title(column: Column) -> list[str]:
    """Return the lines below the title of a column: its support, and what it could have shown."""
    lines = [f"n = {support(column.support)}"]
    if column.detectable is not None:
        beyond = scores.in_percent(column.metric) and column.detectable > 100
        lines.append("shows none" if beyond else f"shows {column.detectable:.{column.digits}f}")
    return lines


def row_title(row: Row) -> str:
    return printable(row.title) + row.marks


def shown_delta(cell: Cell, column: Column) -> float | None:
    """Return the difference to scratch as it is shown, so that its sign and colour follow what is seen.

    -0.04 is no loss at one decimal.
    """
    return None if cell.delta is None else round(cell.delta, column.digits) or 0.0


def gain(cell: Cell, column: Column) -> int:
    """Return 1 where the shown difference to scratch is for the better, -1 for the worse, 0 where there is none."""
    shown = shown_delta(cell, column) or 0.0
    return scores.sign(column.metric) * ((shown > 0) - (shown < 0))


def stars(cell: Cell) -> str:
    """Return ``*``, ``**``, ``***`` for an adjusted p of at most 0.05, 0.01, 0.001; else nothing."""
    if cell.comparison is None or not cell.comparison.significant:
        return ""
    p = cell.comparison.p_holm
    return "***" if p <= 0.001 else "**" if p <= 0.01 else "*"


def details(cell: Cell, column: Column) -> list[Detail]:
    """Return the lines below the mean, in the order in which every format shows them."""
    found = []
    delta = shown_delta(cell, column)
    if delta is not None:
        found.append(Detail("delta", f"{delta:+.{column.digits}f}".replace("-", "−")))
    if cell.interval:
        bounds = (f"{bound:.{column.digits}f}" for bound in (cell.interval.low, cell.interval.high))
        found.append(Detail("interval", f"[{', '.join(bounds)}]"))
    if cell.comparison:
        p = cell.comparison.p_holm
        text = "n.p." if cell.comparison.note else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        found.append(Detail("p", text, cell.comparison.significant))
    if cell.rank:
        known = "" if cell.rank.low is None else f" ({cell.rank.low}-{cell.rank.high})"
        found.append(Detail("rank", f"#{cell.rank.rank}{known}"))
    if cell.paper is not None:
        found.append(Detail("paper", f"paper {cell.paper:.1f}"))
    if cell.support != column.support:
        found.append(Detail("support", f"n = {support(cell.support)}"))
    return found


def support(value: tuple[int, int]) -> str:
    return "{}×{}".format(*value)


def notes(table: Table) -> list[str]:
    """Return the lines below the legend: footnotes, what the statistics have to say, and the floor."""
    lines = [f"{mark} {printable(text)}." for mark, text in table.footnotes]
    return lines + [f"{printable(text)}." for text in (*table.remarks, *floor_remarks(table))]


def floor_remarks(table: Table) -> list[str]:
    """Say of a table of phantoms how far two equal runs lie apart by rounding; nothing of other tables."""
    measured = [c for c in table.columns if c.phantoms and c.floor is not None]
    unknown = [f"{c.group} {c.title}" for c in table.columns if c.phantoms and c.floor is None]
    remarks = []
    if measured:
        floors = ", ".join(f"{c.group} {c.title} {c.floor:.{c.digits}f}" for c in measured)
        remarks.append(
            "Floor: two evaluations of the same weights that differ by rounding only (threads, kind of processor) are up "
            f"to so far apart, 95 %, with these seeds: {floors}; what is smaller is not bold"
        )
    whole = []
    for row in table.rows:
        known = [(c, row.cells[c.key].floor) for c in table.columns if c.key in row.cells]
        floors = ", ".join(
            f"{c.group} {c.title} {found:.{c.digits}f}" for c, found in known if found is not None
        )
        whole += [f"{row.title}: {floors}"] if floors else []
    if whole:
        remarks.append(f"Floor of whole runs, pretraining included: {'; '.join(whole)}")
    if unknown:
        remarks.append(f"The luck of rounding in an evaluation was not measured for {', '.join(unknown)}")
    return remarks


def heading(model: TableModel, table: Table) -> str:
    """Return the caption, with the number and what differs when there are several tables."""
    if len(model.tables) == 1:
        return printable(table.caption)
    number = next(n for n, t in enumerate(model.tables, 1) if t is table)
    differs = f" Differs from the others in: {table.differs}." if table.differs else ""
    return printable(f"Table {number} of {len(model.tables)}. {table.caption}{differs}")


def units(metrics: Collection[str]) -> str:
    """Return in what the scores of a table are.

    >>> units(["dsc", "mae"]), units(["mae"])
    ('in % (MAE: in the unit of the values, lower is better)', 'in the unit of the values, lower is better')
    """
    errors = sorted({metric for metric in metrics if not scores.in_percent(metric)})
    if not errors:
        return "in %"
    own = "in the unit of the values, lower is better"
    return own if set(metrics) == set(errors) else f"in % ({', '.join(errors).upper()}: {own})"


def legend(table: Table, best: str, second: str, colours: str = "", starred: bool = False) -> str:
    """Return the sentence that explains the signs which occur in ``table``; no sign, no word.

    Args:
        table: the table.
        best, second: how the format marks them; an empty ``second`` is not marked.
        colours: how the format colours differences to scratch, if it does.
        starred: the format puts :func:`stars` beside the means.
    """
    shown = [(row.cells[c.key], c) for row in table.rows for c in table.columns if c.key in row.cells]
    cells = [cell for cell, _ in shown]
    parts = [f"Mean over seeds {units([column.metric for column in table.columns])}"]
    if any(cell.sd is not None for cell in cells):
        parts.append("± standard deviation over seeds")
    if any(cell.delta is not None for cell in cells):
        over = ", over the seeds of both" if _seeds_differ(table) else ""
        parts.append(f"signed: difference to scratch{over}{f' ({colours})' if colours else ''}")
    parts.append("n = seeds × test cases")
    if any(cell.best for cell in cells):
        parts.append(f"{best}: best")
    if second and any(cell.second for cell in cells):
        parts.append(f"{second}: second")
    if any(unscored(cell, column) for cell, column in shown):
        parts.append("const.: outputs alike for all cases")
    if starred and any(stars(cell) for cell in cells):
        parts.append("*, **, ***: Holm-adjusted p at most 0.05, 0.01, 0.001")
    if any(cell.paper is not None for cell in cells):
        parts.append(f"paper: {PAPER}, on the real data sets")
    return "; ".join(parts) + "."


def _seeds_differ(table: Table) -> bool:
    """Return whether rows of a column have other seeds, so that their means' difference is not that of common seeds."""
    return any(
        len(
            {
                frozenset(seed for seed, _ in row.cells[c.key].seeds)
                for row in table.rows
                if c.key in row.cells
            }
        )
        > 1
        for c in table.columns
    )


# --- Cost ------------------------------------------------------------------------------------------

COST_HEADERS = ("Method", "Steps", "Voxels seen", "Pretraining", "Evaluation", "Memory", "Trained", "Device")
COST_LEGEND = (
    "Cost of one seed, the mean over seeds: pretraining steps, voxels seen and time; time of all evaluations "
    "of the row; largest memory; parameters trained in pretraining."
)


def cost_lines(table: Table) -> list[Sequence[str]]:
    """Return one line a method below :data:`COST_HEADERS`; empty when costs were not asked for."""
    if not any(row.cost for row in table.rows):
        return []
    return [(printable(row.title), *_cost(row.cost)) for row in table.rows]


def _cost(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["?"] * (len(COST_HEADERS) - 1)
    memory = cost.peak_memory_mib
    return [
        _count(cost.pretrain_steps), _count(cost.voxels_seen), _seconds(cost.pretrain_seconds),
        _seconds(cost.downstream_seconds),
        "?" if memory is None else f"{memory:.0f} MiB" if memory < 1024 else f"{memory / 1024:.1f} GiB",
        _count(cost.pretrain_parameters), printable(", ".join(cost.devices)) or "?",
    ]  # fmt: skip


def _count(number: float | None) -> str:
    """Return a count with at most three digits and a unit.

    >>> _count(360), _count(1_500_000), _count(0), _count(None)
    ('360', '1.5 M', '0', '?')
    """
    if number is None:
        return "?"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _seconds(seconds: float | None) -> str:
    """Return a time in the largest unit that leaves a number of at least one."""
    if seconds is None:
        return "?"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
