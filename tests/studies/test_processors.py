"""Two stores of the same cells, computed on two kinds of processor."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "studies")
    return importlib.import_module("processors")


def test_rows_stand_by_how_far_they_move(processors: ModuleType) -> None:

    def frame(scores: dict[tuple[str, str], float]) -> pd.DataFrame:
        rows = [
            {
                **dict.fromkeys(processors.CELL, 0),
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
    assert processors.markdown(processors.differences(processors.paired(here, there))).splitlines() == [
        "| | SHC linear, seed 0 | SBM linear, seed 0 |",
        "|---|--:|--:|",
        "| GVSL |  | 0.0 |",
        "| BYOL | -8.3 | -1.0 |",
    ]
    with pytest.raises(ValueError, match="column budget is missing"):
        processors.paired(here, there.drop(columns="budget"))
    with pytest.raises(ValueError, match="column score is missing"):
        processors.paired(here.drop(columns="score"), there)
    with pytest.raises(ValueError, match="BYOL, sbm linear, seed 0: both have several such cells"):
        longer = frame({("byol", "sbm"): 1.0}).assign(budget="another")
        processors.paired(here, pd.concat([there, longer]))


def test_the_luck_of_rounding_beside_that_of_seeds(processors: ModuleType) -> None:
    """Scores of many seeds, made up with both: 1 and 3 points."""
    rng, seeds = np.random.default_rng(0), np.arange(2000)
    of_seed = rng.normal(30, 3, len(seeds))

    def frame() -> pd.DataFrame:
        scores = of_seed + rng.normal(0, 1, len(seeds))
        common = {**dict.fromkeys(processors.CELL, 0), "mode": "linear", "task": "shc", "title": "BYOL"}
        return pd.DataFrame({**common, "seed": seeds, "score": scores})

    here, there = frame(), frame()
    (row,) = processors.luck(processors.paired(here, there)).itertuples()
    assert row.rounding == pytest.approx(1, rel=0.05) and row.seed == pytest.approx(10**0.5, rel=0.05)
    still = here.assign(title="Scratch", method=1, score=here.seed)
    both = processors.paired(pd.concat([here, still]), pd.concat([there, still]))
    lines = processors.summary(processors.luck(both[both.seed.astype(int) < 5])).splitlines()
    assert lines[2].startswith("| Scratch | 0.0 of 1.6 |") and lines[3].startswith("| BYOL |")
    assert "5 seeds" in lines[-1] and "factor of 0.6 to 2.5" in lines[-1]
    assert processors.luck(both[both.seed == "0"]).empty
