"""Image files that are none, that were cut, or that lie: each a function that writes one into an empty folder."""

from __future__ import annotations

import gzip
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from test_hostile import PLACES
from test_integrity import SHAPE, cut, noise, patch, save_itk, save_nifti

Maker = Callable[[Path], object]

ITK = [(ending, compress) for ending in ("nrrd", "mha", "nhdr", "mhd") for compress in (True, False)]
NAMES = ("a.nii", "a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd")
_OUTSIDE = (
    "folder",
    "nothing",
    "below a file",
    "endless name",
    "pipe without ending",
    "device without ending",
)
"""Places that lie in no folder, or have no name of an image: only who is given their path sees them."""


def saved(folder: Path, name: str, compress: bool = True) -> Path:
    """Write a whole file; the voxels of a detached header lie beside it."""
    if ".nii" in name:
        return save_nifti(folder / name, noise(shape=(20, 24, 28)))
    return save_itk(folder / name, compress, noise(shape=(20, 24, 28)))


def voxels_of(path: Path) -> Path:
    """Return the file that holds the voxels: itself, or what lies beside a detached header."""
    return next((other for other in path.parent.iterdir() if other != path), path)


def truncated() -> dict[str, Maker]:
    found: dict[str, Maker] = {}
    for name, compress in (("a.nii", True), ("a.nii.gz", True), *((f"a.{e}", c) for e, c in ITK)):
        for keep in (0.0, 0.3, 0.9, 0.9999):
            label = f"{name}{'' if compress else ', raw'}, of whose voxels {keep:g} are there"
            found[label] = lambda d, n=name, c=compress, k=keep: cut(voxels_of(saved(d, n, c)), k)  # type: ignore[misc]
    for ending, compress in ITK[4:]:
        label = f"{ending}{'' if compress else ', raw'} without its voxels"
        found[label] = lambda d, e=ending, c=compress: voxels_of(saved(d, f"a.{e}", c)).unlink()  # type: ignore[misc]
    return found


CONTENTS = {
    "a page of the web": b"<html>404 not found</html>\n" * 30, "zeros": bytes(2000), "the head of a gzip": b"\x1f\x8b\x08",
    "bytes": random.Random(0).randbytes(2000), "a picture": b"\x89PNG\r\n\x1a\n" + bytes(500),
    "a text of another coding": "Hallo Grüße\n".encode("utf-16") * 40, "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
}  # fmt: skip


def no_images() -> dict[str, Maker]:
    return {
        f"{name}: {what}": lambda d, n=name, c=content: (d / n).write_bytes(c)  # type: ignore[misc]
        for name in NAMES
        for what, content in CONTENTS.items()
    }


HEADERS: dict[str, tuple[int, str, tuple[float, ...]]] = {
    "affine of zeros": (280, "<12f", (0,) * 12), "NaN in the affine": (280, "<f", (np.nan,)),
    "infinite affine": (280, "<f", (np.inf,)), "singular affine": (280, "<12f", (1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0)),
    "metres for millimetres": (280, "<12f", (1e-3, 0, 0, 0, 0, 1e-3, 0, 0, 0, 0, 1e-3, 0)),
    "kilometres": (280, "<12f", (1e6, 0, 0, 0, 0, 1e6, 0, 0, 0, 0, 1e6, 0)),
    "size of nothing": (44, "<h", (0,)), "negative size": (44, "<h", (-5,)),
    "huge sizes": (40, "<4h", (3, 30000, 30000, 30000)), "nine axes": (40, "<h", (9,)), "no axes": (40, "<h", (0,)),
    "negative axes": (40, "<h", (-3,)), "unknown type": (70, "<h", (9999,)), "no type": (70, "<h", (0,)),
    "complex": (70, "<2h", (32, 64)), "voxels behind the end": (108, "<f", (1e7,)),
    "voxels before the beginning": (108, "<f", (-400,)), "voxels at NaN": (108, "<f", (np.nan,)),
    "another magic": (344, "<i", (0,)),
}  # fmt: skip
META = {
    "sizes missing": ("DimSize = ", None), "negative sizes": ("DimSize = ", "-5 6 7"),
    "huge sizes": ("DimSize = ", "90000 90000 90000"),
    "size of nothing": ("DimSize = ", "0 6 7"), "too few sizes": ("DimSize = ", "5 6"),
    "no number": ("DimSize = ", "a b c"),
    "unknown type": ("ElementType = ", "MET_WHAT"), "no type": ("ElementType = ", None), "two axes": ("NDims = ", "2"),
    "ninety axes": ("NDims = ", "90"), "zero spacing": ("ElementSpacing = ", "0.5 0 1.5"),
    "NaN spacing": ("ElementSpacing = ", "0.5 nan 1.5"),
    "NaN direction": ("TransformMatrix = ", "nan 0 0 0 1 0 0 0 1"),
    "singular direction": ("TransformMatrix = ", "1 1 0 1 1 0 0 0 1"),
    "a list of files": ("ElementDataFile = ", "LIST"), "no voxels": ("ElementDataFile = ", None),
}  # fmt: skip
NRRD = {
    "sizes missing": ("sizes: ", None), "negative sizes": ("sizes: ", "-5 6 7"),
    "huge sizes": ("sizes: ", "90000 90000 90000"),
    "size of nothing": ("sizes: ", "0 6 7"), "too few sizes": ("sizes: ", "5 6"), "no number": ("sizes: ", "a b c"),
    "unknown type": ("type: ", "what"), "no type": ("type: ", None), "ninety axes": ("dimension: ", "90"),
    "unknown encoding": ("encoding: ", "zstd"), "NaN direction": ("space directions: ", "(nan,0,0) (0,1,0) (0,0,1)"),
    "zero direction": ("space directions: ", "(0,0,0) (0,1,0) (0,0,1)"),
    "singular direction": ("space directions: ", "(1,1,0) (1,1,0) (0,0,1)"),
}  # fmt: skip


