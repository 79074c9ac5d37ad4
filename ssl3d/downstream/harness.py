"""The one downstream harness: scratch, linear, fine-tune and nearest neighbours are the same function.

A method reaches this file as a backbone and leaves it as a record. Head, budget, splits and
validation are identical for every method; test cases are seen once. Linear maps are solved
(:mod:`ssl3d.downstream.problems.probe`), fine-tuning is trained.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssl3d.config import DownstreamConfig, FinetuneConfig
from ssl3d.device import PeakMemory, to_device
from ssl3d.downstream.metrics import significant
from ssl3d.downstream.problems.frozen import SharedFeatures
from ssl3d.downstream.problems.kinds import make_problem
from ssl3d.downstream.problems.problem import Mode, OnPrediction, Problem
from ssl3d.downstream.tasks import Task
from ssl3d.errors import TrainingError
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import seeded
from ssl3d.optim import make_optimizer
from ssl3d.progress import Track
from ssl3d.rng import numpy_rng

if TYPE_CHECKING:
    from ssl3d.data.prepared.cohort import PreparedCohort
    from ssl3d.data.splits import Split


@dataclass(frozen=True)
class Outcome:
    """What one evaluation yields; the fields go into the record as they are.

    ``constant_output``: a classifier or a regression answers all test cases alike (:data:`CONSTANT_PROBABILITY`,
    :data:`CONSTANT_VALUE`); its score ranks rounding errors.
    """

    score: float
    per_case: list[dict[str, Any]]
    excluded: dict[str, int]
    validation: list[dict[str, float]]
    best_step: int
    seconds: float
    peak_memory_mib: float | None
    parameters_trained: int
    constant_output: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated and how; nothing of it depends on the backbone.

    Attributes:
        task: what to predict.
        cohort: the task's prepared cases.
        split: case ids of the three parts.
        mode: ``linear``: the whole backbone frozen; ``multiscale``: its encoder frozen, all stages of it read at once;
            ``finetune``: every parameter trained; ``knn``: the backbone frozen and each test sample labelled by its
            neighbours in feature space.
        config: budget and protocol, the same for every method.
        seed: decides the head's initial weights, the order of the training crops, and which voxels stand for a case.
        device: where to compute.
    """

    task: Task
    cohort: PreparedCohort
    split: Split
    mode: Mode
    config: DownstreamConfig
    seed: int
    device: torch.device


def evaluate(
    backbone: Backbone,
    evaluation: Evaluation,
    label: str = "",
    keep: Callable[[nn.Module], None] | None = None,
    on_prediction: OnPrediction | None = None,
    shared: SharedFeatures | None = None,
) -> Outcome:
    """Solve for a head (linear), train everything (finetune) or nothing (knn) on ``split.train``, choose on
    ``split.val``, test once on ``split.test``.

    Args:
        backbone: pretrained or random weights; changed by fine-tuning.
        evaluation: what is evaluated and how.
        label: what the progress line calls this evaluation.
        keep: called with the head once training is over, before the test; ``backbone`` then holds the
            weights that belong to it.
        on_prediction: called with each segmented test case.
        shared: frozen features of this backbone on this task, where others have begun them.

    Raises:
        TrainingError: the loss or a frozen feature is not finite.
    """
    began, memory = time.monotonic(), PeakMemory(evaluation.device)
    task, cohort, mode, seed = evaluation.task, evaluation.cohort, evaluation.mode, evaluation.seed
    to_device(backbone, evaluation.device)
    problem = make_problem(backbone, task, cohort, mode, evaluation.config, evaluation.device)
    problem.on_prediction = on_prediction
    if shared is not None and problem.frozen is not None:
        problem.frozen = shared.of(problem.frozen)
    parts = (evaluation.split.train, evaluation.split.val, evaluation.split.test)
    train, val, test = ([cohort.index(case) for case in part] for part in parts)
    backbone.requires_grad_(mode == "finetune")
    backbone.eval()
    label = label or f"{task.name} {mode}"
    if problem.mode == "linear":
        fitted = _solved(problem, train, val, seed, label)
    elif mode == "finetune":
        fitted = _tuned(problem, train, val, seed, label)
    else:
        fitted = _Fitted(problem.make_neighbours(train, seed), [], 0)
    to_device(fitted.head, evaluation.device)
    model = nn.ModuleDict({"head": fitted.head, "backbone": backbone})
    model.eval()
    if keep is not None:
        keep(fitted.head)
    tested, per_case, excluded = problem.test(fitted.head, test)
    return Outcome(
        score=significant(problem.scale * tested),
        per_case=per_case,
        excluded=excluded,
        validation=fitted.validation,
        best_step=fitted.step,
        seconds=round(time.monotonic() - began, 3),
        peak_memory_mib=memory.mib(),
        parameters_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        constant_output=problem.constant_output(per_case),
    )


