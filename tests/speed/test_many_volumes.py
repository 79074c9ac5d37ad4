"""The simulated index of many volumes: every measurement runs at tiny sizes, and the exponent is printed."""

from __future__ import annotations

from pathlib import Path

import many_volumes
import pytest

from ssl3d.data.prepared import index
from ssl3d.data.prepared.many import IndexedCohort, open_prepared


def test_a_simulated_index_opens_and_has_all_its_volumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "ROWS", 8)
    monkeypatch.setattr(index, "MANY", index.MANY)  # put back afterwards
    many_volumes.write(tmp_path, 27)
    cohort = open_prepared(tmp_path)
    assert isinstance(cohort, IndexedCohort) and len(cohort) == 27
    assert cohort.cases[26].id == cohort.cases[2].id == "patient0000002" and cohort.cases[9].shape == (
        97,
        200,
        200,
    )
    for what in ("open", "source", "batch"):
        assert many_volumes.measure(what, tmp_path, 27, 1) > 0


def test_the_search_is_measured_without_an_index(tmp_path: Path) -> None:
    assert many_volumes.measure("leakage", tmp_path, 3, 1) > 0
