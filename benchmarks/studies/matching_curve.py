"""How does GVSL's matching grow with its training? NCC, label Dice and spread of psi^g at every state that a run keeps.

``run.py`` pretrains and scores the arms of a study (``levers/matching.yaml``); this reads the heads of those runs and
matches the labelled hearts of ``matching.py``, which they have never seen.

Usage: ``python benchmarks/studies/matching_curve.py STUDY.yaml --store STORE [--out JSON]``; ``--show JSON`` prints kept
figures, ``--draw PNG`` draws them. What JSON has of the same weights is not measured again, and arms whose run is not in the
store keep what JSON has of the same settings, data and code; arms that have neither are left out, and named.
``--scores CSV``, that of ``run.py``, puts the downstream scores of these weights beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure import COLOURS, save
from matching import RESULTS, labelled_pairs, one_matrix, run_in, scores_of_matrix, spread
from run import Study, load_study, settings_of

from ssl3d.bench.sources import pretraining_cohort, task_cohort
from ssl3d.config import Settings, load_settings
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.device import select_device
from ssl3d.downstream.features.matching import (
    AFFINE_ONLY,
    PREDICTED,
    evaluate_matching,
    matching_means,
)
from ssl3d.environment import environment
from ssl3d.errors import SSL3DError
from ssl3d.geometry import identity_matrix
from ssl3d.models.weights.checkpoint import State, load_tensors, read_run
from ssl3d.pretrain.loop import build_method, pretrain_identity
from ssl3d.pretrain.spec import MethodSpec, resolve_method
from ssl3d.registry.registry import registry
from ssl3d.results.store.record import canonical_json
from ssl3d.source_hash import pretraining_code

METHOD = "gvsl"


def states(folder: Path) -> dict[int, Path]:
    """Return the states that a run keeps, by step."""
    return {
        int(path.stem.removeprefix("state-")): path for path in sorted(folder.glob("state-*.safetensors"))
    }


@dataclass(frozen=True)
class Hearts:
    """The labelled pairs that are matched, all in the central box of ``edges`` voxels."""

    cohort: PreparedCohort
    pairs: list[tuple[int, int]]
    edges: Sequence[int]

    def reference(self) -> dict[str, dict[str, float]]:
        """Return the means of the pairs as they lie, and warped by the one matrix that is best for all."""
        best = one_matrix(self.cohort, self.pairs, self.edges)
        matrices = {"not aligned": identity_matrix(1, best), "one matrix": best}
        return matching_means({
            name: scores_of_matrix(matrix, self.cohort, self.pairs, self.edges) for name, matrix in matrices.items()
        })  # fmt: skip


def curve(folder: Path, settings: Settings, seed: int, hearts: Hearts) -> list[dict[str, Any]]:
    """Return, at each kept step from 0, the means over pairs by the affine part and the whole map, and psi^g's spread."""
    spec, device = resolve_method(METHOD, settings.methods), select_device("auto")
    found = []
    for step, path in {0: None, **states(folder)}.items():
        method = build_method(spec, settings, seed, device).eval()
        if path is not None:
            State(path, step, None, {}, load_tensors(path)).load(method)
        means = matching_means(
            evaluate_matching(method, hearts.cohort, hearts.pairs, hearts.edges, device)  # type: ignore[arg-type]
        )
        width = spread(method, hearts.cohort, hearts.pairs, hearts.edges)
        found.append({"step": step, "affine": means[AFFINE_ONLY], "whole": means[PREDICTED], "spread": width})
        print(f"  {step}: {found[-1]}", file=sys.stderr, flush=True)
    return found


def named(arm: str, seed: int | str) -> str:
    """Return the name of an arm's run with one seed."""
    return f"{arm}, seed {seed}"


@dataclass
class Kept:
    """What is known of the arms: by ``arm, seed 0`` where it was measured, with which weights, from which pretraining.

    Attributes:
        arms: the curves, by arm and seed.
        weights: hash of each run's last weights.
        pretrainings: :func:`pretraining` of each.
        environments: the machine that measured it.
    """

    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    pretrainings: dict[str, str] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def known(self, arm: str, seed: int, weights: str | None, of: str) -> list[dict[str, Any]] | None:
        """Return the curve of these weights, or without weights of this pretraining; None where there is none."""
        key = named(arm, seed)
        same = self.pretrainings.get(key) == of if weights is None else self.weights.get(key) == weights
        return self.arms.get(arm, {}).get(str(seed)) if same else None

    def add(self, arm: str, seed: int, points: list[dict[str, Any]], *of: Any) -> None:
        """Add a curve with its weights, its pretraining, and the machine that measured it."""
        key = named(arm, seed)
        self.arms.setdefault(arm, {})[str(seed)] = points
        self.weights[key], self.pretrainings[key], self.environments[key] = of


