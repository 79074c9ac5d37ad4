"""Curves over labels and over steps, and what is read off them."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from test_table import made_up

from ssl3d.results.formats.csv import render_csv
from ssl3d.results.statistics.annotate import with_statistics
from ssl3d.results.statistics.convergence import best_score, mean_curve, steps_to_reach
from ssl3d.results.statistics.label_efficiency import fraction_reaching, label_curves
from ssl3d.results.table.build import build_table

FRACTIONS = (0.05, 0.1, 0.25, 1.0)
SCORES = {"scratch": (20, 30, 40, 60), "gvsl": (40, 50, 62, 70), "byol": (10, 20, 30, 40)}


def fractions(methods: tuple[str, ...] = ("scratch", "gvsl", "byol")) -> list[dict[str, object]]:
    return [
        made_up(
            method, score + seed, seed=seed, label_fraction=fraction, split_cases=f"cases at {fraction}",
            dsc=[(score + seed + case) / 100 for case in (-5, 0, 5)],
        )
        for method in methods
        for fraction, score in zip(FRACTIONS, SCORES[method], strict=True)
        for seed in range(2)
    ]  # fmt: skip


def test_fractions_are_kept_apart_in_tables_and_joined_in_curves() -> None:
    model = build_table(fractions())
    assert len(model.tables) == len(FRACTIONS)
    assert sorted(table.facets["label_fraction"] for table in model.tables) == list(FRACTIONS)
    assert sum("5 % of the labels" in table.caption for table in model.tables) == 2  # 5 % and 25 %
    curves = {curve.method: curve for curve in label_curves(model)}
    assert [(p.fraction, p.mean, p.n_seeds, p.n_cases) for p in curves["gvsl"].points] == [
        (f, s + 0.5, 2, 3) for f, s in zip(FRACTIONS, SCORES["gvsl"], strict=True)
    ]
    for point in curves["gvsl"].points:
        assert point.interval and point.interval.low < point.mean < point.interval.high


def test_labels_saved() -> None:
    curves = {curve.method: curve for curve in label_curves(build_table(fractions()), intervals=False)}
    # 60.5 lies between 50.5 at 10 % and 62.5 at 25 %, on a straight line over the logarithm.
    expected = math.exp(np.interp(60.5, [50.5, 62.5], np.log([0.1, 0.25])))
    assert curves["gvsl"].reaches == pytest.approx(expected)
    assert curves["gvsl"].saved == pytest.approx(1 - expected)
    assert curves["scratch"].reaches == 1.0
    assert curves["byol"].reaches is None
    without = label_curves(build_table(fractions(("gvsl",))), intervals=False)
    assert without[0].reaches is None, "there is no scratch to reach"
    assert fraction_reaching([(0.05, 70.0), (1.0, 80.0)], 60.0) == 0.05


def test_labels_in_the_table() -> None:
    remarks = with_statistics(build_table(fractions()), ["labels"]).tables[0].remarks
    assert any(
        r.startswith("SHC linear: GVSL reaches scratch's score with all labels at 21.5 %") for r in remarks
    )
    assert any("BYOL does not reach" in r for r in remarks)
    (remark,) = with_statistics(build_table([made_up()]), ["labels"]).tables[0].remarks
    assert "--label-fractions" in remark


def test_another_budget_is_another_curve() -> None:
    records = [*fractions(("scratch",)), made_up("scratch", 99.0, budget={"steps": 9}, label_fraction=0.5)]
    (curve,) = label_curves(build_table(records), intervals=False)
    assert [p.fraction for p in curve.points] == list(FRACTIONS)


def with_curve(method: str, scores: list[float], seed: int = 0) -> dict[str, object]:
    record = made_up(method, scores[-1], seed=seed)
    record["validation"] = [{"step": 10 * k, "score": s} for k, s in enumerate(scores, 1)]
    return record


def test_steps_to_reach_the_best_of_scratch() -> None:
    records = [
        with_curve("scratch", [10, 20, 40, 30]), with_curve("scratch", [20, 30, 30, 40], seed=1),
        with_curve("gvsl", [30, 34, 50, 60]), with_curve("gvsl", [30, 36, 50, 60], seed=1),
        with_curve("byol", [30, 34, 34, 34]),
    ]  # fmt: skip
    table = build_table(records).tables[0]
    cells = {row.method: row.cells["linear", "shc"] for row in table.rows}
    assert mean_curve(cells["scratch"]) == [(10, 15), (20, 25), (30, 35), (40, 35)]
    target = best_score(cells["scratch"])
    assert target == 35
    assert [steps_to_reach(cells[m], target) for m in ("gvsl", "scratch", "byol")] == [20, 30, None]
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO(render_csv(build_table(records))))}
    assert [lines[m]["steps_to_scratch_best"] for m in ("gvsl", "scratch", "byol")] == ["20", "30", ""]
    without = build_table([made_up("scratch")]).tables[0].rows[0].cells["linear", "shc"]
    assert best_score(without) is None and steps_to_reach(cells["gvsl"], None) is None
