"""What a table must not show as a result: outputs alike for all cases, pretext tasks not learned, luck of rounding."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_table import cell, made_up, only

from ssl3d.results import floor as floors
from ssl3d.results.formats.csv import render_csv
from ssl3d.results.formats.format import BUILTIN_FORMATS
from ssl3d.results.formats.terminal import render_rich
from ssl3d.results.statistics.annotate import with_statistics
from ssl3d.results.table.build import build_table
from ssl3d.results.table.model import TableModel

TEXT_FORMATS = [f for f in BUILTIN_FORMATS if f.name not in ("csv", "json")]


def words(text: str) -> str:
    return " ".join(text.replace("\\", "").split())


# --- Outputs that do not differ between cases -------------------------------------------------------


def classified(method: str, seed: int, score: float, constant: bool = False) -> dict[str, Any]:
    record = made_up(method, score, "ccc", seed=seed)
    rng = np.random.default_rng([seed, len(method), int(score)])
    for c in record["per_case"]:
        noise = 1e-5 if constant else 0.2
        c["probability"] = float(np.clip(0.5 + (c["target"] - 0.5) * noise + rng.normal(0, noise), 0, 1))
    return record | {"constant_output": constant}


@pytest.fixture
def alike() -> TableModel:
    """GVSL has the highest AUC, by the fourth digit of outputs that are alike in one seed of three."""
    scores = {"scratch": 61.3, "byol": 71.4, "gvsl": 83.7}
    records = [
        classified(m, seed, s + seed, constant=m == "gvsl" and seed == 1)
        for m, s in scores.items()
        for seed in range(3)
    ]
    return with_statistics(build_table(records, list(scores)), ["ci", "p", "rank"])


@pytest.mark.parametrize("table_format", TEXT_FORMATS, ids=lambda f: f.name)
def test_outputs_alike_for_all_cases_have_no_auc(alike: TableModel, table_format: Any) -> None:
    text = words(table_format.render(alike))
    assert "const." in text and "the outputs do not differ between test cases" in text
    assert "84.7" not in text and "+23.4" not in text, "neither its score nor its difference to scratch"
    assert "72.4" in text, "the others have theirs"


def test_outputs_alike_are_not_ranked_tested_or_bold(alike: TableModel) -> None:
    table = only(alike)
    gvsl, byol = (cell(table, m, "ccc") for m in ("gvsl", "byol"))
    assert gvsl.constant and not (gvsl.best or gvsl.second) and gvsl.delta is None
    assert gvsl.rank is None and gvsl.interval is None
    assert gvsl.comparison and "do not differ" in gvsl.comparison.note
    assert byol.best and byol.rank and byol.rank.rank == 1 and byol.comparison and not byol.comparison.note
    (line,) = [x for x in csv.DictReader(io.StringIO(render_csv(alike))) if x["method"] == "gvsl"]
    assert (line["mean"], line["sd"], line["delta"], line["constant_output"]) == ("", "", "", "1")


def test_a_constant_scratch_is_no_reference() -> None:
    records = [classified("scratch", 0, 50.0, constant=True), classified("gvsl", 0, 60.0)]
    assert cell(only(build_table(records)), "gvsl", "ccc").delta is None


def test_an_error_of_a_constant_is_shown_and_marked_but_never_best() -> None:
    records = [made_up("scratch", 3.0), made_up("gvsl", 2.0)]
    for record, values in zip(records, (3.0, 2.0), strict=True):
        record["metric"] = "mae"
        record["per_case"] = [{"case": str(i), "mae": values + i / 10} for i in range(5)]
    records[1]["constant_output"] = True
    model = build_table(records)
    assert not cell(only(model), "gvsl").best
    text = words(render_rich(model))
    assert "2.00" in text and "the outputs do not differ between test cases; not ranked" in text


# --- Pretext tasks ----------------------------------------------------------------------------------


def pretrained(method: str, seed: int, learned: bool | None) -> dict[str, Any]:
    record = made_up(method, 50.0 + seed, seed=seed)
    return record | {"pretext": {"chance": 2.3, "start": 2.5, "end": 2.3, "learned": learned}}


@pytest.mark.parametrize("table_format", TEXT_FORMATS, ids=lambda f: f.name)
def test_rows_whose_pretext_task_was_not_learned_are_marked(
    table_format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    records = [made_up("scratch", 40.0, seed=seed) for seed in range(2)]
    learned = {
        "gvsl": [True, True],
        "rotation": [False, False],
        "simclr": [True, False],
        "byol": [None, None],
    }
    records += [pretrained(m, seed, of[seed]) for m, of in learned.items() for seed in range(2)]
    model = build_table(records)
    marks = {row.method: row.marks for row in only(model).rows}
    assert marks["gvsl"] == marks["byol"] == marks["scratch"] == ""
    assert marks["rotation"] and marks["simclr"] and marks["rotation"] != marks["simclr"]
    text = words(table_format.render(model))
    assert "pretext task not learned: on held-back volumes" in text and "not learned by some seeds" in text
    if table_format.name in ("rich", "html"):
        assert f"ROTATION{marks['rotation']}" in text and f"GVSL{marks['rotation']}" not in text
    lines = {x["method"]: x["pretext_learned"] for x in csv.DictReader(io.StringIO(render_csv(model)))}
    assert lines == {"scratch": "", "gvsl": "1.0", "rotation": "0.0", "simclr": "0.5", "byol": ""}


# --- Luck of rounding -------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor of 1.96 x 2 x sqrt(2 / 4) = 2.8 points for four seeds of SHC."""
    path = tmp_path / "floor.json"
    path.write_text(json.dumps({"made-up": {"shc": {"linear": {"sd": 2.0, "runs": 8}}}}))
    monkeypatch.setattr(floors, "FILE", path)


