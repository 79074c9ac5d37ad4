"""How soon a method's validation curve reaches what scratch reaches at best."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssl3d.results.table import Cell


def mean_curve(cell: Cell) -> list[tuple[int, float]]:
    """Return (step, validation score in percent) of a cell, averaged over its seeds and folds.

    Only steps that every record of the cell has validated are kept. Empty for a mode without
    training, such as k-NN.
    """
    curves = [{p["step"]: p["score"] for p in record.get("validation") or ()} for record in cell.records]
    if not curves:
        return []
    common = set.intersection(*(set(curve) for curve in curves))
    return [(int(step), fmean(curve[step] for curve in curves)) for step in sorted(common)]


def steps_to_reach(cell: Cell, reference: Cell) -> int | None:
    """Return the first step at which ``cell`` is at least as good as ``reference`` ever is, by validation.

    Both curves are means over seeds and folds. None when it never is, or a curve is missing. The
    figure is as fine as the validation: its step is a multiple of ``validate_every``. The saving of
    He et al., CVPR 2023, figure 6, is ``1 - steps_to_reach(gvsl, scratch) / steps_to_reach(scratch, scratch)``.
    """
    target = max((score for _, score in mean_curve(reference)), default=None)
    if target is None:
        return None
    return next((step for step, score in mean_curve(cell) if score >= target), None)
