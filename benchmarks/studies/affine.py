"""Does GVSL's affine head learn, and what could it gain? Phantom hearts, the affine map alone.

    best affine       the 15 values of psi^g optimised directly for each pair (Adam on 1 - NCC): what
                      a perfect head would reach
    fixed pairs       the head and the encoder trained on a few pairs over and over: can it tell them apart?
    held back         the same trained on ever new pairs, as in pretraining, without the deformable head,
                      then asked for pairs of other, labelled hearts

for each of --methods. The spread of psi^g over pairs says whether the head looks at its input: a head
that answers every pair with one map has a spread of 0.

Usage: ``python benchmarks/studies/affine.py [--methods gvsl gvsl_released_head] [--steps 400] [--pairs 16]``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matching import labelled_pairs
from ssl3d_methods.gvsl import GVSL
from torch import Tensor

from ssl3d.bench.sources import pretraining_cohort, task_cohort
from ssl3d.config import Settings, load_settings
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.downstream.features.matching import central, score
from ssl3d.environment import environment
from ssl3d.geometry import affine_coords, affine_matrix, identity_coords, warp
from ssl3d.losses import ncc_loss
from ssl3d.pretrain.loop import build_method
from ssl3d.pretrain.source import CropSource
from ssl3d.pretrain.spec import resolve_method
from ssl3d.registry.registry import registry
from ssl3d.rng import BatchRng

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


def best_affine(moving: Tensor, fixed: Tensor, steps: int = 80) -> Tensor:
    """Return the matrix (1, 3, 4) that maximises NCC, both volumes (1, 1, D, H, W)."""
    values = torch.zeros(1, 15, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.02)
    for _ in range(steps):
        rotation, scaling, shearing, translation = values.split((3, 3, 6, 3), dim=1)
        matrix = affine_matrix(rotation, 1 + scaling, shearing, translation)
        optimizer.zero_grad()
        ncc_loss(warp(moving, affine_coords(matrix, fixed.shape[2:])), fixed).backward()
        optimizer.step()
    return matrix.detach()


def matrices(method: GVSL, moving: Tensor, fixed: Tensor) -> Tensor:
    """Return psi^g of the head (B, 3, 4)."""
    bottlenecks = method.backbone.encode(torch.cat([moving, fixed]))[-1]  # (2B, C, d, h, w)
    affine = method.matching.affine
    assert affine is not None
    return affine(*bottlenecks.chunk(2))


def new_method(name: str, settings: Settings, lr: float) -> tuple[GVSL, torch.optim.Optimizer]:
    """Return an untrained GVSL and an optimizer of its encoder and affine head."""
    method = build_method(resolve_method(name, settings.methods), settings, 0, CPU).train()
    assert isinstance(method, GVSL) and method.matching.affine is not None
    trained = [*method.backbone.encoder.parameters(), *method.matching.affine.parameters()]
    return method, torch.optim.Adam(trained, lr=lr)


def step(method: GVSL, optimizer: torch.optim.Optimizer, views: dict[str, Tensor]) -> dict[str, float]:
    """Take one step of 1 - NCC on pairs (B, 1, D, H, W); return the gain in NCC and the spread of psi^g."""
    moving, fixed = views["a"], views["b"]
    matrix = matrices(method, views["a_seen"], views.get("b_seen", views["b"]))
    loss = ncc_loss(warp(moving, affine_coords(matrix, fixed.shape[2:])), fixed)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    before = float(ncc_loss(moving, fixed))
    return {
        "gain": before - float(loss.detach()),
        "spread": float(matrix.detach().std(0, correction=0).mean()),
    }


def on_fixed_pairs(
    name: str, settings: Settings, cohort: PreparedCohort, steps: int, lr: float
) -> list[dict[str, float]]:
    """Train on four pairs over and over, undamaged."""
    method, optimizer = new_method(name, settings, lr)
    x = CropSource(cohort, settings.pretrain.crop, 4, 2, 0).batch(0).x  # (4, 2, 1, D, H, W)
    a, b = x.unbind(1)
    return [step(method, optimizer, {"a": a, "b": b, "a_seen": a, "b_seen": b}) for _ in range(steps)]


def on_new_pairs(
    name: str, settings: Settings, cohort: PreparedCohort, steps: int, lr: float
) -> tuple[GVSL, list[dict[str, float]]]:
    """Train as GVSL's pretraining does, views and all."""
    method, optimizer = new_method(name, settings, lr)
    items = method.items_per_step(settings.pretrain.crop, settings.pretrain.batch_size)
    source = CropSource(cohort, settings.pretrain.crop, items, 2, 0)
    curve = []
    for number, batch in enumerate(source.batches(0, steps, 0)):
        views = method.views(batch.x, BatchRng(0, number, batch.items, CPU, ("views",), batch.volumes))
        curve.append(step(method, optimizer, views))
    return method, curve


