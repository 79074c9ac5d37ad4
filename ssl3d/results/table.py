"""From records to the layout of the paper's table 1: methods by (linear, fine-tune) x tasks.

Only records that differ in seed or fold are ever averaged. Whatever else differs keeps records
apart: another configuration of a method is another row; another backbone, budget, label fraction
or data fingerprint is another table, whose caption says what differs.
"""

from __future__ import annotations

import csv
import marshal
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ssl3d.errors import ConfigError, DataError, nearest
from ssl3d.results import scores
from ssl3d.results.cost import Cost, cost_of, mixed_budgets
from ssl3d.results.floor import as_the_preset_is, floor, on_phantoms
from ssl3d.results.store import Record, canonical_json, no_garbage_collection

if TYPE_CHECKING:
    from ssl3d.results.comparisons import Comparison
    from ssl3d.results.intervals import Interval
    from ssl3d.results.ranking import Rank

BASELINE = "scratch"
MODES = {"linear": "Linear", "finetune": "Fine-tune", "knn": "k-NN"}
TASKS = ("shc", "sac", "ccc", "sbm")
"""The order of the paper's columns; other tasks follow by name."""

Seed = tuple[int, int | None]
"""(seed of the evaluation, seed of the pretraining); they differ for a checkpoint from elsewhere."""

_MARKS = "†‡§¶‖#"
_NOTES = {"decoder random": "decoder random, frozen in the linear evaluation"}
_INCOMPLETE = "folds are missing: the mean of those that are finished; not ranked"
_UNFINISHED_SEEDS = "without seeds that lack folds"
_CONSTANT = "the outputs do not differ between test cases, so there is no score; not ranked"
_CONSTANT_ERROR = "the outputs do not differ between test cases; not ranked"
_NOT_LEARNED = (
    "pretext task not learned: on held-back volumes its loss is no better than that of an output that ignores its "
    "input"
)
_PARTLY_LEARNED = "pretext task not learned by some seeds"
_ONE_CHECKPOINT = "the seeds share one pretraining, so the deviation is that of the evaluation only"


