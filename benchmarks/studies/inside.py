"""What decides the local features f^l of a row: how much of them is place, and how much each stage of the encoder says.

- place: R^2 with which a linear map from f^l gives a voxel's three coordinates, learned on training cases of SHC and
  measured on test cases;
- stages: the share of the variance of f^l that changes when one stage's features, finest first, are replaced by those of
  another patient.

Usage: ``python benchmarks/studies/inside.py STORE > benchmarks/studies/results/inside.md``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from separation import markdown
from sklearn.linear_model import LinearRegression
from stores import finished_runs
from torch import Tensor

from ssl3d.bench.sources import task_cohort, task_splits
from ssl3d.config import load_settings
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.errors import SSL3DError
from ssl3d.models.backbone import Backbone
from ssl3d.models.weights.checkpoint import load_backbone
from ssl3d.registry.registry import registry
from ssl3d.rng import numpy_rng

CASES, VOXELS = 6, 4000
"""Cases of either part, and voxels of each, that the regression looks at."""


def volume(cohort: PreparedCohort, case: str) -> Tensor:
    """Return a prepared volume (1, 1, D, H, W)."""
    return torch.from_numpy(np.array(cohort.image(cohort.index(case))))[None, None]


@torch.no_grad()
def place_r2(backbone: Backbone, cohort: PreparedCohort, train: Sequence[str], test: Sequence[str]) -> float:
    """Return the mean R^2 of the three coordinates, predicted from f^l."""

    def sample(cases: Sequence[str]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        features, places = [], []
        for case in cases:
            local = backbone(volume(cohort, case))[1][0]  # (C, D, H, W)
            chosen = numpy_rng(0, "place", case).choice(local[0].numel(), VOXELS, replace=False)
            features.append(local.flatten(1).T.numpy()[chosen])  # (VOXELS, C)
            indices = np.unravel_index(chosen, local.shape[1:])
            places.append(np.stack(indices, axis=1) / np.array(local.shape[1:]))  # (VOXELS, 3)
        return np.concatenate(features), np.concatenate(places)

    model = LinearRegression().fit(*sample(train))
    return float(model.score(*sample(test)))


@torch.no_grad()
def stage_shares(backbone: Backbone, first: Tensor, second: Tensor) -> list[float]:
    """Return, for each stage, half the squared change of f^l by its variance, mean over channels.

    Args:
        backbone: the network.
        first: a volume (1, 1, D, H, W), whose f^l is looked at.
        second: another of the same size, which lends its features.
    """
    own, others = backbone.encode(first), backbone.encode(second)
    local = backbone.decode(own)  # (1, C, D, H, W)
    variance = local.var(dim=(2, 3, 4), keepdim=True)
    shares = []
    for stage, borrowed in enumerate(others):
        kept = own[stage]
        own[stage] = borrowed
        shares.append(float(((backbone.decode(own) - local).square() / (2 * variance)).mean()))
        own[stage] = kept
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--preset", default="study")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an option")
    parser.add_argument("--cache", type=Path, help="prepared volumes [~/.cache/ssl3d]")
    arguments = parser.parse_args()
    rows = []
    try:
        task = registry().tasks.get("shc").load()
        settings = load_settings(arguments.preset, arguments.set)
        cohort = task_cohort(task, None, settings, arguments.cache)
        split = task_splits(task, cohort, settings)[0]
        for folder, run in finished_runs(arguments.store):
            backbone = load_backbone(folder, expected=settings.backbone).eval()
            shares = stage_shares(backbone, *(volume(cohort, case) for case in split.train[:2]))
            place = place_r2(backbone, cohort, split.train[:CASES], split.test[:CASES])
            stages = {f"Stage {stage}": f"{share:.3f}" for stage, share in enumerate(shares, 1)}
            rows.append(
                {
                    "Method": run["title"],
                    "Seed": run["identity"]["seed"],
                    "Place, R²": f"{place:.2f}",
                    **stages,
                }
            )
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    if not rows:
        sys.exit(
            f"Error: {arguments.store}/runs holds no finished run: ssl3d bench --store {arguments.store}."
        )
    print(markdown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
