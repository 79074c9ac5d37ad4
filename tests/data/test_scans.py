"""One scan that a release has as several subjects is found by ``ssl3d data verify``, whatever was done to its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy import ndimage

from ssl3d.cli import main
from ssl3d.data.checks.scans import _block_means
from ssl3d.data.phantoms import PhantomParameters, generate
from ssl3d.data.phantoms.subjects import Cohort

Change = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
PHANTOMS = PhantomParameters(edge=44, spacing_mm=3.2)


def resampled(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """On a coarser, anisotropic grid."""
    factors = np.array([0.8, 0.9, 0.75])
    made = ndimage.zoom(data, factors, order=1, grid_mode=True, mode="nearest")
    scale = np.array(data.shape) / made.shape
    matrix = affine @ np.diag([*scale, 1.0])
    matrix[:3, 3] = affine[:3, 3] + affine[:3, :3] @ ((scale - 1) / 2)
    return made, matrix


def scaled(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In other units, rounded."""
    return np.round((data - data.min()) * 0.25), affine


def turned(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """With its axes stored in another order and direction, and one value less."""
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("PIR"))
    other = data.copy()
    other[0, 0, 0] += 1  # no voxel hash finds it
    return nibabel.apply_orientation(other, change), affine @ inv_ornt_aff(change, data.shape)


def cropped(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    matrix = affine.copy()
    matrix[:3, 3] += affine[:3, :3] @ (3, 2, 4)
    return data[3:-2, 2:, 4:-1], matrix


def save(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(data.astype(np.float32), affine), path)


def verify(folder: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["data", "verify", str(folder), *more], env={"COLUMNS": "400"})


@pytest.fixture(scope="module", params=["mmwhs", "candi"])
def patients(request: pytest.FixtureRequest) -> list[tuple[np.ndarray, np.ndarray]]:
    cohort: Cohort = request.param
    made = [generate(cohort, i, PHANTOMS) for i in range(5)]
    return [(subject.image.astype(float), subject.affine) for subject in made]


def test_different_patients_are_no_twins(
    patients: list[tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    for i, (data, affine) in enumerate(patients):
        save(tmp_path / f"p{i}.nii.gz", data, affine)
    result = verify(tmp_path)
    assert result.exit_code == 0 and "5 cases, nothing wrong" in result.output, result.output


def test_one_scan_as_several_patients_is_found(
    patients: list[tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    for i, (data, affine) in enumerate(patients):
        save(tmp_path / f"p{i}.nii.gz", data, affine)
    low = patients[0][0].min()
    changes: tuple[Change, ...] = (
        (resampled, turned, cropped) if low < 0 else (resampled, turned, cropped, scaled)
    )
    for i, change in enumerate(changes):
        save(tmp_path / f"q{i}.nii.gz", *change(*patients[i]))
    result = verify(tmp_path)
    assert result.exit_code == 1 and f"{len(changes)} findings" in result.output, result.output
    for i in range(len(changes)):
        (line,) = [
            line for line in result.output.splitlines() if f"q{i}.nii.gz" in line.split("shows the same")[0]
        ]
        assert f"p{i}.nii.gz, of another subject" in line and "--subject-pattern" in line
    told = verify(tmp_path, "--subject-pattern", "[0-9]+$")  # as the remedy says: p0 and q0 are one person
    assert told.exit_code == 0, told.output
    assert verify(tmp_path, "--no-twins").exit_code == 0
    with pytest.MonkeyPatch.context() as patch:  # many cases: only when asked for
        patch.setattr("ssl3d.commands.data.TWINS_CASES", 3)
        many = verify(tmp_path)
        assert many.exit_code == 0 and "--twins does it" in many.output
        assert verify(tmp_path, "--twins").exit_code == 1


def test_block_means_keep_the_place_of_what_they_show() -> None:
    rng = np.random.default_rng(0)
    data = rng.random((17, 12, 9)).astype(np.float32)
    affine = np.array([[0.0, 2, 0, 5], [1, 0, 0, -3], [0, 0, 3, 1], [0, 0, 0, 1]])
    means, matrix = _block_means(data, affine, 4.5)
    assert means.shape == (4, 6, 9)
    np.testing.assert_allclose(means[1, 2, 3], data[4:8, 4:6, 3].mean(), rtol=1e-6)
    centre = affine @ (5.5, 4.5, 3, 1)
    np.testing.assert_allclose(matrix @ (1, 2, 3, 1), centre)
