"""Does GVSL's matching work? NCC and label overlap between phantom hearts, before and after.

Pretrains GVSL on the unlabelled phantom cohort (or takes a finished run), then matches pairs of
LABELLED hearts of other patients, which it has never seen: the moving volume and its label map are
warped onto the fixed ones. Reported, as means over pairs:

    not aligned     the pairs as they lie after preparation
    not trained     warped by the head at its random start
    one matrix      warped by the one affine map that is best for these very pairs together: as far as a
                    head gets that answers them all alike
    affine only     warped by the trained psi^g alone
    GVSL            warped by psi^g(p + psi^l(p))

The spread of psi^g over pairs is the standard deviation of its entries, 0 for a head that answers alike.

Usage: ``python benchmarks/studies/matching.py [--preset quick] [--method gvsl_released_head] [--set KEY=VALUE]``;
``--store STORE`` takes the runs that a bench has pretrained there, and pretrains those it lacks; ``--show FILE`` prints the
figures that a call has kept (``--out``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from stores import finished_runs
from torch import Tensor

from ssl3d.bench.sources import pretraining_cohort, task_cohort
from ssl3d.config import Settings, load_settings
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.device import select_device
from ssl3d.downstream.features.matching import (
    AFFINE_ONLY,
    NOT_ALIGNED,
    PREDICTED,
    central,
    evaluate_matching,
    score,
)
from ssl3d.downstream.features.measures import draw_pairs
from ssl3d.environment import environment
from ssl3d.errors import SSL3DError
from ssl3d.geometry import affine_coords, affine_matrix, warp
from ssl3d.losses import ncc_loss
from ssl3d.models.weights.checkpoint import RUN, load_method
from ssl3d.pretrain.loop import build_method, pretrain, pretrain_identity
from ssl3d.pretrain.spec import resolve_method
from ssl3d.registry.registry import registry

RESULTS = Path(__file__).parent / "results"


def run_in(store: Path, identity: dict[str, Any], name: str) -> Path | None:
    """Return the folder of the finished run of this identity that a bench has in ``store``; None where there is none."""
    found = (
        folder
        for folder, run in finished_runs(store, f"{name}-s{identity['seed']}-*")
        if run["identity"] == identity
    )
    return next(found, None)


def labelled_pairs(cohort: PreparedCohort, count: int) -> list[tuple[int, int]]:
    """Return ``count`` ordered pairs of labelled cases of different patients; always the same ones."""
    labelled = [i for i, case in enumerate(cohort.cases) if case.has_label]
    pairs = draw_pairs([cohort.cases[i].subject for i in labelled], count)
    return [(labelled[i], labelled[j]) for i, j in pairs]


def one_matrix(
    cohort: PreparedCohort, pairs: list[tuple[int, int]], edges: Sequence[int], steps: int = 60
) -> Tensor:
    """Return the matrix (1, 3, 4) with the highest mean NCC over all pairs, by Adam on its 15 values."""
    images = {i: central(np.array(cohort.image(i)), edges) for pair in pairs for i in pair}
    moving, fixed = (torch.cat([images[pair[k]] for pair in pairs]) for k in (0, 1))
    values = torch.zeros(1, 15, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.01)
    for _ in range(steps):
        rotation, scaling, shearing, translation = values.split((3, 3, 6, 3), dim=1)
        matrix = affine_matrix(rotation, 1 + scaling, shearing, translation)
        coords = affine_coords(matrix, edges).expand(len(pairs), -1, -1, -1, -1)
        optimizer.zero_grad()
        ncc_loss(warp(moving, coords), fixed).backward()
        optimizer.step()
    return matrix.detach()


@torch.no_grad()
def scores_of_matrix(
    matrix: Tensor, cohort: PreparedCohort, pairs: list[tuple[int, int]], edges: Sequence[int]
) -> list[dict[str, float]]:
    """Return the scores of every pair warped by one matrix (1, 3, 4)."""

    def load(case: int) -> tuple[Tensor, Tensor]:
        image, label = (central(np.array(v), edges) for v in (cohort.image(case), cohort.label(case)))
        return image, label

    return [score(affine_coords(matrix, edges), load(i), load(j)) for i, j in pairs]


@torch.no_grad()
def spread(method: Any, cohort: PreparedCohort, pairs: list[tuple[int, int]], edges: Sequence[int]) -> float:
    """Return the standard deviation over pairs of the entries of psi^g, their mean."""
    device = next(method.parameters()).device
    matrices = [
        method.match(*(central(np.array(cohort.image(i)), edges).to(device) for i in pair)).matrix
        for pair in pairs
    ]
    return float(torch.cat(matrices).std(0).mean())


@dataclass(frozen=True)
class Trained:
    """GVSL after pretraining and at its start, with what the run says of itself."""

    method: Any
    start: Any
    run: dict[str, Any]
    edges: Sequence[int]
    device: torch.device


def trained(
    folder: Path, name: str, settings: Settings, seed: int, unlabelled: Any, device: torch.device
) -> Trained:
    """Pretrain in ``folder``, or go on there, and return both networks."""
    spec = resolve_method(name, settings.methods)
    settings = settings.for_method(name)
    run = pretrain(spec, unlabelled, settings, seed, folder, device, resume=(folder / RUN).is_file())
    method, start = (build_method(spec, settings, seed, device) for _ in range(2))
    load_method(folder, method)
    return Trained(method, start, run, settings.pretrain.crop, device)


def match_with(
    gvsl: Trained, labelled: PreparedCohort, pairs: list[tuple[int, int]], single: list[dict[str, float]]
) -> dict[str, Any]:
    """Return the scores of every pair by every way of warping, and the spreads of psi^g; ``single``: by one matrix."""
    found, start = (
        evaluate_matching(method, labelled, pairs, gvsl.edges, gvsl.device)
        for method in (gvsl.method, gvsl.start)
    )
    return {
        "seconds": gvsl.run["seconds"],
        "weights": gvsl.run["weights_sha256"],
        "spread": {
            "trained": spread(gvsl.method, labelled, pairs, gvsl.edges),
            "untrained": spread(gvsl.start, labelled, pairs, gvsl.edges),
        },
        "scores": {
            "not aligned": found[NOT_ALIGNED],
            "not trained": start[PREDICTED],
            "one matrix": single,
            "affine only": found[AFFINE_ONLY],
            "GVSL": found[PREDICTED],
        },
    }


def gain(runs: list[dict[str, Any]], way: str, over: str, key: str) -> str:
    """Return the mean difference of two ways of warping, the seeds' own, and the 95 % interval of a t over seeds."""
    seeds = np.array(
        [
            np.mean([a[key] - b[key] for a, b in zip(r["scores"][way], r["scores"][over], strict=True)])
            for r in runs
        ]
    )
    digits, unit = (4, "") if key == "ncc" else (2, " points")
    seeds = seeds * (1 if key == "ncc" else 100)
    own = ", ".join(f"{value:+.{digits}f}" for value in seeds)
    if len(seeds) < 3:
        return f"{seeds.mean():+.{digits}f}{unit} (by seed {own}; no interval with fewer than three)"
    half = float(stats.t.ppf(0.975, len(seeds) - 1) * seeds.std(ddof=1) / np.sqrt(len(seeds)))
    low, high = seeds.mean() - half, seeds.mean() + half
    return f"{seeds.mean():+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}] (by seed {own})"


