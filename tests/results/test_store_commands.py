"""``ssl3d store`` and what stands behind it: merging, staleness, export."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fresh import command_and_modules
from test_store import made_up_record

from ssl3d import source_hash as code
from ssl3d.bench import stale as provenance
from ssl3d.bench.stale import run_of, stale, stale_records
from ssl3d.cli import main
from ssl3d.config import load_settings
from ssl3d.errors import ConfigError, DataError, TrainingError
from ssl3d.files import write_all
from ssl3d.registry.registry import registry
from ssl3d.results.store import manage
from ssl3d.results.store.manage import export, find, merge
from ssl3d.results.store.record import canonical_json, identity_hash
from ssl3d.results.store.store import ResultStore, failure_of


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env={"COLUMNS": "200"})


def filled(root: Path, *records: dict[str, Any]) -> ResultStore:
    store = ResultStore(root)
    for record in records:
        store.write(record)
    return store


# --- Failures ---------------------------------------------------------------------------------------


def failed(record: dict[str, Any], created: str, **identity: Any) -> dict[str, Any]:
    head = {key: record[key] for key in ("schema", "method", "preset", "metric")}
    head["identity"] = {**record["identity"], **identity}
    return {**failure_of(head, TrainingError("loss = nan at step 3"), "s", None), "created": created}


def test_failures_of_cells_computed_since_with_other_settings_are_told_apart_and_forgotten(
    tmp_path: Path,
) -> None:
    record = {**made_up_record(), "created": "2026-02-01T00:00:00+00:00"}
    store = filled(tmp_path, record)
    store.write_failure(failed(record, "2026-01-01T00:00:00+00:00", budget={"steps": 99}))
    store.write_failure(failed(record, "2026-03-01T00:00:00+00:00", budget={"steps": 7}))  # fails still
    store.write_failure(failed(record, "2026-01-01T00:00:00+00:00", seed=5))
    listed = run("store", "ls", "--store", str(tmp_path)).output
    assert "2 cells failed; the same ssl3d bench tries again" in listed
    assert "1 cell failed and was computed since with other settings" in listed
    assert "budget.steps 99 -> 10" in listed
    gone = run("store", "prune", "--store", str(tmp_path))
    assert gone.exit_code == 0 and "1 failure forgotten" in gone.output
    assert sorted((f["identity"]["seed"], f["identity"]["budget"]["steps"]) for f in store.failures()) == [
        (0, 7), (5, 10),
    ]  # fmt: skip
    assert "0 failures forgotten" in run("store", "prune", "--store", str(tmp_path)).output
    assert len(store.records()[0]) == 1


# --- Merge ------------------------------------------------------------------------------------------


def test_merging_copies_what_is_new_and_keeps_what_is_known(tmp_path: Path) -> None:
    slower = {**made_up_record(seed=1), "cost": {"downstream_seconds": 99.0}}
    a = filled(tmp_path / "a", made_up_record(), made_up_record(seed=1))
    b = filled(tmp_path / "b", slower, made_up_record(seed=2))
    c = filled(tmp_path / "c", made_up_record(seed=2), made_up_record(seed=3))
    before = a.path_for(slower["identity"]).read_bytes()
    merged = merge(a, [b, c])
    assert (merged.copied, merged.known, merged.conflicts, merged.problems) == (2, 2, [], [])
    assert a.path_for(slower["identity"]).read_bytes() == before, "other timings are no other result"
    assert sorted(r["identity"]["seed"] for r in a.records()[0]) == [0, 1, 2, 3]
    for source, seeds in ((b, {1, 2}), (c, {2, 3})):
        assert {r["identity"]["seed"] for r in source.records()[0]} == seeds, "sources stay as they are"


def test_two_results_for_one_identity_are_named_and_neither_is_touched(tmp_path: Path) -> None:
    a = filled(tmp_path / "a", made_up_record())
    b = filled(tmp_path / "b", made_up_record(score=51.0), made_up_record(seed=1))
    (tmp_path / "b" / "records" / "broken-0.json").write_text("{")
    result = run("store", "merge", str(a.root), str(b.root))
    assert result.exit_code == 1
    for part in ("1 record copied", "scores 50.0 and 51.0", "differing in score, per_case", "broken-0.json"):
        assert part in result.output
    assert {r["score"] for r in a.records()[0] if r["identity"]["seed"] == 0} == {50.0}
    missing = run("store", "merge", str(a.root), str(tmp_path / "nowhere"))
    assert missing.exit_code == 2 and "nowhere" in missing.output


def test_merging_leaves_cells_that_another_process_holds_for_the_end(tmp_path: Path) -> None:
    a, b = ResultStore(tmp_path / "a"), filled(tmp_path / "b", *(made_up_record(seed=s) for s in range(4)))
    held = made_up_record(seed=2)
    claimed, done = threading.Event(), []

    def bench() -> None:
        with a.claim(held["identity"]):
            claimed.set()
            while len(list(a.folder.glob("*.json"))) < 3:
                time.sleep(0.01)
            a.write({**held, "cost": {"downstream_seconds": 5.0}})
            done.append(True)

    thread = threading.Thread(target=bench)
    thread.start()
    claimed.wait()
    merged = merge(a, [b])
    thread.join()
    assert done and (merged.copied, merged.known, merged.conflicts) == (3, 1, [])
    assert a.read(a.path_for(held["identity"]))["cost"], "the bench's record stays"


def test_merging_replaces_a_damaged_record_and_keeps_it_as_evidence(tmp_path: Path) -> None:
    a, b = filled(tmp_path / "a", made_up_record()), filled(tmp_path / "b", made_up_record())
    path = a.path_for(made_up_record()["identity"])
    path.write_bytes(path.read_bytes()[:-20])
    assert merge(a, [b]).copied == 1
    assert a.has(made_up_record()["identity"]) and path.with_name(path.name + ".damaged").exists()


def test_merging_into_a_store_that_is_not_there_makes_it(tmp_path: Path) -> None:
    b = filled(tmp_path / "b", made_up_record())
    assert merge(ResultStore(tmp_path / "new"), [b]).copied == 1
    assert len(ResultStore(tmp_path / "new").records()[0]) == 1


def test_merging_goes_by_what_a_record_says_not_by_the_rest_of_its_name(tmp_path: Path) -> None:
    a, b = ResultStore(tmp_path / "a"), filled(tmp_path / "b", *(made_up_record(seed=s) for s in range(2)))
    paths = [b.path_for(made_up_record(seed=s)["identity"]) for s in range(2)]
    paths[0].rename(b.folder / f"renamed-{paths[0].stem.rpartition('-')[2]}.json")
    (b.folder / f"copy-{paths[1].stem.rpartition('-')[2]}.json").write_bytes(paths[1].read_bytes())
    merged = merge(a, [b])
    assert (merged.copied, merged.known, merged.problems) == (2, 1, [])
    assert {path.name for path in a.folder.iterdir()} == {path.name for path in paths}


def test_merging_compares_cases_only_where_they_differ_and_names_those_that_are_none(tmp_path: Path) -> None:
    records = [{**made_up_record(seed=s), "scored": 1} for s in range(4)]
    same, slower, scored, odd = (made_up_record(seed=s)["identity"] for s in range(4))
    a, b = filled(tmp_path / "a", *records), filled(tmp_path / "b", *records)
    b.write({**records[1], "cost": {"downstream_seconds": 9.0}}, replace=True)
    b.write({**records[2], "per_case": [{"case": "ct_1", "dsc": 0.25}]}, replace=True)
    body = canonical_json({**records[3], "per_case": [{"no": "case"}], "cost": None})
    digest = hashlib.sha256(body.encode()).hexdigest()
    b.path_for(odd).write_text(f'{{"record_sha256":"{digest}",{body[1:]}\n')
    before = {path: path.read_bytes() for path in a.folder.iterdir()}
    merged = merge(a, [b])
    assert (merged.copied, merged.known) == (0, 2), (same, slower)
    assert len(merged.conflicts) == 1 and "differing in per_case: " in merged.conflicts[0]
    assert a.path_for(scored).name in merged.conflicts[0]
    assert len(merged.problems) == 1 and a.path_for(odd).name in merged.problems[0]
    assert {path: path.read_bytes() for path in a.folder.iterdir()} == before


def test_merging_writes_the_bytes_that_were_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is damaged meanwhile is not copied so; a batch has as many bytes as memory is meant for them."""
    b = filled(tmp_path / "b", *(made_up_record(seed=s) for s in range(5)))
    whole = {path.name: path.read_bytes() for path in b.folder.iterdir()}
    sizes = []

    def write(files: dict[Path, bytes]) -> None:
        sizes.append(len(files))
        for path in files:
            (b.folder / path.name).write_bytes(b"")
        write_all(files)

    monkeypatch.setattr(manage, "write_all", write)
    monkeypatch.setattr(manage, "_TOGETHER_BYTES", 2 * max(map(len, whole.values())) - 1)
    assert merge(ResultStore(tmp_path / "a"), [b]).copied == 5
    assert sizes == [2, 2, 1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "a" / "records").iterdir()} == whole


