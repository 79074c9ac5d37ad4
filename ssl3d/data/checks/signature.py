"""A compact descriptor of a volume, so that one scan is found among very many without comparing it with each.

As in Toews and Wells (Efficient and robust model-to-image alignment using 3D scale-invariant features, MedIA 2013) and
Chauvin et al. (Neuroimage signature from salient keypoints is highly specific to individuals, NeuroImage 2020): a scan is
known by the neighbourhoods of its salient points. A crop keeps those that it holds, a shift all of them; dividing by their
norm makes contrast no matter. Points are extrema of the band-passed volume of :mod:`ssl3d.data.checks.overlap`; a
neighbourhood is 5 x 5 x 5 samples two voxels apart, of which the 34 lowest orders of a cosine transform are kept, a byte
each: 8.5 kB a volume.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np

from ssl3d.files import write_bytes
from ssl3d.parallel import Progress, run_parallel

logger = logging.getLogger(__name__)

POINTS = 256
"""Salient points of a volume, at most."""
ASKED = 64
"""Those of a test image that are looked for."""
BLOCK = 1024
"""Volumes whose descriptors are kept in one file."""

_RADIUS = 2  # voxels within which a point is the most salient
_LEAST = 0.05  # of the most salient point
_SAMPLES, _STEP, _ORDERS = 5, 2.0, 34
_NEIGHBOURS = 16
_VOTES = 5  # volumes a point votes for at most
_MESSAGE = "describing the volumes for pretraining"


def signature(band: np.ndarray) -> np.ndarray:
    """Return the neighbourhoods of the salient points of a band-passed volume, the most salient first.

    Args:
        band: (D, H, W) float32, of :func:`ssl3d.data.checks.overlap.coarse_volume`.

    Returns:
        (up to 256, 34) int8; 127 times vectors of length 1.
    """
    from scipy import ndimage

    strength = np.abs(band)
    highest = ndimage.maximum_filter(strength, 2 * _RADIUS + 1, mode="constant")
    at = np.argwhere((strength == highest) & (strength > _LEAST * strength.max()))  # (P, 3)
    at = at[np.argsort(-strength[tuple(at.T)], kind="stable")[:POINTS]]
    offsets = (np.arange(_SAMPLES) - (_SAMPLES - 1) / 2) * _STEP
    grid = np.stack(np.meshgrid(offsets, offsets, offsets, indexing="ij"), -1).reshape(-1, 3)  # (125, 3)
    places = (_between_voxels(strength, at)[:, None] + grid).reshape(-1, 3).T
    samples = ndimage.map_coordinates(band, places, order=1, mode="nearest").reshape(len(at), len(grid))
    vectors = samples @ _cosines()  # (P, 34)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.round(127 * vectors / np.maximum(length, 1e-12)).astype(np.int8)


def _between_voxels(strength: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the tops of parabolas through the points (P, 3) and their neighbours along each axis."""
    tops = at.astype(float)
    last = np.array(strength.shape) - 1
    for axis in range(3):
        step = np.eye(3, dtype=int)[axis]
        low, top, high = (strength[tuple(np.clip(at + k * step, 0, last).T)] for k in (-1, 0, 1))
        bend = low + high - 2 * top
        tops[:, axis] += np.where(
            bend < 0, np.clip((low - high) / (2 * np.minimum(bend, -1e-12)), -0.5, 0.5), 0
        )
    return tops


@cache
def _cosines() -> np.ndarray:
    """Return the lowest orders of a cosine transform of 5 x 5 x 5 samples but the mean: (125, 34) float32."""
    n = _SAMPLES
    waves = np.cos(np.pi * (np.arange(n) + 0.5) * np.arange(n)[:, None] / n)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    cube = np.einsum("ai,bj,ck->abcijk", waves, waves, waves).reshape(n**3, n**3)
    order = np.add.outer(np.add.outer(np.arange(n), np.arange(n)), np.arange(n)).ravel()
    return cube[np.argsort(order, kind="stable")[1 : _ORDERS + 1]].T.astype(np.float32)


