"""What `benchmarks/speed/sweep.py` says of known times; that it runs is tried by its `--quick`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import sweep


def test_the_efficiencies_are_those_of_known_times() -> None:
    singles = [sweep.Ran(wall=10, work=8, span=8, cells=2), sweep.Ran(wall=14, work=10, span=10, cells=2)]
    found = sweep.figures(singles, sweep.Ran(wall=15, work=18, span=12, cells=4), workers=2)
    assert found["by_clock"] == 12 / 15  # 12 is the mean of 10 and 14
    assert found["work_alone"] == 1.0 and found["work_ray"] == found["by_work"] == 18 / 24
    assert found["seconds_outside_of_tasks_ray"] == 3


def test_the_first_pretraining_began_its_seconds_before_its_log_ended(tmp_path: Path) -> None:
    for name, ended, seconds in (("a", 1000, 30.0), ("b", 1010, 90.0)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("{}\n")
        (folder / "run.json").write_text(json.dumps({"seconds": seconds}))
        os.utime(folder / "log.jsonl", (ended, ended))
    assert sweep.began(sweep.done(tmp_path)) == pytest.approx(1010 - 90)


def test_what_is_evaluated_before_the_first_pretraining_counts(tmp_path: Path) -> None:
    """A bench begins with `scratch`, which trains nothing."""
    for place, file, content, ended in (
        ("runs/a", "run.json", {"seconds": 30.0}, 1000),
        ("runs/a", "log.jsonl", {}, 1000),
        ("records", "b.json", {"cost": {"downstream_seconds": 20.0}}, 900),
    ):
        path = tmp_path / place / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        os.utime(path, (ended, ended))
    assert sweep.began(sweep.done(tmp_path)) == pytest.approx(900 - 20)
