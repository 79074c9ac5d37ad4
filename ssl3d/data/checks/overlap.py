"""Leakage: test images that were among the volumes for pretraining, or among the training images of their task.

Three comparisons, each catching what the one before cannot: the same file (SHA-256), the same voxels
in another file (hash of the voxels in RAS+ order), and the same scan after resampling or cropping.
The last one is a perceptual hash: every prepared volume becomes a small band-passed volume on a
coarse grid, and two of them are compared by their normalised cross-correlation at the best of all
shifts (Padfield, Masked object registration in the Fourier domain, IEEE TIP 2012). Prepared volumes
have one orientation and are measured in millimetres, so a crop is a shift and nothing else; the
correlation ignores the scale of intensities, and the band leaves out noise and shading.

Among more than :data:`EXHAUSTIVE` volumes, those are compared that :mod:`ssl3d.data.checks.signature` finds to share most
with the test image, and some others, from which the best must stand out.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ssl3d.data.checks.signature import Block, blocks, nearest, signature
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.grids import resample
from ssl3d.errors import ReadError
from ssl3d.files import read_json, write_bytes, write_json
from ssl3d.parallel import Progress, run_parallel

logger = logging.getLogger(__name__)

COARSE_MM = 4.0
"""Spacing of the coarse grid; that of the prepared volumes where it is larger."""

COARSEST_MM = 6.0
"""Spacing above which the grid shows too little of an anatomy to tell one person from another."""

SAME_SCAN = 0.97
"""Correlation from which on two volumes count as one scan. On phantoms, at 4 mm: one scan against a
crop of 60 to 90 % of each edge, resampled to 1.05 to 1.7 of its spacing, with other contrast and
noise 0.974 or more; two subjects 0.92 or less (0.88 over 1,500 pairs of the quick preset)."""

LEAST_OVERLAP = 0.5
"""Smallest part of the smaller volume that must lie within the other one."""

STANDS_OUT = 0.2
"""Distance to 1 of the correlation of two cases, by that of the upper quartile of the others, up to which it tells alone."""

SAME_TEXTURE = 0.65
"""Correlation of the texture from which on two volumes count as one scan. On four kinds of made volumes at 2 and 4 mm: one
scan against a coarser, cropped or noisier copy 0.70 or more; two subjects 0.61 or less (0.30 but for 15 voxels an edge)."""

EXHAUSTIVE = 1000
"""Volumes up to which a test image is compared with each."""

CANDIDATES, OTHERS = 16, 48
"""Of more volumes: how many a test image is compared with, and how many others, the same for all, tell what is usual."""

_TEXTURE_EDGE = 96  # largest edge in voxels of the grid on which texture is compared
_TEXTURE_OVERLAP = 0.4
_FINE, _WIDE = 1.0, 2.0  # the band: difference of two Gaussians, in voxels of the coarse grid
_VERSION = 3  # of what is stored; raised when this module changes it
_FIRST_EDGE = 48  # largest edge in voxels at which all pairs are compared
_SHORTLIST = 8
_TWINS_EDGE = 20  # the same within a cohort, where all pairs are many more
_TWINS_SHORTLIST = 4
_TWINS_LEAST = 0.75  # correlation on that grid below which no pair is looked at again
_MEMORY_BYTES = 2**29
_MESSAGE = "looking for test images among the volumes for pretraining"
_WITHIN = "looking for scans that are there as two subjects"
_TRIM = 2  # voxels at each border, where the band depends on what lies outside


class ScanCase(Protocol):
    """One volume without its voxels; :class:`~ssl3d.data.prepared.cohort.PreparedCase` is one."""

    @property
    def subject(self) -> str:
        """Who is on it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Edges (D, H, W) in voxels."""

    @property
    def spacing_mm(self) -> float:
        """Isotropic spacing."""

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), voxel index -> RAS+ mm."""

    @property
    def native_affine(self) -> np.ndarray:
        """(4, 4), the same for the file it was made from."""


