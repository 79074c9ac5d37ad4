"""Uncertainty, significance and rank stability of a table, from the per-case metrics behind it.

Two things vary: the seed (initialisation, order, crops) and the case. They are crossed: every seed
meets every case. So intervals resample both, and tests first average the seeds within a case;
treating (case, seed) pairs as independent would inflate the error rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ssl3d.errors import ConfigError, nearest
from ssl3d.results.cost import with_costs
from ssl3d.results.labels import label_curves, label_remarks
from ssl3d.results.scores import scale, sign
from ssl3d.results.table import BASELINE, Cell, Column, Row, Table, TableModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ALPHA = 0.05
RESAMPLES = 2000
CHOICES = ("ci", "p", "rank", "tau", "cost", "labels")


@dataclass(frozen=True)
class Interval:
    """A confidence interval in the unit of the score.

    Attributes:
        low, high: bounds.
        level: nominal coverage, such as 0.95.
        over: what was resampled: ``seeds and cases``, or ``cases`` when there is one seed only.
    """

    low: float
    high: float
    level: float
    over: str


@dataclass(frozen=True)
class Comparison:
    """One method against a reference on one column.

    Attributes:
        reference: title of the method that it is compared with.
        p: two-sided p value.
        p_holm: the same, adjusted for all comparisons of the table (Holm).
        effect: matched-pairs rank-biserial correlation in [-1, 1], positive where the method is
            better; None for AUC, whose difference is an effect size already.
        n: cases in the test (for Wilcoxon: those that differ).
        p_least: the least p that n cases allow; 0 for a test without such a limit.
        powerless: no outcome could have been significant with so few cases.
    """

    reference: str
    p: float
    effect: float | None
    n: int
    p_least: float = 0.0
    p_holm: float = math.nan
    powerless: bool = False

    @property
    def significant(self) -> bool:
        """Whether the adjusted p value is at most 0.05."""
        return self.p_holm <= ALPHA and not self.powerless


@dataclass(frozen=True)
class Rank:
    """A rank (1 is best) and how it holds when seeds and cases are resampled.

    Attributes:
        rank: by the means.
        low, high: 2.5th and 97.5th percentile over the resamples.
        first: share of the resamples in which the method is first (ties share).
    """

    rank: int
    low: int
    high: int
    first: float


# --- From records to arrays -----------------------------------------------------------------------


CaseKey = tuple[str, str]
"""(split, case id)"""


@dataclass(frozen=True)
class Sample:
    """Numbers behind one cell: ``values`` (S, N) over seeds and cases.

    For DSC and other metrics of single cases the values are that metric in the unit of the score; for AUC they
    are predicted probabilities, with ``targets`` (N,) and the fold of each case.
    """

    cases: tuple[CaseKey, ...]
    values: Floats
    targets: NDArray[np.bool_] | None = None

    def on(self, cases: Sequence[CaseKey]) -> Sample:
        """Return the sample restricted to ``cases``, in their order."""
        place = {case: i for i, case in enumerate(self.cases)}
        index = [place[case] for case in cases]
        return Sample(
            tuple(cases), self.values[:, index], None if self.targets is None else self.targets[index]
        )

    def folds(self) -> list[list[int]]:
        """Return the places of the cases of each fold."""
        folds: dict[str, list[int]] = {}
        for place, (split, _) in enumerate(self.cases):
            folds.setdefault(split, []).append(place)
        return list(folds.values())


def sample(cell: Cell, metric: str) -> Sample:
    """Collect the numbers behind ``cell``; cases that some seed could not score are left out."""
    import numpy as np

    field = "probability" if metric == "auc" else metric
    factor = 1.0 if metric == "auc" else scale(metric)
    by_seed: dict[Any, dict[CaseKey, float]] = {seed: {} for seed in cell.seeds}
    targets: dict[CaseKey, bool] = {}
    for record in cell.records:
        identity = record["identity"]
        values = by_seed[identity["seed"], identity.get("pretrain_seed")]
        for case in record["per_case"]:
            if case.get(field) is not None:
                key = (identity["split"], str(case["case"]))
                values[key] = factor * case[field]
                targets[key] = bool(case.get("target"))
    cases = tuple(
        key for key in next(iter(by_seed.values())) if all(key in values for values in by_seed.values())
    )
    matrix = np.array([[values[key] for key in cases] for values in by_seed.values()], dtype=float)  # (S, N)
    return Sample(cases, matrix, np.array([targets[key] for key in cases]) if metric == "auc" else None)


# --- Bootstrap ------------------------------------------------------------------------------------


def bootstrap_scores(
    sample: Sample, rng: np.random.Generator, case_counts: Floats | None = None, resamples: int = RESAMPLES
) -> Floats:
    """Return the score of each resample (B,) in the unit of the score, seeds and cases resampled independently.

    This is the pigeonhole bootstrap for crossed factors (Owen, Annals of Applied Statistics 2007).
    AUC resamples cases within class and fold, because each of those must stay populated.

    Args:
        sample: of one cell.
        rng: source of the draws.
        case_counts: how often each resample takes each case (B, N); drawn when None. Given to let
            several methods meet the same resampled cases.
        resamples: B, when ``case_counts`` is None.
    """
    import numpy as np

    if case_counts is None:
        case_counts = draw_cases(sample, rng, resamples)
    seeds = len(sample.values)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(case_counts)) / seeds  # (B, S)
    if sample.targets is None:
        means = case_counts @ sample.values.T / case_counts.sum(axis=1, keepdims=True)  # (B, S)
        return (weights * means).sum(axis=1)
    scores = np.zeros(len(case_counts))
    folds = sample.folds()
    for places in folds:
        for s in range(seeds):
            positive, negative, kernel = _kernel(sample.targets[places], sample.values[s, places])
            counts = case_counts[:, places]
            pairs = ((counts[:, positive] @ kernel) * counts[:, negative]).sum(axis=1)  # (B,)
            pairs /= counts[:, positive].sum(axis=1) * counts[:, negative].sum(axis=1)
            scores += 100 * weights[:, s] * pairs / len(folds)
    return scores


def draw_cases(sample: Sample, rng: np.random.Generator, resamples: int = RESAMPLES) -> Floats:
    """Return how often each resample takes each case (B, N)."""
    import numpy as np

    n = len(sample.cases)
    if sample.targets is None:
        strata = [np.arange(n)]
    else:
        strata = [
            np.array([i for i in places if sample.targets[i] == target])
            for places in sample.folds()
            for target in (False, True)
        ]
    counts = np.zeros((resamples, n))
    for stratum in strata:
        counts[:, stratum] = rng.multinomial(
            len(stratum), np.full(len(stratum), 1 / len(stratum)), size=resamples
        )
    return counts


def _kernel(targets: NDArray[np.bool_], scores: Floats) -> tuple[Any, Any, Floats]:
    """Return places of positives and negatives, and for each pair 1, 1/2 or 0 (P, Q): AUC is its mean."""
    import numpy as np

    positive, negative = np.flatnonzero(targets), np.flatnonzero(~targets)
    difference = scores[positive][:, None] - scores[negative][None]  # (P, Q)
    return positive, negative, (difference > 0) + 0.5 * (difference == 0)


def interval(
    cell: Cell, metric: str, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the percentile interval of a cell's score over resampled seeds and cases.

    Percentile, not BCa: the acceleration of BCa is a jackknife over one set of independent units,
    and here there are two crossed sets. In simulations at 95 % it covers the truth in 90 to 94 % where
    cases differ more than seeds, but only in 75 % with three seeds that differ more than the cases:
    so few cannot tell their spread. With one seed it covers the cases only, and ``over`` says so.

    Args:
        cell: of a table.
        metric: the column's.
        level: nominal coverage.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    import numpy as np

    scores = bootstrap_scores(sample(cell, metric), np.random.default_rng(seed), resamples=resamples)
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, "seeds and cases" if cell.n_seeds > 1 else "cases")


# --- Tests ----------------------------------------------------------------------------------------


def delong_components(targets: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
    """Return DeLong's structural components: of the positives (P,) and of the negatives (Q,).

    Computed from midranks in O(n log n) (Sun and Xu, IEEE Signal Processing Letters 2014). The
    mean of either is the AUC; higher scores are to mean positive.
    """
    from scipy.stats import rankdata

    positive, negative = scores[targets], scores[~targets]
    ranks = rankdata(scores)
    of_positives = (ranks[targets] - rankdata(positive)) / len(negative)
    of_negatives = 1 - (ranks[~targets] - rankdata(negative)) / len(positive)
    return of_positives, of_negatives


def delong_interval(cell: Cell, level: float = 0.95) -> Interval:
    """Return DeLong's interval of the mean AUC over seeds, over cases, clipped to [0, 100].

    The mean AUC over seeds is the AUC of the mean pair kernel, so averaging the components over
    seeds gives its exact variance over cases. Folds are independent: their variances add.
    """
    from scipy.stats import norm

    one = sample(cell, "auc")
    auc, variance = _delong(one, [one.values])
    half = float(norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    return Interval(100 * max(0.0, auc - half), 100 * min(1.0, auc + half), level, "cases")


def _delong(one: Sample, values: Sequence[Floats]) -> tuple[float, float]:
    """Return (AUC, variance) of ``values[0]``, or of its difference to ``values[1]`` if given."""
    import numpy as np

    assert one.targets is not None
    folds = one.folds()
    estimate = variance = 0.0
    for places in folds:
        sides = [
            [
                np.mean(side, axis=0)
                for side in zip(
                    *(delong_components(one.targets[places], row[places]) for row in v), strict=True
                )
            ]
            for v in values
        ]  # [method][positives, negatives]
        of_positives, of_negatives = (
            sides[0] if len(sides) == 1 else [a - b for a, b in zip(*sides, strict=True)]
        )
        estimate += float(of_positives.mean()) / len(folds)
        variance += (
            float(of_positives.var(ddof=1) / len(of_positives) + of_negatives.var(ddof=1) / len(of_negatives))
            / len(folds) ** 2
        )
    return estimate, variance


def compare(cell: Cell, reference: Cell, metric: str, title: str = BASELINE) -> Comparison:
    """Test a method against a reference on the cases that both have.

    Seeds are averaged within a case first. Then: a paired Wilcoxon signed-rank test over cases,
    and for AUC DeLong's test for correlated curves.

    Args:
        cell, reference: of one column.
        metric: the column's.
        title: of the reference.
    """
    import numpy as np
    from scipy.stats import norm, rankdata, wilcoxon

    ours, theirs = sample(cell, metric), sample(reference, metric)
    known = set(theirs.cases)
    common = [case for case in ours.cases if case in known]
    ours, theirs = ours.on(common), theirs.on(common)
    if metric == "auc":
        difference, variance = _delong(ours, [ours.values, theirs.values])
        if variance == 0:
            return Comparison(title, 1.0 if difference == 0 else 0.0, None, len(common))
        return Comparison(title, float(2 * norm.sf(abs(difference) / math.sqrt(variance))), None, len(common))
    differences = ours.values.mean(axis=0) - theirs.values.mean(axis=0)  # (N,)
    # Averages of equal values can differ in the last bit, which is no difference to be ranked.
    size = max(np.abs(ours.values).max(), np.abs(theirs.values).max()) if common else 0.0
    differences = differences[np.abs(differences) > 1e-11 * size]
    n = len(differences)
    if n == 0:
        return Comparison(title, 1.0, 0.0, 0, p_least=1.0)
    ranks = rankdata(np.abs(differences))
    effect = float((ranks * np.sign(differences)).sum() / ranks.sum())
    return Comparison(title, float(wilcoxon(differences).pvalue), effect, n, p_least=2.0 ** (1 - n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values (Scandinavian Journal of Statistics 1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    m, largest = len(p_values), 0.0
    adjusted = [1.0] * m
    for place, index in enumerate(sorted(range(m), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (m - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


WITHOUT_STATISTICS = frozenset({"macro_auc"})
"""Metrics that are neither a mean over cases nor the AUC of two classes."""

Key = tuple[int, tuple[str, str]]
"""(number of the row, (mode, task))"""


def comparisons(table: Table, against: str = BASELINE) -> dict[Key, Comparison]:
    """Test every method against ``scratch``, or against the ``best`` of each column; Holm over all.

    Raises:
        ConfigError: ``against`` is neither.
    """
    if against not in (BASELINE, "best"):
        raise ConfigError(f'Unknown reference "{against}".{nearest(against, [BASELINE, "best"])}')
    found: dict[Key, Comparison] = {}
    for column in table.columns:
        if column.metric in WITHOUT_STATISTICS:
            continue
        rows = [
            (i, row.title, row.cells[column.key], row)
            for i, row in enumerate(table.rows)
            if column.key in row.cells
        ]
        if against == "best":
            best = max if sign(column.metric) > 0 else min
            reference = best(rows, key=lambda r: r[2].mean)
        else:
            scratch = [r for r in rows if r[3].method == BASELINE]
            if not scratch:
                continue
            reference = scratch[0]
        for i, _, cell, _ in rows:
            if i != reference[0]:
                found[i, column.key] = compare(cell, reference[2], column.metric, reference[1])
    adjusted = holm([c.p for c in found.values()])
    # Holm begins by asking whether any p is at most alpha / m; when none can be, nothing can.
    hopeless = all(c.p_least > ALPHA / len(found) for c in found.values())
    return {
        key: replace(c, p_holm=p, powerless=hopeless or c.p_least > ALPHA)
        for (key, c), p in zip(found.items(), adjusted, strict=True)
    }


# --- Ranks ----------------------------------------------------------------------------------------


def ranks(table: Table, column: Column, resamples: int = RESAMPLES, seed: int = 0) -> dict[int, Rank]:
    """Return the rank of each row (by number) in ``column`` and its stability.

    Every resample takes the same cases for all methods, and seeds for each method by itself
    (Wiesenfarth et al., Scientific Reports 2021, who resample cases).
    """
    import numpy as np
    from scipy.stats import rankdata

    rng = np.random.default_rng(seed)
    samples = {
        i: sample(row.cells[column.key], column.metric)
        for i, row in enumerate(table.rows)
        if column.key in row.cells and not row.cells[column.key].missing_folds
    }
    if not samples:
        return {}
    first = next(iter(samples.values()))
    common = [case for case in first.cases if all(case in set(s.cases) for s in samples.values())]
    samples = {i: s.on(common) for i, s in samples.items()}
    counts = draw_cases(next(iter(samples.values())), rng, resamples)
    scores = np.stack([bootstrap_scores(s, rng, counts) for s in samples.values()])  # (M, B)
    order = -sign(column.metric)  # rank 1 goes to the smallest
    drawn = rankdata(order * scores, axis=0, method="min")  # (M, B)
    winners = drawn == 1
    share = (winners / winners.sum(axis=0)).mean(axis=1)  # (M,)
    means = rankdata([order * table.rows[i].cells[column.key].mean for i in samples], method="min")
    bounds = np.quantile(drawn, [0.025, 0.975], axis=1, method="nearest")  # (2, M)
    return {
        i: Rank(int(means[k]), int(bounds[0, k]), int(bounds[1, k]), float(share[k]))
        for k, i in enumerate(samples)
    }


def kendall_tau(table: Table, task: str) -> tuple[float, float, int] | None:
    """Return (tau-b, p, methods): do linear and fine-tune evaluation rank the methods alike?

    None with fewer than three methods in both modes, or when one mode ranks all of them equal.
    """
    from scipy.stats import kendalltau

    keys = ("linear", task), ("finetune", task)
    pairs = [
        [row.cells[key].mean for key in keys] for row in table.rows if all(key in row.cells for key in keys)
    ]
    if len(pairs) < 3:
        return None
    result = kendalltau(*zip(*pairs, strict=True))
    return (
        None if math.isnan(result.statistic) else (float(result.statistic), float(result.pvalue), len(pairs))
    )


# --- Into the table -------------------------------------------------------------------------------


def with_statistics(model: TableModel, choices: Iterable[str], against: str = BASELINE) -> TableModel:
    """Return ``model`` with statistics in its cells and remarks, which the formats then show.

    Args:
        model: from :func:`ssl3d.results.table.build_table`.
        choices: of ``ci`` (95 % intervals), ``p`` (tests), ``rank`` (stability), ``tau``
            (agreement of linear and fine-tune ranks), ``cost`` (what each row cost), ``labels`` (share of
            the labels that equals scratch with all of them).
        against: reference of the tests, ``scratch`` or ``best``.

    Raises:
        ConfigError: an unknown choice.
    """
    chosen = set(choices)
    for choice in sorted(chosen - set(CHOICES)):
        raise ConfigError(f'Unknown statistic "{choice}".{nearest(choice, CHOICES)}')
    if "cost" in chosen:
        model = with_costs(model)
    if "labels" in chosen:
        said = tuple(label_remarks(label_curves(model, intervals=False)))
        remarks = said or ("No cell has more than one label fraction, see ssl3d bench --label-fractions",)
        model = replace(model, tables=tuple(replace(t, remarks=(*t.remarks, *remarks)) for t in model.tables))
    return replace(model, tables=tuple(_annotated(table, chosen, against) for table in model.tables))


def _annotated(table: Table, chosen: set[str], against: str) -> Table:
    tests = comparisons(table, against) if "p" in chosen else {}
    metrics = {column.key: column.metric for column in table.columns}
    able = [column for column in table.columns if column.metric not in WITHOUT_STATISTICS]
    places = {c.key: ranks(table, c) for c in able} if "rank" in chosen else {}
    rows: list[Row] = []
    for i, row in enumerate(table.rows):
        cells = {
            key: replace(
                cell,
                interval=interval(cell, metrics[key])
                if "ci" in chosen and metrics[key] not in WITHOUT_STATISTICS
                else None,
                comparison=tests.get((i, key)),
                rank=places.get(key, {}).get(i),
            )
            for key, cell in row.cells.items()
        }
        rows.append(replace(row, cells=cells))
    remarks = [*_interval_remarks(rows), *_test_remarks(tests, against), *_rank_remarks(places)]
    if "tau" in chosen:
        remarks += _tau_remarks(table)
    if len(able) < len(table.columns):
        remarks.append(f"no intervals, tests or ranks for {', '.join(sorted(WITHOUT_STATISTICS))}")
    return replace(table, rows=tuple(rows), remarks=(*table.remarks, *remarks))


def _interval_remarks(rows: Sequence[Row]) -> list[str]:
    kinds = {cell.interval.over for row in rows for cell in row.cells.values() if cell.interval}
    if not kinds:
        return []
    one = "; with one seed over cases only" if "cases" in kinds and len(kinds) > 1 else ""
    over = "cases (there is one seed only)" if kinds == {"cases"} else "seeds and cases"
    return [f"[low, high]: 95 % percentile bootstrap over {over}{one}, {RESAMPLES} resamples"]


def _test_remarks(tests: Mapping[Key, Comparison], against: str) -> list[str]:
    if not tests:
        return []
    what = "scratch" if against == BASELINE else "the best of the column"
    remarks = [
        f"p: against {what}, paired Wilcoxon signed-rank test over cases on means over seeds (AUC: DeLong), "
        f"Holm-adjusted for {len(tests)} comparisons"
    ]
    powerless = [c for c in tests.values() if c.powerless]
    if powerless:
        cases = ", ".join(str(n) for n in sorted({c.n for c in powerless}))
        remarks.append(f"n.p.: no test can be significant with so few cases ({cases})")
    return remarks


def _rank_remarks(places: Mapping[Any, Mapping[int, Rank]]) -> list[str]:
    if not any(places.values()):
        return []
    return ["#rank (95 % range over resampled seeds and cases)"]


def _tau_remarks(table: Table) -> list[str]:
    remarks = []
    for task in dict.fromkeys(column.task for column in table.columns):
        agreement = kendall_tau(table, task)
        if agreement:
            tau, p, n = agreement
            remarks.append(
                f"{task.upper()}: linear and fine-tune ranks agree with Kendall's tau = {tau:.2f} "
                f"(p = {p:.3f}, {n} methods)"
            )
    return remarks
