"""Reading a random crop from the compressed cache, against whole-volume gzip and an uncompressed memory map.

The peer is what most scripts do: load the ``.nii.gz`` and cut the crop out. The memory map is the bound
from below, at the price of the whole volume on disk.

Usage: ``python benchmarks/speed/cache_speed.py [--edge 256] [--crop 96] [--repeats 20]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from ssl3d.data.prepared.arrays import SUFFIX, Box, read_array, save_array
from ssl3d.environment import environment

RESULTS = Path(__file__).parent / "results"


def scan(edge: int) -> np.ndarray:
    """Return a smooth body with noise in air of exact zeros: (edge,) * 3 float32 in [0, 1], 12-bit steps."""
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.random((edge // 4,) * 3), 3).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    noisy = np.clip(smooth + 0.02 * rng.standard_normal(smooth.shape), 0, 1)
    axes = np.indices(smooth.shape) - edge / 2
    body = (axes**2).sum(0) < (0.45 * edge) ** 2
    return (np.round(noisy * body * 4095) / 4095).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--edge", type=int, default=256, help="of the volume, voxels")
    parser.add_argument("--crop", type=int, default=96, help="edge of the crop, voxels")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    volume = scan(args.edge)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, flat, packed = folder / f"v{SUFFIX}", folder / "v.npy", folder / "v.nii.gz"
        save_array(ours, volume)
        np.save(flat, volume)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), packed)
        readers: dict[str, tuple[Path, Callable[[Box], np.ndarray]]] = {
            "blosc2 (ours)": (ours, lambda box: read_array(ours, box)),
            "npy, memory-mapped": (flat, lambda box: np.array(read_array(flat, box))),
            "nii.gz, loaded whole": (packed, lambda box: np.asarray(nib.load(packed).dataobj)[box]),
        }
        times: dict[str, list[float]] = {key: [] for key in readers}
        rng = np.random.default_rng(1)
        for _ in range(args.repeats):
            d, h, w = (slice(a, a + args.crop) for a in rng.integers(0, args.edge - args.crop + 1, 3))
            for key, (_, read) in readers.items():  # turn by turn: a busy machine disturbs all alike
                start = time.perf_counter()
                crop = read((d, h, w))
                times[key].append(time.perf_counter() - start)
                if not np.array_equal(crop, volume[d, h, w]):
                    raise SystemExit(f"{key}: not what was stored")
        result = {
            key: {"ms": 1000 * statistics.median(times[key]), "bytes": path.stat().st_size}
            for key, (path, _) in readers.items()
        }
    peer = result["nii.gz, loaded whole"]["ms"]
    for key, found in result.items():
        share, speed = found["bytes"] / volume.nbytes, peer / found["ms"]
        print(f"{key:22s} {found['ms']:8.1f} ms a crop, {share:5.2f} of the size, {speed:6.1f} x nii.gz")
    RESULTS.mkdir(exist_ok=True)
    record = {"edge": args.edge, "crop": args.crop, "results": result, "environment": environment()}
    (RESULTS / "cache_speed.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
