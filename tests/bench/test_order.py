"""The order in which processes that share a bench take its cells."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from cohorts import sphere_cohort
from run_facts import finished_run

from ssl3d.bench.cell import TaskData
from ssl3d.bench.run import RELATIVE_COST, Bench, Cell, Conduct, Grid, Pretraining
from ssl3d.config import Settings
from ssl3d.data.splits import Split
from ssl3d.downstream.tasks import Task
from ssl3d.locks import this_process
from ssl3d.models.weights.checkpoint import RUN
from ssl3d.pretrain.spec import resolve_method
from ssl3d.results.store.store import ResultStore


def make_bench(store: Path, settings: Settings, jobs: int = 2) -> Bench:
    split = Split("test", ("case0", "case1"), ("case2",), ("case3",))
    task = Task("seg", "SEG", "segmentation", "memory", "dsc", None)
    columns = [TaskData(task, sphere_cohort(4), [split])]  # type: ignore[arg-type]
    methods = [resolve_method(name, {}) for name in ("scratch", "byol", "gvsl")]
    grid = Grid(methods, columns, ["linear", "finetune"], [0, 1])
    conduct, device = Conduct(jobs=jobs), torch.device("cpu")
    return Bench(grid, Pretraining(None), settings, ResultStore(store), device, conduct)


def names(cells: list[Cell]) -> list[tuple[str, int, str]]:
    return [(cell.weights.spec.name, cell.seed, cell.mode) for cell in cells]


def test_the_longest_pretraining_comes_first_and_no_cell_is_lost(smoke: Settings, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, smoke)
    found = names(bench.longest_first())
    assert found[:4] == [
        ("gvsl", 0, "linear"),
        ("gvsl", 1, "linear"),
        ("byol", 0, "linear"),
        ("byol", 1, "linear"),
    ]
    assert sorted(found) == sorted(names(list(bench.cells()))) and len(found) == 12
    assert [mode for _, _, mode in found[4:]] == ["finetune"] * 6 + ["linear"] * 2


def test_a_cost_that_was_measured_decides_and_a_finished_run_is_no_pretraining(
    smoke: Settings, tmp_path: Path
) -> None:
    bench = make_bench(tmp_path, smoke)
    (tmp_path / RELATIVE_COST).write_text(json.dumps({"gvsl": 1.2, "byol": 3.4}))
    assert [name for name, _, _ in names(bench.longest_first())[:4]] == ["byol", "byol", "gvsl", "gvsl"]
    done = next(cell for cell in bench.cells() if cell.weights.spec.name == "byol")
    folder = bench.run_folder(done.weights)
    folder.mkdir(parents=True)
    (folder / RUN).write_text(json.dumps(finished_run()))
    assert names(bench.longest_first())[:3] == [
        ("byol", 1, "linear"),
        ("gvsl", 0, "linear"),
        ("gvsl", 1, "linear"),
    ]


def test_who_is_waited_for_is_named_with_what_it_holds(smoke: Settings, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, smoke)
    cells = {
        (cell.weights.spec.name, cell.seed, cell.mode): cell
        for cell in bench.cells()
        if cell.weights.spec.name != "scratch"
    }
    assert bench._held(list(cells.values())) == {}
    held = (cells["gvsl", 0, "linear"].identity, {"run": cells["byol", 1, "linear"].weights.identity})
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with bench.store.claim(held[0]), bench.store.claim(held[1]):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        assert bench._held(list(cells.values())) == {
            this_process(child): "gvsl, seg linear, seed 0, test and 2 other cells"
        }
        assert bench._held([cells["byol", 1, "finetune"]]) == {
            this_process(child): "the pretraining of byol, seg finetune, seed 1, test"
        }
        assert bench._held([cells["gvsl", 0, "linear"]]) == {
            this_process(child): "gvsl, seg linear, seed 0, test"
        }
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
