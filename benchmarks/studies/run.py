"""Run a study from a small YAML and draw its learning curves.

Usage: ``python benchmarks/studies/run.py benchmarks/studies/levers/steps.yaml --store studies/steps``

Every score is an ordinary record in the store, so a study can be interrupted, resumed, extended, and
read with ``ssl3d table``. See ``benchmarks/studies/README.md`` for the keys of the YAML.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from figure import draw
from pydantic import Field

from ssl3d.bench.cell import TaskData
from ssl3d.bench.run import Bench, Grid, Pretraining
from ssl3d.bench.sources import pretraining_cohort, task_cohort, task_splits
from ssl3d.config import Model, Settings, load_settings, validate
from ssl3d.device import select_device
from ssl3d.downstream.features.measures import correspondences, local_features, make_plan, sampled
from ssl3d.downstream.problems.problem import Mode
from ssl3d.environment import environment
from ssl3d.errors import ConfigError, SSL3DError
from ssl3d.models.weights.checkpoint import load_backbone
from ssl3d.pretrain.spec import resolve_method
from ssl3d.registry.registry import registry
from ssl3d.results.store.record import Record
from ssl3d.results.store.store import ResultStore


class Lever(Model):
    """What a study varies besides the method."""

    title: str
    """Its name and unit, for the figure."""
    values: dict[str, list[str]]
    """Each value's label and the overrides that set it, for example {"0.5": [phantoms.appearance_variance=0.5]}."""


class Study(Model):
    """One question."""

    question: str
    """What the study is to answer."""
    preset: str = "quick"
    """Preset that everything starts from."""
    set: tuple[str, ...] = ()
    """Overrides of the preset, the same everywhere."""
    methods: tuple[str, ...] = ("scratch", "gvsl")
    """Methods; `scratch` is the baseline that curves are compared with."""
    tasks: tuple[str, ...] = ("shc",)
    """Downstream tasks."""
    modes: tuple[Mode, ...] = ("linear", "knn")
    """Evaluations."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of whole runs."""
    at_steps: tuple[int, ...] = ()
    """Pretraining steps that are evaluated; empty: the last only. Multiples of pretrain.checkpoint_every."""
    correspondence: bool = False
    """Also measure how often the nearest feature in another subject lies in the same structure (balanced, %)."""
    finetune_labels: float = Field(1.0, gt=0, le=1)
    """Share of the labelled training subjects that fine-tuning sees; linear, k-NN and upper bound see all."""
    lever: Lever | None = None
    """What is varied; None: nothing but the pretraining steps."""
    upper_bound: tuple[str, ...] | None = None
    """Overrides under which `scratch` is fine-tuned as the supervised upper bound; None: no such line."""
    ceiling_seeds: int = Field(1, ge=1)
    """Seeds of the upper bound."""


