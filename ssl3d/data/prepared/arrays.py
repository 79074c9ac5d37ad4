"""Prepared arrays on disk: compressed in chunks by Blosc2, so that a crop is read without the rest.

As in nnU-Net v2: Zstandard after a byte shuffle. A chunk of 64^3 voxels holds blocks of 32^3, and only
blocks that a crop touches are decompressed (``benchmarks/speed/cache_speed.py``).
"""

from __future__ import annotations

from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from ssl3d.files import write_bytes

CHUNK, BLOCK = 64, 32
"""Edges in voxels."""
SUFFIX = ".b2nd"

Box = tuple[slice, slice, slice]
Where = Box | EllipsisType
"""A box of voxels, or ``...`` for the whole array."""


def save_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an array (D, H, W) atomically; the same array makes the same bytes.

    Returns:
        Name and length of the file, for the manifest.
    """
    import blosc2

    chunks, blocks = (tuple(min(edge, most) for edge in array.shape) for most in (CHUNK, BLOCK))
    frame = blosc2.asarray(
        np.ascontiguousarray(array), chunks=chunks, blocks=blocks,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 5, "nthreads": 1},
    ).to_cframe()  # fmt: skip
    write_bytes(path, frame)
    return {"name": path.name, "bytes": len(frame)}


def read_array(path: Path, where: Where = ...) -> np.ndarray:
    """Return an array (D, H, W), or the part of it in a box; read-only where it is memory-mapped.

    Args:
        path: made by :func:`save_array`, or a ``.npy`` file of an earlier cache.
        where: what to read; decompresses nothing else.
    """
    if path.suffix == ".npy":
        stored: np.ndarray = np.load(path, mmap_mode="r")
        return stored[where]
    import blosc2

    array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    return np.asarray(array[where])
