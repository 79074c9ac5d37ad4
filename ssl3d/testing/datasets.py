"""The checks of a dataset."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

from ssl3d.config import Settings
from ssl3d.data.cohort import Case, Dataset, Modality, Subset
from ssl3d.data.layouts.listing import list_cases
from ssl3d.data.people import check_pattern
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.steps import Preparation
from ssl3d.errors import SSL3DError, count, nearest
from ssl3d.testing.checks import Checks, Fault, demand
from ssl3d.testing.declarations import check_name

PREPARED = 3
"""So many cases are prepared."""


class DatasetChecks(Checks):
    """The checks of one adapter.

    Args:
        dataset: the adapter.
        settings: of the checks.
        root: a folder in its layout; None: what its cases are is not looked at.
    """

    kind = "dataset"
    order = (
        "declarations_make_sense",
        "other_folders_are_refused",
        "cases_are_listed",
        "the_list_does_not_depend_on_the_disk",
        "cases_are_prepared",
    )
    essential = ("declarations_make_sense", "cases_are_listed")

    def __init__(self, dataset: Dataset, settings: Settings, root: Path | None = None) -> None:
        self.dataset, self.settings, self.root = dataset, settings, root

    @property
    def subject(self) -> Any:
        return type(self.dataset)

    def chosen(self) -> Sequence[str]:
        return self.order if self.root is not None else self.order[:2]

    def opened(self) -> tuple[Dataset, list[Case]]:
        """Return the adapter for the folder, with its cases."""
        assert self.root is not None
        dataset = self.dataset.open(self.root)
        demand(
            isinstance(dataset, Dataset), f"open returns {dataset!r}", "open", "return self.with_facts(...)"
        )
        cases = dataset.cases(self.root)
        demand(isinstance(cases, list) and all(isinstance(case, Case) for case in cases),
               f"cases returns {_kind(cases)}", "cases", "return a list of ssl3d.Case")  # fmt: skip
        return dataset, cases

    # -- checks -----------------------------------------------------------------------------------

    def declarations_make_sense(self) -> str:
        """Names, facts and functions are what the framework can use."""
        d = self.dataset
        check_name(getattr(d, "name", None), "dataset")
        for name, use in (
            ("summary", "`ssl3d datasets` prints it"),
            ("layout", "errors show what was expected"),
        ):
            text = getattr(d, name, None)
            demand(isinstance(text, str) and bool(text.strip()) and "\n" not in text, f"{name} = {text!r}", name,
                   f"one line of text: {use}")  # fmt: skip
        demand(d.modality in get_args(Modality), f"modality = {d.modality!r}.{nearest(str(d.modality), get_args(Modality))}",
               "modality")  # fmt: skip
        offset = d.intensity_offset
        demand(offset == "auto" or isinstance(offset, int | float), f"intensity_offset = {offset!r}", "intensity_offset",
               'a number, so that air is near 0, or "auto"')  # fmt: skip
        _check_labels(d)
        if d.subject_pattern is not None:
            check_pattern(d.subject_pattern)
        for name, arguments in (("cases", ("root",)), ("open", ("root", True)), ("left_out", ("root",))):
            try:
                inspect.signature(getattr(type(d), name)).bind("self", *arguments)
            except TypeError as error:
                raise Fault(
                    f"{name} cannot be called: {error}", name, "docs/plugins.md shows its arguments"
                ) from error
        demand(
            type(d).cases is not Dataset.cases, "it has no cases", None, "write def cases(self, root): ..."
        )
        return f"{d.modality}, {count(len(d.label_values), 'structure')}"

    def other_folders_are_refused(self) -> str:
        """A folder that is missing, empty or of something else has no case, or ends in an error for users."""
        seen = []
        with tempfile.TemporaryDirectory() as folder:
            other = Path(folder) / "other"
            (other / "papers").mkdir(parents=True)
            (other / "papers" / "notes.txt").write_text("nothing of a scan")
            (Path(folder) / "empty").mkdir()
            for what in ("missing", "empty", "other"):
                root = Path(folder) / what
                try:
                    found = self.dataset.open(root).cases(root)
                except SSL3DError as error:
                    demand(
                        bool(str(error).strip()),
                        f"a folder that is {what} is refused without a word",
                        "cases",
                    )
                    seen.append(f"{what} refused")
                    continue
                except Exception as error:
                    raise Fault(
                        f"a folder that is {what}: {type(error).__name__}: {error}", error,
                        "ssl3d.data.cohort.open_root and layout_error say what was expected",
                    ) from error  # fmt: skip
                demand(not found, f"a folder that is {what} has {count(len(found or []), 'case')}", "cases")
                seen.append(f"{what} has none")
        return ", ".join(seen)

    def cases_are_listed(self) -> str:
        """Every case has an id of its own, a person, and files that exist."""
        dataset, cases = self.opened()
        demand(bool(cases), f"{self.root} has no case", "cases", f"the layout is {dataset.layout}")
        ids = [case.id for case in cases]
        for case in cases:
            told = f"case {case.id!r}"
            named = (
                isinstance(case.id, str)
                and case.id.strip() == case.id != ""
                and not set(case.id) & set("/\\\0\n")
            )
            demand(named, f"the id {case.id!r} cannot name a file", "cases", "take it from the image's name")
            demand(ids.count(case.id) == 1, f"{ids.count(case.id)} cases have the id {case.id!r}", "cases",
                   "put the folder or the visit into it")  # fmt: skip
            demand(isinstance(case.subject, str) and bool(case.subject), f"{told}: subject = {case.subject!r}", "cases",
                   "the person, or the id where nobody knows")  # fmt: skip
            for name in ("image", "label", "mask"):
                path = getattr(case, name)
                demand(path is not None or name != "image", f"{told} has no image", "cases")
                demand(
                    path is None or isinstance(path, Path), f"{told}: {name} = {path!r} is no Path", "cases"
                )
                demand(path is None or path.exists(), f"{told}: {name} {path} does not exist", "cases",
                       "leave out what is not there: label=None")  # fmt: skip
            demand(case.subset in (None, *get_args(Subset)), f"{told}: subset = {case.subset!r}", "cases",
                   "train, val, test or None")  # fmt: skip
            named_targets = dataset.target_names
            demand(case.target is None or not named_targets or case.target in named_targets,
                   f"{told}: target = {case.target!r}, and target_names has {sorted(named_targets)}", "cases")  # fmt: skip
        labelled, people = sum(case.labelled for case in cases), len({case.subject for case in cases})
        return f"{count(len(cases), 'case')} of {count(people, 'person', 'people')}, {labelled} labelled"

    def the_list_does_not_depend_on_the_disk(self) -> str:
        """Another order of a folder's entries gives the same list; file systems have orders of their own."""
        _, first = self.opened()
        with _entries_reversed():
            _, second = self.opened()
        demand(
            sorted(case.id for case in first) == sorted(case.id for case in second),
            "other cases are found",
            "cases",
        )
        demand(first == second, "the cases come in the order in which the disk lists them", "cases",
               "sort them: key=lambda case: ssl3d.data.cohort.natural_key(case.id)")  # fmt: skip
        return f"{first[0].id} to {first[-1].id}" if first else "none"

    def cases_are_prepared(self) -> str:
        """The first cases are read, checked and prepared, labels included, as tasks do it."""
        assert self.root is not None
        dataset = self.dataset.open(self.root)
        listing = list_cases(dataset, self.root)
        chosen = sorted(listing.cases, key=lambda case: case.label is None)[:PREPARED]
        preparation = Preparation(spacing_mm=self.settings.data.spacing_mm)
        with tempfile.TemporaryDirectory() as folder:
            try:
                cohort = prepare(chosen, dataset, preparation, Path(folder))
            except SSL3DError as error:
                raise Fault(str(error), "cases", "correct the facts that it names, or the files") from error
            shapes = " ".join("x".join(map(str, case.shape)) for case in cohort.cases)
            return f"{shapes} voxels at {preparation.spacing_mm:g} mm, taken for {cohort.taken_for}"


