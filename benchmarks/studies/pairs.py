"""What the commands of a study compare two rows by, and how a difference is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stores import titled

from ssl3d.results.statistics.inference import holm
from ssl3d.results.table.model import Column, Comparison


@dataclass(frozen=True)
class Pair:
    """A row against a reference, both by method, in one column.

    Attributes:
        labels: share of the labels that the column's evaluations saw.
        differences: of the seeds that both rows have.
    """

    column: Column
    labels: float
    method: str
    reference: str
    comparison: Comparison
    differences: tuple[float, ...] = ()

    @property
    def title(self) -> str:
        """Title of the column, with the share of the labels."""
        return titled(self.column, self.labels)


def corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs with p values that are adjusted for all of them (Holm)."""
    adjusted = holm([pair.comparison.p for pair in pairs])
    return [
        replace(pair, comparison=replace(pair.comparison, p_holm=p))
        for pair, p in zip(pairs, adjusted, strict=True)
    ]


def written(one: Comparison, digits: int) -> str:
    """Return a difference with its interval where it has one, bold where it is significant."""
    text = f"{one.difference:+.{digits}f}"
    if math.isnan(one.low):
        return text
    return f"{f'**{text}**' if one.significant else text} [{one.low:+.{digits}f}, {one.high:+.{digits}f}]"
