"""The parts of a table: columns, cells, rows, intervals, comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from ssl3d.results.store.record import Record

BASELINE = "scratch"


MODES = {"linear": "Linear", "multiscale": "Multi-scale linear", "finetune": "Fine-tune", "knn": "k-NN"}


TASKS = ("shc", "sac", "ccc", "sbm")
"""The order of the paper's columns; other tasks follow by name."""


Seed = tuple[int, int | None]
"""(seed of the evaluation, seed of the pretraining); they differ for a checkpoint from elsewhere."""


@dataclass(frozen=True)
class Column:
    """One task in one mode.

    Attributes:
        mode, task: names as in the records.
        metric: ``dsc``, ``auc``, ...; shown in capitals.
        support: (seeds, cases) that most cells of the column stand on.
        digits: decimals of its scores; what is equal at these is not told apart.
        phantoms: all its records are of the bundled phantoms.
        floor: differences smaller than this are luck of rounding in the evaluation, see :mod:`ssl3d.results.floor`;
            None where it is not known.
        detectable: the smallest difference to the reference that the table could have shown; filled in by
            :func:`ssl3d.results.statistics.annotate.with_statistics`.
    """

    mode: str
    task: str
    metric: str
    support: tuple[int, int]
    digits: int = 1
    phantoms: bool = False
    floor: float | None = None
    detectable: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.mode, self.task

    def floor_of(self, *cells: Cell) -> float:
        """Return the difference between ``cells`` below which nothing is told apart; 0 where no floor is known."""
        return max(0.0, self.floor or 0.0, *(cell.floor or 0.0 for cell in cells))

    @property
    def group(self) -> str:
        """Title of the group of columns."""
        return MODES.get(self.mode, self.mode)

    @property
    def title(self) -> str:
        """Title within the group, such as ``SHC DSC``."""
        return f"{self.task.upper()} {self.metric.upper()}"