def markdown(path: Path) -> str:
    """Return the kept figures as a table, with gains and the spread of the affine part below."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    runs = kept["runs"]
    lines = [
        "| warped by | NCC | label Dice, % | folded, % | pairs with a better Dice than unaligned |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in runs[0]["scores"]:
        scores = [score for run in runs for score in run["scores"][name]]
        reference = np.array([score["dice"] for run in runs for score in run["scores"]["not aligned"]])
        ncc, dice, folded = (np.array([s[k] for s in scores]) for k in ("ncc", "dice", "folded"))
        lines.append(
            f"| {name} | {ncc.mean():.3f} ± {ncc.std():.3f} | {100 * dice.mean():.1f} ± {100 * dice.std():.1f} "
            f"| {100 * folded.mean():.2f} | {int((dice > reference).sum())} of {len(dice)} |"
        )
    spreads = ", ".join(f"{run['spread']['trained']:.4f}" for run in runs)
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines += [
        "",
        f"{kept['method']}, preset {kept['preset']}, seeds {seeds}, {kept['steps']} steps; mean ± standard deviation of "
        f"{len(kept['pairs'])} pairs a seed. Spread of psi^g over the pairs: {spreads} (untrained "
        f"{runs[0]['spread']['untrained']:.4f}).",
        "",
        "Gains of the affine part, mean over pairs, 95 % interval over seeds:",
        "",
        f"- NCC, over one matrix: {gain(runs, 'affine only', 'one matrix', 'ncc')}",
        f"- NCC, over no alignment: {gain(runs, 'affine only', 'not aligned', 'ncc')}",
        f"- label Dice, over no alignment: {gain(runs, 'affine only', 'not aligned', 'dice')}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--method", default="gvsl", help="gvsl or a variant of it that matches")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of the GVSL runs; continued or made"
    )
    parser.add_argument("--store", type=Path, help="take the runs of this bench where it has them")
    parser.add_argument("--cache", type=Path, help="folder of phantoms and prepared volumes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "matching.json")
    parser.add_argument("--show", type=Path, help="print the figures kept there, and match nothing")
    args = parser.parse_args()
    try:
        run(args)
    except SSL3DError as error:
        sys.exit(f"Error: {error}")


def run(args: argparse.Namespace) -> None:
    """Match and print, or print what was kept."""
    if args.show:
        print(markdown(args.show))
        return
    device = select_device(args.device)
    settings = load_settings(args.preset, args.overrides, registry().methods.names())
    unlabelled = pretraining_cohort("phantoms", settings, args.cache)
    labelled = task_cohort(registry().tasks.get("shc").load(), None, settings, args.cache)
    pairs = labelled_pairs(labelled, args.pairs)
    best = one_matrix(labelled, pairs, settings.pretrain.crop)
    single = scores_of_matrix(best, labelled, pairs, settings.pretrain.crop)
    runs = []
    for seed in args.seeds:
        own = args.runs / f"matching-{args.method}-{args.preset}-seed{seed}"
        identity = pretrain_identity(
            resolve_method(args.method, settings.methods),
            settings.for_method(args.method),
            unlabelled.fingerprint,
            seed,
        )
        folder = (args.store and run_in(args.store, identity, args.method)) or own
        gvsl = trained(folder, args.method, settings, seed, unlabelled, device)
        runs.append({"seed": seed, **match_with(gvsl, labelled, pairs, single)})

    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "method": args.method,
        "preset": args.preset,
        "overrides": args.overrides,
        "steps": settings.pretrain.steps,
        "environment": environment(),
        "pairs": [[labelled.cases[i].id, labelled.cases[j].id] for i, j in pairs],
        "one_matrix": best[0].tolist(),
        "runs": runs,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{markdown(args.out)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
