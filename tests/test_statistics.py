"""Statistics against second implementations and by simulation; every score here is made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau, wilcoxon

from ssl3d.errors import ConfigError
from ssl3d.results.formats import render_csv, render_markdown, render_rich
from ssl3d.results.statistics import (
    RESAMPLES,
    Sample,
    bootstrap_scores,
    compare,
    comparisons,
    delong_components,
    delong_interval,
    draw_cases,
    holm,
    interval,
    kendall_tau,
    ranks,
    with_statistics,
)
from ssl3d.results.table import Cell, TableModel, build_table

Rng = np.random.Generator


def dsc_cell(values: Any, split: str = "test") -> Cell:
    """A cell from made-up Dice coefficients in percent (S, N)."""
    values = np.asarray(values, dtype=float)
    records = tuple(
        {
            "identity": {"seed": s, "pretrain_seed": s, "split": split},
            "per_case": [{"case": str(i), "dsc": v / 100} for i, v in enumerate(row)],
        }
        for s, row in enumerate(values)
    )
    seeds = {(s, s): float(row.mean()) for s, row in enumerate(values)}
    return Cell(seeds=seeds, n_cases=values.shape[1], records=records)


def auc_cell(targets: Any, values: Any, folds: int = 1) -> Cell:
    """A cell from made-up probabilities (S, N), the cases dealt out to ``folds``."""
    records = [
        {
            "identity": {"seed": s, "pretrain_seed": s, "split": f"fold-{f}"},
            "per_case": [
                {"case": str(i), "target": int(targets[i]), "probability": float(row[i])}
                for i in range(f, len(targets), folds)
            ],
        }
        for s, row in enumerate(values)
        for f in range(folds)
    ]
    return Cell(seeds={(s, s): 0.0 for s in range(len(values))}, n_cases=len(targets), records=tuple(records))


def crossed(rng: Rng, seeds: int, cases: int, seed_sd: float, case_sd: float, noise: float) -> Any:
    """Made-up scores with mean 50, crossed effects of seed and case, and noise (S, N)."""
    return (
        50
        + rng.normal(0, seed_sd, (seeds, 1))
        + rng.normal(0, case_sd, (1, cases))
        + rng.normal(0, noise, (seeds, cases))
    )


def slow_auc(targets: Any, scores: Any) -> float:
    pairs = [(p > q) + 0.5 * (p == q) for p in scores[targets] for q in scores[~targets]]
    return float(np.mean(pairs))


# --- Intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "cases", "spreads", "least", "most"),
    [
        (1, 20, (0.0, 6.0, 0.0), 0.90, 0.97),
        (5, 20, (1.0, 6.0, 2.0), 0.91, 0.98),
        (3, 40, (0.5, 6.0, 2.0), 0.91, 0.98),
        # Three seeds that differ more than the cases do: too few to know their spread by.
        (3, 40, (4.0, 1.0, 1.0), 0.50, 0.85),
    ],
)
def test_coverage_of_the_interval(
    seeds: int, cases: int, spreads: tuple[float, float, float], least: float, most: float
) -> None:
    rng, hits, trials = np.random.default_rng(0), 0, 400
    for trial in range(trials):
        cell = dsc_cell(crossed(rng, seeds, cases, *spreads))
        found = interval(cell, "dsc", resamples=400, seed=trial)
        hits += found.low <= 50 <= found.high
    assert least <= hits / trials <= most


def test_resampling_cases_alone_would_miss_the_seeds() -> None:
    """The interval over seeds and cases is wider than over cases where seeds differ."""
    values = crossed(np.random.default_rng(1), 5, 20, 5.0, 5.0, 1.0)
    both = interval(dsc_cell(values), "dsc")
    cases = interval(dsc_cell(values.mean(axis=0, keepdims=True)), "dsc")
    assert (both.over, cases.over) == ("seeds and cases", "cases")
    assert both.high - both.low > 1.3 * (cases.high - cases.low)


def test_the_bootstrap_has_the_variance_that_theory_gives() -> None:
    """One seed: the bootstrap variance of a mean is the population variance over n."""
    values = np.random.default_rng(2).normal(50, 6, (1, 30))
    one = Sample(tuple(("test", str(i)) for i in range(30)), values)
    scores = bootstrap_scores(one, np.random.default_rng(0), resamples=20_000)
    assert scores.var() == pytest.approx(values.var() / 30, rel=0.05)
    assert scores.mean() == pytest.approx(values.mean(), abs=0.05)


def test_auc_resamples_within_class_and_fold() -> None:
    targets = np.array([True, False, True, False, False, True, False, True])
    one = Sample(tuple((f"fold-{i // 4}", str(i)) for i in range(8)), np.zeros((2, 8)), targets)
    counts = draw_cases(one, np.random.default_rng(0), 50)
    for places in one.folds():
        for target in (True, False):
            inside = [i for i in places if targets[i] == target]
            assert (counts[:, inside].sum(axis=1) == len(inside)).all()


def test_bootstrapped_auc_against_a_slow_one() -> None:
    rng = np.random.default_rng(3)
    targets = np.array([True] * 6 + [False] * 9)
    values = np.round(rng.normal(0, 1, (1, 15)) + targets, 1)  # rounded, so that there are ties
    one = Sample(tuple(("test", str(i)) for i in range(15)), values, targets)
    counts = draw_cases(one, rng, 20)
    fast = bootstrap_scores(one, rng, counts)
    for score, row in zip(fast, counts.astype(int), strict=True):
        taken = np.repeat(np.arange(15), row)
        assert score == pytest.approx(100 * slow_auc(targets[taken], values[0][taken]))


def test_cases_that_a_seed_could_not_score_are_left_out() -> None:
    cell = dsc_cell([[50.0, 60.0, 70.0], [52.0, 62.0, 0.0]])
    cell.records[1]["per_case"][2]["dsc"] = None
    found = interval(cell, "dsc")
    assert 50 <= found.low <= found.high <= 62


# --- DeLong ---------------------------------------------------------------------------------------


def test_delong_against_the_definition() -> None:
    rng = np.random.default_rng(4)
    targets = rng.random(40) < 0.4
    scores = np.round(rng.normal(0, 1, 40) + targets, 1)
    of_positives, of_negatives = delong_components(targets, scores)
    p, q = scores[targets], scores[~targets]
    assert of_positives == pytest.approx([np.mean([(x > y) + 0.5 * (x == y) for y in q]) for x in p])
    assert of_negatives == pytest.approx([np.mean([(x > y) + 0.5 * (x == y) for x in p]) for y in q])
    assert of_positives.mean() == pytest.approx(slow_auc(targets, scores))


@pytest.mark.parametrize("folds", [1, 2])
def test_delong_and_the_bootstrap_agree(folds: int) -> None:
    rng = np.random.default_rng(5)
    targets = np.arange(120) % 4 < 2
    cell = auc_cell(targets, rng.normal(0, 1, (1, 120)) + targets, folds)
    delong, bootstrap = delong_interval(cell), interval(cell, "auc")
    assert delong.low == pytest.approx(bootstrap.low, abs=2.0)
    assert delong.high == pytest.approx(bootstrap.high, abs=2.0)


def test_coverage_of_delong() -> None:
    from scipy.stats import norm

    truth = 100 * norm.cdf(1 / np.sqrt(2))
    rng, hits = np.random.default_rng(6), 0
    targets = np.arange(60) % 2 == 0
    for _ in range(400):
        found = delong_interval(auc_cell(targets, rng.normal(0, 1, (1, 60)) + targets))
        hits += found.low <= truth <= found.high
    assert 0.91 <= hits / 400 <= 0.98


# --- Tests ----------------------------------------------------------------------------------------


def test_error_rate_of_the_comparison_and_of_pooled_pairs() -> None:
    """No method is better, but each suits some cases: 5 % must come out, and pooling is why not."""
    rng, averaged, pooled, trials = np.random.default_rng(7), 0, 0, 400
    for _ in range(trials):
        difficulty = rng.normal(0, 5, (1, 20))
        a, b = (50 + difficulty + rng.normal(0, 2, (1, 20)) + rng.normal(0, 1, (5, 20)) for _ in range(2))
        averaged += compare(dsc_cell(a), dsc_cell(b), "dsc").p <= 0.05
        pooled += wilcoxon((a - b).ravel()).pvalue <= 0.05
    assert 0.02 <= averaged / trials <= 0.08
    assert pooled / trials > 0.25


def test_error_rate_of_the_auc_comparison() -> None:
    rng, wrong, trials = np.random.default_rng(8), 0, 400
    targets = np.arange(80) % 2 == 0
    for _ in range(trials):
        shared = rng.normal(0, 1, 80) + targets
        cells = [auc_cell(targets, shared + rng.normal(0, 1, (3, 80))) for _ in range(2)]
        wrong += compare(*cells, "auc").p <= 0.05
    assert 0.02 <= wrong / trials <= 0.08


def test_wilcoxon_on_means_over_seeds() -> None:
    rng = np.random.default_rng(9)
    a, b = rng.normal(55, 4, (3, 15)), rng.normal(50, 4, (2, 15))
    found = compare(dsc_cell(a), dsc_cell(b), "dsc", "Scratch")
    assert found.p == pytest.approx(wilcoxon(a.mean(axis=0), b.mean(axis=0)).pvalue)
    assert (found.n, found.reference) == (15, "Scratch")
    assert found.effect is not None
    assert found.effect > 0.5
    reverse = compare(dsc_cell(b), dsc_cell(a), "dsc")
    assert reverse.effect == pytest.approx(-found.effect)


def test_equal_results_are_no_difference() -> None:
    values = np.random.default_rng(10).normal(50, 5, (3, 12))
    same = compare(dsc_cell(values), dsc_cell(values[::-1]), "dsc")
    assert (same.p, same.effect, same.n) == (1.0, 0.0, 0)
    targets = np.arange(12) % 2 == 0
    assert compare(auc_cell(targets, values), auc_cell(targets, values), "auc").p == 1.0


def test_holm_against_the_definition() -> None:
    p_values = list(np.random.default_rng(11).random(20) ** 3)
    order = np.argsort(p_values)
    expected = np.empty(20)
    for place, index in enumerate(order):
        expected[index] = max(min(1, (20 - k) * p_values[order[k]]) for k in range(place + 1))
    assert holm(p_values) == pytest.approx(expected)
    assert holm([]) == []


# --- Whole tables ---------------------------------------------------------------------------------

LEVELS = {"scratch": 40.0, "a": 40.2, "b": 50.0, "c": 60.0}


def made_up_model(
    cases: int = 15, seeds: int = 3, modes: tuple[str, ...] = ("linear", "finetune"),
    levels: dict[str, float] = LEVELS,
) -> TableModel:  # fmt: skip
    rng = np.random.default_rng(12)
    difficulty = rng.normal(0, 4, cases)
    records: list[dict[str, Any]] = []
    for method, level in levels.items():
        for task in ("shc", "ccc"):
            for mode in modes:
                for seed in range(seeds):
                    values = level + difficulty + rng.normal(0, 2, cases)
                    targets = np.arange(cases) % 2
                    signal = rng.normal(0, 1, cases) + targets * (level - 35) / 10
                    per_case = [
                        {"case": str(i), "dsc": values[i] / 100}
                        if task == "shc"
                        else {"case": str(i), "target": int(targets[i]), "probability": float(signal[i])}
                        for i in range(cases)
                    ]
                    score = values.mean() if task == "shc" else 100 * slow_auc(targets == 1, signal)
                    records.append(
                        {
                            "schema": 1,
                            "identity": {
                                "method": method, "method_config": {}, "seed": seed, "pretrain_seed": seed,
                                "task": task, "task_data": task, "split": "test", "split_cases": "x",
                                "mode": mode, "pretrain": None, "label_fraction": 1.0, "budget": {"steps": 1},
                            },
                            "method": {"title": method, "trains": "none", "notes": []},
                            "preset": "made-up", "metric": "dsc" if task == "shc" else "auc",
                            "score": float(score), "per_case": per_case,
                        }
                    )  # fmt: skip
    return build_table(records)


def test_comparisons_of_a_table() -> None:
    table = made_up_model().tables[0]
    found = comparisons(table)
    assert len(found) == 3 * 4, "every method but scratch, every column"
    assert found[3, ("linear", "shc")].significant
    assert all(c.p_holm >= c.p and c.reference == "scratch" for c in found.values())
    against_best = comparisons(table, "best")
    assert (3, ("linear", "shc")) not in against_best, "the best is not compared with itself"
    assert against_best[0, ("linear", "shc")].reference == "c"
    with pytest.raises(ConfigError, match='Did you mean "best"'):
        comparisons(table, "bset")


def test_too_few_cases_are_said_to_be_too_few() -> None:
    for cases, powerless in ((5, True), (12, False)):
        found = comparisons(made_up_model(cases, modes=("linear",)).tables[0])
        assert all(c.powerless == powerless for (_, (_, task)), c in found.items() if task == "shc")
        assert not any(c.significant for c in found.values() if c.powerless)


def test_ranks_and_their_stability() -> None:
    table = made_up_model().tables[0]
    found = ranks(table, table.columns[0])
    assert [found[i].rank for i in (2, 3)] == [2, 1]
    assert (found[3].low, found[3].high, found[3].first) == (1, 1, 1.0)
    assert sum(rank.first for rank in found.values()) == pytest.approx(1)
    assert {(found[i].low, found[i].high) for i in (0, 1)} == {(3, 4)}, "too close to be told apart"


def test_kendall_between_the_modes() -> None:
    table = made_up_model().tables[0]
    found = kendall_tau(table, "shc")
    assert found is not None
    pairs = [(row.cells["linear", "shc"].mean, row.cells["finetune", "shc"].mean) for row in table.rows]
    expected = kendalltau(*zip(*pairs, strict=True))
    assert found == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue), 4)
    assert kendall_tau(made_up_model(modes=("linear",)).tables[0], "shc") is None


def test_the_formats_show_the_statistics() -> None:
    plain = made_up_model()
    model = with_statistics(plain, ["ci", "p", "rank", "tau"])
    for text in (render_rich(model), render_markdown(model).replace("\\", "")):
        words = " ".join(text.split())
        assert "p < 0.001" in words or "p = 0." in words
        assert "#1 (1-1)" in words
        assert "Holm-adjusted for 12 comparisons" in words
        assert f"95 % percentile bootstrap over seeds and cases, {RESAMPLES} resamples" in words
        assert "SHC: linear and fine-tune ranks agree with Kendall's tau = " in words
    cell = model.tables[0].rows[3].cells["linear", "shc"]
    assert cell.interval is not None
    assert cell.interval.low < cell.mean < cell.interval.high
    assert f"{cell.interval.low}" in render_csv(model)
    assert "bootstrap" not in render_rich(plain)
    with pytest.raises(ConfigError, match='Did you mean "rank"'):
        with_statistics(plain, ["rnk"])


def test_one_seed_is_said_to_be_one() -> None:
    model = with_statistics(made_up_model(seeds=1), ["ci"])
    assert "over cases (there is one seed only)" in " ".join(render_rich(model).split())
