"""A bench that is killed at any operation on its store: the same command finishes, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cohorts import MemoryCohort, noise_cohort, sphere_cohort

from faults.damage import FULL
from faults.kills import CODES, Counter, kill, refuse
from faults.runs import CPU, Plain, forked, settings
from ssl3d.bench.cell import TaskData
from ssl3d.bench.run import Bench, Grid, Pretraining
from ssl3d.config import Settings
from ssl3d.data.prepared.steps import Preparation
from ssl3d.data.splits import Split
from ssl3d.downstream.tasks import Task
from ssl3d.errors import WriteError
from ssl3d.pretrain.spec import MethodSpec
from ssl3d.results.store.store import ResultStore


@dataclass
class Cohort(MemoryCohort):
    """As one on a disk says how it was prepared."""

    preparation: Preparation = field(default_factory=Preparation)


def small() -> Settings:
    options = settings(steps=2, checkpoint_every=1, monitor_every=2).model_dump()
    options["downstream"]["linear"] |= {"crop": 16}
    return Settings.model_validate(options)


def bench(store: Path) -> Bench:
    """Two cells, linear, of one pretraining."""
    torch.set_num_threads(1)
    task = Task("seg", "SEG", "segmentation", "memory", "dsc", None)
    splits = [Split(f"fold{n}", ("case0", "case1"), ("case2",), (f"case{3 + n}",)) for n in range(2)]
    columns = [TaskData(task, Cohort(**vars(sphere_cohort(5))), splits)]  # type: ignore[arg-type]
    methods = [MethodSpec("plain", Plain, Plain.Config(), "Plain")]
    grid = Grid(methods, columns, ["linear"], [0])
    return Bench(grid, Pretraining(noise_cohort(4)), small(), ResultStore(store), CPU)  # type: ignore[arg-type]


def results(store: Path) -> list[tuple[Any, ...]]:
    """Return what a store says of its cells, after all of it was found to be sound."""
    records, problems = ResultStore(store).records()
    assert not problems
    assert not list((store / "locks").glob("*")) and not list(store.rglob("*.damaged"))
    return [
        (record["identity"], record["score"], record["per_case"], record["fingerprint_of_weights"])
        for record in records
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What a bench finds that nothing happened to."""
    store = tmp_path_factory.mktemp("whole")
    assert len(list(bench(store).run())) == 2
    return results(store)


@pytest.mark.timeout(3600 if FULL else 600)
def test_killed_at_any_operation_the_same_bench_finishes(
    tmp_path: Path, whole: list[tuple[Any, ...]], record_property: Callable[[str, object], None]
) -> None:
    with Counter(tmp_path, 0, kill) as counter:
        list(bench(tmp_path / "counted").run())
    count = counter.seen
    points = range(1, count + 1) if FULL else (count // 4, count - 20, count - 4)
    record_property("trials", len(points))
    faults: list[str] = []
    for point in points:
        store = tmp_path / str(point)

        def child(store: Path = store, point: int = point) -> None:
            with Counter(tmp_path, point, kill):
                list(bench(store).run())

        assert forked(child) == -9, point
        assert len(list(bench(store).run())) == 2
        try:
            assert results(store) == whole
        except AssertionError as error:
            faults.append(f"at operation {point}: {str(error)[:300]}")
    assert not faults, f"{len(faults)} of {len(points)}:\n" + "\n".join(faults)


@pytest.mark.timeout(3600 if FULL else 600)
def test_refused_at_any_operation_the_same_bench_finishes(
    tmp_path: Path, whole: list[tuple[Any, ...]], record_property: Callable[[str, object], None]
) -> None:
    """The system refuses: one message with the path, or the operation was none that anything depends on."""
    with Counter(tmp_path, 0, refuse("ENOSPC")) as counter:
        list(bench(tmp_path / "counted").run())
    count = counter.seen
    points = range(1, count + 1) if FULL else (count // 3, count - 20)
    record_property("trials", len(points))
    faults: list[str] = []
    for number, point in enumerate(points):
        store, code = tmp_path / str(point), list(CODES)[number % len(CODES)]
        try:
            with Counter(tmp_path, point, refuse(code)):
                list(bench(store).run())
        except WriteError as error:
            if CODES[code] not in str(error) or str(store) not in str(error):
                faults.append(f"{code} at operation {point}: {error}")
        except OSError as error:
            faults.append(f"{code} at operation {point} is not explained: {error}")
        try:
            assert len(list(bench(store).run())) == 2
            assert results(store) == whole
        except AssertionError as error:
            faults.append(f"after {code} at operation {point}: {str(error)[:300]}")
    assert not faults, f"{len(faults)} of {len(points)}:\n" + "\n".join(faults)
