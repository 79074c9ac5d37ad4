"""Refuse test images that are among the volumes for pretraining."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ssl3d.data.checks.overlap import Overlap, find_overlap, find_twins
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.errors import DataError, are, count
from ssl3d.parallel import Progress
from ssl3d.remedies import SAY_SUBJECTS

if TYPE_CHECKING:
    from ssl3d.bench.cell import TaskData


_NEVERTHELESS = "evaluate nevertheless with --allow-overlap {} (results are marked)"
_SHOWN = 10


def _listed(heading: str, found: Sequence[str], fix: str) -> list[str]:
    """Return the lines about what was found in one task: some of it, how much more there is, and the remedy."""
    more = [f"  and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return [heading, *(f"  {line}" for line in found[:_SHOWN]), *more, f"  Fix: {fix}."]


def check_overlap(
    columns: Sequence[TaskData],
    pretraining: Mapping[str, PreparedCohort | None],
    allowed: set[str],
    progress: Progress | None = None,
) -> list[TaskData]:
    """Compare the test cases of every task with the volumes for pretraining.

    Args:
        columns: the tasks of a bench.
        pretraining: fingerprint -> the volumes for pretraining, None where they are not there.
        allowed: names of tasks that are evaluated in spite of an overlap.
        progress: told about every test image that was compared.

    Returns:
        The tasks, with the overlaps of the allowed ones.

    Raises:
        DataError: an overlap that is not allowed; lists every one, of all tasks.
    """
    marked, problems = [], []
    for column in columns:
        test = dict.fromkeys(case for split in column.splits for case in split.test)
        name, indices = column.task.name, [column.cohort.index(case) for case in test]
        overlaps = {
            fingerprint: None
            if cohort is None
            else tuple(find_overlap(column.cohort, indices, cohort, progress))
            for fingerprint, cohort in pretraining.items()
        }
        found = list(dict.fromkeys(one for some in overlaps.values() for one in some or ()))
        if found and name not in allowed:
            many = len({o.test for o in found})
            problems += _listed(
                f"{name}: {many} of {count(len(test), 'test image')} {are(many)} among the volumes for pretraining:",
                [f"{o.test} is {o.pretraining}: {o.how}" for o in found],
                f"leave these people out of pretraining (--exclude-test), or {_NEVERTHELESS.format(name)}",
            )
        marked.append(replace(column, overlaps=overlaps))
    if problems:
        raise DataError("\n".join(problems))
    return marked


def tested_volumes(
    columns: Sequence[TaskData], pretraining: PreparedCohort, progress: Progress | None = None
) -> dict[str, str]:
    """Return the volumes for pretraining that show a person who is tested in some split, folds included: id -> why.

    These are the volumes that are test images (see :func:`find_overlap`), all others of their subjects, and, where a
    task reads the same data set from the same folder, those of the same subjects.

    Args:
        columns: tasks with their splits.
        pretraining: prepared volumes for pretraining.
        progress: told about every volume that was compared.
    """
    found: dict[str, str] = {}
    for column in columns:
        cohort, name = column.cohort, column.task.name
        test = {case for split in column.splits for case in split.test}
        subjects = {case.subject for case in cohort.cases if case.id in test}
        among = [i for i, case in enumerate(cohort.cases) if case.labelled and case.subject in subjects]
        for match in find_overlap(pretraining, range(len(pretraining)), cohort, progress, among):
            found.setdefault(match.test, f"{match.pretraining} of {name}: {match.how}")
        if cohort.dataset == pretraining.dataset and _one_folder(cohort, pretraining):
            for case in pretraining.cases:
                if case.subject in subjects:
                    found.setdefault(case.id, f"subject {case.subject} of {name}")
    people = {case.subject for case in pretraining.cases if case.id in found}
    for case in pretraining.cases:
        if case.subject in people:
            found.setdefault(case.id, f"of subject {case.subject}, as a test image is")
    return {case.id: found[case.id] for case in pretraining.cases if case.id in found}


def _one_folder(one: PreparedCohort, other: PreparedCohort) -> bool:
    """Whether the images of two cohorts come from the same folder, or those of one from below that of the other."""
    mine, theirs = (
        Path(os.path.commonpath([case.source.parent for case in cohort.cases])) for cohort in (one, other)
    )
    return mine == theirs or mine in theirs.parents or theirs in mine.parents


def check_within(
    columns: Sequence[TaskData], allowed: set[str], progress: Progress | None = None
) -> list[TaskData]:
    """Look for scans that a split puts into the test and into the training or validation part, as two subjects.

    Args:
        columns: tasks with their splits.
        allowed: names of tasks that are evaluated in spite of that.
        progress: told about every image that was compared.

    Returns:
        The tasks, with the pairs of the allowed ones.

    Raises:
        DataError: a pair that is not allowed; lists every one, of all tasks.
    """
    marked, problems = [], []
    for column in columns:
        name, pairs = column.task.name, find_twins(column.cohort, progress)
        found: dict[Overlap, str] = {}
        for split in column.splits:
            part = {case: part for part in ("train", "val", "test") for case in getattr(split, part)}
            for pair in pairs:
                one, other = part.get(pair.test), part.get(pair.pretraining)
                if one is None or other is None or (one == "test") == (other == "test"):
                    continue
                ordered = pair if one == "test" else Overlap(pair.pretraining, pair.test, pair.how)
                found.setdefault(ordered, f"{ordered.test} for test and {ordered.pretraining} for "
                                          f"{other if one == 'test' else one} in {split.name}: {pair.how}")  # fmt: skip
        if found and name not in allowed:
            problems += _listed(
                f"{name}: {count(len(found), 'scan')} would be in two parts under two subjects:",
                list(found.values()),
                f"keep one image of each pair, or give both the same subject ({SAY_SUBJECTS.format('REGEX')}, or the "
                f"column subject of a CSV), or {_NEVERTHELESS.format(name)}",
            )
        marked.append(replace(column, twins=tuple(found)))
    if problems:
        raise DataError("\n".join(problems))
    return marked
