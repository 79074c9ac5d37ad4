"""An option makes another cell exactly where it makes other numbers: every option of evaluation, kind of task and mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cohorts import MemoryCohort, sphere_cohort

from ssl3d.bench.cell import Cell, TaskData, planned_weights
from ssl3d.bench.stale import _matters
from ssl3d.config import WITHOUT_EFFECT, BackboneConfig, DownstreamConfig, Settings
from ssl3d.data.splits import Split
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.downstream.problems.kinds import problem_class
from ssl3d.downstream.problems.problem import MODES
from ssl3d.downstream.tasks import Task
from ssl3d.models.factory import build_backbone
from ssl3d.pretrain.spec import resolve_method

CPU = torch.device("cpu")
BACKBONE = BackboneConfig(channels=[4, 8])  # type: ignore[call-arg]
BASE: dict[str, Any] = {
    "crop": [6, 12, 12], "overlap": 0.5, "surface_tolerance_mm": 2.0, "precision": "float32",
    "linear": {"voxels": 40}, "multiscale": {"voxels": 60}, "knn": {"voxels": 20, "neighbours": 5},
    "finetune": {"steps": 3, "validate_every": 1, "validation_share": 100},
}  # fmt: skip
OTHER: dict[str, Any] = {
    "crop": 12, "overlap": 0.0, "head_kernel": 3, "surface_tolerance_mm": 4.0, "precision": "bfloat16",
    "feature_precision": "bfloat16",
    "linear.loss": "dice_ce", "linear.voxels": 20, "linear.penalty": 0.1, "linear.crop": 12,
    "multiscale.loss": "dice_ce", "multiscale.voxels": 20, "multiscale.penalty": 0.1, "multiscale.crop": 12,
    "finetune.steps": 4, "finetune.batch_size": 2, "finetune.volumes": 2, "finetune.volumes_lr": 0.003,
    "finetune.optimizer": "sgd", "finetune.lr": 0.003,
    "finetune.weight_decay": 0.5, "finetune.schedule": "cosine", "finetune.warmup_steps": 3, "finetune.clip_grad": 1e-9,
    "finetune.validate_every": 2, "finetune.validation_share": 1e-3,
    "finetune.weights": "last", "finetune.loss": "dice_ce", "finetune.augment": True,
    "finetune.crop": 12,
    "knn.neighbours": 1, "knn.temperature": 5.0, "knn.voxels": 5, "knn.standardize": False,
}  # fmt: skip
"""Another value of each option, which changes a number wherever the option is read."""


def cohort(kind: str) -> MemoryCohort:
    """Twelve cases, of which validation says the opposite of training: so the best weights are not the last."""
    found = sphere_cohort(12, edge=12)
    found.targets = [big if i < 6 else 1 - big for i, big in enumerate(found.targets)]
    if kind == "classes":
        found.targets, found.target_names = [i % 3 for i in range(12)], {0: "a", 1: "b", 2: "c"}
    elif kind == "multilabel":
        found.classes, found.target_names = [(0,), (1,), (0, 1), ()] * 3, {0: "a", 1: "b"}
    elif kind == "regression":
        found.values = [40.0 + 20 * target + i / 7 for i, target in enumerate(found.targets)]
    return found


TASKS = {
    "segmentation": Task("s", "S", "segmentation", "memory", "dsc", None),
    "two classes": Task("t", "T", "classification", "memory", "auc", None),
    "classes": Task("c", "C", "classification", "memory", "macro_auc", None),
    "multilabel": Task("m", "M", "multilabel", "memory", "macro_auc", None),
    "regression": Task("r", "R", "regression", "memory", "mae", None),
}
CASES = [(name, mode) for name, task in TASKS.items() for mode in problem_class(task).modes]


def options(mode: str) -> list[str]:
    """Every option of evaluation in ``mode`` that is not marked as without effect."""
    own = type(getattr(DownstreamConfig(), mode)).model_fields
    shared = {name: info for name, info in DownstreamConfig.model_fields.items() if name not in MODES}
    fields = shared | {f"{mode}.{name}": info for name, info in own.items()}
    return [name for name, info in fields.items() if WITHOUT_EFFECT not in info.metadata]


def settings(name: str, *changed: str) -> Settings:
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    values["finetune"]["lr"] = 0.5 if name == "regression" else 0.2
    for option in changed:
        section, _, key = option.rpartition(".")
        (values[section] if section else values)[key] = OTHER[option]
    return Settings(backbone=BACKBONE, downstream=DownstreamConfig.model_validate(values))


def cell(name: str, mode: Any, given: Settings) -> Cell:
    data = cohort(name)
    ids = [case.id for case in data.cases]
    split = Split("test", tuple(ids[:6]), tuple(ids[6:9]), tuple(ids[9:]))
    weights = planned_weights(resolve_method("scratch", {}), given, "", 0)
    return Cell(weights, TaskData(TASKS[name], data, [split]), split, mode, 0, 1.0, None, given)  # type: ignore[arg-type]


def cell_and_numbers(name: str, mode: Any, given: Settings) -> tuple[dict[str, Any], tuple[Any, ...]]:
    one, config = cell(name, mode, given), given.downstream.for_mode(mode)
    evaluation = Evaluation(TASKS[name], one.data.cohort, one.split, mode, config, 0, CPU)
    found = evaluate(build_backbone(BACKBONE, 0), evaluation)
    return one.identity, (found.score, found.per_case, found.excluded, found.validation, found.best_step)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_another_cell_where_and_only_where_a_number_is_another(name: str, mode: str) -> None:
    identity, numbers = cell_and_numbers(name, mode, settings(name))
    counting, others = [], []
    for option in options(mode):
        same = cell(name, mode, settings(name, option)).identity == identity
        (others if same else counting).append(option)
    # Those that make no other cell change no number, all of them together,
    assert cell_and_numbers(name, mode, settings(name, *others)) == (identity, numbers), others
    for option in counting:  # and each of the rest changes one.
        there, then = cell_and_numbers(name, mode, settings(name, option))
        assert there != identity and then != numbers, option
    for option in (o for o in options(mode) if not o.endswith(".crop")):  # compared as downstream.crop
        run = {"task_data": None, "data": "phantoms", "settings": settings(name).model_dump(mode="json")}
        assert _matters(f"downstream.{option}", identity, run) == (option in counting), option


def test_the_options_of_other_modes_make_no_other_cell() -> None:
    identity = cell("segmentation", "linear", settings("segmentation")).identity
    for option in (o for o in OTHER if o.startswith(("finetune.", "knn."))):
        assert cell("segmentation", "linear", settings("segmentation", option)).identity == identity, option
