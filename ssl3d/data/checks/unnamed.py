"""Labels whose values nothing names: said once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl3d.data.checks.file import read_checked
from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.findings import Finding
from ssl3d.data.files.volume_file import VolumeFile
from ssl3d.errors import count
from ssl3d.remedies import NAME_VALUES

LOOKED_AT = 3
"""Label files that are read to say which values there are."""
NAMED = 20


def unnamed_labels(root: Path, cases: Sequence[Case], dataset: Dataset) -> Finding | None:
    """Return the finding that cases have labels, and neither the data nor the user says what their values mean.

    Layouts such as CSV and BIDS leave that open. Without it each label file would be a finding of its own.

    Args:
        root: what the user named.
        cases: the cases.
        dataset: the adapter, opened, with what the user says.
    """
    labelled = [case.label for case in cases if case.label is not None]
    if not labelled or set(dataset.label_index()) != {0}:
        return None
    values: set[int] = set()
    for path in labelled[:LOOKED_AT]:
        _, volume = read_checked(VolumeFile(path), integers=True)
        values |= set() if volume is None else set(np.unique(volume.data).tolist())
    values.discard(0)
    shown = sorted(values)[:NAMED] or [1]
    seen = f" (there are {', '.join(map(str, shown))}{', ...' * (len(values) > NAMED)})" if values else ""
    said = ",".join(f"{value}=structure{value}" for value in shown)
    problem = f"has {count(len(labelled), 'label file')}, and nothing says what their values mean{seen}"
    return Finding(Path(root), problem, NAME_VALUES(values=said))
