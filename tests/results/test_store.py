"""The store: whole records or none, each cell once, whatever happens to the processes."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ssl3d.errors import DataError
from ssl3d.results.store.record import SCHEMA, Cases, canonical_json, encode_record, identity_hash
from ssl3d.results.store.store import ResultStore


def made_up_record(method: str = "gvsl", seed: int = 0, score: float = 50.0) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "identity": {
            "method": method, "method_config": {}, "backbone": {"name": "unet3d"}, "pretrain": None,
            "task": "shc", "task_data": "abc", "split": "test", "mode": "linear", "seed": seed,
            "label_fraction": 1.0, "budget": {"steps": 10},
        },
        "method": {"title": method.upper(), "trains": "encoder+decoder", "notes": []},
        "preset": "made-up",
        "metric": "dsc",
        "score": score,
        "per_case": [{"case": "ct_1", "dsc": score / 100, "structures": {"LV": {"hd95_mm": None}}}],
        "excluded": {},
    }  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "store")


def test_a_record_comes_back_as_it_went_in(store: ResultStore) -> None:
    record = made_up_record()
    assert not store.has(record["identity"])
    path = store.write(record)
    assert path == store.path_for(record["identity"])
    assert path.name == f"gvsl-shc-linear-s0-{identity_hash(record['identity'])}.json"
    assert store.has(record["identity"])
    back = store.read(path)
    assert len(back.pop("record_sha256")) == 64
    assert back == record
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_the_identity_decides_the_name_whatever_the_order_of_its_keys() -> None:
    identity = made_up_record()["identity"]
    assert identity_hash(dict(reversed(identity.items()))) == identity_hash(identity)
    for key in identity:
        assert identity_hash({**identity, key: "other"}) != identity_hash(identity), key


def test_a_finished_cell_is_not_overwritten(store: ResultStore) -> None:
    store.write(made_up_record())
    store.write(made_up_record())  # the same content twice is no conflict
    with pytest.raises(DataError, match="Two results for one identity"):
        store.write(made_up_record(score=60.0))
    path = store.write(made_up_record(score=60.0), replace=True)
    assert store.read(path)["score"] == 60.0


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    record = json.loads(data)
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "binary":
        path.write_bytes(b"\xff\x00\xfe")
    elif how == "altered":
        path.write_bytes(data.replace(b'"score":50.0', b'"score":99.0'))
    elif how == "no hash":
        del record["record_sha256"]
        path.write_text(json.dumps(record))
    elif how == "newer schema":
        path.write_text(json.dumps({**record, "schema": SCHEMA + 1}))
    elif how == "a list":
        path.write_text("[1, 2]")
    elif how == "renamed":
        path.rename(path.with_name("gvsl-shc-linear-s7-00000000000000000000.json"))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "perhaps truncated"), ("empty", "perhaps truncated"), ("binary", "not valid JSON"),
        ("altered", "altered after it was written"), ("no hash", "altered after it was written"),
        ("newer schema", "update ssl3d"), ("a list", "not a record"),
        ("renamed", "not the hash of its identity"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named_left_out_and_computed_again(
    store: ResultStore, how: str, said: str
) -> None:
    bad = store.write(made_up_record())
    store.write(made_up_record(seed=1))
    damage(bad, how)
    records, problems = store.records()
    assert [r["identity"]["seed"] for r in records] == [1]
    assert len(problems) == 1
    assert said in problems[0]
    assert str(bad.parent) in problems[0]
    assert not store.has(made_up_record()["identity"])
    store.write(made_up_record(score=51.0))
    assert {r["score"] for r in store.records()[0]} == {51.0, 50.0}
    if how != "renamed":
        assert bad.with_name(bad.name + ".damaged").exists(), "evidence is kept"


@pytest.mark.parametrize("how", ["truncated", "altered", "no hash", "newer schema", "renamed", "binary"])
def test_a_lazy_reader_finds_the_same_faults(store: ResultStore, how: str) -> None:
    bad = store.write({**made_up_record(), "scored": 1})
    store.write({**made_up_record(seed=1), "scored": 1})
    damage(bad, how)
    eager, lazy = store.records(), store.records(lazy=True)
    assert lazy == eager and len(lazy[0]) == len(lazy[1]) == 1


DECEITFUL: list[dict[str, Any]] = [
    {"facts": {"per_case": [1], "preset": "x"}},
    {"best": {"per_case": [{"a": 1}], "preset": "x"}},
    {"a": {"per_case": None}, "per_case": []},
    {"per_case": [{"case": "1", "list": [1, [2]], "preset": "mine"}]},
    {"per_case": [{"case": '],"preset":"x"', "per_case": [{"preset": [3]}], "z": [[]]}]},
    {"note": '"per_case":[1],"preset":2', "other": [1, 2]},
    {"other": [{"per_case": [0]}]},
    {"predictions": [], "note": '],"predictions":[]'},
    {"predictions": None, "best": {"per_case": [1], "predictions": 2}},
    {"best": {"run": {"schema": 1, "a": 2}}, "run": None},
    {"pretext": {"run": {"b": [1]}, "schema": 1}},
    {"note": '"run":{},"schema":2', "run": None},
]


@pytest.mark.parametrize("fields", DECEITFUL, ids=range(len(DECEITFUL)))
def test_a_lazy_record_is_the_eager_one(store: ResultStore, fields: dict[str, Any]) -> None:
    path = store.write({**made_up_record(), "scored": 1, **fields})
    assert store.read(path, lazy=True) == store.read(path)
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=4))
    assert store.read(path, lazy=True) == store.read(path), "reformatted"


def called(**data: Any) -> dict[str, Any]:
    settings = {"preset": "smoke", "data": data, "phantoms": {"schema": {"run": {}}}}
    return {"settings": settings, "overrides": {}, "data": "d", "task_data": None, "checkpoint": None}


def test_lazy_records_of_one_call_share_it(store: ResultStore) -> None:
    runs = [called(a=1), called(a=1), called(a=2)]
    for seed, run in enumerate(runs):
        store.write({**made_up_record(seed=seed), "scored": 1, "run": run})
    records = sorted(store.records(lazy=True)[0], key=lambda record: record["identity"]["seed"])
    assert [record["run"] for record in records] == runs
    assert records[0]["run"] is records[1]["run"], "thousands of records have the same one"
    assert records == sorted(store.records()[0], key=lambda record: record["identity"]["seed"])


@pytest.mark.parametrize("run", [{}, {"settings": 3}, {**called(), "data": 5}, {**called(), "settings": {}}])
def test_a_call_that_is_none_is_named_by_a_lazy_reader_too(store: ResultStore, run: dict[str, Any]) -> None:
    store.write(made_up_record(seed=1))
    body = canonical_json({**made_up_record(), "scored": 1, "run": run})
    digest = hashlib.sha256(body.encode()).hexdigest()
    path = store.path_for(made_up_record()["identity"])
    path.write_text(f'{{"record_sha256":"{digest}",{body[1:]}\n')
    for _ in range(2):
        (problem,) = store.records(lazy=True)[1]
        assert path.name in problem and 'the field "run.' in problem


def test_the_cases_of_a_lazy_record_behave_like_a_list(store: ResultStore) -> None:
    path = store.write({**made_up_record(), "scored": 1})
    cases, expected = store.read(path, lazy=True)["per_case"], made_up_record()["per_case"]
    assert isinstance(cases, Cases)
    assert len(cases) == 1 and cases[0] == expected[0] and list(cases) == expected and cases == expected
    assert isinstance(store.read(path)["per_case"], list)
    old = store.write(made_up_record(seed=9))
    assert isinstance(store.read(old, lazy=True)["per_case"], list), (
        "an older record needs a look at its cases"
    )


def test_a_reformatted_record_is_still_sound(store: ResultStore) -> None:
    path = store.write(made_up_record())
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=4))
    assert store.read(path)["score"] == 50.0


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("score", float("nan"), "not one test case could be scored"), ("score", "50", '"score"'),
        ("schema", 3, "schema is 3"), ("identity", {"method": "gvsl"}, '"identity.method_config"'),
        ("per_case", [{"dsc": 1.0}], 'no "case"'), ("method", {}, '"method.title"'),
        ("cost", {"seconds": [1.0, float("inf")]}, "cost.seconds.1 is not a finite number"),
    ],
)  # fmt: skip
def test_a_record_that_no_table_could_use_is_refused(
    store: ResultStore, field: str, value: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        store.write({**made_up_record(), field: value})
    assert not store.root.exists()


def test_no_store_an_empty_one_and_one_without_a_sound_record(store: ResultStore) -> None:
    with pytest.raises(DataError, match=r"does not exist.*ssl3d bench --store"):
        store.records()
    store.folder.mkdir(parents=True)
    with pytest.raises(DataError, match="holds no records"):
        store.records()
    (store.folder / "a-0.json").write_text("{")
    with pytest.raises(DataError, match=r"(?s)Not one record.*a-0\.json"):
        store.records()
    with pytest.raises(DataError, match="is a file"):
        ResultStore(store.folder / "a-0.json").records()


def test_names_that_are_no_file_names(store: ResultStore) -> None:
    path = store.write(made_up_record(method="../<script> of Ä"))
    assert path.parent == store.folder
    assert path.name.isascii()
    assert store.read(path)["identity"]["method"] == "../<script> of Ä"


def test_a_killed_writer_leaves_no_half_record(store: ResultStore) -> None:
    """Temporary files that a killed process leaves are not records."""
    path = store.write(made_up_record())
    (path.parent / f".{path.name}.123.tmp").write_bytes(encode_record(made_up_record(seed=5))[:50])
    records, problems = store.records()
    assert (len(records), problems) == (1, [])


HOLDER = """
import os, sys, time
from ssl3d.results.store.store import ResultStore
with ResultStore(sys.argv[1]).claim({"cell": 1}):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(30)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_a_killed_owner_frees_its_cell_even_when_its_children_live(store: ResultStore) -> None:
    process = start(HOLDER, str(store.root))
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with store.claim({"cell": 1}, wait=False) as held:
            assert not held
        with store.claim({"cell": 2}, wait=False) as held:
            assert held, "another cell is free"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with store.claim({"cell": 1}, wait=False) as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
    assert not list((store.root / "locks").iterdir())


