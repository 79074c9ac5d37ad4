"""Findings: what is wrong with a file, and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssl3d.errors import DataError, count, printable
from ssl3d.remedies import Fix

MAX_BYTES = 4 * 2**30
"""Largest volume that is read by default, in bytes as float32."""


@dataclass(frozen=True, order=True)
class Finding:
    """One problem of one file.

    Attributes:
        path: the file.
        problem: what is wrong, completing "<path> ...".
        fix: what to do about it; made by a remedy, whose promise is tested.
    """

    path: Path
    problem: str
    fix: Fix

    def of_layout(self, layout: str) -> Finding:
        """Return the finding with a remedy for files that are read with ``layout``."""
        return replace(self, fix=self.fix.of_layout(layout))

    def __str__(self) -> str:
        return printable(f"{self.path} {self.problem}. Fix: {self.fix}.")


def raise_findings(findings: Sequence[Finding], limit: int | None = 20) -> None:
    """Raise one error that lists every bad file; return if there is none.

    Args:
        findings: in any order; duplicates are listed once.
        limit: findings described in full; the files of the others are still named. None: all.

    Raises:
        DataError: if there is a finding.
    """
    unique = list(dict.fromkeys(findings))
    if not unique:
        return
    files = len({finding.path for finding in unique})
    shown = unique if limit is None else unique[:limit]
    lines = [f"{count(len(unique), 'problem')} in {count(files, 'file')}:"]
    lines += [f"  {finding}" for finding in shown]
    rest = list(dict.fromkeys(str(finding.path) for finding in unique[len(shown) :]))
    if rest:
        lines += [f"  and {len(unique) - len(shown)} more, in:", *(f"    {path}" for path in rest)]
    raise DataError("\n".join(lines))