@dataclass(frozen=True)
class Cell:
    """One method on one task in one mode, over all its seeds.

    Attributes:
        seeds: the primary metric for each seed, folds pooled within the seed; in percent, or for errors in
            the unit of what is predicted (see :mod:`ssl3d.results.scores`), as is every other figure here.
        n_cases: scored test cases of one seed, all folds together.
        delta: difference to scratch, of the means over the seeds that both have; None without one.
        best, second: best and second best of the column, at the decimals that it is shown with, where none below is
            within the floor.
        marks: signs of the footnotes that belong to this cell.
        missing_folds: folds that other cells of the column have and this one lacks.
        constant: outputs of some seed that do not differ between test cases; such a cell has no AUC.
        paper: the paper's own figure in percent, where it was asked for and exists.
        floor: as the column's, with the luck of the row's own pretraining; None where that was not measured.
        excluded: counts of what no metric was computed for, by reason, over all seeds.
        interval, comparison, rank: filled in by :func:`ssl3d.results.statistics.annotate.with_statistics`.
        records: the records behind the cell; by reference, for statistics and reports.
    """

    seeds: dict[Seed, float]
    n_cases: int
    delta: float | None = None
    best: bool = False
    second: bool = False
    marks: str = ""
    missing_folds: tuple[str, ...] = ()
    constant: bool = False
    paper: float | None = None
    floor: float | None = None
    excluded: dict[str, int] = field(default_factory=dict)
    interval: Interval | None = None
    comparison: Comparison | None = None
    rank: Rank | None = None
    records: tuple[Record, ...] = field(default=(), repr=False)

    @cached_property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.seeds.values())

    @cached_property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds (n - 1); None for one seed."""
        if len(self.seeds) < 2:
            return None
        # statistics.stdev computes with fractions: exact, and slow for thousands of cells.
        return math.sqrt(math.fsum((s - self.mean) ** 2 for s in self.seeds.values()) / (len(self.seeds) - 1))

    @property
    def ranked(self) -> bool:
        """Whether the cell can be compared with others: no fold is missing, and its outputs depend on the case."""
        return not self.missing_folds and not self.constant

    @property
    def n_seeds(self) -> int:
        return len(self.seeds)

    @property
    def support(self) -> tuple[int, int]:
        """(seeds, cases) behind the mean."""
        return self.n_seeds, self.n_cases


@dataclass(frozen=True)
class Row:
    """One method in one configuration; ``cells`` by (mode, task), ``cost`` where it was asked for.

    ``marks`` are the signs of the footnotes that belong to the whole row.
    ``failed``: (mode, task) of what was tried and could not be computed, why by name in ``STORE/failures``.
    """

    method: str
    config: dict[str, Any]
    title: str
    trains: str
    cells: dict[tuple[str, str], Cell]
    cost: Cost | None = None
    marks: str = ""
    failed: frozenset[tuple[str, str]] = frozenset()

    def absent(self, key: tuple[str, str], dash: str = "–") -> str:
        """Return what stands in place of a cell that is not there."""
        return "failed" if key in self.failed else dash


@dataclass(frozen=True)
class Table:
    """Rows and columns that can be compared with each other.

    Attributes:
        caption: the conditions under which every number of the table was made.
        differs: for several tables, what sets this one apart; else empty.
        footnotes: (mark, text) pairs that occur in the table.
        facets: the same conditions as data, flat, for tools.
        remarks: sentences below the table, from the statistics.
    """

    caption: str
    differs: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[tuple[str, str], ...]
    facets: dict[str, Any]
    remarks: tuple[str, ...] = ()

    @property
    def groups(self) -> list[list[Column]]:
        """Columns by mode, in order."""
        groups: dict[str, list[Column]] = {}
        for column in self.columns:
            groups.setdefault(column.mode, []).append(column)
        return list(groups.values())


@dataclass(frozen=True)
class TableModel:
    """All tables of a store. ``against`` names the published figures beside ours, if any."""

    tables: tuple[Table, ...]
    against: str | None = None


Over = Literal["seeds and cases", "these weights only"]


SEEDS_AND_CASES: Over = "seeds and cases"


THESE_WEIGHTS: Over = "these weights only"


@dataclass(frozen=True)
class Interval:
    """A confidence interval in the unit of the score.

    Attributes:
        low, high: bounds.
        level: nominal coverage, such as 0.95.
        over: what it speaks about: ``seeds and cases``, other trainings on other cases; or ``these weights only``,
            the networks at hand on other cases, where there are fewer than three trainings.
    """

    low: float
    high: float
    level: float
    over: Over


@dataclass(frozen=True)
class Comparison:
    """One row against a reference on one column.

    Attributes:
        reference: title of the row that it is compared with.
        difference: of the means over the seeds that both have, in the unit of the score.
        low, high: 95 % interval of the difference, not corrected for the number of tests.
        p: two-sided; NaN where it cannot be computed, see ``note``.
        p_holm: the same, adjusted for all comparisons of the table (Holm); NaN where p is.
        seeds: that both have.
        floor: differences smaller than this are luck of rounding, see :mod:`ssl3d.results.floor`.
        note: why there is no p.
    """

    reference: str
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    seeds: int = 0
    floor: float = 0.0
    note: str = ""

    @property
    def significant(self) -> bool:
        """Whether the adjusted p value is at most 0.05 and the difference no smaller than rounding's luck."""
        return self.p_holm <= ALPHA and abs(self.difference) >= self.floor


@dataclass(frozen=True)
class Rank:
    """A rank (1 is best) and how firm it is.

    Attributes:
        rank: by the means.
        low, high: 2.5th and 97.5th percentile of the ranks drawn; None with too few seeds for any.
        first: share of the draws in which the method is first (ties share); None as above.
    """

    rank: int
    low: int | None = None
    high: int | None = None
    first: float | None = None


ALPHA = 0.05
"""Level of the tests, for the whole table."""


@dataclass(frozen=True)
class Cost:
    """Cost of one seed; None where no record says it.

    Attributes:
        pretrain_steps: optimizer steps, mean over seeds.
        voxels_seen: by the method in pretraining, mean over seeds.
        pretrain_seconds: wall time of pretraining, mean over seeds.
        downstream_seconds: wall time of all evaluations of a seed, mean over seeds.
        peak_memory_mib: largest of any evaluation, MiB.
        pretrain_parameters: trained by the method, its own heads included.
        devices: that pretrained or evaluated, sorted.
    """

    pretrain_steps: float | None
    voxels_seen: float | None
    pretrain_seconds: float | None
    downstream_seconds: float | None
    peak_memory_mib: float | None
    pretrain_parameters: float | None
    devices: tuple[str, ...]
