"""Is every pretext task learned? Its score on held-back volumes before and after pretraining, beside chance.

Chance is the score of an output that ignores its input (`Method.chance`): the cross-entropy of equal
probabilities, the error of the mean image, or 1 where the score is a ratio to unmatched pairs. A row is
learned when it ends clearly below chance and below where it started (`ssl3d.pretrain.pretext`).

Usage: ``python benchmarks/studies/pretext.py [--preset quick] [--methods rotation simclr] [--seed 0] [--set KEY=VALUE]``
Interrupted runs go on; finished ones below --runs are read, not repeated. ``--json FILE`` keeps the figures of these
rows, ``--show FILE`` prints kept ones as Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ssl3d.bench.sources import pretraining_cohort
from ssl3d.config import load_settings
from ssl3d.device import select_device
from ssl3d.environment import environment
from ssl3d.models.weights.checkpoint import RUN
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.spec import resolve_method
from ssl3d.registry.registry import registry

COLUMNS = "{:26} {:>8} {:>8} {:>8}  {:8} {:>12} {:>8}"


def rows() -> list[str]:
    """Return the methods that pretrain something, variants left out."""
    names = [entry.name for entry in registry().methods if not entry.base]
    return [name for name in names if resolve_method(name, {}).cls.trains != "none"]


def run(name: str, o: argparse.Namespace) -> dict[str, Any]:
    """Pretrain ``name``, or read the run that is there, and return its ``run.json``."""
    names = registry().methods.names()
    settings = load_settings(o.preset, o.overrides, names)
    cohort = pretraining_cohort("phantoms", settings, o.cache)
    folder = o.runs / f"{name}-{o.preset}-seed{o.seed}"
    return pretrain(
        resolve_method(name, settings.methods), cohort, settings.for_method(name), o.seed, folder,
        select_device("auto"), resume=(folder / RUN).is_file(),
    )  # fmt: skip


def keep(path: Path, preset: str, seed: int, found: dict[str, dict[str, Any]]) -> None:
    """Write the figures of the rows ``found`` to ``path``, over what it holds for the same rows."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}
    for name, r in found.items():
        figures = {k: r[k] for k in ("pretext", "voxels_seen", "seconds", "title", "code", "identity")}
        kept["rows"][name] = {**figures, "lr": r["identity"]["pretrain"]["budget"]["lr"]}
    kept |= {"preset": preset, "seed": seed, "environment": environment()}
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def markdown(path: Path) -> str:
    """Return the kept figures as a table."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| row | learning rate | chance | before | after | learned |", "|---|--:|--:|--:|--:|---|"]
    for _, r in sorted(kept["rows"].items()):
        p = r["pretext"]
        chance, learned = (
            "-" if p["chance"] is None else f"{p['chance']:.4f}",
            {True: "yes", False: "no", None: "nothing to learn"}[p["learned"]],
        )
        lines.append(
            f"| {r['title']} | {r['lr']:g} | {chance} | {p['start']:.4f} | {p['end']:.4f} | {learned} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--methods", nargs="+", default=rows())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs/pretext"))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", type=Path, help="Keep the figures there, too.")
    parser.add_argument("--show", type=Path, help="Print the figures kept there, and pretrain nothing.")
    o = parser.parse_args()
    if o.show:
        print(markdown(o.show))
        return
    found = {}
    print(COLUMNS.format("method", "chance", "start", "end", "learned", "voxels", "seconds"))
    for name in o.methods:
        r = found[name] = run(name, o)
        p = r["pretext"]
        chance = "-" if p["chance"] is None else f"{p['chance']:.4f}"
        learned = "-" if p["learned"] is None else "yes" if p["learned"] else "NO"
        print(COLUMNS.format(name, chance, f"{p['start']:.4f}", f"{p['end']:.4f}", learned, r["voxels_seen"],
                             f"{r['seconds']:.0f}"), flush=True)  # fmt: skip
    if o.json:
        keep(o.json, o.preset, o.seed, found)


if __name__ == "__main__":
    main()