def phantoms(scores: dict[str, float], task: str = "shc", data: str = "phantoms") -> list[dict[str, Any]]:
    return [
        made_up(
            method, score, task, seed=seed, dsc=[(score + 0.01 * seed + i / 100) / 100 for i in range(12)]
        )
        | {"run": {"data": data, "task_data": None}}
        for method, score in scores.items()
        for seed in range(4)
    ]


@pytest.mark.parametrize("pretrained_too", [False, True])
def test_the_floor_is_that_of_all_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained_too: bool
) -> None:
    path = tmp_path / "floor.json"
    own = {"pretrained": {"byol": {"sd": 2.0, "runs": 4}}} if pretrained_too else {"sd": 2.0, "runs": 8}
    path.write_text(json.dumps({"made-up": {"shc": {"linear": own}}}))
    monkeypatch.setattr(floors, "FILE", path)
    records = phantoms({"scratch": 50.0, "byol": 52.0})

    def known() -> float | None:
        table = only(build_table(records))
        return cell(table, "byol").floor if pretrained_too else table.columns[0].floor

    assert known() == pytest.approx(2.772, abs=0.001)
    for record in records:
        record["identity"]["label_fraction"] = 0.1
    assert known() is None, "with a tenth of them it was not measured"


@pytest.mark.usefixtures("measured")
def test_differences_below_the_floor_are_never_bold() -> None:
    model = with_statistics(build_table(phantoms({"scratch": 50.0, "byol": 52.0, "gvsl": 54.0})), ["p"])
    table = only(model)
    assert table.columns[0].floor == pytest.approx(2.772, abs=0.001)
    byol, gvsl = (cell(table, m) for m in ("byol", "gvsl"))
    assert byol.comparison and byol.comparison.p_holm < 1e-3, "seeds that agree to a hundredth of a point"
    assert not byol.comparison.significant and gvsl.comparison and gvsl.comparison.significant
    assert not (gvsl.best or gvsl.second or byol.second), "2 points above the next row"
    text = words(render_rich(model))
    assert (
        "Floor: two evaluations of the same weights that differ by rounding only" in text
        and "Linear SHC DSC 2.8" in text
    )
    assert "1 differences are smaller than the luck of rounding" in text
    clear = only(build_table(phantoms({"scratch": 50.0, "byol": 55.0, "gvsl": 60.0})))
    assert cell(clear, "gvsl").best and cell(clear, "byol").second