@dataclass(frozen=True)
class Column:
    """One task in one mode.

    Attributes:
        mode, task: names as in the records.
        metric: ``dsc``, ``auc``, ...; shown in capitals.
        support: (seeds, cases) that most cells of the column stand on.
        digits: decimals of its scores; what is equal at these is not told apart.
        phantoms: all its records are of the bundled phantoms.
        floor: differences smaller than this are luck of rounding, see :mod:`ssl3d.results.floor`; None where it
            is not known.
        detectable: the smallest difference to the reference that the table could have shown; filled in by
            :func:`ssl3d.results.statistics.with_statistics`.
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
        delta: mean minus the mean of scratch; None without scratch.
        best, second: best and second best of the column, at the decimals that it is shown with, where the next
            one is not within the column's floor.
        marks: signs of the footnotes that belong to this cell.
        missing_folds: folds that other cells of the column have and this one lacks.
        constant: outputs of some seed that do not differ between test cases; such a cell has no AUC.
        paper: the paper's own figure in percent, where it was asked for and exists.
        excluded: counts of what no metric was computed for, by reason, over all seeds.
        interval, comparison, rank: filled in by :func:`ssl3d.results.statistics.with_statistics`.
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


def build_table(
    records: Iterable[Record],
    method_order: Sequence[str] = (),
    against: str | None = None,
    failures: Iterable[Record] = (),
) -> TableModel:
    """Arrange ``records`` in the layout of the paper's table 1.

    Args:
        records: sound records (see :meth:`ssl3d.results.store.ResultStore.records`), any order.
        method_order: methods from top to bottom; scratch is always first, unknown ones last.
        against: ``paper`` puts the published figures beside ours.
        failures: cells that could not be computed (see :meth:`ssl3d.results.store.ResultStore.failures`).

    Raises:
        DataError: there is no record, or two records of one cell, seed and fold contradict.
        ConfigError: unknown ``against``.
    """
    published = _published(against)
    with no_garbage_collection():
        return TableModel(_tables([*records, *failures], method_order, published), against)


def _tables(
    records: Iterable[Record], method_order: Sequence[str], published: Mapping[tuple[str, str, str], float]
) -> tuple[Table, ...]:
    parts = _parts(records)
    if not parts:
        raise DataError("There are no records to make a table of. Make some: ssl3d bench --store DIR")
    drafts = _assemble(parts)
    flats = [flatten(draft.facets) for draft in drafts]
    order = {
        name: place for place, name in enumerate((BASELINE, *(m for m in method_order if m != BASELINE)))
    }
    tables = []
    for draft, flat in zip(drafts, flats, strict=True):
        others = [other for other in flats if other is not flat]
        tables.append(_table(draft, flat, _differences(flat, others), order, published))
    return tuple(tables)


# --- Which records belong together ---------------------------------------------------------------


@dataclass
class _Part:
    """All records that agree in everything but method, its configuration and the seed."""

    pretrain: str  # "" without pretraining
    shared: str  # backbone, label fraction and whatever a later schema adds
    column: tuple[str, str]  # (mode, task)
    split: str
    conditions: dict[str, str]  # of this task, this mode and this split; see _conditions
    records: list[Record] = field(default_factory=list)

    @property
    def created(self) -> str:
        return min(str(record.get("created", "")) for record in self.records)


_FOLD = re.compile(r"fold-?\d+$")
_OWN = {"method", "method_config", "seed", "pretrain_seed", "weights"}
_OF_COLUMN = {"task", "mode", "task_data", "split", "split_cases", "budget"}
_OF_PRETRAINING = {"pretrain", "match", "pretrain_step"}
_NOT_SHARED = _OWN | _OF_COLUMN | _OF_PRETRAINING


class _Canonical:
    """:func:`canonical_json` that encodes what it has seen before only once.

    Thousands of records share a few budgets and backbones. Equal bytes of ``marshal`` (version 2, which
    has no references) mean equal values, and take a tenth of the time.
    """

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def __call__(self, value: Any) -> str:
        key = marshal.dumps(value, 2)
        if key not in self._seen:
            self._seen[key] = canonical_json(value)
        return self._seen[key]


def _parts(records: Iterable[Record]) -> list[_Part]:
    records = list(records)
    parts: dict[tuple[str, ...], _Part] = {}
    canonical = _Canonical()
    swept = _swept(records, canonical)
    for record in records:
        identity = record["identity"]
        pretraining = _pretraining(identity)
        if pretraining and canonical(_without_rate(pretraining)) not in swept:
            pretraining = _without_rate(pretraining)
        pretrain = canonical(pretraining) if pretraining else ""
        shared = canonical({k: v for k, v in identity.items() if k not in _NOT_SHARED})
        conditions = _conditions(identity, canonical)
        mode, task, split = identity["mode"], identity["task"], identity["split"]
        key = (pretrain, shared, mode, task, split, *conditions.values())
        if key not in parts:
            parts[key] = _Part(pretrain, shared, (mode, task), split, conditions)
        parts[key].records.append(record)
    return sorted(parts.values(), key=lambda part: (part.created, part.column, part.split))


def _pretraining(identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the conditions of pretraining that the rows of a table share.

    Methods that were matched in voxels or time have other steps each, and share what was matched.
    Weights kept on the way share the step that they were kept at.
    """
    pretrain, match = identity.get("pretrain"), identity.get("match")
    if not pretrain:
        return None
    if "pretrain_step" in identity:
        pretrain = {**pretrain, "kept_at_step": identity["pretrain_step"]}
    if match:
        budget = {k: v for k, v in pretrain["budget"].items() if k != "steps"}
        pretrain = {**pretrain, "budget": budget, "match": match}
    return pretrain


def _without_rate(pretraining: Mapping[str, Any]) -> dict[str, Any]:
    budget = {k: v for k, v in pretraining.get("budget", {}).items() if k != "lr"}
    return {**pretraining, "budget": budget}


def _swept(records: Iterable[Record], canonical: _Canonical) -> set[str]:
    """Return the conditions of pretraining under which one row has several learning rates.

    There the rate is what is compared, and each has its own table. Elsewhere it is an option of the row, as in a
    preset with ``method_lr``, and the caption names it.
    """
    rates: dict[tuple[str, ...], set[Any]] = defaultdict(set)
    for record in records:
        identity = record["identity"]
        if pretraining := _pretraining(identity):
            row = (identity["method"], canonical(identity["method_config"]), canonical(identity["backbone"]))
            rates[canonical(_without_rate(pretraining)), *row].add(pretraining.get("budget", {}).get("lr"))
    return {conditions for (conditions, *_), values in rates.items() if len(values) > 1}


