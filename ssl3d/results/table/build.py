"""From records to the layout of the paper's table 1: methods by (linear, fine-tune) x tasks.

Only records that differ in seed or fold are ever averaged. Whatever else differs keeps records
apart: another configuration of a method is another row; another backbone, budget, label fraction
or data fingerprint is another table, whose caption says what differs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from ssl3d.errors import DataError
from ssl3d.results import scores
from ssl3d.results.floor import as_the_preset_is, floor, on_phantoms, pretrained_as_the_preset_says
from ssl3d.results.store.record import Record, no_garbage_collection
from ssl3d.results.table.caption import _caption, _differences, _distinction, flatten
from ssl3d.results.table.cost import cost_of, mixed_budgets
from ssl3d.results.table.grouping import _assemble, _Canonical, _Draft, _parts
from ssl3d.results.table.model import BASELINE, MODES, TASKS, Cell, Column, Row, Seed, Table, TableModel
from ssl3d.results.table.published import _published

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


def build_table(
    records: Iterable[Record],
    method_order: Sequence[str] = (),
    against: str | None = None,
    failures: Iterable[Record] = (),
) -> TableModel:
    """Arrange ``records`` in the layout of the paper's table 1.

    Args:
        records: sound records (see :meth:`ssl3d.results.store.store.ResultStore.records`), any order.
        method_order: methods from top to bottom; scratch is always first, unknown ones last.
        against: ``paper`` puts the published figures beside ours.
        failures: cells that could not be computed (see :meth:`ssl3d.results.store.store.ResultStore.failures`).

    Raises:
        DataError: there is no record, or two records of one cell, seed and fold contradict.
        ConfigError: unknown ``against``.
    """
    published = _published(against)
    with no_garbage_collection():
        return TableModel(_tables([*records, *failures], method_order, published), against)


def called(records: Iterable[Record], titles: Mapping[str, str]) -> list[Record]:
    """Return records with what their methods are called today, by name; methods that are not there keep their title."""
    found = []
    for record in records:
        method = record["method"]
        title = titles.get(record["identity"]["method"], method["title"])
        found.append(record if title == method["title"] else {**record, "method": {**method, "title": title}})
    return found


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
    for key in sorted(draft.columns, key=column_order):
        by_row = _by_row(draft.columns[key], canonical, apart)
        for row, found in by_row.items():
            heads.setdefault(row, found[0])
        metric = _one_metric(key, draft.columns[key])
        folds = {record["identity"]["split"] for record in draft.columns[key]}
        cells = {row: cell for row, found in by_row.items() if (cell := _cell(found, folds, marks))}
        for row in by_row.keys() - cells.keys():
            failed[row].add(key)
        for row in by_row:
            rows[row]  # one whose cells have all failed is a row, too
        column = _column(key, metric, cells.values(), flat["preset"])
        for row, cell in _compared(_with_floors(cells, column, flat["preset"]), column).items():
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


def _by_row(
    records: Iterable[Record], canonical: _Canonical, apart: Collection[tuple[str, str]]
) -> dict[tuple[str, str], list[Record]]:
    """Return the records of a column by row: (method, configuration), with the weights where these are ``apart``."""
    by_row: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        identity = record["identity"]
        row = (identity["method"], canonical(identity["method_config"]))
        if row in apart:
            row = (row[0], row[1] + str(identity.get("weights", "")))
        by_row[row].append(record)
    return by_row


def _one_metric(key: tuple[str, str], records: Iterable[Record]) -> str:
    """Return the metric of a column.

    Raises:
        DataError: its records disagree.
    """
    metrics = {record["metric"] for record in records}
    if len(metrics) > 1:
        raise DataError(
            f"Records of {' '.join(key)} disagree about the metric: {', '.join(sorted(metrics))}."
        )
    return str(metrics.pop())


def _column(key: tuple[str, str], metric: str, cells: Iterable[Cell], preset: str) -> Column:
    cells = list(cells)
    mode, task = key
    supports = Counter(cell.support for cell in cells).most_common(1)
    support = supports[0][0] if supports else (0, 0)  # all have failed
    phantoms = on_phantoms(record for cell in cells for record in cell.records)
    known = phantoms and as_the_preset_is(record for cell in cells for record in cell.records)
    least = floor(preset, task, mode, support[0]) if known and support[0] else None
    digits = scores.digits(metric, [cell.mean for cell in cells])
    return Column(mode, task, metric, support, digits, phantoms, least)


def _with_floors(
    cells: Mapping[tuple[str, str], Cell], column: Column, preset: str
) -> dict[tuple[str, str], Cell]:
    return {
        row: replace(cell, floor=_floor_of_row(column, row[0], cell, preset)) for row, cell in cells.items()
    }


def _floor_of_row(column: Column, method: str, cell: Cell, preset: str) -> float | None:
    """Return the floor of a row whose pretraining is the one that was measured."""
    if not (column.phantoms and column.support[0] and all(map(pretrained_as_the_preset_says, cell.records))):
        return None
    return floor(preset, column.task, column.mode, column.support[0], method)


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


def column_order(key: tuple[str, str]) -> tuple[int, str, int, str]:
    """Return what sorts columns (mode, task) as tables do."""
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


def _gain(cell: Cell, baseline: Cell) -> float | None:
    """Return the difference of the means over the seeds that both were evaluated with, which is what is tested."""
    mine, other = (_by_evaluation(one) for one in (cell, baseline))
    common = mine.keys() & other.keys()
    return fmean(mine[seed] - other[seed] for seed in common) if common else None


def _by_evaluation(cell: Cell) -> dict[int, float]:
    """Return the score of each seed of the evaluation, averaged over trainings that share it."""
    found: dict[int, list[float]] = defaultdict(list)
    for (seed, _), score in cell.seeds.items():
        found[seed].append(score)
    return {seed: fmean(scores) for seed, scores in found.items()}


def _compared(cells: Mapping[tuple[str, str], Cell], column: Column) -> dict[tuple[str, str], Cell]:
    """Fill in differences to scratch, best and second best of one column."""
    scored = {row: c for row, c in cells.items() if not (c.constant and scores.of_classes(column.metric))}
    baseline = next((cell for (method, _), cell in scored.items() if method == BASELINE), None)
    shown = sorted(
        {round(c.mean, column.digits) for c in cells.values() if c.ranked},
        reverse=scores.sign(column.metric) > 0,
    )
    # What a lower one is within the floor of is not told apart from it.
    at = {
        value: [c for c in cells.values() if c.ranked and round(c.mean, column.digits) == value]
        for value in shown
    }
    clear = [
        all(abs(top - low) >= column.floor_of(*at[top], *at[low]) for low in shown[place + 1 :])
        for place, top in enumerate(shown[:2])
    ]
    compared = {}
    for row, cell in cells.items():
        value = round(cell.mean, column.digits)
        first, second = (cell.ranked and value in shown[k : k + 1] for k in (0, 1))
        compared[row] = replace(
            cell,
            delta=None
            if baseline is None or row[0] == BASELINE or row not in scored
            else _gain(cell, baseline),
            # A lone row is not the best of anything, and of two the second is the last.
            best=first and len(cells) > 1 and all(clear[:1]),
            second=second and len(cells) > 2 and all(clear),
        )
    return compared