def pretraining(spec: MethodSpec, settings: Settings, identity: dict[str, Any]) -> str:
    """Return a hash of settings, data, seed and code of a pretraining."""
    code = pretraining_code(spec.cls, settings.backbone.name)
    return hashlib.sha256(canonical_json({"identity": identity, "code": code}).encode()).hexdigest()


def measured(
    study: Study, store: Path, cache: Path | None, count: int, before: dict[str, Any], scores: Path | None
) -> dict[str, Any]:
    """Return the curve of every arm and seed of ``study`` that has a finished run in ``store``, or had one before.

    Args:
        study: its arms are the values of its lever.
        store: where run.py keeps its runs.
        cache: folder of phantoms and prepared volumes.
        count: pairs.
        before: what an earlier call returned; what it has of the same weights and pairs is not measured again.
        scores: the CSV of ``run.py`` with the downstream scores of the runs in ``store``.

    Raises:
        SSL3DError: no arm has a finished run, or something that was measured before would be lost.
        ValueError: ``scores`` lacks a column.
    """
    plain = load_settings(study.preset, study.set, registry().methods.names())
    unlabelled = pretraining_cohort("phantoms", plain, cache)
    labelled = task_cohort(registry().tasks.get("shc").load(), None, plain, cache)
    hearts = Hearts(labelled, labelled_pairs(labelled, count), plain.pretrain.crop)
    same = before.get("cohort") == labelled.fingerprint and before.get("pairs") == count
    earlier = Kept(**{part.name: before.get(part.name, {}) for part in fields(Kept)}) if same else Kept()
    now, here = Kept(), []
    for arm, overrides in (study.lever.values if study.lever else {"": []}).items():
        settings = settings_of(study, overrides).for_method(METHOD)
        spec = resolve_method(METHOD, settings.methods)
        for seed in study.seeds:
            identity = pretrain_identity(spec, settings, unlabelled.fingerprint, seed)
            key, of = named(arm, seed), pretraining(spec, settings, identity)
            folder = run_in(store, identity, METHOD)
            weights = read_run(folder)["weights_sha256"] if folder else None
            known = earlier.known(arm, seed, weights, of)
            if folder is not None:
                here.append((arm, str(seed)))
            else:
                fate = "left out" if known is None else "what was measured before is kept"
                print(f"{key}: no finished run in {store}; {fate}.", file=sys.stderr)
            if known is not None:
                now.add(arm, seed, known, earlier.weights.get(key), of, earlier.environments.get(key))
            elif folder is not None:
                now.add(arm, seed, curve(folder, settings, seed, hearts), weights, of, environment())
    if not now.arms:
        raise SSL3DError(f"{store} has no finished run of this study: run run.py on it first.")
    if scores:
        with_scores({(arm, seed): now.arms[arm][seed] for arm, seed in here}, scores)
    _nothing_lost(before.get("arms", {}), now.arms)
    return {
        "question": study.question,
        "cohort": labelled.fingerprint,
        "pairs": count,
        "reference": before["reference"] if same and "reference" in before else hearts.reference(),
        **asdict(now),
    }


