"""Preparation: voxels stay where they are, values become [0, 1], and a stored cohort is never wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar
from zlib import crc32

import nibabel
import numpy as np
import pytest
from grids import affine_of
from pydantic import ValidationError

from ssl3d.data.checks.file import read_labels, read_volume
from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.volume import Volume, write_volume
from ssl3d.data.layouts.releases import STOIC, Folder
from ssl3d.data.prepared.arrays import read_array
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.grids import isotropic_grid, resample, to_native_grid
from ssl3d.data.prepared.steps import Intensity, Preparation, lungs_mask, prepare_arrays
from ssl3d.errors import ConfigError, DataError

SHAPE = (20, 22, 24)
OBLIQUE = nibabel.eulerangles.euler2mat(0.2, -0.15, 0.3)
CT = Preparation(spacing_mm=2.0)


class Hearts(Dataset):
    """A data set of the simplest layout: images/X.nii.gz and labels/X.nii.gz, CT in HU."""

    name, summary, layout, modality, intensity_offset = "hearts", "test", "images/X.nii.gz", "ct", 1024.0
    label_values: ClassVar[Mapping[int, str]] = {500: "ventricle", 205: "muscle"}
    label_aliases: ClassVar[Mapping[int, int]] = {501: 500}
    ignored_label_values = frozenset({9})

    def cases(self, root: Path) -> list[Case]:
        cases = []
        for image in sorted((root / "images").glob("*.nii.gz")):
            label = root / "labels" / image.name
            cases.append(Case(image.name[:-7], image.name[:-7], image, label if label.is_file() else None))
        return cases


class Brains(Hearts):
    name, modality, intensity_offset = "brains", "mr", 0.0


def positions(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Position of every voxel in mm: (D, H, W, 3)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def ball(shape: tuple[int, ...], affine: np.ndarray, center: np.ndarray, radius_mm: float) -> np.ndarray:
    return np.linalg.norm(positions(shape, affine) - center, axis=-1) <= radius_mm


def middle(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]


def write_heart(
    root: Path,
    name: str,
    affine: np.ndarray | None = None,
    shape: tuple[int, int, int] = SHAPE,
    seed: int = 0,
) -> None:
    """A body of soft tissue in air with a bright ventricle (500, once 501), a muscle (205) and a 9."""
    affine = affine_of((2.0, 2.0, 2.0)) if affine is None else affine
    number = crc32(name.encode())  # no two hearts are alike, as no two people are
    rng, center = np.random.default_rng((seed, number)), middle(shape, affine)
    extent = np.abs(affine[:3, :3] @ np.array(shape)).min()
    body = ball(shape, affine, center, 0.45 * extent)
    muscle = ball(shape, affine, center, 0.3 * extent)
    blood = ball(shape, affine, center, 0.2 * extent)
    data = np.where(blood, 350, np.where(body, 40, -1000)) + rng.normal(0, 15, shape)
    label = np.where(blood, 500, np.where(muscle, 205, 0)).astype(np.int16)
    corner = tuple(int(i[0]) for i in np.nonzero(blood))
    label[corner] = 501
    label[0, 0, 0] = label[0, 1 + number % 10, 1 + number // 10 % 20] = 9
    write_volume(root / "images" / f"{name}.nii.gz", data.astype(np.int16), affine)
    write_volume(root / "labels" / f"{name}.nii.gz", label, affine)


@pytest.fixture
def hearts(tmp_path: Path) -> Path:
    for i in range(3):
        write_heart(tmp_path / "data", f"heart{i}", seed=i)
    return tmp_path / "data"


def raise_intensities(root: Path) -> None:
    """Make the images pass for MR: nothing far below zero."""
    for path in (root / "images").glob("*.nii.gz"):
        image = read_volume(path)
        write_volume(path, (image.data + 1100).astype(np.int16), image.affine)


def build(
    root: Path, cache: Path, preparation: Preparation = CT, dataset: Dataset | None = None, **more
) -> PreparedCohort:
    dataset = dataset or Hearts()
    return prepare(dataset.cases(root), dataset, preparation, cache, **more)


# --- what is stored -------------------------------------------------------------------------------


def test_prepared_cohort_holds_what_the_files_hold(hearts: Path, tmp_path: Path) -> None:
    cohort = build(hearts, tmp_path / "cache")
    assert (cohort.dataset, len(cohort), cohort.num_classes) == ("hearts", 3, 3)
    assert cohort.label_names == ("ventricle", "muscle")
    assert cohort.index("heart2") == 2 and cohort.cases[2].id == "heart2"
    for i, case in enumerate(cohort.cases):
        image, label = cohort.image(i), cohort.label(i)
        assert image.dtype == np.float32 and label.dtype == np.uint8
        box = (slice(2, 9), slice(0, 5), slice(3, 24))
        np.testing.assert_array_equal(cohort.image(i, box), image[box])
        np.testing.assert_array_equal(cohort.label(i, box), label[box])
        source = read_volume(hearts / "images" / f"{case.id}.nii.gz")
        stored = read_labels(hearts / "labels" / f"{case.id}.nii.gz").data
        # The spacing is as wanted, so nothing is resampled: the values are exact.
        np.testing.assert_array_equal(image, np.clip(source.data + 1024, 0, 2048) / np.float32(2048))
        expected = np.select([np.isin(stored, (500, 501)), stored == 205], [1, 2], 0)  # 9 is background
        np.testing.assert_array_equal(label, expected)
        assert case.has_label and case.labelled and case.shape == image.shape == SHAPE
        np.testing.assert_allclose(case.affine, source.affine)
        assert case.source == hearts / "images" / f"{case.id}.nii.gz"
    with pytest.raises(DataError, match=r'no case "heart9".* Did you mean'):
        cohort.index("heart9")


def test_manifest_records_parameters_and_sources(hearts: Path, tmp_path: Path) -> None:
    cohort = build(hearts, tmp_path / "cache")
    manifest = json.loads((cohort.folder / "manifest.json").read_text())
    assert manifest["preparation"] == CT.model_dump(mode="json")
    assert manifest["intensity"] == {
        "scaling": "ct", "offset": 1024.0, "checked": True, "rule": "offset of the data set hearts",
        "taken_for": "CT, offset 1024",
    }  # fmt: skip
    source = manifest["cases"][0]["sources"]["image"]
    assert source["path"].endswith("heart0.nii.gz") and len(source["sha256"]) == 64
    assert manifest["uses_labels"] is False and manifest["ssl3d"]
    assert sorted(p.name for p in cohort.folder.iterdir() if p.suffix != ".json") == sorted(
        f"0000{i}-heart{i}.{kind}.b2nd" for i in range(3) for kind in ("image", "label")
    )


def test_cases_without_label_and_with_target(tmp_path: Path) -> None:
    write_heart(tmp_path, "a")
    cases = [Case("a", "a", tmp_path / "images" / "a.nii.gz", target=1)]
    cohort = prepare(cases, STOIC(), CT, tmp_path / "cache")
    assert (cohort.cases[0].target, cohort.cases[0].has_label, cohort.cases[0].labelled) == (1, False, True)
    assert cohort.num_classes == 1
    with pytest.raises(DataError, match=r"Case a of stoic has no label"):
        cohort.label(0)


def test_progress_is_told_about_every_case(hearts: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    build(hearts, tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert calls == [(i, 3, "hashing") for i in (1, 2, 3)] + [(i, 3, "preparing hearts") for i in (1, 2, 3)]


# --- reuse ----------------------------------------------------------------------------------------


def written(cohort: PreparedCohort) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cohort.folder.glob("*.b2nd")}


def test_a_stored_cohort_is_reused(hearts: Path, tmp_path: Path) -> None:
    first = build(hearts, tmp_path / "cache")
    calls: list[str] = []
    second = build(hearts, tmp_path / "cache", progress=lambda done, total, what: calls.append(what))
    assert second.folder == first.folder and written(second) == written(first)
    assert set(calls) == {"hashing"}


def test_unchanged_size_and_time_are_trusted_and_a_touched_file_is_hashed_again(
    hearts: Path, tmp_path: Path
) -> None:
    first = build(hearts, tmp_path / "cache")
    path = hearts / "images" / "heart0.nii.gz"
    os.utime(path, ns=(1, 1))
    second = build(hearts, tmp_path / "cache")
    assert second.folder == first.folder and written(second) == written(first)
    manifest = json.loads((first.folder / "manifest.json").read_text())
    assert manifest["cases"][0]["sources"]["image"]["mtime_ns"] == 1  # noted, to spare the next hashing
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(1, 1))
    assert build(hearts, tmp_path / "cache").folder == first.folder  # size and time are as they were


def test_a_moved_cohort_is_reused(hearts: Path, tmp_path: Path) -> None:
    first = build(hearts, tmp_path / "cache")
    shutil.move(hearts, tmp_path / "elsewhere")
    second = build(tmp_path / "elsewhere", tmp_path / "cache")
    assert second.folder == first.folder and written(second) == written(first)
    assert second.cases[0].source == tmp_path / "elsewhere" / "images" / "heart0.nii.gz"


def test_fingerprint_depends_on_contents_and_parameters_only(hearts: Path, tmp_path: Path) -> None:
    shutil.copytree(hearts, tmp_path / "copy")
    fingerprint = build(hearts, tmp_path / "cache").fingerprint
    assert len(fingerprint) == 64
    assert build(tmp_path / "copy", tmp_path / "other cache").fingerprint == fingerprint
    others = [
        build(hearts, tmp_path / "cache", Preparation(spacing_mm=2.5)).fingerprint,
        build(hearts, tmp_path / "cache", CT.model_copy(update={"intensity_offset": 1000.0})).fingerprint,
        prepare(Hearts().cases(hearts)[:2], Hearts(), CT, tmp_path / "cache").fingerprint,
        build(hearts, tmp_path / "cache", dataset=Hearts().with_facts(modality="auto")).fingerprint,
    ]
    write_heart(tmp_path / "copy", "heart1", seed=77)
    others.append(build(tmp_path / "copy", tmp_path / "cache").fingerprint)
    assert len({fingerprint, *others}) == 6


def test_changed_file_is_prepared_again(hearts: Path, tmp_path: Path) -> None:
    first = build(hearts, tmp_path / "cache")
    write_heart(hearts, "heart1", seed=5)
    second = build(hearts, tmp_path / "cache")
    assert second.folder != first.folder
    np.testing.assert_array_equal(first.image(0), second.image(0))
    assert not np.array_equal(first.image(1), second.image(1))


@pytest.mark.parametrize("damage", ["array missing", "array cut", "manifest cut", "manifest missing"])
def test_a_damaged_or_half_built_cohort_is_not_used_but_completed(
    hearts: Path, tmp_path: Path, damage: str
) -> None:
    first = build(hearts, tmp_path / "cache")
    expected, times = [first.image(i).copy() for i in range(3)], written(first)
    array, manifest = first.folder / "00001-heart1.image.b2nd", first.folder / "manifest.json"
    if damage == "array missing":
        array.unlink()
    elif damage == "array cut":
        array.write_bytes(array.read_bytes()[:-100])
    elif damage == "manifest cut":
        manifest.write_bytes(manifest.read_bytes()[:-100])
    else:
        manifest.unlink()
    with pytest.raises(DataError, match="not a complete prepared cohort"):
        PreparedCohort(first.folder)
    second = build(hearts, tmp_path / "cache")
    for i in range(3):
        np.testing.assert_array_equal(second.image(i), expected[i])
    again = {name for name, when in written(second).items() if when != times[name]}
    assert again == ({array.name, "00001-heart1.label.b2nd"} if damage.startswith("array") else set())


def test_a_cache_of_an_earlier_version_is_used_as_it_is(hearts: Path, tmp_path: Path) -> None:
    """Before Blosc2, arrays were plain ``.npy`` files, and nothing had a digest; the fingerprint is the same."""
    first = build(hearts, tmp_path / "cache")
    expected = [(first.image(i), first.label(i)) for i in range(3)]

    def as_before(value: object) -> object:
        if isinstance(value, list):
            return [as_before(v) for v in value]
        if not isinstance(value, dict):
            return value
        if str(value.get("name")).endswith(".b2nd"):
            new = first.folder / value["name"]
            old = new.with_suffix(".npy")
            np.save(old, read_array(new))
            return {"name": old.name, "bytes": old.stat().st_size}
        return {k: as_before(v) for k, v in value.items() if k != "digest"}

    for path in first.folder.glob("*.json"):
        path.write_text(json.dumps(as_before(json.loads(path.read_text()))))
    for path in list(first.folder.glob("*.b2nd")):
        path.unlink()
    again = build(hearts, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    for i, (image, label) in enumerate(expected):
        np.testing.assert_array_equal(again.image(i), image)
        np.testing.assert_array_equal(again.label(i), label)
    assert not list(first.folder.glob("*.b2nd")), "nothing is built again"


TESTS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
BUILD = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_prepare import Hearts, Preparation, prepare
root = Path({root!r})
cohort = prepare(Hearts().cases(root), Hearts(), Preparation(spacing_mm=1.1), Path({cache!r}), workers=1)
print(cohort.fingerprint)
"""


