"""Losses and gradients of a run, read back only now and then: a step never waits for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssl3d.errors import TrainingError
from ssl3d.marks import without_effect
from ssl3d.pretrain.method import Method

REMEDY = "Lower pretrain.lr, set pretrain.clip_grad=1, or pretrain.precision=float32; the last checkpoint is untouched."
_GRADIENT = "norm of the gradient"


@without_effect
class Watch:
    """Losses and the norm of the gradient, kept on the device until somebody looks.

    A step notes them by a few small operations on the device, and the first step at which one of them is not finite
    with all its values. :meth:`look` reads everything at once: it names that very step, however many came after it.

    Args:
        method: name of the method, for errors.

    Attributes:
        values: the losses as of the last look.
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self.values: dict[str, float] = {}
        self._names: list[str] = []
        self._now = self._bad = self._step = torch.zeros(0)

    def note(self, losses: dict[str, Tensor], norm: Tensor, step: int) -> None:
        """Keep what step ``step`` (0, 1, ...) gave; nothing is read back.

        Args:
            losses: scalars without gradient.
            norm: of the gradient of all parameters, before clipping; a scalar.
            step: optimizer steps done before it.

        Raises:
            TrainingError: the losses have other names than before, and one noted before was not finite.
        """
        now = torch.stack([loss.float() for loss in (*losses.values(), norm)])  # (losses + 1,)
        if list(losses) != self._names:
            self.look()
            self._names = list(losses)
            self._bad = torch.zeros_like(now)
            self._step = torch.full((1,), -1, device=now.device)
        first = (self._step < 0) & ~now.isfinite().all()  # (1,)
        self._step = self._step.masked_fill(first, step)
        self._bad = torch.where(first, now, self._bad)
        self._now = now

    def look(self) -> dict[str, float]:
        """Return the losses of the newest step.

        Raises:
            TrainingError: a loss or a gradient was not finite since the last look; names the first step at which.
        """
        if not self._names:
            return self.values
        step, *numbers = torch.cat([x.double() for x in (self._step, self._bad, self._now)]).tolist()
        names = [*self._names, _GRADIENT]
        if step >= 0:
            seen = dict(zip(names, numbers, strict=False))
            bad = [name for name, value in seen.items() if not math.isfinite(value)]
            what = ", ".join(f"{name} = {seen[name]}" for name in bad if name != _GRADIENT)
            what = f"loss {what}" if what else f"{_GRADIENT} = {seen[_GRADIENT]}"
            seen.pop(_GRADIENT)
            raise TrainingError(f"{self.method}: {what} at step {step:.0f}; all losses: {seen}. {REMEDY}")
        self.values = dict(zip(self._names, numbers[len(names) :], strict=False))
        return self.values


@without_effect
def check_weights(method: Method, name: str, step: int) -> None:
    """Raise TrainingError when a weight is not finite; called before anything is written.

    Args:
        method: parameters, and buffers of the backbone: what is stored and handed on.
        name: of the method, for the error.
        step: optimizer steps done.
    """
    weights: dict[str, Tensor] = dict(method.named_parameters())
    weights |= {f"backbone.{key}": buffer for key, buffer in method.backbone.named_buffers()}
    weights = {key: value.detach() for key, value in weights.items() if value.is_floating_point()}
    if not weights:
        return
    finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()
    bad = [key for key, is_finite in zip(weights, finite, strict=True) if not is_finite]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise TrainingError(
            f"{name}: weights of {bad[0]}{more} are not finite after {step} steps, although losses and gradients were. "
            f"{REMEDY}"
        )