# --- Of a cohort -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Descriptors of some volumes.

    Attributes:
        vectors: those of all points (P, 34) int8.
        owners: the volume of each (P,).
    """

    vectors: np.ndarray
    owners: np.ndarray


def blocks(
    folder: Path, volumes: int, band: Callable[[int], np.ndarray], progress: Progress | None = None
) -> Iterator[Block]:
    """Yield the descriptors of volumes 0, 1, ... in blocks; each is kept, so a killed call goes on where it stopped.

    Args:
        folder: where they are kept.
        volumes: how many there are.
        band: returns the band-passed volume of a number.
        progress: told about every volume that was described.
    """
    for start in range(0, volumes, BLOCK):
        numbers = range(start, min(volumes, start + BLOCK))
        path = folder / f"{start // BLOCK:05d}.npz"
        kept = _kept(path, len(numbers))
        if kept is None:
            told = (
                (lambda done, _, what, start=start: progress(start + done, volumes, what))
                if progress
                else None
            )
            made = run_parallel(lambda number: signature(band(number)), numbers, None, told, _MESSAGE)
            kept = np.concatenate(made), np.array([len(one) for one in made])
            buffer = BytesIO()
            np.savez(buffer, vectors=kept[0], counts=kept[1])
            write_bytes(path, buffer.getvalue())
        yield Block(kept[0], np.repeat(np.array(numbers), kept[1]))


def _kept(path: Path, volumes: int) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            vectors, counts = stored["vectors"], stored["counts"]
        if len(counts) == volumes and vectors.shape == (counts.sum(), _ORDERS) and vectors.dtype == np.int8:
            return vectors, counts
    except Exception as error:  # zipfile and numpy raise many kinds
        logger.debug("%s: %s", path, error)
    logger.warning("%s is damaged and made again", path)
    return None


def nearest(asked: Sequence[np.ndarray], base: Iterator[Block], many: int) -> list[list[int]]:
    """Return for each image the volumes that share most neighbourhoods with it, best first, ``many`` at most.

    Each of the :data:`ASKED` most salient points of an image looks for the neighbourhoods that are most like its own
    (scikit-learn, exact), and votes for the volumes of the nearest by how much nearer they are than the next.

    Args:
        asked: descriptors of the images, of :func:`signature`.
        base: those of the volumes.
        many: length of a list.
    """
    from sklearn.neighbors import NearestNeighbors

    points = np.concatenate([one[:ASKED] for one in asked]).astype(np.float32) / 127
    far, owner = np.zeros((len(points), 0)), np.zeros((len(points), 0), int)
    for block in base:
        if not len(block.vectors) or not len(points):
            continue
        search = NearestNeighbors(algorithm="brute").fit(block.vectors.astype(np.float32) / 127)
        near, which = search.kneighbors(points, min(_NEIGHBOURS, len(block.vectors)))
        far, owner = np.hstack([far, near]), np.hstack([owner, block.owners[which]])
        best = np.argsort(far, axis=1, kind="stable")[:, :_NEIGHBOURS]
        far, owner = np.take_along_axis(far, best, 1), np.take_along_axis(owner, best, 1)
    lists, start = [], 0
    for one in asked:
        stop = start + len(one[:ASKED])
        votes: dict[int, float] = {}
        for row, volumes in zip(1 - far[start:stop] ** 2 / 2, owner[start:stop], strict=True):
            first: dict[int, float] = {}  # volume -> its most similar neighbourhood
            for similarity, volume in zip(row.tolist(), volumes.tolist(), strict=True):
                first.setdefault(volume, similarity)
            ranked = list(first.items())
            next_best = ranked[_VOTES][1] if len(ranked) > _VOTES else row[-1] - 1e-6
            for volume, similarity in ranked[:_VOTES]:
                votes[volume] = votes.get(volume, 0.0) + similarity - next_best
        lists.append(sorted(votes, key=lambda volume: (-votes[volume], volume))[:many])
        start = stop
    return lists
