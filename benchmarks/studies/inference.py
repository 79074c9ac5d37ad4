"""Do the intervals and tests of a table keep what they promise? By simulation, with spreads like those of real records.

A simulated table has eleven rows (the first is the reference) and four columns: SHC, SAC, SBM and, as an AUC,
CCC, with the variance components of ``benchmarks/studies/results/variance-components.json``. The luck of a training (row x
seed) is equal in all rows, or not: as in the recorded rows; twice as large in every other row, in the reference, or
three times in one row, at equal mean variance. Printed, for each design of seeds x cases:

- how often an interval that promises 95 % covers the true mean,
- how often a table of equal rows has at least one significant p (wanted: 6 % at most), for several tests,
- how often a difference of 12 points in SHC is found, and one of the size that the table calls detectable (80 %),
- how often a table errs in which five rows have eight seeds and the others five, against two references, as in the study.

Usage: ``python benchmarks/studies/inference.py [--tables 1000] > benchmarks/studies/results/inference.md``; ``--uneven``
prints the last of these alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.stats import norm, t, ttest_1samp, wilcoxon

from ssl3d.results.statistics.comparisons import cases_part
from ssl3d.results.statistics.inference import Design, contrasts, holm, mean_spread, seed_spread
from ssl3d.results.statistics.samples import Influence, placement_values
from ssl3d.results.table.model import ALPHA

COMPONENTS = Path(__file__).parent / "results" / "variance-components.json"
ROWS = 11
DESIGNS = ((3, 12), (3, 50), (5, 12), (8, 12))
MORE, CASES = (5, 8, 5), 20
"""A table with rows of unequal numbers of seeds: rows that have more, how many they have, and the others; test cases."""
SPREADS = ("equal", "as recorded", "every other row 2x", "reference 2x", "one row 3x")
Rng = np.random.Generator


@dataclass(frozen=True)
class Column:
    """What a simulated column is drawn from: standard deviations by part, and the relative luck of each row."""

    task: str
    metric: str
    sd: dict[str, float]
    luck: np.ndarray
    cases: int | None = None


def columns(spread: str = "equal", source: str = "benchmarks/studies/results/study-records") -> list[Column]:
    """Return the four columns of a simulated table, with the spreads of committed records."""
    sources = json.loads(COMPONENTS.read_text())["sources"]
    (recorded,) = [s["columns"] for s in sources if s["records"] == source]
    found = []
    for column in sorted(recorded, key=lambda c: ("shc", "sac", "sbm", "ccc").index(c["task"])):
        seen = column["sd_over_seeds"]
        of_rows = [seen["scratch"], *(sd for name, sd in seen.items() if name != "scratch")]
        cases = column["cases"] if column["metric"] == "auc" else None
        found.append(
            Column(column["task"], column["metric"], column["sd"], relative_luck(spread, of_rows), cases)
        )
    return found


def relative_luck(spread: str, recorded: Sequence[float]) -> np.ndarray:
    """Return the standard deviation of the luck of each row, relative to one with the mean variance."""
    places = np.arange(ROWS)
    luck = {
        "equal": np.ones(ROWS),
        "as recorded": np.resize(np.asarray(recorded, dtype=float), ROWS),
        "every other row 2x": np.where(places % 2 == 0, 2.0, 1.0),
        "reference 2x": np.where(places == 0, 2.0, 1.0),
        "one row 3x": np.where(places == ROWS // 2, 3.0, 1.0),
    }[spread]
    return luck / math.sqrt(np.square(luck).mean())


@dataclass(frozen=True)
class Drawn:
    """One simulated column: scores (M, S), the groups of cases (M, S, n) each, and the true mean of each row."""

    scores: np.ndarray
    blocks: tuple[np.ndarray, ...]
    truth: np.ndarray
    of_weights: np.ndarray

    @cached_property
    def of_cases(self) -> float:
        return cases_part(self.blocks, 1.0)

    def row(self, m: int) -> Influence:
        return Influence(self.scores[m], tuple(block[m] for block in self.blocks))


def draw(rng: Rng, column: Column, seeds: int, cases: int, better: float = 0.0) -> Drawn:
    """Draw a column; its second row is ``better`` by so many points than the others, which are equal."""
    sd = column.sd
    n = cases if column.cases is None else max(cases, column.cases)
    luck = rng.normal(size=(ROWS, seeds)) * column.luck[:, None] * sd["row_seed"]
    shared = rng.normal(0, sd["seed"], seeds)
    values = rng.normal(0, sd["case"], n) + rng.normal(0, sd["row_case"], (ROWS, 1, n))
    values = (
        values + rng.normal(0, sd["seed_case"], (seeds, n)) + rng.normal(0, sd["residual"], (ROWS, seeds, n))
    )
    shift = np.zeros(ROWS)
    shift[1] = better
    of_weights = luck + shared + shift[:, None]  # (M, S)
    if column.metric != "auc":
        values = 50 + values + of_weights[:, :, None]
        return Drawn(values.mean(axis=2), (values,), 50 + shift, 50 + of_weights)
    targets = np.arange(n) % 2 == 0
    values = values + (sd["distance"] + of_weights)[:, :, None] * (targets - 0.5)
    positives, negatives = placement_values(targets, values)
    within = math.sqrt(sum(sd[part] ** 2 for part in ("case", "row_case", "seed_case", "residual")))
    spread = math.sqrt(2 * within**2 + sd["seed"] ** 2 + (sd["row_seed"] * column.luck[0]) ** 2)
    truth = np.full(ROWS, 100 * norm.cdf(sd["distance"] / spread))
    of_weights = 100 * norm.cdf((sd["distance"] + of_weights) / (math.sqrt(2) * within))
    return Drawn(100 * positives.mean(axis=2), (100 * positives, 100 * negatives), truth, of_weights)


# --- Tests to choose from --------------------------------------------------------------------------


def _p(difference: np.ndarray, variance: np.ndarray | float, df: np.ndarray | float) -> np.ndarray:
    return 2 * t.sf(np.abs(difference) / np.sqrt(variance), df)


def over_cases(one: Drawn) -> np.ndarray:
    """The test of before: seeds averaged within a case, then Wilcoxon over cases; for AUC DeLong."""
    apart = [(block[1:] - block[:1]).mean(axis=1) for block in one.blocks]  # (M - 1, n)
    if len(apart) == 1:
        return np.asarray(wilcoxon(apart[0], axis=1).pvalue)
    variance = sum(side.var(axis=1, ddof=1) / side.shape[1] for side in apart)
    return np.asarray(2 * norm.sf(np.abs(apart[0].mean(axis=1)) / np.sqrt(variance)))


def paired_t(one: Drawn) -> np.ndarray:
    apart = one.scores[1:] - one.scores[:1]
    seeds = apart.shape[1]
    return _p(apart.mean(axis=1), apart.var(axis=1, ddof=1) / seeds, seeds - 1)


def welch(one: Drawn) -> np.ndarray:
    own, seeds = one.scores.var(axis=1, ddof=1), one.scores.shape[1]
    a, b = own[1:], own[:1]
    means = one.scores.mean(axis=1)
    return _p(means[1:] - means[0], (a + b) / seeds, (a + b) ** 2 / ((a**2 + b**2) / (seeds - 1)))


def pooled(one: Drawn, with_cases: bool = False) -> np.ndarray:
    """Against one reference with the pooled residual of rows and seeds as blocks."""
    means, spread = one.scores.mean(axis=1), seed_spread(one.scores)
    extra = one.of_cases if with_cases else 0.0
    return _p(means[1:] - means[0], 2 * spread.mean / one.scores.shape[1] + extra, spread.total_df)


def satterthwaite(one: Drawn) -> np.ndarray:
    """Each pair by itself: variance components of the differences over seeds x cases."""
    means = one.scores.mean(axis=1)
    spreads = [mean_spread(_minus(one.row(m), one.row(0))) for m in range(1, ROWS)]
    return _p(
        means[1:] - means[0], np.array([s.variance for s in spreads]), np.array([s.df for s in spreads])
    )


def _minus(a: Influence, b: Influence) -> Influence:
    return Influence(a.scores - b.scores, tuple(x - y for x, y in zip(a.blocks, b.blocks, strict=True)))


def moderated(prior_df: float, with_cases: bool = True) -> Callable[[Drawn], np.ndarray]:
    def test(one: Drawn) -> np.ndarray:
        found = contrasts(one.scores, 0, one.of_cases if with_cases else 0.0, prior_df)
        return np.array([contrast.p for contrast in found if contrast])

    return test


def dunnett(one: Drawn) -> np.ndarray:
    """The pooled residual with Dunnett's joint distribution within the column, from 200,000 draws of it."""
    seeds = one.scores.shape[1]
    return (
        np.searchsorted(_largest(seeds), -np.abs(t.isf(pooled(one) / 2, (ROWS - 1) * (seeds - 1)))) / _DRAWS
    )


