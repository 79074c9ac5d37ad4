"""Stores, caches, runs and outputs that are read-only, and lock files that are none."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from faults.commands import Outcome, command
from faults.damage import FULL
from faults.world import words
from ssl3d.pretrain.run_folder import LOCK

pytestmark = pytest.mark.timeout(1800 if FULL else 600)


@contextmanager
def sealed(folder: Path) -> Iterator[None]:
    """Make a folder read-only, as the system does it: for root by a mount, for others by permissions."""
    if os.geteuid():
        modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*")) if not path.is_symlink()}
        for path, mode in modes.items():
            path.chmod(mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
        try:
            yield
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        return
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("mounts a folder read-only")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


READS: dict[str, tuple[str, ...]] = {
    "bench TINY CELL --store WORLD/store --cache WORLD/cache": ("store", "cache"),
    "bench TINY CELL --store OUT/store --cache WORLD/cache": ("cache",),
    "bench TINY --methods denoising --tasks ccc --modes linear --seeds 0 --checkpoint denoising=WORLD/run --store OUT/store "
    "--cache WORLD/cache": ("run", "cache"),
    "table --store WORLD/store": ("store",), "table --store WORLD/store --format csv --with ci": ("store",),
    "report --store WORLD/store --out OUT/report.html": ("store",), "store ls --store WORLD/store": ("store",),
    "store verify --store WORLD/store": ("store",), "store export --store WORLD/store --out OUT/records.csv": ("store",),
    "store merge OUT/store WORLD/store": ("store",),
    "data verify WORLD/volumes": ("volumes",),
    "data prepare WORLD/volumes --spacing 6.4 --cache OUT/cache": ("volumes",),
    "pretrain TINY --method rotation --data WORLD/volumes --out OUT/run --cache WORLD/cache": ("cache", "volumes"),
    "pretrain TINY --method denoising --data WORLD/volumes --out WORLD/run --cache WORLD/cache --resume": ("cache", "run"),
    "export --checkpoint WORLD/run --to torch --out OUT/export": ("run",),
    "finetune TINY --checkpoint WORLD/run --task ccc --mode linear --out OUT/p --cache WORLD/cache": ("run", "cache"),
    "predict --checkpoint WORLD/predictor --input WORLD/scans --out OUT/o --device cpu": ("predictor", "scans"),
    "cache ls --cache WORLD/cache": ("cache",), "cache verify --cache WORLD/cache": ("cache",),
    "cache prune --cache WORLD/cache": ("cache",),
}  # fmt: skip
SOME_READS = list(READS) if FULL else list(READS)[::9]


def run(world: Path, tmp_path: Path, text: str, *places: str) -> Outcome:
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(sealed(world / place))
        outcome = command(*words(text, world, tmp_path))
    assert "Traceback" not in outcome.output and "fault of ssl3d" not in outcome.output, outcome
    return outcome


def test_commands_that_read_work_on_what_is_read_only(
    world: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("trials", len(SOME_READS))
    faults = []
    for number, text in enumerate(SOME_READS):
        out = tmp_path / str(number)
        out.mkdir()
        outcome = run(world, out, text, *READS[text])
        if outcome.status != 0:
            faults.append(f"{text}: {outcome}")
    assert not faults, "\n".join(faults)


WRITES: dict[str, str] = {
    "pretrain TINY --method denoising --data WORLD/volumes --out WORLD/volumes/run --cache WORLD/cache": "volumes",
    "pretrain TINY --method denoising --data WORLD/volumes --out WORLD/stopped --cache WORLD/cache --resume": "stopped",
    "bench TINY CELL --store WORLD/volumes/store --cache WORLD/cache": "volumes",
    "bench TINY --methods denoising --tasks ccc --modes linear --seeds 0 --store WORLD/store --cache WORLD/cache": "store",
    "data prepare WORLD/volumes --spacing 7 --cache WORLD/cache": "cache",
    "data verify WORLD/volumes --out WORLD/volumes/out": "volumes",
    "export --checkpoint WORLD/run --to safetensors --out WORLD/run/export": "run",
    "finetune TINY --checkpoint WORLD/run --task ccc --mode linear --out WORLD/run/p --cache WORLD/cache": "run",
    "predict --checkpoint WORLD/predictor --input WORLD/volumes --out WORLD/volumes/o --device cpu": "volumes",
    "report --store WORLD/store --out WORLD/store/report.html": "store",
    "store export --store WORLD/store --out WORLD/store/records.csv": "store",
    "store merge WORLD/volumes/other WORLD/store": "volumes",
    "cache prune --cache WORLD/cache --days 0 --yes": "cache", "new-method mine --out WORLD/volumes/mine": "volumes",
}  # fmt: skip
SOME_WRITES = list(WRITES) if FULL else list(WRITES)[1::5]


def test_commands_that_write_say_what_is_read_only(
    world: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("trials", len(SOME_WRITES))
    faults = []
    for text in SOME_WRITES:
        outcome = run(world, tmp_path, text, WRITES[text])
        place = str(world / WRITES[text])
        if outcome.status != 2 or place not in outcome.output or "Fix: " not in outcome.output:
            faults.append(f"{text}: {outcome}")
    assert not faults, "\n".join(faults)


LOCKS: dict[str, tuple[Callable[[Path, Path], object], bool]] = {
    "a link to a file": (lambda lock, precious: lock.symlink_to(precious), False),
    "a broken link": (lambda lock, precious: lock.symlink_to(precious.with_name("gone")), False),
    "a link to itself": (lambda lock, _: lock.symlink_to(lock.name), False),
    "a link to a device": (lambda lock, _: lock.symlink_to("/dev/zero"), False),
    "a pipe": (lambda lock, _: os.mkfifo(lock), False), "a folder": (lambda lock, _: lock.mkdir(), False),
    "of a process that was killed": (lambda lock, _: lock.write_text("process 1 on elsewhere\n"), True),
    "of bytes": (lambda lock, _: lock.write_bytes(bytes(range(256)) * 100), True),
}  # fmt: skip
"""How a lock is odd, and whether the command goes on."""
GOES_ON = "pretrain TINY --method denoising --data WORLD/volumes --out OUT/run --cache WORLD/cache --resume"
COMPUTES = "bench TINY CELL --store OUT/store --cache WORLD/cache"


@pytest.mark.parametrize("odd", LOCKS if FULL else list(LOCKS)[::5])
@pytest.mark.parametrize("kind", ["run", "cell"] if FULL else ["run"])
def test_a_lock_that_is_odd_is_named_or_taken(world: Path, tmp_path: Path, kind: str, odd: str) -> None:
    make, taken = LOCKS[odd]
    precious = tmp_path / "precious"
    precious.write_text("kept")
    if kind == "run":
        shutil.copytree(world / "stopped", tmp_path / "run")
        lock, text = tmp_path / "run" / LOCK, GOES_ON
    else:
        (record,) = (world / "store" / "records").glob("*.json")
        (tmp_path / "store" / "locks").mkdir(parents=True)
        lock, text = (
            tmp_path / "store" / "locks" / f"{record.stem.rpartition('-')[2]}.lock",
            COMPUTES,
        )
    make(lock, precious)
    outcome = run(world, tmp_path, text)
    assert precious.read_text() == "kept"
    if taken:
        assert outcome.status == 0 and not lock.exists(), outcome
    else:
        assert outcome.status == 2 and lock.name in outcome.output and "Fix: " in outcome.output, outcome