def test_merging_removes_locks_of_finished_cells_that_a_killed_process_left(tmp_path: Path) -> None:
    a, b = ResultStore(tmp_path / "a"), filled(tmp_path / "b", made_up_record())
    merge(a, [b])
    locks = [a.root / "locks" / f"{identity_hash(made_up_record(seed=s)['identity'])}.lock" for s in range(2)]
    for lock in locks:
        lock.touch()
    assert merge(a, [b]).known == 1
    assert not locks[0].exists() and locks[1].exists(), "one of a cell that is not there yet may be needed"


# --- Look into --------------------------------------------------------------------------------------


def test_verify_names_every_bad_record(tmp_path: Path) -> None:
    store = filled(tmp_path, made_up_record(), made_up_record(seed=1))
    assert run("store", "verify", "--store", str(tmp_path)).exit_code == 0
    victim = store.path_for(made_up_record()["identity"])
    victim.write_bytes(victim.read_bytes().replace(b'"score":50.0', b'"score":99.0'))
    (tmp_path / "records" / "old.json").write_text(json.dumps({**made_up_record(), "schema": 0}))
    result = run("store", "verify", "--store", str(tmp_path))
    assert result.exit_code == 1
    for part in (
        "1 record is sound, 2 are not",
        victim.name,
        "altered after it was written",
        "old.json",
        "schema 0",
    ):
        assert part in result.output
    empty = run("store", "verify", "--store", str(tmp_path / "empty"))
    assert empty.exit_code == 2 and "does not exist" in empty.output


