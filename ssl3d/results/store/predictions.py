"""Segmentations kept beside their records, for people to look at.

    STORE/predictions/<name of the record>/<case>.nii.gz                one method's labels, uint8
    STORE/predictions/cases/<task>-<fingerprint>/<case>-image.nii.gz    the image, uint8
    STORE/predictions/cases/<task>-<fingerprint>/<case>-truth.nii.gz    the true labels, uint8

All are on the prepared grid. A record names its files, relative to the store, under ``predictions``.
"""

from __future__ import annotations

import gzip
import re
from typing import TYPE_CHECKING, Any

from ssl3d.files import write_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from ssl3d.results.store.store import ResultStore

Kept = dict[str, Any]
"""``{"case": id, "prediction": path, "image": path, "truth": path}``, paths relative to the store."""


def keep_prediction(
    store: ResultStore,
    identity: dict[str, Any],
    case: str,
    arrays: dict[str, np.ndarray],
    affine: np.ndarray,
) -> Kept:
    """Write one case's segmentation, and its image and truth where they are not there yet.

    Args:
        store: the store of the record.
        identity: of the record.
        case: the case's id.
        arrays: ``prediction`` and ``truth``: labels (D, H, W) in 0..255; ``image``: (D, H, W) in [0, 1].
        affine: (4, 4), voxel index -> RAS+ mm.
    """
    name = re.sub(r"[^A-Za-z0-9_.+-]", "_", case).lstrip(".")
    shared = store.root / "predictions" / "cases" / f"{identity['task']}-{identity['task_data'][:12]}"
    places = {
        "prediction": store.root / "predictions" / store.path_for(identity).stem / f"{name}.nii.gz",
        "image": shared / f"{name}-image.nii.gz",
        "truth": shared / f"{name}-truth.nii.gz",
    }
    for kind, path in places.items():
        if kind == "prediction" or not path.exists():
            values = arrays[kind] * 255 + 0.5 if kind == "image" else arrays[kind]
            write_bytes(path, nifti(values, affine))
    return {"case": case, **{kind: _relative(store, path) for kind, path in places.items()}}


def nifti(values: np.ndarray, affine: np.ndarray) -> bytes:
    """Return (D, H, W) as a compressed NIfTI of uint8, without a time stamp."""
    import nibabel
    import numpy as np

    image = nibabel.Nifti1Image(np.ascontiguousarray(values, dtype=np.uint8), affine)
    return gzip.compress(image.to_bytes(), mtime=0)


def _relative(store: ResultStore, path: Path) -> str:
    return path.relative_to(store.root).as_posix()