def _conditions(identity: Mapping[str, Any], canonical: Callable[[Any], str]) -> dict[str, str]:
    """Return what must be equal wherever two records of one table meet.

    The keys say where that is: all records of a task share its data and its kind of split, all of
    a mode share its budget, all of a fold share its cases.
    """
    task, mode, split = identity["task"], identity["mode"], identity["split"]
    return {
        f"data of {task}": str(identity.get("task_data")),
        f"splits of {task}": "folds" if _FOLD.match(split) else split,
        f"cases of {task} {split}": str(identity.get("split_cases")),
        f"budget of {mode}": canonical(identity.get("budget")),
    }


@dataclass
class _Draft:
    """A table in the making: the conditions taken so far, and its records by column."""

    pretrain: str
    shared: str
    conditions: dict[str, str] = field(default_factory=dict)
    columns: dict[tuple[str, str], list[Record]] = field(default_factory=dict)

    def takes(self, part: _Part) -> bool:
        return all(self.conditions.get(k, v) == v for k, v in part.conditions.items())

    def add(self, part: _Part) -> None:
        self.conditions |= part.conditions
        self.columns.setdefault(part.column, []).extend(part.records)

    @property
    def records(self) -> list[Record]:
        return [record for records in self.columns.values() for record in records]

    def rates(self) -> dict[Any, list[str]]:
        """Return the methods' titles by learning rate of pretraining, that of the most methods first."""
        titles: dict[Any, dict[str, None]] = defaultdict(dict)
        for record in self.records:
            if pretraining := record["identity"].get("pretrain"):
                titles[pretraining.get("budget", {}).get("lr")][record["method"]["title"]] = None
        return {rate: sorted(titles[rate]) for rate in sorted(titles, key=lambda rate: -len(titles[rate]))}

    @property
    def facets(self) -> dict[str, Any]:
        """The conditions as nested data, for captions."""
        budgets: dict[str, Any] = {}
        data: dict[str, dict[str, Any]] = defaultdict(lambda: {"cases": {}})
        for record in self.records:
            identity = record["identity"]
            budgets[identity["mode"]] = identity.get("budget")
            data[identity["task"]]["fingerprint"] = identity.get("task_data")
            data[identity["task"]]["cases"][identity["split"]] = identity.get("split_cases")
        identity = self.records[0]["identity"]
        pretrain = next((p for r in self.records if (p := _pretraining(r["identity"]))), None)
        if pretrain and len(rates := self.rates()) > 1:
            own = {title: rate for rate, titles in rates.items() for title in titles}
            pretrain = {**pretrain, "budget": {**pretrain["budget"], "lr": own}}
        shared = {k: v for k, v in identity.items() if k not in _NOT_SHARED}
        presets = sorted({str(record.get("preset", "?")) for record in self.records})
        return {"preset": ", ".join(presets), "pretrain": pretrain, **shared, **budgets, "data": data}


def _assemble(parts: Sequence[_Part]) -> list[_Draft]:
    """Put every part into the first table (oldest first) with whose conditions it agrees.

    Records without pretraining fit every pretraining budget, so they are repeated in each table
    with a column that they belong to. The preset's name is no condition: the identity holds
    everything that decides a number, and a copy of a preset under another name changes none.
    """
    drafts: list[_Draft] = []
    for part in (p for p in parts if p.pretrain):
        same = (d for d in drafts if (d.pretrain, d.shared) == (part.pretrain, part.shared))
        draft = next((d for d in same if d.takes(part)), None)
        if draft is None:
            draft = _Draft(part.pretrain, part.shared)
            drafts.append(draft)
        draft.add(part)
    compared_in = {id(draft): set(draft.columns) for draft in drafts}
    alone: list[_Draft] = []
    for part in (p for p in parts if not p.pretrain):
        fitting = [d for d in drafts + alone if d.shared == part.shared and d.takes(part)]
        homes = [d for d in fitting if part.column in compared_in.get(id(d), ())] or fitting[:1]
        if not homes:
            homes = [_Draft("", part.shared)]
            alone += homes
        for draft in homes:
            draft.add(part)
    return drafts + alone


# --- One table -----------------------------------------------------------------------------------