def test_show_finds_a_record_by_its_hash(tmp_path: Path) -> None:
    store = filled(tmp_path, made_up_record(), made_up_record(seed=1))
    digest = identity_hash(made_up_record()["identity"])
    result = run("store", "show", digest[:8], "--store", str(tmp_path))
    assert result.exit_code == 0 and '"score": 50.0' in result.output and "1 case (" in result.output
    assert "ct_1" in run("store", "show", digest, "--store", str(tmp_path), "--cases").output
    path = store.path_for(made_up_record()["identity"])
    assert find(store, str(path)) == find(store, path.name) == find(store, path.stem) == path
    with pytest.raises(DataError, match='No record in .* is called "zzz"'):
        find(store, "zzz")
    with pytest.raises(DataError, match="No record"):
        find(store, "")
    first = {p.stem.rpartition("-")[2][0] for p in store.folder.glob("*.json")}
    if len(first) == 1:
        with pytest.raises(DataError, match="names 2 records"):
            find(store, first.pop())


def test_tables_test_against_the_best_method_too(tmp_path: Path) -> None:
    levels = {"scratch": 40.0, "gvsl": 50.0, "byol": 45.0}
    records = [
        made_up_record(method, seed=seed, score=score + seed * shift)
        for (method, score), shift in zip(levels.items(), (0.5, 0.2, -0.3), strict=True)
        for seed in range(3)
    ]
    for record in records:
        record["per_case"] = [{"case": str(i), "dsc": record["score"] / 100 + i / 50} for i in range(6)]
    filled(tmp_path, *records)
    arguments = ["table", "--store", str(tmp_path), "--format", "markdown"]
    assert "p: against scratch" in run(*arguments, "--with", "p").output
    assert "p: against the best of the column" in run(*arguments, "--with", "p", "--reference", "best").output
    assert run(*arguments, "--with", "p", "--reference", "worst").exit_code == 2
    power = run(*arguments, "--with", "power", "--difference", "2").output
    assert "To show a difference of 2 points" in power and "3 seeds" in power
    assert run(*arguments, "--difference", "2").exit_code == 2, "an option without effect"


