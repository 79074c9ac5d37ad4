"""The floor of a table: how far two runs lie apart that differ by rounding only, for each column and mode.

Another number of threads, another kind of processor or another version of a library changes the last digit of every sum,
and training makes a difference of scores out of it. Here the same is done on purpose: scratch is evaluated several
times, its initial weights (fine-tuning) or its frozen features (linear, k-NN) multiplied by 1 + 1e-6 z, z standard
normal. The standard deviation of the scores is the luck of an evaluation, whatever its method. Any other row of
--methods is pretrained from such initial weights, and evaluated as it is: the luck of its pretraining.

Usage: ``python benchmarks/studies/floor.py --preset quick --tasks shc sac sbm ccc --modes linear knn finetune --runs 8``
or with ``--methods gvsl byol --modes linear``

Every run is a line of --log, so an interrupted call goes on where it stopped; lines of other settings or other code are
passed over, and computed again. The figures go to the floor.json of the installed package, where tables find them
(``ssl3d.results.floor``); cells that are not measured now stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ssl3d.bench.sources import pretraining_cohort, task_cohort, task_splits
from ssl3d.config import Settings, identity_values, load_settings
from ssl3d.device import select_device
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.downstream.problems.kinds import check_modes, problem_class
from ssl3d.downstream.problems.problem import MODES, Mode
from ssl3d.environment import environment
from ssl3d.errors import ConfigError, SSL3DError
from ssl3d.models.backbone import Backbone, Features
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.checkpoint import load_backbone
from ssl3d.pretrain.loop import pretrain, pretrain_identity
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.spec import MethodSpec, resolve_method
from ssl3d.registry.registry import registry
from ssl3d.results.floor import FILE
from ssl3d.rng import derive_seed
from ssl3d.source_hash import evaluation_code, pretraining_code

RELATIVE = 1e-6
"""Size of the change; float32 has 6e-8, and a sum of thousands of terms some ten times that."""
SCRATCH = "scratch"
CELL = ["preset", "method", "task", "mode"]
LOG = Path(__file__).parent / "results" / "floor-runs.jsonl"


def generator_of(run: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(0, "floor", run))


def changed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``x`` with every number changed by a relative :data:`RELATIVE`."""
    noise = torch.randn(x.shape, generator=generator).to(x)
    return x * (1 + RELATIVE * noise)


@torch.no_grad()
def change_weights(backbone: nn.Module, run: int) -> None:
    """Change every weight in place; run 0 leaves them as they are."""
    generator = generator_of(run)
    for weight in backbone.parameters():
        if run:
            weight.copy_(changed(weight, generator))


