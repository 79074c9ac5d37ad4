"""Files that are none, or that lie: each is named in bounded time and memory, in every command."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner, Result

from ssl3d.cli import main
from ssl3d.data.checks.case import check_cases
from ssl3d.data.checks.file import check_file
from ssl3d.data.cohort import Case
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.case import prepare_file
from ssl3d.data.prepared.steps import Intensity, Preparation
from ssl3d.errors import DataError, printable

pytestmark = pytest.mark.timeout(60)  # what hangs fails


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "300"})


def good(path: Path, spacing: float = 2.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(0).integers(0, 99, (8, 9, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([spacing] * 3 + [1.0])), path)
    return path


def nifti_with(path: Path, **fields: object) -> Path:
    """A NIfTI of which single bytes are replaced: offset -> bytes."""
    good(path.with_name("whole.nii"))
    raw = bytearray(path.with_name("whole.nii").read_bytes())
    path.with_name("whole.nii").unlink()
    for place, value in fields.items():
        start = int(place.removeprefix("at"))
        assert isinstance(value, bytes)
        raw[start : start + len(value)] = value
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


def itk_with(path: Path, key: str, value: str) -> Path:
    """A MetaImage or NRRD with another value in its header."""
    sitk.WriteImage(
        sitk.GetImageFromArray(np.random.default_rng(0).random((5, 6, 7)).astype("f4")), str(path)
    )
    raw = path.read_bytes()
    start = raw.index(key.encode()) + len(key)
    end = raw.index(b"\n", start)
    path.write_bytes(raw[:start] + value.encode() + raw[end:])
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def bomb(path: Path) -> Path:
    """400 MB of zeros behind a header that puts its voxels behind 2^60 bytes of extensions."""
    head = good(path.with_name("whole.nii")).read_bytes()[:348]
    path.with_name("whole.nii").unlink()
    head = head[:108] + struct.pack("<f", 2.0**60) + head[112:]
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head + b"\1\0\0\0")
        for _ in range(100):
            file.write(bytes(4 * 2**20))
    return path


NAN = struct.pack("<f", np.nan)
PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "broken link": (lambda d: link(d / "a.nii.gz", "annex/object"), "is a link to annex/object, which is not there"),
    "loop": (lambda d: link(d / "a.nii.gz", "a.nii.gz"), "is a link that leads back to itself"),
    "pipe": (lambda d: pipe(d / "a.nii.gz"), "is a pipe, not a file"),
    "pipe without ending": (lambda d: pipe(d / "slice"), "is a pipe, not a file"),
    "device": (lambda d: link(d / "a.nii", "/dev/zero"), "is a link to a device, not a file"),
    "device without ending": (lambda d: link(d / "slice", "/dev/zero"), "is a link to a device, not a file"),
    "folder": (lambda d: good(d / "a.nii.gz" / "x.txt.nii").parent, "is a folder, not an image"),
    "nothing": (lambda d: d / "a.nii.gz", "does not exist"),
    "below a file": (lambda d: good(d / "b.nii") / "a.nii", "does not exist"),
    "endless name": (lambda d: d / ("x" * 300 + ".nii"), "cannot be opened: File name too long"),
    "NaN origin, sform": (lambda d: nifti_with(d / "a.nii", at292=NAN), "has a NaN or infinite origin"),
    "infinite origin, gz": (
        lambda d: nifti_with(d / "a.nii.gz", at308=struct.pack("<f", np.inf)), "has a NaN or infinite origin",
    ),
    "NaN origin, mha": (
        lambda d: itk_with(d / "a.mha", "Offset = ", "0 nan 0"), "has a NaN or infinite origin",
    ),
    "infinite origin, nrrd": (
        lambda d: itk_with(d / "a.nrrd", "space origin: ", "(0,inf,0)"), "has a NaN or infinite origin",
    ),
    "bomb": (lambda d: bomb(d / "a.nii.gz"), "voxels start at byte"),
    "detached, absolute": (
        lambda d: itk_with(d / "a.mhd", "ElementDataFile = ", "/etc/passwd"), "outside its folder",
    ),
    "detached, above": (
        lambda d: itk_with(d / "a.nhdr", "data file: ", "../../etc/passwd"), "outside its folder",
    ),
    "detached, a link to a device": (
        lambda d: link(d / "zero", "/dev/zero").parent / itk_with(d / "a.mhd", "ElementDataFile = ", "zero").name,
        "is a link to a device, not a file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_or_lies_is_a_finding(tmp_path: Path, kind: str) -> None:
    make, problem = PLACES[kind]
    path = make(tmp_path)
    (finding,) = check_file(path)
    assert problem in finding.problem and finding.fix
    # The same of an image and of a label in a cohort, and of a file to be predicted; the good ones are used.
    whole = good(tmp_path / "good.nii.gz", 2.5)
    cases = [
        Case("bad", "bad", path),
        Case("label", "label", good(tmp_path / "other.nii.gz"), path),
        Case("good", "good", whole),
    ]
    from ssl3d.data.layouts.releases import Folder

    dataset = Folder().with_facts(label_values={1: "a"}, modality="mr", empty_labels=True)
    found = check_cases(cases, dataset)
    assert [problem in f.problem for f in found].count(True) == 2
    cohort = prepare(cases, dataset, Preparation(spacing_mm=3), tmp_path / "cache", policy="skip")
    assert [case.id for case in cohort.cases] == ["good"] and len(cohort.skipped) >= 2
    predicted = prepare_file(path, Preparation(spacing_mm=3), Intensity("minmax", 0, False, ""))
    assert isinstance(predicted, list) and problem in predicted[0].problem


@pytest.mark.parametrize("suffix", ["nii.gz", "mha"])
def test_a_spacing_that_lies_is_refused_before_anything_is_allocated(tmp_path: Path, suffix: str) -> None:
    """24 voxels an edge at 45 mm: 4.1 GiB at 1 mm, 153 GiB at 0.3 mm; predict resampled it for ever."""
    data = np.random.default_rng(0).random((24, 24, 24)).astype(np.float32)
    path = tmp_path / "d" / f"a.{suffix}"
    path.parent.mkdir()
    if suffix == "mha":
        image = sitk.GetImageFromArray(data)
        image.SetSpacing((45.0,) * 3)
        sitk.WriteImage(image, str(path))
    else:
        nibabel.save(nibabel.Nifti1Image(data, np.diag([45.0] * 3 + [1])), path)
    for spacing, gib in ((1.0, "4.14 GiB"), (0.3, "153 GiB")):
        found = prepare_file(path, Preparation(spacing_mm=spacing), Intensity("minmax", 0, False, ""))
        assert isinstance(found, list)
        assert "has voxels of 45 x 45 x 45 mm" in found[0].problem and gib in found[0].problem
    result = run("data", "prepare", path.parent, "--spacing", 0.3, "--cache", tmp_path / "c")
    assert (
        result.exit_code == 2
        and "limit 4 GiB" in result.output
        and "--spacing for data prepare" in result.output
    )
    assert run("data", "prepare", path.parent, "--spacing", 5, "--cache", tmp_path / "c").exit_code == 0
    boxed = Preparation(spacing_mm=5, crop="center", center_mm=(9e4, 9e4, 9e4))
    found = prepare_file(path, boxed, Intensity("minmax", 0, False, ""))
    assert isinstance(found, list) and "18000 x 18000 x 18000" in found[0].problem


def test_names_are_printed_without_their_control_characters(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for name in ("red\x1b[31m", "bell\a", "bytes\udcff", "ümlaut"):
        good(folder / f"{name}.nii").write_bytes(b"no image")
    for arguments in (("verify",), ("prepare", "--cache", tmp_path / "c")):
        result = run("data", *arguments, folder)
        assert (result.exit_code in {1, 2} and result.exception is None) or isinstance(
            result.exception, SystemExit
        )
        assert "\x1b[31m" not in result.output and "\a" not in result.output
        for shown in ("red\\x1b[31m.nii", "bell\\x07.nii", "bytes\\udcff.nii", "ümlaut.nii"):
            assert shown in result.output, result.output
    assert printable("a\nb") == "a\nb"


def test_a_cohort_of_bad_places_only_is_an_error(tmp_path: Path) -> None:
    from ssl3d.data.layouts.releases import Folder

    cases = [Case("a", "a", link(tmp_path / "a.nii", "gone")), Case("b", "b", pipe(tmp_path / "b.nii"))]
    with pytest.raises(DataError, match="2 problems in 2 files"):
        prepare(cases, Folder(), Preparation(), tmp_path / "cache", policy="skip")


def test_entries_with_the_name_of_an_image_do_not_vanish_from_verify(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    good(folder / "good.nii.gz")
    # A folder with that name, as some programs unpack: what is in it is read.
    inside = good(folder / "unpacked.nii.gz" / "inside.nii")
    inside.write_bytes(inside.read_bytes()[:-2] + b"\7\0")  # other voxels
    (folder / "empty.nii.gz").mkdir()
    pipe(folder / "pipe.nii.gz")
    pipe(folder / "control")  # without the ending of an image: none of ours
    link(folder / "device.nii", "/dev/zero")
    link(folder / "loop.mha", "loop.mha")
    link(folder / "gone.nrrd", "annex/object")
    result = run("data", "verify", folder)
    assert result.exit_code == 1
    for words in (
        "empty.nii.gz is an empty folder", "pipe.nii.gz is a pipe", "device.nii is a link to a device",
        "loop.mha is a link that leads back to itself", "gone.nrrd is a link to annex/object",
    ):  # fmt: skip
        name, problem = words.split(" ", 1)
        assert any(name in line and problem in line for line in result.output.splitlines()), (
            words,
            result.output,
        )
    assert "5 findings" in result.output and "inside.nii" not in result.output, result.output
