"""Tables and reports of many records; a first table from nothing; what a process of the bench holds before any data."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compare import Case, Run, Setting, Value, peer, processor_seconds

from ssl3d.results.formats.format import BUILTIN_FORMATS
from ssl3d.results.store.record import SCHEMA, encode_record
from ssl3d.results.store.store import ResultStore
from ssl3d.results.table.build import build_table

TASKS = {"shc": 7, "sac": 1, "ccc": 0, "sbm": 28}
"""Structures of each task; 0 is a classification."""
CASES = 12


# --- Made-up records ----------------------------------------------------------------------------------


def made_up_records(count: int, cases: int) -> Iterator[dict[str, Any]]:
    """Yield ``count`` records in the order of methods, tasks, modes and five seeds."""
    rng = random.Random(0)
    for number in range(count):
        cell, seed = divmod(number, 5)
        cell, mode = divmod(cell, 2)
        method, task = divmod(cell, len(TASKS))
        name, structures = list(TASKS.items())[task]
        yield made_up_record(
            rng, f"method_{method:03d}" if method else "scratch", name, structures, mode, seed, cases
        )


def made_up_record(
    rng: random.Random, method: str, task: str, structures: int, mode: int, seed: int, cases: int
) -> dict[str, Any]:
    score, pretrained = rng.random(), method != "scratch"

    def case(index: int) -> dict[str, Any]:
        if not structures:
            return {"case": str(index), "target": index % 2, "probability": rng.random()}
        one = {"dsc": score, "hd95_mm": 10 * rng.random(), "nsd": rng.random()}
        return {
            "case": str(index),
            "dsc": score,
            "structures": {f"structure {k}": one for k in range(structures)},
        }

    return {
        "schema": SCHEMA,
        "identity": {
            "method": method, "method_config": {"weight": 1.0, "momentum": 0.99},
            "backbone": {"name": "unet3d", "channels": [32, 64, 128, 256, 512]},
            "pretrain": {"data": "f" * 64, "budget": {"steps": 1000, "lr": 1e-4}} if pretrained else None,
            "pretrain_seed": seed if pretrained else None,
            "task": task, "task_data": "0" * 64, "split": "test", "split_cases": "0" * 12,
            "mode": ("linear", "finetune")[mode], "seed": seed, "label_fraction": 1.0,
            "budget": {"steps": 300, "lr": 1e-3, "batch_size": 1, "crop": [128, 128, 128]},
        },
        "method": {"title": method, "trains": "encoder+decoder", "notes": []},
        "preset": "made-up",
        "metric": "dsc" if structures else "auc",
        "score": 100 * score,
        "per_case": [case(index) for index in range(cases)],
        "scored": cases,
        "excluded": {},
        "validation": [{"step": 200 * k, "score": 100 * score} for k in range(20)],
        "created": "2025-01-01T00:00:00+00:00",
    }  # fmt: skip


def filled(folder: str, count: int) -> ResultStore:
    """Return a store of made-up records; not by its ``write``, which waits for the disk after each."""
    store = ResultStore(folder)
    store.folder.mkdir()
    for record in made_up_records(count, CASES):
        store.path_for(record["identity"]).write_bytes(encode_record(record))
    return store


# --- Tables and reports -------------------------------------------------------------------------------


def verified(store: ResultStore) -> Run:
    """Return the least that a trustworthy table does: read every record and hash it."""

    def run() -> None:
        for path in store.folder.iterdir():
            hashlib.sha256(path.read_bytes()).hexdigest()

    return run


def pandas_table(store: ResultStore) -> Run:
    """Return the table as a notebook makes it: every JSON into a frame, means by method, task and mode."""
    import pandas

    def run() -> str:
        rows = []
        for path in store.folder.iterdir():
            record = json.loads(path.read_text())
            identity = record["identity"]
            rows.append(
                {key: identity[key] for key in ("method", "task", "mode", "seed")}
                | {"score": record["score"]}
            )
        frame = pandas.DataFrame(rows)
        table = frame.pivot_table(
            index="method", columns=["task", "mode"], values="score", aggfunc=["mean", "std"]
        )
        return str(table.to_string())

    return lambda: run() == ""


def table(setting: Setting) -> Iterator[Case]:
    """Ours verifies every record; a notebook does not."""
    count = setting.of(10_000, 40)
    rich = next(form for form in BUILTIN_FORMATS if form.name == "rich")
    with tempfile.TemporaryDirectory() as folder:
        store = filled(folder, count)

        def ours() -> None:
            records, problems = store.records(lazy=True)
            assert len(records) == count and not problems
            rich.render(build_table(records, against="paper"))

        yield Case(
            f"ssl3d table of {count} records", ours, {"pandas, unverified": peer(lambda: pandas_table(store))},
            bound=("reading and hashing them", verified(store)), rounds=3,
        )  # fmt: skip


def report(setting: Setting) -> Iterator[Case]:
    """Its peer writes the table alone."""
    from ssl3d.report.data import report_data
    from ssl3d.report.page import render

    count = setting.of(10_000, 40)
    with tempfile.TemporaryDirectory() as folder:
        store = filled(folder, count)

        def ours() -> None:
            data, problems = report_data(store)
            assert not problems
            (Path(folder) / "report.html").write_text(render(data, "Made-up records"), encoding="utf-8")

        yield Case(
            f"ssl3d report of {count} records", ours, {"pandas, the table alone": peer(lambda: pandas_table(store))},
            bound=("reading and hashing them", verified(store)), rounds=3,
        )  # fmt: skip


# --- From nothing to a table --------------------------------------------------------------------------


def command(*arguments: str) -> str:
    """Run ``ssl3d`` in a process of its own, on one thread, and return its output."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ssl3d", *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"ssl3d {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def bench(setting: Setting) -> Iterator[Case]:
    """One of the three seeds of `make bench`, phantoms included. The peer is what the same steps take in the plain form,
    timed here: GVSL's released step, and linear probes trained with the backbone in each of as many steps as fine-tuning
    has. The limit is the time of the network's passes alone.
    """
    from rows.evaluation import labelled
    from rows.networks import gvsl_pair, pass_of, plain, released_step, step_of
    from ssl3d.config import load_settings

    preset, tasks = setting.of(("demo", ("shc", "sac", "ccc", "sbm")), ("smoke", ("shc",)))
    settings = load_settings(preset)
    channels, (edge, *_), steps = (
        tuple(settings.backbone.options["channels"]),
        settings.pretrain.crop,
        settings.pretrain.steps,
    )

    def seconds(run: Run) -> float:
        run()
        began = processor_seconds()
        for _ in range(3):
            run()
        return (processor_seconds() - began) / 3

    ours, copied, views = gvsl_pair(channels, edge, settings.pretrain.batch_size // 2)
    released = seconds(step_of(copied, lambda v: released_step(copied, v), views))
    crops = torch.cat([views["a_seen"], views.get("b_seen", views["b"])])
    passes = seconds(pass_of(lambda x: ours.backbone(x)[1], crops, ours))
    network, volume = (
        plain(ours.backbone),
        torch.from_numpy(labelled(1, settings.downstream.crop[0]).images[0])[None, None],
    )
    with torch.no_grad():
        probed, evaluated = (
            seconds(lambda: network(volume) is None),
            seconds(lambda: ours.backbone(volume) is None),
        )
    cells = 2 * len(tasks)
    cases = sum(sum(settings.data.counts[task]) for task in tasks) * 2
    plainly = steps * released + cells * settings.downstream.finetune.steps * probed + cases * probed
    least = steps * passes + cases * evaluated

    def table_from_nothing() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command(
                "bench", "--preset", preset, "--modes", "linear", "--methods", "scratch,gvsl", "--tasks", ",".join(tasks),
                "--seeds", "0", "--jobs", "1", "--store", f"{folder}/store", "--cache", f"{folder}/cache",
            )  # fmt: skip

    yield Case(
        f"ssl3d bench --preset {preset}, {cells} cells, from nothing", table_from_nothing,
        {"plain form, its steps alone": lambda: Value(plainly)},
        bound=("the network's passes", lambda: Value(least)), rounds=1,
    )  # fmt: skip


BEFORE_DATA = """
import os, sys
from ssl3d.cli import main
import ssl3d.bench.plan as plan

def held(*_):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(int(status["VmHWM"].split()[0]) / 1024, flush=True)
    os._exit(0)

plan._prepared  # an AttributeError where it is called something else by now
plan._prepared = held
try:
    main(["bench", "--preset", "demo", "--methods", "scratch,gvsl", "--tasks", "shc,sac,ccc,sbm", "--store", sys.argv[1]])
finally:
    os._exit(1)  # the whole bench was run
"""
TORCH = """
import torch
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""
MONAI = TORCH.replace("import torch", "import torch, monai, timm.optim")


def process(setting: Setting) -> Iterator[Case]:
    """A CUDA build of torch maps some 400 MiB of libraries that all processes share."""

    def held(code: str) -> Run:
        def run() -> Value:
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", code, folder],
                    capture_output=True,
                    text=True,
                    check=True,
                )
            return Value(float(done.stdout.splitlines()[-1]))

        return run

    yield Case(
        "memory of ssl3d bench before any data", held(BEFORE_DATA),
        {"import torch, monai, timm": peer(lambda: held(MONAI))},
        bound=("import torch", held(TORCH)), unit="MiB", rounds=1,
    )  # fmt: skip