def test_the_floor_of_a_pretraining_is_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 points for SimCLR, whose pretraining rounding throws about, and none but the evaluation's for the others."""
    path = tmp_path / "floor.json"
    cell_of = {"sd": 0.0, "runs": 8, "pretrained": {"simclr": {"sd": 4 / 1.96 / np.sqrt(2 / 4), "runs": 4}}}
    path.write_text(json.dumps({"made-up": {"shc": {"linear": cell_of}}}))
    monkeypatch.setattr(floors, "FILE", path)
    records = phantoms({"scratch": 50.0, "byol": 53.0, "simclr": 52.0})
    model = with_statistics(build_table(records), ["p"])
    table = only(model)
    assert table.columns[0].floor == 0.0
    assert cell(table, "simclr").floor == pytest.approx(4.0) and cell(table, "byol").floor is None
    byol, simclr = (cell(table, m).comparison for m in ("byol", "simclr"))
    assert byol and simclr and byol.p_holm < 1e-3 and simclr.p_holm < 1e-3
    assert byol.significant and not simclr.significant
    assert not cell(table, "byol").best, "a point above SimCLR"
    assert "Floor of whole runs, pretraining included: SIMCLR: Linear SHC DSC 4.0" in words(
        render_rich(model)
    )
    lower = only(build_table(phantoms({"scratch": 40.0, "byol": 53.0, "gvsl": 52.8, "simclr": 52.5})))
    assert not cell(lower, "byol").best, "two rows above SimCLR, and half a point"
    for key, kept in (("pretrain.steps", None), ("methods.simclr.temperature", None), ("pretrain.workers", 4.0),
                      ("methods.byol.hidden", 4.0), ("method_lr.byol", 4.0)):  # fmt: skip
        for record in records:
            record["run"]["overrides"] = {key: 9}
        of_row = cell(only(build_table(records)), "simclr").floor
        assert of_row == (kept and pytest.approx(kept)), f"{key}: another pretraining has another floor"
        assert only(build_table(records)).columns[0].floor == 0.0, "and the evaluation the same"
    for key in ("weights", "match", "pretrain_step"):
        other = phantoms({"scratch": 50.0, "simclr": 52.0})
        for record in other:
            record["identity"][key] = {"by": "steps", "steps": 9} if key == "match" else 7
        assert {cell(t, "simclr").floor for t in build_table(other).tables if len(t.rows) > 1} <= {None}, key


def test_a_floor_of_a_pretraining_without_one_of_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "floor.json"
    cell_of = {"pretrained": {"simclr": {"sd": 2.0, "runs": 4}}}
    path.write_text(json.dumps({"made-up": {"shc": {"linear": cell_of}}}))
    monkeypatch.setattr(floors, "FILE", path)
    model = build_table(phantoms({"scratch": 50.0, "simclr": 52.0}))
    text = words(render_rich(model))
    assert "Floor of whole runs, pretraining included: SIMCLR: Linear SHC DSC 2.8" in text
    assert "rounding in an evaluation was not measured for Linear SHC DSC" in text
    lines = {line["method"]: line["floor"] for line in csv.DictReader(io.StringIO(render_csv(model)))}
    assert lines["scratch"] == "" and float(lines["simclr"]) == pytest.approx(2.772, abs=0.001)


@pytest.mark.usefixtures("measured")
def test_the_floor_is_of_phantoms_and_said_where_it_is_not_known() -> None:
    real = build_table(phantoms({"scratch": 50.0, "gvsl": 51.0}, data="/data/ct"))
    assert cell(only(real), "gvsl").best and "rounding" not in render_rich(real)
    longer = phantoms({"scratch": 50.0, "gvsl": 51.0})
    for record in longer:
        record["run"]["overrides"] = {"downstream.linear.steps": 9, "method_lr.gvsl": None}
    assert only(build_table(longer)).columns[0].floor is None, "another evaluation has another floor"
    unknown = build_table(phantoms({"scratch": 50.0, "gvsl": 51.0}, task="sbm"))
    assert "The luck of rounding in an evaluation was not measured for Linear SBM DSC" in words(
        render_rich(unknown)
    )


# --- Cells that failed ------------------------------------------------------------------------------


def test_statistics_of_a_table_with_failed_cells() -> None:
    """A row without any cell and a column without any result stand beside the others, and are in no test."""
    records = [
        made_up(
            method, score + luck * seed, seed=seed, dsc=[(score + luck * seed + i) / 100 for i in range(6)]
        )
        for method, score, luck in (("scratch", 40.0, 1), ("gvsl", 50.0, -0.5))
        for seed in range(3)
    ]
    failures = [
        made_up("byol", seed=0),
        made_up("byol", seed=0, task="sbm"),
        made_up("gvsl", seed=0, task="sbm"),
    ]
    for failure in failures:
        del failure["per_case"], failure["score"]
        failure["error"] = {"type": "DataError", "message": "made up"}
    model = build_table(records, failures=failures)
    with_all = with_statistics(model, ["ci", "p", "power", "rank", "tau", "cost"])
    text = words(render_rich(with_all))
    assert "failed" in text and "Holm-adjusted for 1 comparisons" in text
