"""What does a voxel's place in the volume tell, without a look at the image?

Each voxel of a test case gets the most frequent label that the training cases have at the same relative place; how far the
counts are smoothed first is chosen on the validation cases. A task on which this is good rewards features that know where
they are (zero padding tells a network how far the border is), whatever they know of the image.

Usage: ``python benchmarks/studies/location.py [--preset study] [--set KEY=VALUE] [--tasks shc sac sbm]``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from ssl3d.bench.sources import task_cohort, task_splits
from ssl3d.config import load_settings
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.splits import Split
from ssl3d.downstream.metrics import dice_per_structure
from ssl3d.errors import SSL3DError
from ssl3d.registry.registry import registry

SIGMAS = (0.0, 0.5, 1.0, 2.0)
"""Standard deviations of the smoothing in voxels."""


def at_relative_places(labels: NDArray[np.integer], shape: Sequence[int]) -> NDArray[np.integer]:
    """Return ``labels`` on another grid of the same extent, by nearest neighbours."""
    places = [
        np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1)
        for n, m in zip(shape, labels.shape, strict=True)
    ]
    return labels[np.ix_(*places)]


def most_frequent(maps: Sequence[NDArray[np.integer]], classes: int, sigma: float) -> NDArray[np.integer]:
    """Return the most frequent label of each voxel of maps on one grid, counts smoothed by ``sigma`` voxels."""
    counts = [np.sum([labels == k for labels in maps], axis=0, dtype=np.float64) for k in range(classes)]
    return np.argmax([gaussian_filter(count, sigma) if sigma else count for count in counts], axis=0)


def score(cohort: PreparedCohort, cases: Sequence[str], guess: NDArray[np.integer]) -> float:
    """Return the mean DSC (%) of ``guess``, the same for every case."""
    scores = []
    for case in cases:
        truth = np.array(cohort.label(cohort.index(case)))
        prediction = torch.from_numpy(at_relative_places(guess, truth.shape).copy())
        scores.append(dice_per_structure(prediction, torch.from_numpy(truth), cohort.num_classes).nanmean())
    return 100 * float(torch.stack(scores).nanmean())


def location_only(cohort: PreparedCohort, split: Split) -> tuple[float, float]:
    """Return the test DSC (%) of the location-only classifier, and the smoothing chosen."""
    maps = [np.array(cohort.label(cohort.index(case))) for case in split.train]
    maps = [at_relative_places(labels, maps[0].shape) for labels in maps]
    guesses = {sigma: most_frequent(maps, cohort.num_classes, sigma) for sigma in SIGMAS}
    sigma = max(SIGMAS, key=lambda s: score(cohort, split.val, guesses[s]))
    return score(cohort, split.test, guesses[sigma]), sigma


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="study")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an option")
    parser.add_argument("--tasks", nargs="+", default=["shc", "sac", "sbm"])
    parser.add_argument("--cache", type=Path, help="prepared volumes [~/.cache/ssl3d]")
    arguments = parser.parse_args()
    try:
        settings = load_settings(arguments.preset, arguments.set)
        for name in arguments.tasks:
            task = registry().tasks.get(name).load()
            cohort = task_cohort(task, None, settings, arguments.cache)
            for split in task_splits(task, cohort, settings):
                dsc, sigma = location_only(cohort, split)
                print(
                    f"{name} {split.name}: {dsc:.1f} DSC from location alone (counts smoothed by {sigma:g} voxels)"
                )
    except SSL3DError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
