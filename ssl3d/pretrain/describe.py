"""What ``ssl3d info`` says of a method, and what one of its steps costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import nn

from ssl3d.config import BackboneConfig
from ssl3d.data.prepared.volumes import ArrayVolumes
from ssl3d.device import to_device
from ssl3d.models.factory import build_backbone
from ssl3d.pretrain.loop import freeze_untrained
from ssl3d.pretrain.source import CropSource
from ssl3d.pretrain.spec import resolve_method
from ssl3d.registry.registry import registry
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
    return Description(entry.summary, spec.cls.paper, spec.cls.trains, list(_options(spec.config)))


def _options(config: BaseModel, prefix: str = "") -> Iterator[Option]:
    for key, info in type(config).model_fields.items():
        value = getattr(config, key)
        if isinstance(value, BaseModel):
            yield from _options(value, f"{prefix}{key}.")
        else:
            meaning = " ".join((info.description or "").split()).replace("`", "")
            yield Option(prefix + key, _show(value), meaning)


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


def _noise(n: int, edge: int) -> ArrayVolumes:
    """Return volumes of noise, all alike: what they show does not change a step's time."""
    return ArrayVolumes([torch.rand(edge, edge, edge, generator=torch_rng(0, "cost")).numpy()] * n)


def step_cost(name: str, edge: int = 32, batch_size: int = 4, repeats: int = 5) -> StepCost:
    """Measure a step (views, forward, backward) against a supervised segmentation step.

    What a method does when an epoch starts is not part of a step.

    Both run in turn on the CPU with the same backbone and as many voxels.

    Args:
        name: a registered method.
        edge: edge of the crops in voxels.
        batch_size: crops a step.
        repeats: medians are taken over this many.
    """
    spec = resolve_method(name, {})
    config = BackboneConfig.model_validate({"channels": [16, 32, 64, 128]})
    method = spec.build(build_backbone(config, 0), 0)
    freeze_untrained(method)
    supervised = nn.ModuleDict({"net": build_backbone(config, 0), "head": nn.Conv3d(16, 8, 1)})
    for module in (method, supervised):
        to_device(module, torch.device("cpu"))
    items = method.items_per_step((edge,) * 3, batch_size)
    source = CropSource(_noise(max(8, items), edge), (edge,) * 3, items, method.volumes_per_item, 0)
    method.setup(source)
    method.on_epoch_start(source, 0)
    batch = source.batch(0)
    volumes = batch.x.view(-1, 1, edge, edge, edge)[:batch_size]  # (B, 1, D, H, W)
    volumes = volumes.repeat(batch_size, 1, 1, 1, 1)[:batch_size]
    labels = torch.randint(0, 8, (len(volumes), edge, edge, edge), generator=torch_rng(0, "labels"))

    def ours(step: int) -> None:
        views = method.views(batch.x, BatchRng(0, step, batch.items, volumes=batch.volumes))
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
