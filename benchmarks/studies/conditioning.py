"""How badly conditioned is the linear probe? The correlation matrix of f^l, one row a method.

A gradient step on the probe moves fastest along the direction that the channels share. The larger the condition
number of their correlations (the features centred and scaled), the longer a probe takes to converge.

Usage: ``python benchmarks/studies/conditioning.py benchmarks/studies/levers/comparison.yaml --store STORE``
(methods, tasks and settings of the study, without its lever; cells that are not in the store yet are computed)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from run import bench_of, load_study
from torch import Tensor

from ssl3d.bench.run import Bench
from ssl3d.config import load_settings
from ssl3d.downstream.features.measures import local_features
from ssl3d.errors import SSL3DError
from ssl3d.models.weights.checkpoint import load_backbone
from ssl3d.registry.registry import registry
from ssl3d.results.store.record import Record


def features_of(bench: Bench, record: Record) -> Tensor:
    """Return f^l at every voxel of the training cases of ``record``: (N, C) float64."""
    folder = bench.store.run_folder(record)
    if folder is None:
        raise SSL3DError(
            f"The run of {record['identity']['method']} is not in {bench.store.root}; its weights are needed."
        )
    data = next(data for data in bench.grid.tasks if data.task.name == record["identity"]["task"])
    split = next(split for split in data.splits if split.name == record["identity"]["split"])
    backbone = load_backbone(folder, expected=bench.settings.backbone)
    features = local_features(backbone, data.task, data.cohort, bench.settings.downstream, bench.device)
    cases = [features[data.cohort.index(case)] for case in split.train]  # (1, C, D, H, W) each
    return torch.cat([case[0].flatten(1).T for case in cases]).double()  # (N, C)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file")
    parser.add_argument("--store", type=Path, required=True, help="folder of the records and weights")
    parser.add_argument("--cache", type=Path, help="prepared volumes [~/.cache/ssl3d]")
    arguments = parser.parse_args()
    try:
        study = load_study(arguments.study)
        settings = load_settings(study.preset, study.set, registry().methods.names())
        bench = bench_of(
            study, settings, study.methods, ["linear"], study.seeds, arguments.store, arguments.cache
        )
        rows = [(record["identity"], features_of(bench, record)) for record, _ in bench.run()]
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    print("| method | task | seed | mean absolute correlation | condition number |\n|:--|:--|--:|--:|--:|")
    for identity, features in rows:
        live = features[:, features.std(dim=0) > 0]  # a dead channel correlates with nothing
        correlation = torch.corrcoef(live.T)  # (C, C)
        others = correlation[~torch.eye(len(correlation), dtype=torch.bool)]
        print(
            f"| {identity['method']} | {identity['task']} | {identity['seed']} "
            f"| {others.abs().mean():.2f} | {torch.linalg.cond(correlation):.0f} |"
        )


if __name__ == "__main__":
    main()
