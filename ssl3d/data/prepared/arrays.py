"""Prepared arrays on disk: compressed in chunks by Blosc2, so that a crop is read without the rest.

As in nnU-Net v2: Zstandard after a byte shuffle. A chunk of 64^3 voxels holds blocks of 32^3, and only
blocks that a crop touches are decompressed (row ``crop`` of ``benchmarks/speed``).
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from ssl3d.errors import DataError
from ssl3d.files import set_aside, write_bytes

__without_effect__ = "voxels come back as they were stored: a digest says so"

CHUNK, BLOCK = 64, 32
"""Edges in voxels."""
SUFFIX = ".b2nd"
LOOK_AGAIN = "look-again"
"""File in the folder of a cohort: one of its arrays was found missing or damaged."""

Box = tuple[slice, slice, slice]
Where = Box | EllipsisType
"""A box of voxels, or ``...`` for the whole array."""


def save_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an array (D, H, W) atomically; the same array makes the same bytes.

    Returns:
        Name, length and SHA-256 of the file, for the manifest.
    """
    import blosc2

    chunks, blocks = (tuple(min(edge, most) for edge in array.shape) for most in (CHUNK, BLOCK))
    frame = blosc2.asarray(
        np.ascontiguousarray(array), chunks=chunks, blocks=blocks,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 5, "nthreads": 1},
    ).to_cframe()  # fmt: skip
    write_bytes(path, frame)
    return {"name": path.name, "bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest()}


_verified: set[tuple[str, str]] = set()
_verifying = threading.Lock()


def verify_array(path: Path, digest: str) -> None:
    """Compare a stored array with its digest, once in a process (row ``crop`` of ``benchmarks/speed``).

    A damaged one is renamed, so that the next preparation stores it again.

    Raises:
        DataError: it is damaged, or not there.
    """
    key = (str(path), digest)
    if key in _verified:
        return
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()  # without the interpreter's lock
    except OSError as error:
        _look_again(path.parent)
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Fix: run the command again; it is prepared anew."
        ) from error
    if found == digest:
        _verified.add(key)
        return
    with _verifying:  # of several threads, the first renames it
        new = set_aside(path) if path.exists() else path
    _look_again(path.parent)
    raise DataError(
        f"{path} is damaged: its SHA-256 is not the one that it was stored with. It is now called {new.name}. "
        "Fix: run the command again; it is prepared anew."
    )


def _look_again(folder: Path) -> None:
    with suppress(OSError):  # read-only
        (folder / LOOK_AGAIN).touch()


def read_array(path: Path, where: Where = ..., digest: str | None = None) -> np.ndarray:
    """Return an array (D, H, W), or the part of it in a box; read-only where it is memory-mapped.

    Args:
        path: made by :func:`save_array`, or a ``.npy`` file of an earlier cache.
        where: what to read; decompresses nothing else.
        digest: SHA-256 that its file must have; None: not known, as of an earlier cache.

    Raises:
        DataError: the file has another digest.
    """
    if digest is not None:
        verify_array(path, digest)
    if path.suffix == ".npy":
        stored: np.ndarray = np.load(path, mmap_mode="r")
        return stored[where]
    import blosc2

    array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    return np.asarray(array[where])