WORKER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from ssl3d.results.store.store import ResultStore
from test_store import made_up_record
store = ResultStore(sys.argv[1])
for seed in range(25):
    record = made_up_record(seed=seed)
    with store.claim(record["identity"]):
        if not store.has(record["identity"]):
            time.sleep(0.01)
            store.write(record)
            print(seed, flush=True)
"""


def test_processes_that_share_a_store_compute_each_cell_once(store: ResultStore) -> None:
    workers = [start(WORKER, str(store.root), str(Path(__file__).parent)) for _ in range(3)]
    outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sorted(int(seed) for output in outputs for seed in output.split()) == list(range(25))
    assert len(store.records()[0]) == 25


def test_threads_of_one_process_exclude_each_other(store: ResultStore) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with store.claim({"cell": 1}):
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_claims_nest_but_not_on_themselves(store: ResultStore) -> None:
    with store.claim({"cell": 1}), store.claim({"run": 1}) as held:
        assert held
        with pytest.raises(RuntimeError, match="twice"), store.claim({"cell": 1}):
            pass
    with store.claim({"cell": 1}, wait=False) as held:
        assert held


def test_a_claim_is_given_back_after_an_error(store: ResultStore) -> None:
    with pytest.raises(ValueError, match="inside"), store.claim({"cell": 1}):
        raise ValueError("inside")
    with store.claim({"cell": 1}, wait=False) as held:
        assert held


MANY = """
import sys, time
from ssl3d.results.store.store import ResultStore
with ResultStore(sys.argv[1]).claim_many(sys.argv[2:]) as held:
    print(*sorted(held), flush=True)
    time.sleep(30)