class Scans(Protocol):
    """Volumes that can be compared; :class:`~ssl3d.data.prepared.cohort.PreparedCohort` is one."""

    @property
    def folder(self) -> Path:
        """Where what was found is kept."""

    @property
    def cases(self) -> Sequence[ScanCase]:
        """The volumes in order."""

    def image(self, i: int) -> np.ndarray:
        """Return volume ``i``: (D, H, W) float32 in [0, 1]."""


@dataclass(frozen=True)
class Overlap:
    """One test image that was found among the volumes for pretraining.

    Attributes:
        test, pretraining: ids of the cases.
        how: "same file", "same voxels", or "same scan (correlation 0.99)".
    """

    test: str
    pretraining: str
    how: str


def find_twins(cohort: PreparedCohort, progress: Progress | None = None) -> list[Overlap]:
    """Return the pairs of labelled cases of different subjects that show the same scan; kept for the next time.

    All pairs are compared on a grid of at most 20 voxels an edge, and the best few of each case on the grid of
    :func:`find_overlap`. Images of one kind can be as alike as copies there, so a pair counts only if it stands out from
    the others of its cases, or if the texture between the edges is the same.

    Args:
        cohort: prepared cases of a task.
        progress: told about every image that was compared.
    """
    cases = [i for i, case in enumerate(cohort.cases) if case.labelled]
    found: dict[tuple[int, int], str] = {}
    for kind, how in ((0, "same file"), (1, "same voxels")):
        first: dict[str, int] = {}
        for i in cases:
            other = first.setdefault(cohort.source_digests(i)[kind], i)
            if cohort.cases[other].subject != cohort.cases[i].subject:
                found.setdefault((other, i), how)
    spacing = max(COARSE_MM, cohort.preparation.spacing_mm)
    if spacing > COARSEST_MM:
        _say_too_coarse(cohort.dataset, spacing)
    else:
        for i, j, score in same_scans(cohort, cases, spacing, progress):
            found.setdefault((i, j), f"same scan (correlation {score:.2f})")
    return [Overlap(cohort.cases[j].id, cohort.cases[i].id, how) for (i, j), how in sorted(found.items())]


def same_scans(
    cohort: Scans, cases: Sequence[int], spacing_mm: float, progress: Progress | None
) -> list[tuple[int, int, float]]:
    """Return pairs of cases of different subjects that are one scan, with their correlation at ``spacing_mm``.

    Args:
        cohort: the volumes.
        cases: places of those that are compared.
        spacing_mm: of the grid, at most :data:`COARSEST_MM`.
        progress: told about every volume that was compared.
    """
    if len(cases) < 2:
        return []
    store = cohort.folder / f"same-scans-v{_VERSION}-{spacing_mm:g}.json"
    if store.is_file():
        try:
            return [(int(i), int(j), float(score)) for i, j, score in read_json(store)]
        except (ReadError, ValueError, TypeError):
            logger.warning("%s is damaged and made again", store)
    edges = [edge * case.spacing_mm for case in cohort.cases for edge in case.shape]
    first_mm = max(spacing_mm, max(edges) / _TWINS_EDGE)
    first = coarse_volumes(cohort, cases, first_mm)
    scores = _correlations(first, first, progress, above=True)  # (N, N)
    scores = np.maximum(scores, scores.T)
    subjects = np.unique([cohort.cases[i].subject for i in cases], return_inverse=True)[1]
    scores[subjects[:, None] == subjects[None, :]] = -1
    best = np.argsort(-scores, axis=1)[:, :_TWINS_SHORTLIST]
    pairs = sorted({(min(n, m), max(n, m)) for n, row in enumerate(best.tolist()) for m in row
                    if scores[n, m] >= _TWINS_LEAST})  # fmt: skip

    def compare(pair: tuple[int, int]) -> float:
        ours, theirs = coarse_volumes(cohort, [cases[n] for n in pair], spacing_mm, workers=1)
        score = float(_correlations([ours], [theirs], None, workers=1)[0, 0])
        others = np.concatenate([np.delete(scores[n], m) for n, m in (pair, pair[::-1])])
        one, other = ((cohort, cases[n]) for n in pair)
        same = score >= SAME_SCAN and (_stands_out(score, _quartile(others)) or _same_texture(one, other))
        return score if same else -1.0

    found = run_parallel(compare, pairs, None, progress, _WITHIN)
    same = [
        (cases[n], cases[m], score) for (n, m), score in zip(pairs, found, strict=True) if score >= SAME_SCAN
    ]
    write_json(store, [list(pair) for pair in same])
    return same


