"""Phantoms on disk, in the very layouts of the official releases.

root/
  pretrain/cardiac_0001.nii.gz                  HU
  mmwhs/ct_train/ct_train_1001_image.nii.gz     HU, with ..._label.nii.gz
  mmwhs/ct_test/ct_test_2001_image.nii.gz       the release hides these labels; here they are written
  asoca/Normal/CTCA/Normal_1.nrrd               air at 0, with Annotations/Normal_1.nrrd; Diseased/ the same
  candi/HC_001/HC_001_procimg.nii.gz            arbitrary units, with HC_001_seg.nii.gz
  stoic/data/mha/1001.mha                       HU, with metadata/reference.csv
  phantoms.json                                 parameters and SHA-256 of every file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.data.files.volume import write_itk
from ssl3d.data.phantoms.subjects import Cohort, PhantomParameters, generate, lesion_count
from ssl3d.errors import DataError, ReadError
from ssl3d.files import read_json, write_bytes, write_json
from ssl3d.rng import numpy_rng

VERSION = 2
"""Raised when a change of this package changes a file."""

ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "PIR", "ASL")
CANDI_GROUPS = ("BPDwithPsy", "BPDwithoutPsy", "HC", "SS")
SEVERE = 5
"""Lesions from which on ``probSevere`` is 1."""
MANIFEST, STARTED = "phantoms.json", "phantoms.started.json"

Counts = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One subject to write: cohort, number, and the files relative to the root."""

    cohort: Cohort
    index: int
    image: str
    label: str | None = None


def plan(counts: Counts) -> list[Item]:
    """Return every subject of the cohorts, with the names that the releases give them."""
    items = [Item("pretrain", i, f"pretrain/cardiac_{i + 1:04d}.nii.gz") for i in range(counts["pretrain"])]
    train, test = counts["mmwhs"]
    for i in range(train + test):
        part, number = ("train", 1001 + i) if i < train else ("test", 2001 + i - train)
        stem = f"mmwhs/ct_{part}/ct_{part}_{number}"
        items.append(Item("mmwhs", i, f"{stem}_image.nii.gz", f"{stem}_label.nii.gz"))
    for i in range(counts["asoca"]):
        group, number = ("Diseased" if i % 2 else "Normal"), i // 2 + 1
        items.append(
            Item(
                "asoca",
                i,
                f"asoca/{group}/CTCA/{group}_{number}.nrrd",
                f"asoca/{group}/Annotations/{group}_{number}.nrrd",
            )
        )
    for i in range(counts["candi"]):
        name = f"{CANDI_GROUPS[i % 4]}_{i // 4 + 1:03d}"
        items.append(
            Item("candi", i, f"candi/{name}/{name}_procimg.nii.gz", f"candi/{name}/{name}_seg.nii.gz")
        )
    items += [Item("stoic", i, f"stoic/data/mha/{1001 + i}.mha") for i in range(counts["stoic"])]
    return items


def write_cohorts(
    root: Path,
    parameters: PhantomParameters,
    counts: Counts,
    *,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Write all cohorts below ``root``; finished files are kept, so a killed call can be repeated.

    Args:
        root: folder, made if missing.
        parameters: what decides the subjects.
        counts: subjects a cohort: {"pretrain": n, "mmwhs": (train, test), "asoca": n, "candi": n,
            "stoic": n}.
        workers: threads; None: one a core.
        progress: called with (done, total, what).

    Raises:
        DataError: ``root`` holds phantoms of other parameters, or something else.
    """
    wanted = json.loads(
        json.dumps({"version": VERSION, "parameters": asdict(parameters), "counts": dict(counts)})
    )
    if _check_root(root, wanted):
        return
    write_json(root / STARTED, wanted)
    items = plan(counts)
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        futures = [pool.submit(_write_item, root, item, parameters) for item in items]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                hashes |= future.result()
                if progress is not None:
                    progress(done, len(items), "writing phantoms")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rows = []
    for item in items:
        if item.cohort == "stoic":
            lesions = lesion_count(item.index, parameters)
            rows.append(f"{Path(item.image).stem},{int(lesions > 0)},{int(lesions >= SEVERE)}")
    if rows:
        write_bytes(
            root / "stoic/metadata/reference.csv",
            "\n".join(["PatientID,probCOVID,probSevere", *rows, ""]).encode(),
        )
    write_json(root / MANIFEST, {**wanted, "sha256": dict(sorted(hashes.items()))})
    (root / STARTED).unlink(
        missing_ok=True
    )  # another process may have written the same files and finished first


def _check_root(root: Path, wanted: dict[str, Any]) -> bool:
    """Return whether ``root`` is finished already."""
    for name in (MANIFEST, STARTED, MANIFEST):  # again: another process may finish between the first two
        try:
            found = read_json(root / name)
        except ReadError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                continue
            raise DataError(f"{error} Fix: remove the folder; phantoms are made again.") from error
        files = found.pop("sha256", {}) if isinstance(found, dict) else {}
        if found != wanted:
            raise DataError(
                f"{root} holds phantoms of other parameters ({name} says which): give another folder."
            )
        # A file that was deleted since is written again.
        return name == MANIFEST and all((root / file).is_file() for file in files)
    if root.is_dir() and any(not path.name.startswith(f".{STARTED}") for path in root.iterdir()):
        raise DataError(f"{root} is not empty and holds no {MANIFEST}: give another folder.")
    return False


def _write_item(root: Path, item: Item, parameters: PhantomParameters) -> dict[str, str]:
    """Write one subject unless it is there; return SHA-256 by relative path."""
    names = [item.image] if item.label is None else [item.label, item.image]
    # The image is written last: where it is, its label is too.
    if not (root / item.image).is_file():
        subject = generate(item.cohort, item.index, parameters)
        rng = numpy_rng(parameters.seed, "orientation", item.cohort, item.index)
        orientation = ORIENTATIONS[int(rng.integers(len(ORIENTATIONS)))]
        affine = subject.affine.copy()
        affine[:3, 3] += rng.uniform(-60, 60, 3).round(1)  # scanners put the origin anywhere
        if item.label is not None:
            assert subject.labels is not None
            _write_volume(root / item.label, subject.labels.astype(np.int16), affine, orientation)
        _write_volume(root / item.image, subject.image, affine, orientation)
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}


def _write_volume(path: Path, data: NDArray[np.int16], affine: NDArray[np.float64], orientation: str) -> None:
    """Write a RAS volume in another orientation, whole or not at all."""
    import nibabel
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    affine = affine @ inv_ornt_aff(change, data.shape)
    data = np.ascontiguousarray(nibabel.apply_orientation(data, change))
    if "".join(path.suffixes) == ".nii.gz":
        image = nibabel.Nifti1Image(data, affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
        # A fixed time stamp, so that equal volumes are equal files.
        import gzip

        write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=3, mtime=0))
    else:
        import SimpleITK

        lps = np.diag([-1, -1, 1, 1]) @ affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image = SimpleITK.GetImageFromArray(data.transpose(2, 1, 0))
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(lps[:3, 3].tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        write_itk(path, image)