Pair = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def held_back(method: GVSL, pairs: list[Pair]) -> tuple[list[dict[str, float]], float]:
    """Return the scores of labelled pairs ((image, label), (image, label)) and the spread of psi^g over them."""
    found = torch.cat([matrices(method.eval(), moving[0], fixed[0]) for moving, fixed in pairs])  # (N, 3, 4)
    scores = [
        score(affine_coords(matrix[None], moving[0].shape[2:]), moving, fixed)
        for matrix, (moving, fixed) in zip(found, pairs, strict=True)
    ]
    return scores, float(found.std(0).mean())


def mean(rows: list[dict[str, float]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--methods", nargs="+", default=["gvsl", "gvsl_released_head"])
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--fixed-steps", type=int, default=160)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--cache", type=Path, help="folder of phantoms and prepared volumes")
    parser.add_argument("--out", type=Path, default=RESULTS / "affine.json")
    args = parser.parse_args()
    settings = load_settings(args.preset, args.overrides, registry().methods.names())
    edges = settings.pretrain.crop
    unlabelled = pretraining_cohort("phantoms", settings, args.cache)
    labelled = task_cohort(registry().tasks.get("shc").load(), None, settings, args.cache)

    def load(case: int) -> tuple[Tensor, Tensor]:
        image, label = (central(np.array(v), edges) for v in (labelled.image(case), labelled.label(case)))
        return image, label

    pairs = [(load(i), load(j)) for i, j in labelled_pairs(labelled, args.pairs)]
    before = [score(identity_coords(edges, fixed[0]), moving, fixed) for moving, fixed in pairs]
    best = [
        score(affine_coords(best_affine(moving[0], fixed[0]), edges), moving, fixed)
        for moving, fixed in pairs
    ]
    for name, rows in (("not aligned", before), ("best affine", best)):
        print(
            f"{name}: NCC {mean(rows, 'ncc'):.3f}, label Dice {100 * mean(rows, 'dice'):.1f} % ({len(pairs)} pairs)",
            flush=True,
        )
    heads = {}
    for name in args.methods:
        fixed_pairs = on_fixed_pairs(name, settings, unlabelled, args.fixed_steps, args.lr)
        method, new_pairs = on_new_pairs(name, settings, unlabelled, args.steps, args.lr)
        scores, spread = held_back(method, pairs)
        heads[name] = {
            "fixed pairs": fixed_pairs,
            "new pairs": new_pairs,
            "held back": scores,
            "spread": spread,
        }
        last = fixed_pairs[-(len(fixed_pairs) // 8) :]
        print(
            f"{name}: held back NCC {mean(scores, 'ncc'):.3f}, label Dice {100 * mean(scores, 'dice'):.1f} %, spread of "
            f"psi^g {spread:.4f} after {args.steps} steps; four fixed pairs: gain in NCC {mean(last, 'gain'):+.3f}, "
            f"spread {mean(last, 'spread'):.4f} (last eighth of {len(fixed_pairs)} steps)",
            flush=True,
        )
    record = {"preset": args.preset, "overrides": args.overrides, "lr": args.lr, "not aligned": before,
              "best affine": best, "heads": heads, "environment": environment()}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
