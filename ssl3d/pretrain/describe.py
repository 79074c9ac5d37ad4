"""What ``ssl3d info`` says of a method, and what one of its steps costs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ssl3d.config import BackboneConfig
from ssl3d.environment import to_device
from ssl3d.models.factory import build_backbone
from ssl3d.plugins import registry
from ssl3d.pretrain.loop import freeze_untrained
from ssl3d.pretrain.method import resolve_method
from ssl3d.rng import BatchRng, torch_rng


@dataclass(frozen=True)
class Option:
    """One configuration field: its name, default and meaning."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Description:
    """A method in words."""

    summary: str
    paper: str
    trains: str
    options: list[Option]


def describe(name: str) -> Description:
    """Return what is known of the method ``name``; a variant's defaults are the variant's."""
    entry = registry().methods.get(name)
    spec = resolve_method(name, {})
    fields = type(spec.config).model_fields
    options = [
        Option(key, _show(getattr(spec.config, key)), " ".join((info.description or "").split()).replace("`", ""))
        for key, info in fields.items()
    ]
    return Description(entry.summary, spec.cls.paper, spec.cls.trains, options)


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return ", ".join(_show(v) for v in value)
    return str(value)


@dataclass(frozen=True)
class StepCost:
    """Time of one training step, and of one step of supervised training in the same run."""

    seconds: float
    scratch_seconds: float
    batch_size: int
    edge: int

    @property
    def ratio(self) -> float:
        return self.seconds / self.scratch_seconds


def step_cost(name: str, edge: int = 32, batch_size: int = 4, repeats: int = 5) -> StepCost:
    """Measure a step (views, forward, backward) against a supervised segmentation step.

    Both run in turn on the CPU with the same backbone and as many crops; a method that takes
    several volumes an item gets as many items as fit into ``batch_size`` volumes.

    Args:
        name: a registered method.
        edge: edge of the crops in voxels.
        batch_size: volumes a step.
        repeats: medians are taken over this many.
    """
    spec = resolve_method(name, {})
    config = BackboneConfig.model_validate({"channels": [16, 32, 64, 128]})
    method = spec.build(build_backbone(config, 0), 0)
    freeze_untrained(method)
    supervised = nn.ModuleDict({"net": build_backbone(config, 0), "head": nn.Conv3d(16, 8, 1)})
    for module in (method, supervised):
        to_device(module, torch.device("cpu"))
    items, per_item = max(1, batch_size // spec.cls.volumes_per_item), spec.cls.volumes_per_item
    x = torch.rand(items, per_item, 1, edge, edge, edge, generator=torch_rng(0, "cost"))
    volumes = x.flatten(0, 1)  # (B, 1, D, H, W)
    labels = torch.randint(0, 8, (len(volumes), edge, edge, edge), generator=torch_rng(0, "labels"))

    def ours(step: int) -> None:
        rng = BatchRng(0, step, range(items), volumes=range(items))
        views = method.views(x if per_item > 1 else x[:, 0], rng)
        torch.stack(list(method.training_step(views).values())).sum().backward()

    def theirs(step: int) -> None:
        F.cross_entropy(supervised["head"](supervised["net"](volumes)[1]), labels).backward()

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for step in range(repeats + 1):
        for key, run in (("ours", ours), ("theirs", theirs)):
            began = time.perf_counter()
            run(step)
            if step:  # the first one warms up
                times[key].append(time.perf_counter() - began)
    return StepCost(statistics.median(times["ours"]), statistics.median(times["theirs"]), len(volumes), edge)
