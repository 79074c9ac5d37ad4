"""Leakage: the same file, the same voxels, the same scan resampled and cropped; and no false alarm."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from ssl3d.bench import leakage
from ssl3d.bench.cell import TaskData
from ssl3d.bench.leakage import check_overlap, check_within
from ssl3d.data.checks import overlap
from ssl3d.data.checks.file import read_volume
from ssl3d.data.checks.overlap import _Spectra, find_overlap, find_twins
from ssl3d.data.cohort import Case
from ssl3d.data.layouts.releases import Folder
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.steps import Preparation
from ssl3d.data.splits import Split
from ssl3d.downstream.tasks import Task
from ssl3d.errors import DataError

EDGE = 40


def scan(seed: int) -> np.ndarray:
    """A body with organs at random places, in HU, 4 mm voxels: (40, 40, 40)."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, EDGE)] * 3, indexing="ij"))
    hu = np.where((grid**2).sum(0) < 0.9, 40.0, -1000.0)
    for _ in range(40):
        inside = ((grid - rng.uniform(-0.6, 0.6, (3, 1, 1, 1))) ** 2).sum(0) < rng.uniform(0.1, 0.25) ** 2
        hu[inside] = rng.uniform(-500, 700)
    return ndimage.gaussian_filter(hu, 0.6) + rng.normal(0, 10, hu.shape)


def save(path: Path, data: np.ndarray, spacing: float = 4.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data.astype(np.int16), np.diag([spacing] * 3 + [1])), path)
    return path


def cohort(folder: Path, cache: Path, spacing: float = 4.0) -> PreparedCohort:
    return prepare(Folder().cases(folder), Folder(), Preparation(spacing_mm=spacing), cache)


def resampled_crop(seed: int, factor: float = 0.8) -> np.ndarray:
    """Part of a scan on a coarser grid, in other contrast and with other noise."""
    part = scan(seed)[3:36, 6:38, 2:33]
    coarse = ndimage.zoom(part, factor, order=1)
    return 0.8 * (coarse + 1000) - 1000 + np.random.default_rng(99).normal(0, 15, coarse.shape)


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedCohort, PreparedCohort]:
    """Test images: a copy, other format, resampled crop, two that are nowhere else; and volumes for pretraining."""
    root = tmp_path_factory.mktemp("overlap")
    for i in range(6):
        save(root / "pretrain" / f"p{i}.nii.gz", scan(i))
    copy = root / "test" / "copy.nii.gz"
    copy.parent.mkdir()
    copy.write_bytes((root / "pretrain" / "p0.nii.gz").read_bytes())
    other = sitk.GetImageFromArray(np.asarray(nibabel.load(root / "pretrain" / "p1.nii.gz").dataobj).T)
    other.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    other.SetSpacing((4, 4, 4))
    sitk.WriteImage(other, str(root / "test" / "format.mha"))
    assert (
        read_volume(root / "test" / "format.mha").data == read_volume(root / "pretrain" / "p1.nii.gz").data
    ).all()
    save(root / "test" / "crop.nii.gz", resampled_crop(2), 5.0)
    for i in (70, 71):
        save(root / "test" / f"new{i}.nii.gz", scan(i))
    return cohort(root / "test", root / "cache"), cohort(root / "pretrain", root / "cache")