@cache
def _say_too_coarse(dataset: str, spacing_mm: float) -> None:
    """Say once, whatever the data set is compared with."""
    logger.warning(
        "%s at %g mm: too coarse to find scans that were resampled or cropped; files and voxels are compared",
        dataset, spacing_mm,
    )  # fmt: skip


def _quartile(others: np.ndarray) -> float | None:
    """Return the upper quartile of the correlations with other volumes; None where there are too few to compare with."""
    others = others[others > -1]  # -1: not compared
    return float(np.quantile(others, 0.75)) if len(others) >= 4 else None


def _stands_out(score: float, quartile: float | None) -> bool:
    """Whether two volumes are far more alike than they are to others."""
    return quartile is not None and 1 - score <= STANDS_OUT * (1 - quartile)


def _same_texture(one: tuple[Scans, int], other: tuple[Scans, int]) -> bool:
    """Whether two volumes have the same texture where they are smooth: noise and fine structure, but no edges."""
    cases = [cohort.cases[i] for cohort, i in (one, other)]
    edge = max(edge * case.spacing_mm for case in cases for edge in case.shape)
    native = max(float(np.linalg.norm(case.native_affine[:3, :3], axis=0).max()) for case in cases)
    # Nothing finer is in both of them.
    spacing_mm = max(native, edge / _TEXTURE_EDGE, *(case.spacing_mm for case in cases))
    parts = [
        _texture(np.asarray(cohort.image(i)), cohort.cases[i].affine, spacing_mm)
        for cohort, i in (one, other)
    ]
    shape = tuple(_fast(a + b - 1) for a, b in zip(parts[0][0].shape, parts[1][0].shape, strict=True))
    mine, theirs = (_Spectra(volume, shape, support) for volume, support in parts)
    return mine.correlation(theirs, _TEXTURE_OVERLAP) >= SAME_TEXTURE


