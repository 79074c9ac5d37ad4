"""Damaged and malicious records: named and left out, and nothing outside of the store is read or written."""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import os
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from faults.damage import FULL, WAYS, damage
from faults.kills import CODES, Counter, kill, refuse
from faults.runs import forked
from ssl3d.bench.stale import stale_records
from ssl3d.cli import main
from ssl3d.config import load_settings
from ssl3d.errors import SSL3DError, WriteError
from ssl3d.registry.registry import registry
from ssl3d.report.data import report_data
from ssl3d.results.statistics.annotate import with_statistics
from ssl3d.results.store import manage
from ssl3d.results.store.manage import export
from ssl3d.results.store.record import SCHEMA, canonical_json, identity_hash
from ssl3d.results.store.store import ResultStore
from ssl3d.results.table.build import build_table
from ssl3d.spreadsheet import csv_text

SETTINGS = load_settings("smoke").model_dump(mode="json")
FORMATS = ("rich", "markdown", "latex", "html", "csv")
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2**70, 10**400, 1e308, "", "x", "<script>alert(1)</script>", "=cmd|' /C calc'!A0", "../../etc/passwd",
    "/etc/passwd", "\x1b[31m", "\ud800", [], [None], ["x"], [[]], {}, {"x": None}, {"": {}}, [{"case": "x", "step": "y"}],
    "x" * 10_000,
)  # fmt: skip


def whole(method: str = "gvsl", seed: int = 0) -> dict[str, Any]:
    """A record with every field that there is."""
    return {
        "schema": SCHEMA,
        "identity": {
            "method": method, "method_config": {"a": 1}, "backbone": {"name": "unet3d", "channels": [4, 8]},
            "pretrain": {"data": "d", "budget": {"lr": 0.1, "steps": 5}}, "pretrain_seed": seed, "pretrain_step": 3,
            "task": "shc", "task_data": "abc" * 8, "split": "test", "split_cases": "x", "mode": "linear", "seed": seed,
            "label_fraction": 1.0, "budget": {"steps": 10}, "match": {"by": "time", "steps": 5},
        },
        "method": {"title": method.upper(), "trains": "encoder+decoder", "notes": ["a note"]}, "preset": "made-up",
        "metric": "dsc", "score": 50.0 + seed, "scored": 2, "excluded": {"structures_empty_in_both": 1},
        "constant_output": False, "left_out": {"task": [{"id": "a", "problem": "b"}], "pretraining": []}, "overlap": [],
        "twins": [], "validation": [{"step": 1, "score": 0.2}, {"step": 2, "score": 0.3}], "best_step": 1,
        "per_case": [
            {"case": f"ct_{i}", "dsc": 0.4 + 0.1 * i, "structures": {"LV": {"dsc": 0.5, "hd95_mm": None}}} for i in (1, 2)
        ],
        "cost": {"pretrain_steps": 5, "pretrain_seconds": 1.5, "voxels_seen": 10, "pretrain_parameters": 3,
                 "pretrain_device": "CPU", "downstream_seconds": 1.0, "peak_memory_mib": 3.0, "device": "CPU"},
        "environment": {"versions": {"ssl3d": "0.1"}, "git_commit": "x"},
        "code": {"pretrain": "a", "downstream": "b", "problem": "Segmentation"},
        "run": {"data": "phantoms", "task_data": None, "checkpoint": None, "settings": SETTINGS, "overrides": {}},
        "created": "2026-01-01T00:00:00+00:00", "checkpoint": "runs/x", "fingerprint_of_weights": "f",
        "pretext": {"learned": True, "start": 1.0, "end": 0.5, "chance": 0.9, "held_back": "crops"},
        "predictions": [{"case": "ct_1", "prediction": "p.nii.gz", "image": "i.nii.gz", "truth": "t.nii.gz"}],
    }  # fmt: skip


