"""Two stores of the same cells, computed on two kinds of processor."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest


def test_rows_stand_by_how_far_they_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "studies")
    from processors import CELL, differences, markdown  # type: ignore[import-not-found]

    def frame(scores: dict[tuple[str, str], float]) -> pd.DataFrame:
        rows = [
            {
                **dict.fromkeys(CELL, 0),
                "mode": "linear",
                "method": m,
                "task": t,
                "title": m.upper(),
                "score": score,
            }
            for (m, t), score in scores.items()
        ]
        return pd.DataFrame(rows)

    here = frame(
        {("byol", "sbm"): 9.0, ("byol", "shc"): 30.0, ("gvsl", "sbm"): 18.26, ("only-here", "shc"): 1.0}
    )
    there = frame(
        {("byol", "sbm"): 10.0, ("byol", "shc"): 38.3, ("gvsl", "sbm"): 18.28, ("only-there", "shc"): 1.0}
    )
    budgets = [
        frame({("byol", "sbm"): 90.0}).assign(budget="another"),
        frame({("gvsl", "sbm"): 90.0}).assign(match="time"),
    ]
    here = pd.concat([here, *budgets])  # other cells of the same method, task and seed
    assert markdown(differences(here, there)).splitlines() == [
        "| | SHC linear, seed 0 | SBM linear, seed 0 |",
        "|---|--:|--:|",
        "| GVSL |  | 0.0 |",
        "| BYOL | -8.3 | -1.0 |",
    ]
    with pytest.raises(ValueError, match="column budget is missing"):
        differences(here, there.drop(columns="budget"))