def _texture(image: np.ndarray, affine: np.ndarray, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the finest structure of a volume (D, H, W), and where it is neither air nor at an edge (bool)."""
    from scipy import ndimage

    small, _ = resample(np.asarray(image, dtype=np.float32), affine, spacing_mm)
    fine = small - ndimage.median_filter(small, 3, mode="nearest")  # keeps nothing of straight edges
    slope = ndimage.gaussian_gradient_magnitude(small, _FINE, mode="nearest")
    body = small > 0.15 * small.max()
    smooth = body & (slope <= np.median(slope[body]))
    return np.where(smooth, fine - fine[smooth].mean(), 0), smooth


def find_overlap(
    cohort: PreparedCohort,
    test: Sequence[int],
    pretraining: PreparedCohort,
    progress: Progress | None = None,
    among: Sequence[int] | None = None,
) -> list[Overlap]:
    """Return the test cases that are among the volumes for pretraining, each once, with the best match.

    Args:
        cohort: prepared cases of a task.
        test: indices of the test cases.
        pretraining: prepared volumes for pretraining.
        among: indices of the volumes that count; None: all.
        progress: told about every test image that was compared.
    """
    files: dict[str, str] = {}
    contents: dict[str, str] = {}
    among = range(len(pretraining)) if among is None else among
    for i in among:
        file, voxels = pretraining.source_digests(i)
        files.setdefault(file, pretraining.cases[i].id)
        contents.setdefault(voxels, pretraining.cases[i].id)
    found: dict[int, Overlap] = {}
    for i in test:
        file, voxels = cohort.source_digests(i)
        if file in files:
            found[i] = Overlap(cohort.cases[i].id, files[file], "same file")
        elif voxels in contents:
            found[i] = Overlap(cohort.cases[i].id, contents[voxels], "same voxels")
    spacing = max(COARSE_MM, cohort.preparation.spacing_mm, pretraining.preparation.spacing_mm)
    rest = [i for i in test if i not in found]
    if spacing > COARSEST_MM:
        _say_too_coarse(cohort.dataset, spacing)
        rest = []
    rest = _worth_comparing(cohort, rest, (pretraining, among), spacing, progress)
    best = _best_matches(cohort, rest, (pretraining, among), spacing, progress)
    for i, (matches, quartile) in best.items():
        for score, place in matches:
            ours, theirs = (cohort, i), (pretraining, place)
            if score >= SAME_SCAN and (_stands_out(score, quartile) or _same_texture(ours, theirs)):
                how = f"same scan (correlation {score:.2f})"
                found[i] = Overlap(cohort.cases[i].id, pretraining.cases[place].id, how)
                break
    return [found[i] for i in test if i in found]


def _best_matches(
    cohort: PreparedCohort,
    test: Sequence[int],
    volumes: tuple[PreparedCohort, Sequence[int]],
    spacing_mm: float,
    progress: Progress | None,
) -> dict[int, tuple[list[tuple[float, int]], float | None]]:
    """Return test case -> the most similar volumes (correlation, index), best first, and what the others come to.

    The latter is the upper quartile of their correlations. Kept for the next time.
    Large volumes are compared on a coarser grid first, and on this one with the best few of that.
    """
    pretraining, among = volumes
    part = (
        ""
        if len(among) == len(pretraining)
        else f"-{hashlib.sha256(str(list(among)).encode()).hexdigest()[:12]}"
    )
    store = cohort.folder / f"overlap-v{_VERSION}-{spacing_mm:g}-{pretraining.fingerprint[:16]}{part}.json"
    known: dict[str, list[Any]] = {}
    if store.is_file():
        try:
            known = {str(case): list(found) for case, found in read_json(store).items()}
        except (ReadError, TypeError, AttributeError):
            logger.warning("%s is damaged and made again", store)
    todo = [i for i in test if cohort.cases[i].id not in known]
    if todo:
        edges = [
            edge * c.spacing_mm for side in (cohort, pretraining) for c in side.cases for edge in c.shape
        ]
        first_mm = max(spacing_mm, max(edges) / _FIRST_EDGE)
        if len(among) > EXHAUSTIVE:
            among, usual, scores = _shortlisted(cohort, todo, volumes, (spacing_mm, first_mm), progress)
        else:
            usual = np.ones(len(among), bool)
            ours, theirs = (coarse_volumes(c, i, first_mm) for c, i in ((cohort, todo), (pretraining, among)))
            scores = _correlations(ours, theirs, progress)  # (N, M)
        shortlists = np.argsort(-scores, axis=1)[:, :_SHORTLIST]  # (N, up to 8)

        def compare(n: int) -> list[tuple[float, int]]:
            compared = [m for m in shortlists[n].tolist() if scores[n, m] > -1]
            shortlist = [among[m] for m in compared]
            if first_mm == spacing_mm:
                return list(zip(scores[n, compared].tolist(), shortlist, strict=True))
            (ours,) = coarse_volumes(cohort, [todo[n]], spacing_mm, workers=1)
            theirs = coarse_volumes(pretraining, shortlist, spacing_mm, workers=1)
            row = [float(_correlations([ours], [one], None, workers=1)[0, 0]) for one in theirs]
            return sorted(zip(row, shortlist, strict=True), key=lambda match: -match[0])

        best = run_parallel(compare, range(len(todo)), None, progress, _MESSAGE)
        for i, row, matches in zip(todo, scores, best, strict=True):
            rest = usual & (np.arange(len(row)) != row.argmax())
            known[cohort.cases[i].id] = [matches, _quartile(row[rest])]
        write_json(store, known)
    result = {}
    for i in test:
        matches, quartile = known[cohort.cases[i].id]
        result[i] = ([(float(score), int(place)) for score, place in matches], quartile)
    return result


def _shortlisted(
    cohort: PreparedCohort,
    test: Sequence[int],
    volumes: tuple[PreparedCohort, Sequence[int]],
    spacings_mm: tuple[float, float],
    progress: Progress | None,
) -> tuple[Sequence[int], np.ndarray, np.ndarray]:
    """Return places of volumes (M), which of them were not chosen by what they share (M,), and their correlations.

    These are those with the test cases (N, M), -1 where they were not compared.

    Args:
        cohort, test, volumes: see :func:`_best_matches`.
        spacings_mm: of the grid that volumes are described on, and of that on which they are compared.
        progress: told about every volume that was described, and every test case.
    """
    pretraining, among = volumes
    described_mm, first_mm = spacings_mm
    asked = [signature(band) for band in coarse_volumes(cohort, test, described_mm)]
    lists = nearest(asked, _described(pretraining, among, described_mm, progress), CANDIDATES)
    spread = np.linspace(0, len(among) - 1, min(OTHERS, len(among)), dtype=int)
    others = [among[m] for m in spread.tolist()]
    places = sorted({place for one in (*lists, others) for place in one})
    column = {place: m for m, place in enumerate(places)}

    def compare(n: int) -> np.ndarray:
        row = np.full(len(places), -1, np.float32)
        compared = list(dict.fromkeys((*lists[n], *others)))
        (ours,) = coarse_volumes(cohort, [test[n]], first_mm, workers=1)
        for place in compared:
            theirs = coarse_volumes(pretraining, [place], first_mm, workers=1)
            row[column[place]] = _correlations([ours], theirs, None, workers=1)[0, 0]
        return row

    usual = np.isin(places, others)
    return places, usual, np.stack(run_parallel(compare, range(len(test)), None, progress, _MESSAGE))


def _described(
    cohort: PreparedCohort, among: Sequence[int], spacing_mm: float, progress: Progress | None
) -> Iterator[Block]:
    """Yield the descriptors of some volumes of a cohort; those of all of it are kept beside it."""

    def band(i: int) -> np.ndarray:
        # Not kept: of many volumes it would be more than the volumes that are left out.
        return coarse_volume(np.asarray(cohort.image(i)), cohort.cases[i].affine, spacing_mm)

    wanted = np.zeros(len(cohort), bool)
    wanted[list(among)] = True
    folder = cohort.folder / f"signatures-v{_VERSION}-{spacing_mm:g}"
    for block in blocks(folder, len(cohort), band, progress):
        chosen = wanted[block.owners]
        yield block if chosen.all() else Block(block.vectors[chosen], block.owners[chosen])


def _worth_comparing(
    cohort: PreparedCohort,
    test: Sequence[int],
    volumes: tuple[PreparedCohort, Sequence[int]],
    spacing_mm: float,
    progress: Progress | None,
) -> list[int]:
    """Return the test cases that share something with one of the volumes; all of them where they are few."""
    if len(test) <= EXHAUSTIVE:
        return list(test)
    pretraining, among = volumes
    asked = [signature(band) for band in coarse_volumes(pretraining, among, spacing_mm)]
    lists = nearest(asked, _described(cohort, test, spacing_mm, progress), 4 * CANDIDATES)
    found = {place for one in lists for place in one}
    return [i for i in test if i in found]


def _correlations(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    progress: Progress | None,
    workers: int | None = None,
    above: bool = False,
) -> np.ndarray:
    """Return the correlation of every pair (N, M), in blocks of bounded memory.

    With ``above`` only of pairs (n, m) with m > n, which are all pairs where ``ours`` is ``theirs``; else -1.
    """
    shape = tuple(
        _fast(max(v.shape[a] for v in ours) + max(v.shape[a] for v in theirs) - 1) for a in range(3)
    )
    block = max(
        1, _MEMORY_BYTES // (3 * 4 * int(np.prod(shape)))
    )  # three spectra of half the voxels, 8 bytes
    scores = np.full((len(ours), len(theirs)), -1, np.float32)
    for start in range(0, len(theirs), block):
        spectra = [_Spectra(volume, shape) for volume in theirs[start : start + block]]

        def row(n: int, spectra: list[_Spectra] = spectra, start: int = start) -> list[float]:
            mine = _Spectra(ours[n], shape)
            return [
                mine.correlation(other) if not above or start + k > n else -1.0
                for k, other in enumerate(spectra)
            ]

        rows = range(min(len(ours), start + block) if above else len(ours))
        found = run_parallel(row, rows, workers, progress, _WITHIN if above else _MESSAGE)
        scores[: len(rows), start : start + block] = found
    return scores


def coarse_volumes(
    cohort: Scans, cases: Sequence[int], spacing_mm: float, workers: int | None = None
) -> list[np.ndarray]:
    """Return band-passed coarse volumes of some cases; kept beside the prepared ones for the next time."""
    folder = cohort.folder / f"coarse-v{_VERSION}-{spacing_mm:g}"

    def coarse(i: int) -> np.ndarray:
        path = folder / f"{i:05d}.npy"
        if path.is_file():
            try:
                return np.asarray(np.load(path))
            except (ValueError, EOFError):
                logger.warning("%s is damaged and made again", path)
        volume = coarse_volume(np.asarray(cohort.image(i)), cohort.cases[i].affine, spacing_mm)
        _save(path, volume)
        return volume

    return run_parallel(coarse, cases, workers)


def _save(path: Path, array: np.ndarray) -> None:
    buffer = BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getvalue())


def coarse_volume(image: np.ndarray, affine: np.ndarray, spacing_mm: float) -> np.ndarray:
    """Return a volume (D, H, W) on the coarse grid, band-passed: (D', H', W') float32."""
    from scipy import ndimage

    small, _ = resample(np.asarray(image, dtype=np.float32), affine, spacing_mm)
    band = ndimage.gaussian_filter(small, _FINE, mode="nearest")
    band -= ndimage.gaussian_filter(small, _WIDE, mode="nearest")
    trim = tuple(slice(_TRIM, -_TRIM) if edge > 4 * _TRIM else slice(None) for edge in band.shape)
    return np.ascontiguousarray(band[trim])


def _fast(length: int) -> int:
    from scipy.fft import next_fast_len

    return int(next_fast_len(length, real=True))


class _Spectra:
    """Fourier transforms of a volume, its square and its support, padded to ``shape``."""

    def __init__(self, volume: np.ndarray, shape: tuple[int, ...], support: np.ndarray | None = None) -> None:
        from scipy.fft import rfftn

        support = np.ones_like(volume) if support is None else support
        self.shape, self.voxels = shape, int(np.count_nonzero(support))
        self.volume, self.square, self.support = (
            rfftn(array.astype(np.float32), shape) for array in (volume, volume**2, support)
        )

    def correlation(self, other: _Spectra, overlap: float = LEAST_OVERLAP) -> float:
        """Return the normalised cross-correlation at the best shift, in [-1, 1].

        Args:
            other: the other volume.
            overlap: smallest part of the smaller support that must lie within the other one.
        """
        from scipy.fft import irfftn

        def correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.asarray(irfftn(a * b.conj(), self.shape))

        together = correlate(self.support, other.support)
        energies = correlate(self.square, other.support), correlate(self.support, other.square)
        enough = together >= overlap * min(self.voxels, other.voxels)
        norm = np.sqrt(np.maximum(energies[0], 0) * np.maximum(energies[1], 0))
        enough &= norm > 1e-3 * norm.max()
        scores = np.where(enough, correlate(self.volume, other.volume) / np.maximum(norm, 1e-12), -1.0)
        return _refined_peak(scores)


def _refined_peak(scores: np.ndarray) -> float:
    """Return the maximum of a parabola through the peak and its neighbours along each axis, summed."""
    peak = np.unravel_index(int(np.argmax(scores)), scores.shape)
    top = float(scores[peak])
    refined = top
    for axis in range(3):
        below, above = (
            float(np.take(np.roll(scores, -step, axis=axis), peak[axis], axis=axis)[
                tuple(p for a, p in enumerate(peak) if a != axis)
            ]) for step in (-1, 1)
        )  # fmt: skip
        bend = below + above - 2 * top
        if bend < 0 and min(below, above) > -1:
            refined -= (above - below) ** 2 / (8 * bend)
    return min(refined, 1.0)
