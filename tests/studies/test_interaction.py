"""Does a factor change what the rows gain? Made-up stores, each cell written as a bench writes it."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl3d.errors import SSL3DError
from ssl3d.results.store.store import ResultStore
from ssl3d.results.table.model import Comparison

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
sys.path[:0] = [str(STUDIES), str(Path(__file__).parents[1] / "results")]

import interaction  # noqa: E402
import stores  # noqa: E402
from test_statistics import made_up_records  # noqa: E402

FACTOR = "phantoms.appearance_variance"
LEVELS = {"scratch": 40.0, "a": 60.0, "b": 60.0}
LOST = {0.0: 0.0, 1.0: 5.0, 2.0: 10.0}
"""What every row loses by each value of the factor; row "a" loses it twice."""

Change = Callable[[float, dict[str, Any]], dict[str, Any] | None]


def written(folder: Path, change: Change = lambda value, record: record, task: str = "shc") -> Path:
    """Write a study of 3 values, 3 rows, 5 seeds and 30 cases; ``change`` alters a record or leaves it out."""
    store = ResultStore(folder)
    for value, lost in LOST.items():
        of_rows = {row: level - lost * (2 if row == "a" else 1) for row, level in LEVELS.items()}
        for record in made_up_records(30, 5, ("linear",), of_rows):
            if record["identity"]["task"] != task:
                continue
            for case in record["per_case"] if task == "ccc" else []:
                case["probability"] = 1 / (1 + np.exp(-case["probability"]))
            identity = {**record["identity"], "task_data": f"{task} at {value}"}
            settings = {"preset": "made-up", "data": {}, "phantoms": {"appearance_variance": value}}
            run = {
                "data": "phantoms",
                "task_data": None,
                "checkpoint": None,
                "settings": settings,
                "overrides": {},
            }
            changed = change(value, {**record, "identity": identity, "run": run})
            if changed is not None:
                store.write(changed)
    return folder


def compared(folder: Path, *references: str) -> dict[tuple[str, str], Comparison]:
    tables = stores.tables_by(folder, FACTOR)
    found = [interaction.changes(tables, column) for column in tables[0].columns]
    apart = interaction.tested(found, references or ("scratch", "a"))
    return {(pair.method, pair.reference): pair.comparison for pair in apart}


def script(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        STUDIES / "interaction.py",
        "--store",
        folder,
        "--factor",
        *(arguments or (FACTOR,)),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_row_that_loses_more_is_found_and_nothing_else(tmp_path: Path) -> None:
    scores: dict[tuple[float, str, int], float] = {}

    def kept(value: float, record: dict[str, Any]) -> dict[str, Any]:
        scores[value, record["identity"]["method"], record["identity"]["seed"]] = record["score"]
        return record

    written(tmp_path, kept)
    found = compared(tmp_path, "scratch", "a", "scratch")
    assert set(found) == {("a", "scratch"), ("b", "scratch"), ("b", "a")}, "no two rows twice"
    for (method, reference), one in found.items():
        by_hand = [
            scores[2, method, s] - scores[0, method, s] - scores[2, reference, s] + scores[0, reference, s]
            for s in range(5)
        ]
        assert one.difference == pytest.approx(statistics.fmean(by_hand))
        # As wide as a paired t of the five would be, or a little more: two cohorts of cases, and moderated variances.
        plain = 2 * 2.78 * statistics.stdev(by_hand) / 5**0.5
        assert 0.3 * plain < one.high - one.low < 3 * plain
    assert {pair for pair, one in found.items() if one.significant} == {("a", "scratch"), ("b", "a")}
    assert found["a", "scratch"].difference == pytest.approx(-10, abs=2)
    tables = stores.tables_by(tmp_path, FACTOR)
    change, half = interaction.changes(tables, tables[0].columns[0]).own["scratch"]
    assert abs(change + 10) < half < 3

    picture = tmp_path / "scores.png"
    printed = script(tmp_path, FACTOR, "--out", picture, "--against", "scratch", "a")
    assert printed.returncode == 0 and "Holm over all 3 comparisons" in printed.stdout, printed.stderr
    line = next(line for line in printed.stdout.splitlines() if line.startswith("| Linear SHC DSC | a |"))
    assert line.count("|") == 9 and "**-" in line and picture.stat().st_size > 10_000
    drawn = interaction.frame_of(tables)
    assert len(drawn) == len(scores) == 45 and all(
        row.score == pytest.approx(scores[float(row.value), row.method, row.seed])
        for row in drawn.itertuples()
    )


def without(method: str, values: set[float], seeds: set[int]) -> Change:
    """Leave cells of a row out."""
    return lambda value, record: (
        None
        if record["identity"]["method"] == method and value in values and record["identity"]["seed"] in seeds
        else record
    )


def test_what_one_row_lacks_is_no_loss_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = compared(written(tmp_path / "whole"))
    fewer = compared(written(tmp_path / "fewer", without("b", {2.0}, {0, 3})))
    assert fewer["a", "scratch"].difference == pytest.approx(whole["a", "scratch"].difference)
    assert set(fewer) == set(whole) and fewer["b", "scratch"].difference != whole["b", "scratch"].difference
    none = compared(written(tmp_path / "none", without("b", {2.0}, {0, 3, 4})))
    assert set(none) == {("a", "scratch")} and "b is left out" in capsys.readouterr().err
    # The middle is shown, and decides nothing.
    middle = written(tmp_path / "middle", without("b", {1.0}, set(range(5))))
    assert compared(middle) == whole
    line = next(x for x in script(middle).stdout.splitlines() if x.startswith("| Linear SHC DSC | b |"))
    assert line.split("|")[4].strip() == "" and line.split("|")[3].strip() != ""


def test_rows_that_tables_do_not_compare_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_checkpoint(value: float, record: dict[str, Any]) -> dict[str, Any]:
        shared = record["identity"]["method"] == "b"
        return {**record, "identity": {**record["identity"], "pretrain_seed": 0}} if shared else record

    found = compared(written(tmp_path, one_checkpoint))
    assert set(found) == {("a", "scratch")} and "b is left out" in capsys.readouterr().err


def test_an_auc_and_the_labels_behind_it(tmp_path: Path) -> None:
    found = compared(written(tmp_path / "auc", task="ccc"))
    assert found["a", "scratch"].low < found["a", "scratch"].difference < found["a", "scratch"].high

    def swapped(value: float, record: dict[str, Any]) -> dict[str, Any]:
        for case in record["per_case"] if value == 2 else []:
            case["target"] = 1 - case["target"]
        return record

    with pytest.raises(SSL3DError, match="labels, are others"):
        compared(written(tmp_path / "swapped", swapped, task="ccc"))
    printed = script(tmp_path / "swapped")
    assert printed.returncode == 1 and "no column can be compared" in printed.stderr


def test_a_sign_where_the_pretext_task_was_not_learned_at_some_value(tmp_path: Path) -> None:
    def learned(value: float, record: dict[str, Any]) -> dict[str, Any]:
        said = {"a": value < 2, "b": False}.get(record["identity"]["method"])
        pretext = {"start": 2.0, "end": 1.0, "chance": 1.5, "held_back": "6 volumes", "learned": said}
        return record if said is None else {**record, "pretext": pretext}

    tables = stores.tables_by(written(tmp_path, learned), FACTOR)
    titles = stores.titles_of((1.0, table) for table in tables.values())
    assert titles == {"scratch": "Scratch", "a": "a §", "b": "b ‡"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("phantoms.apearance",), "is no number"),
        (("pretrain.steps",), "is no number"),
        ((FACTOR, "--against", "scratch", "gvls"), "--against gvls: no such row. There are: scratch, a, b"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, arguments: tuple[str, ...], why: str) -> None:
    wrong = script(written(tmp_path), *arguments)
    assert wrong.returncode == 1 and why in wrong.stderr and "Traceback" not in wrong.stderr


def test_values_that_differ_by_more_than_the_factor_are_no_study(tmp_path: Path) -> None:
    def longer(value: float, record: dict[str, Any]) -> dict[str, Any]:
        budget = {"steps": 9 if value == 2 else 1}
        return {**record, "identity": {**record["identity"], "budget": budget}}

    with pytest.raises(SSL3DError, match="linear.steps is 1 at phantoms.appearance_variance 0 and 9 at 2"):
        stores.tables_by(written(tmp_path / "one", longer), FACTOR)

    both = written(tmp_path / "both")
    written(both, longer)
    with pytest.raises(SSL3DError, match="holds several studies at phantoms.appearance_variance 2"):
        stores.tables_by(both, FACTOR)

    def yes(value: float, record: dict[str, Any]) -> dict[str, Any]:
        settings = {**record["run"]["settings"], "phantoms": {"appearance_variance": value > 0}}
        return {**record, "run": {**record["run"], "settings": settings}}

    with pytest.raises(SSL3DError, match="is no number"):
        stores.tables_by(written(tmp_path / "yes", yes), FACTOR)
