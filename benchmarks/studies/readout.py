"""What should stand between pooled features and a linear layer? Rotation prediction at quick, by norm and batch.

    bare       nothing: the features are nearly one vector
    running    exponential statistics without gradient
    batch      batch norm (needs two samples)
    references batch norm over the batch and further volumes that pass the network with it, with gradient
    pooled     ssl3d.models.heads.PooledNorm: the batch and a memory of samples, with gradient

Prints the cross-entropy on 64 crops that are never trained on, in eval mode, at the thirds of the run; chance is 2.303.
Voxels of a step grow with the batch and with the references.

Usage: ``python benchmarks/studies/readout.py --norm pooled --batch 1 [--memory 16] [--references 3] [--steps 360]
[--lr 1e-3]``
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.bench.sources import pretraining_cohort
from ssl3d.config import load_settings
from ssl3d.models.heads import PooledNorm, pool
from ssl3d.optim import make_optimizer
from ssl3d.pretrain.loop import build_method
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.pretext import evaluating
from ssl3d.pretrain.source import Batch, training_source
from ssl3d.pretrain.spec import resolve_method
from ssl3d.registry.registry import registry
from ssl3d.rng import BatchRng

CPU = torch.device("cpu")


class Running(PooledNorm):
    """The same statistics, without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            super().forward(x.detach())
        return (x - self.mean) / (self.variance + self.eps).sqrt()


def norm_of(o: argparse.Namespace, channels: int) -> nn.Module:
    """Return the norm that is asked for, over ``channels`` features."""
    if o.norm == "bare":
        return nn.Identity()
    if o.norm in ("batch", "references"):
        return nn.BatchNorm1d(channels, affine=False)
    return (Running if o.norm == "running" else PooledNorm)(channels, o.memory)


def views(method: Method, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    """Return rotated crops (B, 1, D, H, W) and their classes (B,)."""
    made = method.views(batch.x, BatchRng(0, step, batch.items, CPU, ("views",), batch.volumes))
    return made["rotated"], made["label"]


@torch.no_grad()
def held_back_loss(method: Method, read: nn.Module, crops: list[tuple[Tensor, Tensor]]) -> float:
    """Return the cross-entropy on held-back crops."""
    with evaluating(method), evaluating(read):
        losses = [F.cross_entropy(read(pool(method.backbone.encode(x))), y) for x, y in crops]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--norm", choices=("bare", "running", "batch", "references", "pooled"), default="pooled"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--memory", type=int, default=16)
    parser.add_argument("--references", type=int, default=3)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--lr", type=float, default=1e-3)
    o = parser.parse_args()
    settings = load_settings(
        "quick", [f"pretrain.lr={o.lr}", f"pretrain.steps={o.steps}"], registry().methods.names()
    )
    cohort, crop = pretraining_cohort("phantoms", settings, None), settings.pretrain.crop
    method = build_method(resolve_method("rotation", {}), settings, 0, CPU).train()
    channels = method.backbone.global_channels
    read = nn.Sequential(norm_of(o, channels), nn.Linear(channels, 10))
    method.classifier = read
    optimizer, scheduler = make_optimizer(method, settings.pretrain)
    further = o.references if o.norm == "references" else 0
    source = training_source(cohort, crop, o.batch + further, 1, 0, max(1, 64 // (o.batch + further)))
    crops = [views(method, batch, 0) for batch in source.held_back]
    began, curve = time.process_time(), [held_back_loss(method, read, crops)]
    for step in range(o.steps):
        x, y = views(method, source.batch(step), step)
        logits = read(pool(method.backbone.encode(x)))[: o.batch]  # references have no loss
        loss = F.cross_entropy(logits, y[: o.batch])
        scheduler.step_update(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % (o.steps // 3) == 0:
            curve.append(held_back_loss(method, read, crops))
    numbers = " -> ".join(f"{value:.3f}" for value in curve)
    print(
        f"{o.norm}, batch {o.batch}, references {further}: {numbers}  ({time.process_time() - began:.0f} s)"
    )


if __name__ == "__main__":
    main()