"""
CELLS = [{"cell": n} for n in range(4)]
DIGESTS = [identity_hash(cell) for cell in CELLS]


def free(store: ResultStore) -> list[int]:
    """Return which cells another process may claim now."""
    script = (
        "import sys\n"
        "from ssl3d.results.store.store import ResultStore\n"
        "store = ResultStore(sys.argv[1])\n"
        "for n in range(4):\n"
        "    with store.claim({'cell': n}, wait=False) as held: print(n if held else '')"
    )
    return [int(n) for n in start(script, str(store.root)).communicate(timeout=60)[0].split()]


@pytest.mark.parametrize("links", [True, False])
def test_many_cells_are_claimed_at_once_but_not_those_of_others(
    store: ResultStore, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:  # exFAT has none
        monkeypatch.setattr(os, "link", none)
    entered, done = threading.Event(), threading.Event()

    def other() -> None:
        with store.claim(CELLS[1]):
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(60)
    with store.claim_many(DIGESTS) as held:
        assert held == {DIGESTS[0], DIGESTS[2], DIGESTS[3]}
        assert free(store) == []
        with pytest.raises(RuntimeError, match="twice"), store.claim(CELLS[2]):
            pass
    done.set()
    thread.join()
    assert free(store) == [0, 1, 2, 3]
    assert not list((store.root / "locks").iterdir())


def test_what_a_killed_owner_of_many_cells_leaves_are_cells_apart(store: ResultStore) -> None:
    """Its locks are one file; a process that frees one of them must not free another that it holds."""
    process = start(MANY, str(store.root), *DIGESTS)
    assert process.stdout is not None
    assert process.stdout.readline().split() == sorted(DIGESTS)
    assert free(store) == []
    process.kill()
    process.wait()
    assert len(list((store.root / "locks").iterdir())) == 4
    with store.claim(CELLS[0], wait=False) as one:
        with store.claim(CELLS[1], wait=False) as other:
            assert one and other
        assert free(store) == [1, 2, 3]
    assert not list((store.root / "locks").iterdir())


def test_results_never_import_anything_heavy() -> None:
    script = (
        "import sys, importlib, pkgutil, ssl3d.results as r\n"
        "for m in pkgutil.iter_modules(r.__path__): importlib.import_module(f'ssl3d.results.{m.name}')\n"
        "heavy = ('torch', 'monai', 'scipy', 'pandas', 'sklearn', 'numpy', 'rich')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    process = start(script)
    assert process.communicate(timeout=60)[0].strip() == "[]"
    assert process.returncode == 0


def test_reading_leaves_the_record_alone(store: ResultStore) -> None:
    record = made_up_record()
    before = copy.deepcopy(record)
    store.write(record)
    assert record == before