_DRAWS = 200_000
_LARGEST: dict[int, np.ndarray] = {}


def _largest(seeds: int) -> np.ndarray:
    if seeds not in _LARGEST:
        rng, df = np.random.default_rng(0), (ROWS - 1) * (seeds - 1)
        rows = rng.normal(size=(_DRAWS, ROWS))
        apart = np.abs(rows[:, 1:] - rows[:, :1]).max(axis=1) / math.sqrt(2)
        _LARGEST[seeds] = np.sort(-apart / np.sqrt(rng.chisquare(df, _DRAWS) / df))
    return _LARGEST[seeds]


SHIPPED = "moderated, prior 2, cases (ssl3d)"
TESTS: dict[str, Callable[[Drawn], np.ndarray]] = {
    "Wilcoxon or DeLong over cases (before)": over_cases,
    "paired t over seeds": paired_t,
    "Welch over seeds": welch,
    "pooled residual": pooled,
    "pooled residual, cases": lambda one: pooled(one, with_cases=True),
    "pooled residual, Dunnett": dunnett,
    "Satterthwaite, each pair": satterthwaite,
    "moderated, prior 1, cases": moderated(1.0),
    SHIPPED: moderated(2.0),
    "moderated, prior 2, without cases": moderated(2.0, with_cases=False),
    "moderated, prior 4, cases": moderated(4.0),
    "moderated, prior 8, cases": moderated(8.0),
}


