"""A bench that is handed out, and collected in one store, whatever engine hands it out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from benches import Inline, options, outcome

from ssl3d.bench.cluster import work, worker
from ssl3d.bench.cluster.driver import run_on
from ssl3d.bench.plan import BenchOptions, bench_of
from ssl3d.errors import BusyError, CellsFailed, ConfigError
from ssl3d.locks import Held


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def serial(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process computes."""
    store = tmp_path_factory.mktemp("serial")
    assert len(list(bench_of(options(store, cache)).run())) == 4
    return outcome(store)


def handed_out(engine: Inline, asked: BenchOptions) -> list[bool]:
    """Run a bench by an engine; return for each cell whether it was computed."""
    return [computed for _, computed in run_on(engine, bench_of(asked), asked, threads=1)]


def test_the_records_are_those_of_one_process_and_nothing_else_is_left(
    serial: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    asked = options(tmp_path / "store", cache)
    engine = Inline()
    assert handed_out(engine, asked) == [True] * 4
    assert outcome(tmp_path / "store") == serial
    assert len(engine.done) == 6  # two pretrainings, four cells
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["locks", "records", "runs", "splits"]
    again = Inline()
    assert handed_out(again, asked) == [False] * 4 and not again.done


def test_a_node_that_does_not_see_the_store_computes_the_same_and_hands_the_runs_over(
    serial: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"

    def elsewhere(order: work.Order) -> work.Order:
        return order | {"mark": "not/seen", "carry": True}

    assert handed_out(Inline(elsewhere), options(store, cache)) == [True] * 4
    assert outcome(store) == serial
    for run in (store / "runs").iterdir():
        assert {"run.json", "backbone.safetensors"} <= {path.name for path in run.iterdir()}
        assert not list(run.glob("state-*"))
    # A node that has never seen the runs is given them, and pretrains nothing.
    for record in (store / "records").iterdir():
        record.unlink()
    fresh = tmp_path / "cache2"
    fresh.mkdir()
    (fresh / "phantoms").symlink_to(cache / "phantoms")

    def given(order: work.Order) -> work.Order:
        return elsewhere(order) | {"options": {**order["options"], "cache": str(fresh)}}

    engine = Inline(given)
    job = bench_of(asked := options(store, cache))
    run = next(run for run in work.runs_of(job, job.cells()) if run.name.startswith("denoising"))
    order = given(work.order_of(job, asked, 1, "cpu"))
    worker._built = None
    answer = worker.pretrain(order, run.name, worker.finished_files(order, run.name))
    assert (
        answer["run"] == run.name
        and answer["files"]["run.json"] == (store / "runs" / run.name / "run.json").read_bytes()
    )
    assert not engine.done


def test_a_pretraining_that_fails_fails_its_cells_and_no_others(cache: Path, tmp_path: Path) -> None:
    asked = options(tmp_path / "store", cache, options=("pretrain.lr=1e30", "pretrain.steps=4"))
    with pytest.raises(CellsFailed) as failed:
        handed_out(Inline(), asked)
    assert len(failed.value.failed) == 2 and all(line.startswith("denoising") for line in failed.value.failed)
    assert len(outcome(tmp_path / "store")) == 2
    failures = bench_of(asked).store.failures()
    assert len(failures) == 2 and all(failure["run"].startswith("denoising") for failure in failures)


def test_a_lost_worker_is_a_failure_with_its_reason(cache: Path, tmp_path: Path) -> None:
    asked = options(tmp_path / "store", cache)
    with pytest.raises(CellsFailed, match="WorkerLost: the node is gone"):
        handed_out(Inline(denoising={"lost": "the node is gone"}), asked)
    assert handed_out(Inline(), asked).count(True) == 2  # the next call tries again
    assert not bench_of(asked).store.failures()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"release": "9.9"}, r"node \S+ has ssl3d \S+, the driver 9.9"),
        ({"code": [["pretraining", "denoising", "unet3d", "0" * 16]]}, "other code for the pretraining of denoising"),
        ({"code": [["pretraining", "mine", "unet3d", "0"]]}, 'cannot compute the pretraining of mine: .*"mine"'),
    ],
)  # fmt: skip
def test_a_worker_of_other_code_refuses_before_anything_else(
    change: dict[str, Any], said: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        handed_out(Inline(lambda order: order | change), options(tmp_path / "store", cache))
    assert not list((tmp_path / "store").glob("r*/*"))


def test_a_node_without_the_data_or_with_others_refuses(
    cache: Path, tmp_path: Path, volume_folder: Path
) -> None:
    asked = options(tmp_path / "store", cache, data=str(volume_folder))

    def absent(order: work.Order) -> work.Order:
        return order | {"options": {**order["options"], "data": str(tmp_path / "nowhere")}}

    def others(order: work.Order) -> work.Order:
        return order | {"options": {**order["options"], "data": "phantoms"}}

    with pytest.raises(ConfigError, match=r"node \S+: .*nowhere"):
        handed_out(Inline(absent), asked)
    with pytest.raises(ConfigError, match="its data, splits or settings are not the driver's"):
        handed_out(Inline(others), asked)


def test_a_store_that_another_cluster_writes_to_is_refused(cache: Path, tmp_path: Path) -> None:
    asked = options(tmp_path / "store", cache)
    ready, end = threading.Event(), threading.Event()

    def other() -> None:
        with Held(tmp_path / "store" / "locks" / "cluster.lock", wait=False) as mine:
            assert mine
            ready.set()
            end.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert ready.wait(60)
        with pytest.raises(
            BusyError, match=f"{tmp_path / 'store'} belongs to another bench on a cluster: .*{os.getpid()}"
        ):
            handed_out(Inline(), asked)
    finally:
        end.set()
        thread.join()


def test_a_worker_answers_no_files_outside_of_the_predictions(cache: Path, tmp_path: Path) -> None:
    asked = options(tmp_path / "store", cache)
    job = bench_of(asked)
    from ssl3d.bench.cluster.driver import _Settle

    cells = {work.cell_name(job, cell): cell for cell in job.cells()}
    engine = Inline()
    results = list(engine.results(_ordered(job, asked), work.runs_of(job, job.cells())))
    result = next(r for r in results if r.cell is not None)
    result.answer["files"]["predictions/../../escaped"] = b"x"
    with pytest.raises(RuntimeError, match="no prediction: predictions/../../escaped"):
        list(_Settle(job, cells)(result))
    assert not list(tmp_path.rglob("escaped"))


def _ordered(job: Any, asked: BenchOptions) -> work.Order:
    order = work.order_of(job, asked, 1, "cpu")
    mark = job.store.root / order["mark"]
    mark.parent.mkdir(parents=True)
    mark.touch()
    return order


def test_a_check_of_the_code_imports_no_torch(cache: Path, tmp_path: Path) -> None:
    job = bench_of(asked := options(tmp_path / "store", cache))
    order = {
        key: value for key, value in work.order_of(job, asked, 1, "cpu").items() if key in ("release", "code")
    }
    program = f"import sys; from ssl3d.bench.cluster.worker import check; check({order!r}); "
    program += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_task_that_is_a_python_object_is_refused(tmp_path: Path) -> None:
    from ssl3d.registry.registry import registry

    task = registry().tasks.get("ccc").load()
    with pytest.raises(ConfigError, match='The task "ccc" is a Python object'):
        work.plain(BenchOptions(tmp_path, tasks=(task,)))


def test_options_come_back_as_they_went(tmp_path: Path) -> None:
    asked = BenchOptions(
        tmp_path / "s", methods=("gvsl",), tasks=("shc",), task_data={"shc": tmp_path}, checkpoint={"gvsl": tmp_path / "r"},
        cache=tmp_path / "c", seeds=(1, 2), label_fractions=(0.5,), data=str(tmp_path),
    )  # fmt: skip
    values = work.plain(asked)
    back = work.options_of(values)
    assert work.plain(back) == values
    assert back.store == asked.store and back.checkpoint == asked.checkpoint and back.session == asked.session