def _table(
    draft: _Draft,
    flat: dict[str, Any],
    differs: str,
    order: Mapping[str, int],
    published: Mapping[tuple[str, str, str], float],
) -> Table:
    rows: dict[tuple[str, str], dict[tuple[str, str], Cell]] = defaultdict(dict)
    failed: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    heads: dict[tuple[str, str], Record] = {}
    marks = _Marks()
    columns = []
    canonical = _Canonical()
    apart = _weights_apart(draft, canonical)
    for key in sorted(draft.columns, key=_column_order):
        by_row: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in draft.columns[key]:
            identity = record["identity"]
            row = (identity["method"], canonical(identity["method_config"]))
            if row in apart:
                row = (row[0], row[1] + str(identity.get("weights", "")))
            by_row[row].append(record)
            heads.setdefault(row, record)
        metrics = {record["metric"] for record in draft.columns[key]}
        if len(metrics) > 1:
            raise DataError(
                f"Records of {' '.join(key)} disagree about the metric: {', '.join(sorted(metrics))}."
            )
        folds = {record["identity"]["split"] for record in draft.columns[key]}
        cells = {row: cell for row, found in by_row.items() if (cell := _cell(found, folds, marks))}
        for row in by_row.keys() - cells.keys():
            failed[row].add(key)
        metric = metrics.pop()
        for row in by_row:
            rows[row]  # one whose cells have all failed is a row, too
        column = _column(key, metric, cells.values(), flat["preset"])
        for row, cell in _compared(cells, column).items():
            rows[row][key] = cell
        columns.append(column)

    configs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (method, _), head in heads.items():
        configs[method].append(head["identity"]["method_config"])
    finished = []
    for (method, config_text), cells in sorted(rows.items(), key=lambda item: _row_order(item[0], order)):
        head = heads[method, config_text]
        config = head["identity"]["method_config"]
        if flat.get("label_fraction", 1.0) == 1.0:
            cells = {
                key: replace(cell, paper=published.get((method, key[1], key[0])))
                for key, cell in cells.items()
            }
        title = head["method"]["title"] + _distinction(config, configs[method])
        if (method, canonical(config)) in apart and "weights" in head["identity"]:
            title += f" (weights {head['identity']['weights'][:8]})"
        signs = "".join(
            marks.sign(text) for text in _of_pretext(r for c in cells.values() for r in c.records)
        )
        trains, lost = str(head["method"].get("trains", "")), frozenset(failed[method, config_text])
        finished.append(Row(method, config, title, trains, cells, marks=signs, failed=lost))
    costs = {
        row.title: cost
        for row in finished
        if row.trains != "none" and (cost := cost_of(r for cell in row.cells.values() for r in cell.records))
    }
    caption = " ".join(filter(None, (_caption(flat, draft), mixed_budgets(costs))))
    return Table(caption, differs, tuple(columns), tuple(finished), marks.footnotes(), flat)


def _column(key: tuple[str, str], metric: str, cells: Iterable[Cell], preset: str) -> Column:
    cells = list(cells)
    mode, task = key
    supports = Counter(cell.support for cell in cells).most_common(1)
    support = supports[0][0] if supports else (0, 0)  # all have failed
    phantoms = on_phantoms(record for cell in cells for record in cell.records)
    known = phantoms and as_the_preset_is(record for cell in cells for record in cell.records)
    least = floor(preset, task, mode, support[0]) if known else None
    digits = scores.digits(metric, [cell.mean for cell in cells])
    return Column(mode, task, metric, support, digits, phantoms, least)


def _of_pretext(records: Iterable[Record]) -> list[str]:
    """Return the footnote on the pretext task that a row's pretraining has not learned, if so."""
    share = pretext_learned(records)
    return [] if share in (None, 1.0) else [_PARTLY_LEARNED if share else _NOT_LEARNED]


def pretext_learned(records: Iterable[Record]) -> float | None:
    """Return the share of the pretrainings behind ``records`` that learned their pretext task; None where no one knows."""
    learned: dict[Any, bool] = {}
    for record in records:
        said = (record.get("pretext") or {}).get("learned")
        if said is not None:
            learned[record["identity"].get("pretrain_seed")] = bool(said)
    return fmean(learned.values()) if learned else None


def _weights_apart(draft: _Draft, canonical: _Canonical) -> set[tuple[str, str]]:
    """Return the (method, configuration) of which several runs were given for one cell: each is a row of its own."""
    found: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for record in draft.records:
        i = record["identity"]
        row = (i["method"], canonical(i["method_config"]))
        cell = (i["mode"], i["task"], i["split"], i["seed"], i.get("pretrain_seed"))
        found[(*row, *cell)].add(str(i.get("weights", "")))
    return {(key[0], key[1]) for key, weights in found.items() if len(weights) > 1}


def _column_order(key: tuple[str, str]) -> tuple[int, str, int, str]:
    mode, task = key
    return (
        list(MODES).index(mode) if mode in MODES else len(MODES), mode,
        TASKS.index(task) if task in TASKS else len(TASKS), task,
    )  # fmt: skip