@dataclass(frozen=True)
class _Fitted:
    """A head, its validation curve, and the step whose weights it has."""

    head: nn.Module
    validation: list[dict[str, float]]
    step: int


def _solved(problem: Problem, train: list[int], val: list[int], seed: int, label: str) -> _Fitted:
    """Return the solved head, validated once, after as many steps as the solution took."""
    try:
        head, found = problem.solve(train, val, seed)
    except TrainingError as error:
        raise TrainingError(f"{label}: {error}") from None
    to_device(head, problem.device)
    head.eval()
    score = significant(problem.scale * problem.validate(head, val)[0])
    point: dict[str, float] = {"step": found.iterations, "score": score}
    strength = {} if found.strength is None else {"strength": found.strength}
    return _Fitted(head, [point | strength], found.iterations)


def _tuned(problem: Problem, train: list[int], val: list[int], seed: int, label: str) -> _Fitted:
    """Return the head after it and the backbone were trained; both have the weights to test."""
    with seeded(seed, "head", problem.task.name, problem.mode):
        head = problem.make_head(train)
    to_device(head, problem.device)
    model = nn.ModuleDict({"head": head, "backbone": problem.backbone})
    curve, step = _train(problem, model, (train, val), problem.config.finetune, seed, label)
    return _Fitted(head, curve, step)


def _train(
    problem: Problem, model: nn.ModuleDict, parts: tuple[list[int], list[int]], budget: FinetuneConfig, seed: int,
    label: str,
) -> tuple[list[dict[str, float]], int]:  # fmt: skip
    """Train ``model`` on ``parts[0]``, validate on ``parts[1]``; leave it with the weights to test.

    Returns:
        The validation curve and the step of those weights.
    """
    head, (train, val) = model["head"], parts
    optimizer, scheduler = make_optimizer(model, budget.model_copy(update={"lr": problem.learning_rate}))
    trained = [p for p in model.parameters() if p.requires_grad]
    best: tuple[tuple[float, float], int, dict[str, Tensor]] | None = None
    curve: list[dict[str, float]] = []
    every = validation_interval(problem, train, val)
    problem.settle(head, train)
    model.train()
    with Track(label, budget.steps) as track:
        for step in range(budget.steps):
            scheduler.step_update(step)
            optimizer.zero_grad(set_to_none=True)
            loss = problem.loss(head, _draw(train, problem.cases_per_step, seed, step), step, seed)
            if not math.isfinite(float(loss.detach())):
                raise TrainingError(
                    f"{label}: loss = {float(loss.detach())} at step {step}. Lower downstream.finetune.lr (or volumes_lr, "
                    "where the preset has one for tasks with one prediction a volume), or set "
                    "downstream.finetune.clip_grad=1."
                )
            loss.backward()
            if budget.clip_grad is not None:
                nn.utils.clip_grad_norm_(trained, budget.clip_grad)
            optimizer.step()
            done = step + 1
            if done % every == 0 or done == budget.steps:
                running = {key: value.clone() for key, value in head.state_dict().items()}
                model.eval()
                problem.settle(head, train)
                score = problem.validate(head, val)
                curve.append({"step": done, "score": significant(problem.scale * score[0])})
                if best is None or score > best[0] or budget.weights == "last":
                    best = (score, done, copy.deepcopy(model.state_dict()))
                head.load_state_dict(running)  # how often is validated changes nothing in training
                model.train()
            track.update(
                done,
                {"loss": float(loss.detach())},
                note=f"validation {problem.scale * best[0][0]:.4g}" if best else "",
            )

    assert best is not None
    model.load_state_dict(best[2])
    return curve, best[1]


def validation_interval(problem: Problem, train: list[int], val: list[int]) -> int:
    """Return the steps between two validations: the least multiple of ``validate_every`` that ``validation_share`` allows.

    A step costs three passes, forward, and backward to features and to weights; a validation one of each validation case
    and of each reference that the head is settled on.
    """
    budget = problem.config.finetune
    step = 3 * problem.cases_per_step * sum(map(problem.voxels_trained, train)) / len(train)
    validation = sum(map(problem.voxels_predicted, [*val, *problem.references(train)]))
    return budget.validate_every * max(
        1, math.ceil(validation / (budget.validation_share * step * budget.validate_every))
    )


def _draw(cases: list[int], batch_size: int, seed: int, step: int) -> list[int]:
    """Return the cases of ``step``: seeded permutations of the training cases, end to end."""
    chosen = []
    for number in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(number, len(cases))
        chosen.append(cases[int(numpy_rng(seed, "downstream order", epoch).permutation(len(cases))[place])])
    return chosen