def place(store: Path, record: Any, name: str | None = None) -> Path:
    """Write a record as an attacker would: with the right hash and the right name, whatever it holds."""
    try:
        text = canonical_json(record)
    except ValueError:
        text = json.dumps(record, sort_keys=True)
    try:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        own = identity_hash(record["identity"])
    except (TypeError, ValueError, KeyError, UnicodeEncodeError):
        digest, own = "0" * 64, "0" * 20
    path = store / "records" / (name or f"evil-{own}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f'{{"record_sha256":"{digest}",{text[1:]}\n'.encode("utf-8", "surrogatepass"))
    return path


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a record."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from paths(part, (*path, key))


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    record = copy.deepcopy(whole("evil"))
    node: Any = record
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = copy.deepcopy(value)
    return record


def used(store: Path, out: Path) -> None:
    """Do with a store all that people do; anything but an error of ssl3d's own is a fault."""
    opened = ResultStore(store)
    for lazy in (True, False):
        records, _ = opened.records(lazy=lazy)
        failures, _ = opened.sound_failures()
        stale_records(records)
        table = with_statistics(
            build_table(records, failures=failures), ["ci", "p", "rank", "cost", "labels", "tau"]
        )
        for name in FORMATS:
            text = registry().table_formats.get(name).load().render(table)
            assert name in ("rich", "csv", "latex") or "<script" not in text, f"a script in {name}"
            assert name != "rich" or "\x1b[31m" not in text, "the terminal obeys"
    report_data(opened, {"scratch": "Scratch", "gvsl": "GVSL"}, 2, 1.0)
    for what in ("records", "cases"):
        export(records, out / f"{what}.csv", what)


@pytest.mark.timeout(4 * 3600 if FULL else 600)
def test_every_field_of_a_record_may_hold_anything(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    every = [path for path in paths(whole()) if path[:2] != ("run", "settings") or len(path) < 5]
    trials = [(path, value) for path in every for value in HOSTILE]
    if not FULL:
        trials = random.Random(0).sample(trials, 30)
    record_property("trials", len(trials))
    faults = []
    for number, (path, value) in enumerate(trials):
        store = tmp_path / str(number)
        place(store, whole("scratch", 1), f"good-{identity_hash(whole('scratch', 1)['identity'])}.json")
        place(store, changed(path, value))
        try:
            used(store, tmp_path)
        except SSL3DError:
            pass  # named; the command ends with a message
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(line.filename).name}, line {line.lineno}"
            faults.append(
                f"{path} = {str(value)[:40]!r}: {type(error).__name__}: {str(error)[:100]} ({where})"
            )
    assert not faults, f"{len(faults)} of {len(trials)}:\n" + "\n".join(faults[:100])


CONTENTS: dict[str, bytes] = {
    "empty": b"", "brackets": b"[" * 100_000, "pairs": b'{"a":' * 100_000, "number": b"3", "list": b"[]", "null": b"null",
    "text": b'"x"', "object": b"{}", "binary": bytes(range(256)), "large number": b'{"score": 1' + b"0" * 5000 + b"}",
    "NaN": b'{"schema": 2, "score": NaN}', "zeros": bytes(10_000),
}  # fmt: skip


def ls(store: Path) -> Any:
    return CliRunner().invoke(main, ["store", "ls", "--store", str(store)])


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_no_record_is_named_and_left_out(tmp_path: Path, name: str) -> None:
    store = tmp_path / "store"
    place(store, whole("scratch", 1), f"good-{identity_hash(whole('scratch', 1)['identity'])}.json")
    for folder in ("records", "failures", "representation"):
        (store / folder).mkdir(exist_ok=True)
        (store / folder / f"evil-{name.replace(' ', '-')}.json").write_bytes(CONTENTS[name])
    used(store, tmp_path)
    opened = ResultStore(store)
    for lazy in (True, False):
        records, problems = opened.records(lazy=lazy)
        assert len(records) == 1 and len(problems) == 1 and "evil" in problems[0]
    assert len(opened.sound_failures()[1]) == 1
    result = ls(store)
    assert result.exit_code == 1 and "evil" in result.output and "Traceback" not in result.output


def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    store = tmp_path / "store"
    place(store, whole("scratch", 1), f"good-{identity_hash(whole('scratch', 1)['identity'])}.json")
    for folder in ("records", "failures", "representation"):
        (store / folder).mkdir(exist_ok=True)
        os.mkfifo(store / folder / "pipe.json")
        (store / folder / "device.json").symlink_to("/dev/zero")
        (store / folder / "loop.json").symlink_to("loop.json")
        (store / folder / "folder.json").mkdir()
        (store / folder / "sparse.json").touch()
        os.truncate(store / folder / "sparse.json", 2**40)
    used(store, tmp_path)
    records, problems = ResultStore(store).records(lazy=True)
    assert len(records) == 1 and len(problems) == 5
    assert ls(store).exit_code == 1


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_damaged_record_is_left_out(tmp_path: Path, way: Any) -> None:
    place(tmp_path, whole("scratch", 1), f"good-{identity_hash(whole('scratch', 1)['identity'])}.json")
    damage(place(tmp_path, whole()), way)
    for lazy in (True, False):
        records, problems = ResultStore(tmp_path).records(lazy=lazy)
        assert len(records) == 1 and len(problems) == 1


def sources(folder: Path) -> ResultStore:
    """A store of five records, one of them damaged."""
    for seed in range(5):
        path = place(folder, whole(seed=seed))
    path.write_bytes(path.read_bytes()[:-20])
    return ResultStore(folder)


def merged(target: Path, source: ResultStore) -> dict[str, bytes]:
    """Merge, three records at a time, and return what the target's folder of records then has; no lock is left."""
    manage._TOGETHER, together = 3, manage._TOGETHER
    try:
        found = manage.merge(ResultStore(target), [source])
    finally:
        manage._TOGETHER = together
    assert len(found.problems) == 1 and not found.conflicts
    assert not list((target / "locks").iterdir())
    return {path.name: path.read_bytes() for path in (target / "records").glob("*.json")}


@pytest.mark.parametrize("code", ["kill", *CODES])
def test_a_merge_that_is_killed_or_refused_at_any_operation_leaves_whole_records_and_is_finished_by_another(
    tmp_path: Path, code: str, record_property: Callable[[str, object], None]
) -> None:
    source = sources(tmp_path / "source")
    (tmp_path / "targets").mkdir()
    with Counter(tmp_path / "targets", 0, kill) as counter:
        expected = merged(tmp_path / "targets" / "0", source)
    assert len(expected) == 4
    points = range(1, counter.seen + 1)[:: 1 if FULL else 7]
    record_property("trials", len(points))
    for point in points:
        target = tmp_path / "targets" / f"{code}-{point}"

        def child(target: Path = target, point: int = point) -> None:
            with Counter(tmp_path / "targets", point, kill):
                merged(target, source)

        if code == "kill":
            assert forked(child) == -9, point
        else:
            with suppress(WriteError), Counter(tmp_path / "targets", point, refuse(code)):
                merged(target, source)
        for path in target.glob("records/*.json"):
            assert path.read_bytes() == expected[path.name], f"cut at operation {point}"
        assert merged(target, source) == expected, point


def test_a_record_names_no_file_outside_of_its_store(tmp_path: Path) -> None:
    secret = tmp_path / "secret.nii.gz"
    secret.write_text("secret")
    for name in ("../secret.nii.gz", str(secret), "a/../../secret.nii.gz"):
        store = tmp_path / f"store-{len(name)}"
        record = whole("scratch", 1)
        record["predictions"][0]["prediction"] = name
        place(store, record)
        with pytest.raises(SSL3DError, match=r"predictions.0.prediction"):
            ResultStore(store).records()
    record = whole("scratch", 1)
    place(tmp_path / "linked", record)
    for name in ("p.nii.gz", "i.nii.gz", "t.nii.gz"):
        (tmp_path / "linked" / name).symlink_to(secret)
    viewer = report_data(ResultStore(tmp_path / "linked"), {"scratch": "Scratch"}, 2, 1.0)[0]["viewer"]
    assert not viewer["volumes"] and not viewer["scenes"]


def test_no_cell_of_a_csv_is_a_formula() -> None:
    evil = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0"]
    text = csv_text(["name", "=x"], [{"name": name, "=x": -1.5} for name in evil])
    for row in list(csv.reader(io.StringIO(text)))[1:]:
        assert not row[0].startswith(("=", "+", "-", "@", "\t", "\r")) and row[1] == "-1.5"
    assert csv_text(["a"], [{"a": "-3.5"}, {"a": "+1e3"}]).splitlines() == ["a", "-3.5", "+1e3"]