def _row_order(row: tuple[str, str], order: Mapping[str, int]) -> tuple[int, str, str]:
    method, config = row
    return order.get(method, len(order)), method, config


class _Marks:
    """Hands out footnote signs in the order of their first use, the dagger to random decoders."""

    def __init__(self) -> None:
        self.texts = [_NOTES["decoder random"]]
        self.used: set[str] = set()

    def sign(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        self.used.add(text)
        place = self.texts.index(text)
        return _MARKS[place] if place < len(_MARKS) else f"({place + 1})"

    def footnotes(self) -> tuple[tuple[str, str], ...]:
        return tuple((self.sign(text), text) for text in self.texts if text in self.used)


def _cell(found: list[Record], folds: set[str], marks: _Marks) -> Cell | None:
    """Return the cell of all its seeds and folds; None where none of them could be computed."""
    records = [record for record in found if "error" not in record]
    if not records:
        return None
    by_seed: dict[Seed, dict[str, Record]] = defaultdict(dict)
    for record in records:
        identity = record["identity"]
        seed = (identity["seed"], identity.get("pretrain_seed"))
        other = by_seed[seed].setdefault(identity["split"], record)
        if other is not record and other["score"] != record["score"]:
            raise DataError(
                f"Two results for one cell: {identity['method']} {identity['task']} {identity['mode']} "
                f"seed {identity['seed']} {identity['split']} scored {other['score']} and {record['score']}. "
                "Keep one of the two records."
            )
    # A seed that lacks folds stands on other cases than the rest, so it must not enter their mean.
    most = max(len(splits) for splits in by_seed.values())
    whole = {seed: splits for seed, splits in sorted(by_seed.items(), key=_seed_order) if len(splits) == most}
    missing = tuple(sorted(fold for fold in folds if any(fold not in splits for splits in whole.values())))
    pooled = {seed: _pool(list(splits.values())) for seed, splits in whole.items()}
    notes = sorted({note for record in records for note in record["method"].get("notes", [])})
    texts = [_NOTES.get(note, note) for note in notes]
    if failures := len(found) - len(records):
        texts.append(f"without {failures} of {len(found)} runs, which failed")
    if missing:
        texts.append(_INCOMPLETE)
    elif len(whole) < len(by_seed):
        texts.append(_UNFINISHED_SEEDS)
    pretrain_seeds = {pretrain_seed for _, pretrain_seed in pooled}
    if len(pooled) > 1 and len(pretrain_seeds) == 1 and None not in pretrain_seeds:
        texts.append(_ONE_CHECKPOINT)
    constant = any(record.get("constant_output") for splits in whole.values() for record in splits.values())
    if constant:
        texts.append(_CONSTANT if scores.of_classes(records[0]["metric"]) else _CONSTANT_ERROR)
    used = tuple(record for splits in whole.values() for record in splits.values())
    excluded: Counter[str] = Counter()
    for record in used:
        excluded.update(record.get("excluded") or {})
    return Cell(
        seeds={seed: score for seed, (score, _) in pooled.items()},
        n_cases=max(count for _, count in pooled.values()),
        marks="".join(marks.sign(text) for text in texts),
        missing_folds=missing,
        constant=constant,
        excluded=dict(excluded),
        records=used,
    )


def _seed_order(item: tuple[Seed, Any]) -> tuple[int, int]:
    (seed, pretrain_seed), _ = item
    return seed, -1 if pretrain_seed is None else pretrain_seed


def _pool(folds: list[Record]) -> tuple[float, int]:
    """Return (score, scored cases) of one seed.

    A metric that exists for every case (DSC) is pooled over the cases of all folds; one that only
    exists for a set of cases (AUC) is averaged over folds, because the scores of differently
    trained classifiers are not on one scale.
    """
    metric = folds[0]["metric"]
    if len(folds) == 1 and folds[0].get("scored"):
        return float(folds[0]["score"]), folds[0]["scored"]
    per_case = [case for record in folds for case in record["per_case"]]
    values = [case[metric] for case in per_case if case.get(metric) is not None]
    if len(folds) == 1:
        return float(folds[0]["score"]), len(values) or len(per_case)
    if values:
        return scores.scale(metric) * fmean(values), len(values)
    return fmean(record["score"] for record in folds), len(per_case)


def _compared(cells: Mapping[tuple[str, str], Cell], column: Column) -> dict[tuple[str, str], Cell]:
    """Fill in differences to scratch, best and second best of one column."""
    scored = {row: c for row, c in cells.items() if not (c.constant and scores.of_classes(column.metric))}
    baseline = next((cell.mean for (method, _), cell in scored.items() if method == BASELINE), None)
    shown = sorted(
        {round(c.mean, column.digits) for c in cells.values() if c.ranked},
        reverse=scores.sign(column.metric) > 0,
    )
    # What lies within the floor of the next one is not told apart from it.
    clear = [abs(a - b) >= (column.floor or 0.0) for a, b in pairwise(shown)]
    compared = {}
    for row, cell in cells.items():
        value = round(cell.mean, column.digits)
        first, second = (cell.ranked and value in shown[k : k + 1] for k in (0, 1))
        compared[row] = replace(
            cell,
            delta=None
            if baseline is None or row[0] == BASELINE or row not in scored
            else cell.mean - baseline,
            # A lone row is not the best of anything, and of two the second is the last.
            best=first and len(cells) > 1 and all(clear[:1]),
            second=second and len(cells) > 2 and all(clear[:2]),
        )
    return compared


def _distinction(config: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> str:
    """Return ``" (key=value)"`` naming what sets this configuration of a method apart."""
    if len(configs) < 2:
        return ""
    keys = sorted({key for c in configs for key in c if any(o.get(key) != c[key] for o in configs)})
    if not keys:
        return ""
    return f" ({', '.join(f'{key}={_short(config.get(key))}' for key in keys)})"


# --- Captions ------------------------------------------------------------------------------------


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat


def _short(value: Any) -> str:
    return value[:10] if isinstance(value, str) and len(value) > 24 else str(value)


_SHOWN_DIFFERENCES = 6


def _differences(flat: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Return what sets one table's conditions apart from the other tables'."""
    # Where one side has no such condition (a table without fine-tuning has no budget for it),
    # there is nothing to compare.
    keys = [k for k, value in flat.items() if any(k in other and other[k] != value for other in others)]
    if "preset" in keys and all(other["preset"] != flat["preset"] for other in others):
        return f"preset {flat['preset']}"
    text = ", ".join(f"{key} = {_short(flat[key])}" for key in keys[:_SHOWN_DIFFERENCES])
    more = len(keys) - _SHOWN_DIFFERENCES
    return text + (f" and {more} more" if more > 0 else "")


def _caption(flat: Mapping[str, Any], draft: _Draft) -> str:
    parts = [f"Preset {flat['preset']}"]
    if flat.get("pretrain.data"):
        steps = flat.get("pretrain.budget.steps")
        budget = f" {steps} steps" if steps is not None else ""
        if "pretrain.match.by" in flat:
            reference = f"{flat['pretrain.match.steps']} supervised steps"
            budget = f" matched in {flat['pretrain.match.by']} to {reference}"
        if "pretrain.kept_at_step" in flat:
            budget = f" {flat['pretrain.kept_at_step']} of{budget}"
        parts.append(f"pretraining{budget} on data {flat['pretrain.data'][:8]}")
        if len(rates := draft.rates()) > 1:
            (most, _), *others = rates.items()
            own = ", ".join(f"{rate} for {', '.join(titles)}" for rate, titles in others)
            parts.append(f"learning rate of pretraining {most}, but {own}")
    parts += [
        f"{title.lower()} {flat[f'{mode}.steps']} steps"
        for mode, title in MODES.items()
        if f"{mode}.steps" in flat
    ]
    fraction = flat.get("label_fraction", 1.0)
    if fraction != 1.0:
        parts.append(f"{100 * fraction:g} % of the labels")
    seeds = sorted({record["identity"]["seed"] for record in draft.records})
    parts.append(f"seed{'s' * (len(seeds) > 1)} {_ranges(seeds)}")
    return "; ".join(parts) + "."


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted integers as ranges.

    >>> _ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


# --- Published figures ---------------------------------------------------------------------------

PAPER = "He et al., CVPR 2023, table 1"


def _published(against: str | None) -> dict[tuple[str, str, str], float]:
    """Return the published figures in percent by (method, task, mode)."""
    if against is None:
        return {}
    if against != "paper":
        raise ConfigError(f'Unknown figures to compare against: "{against}".{nearest(against, ["paper"])}')
    figures = {}
    with Path(__file__).with_name("paper_table1.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            for name, value in line.items():
                if name != "method" and value:
                    task, mode, _ = name.split("_")
                    figures[line["method"], task, mode] = float(value)
    return figures