def _nothing_lost(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> None:
    """Raise SSL3DError where an arm and seed that was measured before is not there now."""
    lost = [named(arm, seed) for arm in before for seed in before[arm] if seed not in now.get(arm, {})]
    if lost:
        raise SSL3DError(
            f"{'; '.join(lost)}: measured before, on other pairs, from another pretraining or by another study, and its run "
            "is not in the store. To keep it, write to another file: --out."
        )


def with_scores(curves: dict[tuple[str, str], list[dict[str, Any]]], path: Path) -> None:
    """Add the scores of the CSV of ``run.py``, mode by mode, to the points of arms, seeds and steps that have some.

    Args:
        curves: by arm and seed.
        path: the CSV.

    Raises:
        ValueError: the file lacks a column.
    """
    frame = pd.read_csv(path, keep_default_na=False)
    for row in frame.to_dict("records"):
        try:
            arm, seed, step, mode, score = (row[key] for key in ("value", "seed", "step", "mode", "score"))
        except KeyError as error:
            raise ValueError(f"{path}: column {error} is missing: give the CSV of run.py") from None
        for point in curves.get((arm, str(seed)), []):
            if point["step"] == step:
                point.setdefault("scores", {})[mode] = float(score)


def mean_at(seeds: dict[str, list[dict[str, Any]]], place: int, *keys: str) -> float:
    """Return the mean over seeds of a figure at one place of the curves."""

    def of(point: Any) -> float:
        for key in keys:
            point = point[key]
        return float(point)

    return float(np.mean([of(points[place]) for points in seeds.values()]))


def scored(seeds: dict[str, list[dict[str, Any]]], place: int, mode: str) -> bool:
    """Return whether every seed has a score of this evaluation at one place of the curves."""
    return all(mode in points[place].get("scores", {}) for points in seeds.values())


def scored_modes(kept: dict[str, Any]) -> list[str]:
    """Return the evaluations that some points have scores of."""
    points = [point for seeds in kept["arms"].values() for points in seeds.values() for point in points]
    return sorted({mode for point in points for mode in point.get("scores", {})})


def markdown(kept: dict[str, Any], steps: Collection[int]) -> str:
    """Return a row for each arm and step; empty ``steps``: all that were kept."""
    modes = scored_modes(kept)
    head = ["steps", "NCC, affine only", "label Dice", "spread of psi^g", "NCC, GVSL", "label Dice", "folded"]
    lines = [
        f"| arm | {' | '.join([*head, *(f'{mode} SHC' for mode in modes)])} |",
        "|:--|" + "--:|" * (len(head) + len(modes)),
    ]
    for name, scores in kept["reference"].items():
        empty = " |" * (4 + len(modes))
        lines.append(f"| {name} | | {scores['ncc']:.3f} | {100 * scores['dice']:.1f} |{empty}")
    for arm, seeds in kept["arms"].items():
        for place, point in enumerate(next(iter(seeds.values()))):
            if steps and point["step"] not in steps:
                continue
            at = partial(mean_at, seeds, place)
            lines.append(
                f"| {arm} | {point['step']:,} | {at('affine', 'ncc'):.3f} | {100 * at('affine', 'dice'):.1f} "
                f"| {at('spread'):.4f} | {at('whole', 'ncc'):.3f} | {100 * at('whole', 'dice'):.1f} "
                f"| {100 * at('whole', 'folded'):.2f} |"
                + "".join(f" {at('scores', m):.1f} |" if scored(seeds, place, m) else " |" for m in modes)
            )
    of_seeds = sorted({seed for seeds in kept["arms"].values() for seed in seeds}, key=int)
    lines += [
        "",
        f"Means over {kept['pairs']} pairs; seeds {', '.join(of_seeds)}. Dice and folded voxels in percent.",
    ]
    return "\n".join(lines)


def draw(kept: dict[str, Any], path: Path) -> None:
    """Draw NCC, label Dice, spread and scores over the steps: whole lines for GVSL, dashed for its affine part alone."""
    panels: list[tuple[str, float, list[tuple[str, ...]]]] = [
        ("NCC", 1, [("whole", "ncc"), ("affine", "ncc")]),
        ("label Dice (%)", 100, [("whole", "dice"), ("affine", "dice")]),
        ("spread of psi^g", 1, [("spread",)]),
        *((f"{mode} SHC (%)", 1.0, [("scores", mode)]) for mode in scored_modes(kept)),
    ]
    rows = math.ceil(len(panels) / 3)  # a page is no wider than three panels that can be read
    figure, grid = plt.subplots(rows, 3, figsize=(10, 2.8 * rows + 0.8), layout="constrained", squeeze=False)
    axes = list(grid.ravel())
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, unit, lines) in zip(axes, panels, strict=False):
        for colour, (arm, seeds) in zip(COLOURS, kept["arms"].items(), strict=False):
            points = list(enumerate(next(iter(seeds.values()))))
            for keys, style in zip(lines, ("-", "--"), strict=False):
                places = [
                    place for place, _ in points if keys[0] != "scores" or scored(seeds, place, keys[1])
                ]
                steps = [points[place][1]["step"] for place in places]
                values = [unit * mean_at(seeds, place, *keys) for place in places]
                axis.plot(steps, values, style, color=colour, marker=".", label=arm if style == "-" else None)
        for (name, scores), style in zip(kept["reference"].items(), (":", "-."), strict=True):
            if len(lines) == 2:
                level = unit * scores[lines[0][1]]
                axis.axhline(level, color="0.35", linestyle=style, linewidth=1, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("pretraining steps", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(axes) > len(panels):
        axes[-1].legend(handles, labels, loc="center", fontsize=8, frameon=False)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("GVSL (whole lines) and its affine part alone (dashed) on held-back pairs", fontsize=10)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("study", type=Path, nargs="?", help="the YAML that run.py was given")
    parser.add_argument("--store", type=Path, help="the store that run.py was given")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--cache", type=Path, help="folder of phantoms and prepared volumes")
    parser.add_argument("--scores", type=Path, metavar="CSV", help="downstream scores of the same runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "matching-curve.json")
    parser.add_argument("--show", type=Path, help="print the figures kept there, and measure nothing")
    parser.add_argument("--steps", type=int, nargs="+", default=(), help="print these steps alone")
    parser.add_argument("--draw", type=Path, metavar="PNG")
    args = parser.parse_args()
    try:
        if args.show is None:
            if args.study is None or args.store is None:
                parser.error("give STUDY.yaml and --store, or --show JSON")
            before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
            study = load_study(args.study)
            found = measured(study, args.store, args.cache, args.pairs, before, args.scores)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        kept = json.loads((args.show or args.out).read_text(encoding="utf-8"))
    except (SSL3DError, OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    print(markdown(kept, args.steps))
    if args.draw:
        draw(kept, args.draw)


if __name__ == "__main__":
    main()
