"""Optimizer and learning rate, from timm; the same for every method and both evaluation modes."""

from __future__ import annotations

from inspect import signature
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


USUAL = ("adam", "adamw", "sgd", "momentum")
"""Known without timm, which takes seconds and 190 MB to import."""


def check_optimizer(name: str) -> None:
    """Raise ConfigError when timm has no optimizer called ``name``."""
    if name.lower() in USUAL:
        return
    from timm.optim import list_optimizers

    if name.lower() not in list_optimizers():
        raise ConfigError(f'Unknown optimizer "{name}".{nearest(name, list_optimizers())}')


def has_fused(name: str, device: torch.device) -> bool:
    """Whether one kernel is to update many tensors at once: on CUDA, for optimizers that have it.

    A launch is dear there, and the steps are counted on the device. (On one core of a CPU it saves 7 ms of a step of
    `quick`, about a hundredth, for other last digits.)
    """
    from timm.optim import get_optimizer_class

    made: Any = get_optimizer_class(name, bind_defaults=False)
    return device.type == "cuda" and "fused" in signature(made).parameters


def make_optimizer(module: nn.Module, budget: Budget) -> tuple[torch.optim.Optimizer, Any]:
    """Return timm's optimizer and scheduler; call ``scheduler.step_update(k)`` before step k.

    The schedule is a function of the step alone, so that a resumed run needs no state for it.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler, StepLRScheduler

    check_optimizer(budget.optimizer)
    some = next(module.parameters(), None)
    fused = {"fused": True} if some is not None and has_fused(budget.optimizer, some.device) else {}
    optimizer = create_optimizer_v2(
        module, opt=budget.optimizer, lr=budget.lr, weight_decay=budget.weight_decay, **fused
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


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, weight: float) -> None:
    """Move the parameters of ``target`` by ``weight`` of the way to those of ``online``, and copy its buffers.

    A moving average of the network in training, all tensors in a few calls.

    Args:
        target: whose parameters and buffers ``online`` has, too, under the same names.
        online: the network in training.
        weight: in [0, 1].
    """
    moving = dict(target.named_parameters())
    torch._foreach_lerp_([*moving.values()], [online.get_parameter(name) for name in moving], weight)
    buffers = dict(target.named_buffers())  # such as statistics of a batch norm
    if buffers:
        torch._foreach_copy_([*buffers.values()], [online.get_buffer(name) for name in buffers])
