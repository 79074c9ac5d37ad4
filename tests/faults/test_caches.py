"""Prepared volumes: what is damaged is noticed before anybody trains on it, and is built again."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result

from faults.damage import FULL, SOME, damage, flip
from faults.kills import CODES, Counter, refuse
from ssl3d.cli import main
from ssl3d.data.layouts.listing import list_cases
from ssl3d.data.prepared import arrays
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.steps import Preparation
from ssl3d.data.prepared.stored import hashing_all_sources
from ssl3d.errors import DataError
from ssl3d.registry.registry import registry


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three small volumes of unknown modality."""
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        voxels = rng.gamma(2, 40, (12, 13, 14)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.diag([2, 2, 2, 1])), folder / f"v{i}.nii")
    return folder


def built(source: Path) -> PreparedCohort:
    arrays._verified.clear()  # as in a new process
    dataset = registry().datasets.get("folder").load().open(source, False)
    listing = list_cases(dataset, source)
    preparation = Preparation(spacing_mm=2.0, scaling="minmax")
    return prepare(listing.cases, dataset, preparation, source.parent / "cache", workers=1)


def voxels(cohort: PreparedCohort) -> list[np.ndarray]:
    return [np.array(cohort.image(i)) for i in range(len(cohort))]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def mended(source: Path, before: list[np.ndarray]) -> bool:
    """Whether the damage was noticed, at once or when the volume was read, and the next call has the right voxels.

    Wrong voxels must never be seen.
    """
    noticed = False
    for _ in range(4):  # one damaged volume a call
        try:
            seen = voxels(built(source))
        except DataError as error:
            assert "prepared anew" in str(error)
            noticed = True
            continue
        assert same(seen, before)
        return noticed
    raise AssertionError("not mended")


def test_one_bit_of_a_stored_array_is_noticed_wherever_it_is(
    source: Path, record_property: Callable[[str, object], None]
) -> None:
    cohort = built(source)
    before, chosen = voxels(cohort), random.Random(0)
    record_property("trials", count := 300 if FULL else 12)
    for _ in range(count):
        path = cohort.folder / cohort.records[chosen.randrange(3)]["arrays"]["image"]["name"]
        good, data = path.read_bytes(), bytearray(path.read_bytes())
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        path.write_bytes(data)
        arrays._verified.clear()
        with pytest.raises(
            DataError, match=r"is damaged.*is now called .*damaged.*Fix: run the command again"
        ):
            voxels(cohort)
        path.write_bytes(good)
    assert same(voxels(built(source)), before)


@pytest.mark.parametrize("way", SOME, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["*.image.b2nd", "manifest.json", "*v1.json"])
def test_a_damaged_file_is_built_again(source: Path, way: Callable[[bytearray], None], name: str) -> None:
    cohort = built(source)
    before = voxels(cohort)
    damage(next(iter(sorted(cohort.folder.glob(name)))), way)
    if name == "*v1.json":
        damage(cohort.folder / "manifest.json", flip)  # else nobody looks at the note
    mended(source, before)
    assert same(voxels(built(source)), before)


def unsealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what the manifests in ``folder`` say of every image, and take their digests away."""
    for path in set(folder.glob("*.json")) - set(folder.glob("sources-*.json")):
        data = json.loads(path.read_text())
        data.pop("digest")
        for record in data.get("cases", [data]):
            change(record["arrays"]["image"])
        path.write_text(json.dumps(data))


CONTENTS: tuple[Any, ...] = (
    [], 3, None, {}, {"format": 1, "cases": []}, "x" * 1000, {"cases": None}, {"format": 1, "cases": [None]},
)  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_a_manifest_of_something_else_is_built_again(source: Path, content: object) -> None:
    before = voxels(built(source))
    for path in (source.parent / "cache").rglob("*.json"):
        path.write_text(json.dumps(content))
    assert same(voxels(built(source)), before)


@pytest.mark.parametrize("key, value", [
    ("name", "../../precious.b2nd"), ("name", 3), ("bytes", "many"), ("sha256", 7), ("sha256", "0" * 64),
])  # fmt: skip
def test_a_manifest_that_was_written_over_leads_nowhere(source: Path, key: str, value: object) -> None:
    """Without a digest, as of an earlier version or by an attacker: nothing outside of the folder is read."""
    cohort = built(source)
    before = voxels(cohort)
    unsealed(cohort.folder, lambda image: image.update({key: value}))
    mended(source, before)
    assert same(voxels(built(source)), before)


def test_pipes_and_devices_in_a_cache_hang_nobody(source: Path) -> None:
    cohort = built(source)
    before = voxels(cohort)
    names = [cohort.folder / "manifest.json", sorted(cohort.folder.glob("*v1.json"))[0]]
    for path in names:
        path.unlink()
    os.mkfifo(names[0])
    names[1].symlink_to("/dev/zero")
    assert same(voxels(built(source)), before)


def test_a_source_that_changed_behind_its_size_and_time(source: Path) -> None:
    cohort = built(source)
    path = source / "v1.nii"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-4:] = np.float32(1000).tobytes()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert built(source).fingerprint == cohort.fingerprint  # what is documented: size and time are looked at
    with hashing_all_sources():
        changed = built(source)
    assert changed.fingerprint != cohort.fingerprint
    assert not same(voxels(changed), voxels(cohort))
    assert built(source).fingerprint == changed.fingerprint  # once seen, it stays seen


def test_a_cache_that_is_read_only_is_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = voxels(built(source))
    for path in source.iterdir():
        os.utime(path)  # touched: the manifest would note the new time

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    from ssl3d import files

    monkeypatch.setattr(files, "_create", refused)
    assert same(voxels(built(source)), before)


def test_old_caches_without_digests_are_read(source: Path) -> None:
    cohort = built(source)
    before = voxels(cohort)
    unsealed(cohort.folder, lambda image: image.pop("sha256"))
    times = {path: path.stat().st_mtime_ns for path in cohort.folder.iterdir()}
    assert same(voxels(built(source)), before)
    assert {path: path.stat().st_mtime_ns for path in cohort.folder.iterdir()} == times


def test_refused_at_any_operation_of_a_preparation(
    source: Path, record_property: Callable[[str, object], None]
) -> None:
    """By the command, which explains whatever the system says."""
    cache = source.parent / "cache"

    def prepared() -> Result:
        arrays._verified.clear()
        return CliRunner().invoke(
            main, ["data", "prepare", str(source), "--spacing", "2", "--cache", str(cache)]
        )

    def stored() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in cache.rglob("*.b2nd")}

    with Counter(source.parent, 0, refuse("ENOSPC")) as counter:
        assert prepared().exit_code == 0
    before = stored()
    points = range(1, counter.seen + 1) if FULL else (1, counter.seen // 2, counter.seen - 3)
    record_property("trials", len(points))
    for number, point in enumerate(points):
        shutil.rmtree(cache, ignore_errors=True)
        code = list(CODES)[number % len(CODES)]
        with Counter(source.parent, point, refuse(code)):
            result = prepared()
        said = result.exit_code == 2 and CODES[code] in result.output and "Fix: " in result.output
        assert result.exit_code == 0 or said, (code, point, result.output, result.exception)
        assert prepared().exit_code == 0 and stored() == before, (code, point)