class ChangedFeatures(nn.Module):
    """A frozen backbone whose features are changed; run 0 leaves them as they are."""

    def __init__(self, backbone: Backbone, run: int) -> None:
        super().__init__()
        self.backbone, self.run, self.generator = backbone, run, generator_of(run)
        self.local_channels, self.global_channels = backbone.local_channels, backbone.global_channels

    def _changed(self, x: Tensor) -> Tensor:
        return changed(x, self.generator) if self.run else x

    def encode(self, x: Tensor) -> Features:
        features = self.backbone.encode(x)
        return Features([self._changed(stage) for stage in features], features.size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f_global, f_local = self.backbone(x)
        return self._changed(f_global), self._changed(f_local)

    def minimum_edge(self) -> int:
        return self.backbone.minimum_edge()

    def global_grid(self, size: Sequence[int], grid: Sequence[int]) -> np.ndarray:
        return self.backbone.global_grid(size, grid)


@dataclass(frozen=True)
class ChangedSpec(MethodSpec):
    """A method whose backbone has changed initial weights; run 0 leaves them as they are."""

    run: int = 0

    def build(self, backbone: Backbone, seed: int) -> Method:
        change_weights(backbone, self.run)
        return super().build(backbone, seed)


def pretrained(settings: Settings, method: str, run: int, seed: int, cache: Path | None) -> Backbone:
    """Return the backbone of one run of a method."""
    spec = resolve_method(method, settings.methods)
    own = settings.for_method(method)
    cohort = pretraining_cohort("phantoms", settings, cache)
    with tempfile.TemporaryDirectory(prefix="ssl3d-floor-") as folder:
        changed_spec = ChangedSpec(spec.name, spec.cls, spec.config, spec.title, run)
        pretrain(changed_spec, cohort, own, seed, Path(folder) / "run", select_device("auto"))
        return load_backbone(Path(folder) / "run")


def score_of(
    settings: Settings,
    task_name: str,
    mode: Mode,
    run: int,
    seed: int,
    cache: Path | None,
    weights: Backbone | None,
) -> float:
    """Return the score of one run: of scratch, or of ``weights`` as they are."""
    task = registry().tasks.get(task_name).load()
    cohort = task_cohort(task, None, settings, cache)
    split = task_splits(task, cohort, settings)[0]
    backbone: Any = weights
    if weights is None:
        backbone = build_backbone(settings.backbone, seed)
        if mode == "finetune":
            change_weights(backbone, run)
        else:
            backbone = ChangedFeatures(backbone, run)
    label = f"floor, {task_name} {mode}, run {run}"
    downstream = settings.downstream.for_mode(mode)
    return evaluate(
        backbone, Evaluation(task, cohort, split, mode, downstream, seed, select_device("auto")), label=label
    ).score


def key_of(settings: Settings, task_name: str, seed: int, method: str = SCRATCH) -> dict[str, Any]:
    """Return what all runs of one task and method have in common: settings, seed and code."""
    values = identity_values(settings)
    del values["pretrain"], values["method_lr"], values["methods"]
    code = evaluation_code(
        problem_class(registry().tasks.get(task_name).load()).__name__, settings.backbone.name
    )
    key = {
        "preset": settings.preset, "task": task_name, "method": method, "settings": digest_of(values), "seed": seed,
        "code": code,
    }  # fmt: skip
    if method == SCRATCH:
        return key
    spec = resolve_method(method, settings.methods)
    identity = pretrain_identity(spec, settings.for_method(method), "", seed)
    return {
        **key,
        "pretraining": digest_of(identity),
        "pretrain_code": pretraining_code(spec.cls, settings.backbone.name),
    }


def digest_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def summary(lines: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row for each preset, method, task and mode: scores' mean, standard deviation and number."""
    rows = []
    if not lines:
        return pd.DataFrame(columns=[*CELL, "mean", "sd", "runs"])
    for cell, part in pd.DataFrame(lines).groupby(CELL, sort=False):
        scores = part.drop_duplicates("run").score.to_numpy()
        deviation = float(np.std(scores, ddof=1)) if len(scores) > 1 else float("nan")
        rows.append((*cell, scores.mean(), deviation, len(scores)))
    return pd.DataFrame(rows, columns=[*CELL, "mean", "sd", "runs"])


def merge(frame: pd.DataFrame, path: Path) -> None:
    """Write the figures of ``frame`` with two runs or more to ``path``, over what it holds for the same cells."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for row in frame[frame.runs > 1].itertuples():
        place = found.setdefault(row.preset, {}).setdefault(row.task, {}).setdefault(row.mode, {})
        if row.method != SCRATCH:
            place = place.setdefault("pretrained", {}).setdefault(row.method, {})
        place.update({"sd": round(row.sd, 4), "runs": int(row.runs)})
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


Keys = dict[tuple[str, str], dict[str, Any]]
"""The key of each method and task."""


def read_log(path: Path, keys: Keys) -> list[dict[str, Any]]:
    """Return the runs in ``path`` that belong to the key of their method and task."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    runs = [{"method": SCRATCH, **json.loads(line)} for line in lines]
    return [run for run in runs if keys.get((run["method"], run["task"]), {"": 0}).items() <= run.items()]


def measure(arguments: argparse.Namespace) -> pd.DataFrame:
    """Do the runs that the log lacks, one of every cell before the next, and return the summary."""
    settings = load_settings(arguments.preset, arguments.overrides, registry().methods.names())
    if settings.changed and arguments.out == FILE:
        raise ConfigError(
            f"--set {settings.changed[0]}: tables take {FILE.name} for the floor of the preset as it is. Add --out FILE."
        )
    seed, cells = arguments.seed, list(itertools.product(arguments.tasks, arguments.modes))
    keys = {(m, t): key_of(settings, t, seed, m) for m in arguments.methods for t in arguments.tasks}
    for name in arguments.tasks:
        check_modes(registry().tasks.get(name).load(), arguments.modes)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    for run, method in itertools.product(range(arguments.runs), arguments.methods):
        done = {(r["method"], r["task"], r["mode"], r["run"]) for r in read_log(arguments.log, keys)}
        missing = [(task, mode) for task, mode in cells if (method, task, mode, run) not in done]
        weights = (
            pretrained(settings, method, run, seed, arguments.cache)
            if missing and method != SCRATCH
            else None
        )
        for task, mode in missing:
            began = time.monotonic()
            score = score_of(settings, task, mode, run, seed, arguments.cache, copy.deepcopy(weights))
            line = {**keys[method, task], "mode": mode, "run": run, "score": score}
            line |= {"seconds": round(time.monotonic() - began, 1), "environment": environment()}
            with arguments.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            merge(summary(read_log(arguments.log, keys)), arguments.out)
    return summary(read_log(arguments.log, keys))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tasks", nargs="+", default=["shc", "sac", "sbm", "ccc"])
    parser.add_argument("--modes", nargs="+", default=["linear", "knn", "finetune"], choices=MODES)
    parser.add_argument(
        "--methods", nargs="+", default=[SCRATCH], help="rows; scratch for the evaluation alone [scratch]"
    )
    parser.add_argument("--runs", type=int, default=8, help="of every method, task and mode [8]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="prepared volumes [~/.cache/ssl3d]")
    parser.add_argument("--log", type=Path, default=LOG, help="runs, one a line")
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()
    try:
        frame = measure(arguments)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")
    print(frame.round(3).to_string(index=False) if len(frame) else "No runs.")


if __name__ == "__main__":
    main()
