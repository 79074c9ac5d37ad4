"""What the functions of a method must return; said with the place in the plugin's own file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssl3d.errors import PluginError, TrainingError
from ssl3d.pretrain.method import Method

__without_effect__ = "it refuses, or changes nothing"

HELD_BACK_SCORE = "held_back_pretext"
"""Name of the score in ``log.jsonl``: at step 0 before training, then every ``pretrain.monitor_every`` steps."""

RESERVED = ("step", "lr", HELD_BACK_SCORE)
"""Names that a line of the log has already."""


def check_functions(cls: type[Method]) -> None:
    """Raise PluginError for a method that trains something and lacks ``views`` or ``training_step``."""
    missing = [name for name in ("views", "training_step") if getattr(cls, name) is getattr(Method, name)]
    if missing and cls.trains != "none":
        raise PluginError(
            f"The method {cls.name} ({cls.__module__}.{cls.__qualname__}) cannot be trained: it has no "
            f"{' and no '.join(missing)}. Fix: write them: docs/plugins.md shows a whole method\n"
            f"Everything that is wrong with it: ssl3d check {cls.name}"
        )


def check_losses(losses: object, method: Method) -> None:
    """Refuse what is no dictionary of named scalar losses with a gradient.

    Args:
        losses: what ``training_step`` has returned.
        method: whose it is.

    Raises:
        TrainingError: it is something else; names the method, what it returned, and file and line of its function.
    """
    problem = _problem(losses)
    if problem:
        raise TrainingError(
            f"{method.name}: {problem} ({place(type(method).training_step)}). "
            'Fix: return named scalar losses, {"loss": tensor}, computed from the parameters.'
        )


def _problem(losses: object) -> str | None:
    if not isinstance(losses, Mapping):
        return f"training_step returned {_shown(losses)}, which is no dictionary"
    if not losses:
        return "training_step returned no loss"
    for name, loss in losses.items():
        if not isinstance(name, str):
            return f"a loss is called {name!r}, which is no text"
        if name in RESERVED:
            return f'a loss is called "{name}", which the log calls something else: give it another name'
        if not isinstance(loss, Tensor):
            return f"loss {name} is {_shown(loss)}, no tensor"
        if loss.dim():
            return f"loss {name} has shape {tuple(loss.shape)}; return scalars"
    if torch.is_grad_enabled() and not any(loss.requires_grad for loss in losses.values()):
        return f"{', '.join(losses)} has no gradient: it does not depend on any parameter that is trained"
    return None


def place(function: Callable[..., object]) -> str:
    """Return file and line of a function."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}" if code else "no Python source"


def _shown(value: object) -> str:
    """Return a value as code, shortened, however broken it is."""
    try:
        text = repr(value)
    except Exception:
        return f"an object of {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..., an object of {type(value).__name__}"


def number(method: Method, function: str, value: Any, finite: bool = False) -> float:
    """Return ``value`` as a number.

    Args:
        method: whose it is.
        function: name of what has returned it.
        value: a number, or a tensor with one element.
        finite: whether it must be.

    Raises:
        TrainingError: it is none; names the method, the function and its place.
    """
    try:
        if value is None or isinstance(value, str | bytes | bool):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(method, function, value, "a number") from error
    if finite and not math.isfinite(found):
        raise _refused(method, function, value, "a finite number, or None")
    return found


def numbers(method: Method, function: str, value: Any) -> dict[str, float]:
    """Return ``value`` as numbers by name.

    Raises:
        TrainingError: as :func:`number`.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _refused(method, function, value, 'numbers by name, {"name": 1.0}')
    return {name: number(method, function, one) for name, one in value.items()}


def check_sizes(method: Method, crop: Sequence[int], batch_size: int) -> int:
    """Return the items of a step; raise TrainingError for a number of items or edges of a view that are none."""
    view = method.view_shape(crop)
    if not isinstance(view, Sequence) or len(view) != 3 or not all(type(n) is int and n > 0 for n in view):
        raise _refused(method, "view_shape", view, "three edges in voxels")
    items = method.items_per_step(crop, batch_size)
    if type(items) is not int or items < 1:
        raise _refused(method, "items_per_step", items, "a whole number of 1 at least")
    return items


def _refused(method: Method, function: str, value: object, wanted: str) -> TrainingError:
    return TrainingError(
        f"{method.name}: {function} returned {_shown(value)} ({place(getattr(type(method), function))}). "
        f"Fix: return {wanted}."
    )