def _check_labels(d: Dataset) -> None:
    """Demand values and names of structures and classes that fit together."""
    for name in ("label_values", "label_aliases", "target_names"):
        value = getattr(d, name)
        demand(isinstance(value, Mapping) and all(isinstance(k, int) for k in value), f"{name} = {value!r}", name,
               "a dictionary with whole numbers as keys")  # fmt: skip
    names = list(d.label_values.values())
    demand(
        0 not in d.label_values, "label_values has 0, which is the background", "label_values", "leave it out"
    )
    for name, values in (("label_values", names), ("target_names", list(d.target_names.values()))):
        demand(
            all(isinstance(v, str) and v.strip() for v in values),
            f"{name} = {values!r}",
            name,
            "names are texts",
        )
        demand(len(set(values)) == len(values), f"{name} names two alike: {values}", name,
               "for several values of one structure, label_aliases")  # fmt: skip
    lost = set(d.label_aliases.values()) - set(d.label_values)
    demand(not lost, f"label_aliases leads to {sorted(lost)}, which label_values lacks", "label_aliases")
    both = set(d.ignored_label_values) & (set(d.label_values) | set(d.label_aliases))
    demand(not both, f"{sorted(both)} are both a structure and ignored", "ignored_label_values")
    classes = sorted(d.target_names)
    demand(
        classes == list(range(len(classes))),
        f"target_names numbers classes {classes}",
        "target_names",
        "0, 1, 2, ...",
    )


@contextmanager
def _entries_reversed() -> Iterator[None]:
    """Let folders list their entries in reverse."""
    scan, listed = os.scandir, os.listdir

    class Reversed:
        def __init__(self, *args: Any) -> None:
            with scan(*args) as entries:
                self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            return self.entries

        def __next__(self) -> os.DirEntry[str]:
            return next(self.entries)

        def __enter__(self) -> Reversed:
            return self

        def __exit__(self, *error: Any) -> None: ...

        def close(self) -> None: ...

    with (
        patch.object(os, "scandir", Reversed),
        patch.object(os, "listdir", lambda *args: sorted(listed(*args), reverse=True)),
    ):
        yield


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
