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
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.config import load_settings
from ssl3d.data.prepare import PreparedCohort
from ssl3d.data.sources import pretraining_cohort, task_cohort
from ssl3d.downstream.matching import AFFINE_ONLY, NOT_ALIGNED, PREDICTED, evaluate_matching
from ssl3d.downstream.representation import draw_pairs
from ssl3d.environment import environment, select_device
from ssl3d.models.checkpoint import RUN, load_method
from ssl3d.plugins import registry
from ssl3d.pretrain.loop import build_method, pretrain
from ssl3d.pretrain.method import resolve_method

RESULTS = Path(__file__).parent / "results"


def labelled_pairs(cohort: PreparedCohort, count: int) -> list[tuple[int, int]]:
    """Return ``count`` ordered pairs of labelled cases of different patients; always the same ones."""
    labelled = [i for i, case in enumerate(cohort.cases) if case.has_label]
    pairs = draw_pairs([cohort.cases[i].subject for i in labelled], count)
    return [(labelled[i], labelled[j]) for i, j in pairs]


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
    load_method(run_folder, methods["trained"])
    pairs = labelled_pairs(labelled, args.pairs)
    found = {
        name: evaluate_matching(method, labelled, pairs, settings.pretrain.crop, device)
        for name, method in methods.items()
    }
    rows = {
        "not aligned": found["trained"][NOT_ALIGNED],
        "not trained": found["untrained"][PREDICTED],
        "affine only": found["trained"][AFFINE_ONLY],
        "GVSL": found["trained"][PREDICTED],
    }

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
