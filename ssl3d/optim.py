"""Optimizer and learning rate, from timm; the same for every method and both evaluation modes."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ssl3d.errors import ConfigError, nearest


class Budget(Protocol):
    """What the optimizer needs to know; PretrainConfig and FinetuneConfig both are one."""

    @property
    def steps(self) -> int: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...


def check_optimizer(name: str) -> None:
    """Raise ConfigError when timm has no optimizer called ``name``."""
    from timm.optim import list_optimizers

    if name.lower() not in list_optimizers():
        raise ConfigError(f'Unknown optimizer "{name}".{nearest(name, list_optimizers())}')


def make_optimizer(module: nn.Module, budget: Budget) -> tuple[torch.optim.Optimizer, Any]:
    """Return timm's optimizer and scheduler; call ``scheduler.step_update(k)`` before step k.

    The schedule is a function of the step alone, so that a resumed run needs no state for it.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler, StepLRScheduler

    check_optimizer(budget.optimizer)
    optimizer = create_optimizer_v2(
        module, opt=budget.optimizer, lr=budget.lr, weight_decay=budget.weight_decay
    )
    warmup = min(budget.warmup_steps, max(0, budget.steps - 1))
    common = {"warmup_t": warmup, "warmup_lr_init": budget.lr / max(1, warmup), "t_in_epochs": False}
    if budget.schedule == "cosine":
        scheduler: Any = CosineLRScheduler(
            optimizer, t_initial=max(1, budget.steps - warmup), warmup_prefix=True, lr_min=0.0, **common
        )
    else:
        scheduler = StepLRScheduler(optimizer, decay_t=budget.steps + 1, decay_rate=1.0, **common)
    scheduler.step_update(0)
    return optimizer, scheduler