def start_build(root: Path, cache: Path) -> subprocess.Popen[str]:
    code = BUILD.format(tests=TESTS, root=str(root), cache=str(cache))
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_that_build_at_once_do_no_harm(hearts: Path, tmp_path: Path) -> None:
    both = [start_build(hearts, tmp_path / "cache") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    (folder,) = (tmp_path / "cache").iterdir()
    assert not list(folder.glob(".*"))  # nothing temporary is left
    alone = build(hearts, tmp_path / "alone", Preparation(spacing_mm=1.1))
    assert alone.fingerprint == outputs[0][0].strip()
    for path in alone.folder.glob("*.b2nd"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    for i in range(12):
        write_heart(root, f"heart{i:02d}", shape=(40, 42, 44), seed=i)
    process = start_build(root, cache)
    limit = time.monotonic() + 60
    while not list(cache.glob("*/00000-*.json")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (folder,) = cache.iterdir()
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.json")}
    assert 1 <= len(done) < 12 and not (folder / "manifest.json").exists()
    cohort = build(root, cache, Preparation(spacing_mm=1.1))
    assert cohort.folder == folder and len(cohort) == 12
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done  # not repeated
    fresh = build(root, tmp_path / "fresh", Preparation(spacing_mm=1.1))
    for i in range(12):
        np.testing.assert_array_equal(cohort.image(i), fresh.image(i))
        np.testing.assert_array_equal(cohort.label(i), fresh.label(i))


def test_old_temporary_files_of_killed_builds_are_removed(hearts: Path, tmp_path: Path) -> None:
    folder = build(hearts, tmp_path / "cache").folder
    old, new = folder / ".00000-heart0.image.b2nd.1-1.tmp", folder / ".00001-heart1.image.b2nd.2-2.tmp"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    (folder / "manifest.json").unlink()
    build(hearts, tmp_path / "cache")
    assert not old.exists() and new.exists()  # the new one may belong to a process that is still writing


# --- bad input ------------------------------------------------------------------------------------


def test_all_bad_files_are_listed_at_once_and_nothing_is_finished(hearts: Path, tmp_path: Path) -> None:
    write_heart(hearts, "zeros")
    write_volume(hearts / "images" / "zeros.nii.gz", np.zeros(SHAPE, np.int16), affine_of((2, 2, 2)))
    write_heart(hearts, "cut")
    cut = hearts / "images" / "cut.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-3000])
    write_heart(hearts, "moved")
    write_volume(hearts / "labels" / "moved.nii.gz", np.full(SHAPE, 500, np.int16), affine_of((2, 2, 2.5)))
    with pytest.raises(DataError) as caught:
        build(hearts, tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems in 3 files:"
    text = "\n".join(lines)
    assert f"{cut} is truncated" in text
    assert "labels/moved.nii.gz lies on another grid than its image moved.nii.gz" in text
    assert "zeros.nii.gz is constant" in text
    assert all(". Fix: " in line for line in lines[1:])
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    for name in ("cut", "moved", "zeros"):
        (hearts / "images" / f"{name}.nii.gz").unlink()
    assert len(build(hearts, tmp_path / "cache")) == 3


def test_missing_files_are_listed_with_the_others(hearts: Path, tmp_path: Path) -> None:
    cases = [*Hearts().cases(hearts), Case("gone", "gone", hearts / "images" / "gone.nii.gz")]
    (hearts / "images" / "heart1.nii.gz").write_text("not an image")
    with pytest.raises(
        DataError, match=r"(?s)2 problems.*heart1.*not a readable image.*gone\.nii\.gz does not exist"
    ):
        prepare(cases, Hearts(), CT, tmp_path / "cache")


def test_volumes_of_a_larger_cohort_are_taken_over(hearts: Path, tmp_path: Path) -> None:
    whole = build(hearts, tmp_path / "cache")
    cases = Hearts().cases(hearts)[1:]
    part = prepare(cases, Hearts(), whole.preparation, tmp_path / "cache", built=whole)
    alone = prepare(cases, Hearts(), whole.preparation, tmp_path / "other")
    assert part.fingerprint == alone.fingerprint != whole.fingerprint
    for i in range(2):
        assert np.array_equal(part.image(i), alone.image(i))
        ours, theirs = (
            c.folder / c.records[i + (c is whole)]["arrays"]["image"]["name"] for c in (part, whole)
        )
        assert ours.samefile(theirs), "not built again"


def test_a_file_that_changes_meanwhile_is_named(hearts: Path, tmp_path: Path) -> None:
    def interfere(done: int, total: int, what: str) -> None:
        if (done, what) == (total, "hashing"):
            write_heart(hearts, "heart1", seed=9)
            os.utime(hearts / "images" / "heart1.nii.gz", ns=(1, 1))

    with pytest.raises(DataError, match=r"heart1\.nii\.gz changed while it was being prepared"):
        build(hearts, tmp_path / "cache", progress=interfere)


def test_no_case_and_repeated_ids(hearts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hearts has no case"):
        prepare([], Hearts(), CT, tmp_path / "cache")
    cases = Hearts().cases(hearts)
    with pytest.raises(DataError, match="hearts lists heart0 more than once"):
        prepare([*cases, cases[0]], Hearts(), CT, tmp_path / "cache")


def test_size_budget(hearts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 files(?s:.*)limit"):
        prepare(
            [Case(c.id, c.id, c.image) for c in Hearts().cases(hearts)],
            Hearts(),
            CT,
            tmp_path,
            max_bytes=1000,
        )


@pytest.mark.parametrize(
    "values",
    [
        {"spacing_mm": 0},
        {"spacng_mm": 1},
        {"crop": "center"},
        {"center_mm": (10, 10, 10)},
        {"crop": "center", "center_mm": (10, -1, 10)},
        {"crop": "lungs", "scaling": "minmax"},
        {"scaling": "z-score"},
        {"crop": "lungs", "scaling": "zscore"},
    ],
)
def test_bad_parameters_are_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        Preparation(**values)


def test_lungs_of_mr_are_refused(hearts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='crop "lungs" needs CT, but brains is MR'):
        build(hearts, tmp_path / "cache", Preparation(spacing_mm=2, crop="lungs"), Brains())


# --- intensity ------------------------------------------------------------------------------------


def write_folder(root: Path, kinds: str, padding: float | None = None) -> Path:
    """A plain folder of CTs in HU (h), CTs with air at 0 (c) and MRs (m)."""
    rng = np.random.default_rng(0)
    for i, kind in enumerate(kinds):
        data = np.full(SHAPE, 0.0 if kind == "m" else -1000.0)
        data[3:-3, 3:-3, 3:-3] += 400 if kind == "m" else 1050
        data = np.abs(data + rng.normal(0, 10, SHAPE)) if kind == "m" else data + rng.normal(0, 10, SHAPE)
        if padding is not None:
            data[:, :2] = padding
        write_volume(
            root / f"{i}{kind}.nii.gz", (data + 1000 * (kind == "c")).astype(np.int16), affine_of((2, 2, 2))
        )
    return root


@pytest.mark.parametrize("padding", [None, -2048, -3024])
def test_folder_of_cts_in_hu_needs_no_setting(tmp_path: Path, padding: float | None) -> None:
    cohort = build(write_folder(tmp_path / "data", "hhh", padding), tmp_path / "cache", dataset=Folder())
    assert (cohort.intensity.scaling, cohort.intensity.offset) == ("ct", 1024.0)
    assert cohort.intensity.taken_for == "CT in HU" and "3 files" in cohort.intensity.rule
    image = cohort.image(0)
    assert image[0, 10, 10] == pytest.approx(24 / 2048, abs=0.03)  # air
    assert image[10, 10, 10] == pytest.approx(1074 / 2048, abs=0.03)  # tissue
    assert image[10, 0, 10] == (0 if padding else pytest.approx(24 / 2048, abs=0.03))


def test_folder_of_mrs_is_scaled_from_minimum_to_maximum(tmp_path: Path) -> None:
    cohort = build(write_folder(tmp_path / "data", "mmm"), tmp_path / "cache", dataset=Folder())
    assert (cohort.intensity.scaling, cohort.intensity.offset) == ("minmax", 0.0)
    for i in range(3):
        assert (cohort.image(i).min(), cohort.image(i).max()) == (0, 1)


def test_folder_of_ct_and_mr_is_refused_naming_the_odd_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 problem in 1 file") as caught:
        build(write_folder(tmp_path / "data", "hhm"), tmp_path / "cache", dataset=Folder())
    assert "2m.nii.gz is not CT in HU" in str(caught.value)
    assert "CT in HU: 0h.nii.gz, 1h.nii.gz; not CT in HU: 2m.nii.gz" in str(caught.value)


@pytest.mark.parametrize("kinds", ["hhhmmmmmmmm", "hhhhhhhmmmmmmmm", "mmmmhhhhhh", "hm"])
def test_two_kinds_in_a_folder_are_an_error_that_says_which_are_which(tmp_path: Path, kinds: str) -> None:
    """3 + 8 and 7 + 8 passed: the median decided for all."""
    root = write_folder(tmp_path / "data", kinds)
    fewer = "m" if kinds.count("m") <= kinds.count("h") else "h"
    with pytest.raises(DataError, match=f"{kinds.count(fewer)} problem") as caught:
        build(root, tmp_path / "cache", dataset=Folder())
    lists = re.search(
        r"two kinds in one cohort: CT in HU: (.*); not CT in HU: (.*?)\. Fix", str(caught.value)
    )
    assert lists is not None
    for kind, names in zip("hm", lists.groups(), strict=True):
        wanted = {f"{i}{k}.nii.gz" for i, k in enumerate(kinds) if k == kind}
        assert set(names.split(", ")) == wanted
    # What it advises works: the smaller part is left out, and named.
    cohort = build(root, tmp_path / "cache", dataset=Folder(), policy="skip")
    assert len(cohort) == len(kinds) - kinds.count(fewer) == len(kinds) - len(cohort.skipped)
    assert cohort.intensity.scaling == ("ct" if fewer == "m" else "minmax")
    assert cohort.intensity.taken_for == ("CT in HU" if fewer == "m" else "not CT in HU")


def test_cts_of_two_conventions_are_an_error_too(tmp_path: Path) -> None:
    preparation = Preparation(spacing_mm=2, scaling="ct")
    root = write_folder(tmp_path / "data", "hhcc")
    with pytest.raises(DataError, match=r"CT in HU: 0h.*CT with air at 0: 2c"):
        build(root, tmp_path / "cache", preparation, Folder())


def test_a_wrong_offset_of_the_user_is_refused_with_the_figures(tmp_path: Path) -> None:
    """A CT cut inside the body: with 0, 45 to 64 % of its voxels became 0, with exit 0."""
    rng = np.random.default_rng(0)
    for i in range(2):
        data = rng.normal(0, 40, SHAPE).astype(np.int16)
        write_volume(tmp_path / "data" / f"{i}.nii.gz", data, affine_of((2, 2, 2)))
    for offset in (0, 512, 2048):
        with pytest.raises(DataError, match="2 problems in 2 files") as caught:
            build(
                tmp_path / "data",
                tmp_path / "c",
                Preparation(spacing_mm=2, intensity_offset=offset),
                Folder(),
            )
        assert "0% of the voxels are soft tissue" in str(caught.value) and "--offset 1024" in str(
            caught.value
        )
    assert "50% would be cut off below 0" not in str(caught.value)  # of the last one, 2048
    right = build(
        tmp_path / "data", tmp_path / "c", Preparation(spacing_mm=2, intensity_offset=1024), Folder()
    )
    assert right.image(0).min() > 0.3
    found = build(tmp_path / "data", tmp_path / "c", dataset=Folder())  # negative, so it has a unit
    assert found.intensity.taken_for == "CT in HU" and "2 files" in found.intensity.rule
    assert "by tissue" in found.intensity.rule
    np.testing.assert_array_equal(found.image(0), right.image(0))


def test_folder_with_nothing_readable_lists_everything(tmp_path: Path) -> None:
    for name in ("a.nii", "b.nii.gz"):
        (tmp_path / name).write_text("no image at all")
    with pytest.raises(DataError, match="2 problems in 2 files"):
        build(tmp_path, tmp_path / "cache", dataset=Folder())


def test_ct_scaling_of_a_folder_with_air_at_zero(tmp_path: Path) -> None:
    preparation = Preparation(spacing_mm=2, scaling="ct")
    cohort = build(write_folder(tmp_path / "data", "cc"), tmp_path / "cache", preparation, Folder())
    assert (cohort.intensity.scaling, cohort.intensity.offset) == ("ct", 0.0)


def test_wrong_offset_is_an_error_and_the_option_it_names_repairs_it(hearts: Path, tmp_path: Path) -> None:
    class Wrong(Hearts):
        intensity_offset = 0.0

    with pytest.raises(DataError, match="3 problems in 3 files") as caught:
        build(hearts, tmp_path / "cache", dataset=Wrong())
    assert "seems to be 1024 here (--offset 1024 for data verify, data prepare and predict" in str(
        caught.value
    )
    assert "--set data.intensity_offset.hearts=1024 for pretrain and bench" in str(caught.value)
    repaired = build(hearts, tmp_path / "cache", CT.model_copy(update={"intensity_offset": 1024.0}), Wrong())
    np.testing.assert_array_equal(repaired.image(0), build(hearts, tmp_path / "cache").image(0))
    assert "given by the user" in repaired.intensity.rule


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", [None, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize("spacing", [(0.5, 0.7, 3.0), (2.0, 2.0, 1.0), (1.3, 0.9, 1.1)])
def test_resampled_voxels_are_where_they_were(
    spacing: tuple[float, float, float], rotation: np.ndarray | None
) -> None:
    """A linear function of position stays that function on the new grid, away from the border."""
    affine = affine_of(spacing, rotation=rotation)
    ramp = (positions(SHAPE, affine) @ np.array([1.0, 2.0, 3.0])).astype(np.float32)
    data, grid = resample(ramp, affine, 1.2)
    np.testing.assert_allclose(np.linalg.norm(grid[:3, :3], axis=0), 1.2)
    np.testing.assert_allclose(grid[:3, 3], affine[:3, 3])  # the first voxel stays
    expected = positions(data.shape, grid) @ np.array([1.0, 2.0, 3.0])
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(data[inner], expected[inner], atol=0.01)
    extent = (np.array(data.shape) - 1) * 1.2 - (np.array(SHAPE) - 1) * np.array(spacing)
    assert (np.abs(extent) <= 0.6 + 1e-9).all()


def test_sheared_grid_is_straightened() -> None:
    """Gantry tilt shears a CT; the new grid is orthogonal and covers it."""
    affine = affine_of((1.0, 1.0, 2.0))
    affine[1, 2] = 0.5  # each slice is 0.5 mm further to the front
    ramp = (positions(SHAPE, affine) @ np.array([1.0, 2.0, 3.0])).astype(np.float32)
    data, grid = resample(ramp, affine, 1.5)
    np.testing.assert_allclose(grid[:3, :3].T @ grid[:3, :3], np.eye(3) * 1.5**2, atol=1e-9)
    index = positions(data.shape, np.linalg.inv(affine) @ grid)  # where each new voxel lies in the old array
    inside = ((index >= 1) & (index <= np.array(SHAPE) - 2)).all(axis=-1)
    expected = positions(data.shape, grid) @ np.array([1.0, 2.0, 3.0])
    assert inside.mean() > 0.4
    np.testing.assert_allclose(data[inside], expected[inside], atol=0.6)  # the Gaussian sees the border
    back = np.linalg.inv(grid) @ affine @ np.array([[0, 0, 0, 1], [*(np.array(SHAPE) - 1), 1]]).T
    last = np.array(data.shape) - 1
    assert (back[:3] >= -0.51).all() and (last + 0.51 >= back[:3].T).all()


def test_resampling_agrees_with_monai() -> None:
    """A second implementation, where no smoothing is due: same grid, same values."""
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    affine = affine_of((1.5, 2.0, 3.0), rotation=OBLIQUE)
    data = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    theirs = Spacing(pixdim=1.37, mode="bilinear", padding_mode="border")(
        MetaTensor(data[None], affine=affine)
    )
    ours, grid = resample(data, affine, 1.37)
    np.testing.assert_allclose(grid, theirs.affine.numpy(), atol=1e-9)
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=1e-4)
    labels = np.random.default_rng(0).integers(0, 5, SHAPE).astype(np.uint8)
    theirs = Spacing(pixdim=1.37, mode="nearest", padding_mode="border")(
        MetaTensor(labels[None], affine=affine)
    )
    ours, _ = resample(labels, affine, 1.37, labels=True)
    assert (ours == theirs[0].numpy()).mean() > 0.999  # ties may be broken otherwise


def test_equal_spacing_is_not_resampled() -> None:
    data = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    for affine in (affine_of((2.0, 2.0, 2.0), rotation=OBLIQUE), affine_of((2.0005, 1.9995, 2.0))):
        assert isotropic_grid(affine, SHAPE, 2.0) is None
        assert resample(data, affine, 2.0) == (data, affine)
    assert isotropic_grid(affine_of((2.002, 2.0, 2.0)), SHAPE, 2.0) is not None


def test_coarser_grids_do_not_alias() -> None:
    """A stripe of two voxels a period vanishes when every second voxel is kept, instead of turning white."""
    stripes = np.zeros((40, 10, 10), np.float32)
    stripes[::2] = 1
    data, _ = resample(stripes, affine_of((1.0, 2.5, 2.5)), 2.5)
    inner = data[2:-2]
    assert inner.std() < 0.05 and inner.mean() == pytest.approx(0.5, abs=0.05)
    finer, _ = resample(stripes, affine_of((2.0, 2.0, 2.0)), 1.9)  # barely changed: not smoothed
    assert finer.std() > 0.25


def test_labels_are_never_mixed() -> None:
    labels = np.random.default_rng(0).choice([0, 3, 200], SHAPE).astype(np.uint8)
    for spacing in (0.7, 3.1):
        data, _ = resample(labels, affine_of((1.0, 1.5, 2.0), rotation=OBLIQUE), spacing, labels=True)
        assert data.dtype == np.uint8 and set(np.unique(data)) == {0, 3, 200}


HEADERS = {
    "straight": affine_of((2.0, 2.0, 2.0)),
    "flipped": affine_of((2.0, 2.0, 2.0), "LPI"),
    "permuted": affine_of((2.0, 2.0, 2.0), "SLA"),
    "anisotropic": affine_of((1.0, 1.4, 3.5), "LPS"),
    "oblique": affine_of((2.0, 2.0, 2.0), "RAS", OBLIQUE),
    "oblique, anisotropic, permuted": affine_of((1.0, 3.0, 1.4), "PIR", OBLIQUE),
}


@pytest.mark.parametrize("spacing", [1.0, 2.0])
@pytest.mark.parametrize("crop", ["none", "foreground", "label", "center"])
@pytest.mark.parametrize("affine", HEADERS.values(), ids=HEADERS.keys())
def test_labels_return_to_the_grid_of_their_file(
    tmp_path: Path, affine: np.ndarray, crop: str, spacing: float
) -> None:
    """Exactly, where the prepared grid is at least as fine as the file's; else within half its voxel."""
    shape = (36, 26, 30)
    center = middle(shape, affine) + affine[:3, :3] @ np.array([3, -1, 2])  # not in the middle
    label = np.where(ball(shape, affine, center, 12.0), 500, 0).astype(np.int16)
    label[ball(shape, affine, center + np.array([3, 0, 0]), 5.0)] = 205
    data = np.where(ball(shape, affine, middle(shape, affine), 18.0), 40, -1000).astype(np.int16)
    write_volume(tmp_path / "images" / "a.nii.gz", data, affine)
    write_volume(tmp_path / "labels" / "a.nii.gz", label, affine)
    center_mm = (60.0, 50.0, 44.0) if crop == "center" else None
    preparation = Preparation(spacing_mm=spacing, crop=crop, center_mm=center_mm, margin_mm=4)
    cohort = build(tmp_path, tmp_path / "cache", preparation)
    case = cohort.cases[0]
    assert case.native_shape == shape
    np.testing.assert_allclose(case.native_affine, affine, atol=1e-4)
    native = to_native_grid(np.asarray(cohort.label(0)), case.affine, case.native_affine, case.native_shape)
    assert native.shape == shape and native.dtype == np.uint8
    exact = np.linalg.norm(affine[:3, :3], axis=0).min() >= spacing - 1e-6
    for k, value in ((1, 500), (2, 205)):
        ours, true = native == k, label == value
        dice = 2 * (ours & true).sum() / (ours.sum() + true.sum())
        assert dice == 1 if exact else dice > 0.8
        shift_mm = positions(shape, affine)[ours].mean(axis=0) - positions(shape, affine)[true].mean(axis=0)
        assert np.linalg.norm(shift_mm) < (1e-9 if exact else spacing / 2)


def test_oblique_scan_keeps_its_orientation_and_world_position(tmp_path: Path) -> None:
    """The brightest blob is at the same place in mm before and after."""
    affine = affine_of((0.9, 1.1, 3.0), "LPS", OBLIQUE)
    shape, target = (50, 46, 20), np.zeros(3)
    target = middle(shape, affine) + np.array([6.0, -5.0, 4.0])
    data = 300 * np.exp(-(np.linalg.norm(positions(shape, affine) - target, axis=-1) ** 2) / (2 * 4.0**2))
    write_volume(tmp_path / "images" / "a.nii.gz", data.astype(np.float32), affine)
    cohort = build(tmp_path, tmp_path / "cache", Preparation(spacing_mm=1.5), Brains())
    image = np.asarray(cohort.image(0)).astype(float) ** 2
    found = (positions(image.shape, cohort.cases[0].affine) * image[..., None]).sum((0, 1, 2)) / image.sum()
    np.testing.assert_allclose(found, target, atol=0.05)
    assert nibabel.aff2axcodes(cohort.cases[0].affine) == ("R", "A", "S")


# --- crops ----------------------------------------------------------------------------------------


def chest(spacing: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """A chest after the offset, and its lungs: body, two lungs, airway open at the top, table, room."""
    data = np.zeros((100, 70, 60), np.float32)
    d, h, w = np.ogrid[:100, :70, :60]
    data[np.broadcast_to(((d - 50) / 42) ** 2 + ((h - 36) / 28) ** 2 <= 1, data.shape)] = 1050
    data[20:80, 2:5] = 900  # table
    lungs = np.zeros(data.shape, bool)
    for center in (30, 70):
        lungs |= ((d - center) / 14) ** 2 + ((h - 36) / 18) ** 2 + ((w - 30) / 24) ** 2 <= 1
    data[lungs] = 150
    data[28:34, 30:36, 20:26] = 600  # ground glass
    data[49:52, 24:27, 40:] = 20  # airway, apart from the lungs
    data[45:50, 50:54, 8:12] = 20  # gas elsewhere
    return data, lungs


def test_lungs_are_found(tmp_path: Path) -> None:
    data, lungs = chest()
    mask = lungs_mask(data)
    assert 2 * (mask & lungs).sum() / (mask.sum() + lungs.sum()) > 0.99
    write_volume(tmp_path / "images" / "a.nii.gz", data - 1024, np.diag([3.0, 3.0, 3.0, 1.0]))
    cohort = build(tmp_path, tmp_path / "cache", Preparation(spacing_mm=3, crop="lungs", margin_mm=6))
    inside = np.argwhere(lungs)
    low, high = inside.min(axis=0) - 2, inside.max(axis=0) + 3  # 6 mm are two voxels
    assert cohort.cases[0].shape == tuple(high - low)
    np.testing.assert_allclose(cohort.cases[0].affine[:3, 3], low * 3.0)


def test_lungs_cut_off_by_the_scan_are_found() -> None:
    data, lungs = chest()
    mask = lungs_mask(data[..., 20:40])  # the lungs touch both ends
    assert 2 * (mask & lungs[..., 20:40]).sum() / (mask.sum() + lungs[..., 20:40].sum()) > 0.99


def test_lungs_cut_off_at_the_side_are_found() -> None:
    """A chest wider than the field of view, its lungs joined by the airways: one touches a face, as the room does."""
    data, lungs = chest()
    data[40:60, 34:38, 28:32] = 20
    seen, expected = data[22:], lungs[22:]
    mask = lungs_mask(seen)
    assert 2 * (mask & expected).sum() / (mask.sum() + expected.sum()) > 0.97
    room = seen == data[0, 0, 0]
    assert not (mask & room).any()


def test_volume_without_lungs_is_named(hearts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'3 files(?s:.*)no air inside the body, which crop "lungs" needs'):
        build(hearts, tmp_path / "cache", Preparation(spacing_mm=2, crop="lungs"))


@pytest.mark.parametrize("dataset", [Hearts(), Brains()], ids=["ct", "mr"])
def test_foreground_box(tmp_path: Path, dataset: Dataset) -> None:
    data = np.full((30, 32, 34), -1000.0 if dataset.modality == "ct" else 0.0)
    data[8:20, 9:22, 10:24] += 1060
    data[1, 1, 1] += 1500  # a speck apart from the body
    data += np.random.default_rng(0).normal(0, 5, data.shape)
    write_volume(tmp_path / "images" / "a.nii.gz", data.astype(np.int16), affine_of((2, 2, 2)))
    preparation = Preparation(spacing_mm=2, crop="foreground", margin_mm=4)
    cohort = build(tmp_path, tmp_path / "cache", preparation, dataset)
    assert cohort.cases[0].shape == (16, 17, 18)
    moved = cohort.cases[0].affine[:3, 3] - affine_of((2, 2, 2))[:3, 3]
    np.testing.assert_allclose(moved, (12, 14, 16))


def test_label_box_is_marked_and_needs_labels(hearts: Path, tmp_path: Path) -> None:
    preparation = Preparation(spacing_mm=2, crop="label", margin_mm=0)
    assert preparation.uses_labels and not CT.uses_labels
    cohort = build(hearts, tmp_path / "cache", preparation)
    label = np.asarray(cohort.label(0))
    for axis in range(3):  # the box touches the structures on every side
        along = (label > 0).any(axis=tuple(other for other in range(3) if other != axis))
        assert along[0] and along[-1]
    assert json.loads((cohort.folder / "manifest.json").read_text())["uses_labels"] is True
    shutil.rmtree(hearts / "labels")
    with pytest.raises(
        DataError, match=r'3 files(?s:.*)has no label, which crop "label" needs\. Fix: give its label'
    ):
        build(hearts, tmp_path / "cache", preparation)


@pytest.mark.parametrize("dataset", [Hearts(), Brains()], ids=["ct", "mr"])
def test_central_box_is_padded_with_zeros(hearts: Path, tmp_path: Path, dataset: Dataset) -> None:
    if dataset.modality == "mr":
        raise_intensities(hearts)
    preparation = Preparation(spacing_mm=2, crop="center", center_mm=(20, 44, 60))
    cohort = build(hearts, tmp_path / "cache", preparation, dataset)
    whole = build(hearts, tmp_path / "cache", CT, dataset)
    assert cohort.cases[0].shape == (10, 22, 30)
    image, label = np.asarray(cohort.image(0)), np.asarray(cohort.label(0))
    assert (image[..., :3] == 0).all() and (image[..., -3:] == 0).all() and (label[..., :3] == 0).all()
    np.testing.assert_array_equal(label[..., 3:-3], whole.label(0)[5:15])
    if dataset.modality == "ct":
        np.testing.assert_array_equal(image[..., 3:-3], whole.image(0)[5:15])
    else:
        assert (image[..., 3:-3].min(), image.max()) == (0, 1)  # of the voxels that exist
    np.testing.assert_allclose(cohort.cases[0].affine[:3, 3] - whole.cases[0].affine[:3, 3], (10, 0, -6))


def test_ct_is_clipped_before_it_is_resampled() -> None:
    """Padding of -3024 beside air must not turn air at the border of the circle into something else."""
    data = np.full(SHAPE, -1024.0, np.float32)
    data[:10] = -3024
    volume = Volume(data, affine_of((1.0, 1.0, 1.0)), Path("a.nii"), np.eye(4), SHAPE)
    image, _, _ = prepare_arrays(
        volume, None, Preparation(spacing_mm=1.7), Intensity("ct", 1030.0, False, "")
    )
    assert image[:4].max() == 0 and image[-4:] == pytest.approx(6 / 2048)
    assert image.min() >= 0 and image.max() <= 6.01 / 2048
