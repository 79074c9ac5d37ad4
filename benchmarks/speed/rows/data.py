"""Random crops from stored volumes, and phantoms."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
from compare import Case, Run, Setting, peer
from scipy.ndimage import gaussian_filter

from ssl3d.data.phantoms import PhantomParameters, generate
from ssl3d.data.prepared.arrays import SUFFIX, Box, read_array, save_array


def scan(edge: int) -> np.ndarray:
    """Return a smooth body with noise in air of exact zeros: (edge,) * 3 float32 in [0, 1], 12-bit steps."""
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.random((edge // 4,) * 3), 3).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    noisy = np.clip(smooth + 0.02 * rng.standard_normal(smooth.shape), 0, 1)
    axes = np.indices(smooth.shape) - edge / 2
    body = (axes**2).sum(0) < (0.45 * edge) ** 2
    return (np.round(noisy * body * 4095) / 4095).astype(np.float32)


def crops(read: Callable[[Box], np.ndarray], edge: int, crop: int) -> Run:
    """Return a run that reads the same random crops in the same order as any other such run, and gives its mean."""
    rng = np.random.default_rng(1)
    boxes = [tuple(slice(a, a + crop) for a in rng.integers(0, edge - crop + 1, 3)) for _ in range(64)]
    order = itertools.cycle(boxes)
    return lambda: float(read(next(order)).mean())  # type: ignore[arg-type]


def nnunet_reader(volume: np.ndarray, folder: Path, patch: int) -> Callable[[Box], np.ndarray]:
    """Store a case as nnU-Net does for a patch size, and return a reader of crops through its dataset class."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    blocks, chunks = comp_blosc2_params((1, *volume.shape), (patch,) * 3)
    segmentation = np.zeros((1, *volume.shape), np.int8)
    shapes = {"chunks": chunks, "blocks": blocks, "chunks_seg": chunks, "blocks_seg": blocks}
    nnUNetDatasetBlosc2.save_case(volume[None], segmentation, {}, str(folder / "case"), **shapes)
    dataset = nnUNetDatasetBlosc2(str(folder), ["case"])
    return lambda box: dataset.load_case("case")[0][(0, *box)]


def crop(setting: Setting) -> Iterator[Case]:
    """nnssl's reader is nnU-Net's: blosc2 arrays of the same class, chunked for the patch."""
    edge, size = setting.of((256, 96), (32, 16))
    volume = scan(edge)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, flat, packed = folder / f"v{SUFFIX}", folder / "v.npy", folder / "v.nii.gz"
        save_array(ours, volume)
        np.save(flat, volume)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), packed)
        stored = ours.stat().st_size / volume.nbytes

        def nnunet() -> Run:
            theirs = folder / "nnunet"
            theirs.mkdir()
            return crops(nnunet_reader(volume, theirs, size), edge, size)

        peers = {
            "nii.gz, loaded whole": crops(
                lambda box: np.asarray(nibabel.load(packed).dataobj)[box], edge, size
            ),
            "nnU-Net's and nnssl's blosc2 reader": peer(nnunet),
        }
        yield Case(
            f"random crop of {size}^3 from {edge}^3, stored at {stored:.2f} of the size",
            crops(lambda box: read_array(ours, box), edge, size),
            peers,
            bound=(
                "an uncompressed memory map",
                crops(lambda box: np.array(read_array(flat, box)), edge, size),
            ),
            same=tuple(peers),
        )


def phantom(setting: Setting) -> Iterator[Case]:
    """There is no peer that makes anatomy: MONAI's test image has spheres in noise."""
    edge = setting.of(64, 24)
    parameters = PhantomParameters(edge=edge, spacing_mm=154 / edge)

    def monai() -> Run:
        from monai.data.synthetic import create_test_image_3d

        return lambda: (
            create_test_image_3d(edge, edge, edge, num_objs=12, rad_min=2, rad_max=edge // 6) is None
        )

    for cohort, title in (("mmwhs", "a heart"), ("candi", "a brain"), ("stoic", "a chest")):
        numbers = itertools.count()

        def ours(cohort: str = cohort, numbers: Iterator[int] = numbers) -> None:
            generate(cohort, next(numbers), parameters)  # type: ignore[arg-type]

        subject = generate(cohort, 0, parameters)  # type: ignore[arg-type]
        yield Case(
            f"phantom: {title}, {'x'.join(map(str, subject.image.shape))}",
            ours,
            {"MONAI create_test_image_3d": peer(monai)},
            bytes=4 * subject.image.size,
        )