@pytest.fixture(params=["each with each", "by signature"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few volumes, and as if they were many."""
    if request.param == "by signature":
        monkeypatch.setattr(overlap, "EXHAUSTIVE", 0)
        monkeypatch.setattr(overlap, "CANDIDATES", 2)


def fresh(*cohorts: PreparedCohort) -> None:
    """Forget what was found before."""
    for one in cohorts:
        for stored in one.folder.glob("overlap-*.json"):
            stored.unlink()


def test_copies_other_formats_and_resampled_crops_are_found_and_nothing_else(
    cohorts: tuple[PreparedCohort, PreparedCohort], search: None
) -> None:
    fresh(*cohorts)
    test, pretraining = cohorts
    found = {o.test: o for o in find_overlap(test, range(len(test)), pretraining)}
    assert {name: o.pretraining for name, o in found.items()} == {"copy": "p0", "format": "p1", "crop": "p2"}
    assert found["copy"].how == "same file" and found["format"].how == "same voxels"
    assert found["crop"].how.startswith("same scan (correlation 0.9")
    only = find_overlap(test, [test.index("new70")], pretraining)
    assert only == [], "other cases of the cohort do not matter"


def test_large_volumes_are_compared_in_two_steps_and_results_are_kept(
    cohorts: tuple[PreparedCohort, PreparedCohort], monkeypatch: pytest.MonkeyPatch
) -> None:
    test, pretraining = cohorts
    everything = list(range(len(test)))
    one_step = find_overlap(test, everything, pretraining)
    for stored in test.folder.glob("overlap-*.json"):
        stored.unlink()
    monkeypatch.setattr(overlap, "_FIRST_EDGE", 16)  # 10 mm
    monkeypatch.setattr(overlap, "_SHORTLIST", 3)
    monkeypatch.setattr(overlap, "_MEMORY_BYTES", 1)  # one volume a block
    assert find_overlap(test, everything, pretraining) == one_step
    monkeypatch.setattr(overlap, "_correlations", None)  # nothing is left to compute
    assert find_overlap(test, everything, pretraining) == one_step


def test_correlation_equals_a_slow_one_at_every_shift() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 6, 4)).astype(np.float32), rng.normal(size=(4, 5, 5)).astype(np.float32)
    b[1:4, :4, 1:] += 3 * a[2:, 1:5, :]  # something to find
    best = -1.0
    for shift in np.ndindex(8, 10, 8):
        s = np.array(shift) - (np.array(b.shape) - 1)  # b's first voxel lies at a's voxel s
        low, high = np.maximum(s, 0), np.minimum(np.array(a.shape), s + b.shape)
        if (high <= low).any() or np.prod(high - low) < 0.5 * min(a.size, b.size):
            continue
        x = a[tuple(map(slice, low, high))]
        y = b[tuple(map(slice, low - s, high - s))]
        best = max(best, float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())))
    shape = (9, 10, 9)
    fast = _Spectra(a, shape).correlation(_Spectra(b, shape))
    assert best - 1e-5 <= fast <= best + 0.2  # the peak between the voxels is a little higher
    assert _Spectra(a, shape).correlation(_Spectra(a, shape)) == pytest.approx(1, abs=1e-5)


def test_an_overlap_is_an_error_unless_allowed_by_name(
    cohorts: tuple[PreparedCohort, PreparedCohort],
) -> None:
    test, pretraining = cohorts
    task = Task("mine", "Mine", "segmentation", "folder", "dsc", None)
    leaking = TaskData(task, test, [Split("random", ("new70",), ("new71",), ("copy", "crop"))])
    clean = TaskData(task, test, [Split("random", ("copy",), ("crop",), ("new70", "new71"))])
    there = {"here": pretraining, "elsewhere": None}
    with pytest.raises(DataError, match=r"mine: 2 of 2 test images") as refused:
        check_overlap([leaking], there, set())
    assert "copy is p0: same file" in str(refused.value) and "--allow-overlap mine" in str(refused.value)
    (allowed,) = check_overlap([leaking], there, {"mine"})
    assert [o.test for o in allowed.overlaps["here"] or ()] == ["copy", "crop"]
    (passed,) = check_overlap([clean], there, set())
    assert passed.overlaps == {"here": (), "elsewhere": None}


def test_too_coarse_volumes_are_compared_by_content_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(2):
        save(tmp_path / "pretrain" / f"p{i}.nii.gz", scan(i))
    save(tmp_path / "test" / "crop.nii.gz", resampled_crop(0), 5.0)
    save(tmp_path / "test" / "other.nii.gz", scan(1))
    test = cohort(tmp_path / "test", tmp_path / "cache", 8.0)
    found = find_overlap(test, [0, 1], cohort(tmp_path / "pretrain", tmp_path / "cache", 8.0))
    assert [(o.test, o.pretraining) for o in found] == [("other", "p1")] and "too coarse" in caplog.text


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> PreparedCohort:
    """Three images of one person under three names (as it is, resampled crop, finer grid), one twice, five others."""
    root = tmp_path_factory.mktemp("twins")
    save(root / "a.nii.gz", scan(0))
    save(root / "b.nii.gz", resampled_crop(0), 5.0)
    save(root / "c.nii.gz", ndimage.zoom(scan(0), 1.25, order=1), 3.2)
    for i in range(1, 7):
        save(root / f"n{i}.nii.gz", scan(i))
    cases = [Case(c.id, "p" if c.id == "n6" else c.subject, c.image, target=0) for c in Folder().cases(root)]
    cases = [*cases, Case("again", "p", save(root / "later" / "n6.nii.gz", resampled_crop(6), 5.0), target=0)]
    return prepare(cases, Folder(), Preparation(spacing_mm=4.0), root / "cache")


@pytest.mark.parametrize("edge", [20, 100])  # in two steps, and at once
def test_one_scan_as_several_people_is_found_and_nothing_else(
    twins: PreparedCohort, edge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stored in twins.folder.glob("same-scans-*.json"):
        stored.unlink()
    monkeypatch.setattr(overlap, "_TWINS_EDGE", edge)
    found = find_twins(twins)
    assert {(o.pretraining, o.test) for o in found} == {("a", "b"), ("a", "c"), ("b", "c")}, (
        "n6 is one person twice"
    )
    assert all(o.how.startswith("same scan (correlation") for o in found)
    slow = find_overlap(twins, [twins.index("b")], twins)  # itself: the same file
    assert [(o.test, o.how) for o in slow] == [("b", "same file")]
    monkeypatch.setattr(overlap, "_correlations", None)
    assert find_twins(twins) == found, "kept"


def test_a_scan_in_two_parts_is_refused_whatever_split_does_it(twins: PreparedCohort) -> None:
    task = Task("mine", "Mine", "classification", "folder", "auc", None)
    split = Split("fold1", ("a", "n1"), ("n2", "b"), ("c", "n3"))
    others = Split("fold0", ("a", "b", "c"), ("n2",), ("n3", "n4"))
    with pytest.raises(DataError, match="mine: 2 scans would be in two parts under two subjects") as refused:
        check_within([TaskData(task, twins, [others, split])], set())
    for part in ("c for test and a for train in fold1: same scan", "c for test and b for val in fold1",
                 "--subject-pattern", "--allow-overlap mine"):  # fmt: skip
        assert part in str(refused.value)
    (allowed,) = check_within([TaskData(task, twins, [others, split])], {"mine"})
    assert [(o.test, o.pretraining) for o in allowed.twins] == [("c", "a"), ("c", "b")]
    (clean,) = check_within([TaskData(task, twins, [others])], set())
    assert clean.twins == ()


def test_whoever_is_tested_is_found_among_the_volumes_for_pretraining(
    cohorts: tuple[PreparedCohort, PreparedCohort], twins: PreparedCohort, search: None
) -> None:
    fresh(*cohorts, twins)
    test, pretraining = cohorts
    task = Task("mine", "Mine", "classification", "folder", "auc", None)
    folds = [
        Split("fold0", ("new70",), ("new71",), ("copy",)),
        Split("fold1", ("copy",), ("new71",), ("crop",)),
    ]
    labelled = prepare(
        [Case(c.id, c.subject, c.source, target=0) for c in test.cases],
        Folder(),
        test.preparation,
        test.folder.parent,
    )
    found = leakage.tested_volumes([TaskData(task, labelled, folds)], pretraining)
    assert found == {"p0": "copy of mine: same file", "p2": found["p2"]} and "same scan" in found["p2"]
    # One folder for both: by subject, also another image of a person who is tested.
    one = Split("random", ("n1",), ("n2",), ("n6",))
    by_subject = leakage.tested_volumes([TaskData(task, twins, [one])], twins)
    assert set(by_subject) == {"n6", "again"}


def alike(seed: int, cut: bool = False, coarse: bool = False) -> tuple[np.ndarray, float]:
    """One body with one organ, at another place and with other grain for each seed: nothing else tells people apart."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 30)] * 3, indexing="ij"))
    distance = (((grid - rng.uniform(-0.1, 0.1, (3, 1, 1, 1))) ** 2).sum(0)) ** 0.5
    grain = ndimage.gaussian_filter(rng.normal(size=distance.shape), 1) * 60
    image = np.where(distance < 0.8, 120 + 180 * (distance < 0.35) + grain, 5 * rng.random(distance.shape))
    image = image[2:, :27, 1:] if cut else image
    return (image[::2, ::2, ::2], 4.0) if coarse else (image, 2.0)


@pytest.mark.parametrize(("others", "spacing"), [(0, 2.0), (6, 2.0), (6, 4.0)])
def test_people_who_look_alike_are_not_taken_for_one(
    tmp_path: Path, others: int, spacing: float, search: None
) -> None:
    """Their bodies differ by a shift and nothing else; copies are found all the same, with others and alone."""
    for seed in range(1, others + 1):
        save(tmp_path / "d" / f"other{seed}.nii.gz", *alike(seed))
    for name, options in (("a", {}), ("b", {"coarse": True}), ("c", {"cut": True})):
        save(tmp_path / "d" / f"{name}.nii.gz", *alike(0, **options))
    cases = [Case(c.id, c.subject, c.image, target=0) for c in Folder().cases(tmp_path / "d")]
    mr, preparation = Folder().with_facts(modality="mr"), Preparation(spacing_mm=spacing)
    found = find_twins(prepare(cases, mr, preparation, tmp_path / "cache"))
    test = prepare([c for c in cases if c.id == "c"], mr, preparation, tmp_path / "cache")
    people = [c for c in cases if c.id not in "bc"]
    if others:  # the same among volumes for pretraining
        pretraining = prepare(people, mr, preparation, tmp_path / "cache")
        assert [o.pretraining for o in find_overlap(test, [0], pretraining)] == ["a"]
        without = prepare([c for c in people if c.id != "a"], mr, preparation, tmp_path / "cache")
        assert find_overlap(test, [0], without) == []
    assert {(o.pretraining, o.test) for o in found} == {("a", "b"), ("a", "c"), ("b", "c")}
