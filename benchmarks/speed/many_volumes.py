"""How opening, a batch and a leakage check grow with the number of volumes, on a simulated index: no voxel is there.

    python benchmarks/speed/many_volumes.py                                # 1,000, 100,000 and 1,000,000 volumes
    python benchmarks/speed/many_volumes.py --only leakage --volumes 1000,10000 --images 10
    python benchmarks/speed/many_volumes.py --volume 256                   # what one volume costs

A table of processor seconds, peak memory and exponents: of the power of the number of volumes that the time grows with,
from the first size to the last. ``batch`` is two pairs, without the reading of voxels, which is a file's affair
(row ``crop`` of compare.py). ``leakage`` is the search of the nearest neighbourhoods of some images among descriptors that
are drawn at random; the exact comparison of what it finds does not depend on the number of volumes, and describing the
volumes, once a cohort, reads each of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

SIZES = (1_000, 100_000, 1_000_000)
EDGE = 8
WHAT = ("open", "source", "batch", "leakage")


def record(i: int) -> dict:
    """Return what a manifest says of a volume."""

    def digest(kind: str) -> str:
        return hashlib.sha256(f"{kind}{i}".encode()).hexdigest()

    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    affine[:3, 3] = -float(i % 97)
    image = {"path": f"/data/ct/patient{i:07d}/scan.nii.gz", "size": 40_000_000 + i, "mtime_ns": 10**18 + i,
             "sha256": digest("file")}  # fmt: skip
    array = {"name": f"{i:05d}-patient{i:07d}.image.b2nd", "bytes": 30_000_000 + i, "sha256": digest("array")}
    return {
        "id": f"patient{i:07d}", "subject": f"patient{i:07d}", "subset": None, "target": None, "classes": None,
        "value": None,
        "sources": {"image": image, "label": None}, "arrays": {"image": array, "label": None}, "intensity": ["ct", 1024.0],
        "voxels": {"image": digest("voxels"), "label": None}, "shape": [96 + i % 64, 200, 200], "affine": affine.tolist(),
        "native_shape": [512, 512, 300], "native_affine": affine.tolist(),
    }  # fmt: skip


@cache
def records(number: int) -> list[dict]:
    """Return the first records."""
    return [record(i) for i in range(number)]


def write(folder: Path, volumes: int) -> None:
    """Write the manifest and index of a cohort without arrays; its shards are copies of one, so ids come again."""
    from ssl3d.data.prepared import index
    from ssl3d.data.prepared.cohort import PREPARATION_VERSION
    from ssl3d.data.prepared.steps import Preparation
    from ssl3d.data.prepared.stored import write_manifest

    index.MANY = 0  # small ones, too, so that one form is compared
    first = records(min(volumes, index.ROWS))
    write_manifest(folder, {
        "format": PREPARATION_VERSION, "fingerprint": hashlib.sha256(str(volumes).encode()).hexdigest(), "dataset": "ct",
        "label_names": [], "label_values": [], "preparation": Preparation(spacing_mm=1.5).model_dump(mode="json"),
        "intensity": {"scaling": "ct", "offset": 1024.0, "checked": True, "rule": "simulated", "taken_for": "CT"},
        "cases": first,
    })  # fmt: skip
    if volumes > len(first):
        manifest = json.loads((folder / "manifest.json").read_text())
        (shard,) = manifest["shards"]
        parts = [shard] * (volumes // len(first))
        if rest := volumes % len(first):
            parts += index.write_shards(folder / "rest", first[:rest])
            (folder / "rest" / parts[-1]["name"]).rename(folder / parts[-1]["name"])
        del manifest["digest"]
        (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": parts}))


def measure(what: str, folder: Path, volumes: int, images: int) -> float:
    """Return processor seconds of one of :data:`WHAT`."""
    from ssl3d.data.checks.signature import Block, nearest
    from ssl3d.data.prepared.many import open_prepared

    def timed(run, times: int = 1) -> float:
        began = time.process_time()
        for _ in range(times):
            run()
        return (time.process_time() - began) / times

    if what == "open":
        return timed(lambda: open_prepared(folder).image)
    if what in ("source", "batch"):
        from ssl3d.pretrain.source import CropSource, training_source

        cohort = open_prepared(folder)
        voxels = np.zeros((EDGE, EDGE, EDGE), np.float32)
        cohort.image = lambda i, where=...: voxels  # type: ignore[method-assign]
        if what == "source":
            return timed(lambda: training_source(cohort, (EDGE,) * 3, 2, 2, 0, 0))
        source = training_source(cohort, (EDGE,) * 3, 2, 2, 0, 0)
        source.batch(0)
        steps = iter(range(1, 10**9))
        assert isinstance(source, CropSource)
        return timed(lambda: source.batch(next(steps)), 50)
    rng = np.random.default_rng(0)
    block = np.round(21 * rng.standard_normal((1024 * 256, 34))).clip(-127, 127).astype(np.int8)
    asked = [block[256 * k : 256 * k + 64] for k in range(images)]

    def descriptors() -> Iterator[Block]:
        for start in range(0, volumes, 1024):
            many = min(1024, volumes - start)
            yield Block(block[: 256 * many], np.repeat(np.arange(start, start + many), 256))

    found: list[list[int]] = []
    nearest(asked[:1], iter([Block(block[:64], np.arange(64))]), 1)  # imports
    seconds = timed(lambda: found.extend(nearest(asked, descriptors(), 16)))
    assert len(found) == images
    return seconds


def one_volume(edge: int) -> None:
    """Print what one volume of ``edge`` voxels of 1 mm costs: to store, on the disk, to read a crop of, to describe."""
    from rows.data import scan

    from ssl3d.data.checks.overlap import COARSE_MM, coarse_volume
    from ssl3d.data.checks.signature import signature
    from ssl3d.data.prepared.arrays import read_array, save_array

    volume, crop = scan(edge), (slice(edge // 4, edge // 4 + edge // 2),) * 3
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "v.b2nd"

        def timed(run) -> tuple[float, object]:
            began = time.process_time()
            result = run()
            return time.process_time() - began, result

        stored, facts = timed(lambda: save_array(path, volume))
        read, _ = timed(lambda: [read_array(path, crop) for _ in range(5)])
        again, whole = timed(lambda: read_array(path))
        coarse, band = timed(lambda: coarse_volume(np.asarray(whole), np.diag([1.0, 1, 1, 1]), COARSE_MM))
        described, found = timed(lambda: signature(band))
    print(f"one volume of {edge}^3 at 1 mm, processor seconds")
    print(
        f"  store           {stored:.3f}, {facts['bytes'] / 2**20:.1f} MiB, {facts['bytes'] / volume.nbytes:.2f} of float32"
    )
    print(f"  read a crop     {read / 5:.4f} ({edge // 2}^3)")
    print(f"  read it whole   {again:.3f}")
    print(
        f"  describe        {coarse:.3f} coarse and band-passed, {described:.3f} signature of {len(found)} points"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--volumes", default=",".join(map(str, SIZES)), help="sizes, separated by commas")
    parser.add_argument("--images", type=int, default=100, help="of the leakage check (default: 100)")
    parser.add_argument("--only", default=",".join(WHAT), help=f"of {', '.join(WHAT)}")
    parser.add_argument("--volume", type=int, metavar="EDGE", help="what one volume costs, and nothing else")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.volume:
        return one_volume(options.volume)
    sizes = [int(size) for size in options.volumes.split(",")]
    if options.one:  # a process of its own, for its memory
        seconds = measure(options.one[0], Path(options.one[1]), sizes[0], options.images)
        peak = re.search(
            r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()
        )  # ru_maxrss has the parent's, too
        print(seconds, int(peak[1]) / 1024 if peak else math.nan)
        return
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for size in sizes:
            folder = Path(name) / str(size)
            folder.mkdir()
            write(folder, size)
            for what in options.only.split(","):
                command = [sys.executable, __file__, "--one", what, str(folder), "--volumes", str(size)]
                command += ["--images", str(options.images)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                found.setdefault(what, []).append((float(out[-2]), float(out[-1])))
                print(
                    f"{what:>8} {size:>9,} {found[what][-1][0]:10.4f} s {found[what][-1][1]:8.0f} MiB",
                    flush=True,
                )
            print(
                f"{'on disk':>8} {size:>9,} {sum(p.stat().st_size for p in folder.iterdir()) / 2**20:10.1f} MiB",
                flush=True,
            )
    print("| | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent |")
    print("|---|" + "--:|" * (len(sizes) + 1))
    for what, values in found.items():
        times = [seconds for seconds, _ in values]
        power = (
            math.log(times[-1] / times[0]) / math.log(sizes[-1] / sizes[0]) if len(sizes) > 1 else math.nan
        )
        print(
            f"| {what} | "
            + " | ".join(f"{s:.3g} s, {mib:.0f} MiB" for s, mib in values)
            + f" | {power:.2f} |"
        )


if __name__ == "__main__":
    main()