def family(test: str, table: Sequence[Drawn]) -> np.ndarray:
    """Return the corrected p of each comparison of a table (columns, rows): Holm over all, or Dunnett by column."""
    p = np.stack([TESTS[test](one) for one in table])
    if "Dunnett" in test:
        return np.minimum(1, p * len(table))
    return np.array(holm(list(p.ravel()))).reshape(p.shape)


# --- Simulations -----------------------------------------------------------------------------------


def errors(
    rng: Rng, seeds: int, cases: int, spread: str, tables: int, tests: Sequence[str]
) -> dict[str, float]:
    """Return how often a table of equal rows has a significant p, in %, by test."""
    found: dict[str, int] = defaultdict(int)
    of_columns = columns(spread)
    for _ in range(tables):
        table = [draw(rng, column, seeds, cases) for column in of_columns]
        for test in tests:
            found[test] += bool((family(test, table) <= ALPHA).any())
    return {test: 100 * found[test] / tables for test in tests}


def errors_uneven(rng: Rng, spread: str, tables: int) -> dict[str, float]:
    """Return how often a table of equal rows errs whose first rows have :data:`MORE` seeds and the others fewer, in %.

    Every row is compared with the first two, as in the study with scratch and the control; Holm over all.
    """
    rows, seeds, fewer = MORE
    found: dict[str, int] = defaultdict(int)
    of_columns = columns(spread)
    for _ in range(tables):
        p: dict[str, list[float]] = defaultdict(list)
        for column in of_columns:
            one = draw(rng, column, seeds, CASES)
            scores = one.scores.copy()  # (M, S)
            scores[rows:, fewer:] = np.nan
            of_cases = cases_part([block[:, :fewer] for block in one.blocks], 1.0)
            for reference in (0, 1):
                tested = contrasts(scores, reference, of_cases)[reference + 1 :]  # those before it are done
                p[SHIPPED] += [contrast.p for contrast in tested if contrast]
                apart = scores[reference + 1 :] - scores[reference]
                p["paired t over seeds"] += list(ttest_1samp(apart, 0, axis=1, nan_policy="omit").pvalue)
        for test, values in p.items():
            found[test] += min(holm(values)) <= ALPHA
    return {test: 100 * count / tables for test, count in found.items()}


def power(
    rng: Rng, seeds: int, cases: int, spread: str, better: float, tables: int, tests: Sequence[str]
) -> dict[str, float]:
    """Return how often a row that is ``better`` in SHC is found there, in %, by test."""
    found: dict[str, int] = defaultdict(int)
    of_columns = columns(spread)
    for _ in range(tables):
        table = [draw(rng, column, seeds, cases, better * (column.task == "shc")) for column in of_columns]
        for test in tests:
            found[test] += bool(family(test, table)[0, 0] <= ALPHA)
    return {test: 100 * found[test] / tables for test in tests}


def detectable(seeds: int, cases: int) -> float:
    """Return the difference in SHC that a table of equal spreads calls detectable when it knows the true variances."""
    sd = columns()[0].sd
    of_seeds = sd["row_seed"] ** 2 + sd["residual"] ** 2 / cases
    return Design(of_seeds, 2 * sd["row_case"] ** 2 / cases, ROWS, seeds, 4 * (ROWS - 1)).detectable()


