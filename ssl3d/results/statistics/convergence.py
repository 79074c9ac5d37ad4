"""How soon a method's validation curve reaches what scratch reaches at best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssl3d.results.scores import sign

if TYPE_CHECKING:
    from ssl3d.results.table.model import Cell


def mean_curve(cell: Cell) -> list[tuple[int, float]]:
    """Return (step, validation score) of a cell, averaged over its seeds and folds.

    Only steps that every record of the cell has validated are kept. Empty for a mode without
    training, such as k-NN.
    """
    curves = [{p["step"]: p["score"] for p in record.get("validation") or ()} for record in cell.records]
    if not curves:
        return []
    common = set.intersection(*(set(curve) for curve in curves))
    return [(int(step), sum(curve[step] for curve in curves) / len(curves)) for step in sorted(common)]


def best_score(cell: Cell) -> float | None:
    """Return the best point of :func:`mean_curve`, the lowest for errors; None without a curve."""
    best = max if _sign(cell) > 0 else min
    return best((score for _, score in mean_curve(cell)), default=None)


def _sign(cell: Cell) -> int:
    return min((sign(record["metric"]) for record in cell.records), default=1)


def steps_to_reach(cell: Cell, target: float | None) -> int | None:
    """Return the first step at which the mean validation curve of ``cell`` is as good as ``target``.

    With the :func:`best_score` of scratch as target, this is the figure behind "converges 41 %
    faster" (He et al., CVPR 2023, figure 6): the saving is one minus its ratio to that of scratch
    itself. None when the target is never reached, or either curve is missing. The figure is as fine as
    the validation: a multiple of ``validate_every``.
    """
    if target is None:
        return None
    direction = _sign(cell)
    return next((step for step, score in mean_curve(cell) if direction * score >= direction * target), None)
