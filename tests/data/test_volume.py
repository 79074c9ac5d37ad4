"""Reading: whatever the format and the orientation on disk, voxels land where they are in the patient."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
from grids import affine_of, write_itk

from ssl3d.data.checks.file import read_labels, read_volume
from ssl3d.data.files.volume import write_volume
from ssl3d.errors import DataError

OBLIQUE = nibabel.eulerangles.euler2mat(0.2, -0.15, 0.3)  # rotation about z, y, x in radians


def world_ramp(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """Voxels that hold a linear function of their own position in mm: any misplacement shows."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)  # (D, H, W, 3)
    return (index @ affine[:3, :3].T + affine[:3, 3]) @ np.array([1.0, 10.0, 100.0])


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA", "ASL"])
@pytest.mark.parametrize("rotation", [None, OBLIQUE], ids=["straight", "oblique"])
def test_every_format_and_orientation_is_read_to_ras(
    tmp_path: Path, ending: str, codes: str, rotation: np.ndarray | None
) -> None:
    shape, affine = (5, 6, 7), affine_of((0.5, 1.25, 3.0), codes, rotation)
    data = world_ramp(shape, affine).astype(np.float32)
    path = tmp_path / f"scan{ending}"
    if ending.startswith(".nii"):
        nibabel.save(nibabel.Nifti1Image(data, affine), path)
    else:
        write_itk(path, data, affine)
    volume = read_volume(path)
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.data.dtype == np.float32
    np.testing.assert_allclose(
        volume.data, world_ramp(volume.data.shape, volume.affine), rtol=1e-4, atol=1e-2
    )
    assert sorted(volume.spacing_mm) == pytest.approx([0.5, 1.25, 3.0], rel=1e-5)
    assert volume.native_shape == shape
    np.testing.assert_allclose(volume.native_affine, affine, atol=1e-4)


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<ff", content, 112, 0.5, -1024.0)  # scl_slope, scl_inter
    path.write_bytes(content)
    np.testing.assert_array_equal(read_volume(path).data, stored * np.float32(0.5) - 1024)
    with pytest.raises(DataError, match="not integers"):
        read_labels(path)


def test_trailing_axis_of_one_is_dropped(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5, 1), np.float32), np.eye(4)), tmp_path / "scan.nii")
    assert read_volume(tmp_path / "scan.nii").data.shape == (3, 4, 5)


def test_nifti_2_is_read(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    nibabel.save(nibabel.Nifti2Image(data, np.eye(4)), tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.nii.gz").data, data)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_labels_are_integers_whatever_the_stored_type(tmp_path: Path, dtype: type) -> None:
    values = np.array([0, 205, 420, 850]).repeat(6).reshape(4, 3, 2) % (256 if dtype == np.uint8 else 1000)
    nibabel.save(nibabel.Nifti1Image(values.astype(dtype), np.eye(4)), tmp_path / "label.nii.gz")
    label = read_labels(tmp_path / "label.nii.gz").data
    assert label.dtype == np.int32
    np.testing.assert_array_equal(label, values)


@pytest.mark.parametrize("bad", [0.5, np.nan, 1e12])
def test_labels_that_are_not_integers_are_refused(tmp_path: Path, bad: float) -> None:
    values = np.zeros((4, 3, 2), np.float64)
    values[1, 1, 1] = bad
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "label.nii.gz")
    with pytest.raises(
        DataError, match=r"label\.nii\.gz is not a label map: 1 voxels.*Fix: save the segmentation"
    ):
        read_labels(tmp_path / "label.nii.gz")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.int64, bool])
def test_written_volumes_are_read_back(tmp_path: Path, dtype: type) -> None:
    affine = affine_of((0.8, 0.9, 2.0), "RAS", OBLIQUE)
    data = (np.random.default_rng(0).uniform(0, 2, (4, 5, 6))).astype(dtype)
    write_volume(tmp_path / "new" / "out.nii.gz", data, affine)
    back = read_volume(tmp_path / "new" / "out.nii.gz")
    np.testing.assert_array_equal(back.data, data.astype(np.float32))
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)


def test_only_nifti_and_only_3d_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"out\.mha.*NIfTI"):
        write_volume(tmp_path / "out.mha", np.zeros((2, 2, 2)), np.eye(4))
    with pytest.raises(DataError, match=r"shape \(2, 2, 2, 2\)"):
        write_volume(tmp_path / "out.nii", np.zeros((2, 2, 2, 2)), np.eye(4))