def load_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ConfigError: the file is missing, no mapping, or has an unknown key.
    """
    if not path.is_file():
        here = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path}: no such study. In that folder: {here}.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, not {type(values).__name__}.")
    return validate(Study, values, str(path))


def settings_of(study: Study, overrides: Sequence[str]) -> Settings:
    """Return the settings of one value of the lever."""
    extra = ["pretrain.keep_checkpoints=true"] if study.at_steps else []
    return load_settings(study.preset, [*study.set, *extra, *overrides], registry().methods.names())


def bench_of(
    study: Study, settings: Settings, methods: Sequence[str], modes: Sequence[Mode], seeds: Sequence[int], store: Path,
    cache: Path | None, fraction: float = 1.0,
) -> Bench:  # fmt: skip
    """Return the bench of one value of the lever, its data prepared."""
    specs = [resolve_method(name, settings.methods) for name in methods]
    columns = []
    for task in (registry().tasks.get(name).load() for name in study.tasks):
        cohort = task_cohort(task, None, settings, cache)
        columns.append(TaskData(task, cohort, task_splits(task, cohort, settings)))
    needs_data = any(spec.cls.trains != "none" for spec in specs)
    unlabelled = pretraining_cohort("phantoms", settings, cache) if needs_data else None
    grid = Grid(specs, columns, list(modes), list(seeds), (fraction,), tuple(study.at_steps) or (None,))
    return Bench(grid, Pretraining(unlabelled), settings, ResultStore(store), select_device("auto"))


def correspondence_of(bench: Bench, record: Record) -> float:
    """Return the balanced correspondence accuracy (%) of the weights behind ``record`` on its test cases."""
    identity = record["identity"]
    data = next(data for data in bench.grid.tasks if data.task.name == identity["task"])
    split = next(split for split in data.splits if split.name == identity["split"])
    folder = bench.store.run_folder(record)
    if folder is None:
        raise SSL3DError(
            f"The run of {identity['method']} is not in {bench.store.root}; its weights are needed."
        )
    plan = make_plan(data.cohort, [data.cohort.index(case) for case in split.test])
    backbone = load_backbone(folder, expected=bench.settings.backbone, step=identity.get("pretrain_step"))
    features = local_features(backbone, data.task, data.cohort, bench.settings.downstream, bench.device)
    pairs = correspondences(sampled(features, plan), plan)
    return 100 * statistics.fmean(pair.balanced for pair in pairs)


def points(study: Study, store: Path, cache: Path | None) -> list[dict[str, Any]]:
    """Run every cell that is not in the store yet, and return one row a cell."""
    rows: list[dict[str, Any]] = []

    def collect(bench: Bench, value: str, method: str | None = None, matches: bool = False) -> None:
        for record, computed in bench.run():
            identity = record["identity"]
            row = {
                "value": value, "method": method or identity["method"], "task": identity["task"],
                "mode": identity["mode"], "seed": identity["seed"], "split": identity["split"],
                "step": record["cost"]["pretrain_steps"], "score": record["score"],
                "validation": max((point["score"] for point in record["validation"]), default=None),
            }  # fmt: skip
            rows.append(row)
            print(f"{row}{'' if computed else '  (already in the store)'}", file=sys.stderr, flush=True)
            if matches:
                correspondence = correspondence_of(bench, record)
                rows.append({**row, "mode": "correspondence", "score": correspondence, "validation": None})

    for value, overrides in (study.lever.values if study.lever else {"": []}).items():
        settings = settings_of(study, overrides)
        for mode in study.modes:
            fraction = study.finetune_labels if mode == "finetune" else 1.0
            collect(
                bench_of(study, settings, study.methods, [mode], study.seeds, store, cache, fraction),
                value,
                matches=study.correspondence and mode == "linear",
            )
        if study.upper_bound is not None:
            settings = load_settings(
                study.preset, [*study.set, *overrides, *study.upper_bound], registry().methods.names()
            )
            seeds = study.seeds[: study.ceiling_seeds]
            collect(
                bench_of(study, settings, ["scratch"], ["finetune"], seeds, store, cache), value, "supervised"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", type=Path, nargs="+", metavar="study", help="YAML files, run one by one")
    parser.add_argument("--store", type=Path, required=True, help="folder of the records")
    parser.add_argument("--cache", type=Path, help="prepared volumes [~/.cache/ssl3d]")
    parser.add_argument("--out", type=Path, help="folder of figure and table [--store]")
    arguments = parser.parse_args()
    try:
        studies = {path.stem: load_study(path) for path in arguments.studies}
        for name, study in studies.items():
            rows = points(study, arguments.store, arguments.cache)
            report(name, study, pd.DataFrame(rows), arguments.out or arguments.store)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")


def report(name: str, study: Study, frame: pd.DataFrame, out: Path) -> None:
    """Write the study's table, its settings and its figure to ``out``, and print the means."""
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / f"{name}.csv", index=False)
    (out / f"{name}.json").write_text(
        json.dumps({"study": study.model_dump(mode="json"), "environment": environment()}, indent=1)
    )
    draw(frame, study.question, study.lever.title if study.lever else None, out / f"{name}.png")
    summary = (
        frame.groupby(["value", "task", "mode", "method", "step"], sort=False)["score"]
        .agg(["mean", "std", "count"])
        .round(1)
    )
    print(summary.to_string())
    print(f"{out / name}.csv, .json, .png")


if __name__ == "__main__":
    main()
