"""The cases of a folder, and every entry that is none, named: nothing is left out without a word."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.entries import LeftOut, leads_nowhere, walk
from ssl3d.data.files.findings import Finding
from ssl3d.data.files.suffixes import image_suffix
from ssl3d.data.layouts.recognize import other_layout_named, said_to_be
from ssl3d.data.people import Guess, guess_people, subjects_of
from ssl3d.errors import PluginError, count
from ssl3d.remedies import FETCH, SAY_SUBJECTS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """The result of :func:`list_cases`.

    Attributes:
        cases: what the adapter lists, with the persons that the subject pattern says.
        left_out: entries that are not read, and nothing is wrong with that.
        findings: entries that ought to be read and are not, and counts that differ from what the data promise.
        visits: what the names of the cases look like, where nobody said who is on which image; or None.
    """

    cases: list[Case]
    left_out: list[LeftOut]
    findings: list[Finding]
    visits: Guess | None = None


def list_cases(dataset: Dataset, root: Path) -> Listing:
    """List the cases below ``root``, and everything there that looks like an image and is no part of a case.

    Warns of what is left out on purpose (one line a reason), and of names that look like several images of one person
    where each image is taken for a person of its own.

    Args:
        dataset: the adapter, opened.
        root: what the user named.

    Raises:
        DataError: the folder is of another layout, or the subject pattern does not match every case.
        PluginError: the adapter returns something else than cases.
    """
    with other_layout_named(root, dataset.name):
        cases = dataset.cases(root)
    if not isinstance(cases, list | tuple) or not all(isinstance(case, Case) for case in cases):
        own = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        raise PluginError(
            f"The dataset {dataset.name} is broken: {own}.cases() returned what is no list of cases "
            f"({type(cases).__name__}). Fix: return a list of ssl3d.Case objects: docs/plugins.md shows one."
        )
    if dataset.lists_folder and (other := said_to_be(root, dataset.name)):
        logger.warning("WARNING: %s It is read with the layout %s.", other, dataset.name)
    told = dataset.left_out(root)
    told += _unused(dataset, root, cases, told)
    visits = None
    if dataset.subject_pattern is not None:
        people = subjects_of([case.id for case in cases], dataset.subject_pattern)
        cases = [replace(case, subject=person) for case, person in zip(cases, people, strict=True)]
    elif not dataset.subjects_known:
        if all(case.subject == case.id for case in cases):
            visits = guess_people([case.id for case in cases])
        cases = _joined(cases)
    findings = [Finding(entry.path, entry.reason, entry.fix) for entry in sorted(told) if entry.fix]
    listing = Listing(cases, sorted(entry for entry in told if not entry.fix), findings, visits)
    _warn(root, listing)
    return listing


def _joined(cases: Sequence[Case]) -> list[Case]:
    """Return the cases with one subject for all that share a label file: two contrasts of one person."""
    first: dict[Path, str] = {}
    return [
        case if case.label is None else replace(case, subject=first.setdefault(case.label, case.subject))
        for case in cases
    ]


def _unused(dataset: Dataset, root: Path, cases: Sequence[Case], told: Sequence[LeftOut]) -> list[LeftOut]:
    """Return the images and dangling links below ``root`` that neither a case nor the adapter mentions."""
    root = Path(root).expanduser().absolute()
    if not dataset.lists_folder or not root.is_dir():
        return []
    files = (path for case in cases for path in (case.image, case.label, case.mask) if path is not None)
    known = {os.path.normpath(path) for path in (*files, *(entry.path for entry in told))}
    tree = walk(root)
    found = [entry for entry in tree.left_out if os.path.normpath(entry.path) not in known]
    for path in (*tree.files, *tree.dangling):
        if image_suffix(path) is None or os.path.normpath(path) in known:
            continue
        lost = leads_nowhere(path)
        found.append(
            LeftOut(path, lost, FETCH())
            if lost
            else LeftOut(path, f"has no place in the layout {dataset.name}")
        )
    return found


def _warn(root: Path, listing: Listing) -> None:
    reasons: dict[str, list[str]] = {}
    for entry in listing.left_out:
        reasons.setdefault(entry.reason, []).append(entry.path.name)
    for reason, names in reasons.items():
        shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
        logger.warning("%s: %s left out: %s (%s)", root, count(len(names), "entry", "entries"), reason, shown)
    if listing.visits is not None:
        logger.warning("%s", visits_warning(root, listing))


def visits_warning(root: Path, listing: Listing) -> str:
    """Return the warning that images of one person are taken for several people, with the remedy."""
    guess, cases = listing.visits, len(listing.cases)
    assert guess is not None
    shown = ", ".join(guess.example[:4]) + ", ..." * (len(guess.example) > 4)
    return (
        f"WARNING: {root}: names look like several images of one person ({shown}), and each is taken for a person of "
        f"its own: images of one person may come into training and test. Fix: say who is on which image "
        f"({SAY_SUBJECTS.format(guess.pattern)}; then {count(guess.people, 'person', 'people')} on "
        f"{count(cases, 'image')}), or, if each is another person, say that (--subject-pattern '.+')."
    )