# --- Stale ------------------------------------------------------------------------------------------

METHOD_SOURCE = '''
"""A method."""
WEIGHT = 1.0  # of the loss

class Method:
    weight = WEIGHT
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The source of a method that stands in the place of GVSL."""
    path = tmp_path / "plugin" / "made_up_method.py"
    path.parent.mkdir()
    path.write_text(METHOD_SOURCE)
    monkeypatch.syspath_prepend(str(path.parent))
    entries = registry().methods
    entry = replace(entries.get("gvsl"), source="made_up_method:Method")
    monkeypatch.setitem(entries._entries, "gvsl", entry)
    code.forget()
    yield path
    code.forget()


def telling(**changes: Any) -> dict[str, Any]:
    """A record that knows its code and settings."""
    record = made_up_record()
    record["identity"] |= {"split_cases": "s", "pretrain": {"data": "d", "budget": {"steps": 8}}}
    record["identity"]["backbone"] = {"name": "unet3d"}
    record["code"] = {
        "pretrain": code.pretraining_code("gvsl", "unet3d"),
        "downstream": code.evaluation_code("Segmentation", "unet3d"), "problem": "Segmentation",
    }  # fmt: skip
    settings = load_settings("smoke", ["downstream.linear.penalty=0.5"])
    record["run"] = run_of(settings, "phantoms", None, None, registry().tasks.get("shc").load())
    record["created"] = "2026-01-01"
    record["identity"] |= changes
    return record


def test_code_is_stale_when_its_meaning_changes(module: Path) -> None:
    record = telling()
    assert record["run"]["overrides"] == {"downstream.linear.penalty": 0.5}
    assert stale(record) == [], "an override of the preset is no change of it"
    for text, reasons in (
        (METHOD_SOURCE.replace("# of the loss", "# of another").replace("A method", "One"), []),
        (METHOD_SOURCE.replace("1.0", "2.0"), ["code of pretraining changed"]),
    ):
        module.write_text(text)
        code.forget()
        assert stale(record) == reasons
    module.unlink()
    code.forget()
    importlib.invalidate_caches()
    assert stale(record) == ["code of pretraining changed"], "a plugin that is gone"
    scratch = {**record, "method": {**record["method"], "trains": "none"}}
    assert stale(scratch) == [], "scratch has no pretraining whose code could matter"
    given = {**record, "identity": {**record["identity"], "weights": "abc"}}
    assert stale(given) == [], "given weights are what they are, whatever code made them"
    old = {**record, "code": {"pretrain": "p", "downstream": "d", "modules": []}}
    assert stale(old) == ["code of pretraining changed", "code of evaluation changed"]
    assert stale(made_up_record()) is None, "an older record cannot tell"


def test_a_changed_preset_is_named(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = telling()
    changed = load_settings(
        "smoke",
        [
            "pretrain.lr=0.7",
            "pretrain.workers=9",
            "downstream.linear.penalty=0.1",
            "downstream.finetune.lr=0.1",
        ],
    )
    monkeypatch.setattr(provenance, "load_settings", lambda preset: changed)
    then = record["run"]["settings"]["pretrain"]["lr"]
    assert stale(record) == [f"pretrain.lr {then} -> 0.7"], (
        "the mode's rate was overridden, the other mode is another's"
    )


def test_the_rate_that_a_method_was_trained_with_counts_not_where_it_was_written(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = telling()
    name, rate = record["identity"]["method"], record["run"]["settings"]["pretrain"]["lr"]
    there = ["pretrain.lr=0.7", f"method_lr.{name}={rate}", "downstream.linear.penalty=0.5"]
    monkeypatch.setattr(provenance, "load_settings", lambda preset: load_settings("smoke", there))
    assert stale(record) == []
    there[1] = f"method_lr.{name}=0.6"
    assert stale(record) == [f"pretrain.lr {rate} -> 0.6"]
    named = load_settings("smoke", [*there, "pretrain.lr=0.6"]).model_copy(update={"method_lr": {}})
    run = run_of(named, "phantoms", None, None, registry().tasks.get("shc").load())
    assert run["overrides"] == {"pretrain.lr": 0.6, f"method_lr.{name}": None}
    assert stale({**record, "run": run}) == [], "the preset's rate was set aside"


def test_changed_data_at_one_place_are_stale(module: Path) -> None:
    old, new = telling(), {**telling(task_data="new data"), "created": "2026-02-01"}
    other = telling(seed=1, task_data="its own")
    assert stale_records([old, new, other]) == {0: ["data of shc changed"], 1: [], 2: []}
    pretrained = {**telling(pretrain={"data": "e", "budget": {"steps": 8}}), "created": "2026-02-01"}
    assert stale_records([pretrained, old]) == {0: [], 1: ["data of pretraining changed"]}
    elsewhere = {**new, "run": {**new["run"], "task_data": "/another/release"}}
    assert stale_records([old, elsewhere]) == {0: [], 1: []}


def test_the_listing_shows_what_is_stale(module: Path, tmp_path: Path) -> None:
    filled(tmp_path / "s", telling(), telling(seed=1), made_up_record(method="byol"))
    listing = run("store", "ls", "--store", str(tmp_path / "s"))
    assert listing.exit_code == 0
    assert listing.output.count("current") == 2 and listing.output.count("unknown") == 1
    module.write_text(METHOD_SOURCE.replace("1.0", "2.0"))
    code.forget()
    listing = run("store", "ls", "--store", str(tmp_path / "s"), "--stale")
    assert "2 of 3 records; 2 stale, 1 that cannot tell" in listing.output
    assert "stale: code of pretraining changed" in listing.output and "byol" not in listing.output
    assert "1 of 3" in run("store", "ls", "--store", str(tmp_path / "s"), "--method", "byol").output


def test_the_listing_needs_no_torch_and_keeps_no_cases(tmp_path: Path) -> None:
    """Which has 700 MiB; ten thousand records have less."""
    filled(tmp_path / "s", made_up_record())
    printed, imported = command_and_modules("store", "ls", "--store", str(tmp_path / "s"))
    assert "1 of 1 record" in printed and "torch" not in imported
    kept, _ = ResultStore(tmp_path / "s").records(lazy=True, keep=lambda record: record["identity"])
    assert kept == [made_up_record()["identity"]]


# --- Export -----------------------------------------------------------------------------------------


def test_csv_export_has_every_record_and_every_case(tmp_path: Path) -> None:
    records, _ = filled(tmp_path / "s", *(made_up_record(seed=s) for s in range(3))).records()
    assert export(records, tmp_path / "r.csv") == 3
    lines = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert {(x["method"], x["seed"], x["score"], x["budget"]) for x in lines} == {
        ("gvsl", str(s), "50.0", '{"steps":10}') for s in range(3)
    }
    assert all(len(x["record_sha256"]) == 64 for x in lines)
    result = run(
        "store", "export", "--store", str(tmp_path / "s"), "--out", str(tmp_path / "c.csv"), "--what", "cases"
    )
    assert result.exit_code == 0
    cases = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [(x["case"], x["dsc"], x["LV.hd95_mm"]) for x in cases] == [("ct_1", "0.5", "")] * 3
    refused = run("store", "export", "--store", str(tmp_path / "s"), "--out", str(tmp_path / "c.xlsx"))
    assert refused.exit_code == 2 and "neither .csv nor .parquet" in refused.output
    with pytest.raises(ConfigError, match='Did you mean "cases"'):
        export(records, tmp_path / "x.csv", "case")


def test_parquet_without_pyarrow_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"ssl3d\[parquet\]"):
        export([made_up_record()], tmp_path / "r.parquet")
    assert not (tmp_path / "r.parquet").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None,
    reason='pyarrow is not installed: pip install "ssl3d[parquet]"',
)
def test_parquet_comes_back(tmp_path: Path) -> None:
    import pyarrow.parquet

    with_cost = {**made_up_record(seed=1), "cost": {"device": "CPU"}}
    export([made_up_record(), with_cost], tmp_path / "r.parquet")
    back = pyarrow.parquet.read_table(tmp_path / "r.parquet").to_pylist()
    assert [(r["seed"], r["score"], r["device"]) for r in back] == [(0, 50.0, None), (1, 50.0, "CPU")]
