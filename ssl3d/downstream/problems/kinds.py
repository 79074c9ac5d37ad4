"""From a task to the problem that knows its head, loss and metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ssl3d.config import DownstreamConfig
from ssl3d.downstream.problems.classification import Classification
from ssl3d.downstream.problems.problem import MODES, Mode, Problem
from ssl3d.downstream.problems.segmentation import Segmentation
from ssl3d.downstream.tasks import Task
from ssl3d.errors import ConfigError
from ssl3d.models.backbone import Backbone
from ssl3d.models.stages import AllStages

if TYPE_CHECKING:
    from ssl3d.data.prepared.cohort import PreparedCohort


def problem_class(task: Task) -> type[Problem]:
    """Return what knows head, loss and metric of a task's kind."""
    if task.kind == "segmentation":
        return Segmentation
    if task.kind == "classification" and task.metric == "auc":
        return Classification
    from ssl3d.downstream.problems.several import MultiClass, MultiLabel, Regression

    return {"classification": MultiClass, "multilabel": MultiLabel, "regression": Regression}[task.kind]


def check_modes(task: Task, modes: list[Mode]) -> None:
    """Raise ConfigError for a mode that the kind of ``task`` does not have."""
    possible = problem_class(task).modes
    for mode in modes:
        if mode not in possible:
            raise ConfigError(
                f"The task {task.name} ({task.kind}) has no mode {mode}; it has {' and '.join(possible)}. "
                "Fix: give these with --modes, or leave the task out."
            )


def make_problem(
    backbone: Backbone,
    task: Task,
    cohort: PreparedCohort,
    mode: Mode,
    config: DownstreamConfig,
    device: torch.device,
) -> Problem:
    """Return what evaluates ``task``; ``backbone`` is on ``device``.

    ``multiscale`` is linear evaluation of a network whose f^l and f^g are all stages of the encoder.
    """
    if mode == "multiscale":
        backbone, mode = AllStages(backbone), "linear"
        config = config.model_copy(update={"linear": config.multiscale})
    return problem_class(task)(backbone, task, cohort, mode, config, device)


def check_mode(mode: str) -> Mode:
    """Return ``mode`` if the harness has it.

    Raises:
        ConfigError: it has not.
    """
    from ssl3d.errors import nearest

    for known in MODES:
        if mode == known:
            return known
    raise ConfigError(f'Unknown mode "{mode}".{nearest(mode, MODES)}')