def with_field(path: Path, key: str, value: str | None) -> None:
    """Change a field of a MetaImage's or a NRRD's header, or take its line away."""
    line = key.encode() + b"[^\n]*" + (b"" if value is not None else b"\n")
    changed, count = re.subn(
        line, lambda _: b"" if value is None else key.encode() + value.encode(), path.read_bytes(), count=1
    )
    assert count == 1, key
    path.write_bytes(changed)


def headers() -> dict[str, Maker]:
    found: dict[str, Maker] = {
        f"nii: {what}": lambda d, p=place: patch(save_nifti(d / "a.nii"), p[0], p[1], *p[2])  # type: ignore[misc]
        for what, place in HEADERS.items()
    }
    for ending, fields in (("mha", META), ("nrrd", NRRD)):
        for what, (key, value) in fields.items():
            found[f"{ending}: {what}"] = lambda d, e=ending, k=key, v=value: with_field(  # type: ignore[misc]
                save_itk(d / f"a.{e}", False), k, v
            )
    return found


def gzipped(change: Callable[[bytes], bytes]) -> Maker:
    """Change the bytes of a NIfTI before they are compressed."""

    def make(folder: Path) -> None:
        plain = save_nifti(folder / "whole.nii").read_bytes()
        (folder / "whole.nii").unlink()
        (folder / "a.nii.gz").write_bytes(gzip.compress(change(plain), compresslevel=1))

    return make


def compressed(change: Callable[[bytearray], object]) -> Maker:
    """Change the bytes of a compressed NIfTI."""

    def make(folder: Path) -> None:
        path = save_nifti(folder / "a.nii.gz", noise(shape=(20, 24, 28)))
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return make


def _flipped(share: float) -> Maker:
    def change(data: bytearray) -> None:
        data[int(share * len(data))] ^= 0x10

    return compressed(change)


def _holed(value: float) -> Maker:
    def make(folder: Path) -> None:
        data = noise().astype(np.float32)
        data[3, 3, 3] = value
        save_nifti(folder / "a.nii.gz", data)

    return make


def streams() -> dict[str, Maker]:
    found: dict[str, Maker] = {
        f"nii.gz: a bit flipped at {share:g}": _flipped(share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)
    }
    return found | {
        "nii.gz: no checksum": compressed(lambda data: data.__delitem__(slice(-8, None))),
        "nii.gz: another checksum": compressed(lambda data: data.__setitem__(-7, data[-7] ^ 1)),
        "nii.gz: another length": compressed(lambda data: data.__setitem__(-3, data[-3] ^ 1)),
        "nii.gz: fewer voxels than promised": gzipped(lambda plain: plain[:-100]),
        "nii.gz: far more than promised": gzipped(lambda plain: plain + bytes(100 * 2**20)),
        "nii.gz: compressed twice": gzipped(lambda plain: gzip.compress(plain)),
        "nii.gz: a deflate without a gzip": lambda d: (d / "a.nii.gz").write_bytes(zlib.compress(bytes(500))),
    }


def shapes() -> dict[str, Maker]:
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colour = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    return {
        "4D": lambda d: save_nifti(d / "a.nii.gz", noise(shape=(4, 5, 6, 7))),
        "one slice": lambda d: save_nifti(d / "a.nii", noise(shape=(5, 6, 1))),
        "flat": lambda d: save_nifti(d / "a.nii.gz", noise(shape=(5, 6))),
        "colours, nii": lambda d: save_nifti(d / "a.nii", rgb),
        "colours, mha": lambda d: sitk.WriteImage(colour, str(d / "a.mha")),
        "colours, nrrd": lambda d: sitk.WriteImage(colour, str(d / "a.nrrd")),
        "complex voxels": lambda d: save_nifti(d / "a.nii", np.zeros(SHAPE, complex)),
        "a NaN": _holed(np.nan), "an infinity": _holed(np.inf), "minus infinity": _holed(-np.inf),
        "a CIFTI": lambda d: patch(cifti(d / "a.dtseries.nii"), 504, "<i", 3002),
    }  # fmt: skip


def cifti(path: Path) -> Path:
    nibabel.save(nibabel.Nifti2Image(noise(), np.eye(4)), path)
    return path


def detached() -> dict[str, Maker]:
    def pipe(folder: Path, ending: str) -> None:
        import os

        voxels = voxels_of(saved(folder, f"a.{ending}"))
        voxels.unlink()
        os.mkfifo(voxels)

    def itself(folder: Path, ending: str) -> None:
        path = saved(folder, f"a.{ending}")
        with_field(path, "ElementDataFile = " if ending == "mhd" else "data file: ", path.name)

    makers: dict[str, Maker] = {}
    for ending in ("mhd", "nhdr"):
        makers[f"{ending}: voxels from a pipe"] = lambda d, e=ending: pipe(d, e)  # type: ignore[misc]
        makers[f"{ending}: itself for voxels"] = lambda d, e=ending: itself(d, e)  # type: ignore[misc]
    return makers


IN_FOLDERS: dict[str, Maker] = {
    **{f"place: {name}": make for name, (make, _) in PLACES.items() if name not in _OUTSIDE},
    **truncated(), **no_images(), **headers(), **streams(), **shapes(), **detached(),
}  # fmt: skip
"""Files that a folder holds."""

BY_PATH: dict[str, Callable[[Path], Path]] = {
    name: make for name, (make, _) in PLACES.items() if name in _OUTSIDE
}
"""What can only be named by its path, which is returned."""
