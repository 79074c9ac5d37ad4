"""Does GVSL's matching work? NCC and label overlap between phantom hearts, before and after.

Pretrains GVSL on the unlabelled phantom cohort (or takes a finished run), then matches pairs of
LABELLED hearts of other patients, which it has never seen: the moving volume and its label map are
warped onto the fixed ones. Reported, as means over pairs:

    not aligned     the pairs as they lie after preparation
    not trained     warped by the head at its random start
    affine only     warped by the trained psi^g alone
    GVSL            warped by psi^g(p + psi^l(p))

Usage: ``python benchmarks/matching.py [--preset quick] [--set pretrain.steps=1000] [--seed 0]``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ssl3d_methods.gvsl import GVSL, Matching
from torch import Tensor

from ssl3d.config import load_settings
from ssl3d.data.prepare import PreparedCohort
from ssl3d.data.sources import pretraining_cohort, task_cohort
from ssl3d.downstream.metrics import dice_per_structure
from ssl3d.environment import environment, select_device
from ssl3d.losses import ncc_loss
from ssl3d.models.checkpoint import RUN, load_state
from ssl3d.models.spatial import affine_coords, identity_coords, jacobian_determinant, warp
from ssl3d.optim import make_optimizer
from ssl3d.plugins import registry
from ssl3d.pretrain.loop import build_method, pretrain
from ssl3d.pretrain.method import resolve_method
from ssl3d.rng import numpy_rng

RESULTS = Path(__file__).parent / "results"


def central(volume: np.ndarray, edges: Sequence[int]) -> Tensor:
    """Return the central box of ``volume`` (D, H, W), zeros where it is smaller: (1, 1, *edges)."""
    out = np.zeros(tuple(edges), np.float32)
    source, target = [], []
    for have, want in zip(volume.shape, edges, strict=True):
        n = min(have, want)
        source.append(slice((have - n) // 2, (have - n) // 2 + n))
        target.append(slice((want - n) // 2, (want - n) // 2 + n))
    out[tuple(target)] = volume[tuple(source)]
    return torch.from_numpy(out)[None, None]


def draw_pairs(cohort: PreparedCohort, count: int) -> list[tuple[int, int]]:
    """Return ``count`` ordered pairs of labelled cases of different patients; always the same ones."""
    labelled = [i for i, case in enumerate(cohort.cases) if case.has_label]
    pairs = [(i, j) for i in labelled for j in labelled if cohort.cases[i].subject != cohort.cases[j].subject]
    chosen = numpy_rng(0, "matching pairs").permutation(len(pairs))[:count]
    return [pairs[k] for k in chosen]


@torch.no_grad()
def score(coords: Tensor, moving: tuple[Tensor, Tensor], fixed: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return NCC, mean Dice over structures and the share of folded voxels of one map.

    Args:
        coords: sampling positions (1, 3, D, H, W).
        moving, fixed: (image, label), (1, 1, D, H, W) each.
    """
    label = warp(moving[1], coords, mode="nearest").round().long()[0, 0]
    truth = fixed[1].long()[0, 0]
    classes = int(max(label.max(), truth.max())) + 1
    return {
        "ncc": 1 - float(ncc_loss(warp(moving[0], coords), fixed[0])),
        "dice": float(dice_per_structure(label, truth, classes).nanmean()),
        "folded": float((jacobian_determinant(coords) <= 0).float().mean()),
    }


@torch.no_grad()
def evaluate(
    trained: GVSL, untrained: GVSL, cohort: PreparedCohort, pairs: list[tuple[int, int]], edges: Sequence[int]
) -> dict[str, list[dict[str, float]]]:
    """Return the scores of every pair, by row of the table."""
    device = next(trained.parameters()).device

    def load(case: int) -> tuple[Tensor, Tensor]:
        return tuple(central(np.array(v), edges).to(device) for v in (cohort.image(case), cohort.label(case)))  # type: ignore[return-value]

    rows: dict[str, list[dict[str, float]]] = {
        "not aligned": [],
        "not trained": [],
        "affine only": [],
        "GVSL": [],
    }
    for i, j in pairs:
        moving, fixed = load(i), load(j)
        before: Matching = untrained.match(moving[0], fixed[0])
        after: Matching = trained.match(moving[0], fixed[0])
        for name, coords in (
            ("not aligned", identity_coords(edges, fixed[0])),
            ("not trained", before.coords),
            ("affine only", affine_coords(after.matrix, edges)),
            ("GVSL", after.coords),
        ):
            rows[name].append(score(coords, moving, fixed))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--run", type=Path, help="folder of the GVSL run; continued or made if need be")
    parser.add_argument("--cache", type=Path, help="folder of phantoms and prepared volumes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "matching.json")
    args = parser.parse_args()

    device = select_device(args.device)
    settings = load_settings(args.preset, args.overrides, registry().methods.names())
    spec = resolve_method("gvsl", settings.methods)
    run_folder = args.run or Path("runs") / f"matching-{args.preset}-seed{args.seed}"
    unlabelled = pretraining_cohort("phantoms", settings, args.cache)
    labelled = task_cohort(registry().tasks.get("shc").load(), None, settings, args.cache)
    resume = (run_folder / RUN).is_file()
    run = pretrain(spec, unlabelled, settings, args.seed, run_folder, device, resume=resume)

    methods: dict[str, Any] = {
        name: build_method(spec, settings, args.seed, device) for name in ("trained", "untrained")
    }
    load_state(run_folder, methods["trained"], make_optimizer(methods["trained"], settings.pretrain)[0])
    pairs = draw_pairs(labelled, args.pairs)
    rows = evaluate(methods["trained"], methods["untrained"], labelled, pairs, settings.pretrain.crop)

    print(
        f"GVSL, preset {args.preset}, seed {args.seed}, {run['steps']} steps in {run['seconds']:.0f} s; "
        f"{len(pairs)} pairs of unseen hearts"
    )
    print(f"{'':12}  {'NCC':>14}  {'label Dice %':>14}  {'folded %':>8}  better Dice than not aligned")
    reference = np.array([s["dice"] for s in rows["not aligned"]])
    for name, scores in rows.items():
        ncc, dice, folded = (np.array([s[k] for s in scores]) for k in ("ncc", "dice", "folded"))
        print(
            f"{name:12}  {ncc.mean():6.3f} +- {ncc.std():5.3f}  "
            f"{100 * dice.mean():6.1f} +- {100 * dice.std():5.1f}  "
            f"{100 * folded.mean():8.3f}  {int((dice > reference).sum())} of {len(pairs)}"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "preset": args.preset,
        "overrides": args.overrides,
        "seed": args.seed,
        "steps": run["steps"],
        "seconds": run["seconds"],
        "weights": run["weights_sha256"],
        "environment": environment(),
        "pairs": [[labelled.cases[i].id, labelled.cases[j].id] for i, j in pairs],
        "scores": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
