"""Is the pretext task learned? Its score on held-back volumes, beside that of an output that ignores its input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssl3d.errors import TrainingError
from ssl3d.pretrain.contract import check_losses, number
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.source import Batch
from ssl3d.rng import BatchRng

MARGIN = 0.05
"""Share of a level by which a score must lie below it: the scores are means over few crops."""


@dataclass(frozen=True)
class Score:
    """The pretext task on held-back crops; the lower, the better.

    Attributes:
        value: of the method, see :meth:`ssl3d.Method.pretext_score`.
        chance: of the best output that ignores its input; None where the method names none.
    """

    value: float
    chance: float | None


@torch.no_grad()
def held_back_score(
    method: Method, batches: Sequence[Batch], device: torch.device, dtype: torch.dtype | None = None
) -> Score:
    """Score the pretext task on fixed crops with fixed randomness; nothing of the method changes.

    Args:
        method: the method; scored in ``eval`` mode, so that normalisation uses stored statistics.
        batches: held-back crops, each batch as large as one of training.
        device: where to compute.
        dtype: precision of autocast; None: float32.

    Raises:
        TrainingError: the score is not finite.
    """
    values, levels = [], []
    with evaluating(method):
        for batch in batches:
            rng = BatchRng(0, 0, batch.items, device, ("held back",), batch.volumes)
            views = method.held_back_views(batch.x.to(device), rng)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                values.append(_score(method, views))
            level = method.chance(views)
            levels.append(None if level is None else number(method, "chance", level, finite=True))
    if not all(math.isfinite(value) for value in values):
        raise TrainingError(
            f"{method.name}: its score on held-back crops is {_mean(values)}, although the training losses are finite. "
            "Fix: look at pretext_score, and at what differs in eval mode; a smaller pretrain.lr may help."
        )
    known = [level for level in levels if level is not None]
    return Score(_mean(values), _mean(known) if len(known) == len(levels) else None)


def _score(method: Method, views: Any) -> float:
    if type(method).pretext_score is Method.pretext_score:  # which adds the losses up
        losses = method.training_step(views)
        check_losses(losses, method)
        return sum(float(loss) for loss in losses.values())
    return number(method, "pretext_score", method.pretext_score(views))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in ``eval`` mode, and every part of it back in its own afterwards."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def clearly_below(score: float, level: float) -> bool:
    """Whether ``score`` lies below ``level`` by more than :data:`MARGIN` of it."""
    return score < level - MARGIN * abs(level)


def summary(method: Method, start: float | None, end: Score, held_back: str) -> dict[str, Any]:
    """Return the field ``pretext`` of ``run.json``.

    ``learned``: the score ended clearly below both that of an output that ignores its input and its
    own before training; None for a control, and where the method names no such level.

    Args:
        method: the method.
        start: score before training; None where the log of an interrupted run was lost.
        end: score after it.
        held_back: what the scores are of, in words.
    """
    learned = None
    if end.chance is not None and not method.control:
        learned = clearly_below(end.value, min(end.chance, end.chance if start is None else start))
    return {
        "chance": end.chance, "start": start, "end": end.value, "learned": learned, "held_back": held_back,
    }  # fmt: skip
