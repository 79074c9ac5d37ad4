"""A file is resolved once: how often a cold one is opened, and that what is known of it dies with its bytes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ssl3d.data.cohort import Case, Reading
from ssl3d.data.files import suffixes
from ssl3d.data.files.volume import write_volume
from ssl3d.data.files.volume_file import VolumeFile, VolumeFiles
from ssl3d.data.layouts.releases import Folder
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.steps import Preparation
from ssl3d.errors import DataError

_opened: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(args[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that Python opens meanwhile, whoever opens it (an audit hook stays for the life of a process)."""
    global _opened
    if not getattr(sys, "_ssl3d_counts_opens", False):
        sys.addaudithook(_hook)
        sys._ssl3d_counts_opens = True  # type: ignore[attr-defined]
    _opened = []
    yield _opened
    _opened = None


@pytest.fixture
def suffixes_computed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every path whose suffix is computed, in whichever module."""
    computed: list[Path] = []
    real = suffixes.image_suffix

    def image_suffix(path: Path) -> str | None:
        computed.append(path)
        return real(path)

    for name, module in list(sys.modules.items()):
        if name.startswith("ssl3d") and getattr(module, "image_suffix", None) is real:
            monkeypatch.setattr(module, "image_suffix", image_suffix)
    return computed


def write(path: Path) -> Case:
    data = np.random.default_rng(0).normal(100, 20, (12, 14, 16)).astype(np.float32)
    write_volume(path, data, np.diag([2.0, 2.0, 2.0, 1.0]))
    return Case("a", "a", path)


@pytest.mark.parametrize(
    ("modality", "most", "before"),
    [("mr", 2, (8, 10)), ("auto", 3, (15, 14))],
    ids=["scaling known", "scaling found from the values"],
)
def test_opens_of_a_cold_file(
    modality: str,
    most: int,
    before: tuple[int, int],
    tmp_path: Path,
    opened: list[str],
    suffixes_computed: list[Path],
) -> None:
    """One opening for the identity; one for header, stream and voxels; one more where voxels are read twice."""
    case = write(tmp_path / "data" / "a.nii.gz")
    dataset = Folder().with_facts(modality=modality)
    opened.clear()
    suffixes_computed.clear()
    cohort = prepare([case], dataset, Preparation(spacing_mm=2.0), tmp_path / "cache", workers=1)
    opens, computed = opened.count(str(case.image)), len(suffixes_computed)
    figures = (
        f"a cold .nii.gz ({modality}): opened {opens} times, its suffix computed {computed} times; "
        f"{before[0]} and {before[1]} before files were resolved once"
    )
    assert len(cohort) == 1
    assert 1 < opens <= most, figures
    assert computed <= 1, figures


def test_a_file_that_changed_is_checked_again(tmp_path: Path) -> None:
    """Cut short between the two readings of a cold cohort: the second one finds it, as the first one would."""
    case = write(tmp_path / "data" / "a.nii.gz")
    whole, steps = case.image.read_bytes(), []

    def cut(done: int, total: int, what: str) -> None:
        steps.append(what)
        if what == "measuring intensities":
            case.image.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(DataError, match="is truncated"):
        prepare([case], Folder(), Preparation(spacing_mm=2.0), tmp_path / "cache", workers=1, progress=cut)
    assert "measuring intensities" in steps


def test_what_is_known_is_forgotten_when_a_part_changes(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.uint8))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    file, reading = VolumeFiles()[tmp_path / "a.mhd"], Reading()
    voxels = tmp_path / "a.raw"
    assert file.parts == (tmp_path / "a.mhd", voxels) and file.stat()[0] == sum(
        part.stat().st_size for part in file.parts
    )
    assert file.header() is file.header()
    assert not file.has_passed(1, reading)
    file.pass_as(file.state(), 1, reading)
    assert file.has_passed(1, reading) and not file.has_passed(2, reading)
    assert not file.has_passed(1, Reading(channel=1))
    later = voxels.stat().st_mtime_ns + 10**9
    os.utime(voxels, ns=(later, later))
    assert not file.has_passed(1, reading) and file.stat()[1] == later
    voxels.unlink()
    assert not file.has_passed(1, reading) and file.parts[1] == voxels
    text = (tmp_path / "a.mhd").read_text().replace("DimSize = 6 5 4", "DimSize = 60 5 4")
    (tmp_path / "a.mhd").write_text(text)
    assert file.header().shape == (60, 5, 4)


def test_a_header_is_kept_for_each_affine(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), None)
    image.set_sform(np.diag([1.0, 1, 1, 1]), 1)
    image.set_qform(np.diag([2.0, 2, 2, 1]), 1)
    nibabel.save(image, tmp_path / "a.nii.gz")
    file = VolumeFile(tmp_path / "a.nii.gz")
    for _ in range(2):
        steps = [np.diag(file.header(affine).axes_mm) for affine in ("sform", "qform", None)]  # type: ignore[arg-type]
        np.testing.assert_array_equal(steps, [[1, 1, 1], [2, 2, 2], [1, 1, 1]])
