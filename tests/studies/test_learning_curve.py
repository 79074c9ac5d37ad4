"""The learning curve of a store: who has how many labels, and what a column gains by more of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ssl3d.errors import SSL3DError
from ssl3d.results.store.store import ResultStore

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
sys.path.insert(0, str(STUDIES))

from learning_curve import frame_of, markdown  # noqa: E402

DEMO = STUDIES / "demo"


def test_patients_and_scores_are_those_of_the_records() -> None:
    frame = frame_of(DEMO, ["gvsl"], "linear")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (DEMO / "records").glob("*.json")]
    expected = {
        (r["identity"]["task"], r["identity"]["seed"]): r["score"]
        for r in records
        if r["identity"]["method"] == "gvsl" and r["identity"]["mode"] == "linear"
    }
    assert {(row.task, row.seed): row.score for row in frame.itertuples()} == expected and expected
    assert dict(zip(frame.task, frame.patients, strict=True)) == {"shc": 5, "sac": 4, "sbm": 4, "ccc": 16}


def test_curves_of_two_budgets_are_not_joined(tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(DEMO, store)
    records = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((store / "records").glob("*.json"))]
    record = next(r for r in records if r["identity"]["task"] == "ccc")
    method = record["identity"]["method"]
    other = record | {
        "identity": record["identity"] | {"budget": {"feature_precision": "bfloat16"}},
    }
    ResultStore(store).write({key: value for key, value in other.items() if key != "record_sha256"})
    with pytest.raises(SSL3DError, match=f"{method} on ccc with 2 budgets of linear"):
        frame_of(store, [method], "linear")


def test_gain_from_two_to_ten_patients() -> None:
    scores = {1: (40.0, 44.0), 2: (50.0, 54.0), 10: (70.0, 66.0)}
    frame = pd.DataFrame(
        [
            {"task": "shc", "method": "scratch", "patients": n, "seed": seed, "score": score, "before": 1.0, "last": 2.0}
            for n, pair in scores.items() for seed, score in enumerate(pair)
        ]
    )  # fmt: skip
    text = markdown(frame)
    assert "| shc | scratch | 1 | 42.0 | 40.0, 44.0 | 1.0, 2.0 |" in text
    assert text.endswith("- shc, scratch: 52.0 with 2 patients, 68.0 with 10: +16.0")
    assert "with 2 patients" not in markdown(frame[frame.patients != 2])


@pytest.mark.parametrize(("methods", "reason"), [(["gvsl"], ""), (["nobody"], "has no record of nobody")])
def test_the_command(tmp_path: Path, methods: list[str], reason: str) -> None:
    picture = tmp_path / "curve.png"
    done = subprocess.run(
        [sys.executable, STUDIES / "learning_curve.py", DEMO, "--mode", "linear", "--out", picture, "--methods", *methods],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (
        done.returncode == (1 if reason else 0) and reason in done.stderr and "Traceback" not in done.stderr
    )
    assert picture.is_file() != bool(reason)
