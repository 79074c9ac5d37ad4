"""The compressed cache: boxes equal slices, bytes are reproducible, caches of earlier versions are read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ssl3d.data.prepared.arrays import SUFFIX, read_array, save_array

BOXES = [
    (slice(0, 40), slice(0, 70), slice(0, 130)),  # all of it
    (slice(3, 19), slice(60, 70), slice(62, 66)),  # over the edge of a chunk in W, and a cut chunk in H
    (slice(39, 40), slice(0, 1), slice(129, 130)),  # one voxel
    (slice(30, 40), slice(33, 65), slice(31, 97)),
]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("box", BOXES)
def test_a_box_is_the_slice_of_the_array(tmp_path: Path, dtype: type, box: tuple[slice, ...]) -> None:
    array = (np.random.default_rng(0).random((40, 70, 130)) * 200).astype(dtype)
    path = tmp_path / f"a{SUFFIX}"
    stored = save_array(path, array)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert stored == {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
    read = read_array(path, box)  # type: ignore[arg-type]
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array[box])
    np.testing.assert_array_equal(read_array(path), array)


def test_a_box_decompresses_only_the_blocks_it_touches(tmp_path: Path) -> None:
    """Damage in a far block is not even seen: the proof that it was not read."""
    array = np.random.default_rng(0).random((64, 64, 256), dtype=np.float32)
    path = tmp_path / f"a{SUFFIX}"
    save_array(path, array)
    data = bytearray(path.read_bytes())
    far = len(data) * 7 // 8  # in the last of four chunks
    data[far : far + 4096] = bytes(4096)
    path.write_bytes(data)
    near = (slice(0, 64), slice(0, 64), slice(0, 64))
    np.testing.assert_array_equal(read_array(path, near), array[near])
    try:
        whole = read_array(path)
    except Exception:  # what the library raises on damage is its own affair
        return
    assert not np.array_equal(whole, array)


def test_the_same_array_makes_the_same_bytes_and_a_transposed_one_is_stored_right(tmp_path: Path) -> None:
    array = np.arange(20 * 30 * 40, dtype=np.float32).reshape(20, 30, 40)
    save_array(tmp_path / f"a{SUFFIX}", array)
    save_array(tmp_path / f"b{SUFFIX}", array.copy())
    save_array(tmp_path / f"c{SUFFIX}", array.T)
    assert (tmp_path / f"a{SUFFIX}").read_bytes() == (tmp_path / f"b{SUFFIX}").read_bytes()
    np.testing.assert_array_equal(read_array(tmp_path / f"c{SUFFIX}"), array.T)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n}{SUFFIX}" for n in "abc"]
