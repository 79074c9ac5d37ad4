"""Compact descriptors: one scan is first in the list, whatever was done to it, and what is kept is checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ssl3d.data.checks import signature as module
from ssl3d.data.checks.overlap import coarse_volume
from ssl3d.data.checks.signature import Block, blocks, nearest, signature
from ssl3d.data.phantoms import PhantomParameters, generate

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])


def phantom(number: int) -> np.ndarray:
    """A chest in [0, 1], 4 mm."""
    subject = generate("stoic", number, PhantomParameters(edge=40, spacing_mm=4.0))
    return np.clip((subject.image.astype(np.float32) + 1024) / 2048, 0, 1)


@pytest.fixture(scope="module")
def chests() -> list[np.ndarray]:
    return [phantom(number) for number in range(8)]


def described(volumes: list[np.ndarray]) -> list[np.ndarray]:
    return [signature(coarse_volume(volume, AFFINE, 4.0)) for volume in volumes]


def as_blocks(found: list[np.ndarray], size: int) -> Iterator[Block]:
    for start in range(0, len(found), size):
        part = found[start : start + size]
        yield Block(
            np.concatenate(part), np.repeat(range(start, start + len(part)), [len(one) for one in part])
        )


def test_a_changed_copy_is_first_among_people_of_one_kind(chests: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    changed = []
    for volume in chests:
        low, high = rng.integers(1, 7, 3), rng.integers(1, 7, 3)
        part = volume[tuple(slice(a, n - b) for a, b, n in zip(low, high, volume.shape, strict=True))]
        part = ndimage.shift(part, rng.uniform(-0.5, 0.5, 3), order=1, mode="nearest")  # another grid
        changed.append((0.8 * part + rng.normal(0, 0.005, part.shape) + 0.05).astype(np.float32))
    base, asked = described(chests), described(changed)
    assert all(len(one) <= module.POINTS and one.dtype == np.int8 for one in base)
    lists = nearest(asked, as_blocks(base, 8), 3)
    assert [one[0] for one in lists] == list(range(8)) and all(len(one) <= 3 for one in lists)
    in_parts = nearest(asked, as_blocks(base, 3), 3)  # blocks make no difference
    assert [one[0] for one in in_parts] == list(range(8))
    length = np.linalg.norm(base[0].astype(float) / 127, axis=1)
    np.testing.assert_allclose(length, 1, atol=0.03)


def test_neighbours_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow form: each point votes for the volumes of its nearest points by how much nearer they are than the sixth."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(40 * 6, 34))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    points = np.round(127 * vectors).astype(np.int8).reshape(40, 6, 34)
    asked = points[7, :4]
    monkeypatch.setattr(module, "_NEIGHBOURS", 240)
    (found,) = nearest([asked], as_blocks(list(points), 11), 40)
    votes = np.zeros(40)
    for one in asked.astype(np.float32) / 127:
        distance = ((points.astype(np.float32) / 127 - one) ** 2).sum(-1)
        best = 1 - distance.min(axis=1) / 2
        order = np.argsort(-best)
        votes[order[:5]] += best[order[:5]] - best[order[5]]
    assert found == sorted(np.flatnonzero(votes).tolist(), key=lambda v: (-votes[v], v)) and found[0] == 7


def test_what_is_kept_is_read_and_damage_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)
    rng = np.random.default_rng(2)
    bands = [rng.normal(size=(12, 13, 14)).astype(np.float32) for _ in range(5)]
    asked: list[int] = []

    def band(i: int) -> np.ndarray:
        asked.append(i)
        return bands[i]

    calls: list[tuple[int, int]] = []
    first = list(blocks(tmp_path, 5, band, lambda done, total, what: calls.append((done, total))))
    assert sorted(asked) == [0, 1, 2, 3, 4] and calls == [(n, 5) for n in range(1, 6)]
    assert [sorted(set(block.owners.tolist())) for block in first] == [[0, 1], [2, 3], [4]]
    asked.clear()
    again = list(blocks(tmp_path, 5, band))
    assert asked == [] and all(
        np.array_equal(a.vectors, b.vectors) for a, b in zip(first, again, strict=True)
    )
    (tmp_path / "00001.npz").write_bytes((tmp_path / "00001.npz").read_bytes()[:-40])
    third = list(blocks(tmp_path, 5, band))
    assert sorted(asked) == [2, 3] and "damaged and made again" in caplog.text
    assert all(np.array_equal(a.vectors, b.vectors) for a, b in zip(first, third, strict=True))


def test_nothing_to_see_is_in_no_list() -> None:
    flat = signature(np.zeros((10, 10, 10), np.float32))
    assert flat.shape == (0, 34)
    assert nearest([flat], as_blocks([flat, flat], 2), 3) == [[]]