def coverage(rng: Rng, column: Column, seeds: int, cases: int, trials: int) -> tuple[float, float, float]:
    """Return how often 95 % intervals cover the truth, in %: ours, the bootstrap of before, ours of these weights."""
    hits = np.zeros(3)
    for _ in range(trials):
        one = draw(rng, replace(column, luck=np.ones(ROWS)), seeds, cases)
        for m in (0, 1, 2):
            row = one.row(m)
            mean = row.scores.mean()
            hits[0] += abs(mean - one.truth[m]) <= mean_spread(row).half_width(0.95)
            low, high = np.quantile(bootstrap(rng, row), [0.025, 0.975])
            hits[1] += low <= one.truth[m] <= high
            these = mean_spread(row.of([0]), these_weights=True)
            hits[2] += abs(row.scores[0] - one.of_weights[m, 0]) <= these.half_width(0.95)
    return tuple(100 * hits / (3 * trials))  # type: ignore[return-value]


def bootstrap(rng: Rng, row: Influence, resamples: int = 300) -> np.ndarray:
    """Return the scores of resamples of seeds and cases, crossed: the intervals of before (by placement values for AUC)."""
    seeds = len(row.scores)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # (B, S)
    scores = of_seeds @ row.scores
    for block in row.blocks:
        n = block.shape[1]
        of_cases = rng.multinomial(n, np.full(n, 1 / n), resamples) / n  # (B, n)
        scores = scores + ((of_seeds @ (block - row.scores[:, None])) * of_cases).sum(axis=1)
    return scores


# --- Report ----------------------------------------------------------------------------------------


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines)) + "\n"


def report_uneven(tables: int) -> None:
    """Print how often tables with rows of unequal numbers of seeds err, from draws of its own."""
    rows, seeds, fewer = MORE
    rng = np.random.default_rng(1)
    print(
        f"## {rows} of eleven equal rows with {seeds} seeds, the others with {fewer}, {CASES} cases: tables with a "
        "significant p, in %\n\nAgainst the first row and against the second, Holm over all 76 comparisons.\n"
    )
    of = {spread: errors_uneven(rng, spread, tables) for spread in SPREADS}
    lines = [
        [test, *(f"{of[spread].get(test, 0.0):.1f}" for spread in SPREADS)]
        for test in next(iter(of.values()))
    ]
    print(markdown(["luck of the rows", *SPREADS], lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=int, default=1000, help="simulated tables of each design and spread")
    parser.add_argument("--uneven", action="store_true", help="rows of unequal numbers of seeds alone")
    arguments = parser.parse_args()
    tables = arguments.tables
    if arguments.uneven:
        report_uneven(tables)
        return
    rng = np.random.default_rng(0)
    names = [f"{s}x{c}" for s, c in DESIGNS]
    print(f"Made by `python benchmarks/studies/inference.py --tables {tables}`; standard error of a figure: at most "
          f"{50 / math.sqrt(tables):.1f} points, {100 * math.sqrt(0.05 * 0.95 / tables):.1f} at 5 %.\n")  # fmt: skip
    print("## Coverage of 95 % intervals, in % (the bootstrap of before)\n")
    lines = []
    for column in columns():
        found = [coverage(rng, column, s, c, tables) for s, c in DESIGNS]
        shown = [f"{ours:.1f} ({before:.1f})" for ours, before, _ in found]
        lines.append([column.task.upper(), *shown, *(f"{found[k][2]:.1f}" for k in (0, 1))])
    print(
        markdown(["seeds x cases", *names, "1x12, these weights", "1x50, these weights"], lines), flush=True
    )
    print(
        "CCC has 40 cases at least.\n\n## Tables of eleven equal rows with a significant p after correction, in %\n"
    )
    for spread in SPREADS:
        of = [errors(rng, s, c, spread, tables, list(TESTS)) for s, c in DESIGNS]
        print(f"Luck of the rows: {spread}\n")
        print(
            markdown(["seeds x cases", *names], [[t, *(f"{one[t]:.1f}" for one in of)] for t in TESTS]),
            flush=True,
        )
    print("## A difference of 12 points in SHC is found, in %\n")
    for spread in SPREADS[:2]:
        of = [power(rng, s, c, spread, 12.0, tables // 2, list(TESTS)) for s, c in DESIGNS]
        print(f"Luck of the rows: {spread}\n")
        print(
            markdown(["seeds x cases", *names], [[t, *(f"{one[t]:.1f}" for one in of)] for t in TESTS]),
            flush=True,
        )
    print(
        "## The smallest difference in SHC that a table says it could have shown, and how often it is found\n"
    )
    sizes = [detectable(s, c) for s, c in DESIGNS]
    hits = [
        power(rng, s, c, "equal", d, tables // 2, [SHIPPED])[SHIPPED]
        for (s, c), d in zip(DESIGNS, sizes, strict=True)
    ]
    print(
        markdown(
            ["seeds x cases", *names],
            [["points", *(f"{d:.1f}" for d in sizes)], ["found, %", *(f"{p:.0f}" for p in hits)]],
        )
    )
    report_uneven(tables)


if __name__ == "__main__":
    main()
