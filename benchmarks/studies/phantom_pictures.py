"""Pictures of the phantom cohorts for the README: image and labels in three planes.

Usage: ``python benchmarks/studies/phantom_pictures.py [--edge 64] [--out docs/images]``
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ssl3d.data.phantoms import PhantomParameters, generate

# Cohort -> (title, display window in stored values, subjects shown).
COHORTS = {
    "pretrain": ("Cardiac CT, unlabelled (pretraining)", (-200, 600), (0, 1, 2)),
    "mmwhs": ("Cardiac CT, 7 heart structures (SHC, MM-WHS layout)", (-200, 600), (0, 1, 2)),
    "asoca": ("Cardiac CT, coronary arteries (SAC, ASOCA layout)", (824, 1624), (0, 1, 2)),
    "candi": ("T1 brain MR, 28 structures (SBM, CANDI layout)", None, (0, 1, 2)),
    "stoic": ("Chest CT without, with, with lesions (CCC, STOIC layout)", (-1050, 250), (0, 1, 3)),
}


def planes(volume: np.ndarray, centre: tuple[int, ...]) -> np.ndarray:
    """Return axial, coronal and sagittal slices side by side, as a radiologist sees them."""
    x, y, z = centre
    # RAS: the patient's right is shown on the left, front and head are up.
    slices = [volume[::-1, ::-1, z].T, volume[::-1, y, ::-1].T, volume[x, ::-1, ::-1].T]
    height = max(s.shape[0] for s in slices)
    padded = [
        np.pad(s, (((height - s.shape[0]) // 2, (height - s.shape[0] + 1) // 2), (0, 1))) for s in slices
    ]
    return np.concatenate(padded, axis=1)


def draw(cohort: str, parameters: PhantomParameters, path: Path) -> None:
    """Write the picture of one cohort."""
    title, window, subjects = COHORTS[cohort]
    drawn = [generate(cohort, i, parameters) for i in subjects]  # type: ignore[arg-type]
    rows = 1 if drawn[0].labels is None else 2
    figure, axes = plt.subplots(
        rows, len(drawn), figsize=(4.6 * len(drawn), 1.65 * rows + 0.35), squeeze=False
    )
    for column, subject in enumerate(drawn):
        centre = tuple(n // 2 for n in subject.image.shape)
        if cohort == "candi":  # beside the midline
            centre = (centre[0] + subject.image.shape[0] // 12, *centre[1:])
        if cohort == "asoca" and subject.labels is not None:  # where the most artery is in view
            centre = tuple(
                int(subject.labels.sum(axis=tuple(b for b in range(3) if b != a)).argmax()) for a in range(3)
            )
        image = planes(subject.image, centre)
        low, high = window or (0, np.quantile(subject.image, 0.995))
        for row in range(rows):
            axes[row, column].imshow(image, cmap="gray", vmin=low, vmax=high)
            axes[row, column].axis("off")
        if subject.labels is not None:
            values, codes = np.unique(subject.labels, return_inverse=True)
            # Neighbouring values get unlike colours.
            order = np.random.default_rng(3).permutation(len(values) - 1) + 1
            colours = np.concatenate([[0], order])[codes.reshape(subject.labels.shape)]
            shown = planes(colours.astype(float), centre)
            axes[1, column].imshow(
                np.ma.masked_equal(shown, 0), cmap="gist_rainbow", alpha=0.55, vmin=1, vmax=len(values)
            )
    figure.suptitle(title, fontsize=11, y=0.995)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.93 if rows == 2 else 0.86, 0.02, 0.03)
    figure.savefig(path, dpi=66)
    plt.close(figure)


EXTREMES = {
    "placement": 0.5, "shape_modes": 1.0, "variants": 1.0, "protocols": 1.0, "noise": 3.0, "motion": 0.4, "metal": 0.4,
    "field_of_view": 0.15, "slice_mm": 6.0, "opacities": 1.0,
}  # fmt: skip


def draw_patients(parameters: PhantomParameters, path: Path, columns: int = 8) -> None:
    """Write axial slices of patients at the extremes of all that can differ: heart with labels, brain, chest."""
    figure, axes = plt.subplots(4, columns, figsize=(1.5 * columns, 6.1))
    for column in range(columns):
        heart, brain, chest = (generate(c, column, parameters) for c in ("mmwhs", "candi", "stoic"))  # type: ignore[arg-type]
        assert heart.labels is not None
        shown = [
            (heart.image, -200, 500, "gray"), (heart.labels, 0, 900, "tab20"),
            (brain.image, 0, np.quantile(brain.image, 0.995), "gray"), (chest.image, -1050, 250, "gray"),
        ]  # fmt: skip
        for row, (volume, low, high, colours) in enumerate(shown):
            z = volume.shape[2] // 2 - (4 if row == 3 else 0)
            axes[row, column].imshow(volume[::-1, ::-1, z].T, cmap=colours, vmin=low, vmax=high)
            axes[row, column].axis("off")
        axes[3, column].set_title("COVID-19" if chest.target else "other", fontsize=7, pad=2)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.99, 0.02, 0.06)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edge", type=int, default=80, help="voxels along an edge")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "images")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parameters = PhantomParameters(edge=args.edge, spacing_mm=153.6 / args.edge)
    for cohort in COHORTS:
        path = args.out / f"phantom_{cohort}.png"
        draw(cohort, parameters, path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} kB")
    path = args.out / "phantom_patients.png"
    draw_patients(replace(parameters, edge=64, spacing_mm=2.4, **EXTREMES), path)
    print(f"{path}: {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
