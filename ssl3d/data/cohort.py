"""What a data set is to ssl3d: an adapter that lists cases, and the facts needed to read them.

An adapter (a subclass of :class:`Dataset`) knows one layout on disk. It lists files and never
opens them; reading, checking and preparing are the framework's, the same for every data set.
"""

from __future__ import annotations

import copy
import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from ssl3d.data.files.entries import LeftOut
from ssl3d.errors import ConfigError, DataError, count

Modality = Literal["ct", "mr", "auto"]
Subset = Literal["train", "val", "test"]

_NO_VALUES: Mapping[int, str] = MappingProxyType({})
_NO_ALIASES: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True)
class Reading:
    """What to take of a file that leaves a choice; without an answer such a file is refused.

    Attributes:
        affine: of a NIfTI whose sform and qform disagree, the one that is right; where there is one only,
            or where both agree, it makes no difference.
        channel: of a 4D NIfTI, the number of the volume that is read, from 0.
    """

    affine: Literal["sform", "qform"] | None = None
    channel: int | None = None


ANY_READING = Reading()


@dataclass(frozen=True)
class Case:
    """One image, with what is known about it.

    Attributes:
        id: unique within the cohort.
        subject: the person; all cases of one subject stay in one part of a split.
        image: the image file.
        label: the segmentation, on the image's grid, or None.
        target: the class, for classification, or None.
        subset: the part of the official release that the case belongs to, or None.
        classes: for several classes that do not exclude each other, those that apply; or None.
        value: the number to be predicted, for regression, or None.
        mask: a region on the image's grid that the preparation crops to, or None.
    """

    id: str
    subject: str
    image: Path
    label: Path | None = None
    target: int | None = None
    subset: Subset | None = None
    classes: tuple[int, ...] | None = None
    value: float | None = None
    mask: Path | None = None

    @property
    def labelled(self) -> bool:
        """Whether a segmentation, a class or a number is known."""
        return any(known is not None for known in (self.label, self.target, self.classes, self.value))


class Dataset:
    """Base of every adapter: class attributes with the facts, and :meth:`cases`.

    Attributes:
        name: the registered name, lower case.
        summary: one line for ``ssl3d datasets``.
        layout: the expected files, for errors, for example ``ct_train/ct_train_1001_image.nii.gz``.
        modality: "ct" (values in HU plus a constant), "mr", or "auto" (found from the values).
        intensity_offset: added to stored values so that air is near 0 and water near 1000, or
            "auto" (found from the values). Meaningful for CT.
        label_values: stored value -> name of each structure. Prepared labels are 0 for background
            and k = 1, 2, ... in the order of this mapping.
        label_aliases: stored value -> the value of ``label_values`` that it stands for.
        ignored_label_values: stored values that become background. Any other value is an error.
        target_names: class -> name, for classification.
        empty_labels: whether a label may hold nothing but background (lesions, for example).
        affine: of files whose sform and qform disagree, the one that is right; None: they are refused.
        channel: of images with several channels, the one that is read: its number from 0, or its
            name where the layout has names; None: they are refused.
        subject_pattern: regular expression that takes the person from a case's id; None: :meth:`cases` says.
        subjects_known: whether :meth:`cases` knows who is on which image; where it takes each image for a person
            and nobody gave a pattern, names that look like visits lead to a warning.
        lists_folder: whether every image below the root is expected to be a case or part of one; those that are
            not are then named.
    """

    name: str
    summary: str
    layout: str = ""
    modality: Modality = "auto"
    intensity_offset: float | Literal["auto"] = "auto"
    label_values: ClassVar[Mapping[int, str]] = _NO_VALUES
    label_aliases: ClassVar[Mapping[int, int]] = _NO_ALIASES
    ignored_label_values: ClassVar[frozenset[int]] = frozenset()
    target_names: ClassVar[Mapping[int, str]] = _NO_VALUES
    empty_labels: bool = False
    affine: Literal["sform", "qform"] | None = None
    channel: int | str | None = None
    subject_pattern: str | None = None
    subjects_known: bool = False
    lists_folder: bool = True

    def open(self, root: Path, labels: bool = True) -> Dataset:
        """Return the adapter for the release below ``root``: itself, unless the facts are in the files.

        Layouts whose label names or modality stand in a file (``dataset.json``) override this.

        Args:
            root: the folder.
            labels: whether labels will be read; if not, their names need not make sense.

        Raises:
            DataError: that file is missing or makes no sense.
        """
        return self

    def with_facts(self, **facts: Any) -> Self:
        """Return a copy with other values of the attributes above, for example ``label_values``."""
        other = copy.copy(self)
        for name, value in facts.items():
            if not hasattr(type(self), name) or name in {"name", "cases"}:
                raise AttributeError(f"a dataset has no fact {name}")
            setattr(other, name, value)
        return other

    def cases(self, root: Path) -> list[Case]:
        """List the cases below ``root``, sorted by id (numbers in ids by value).

        Raises:
            DataError: the folder is missing, empty, or of another layout; says what was expected
                and what was found.
        """
        raise NotImplementedError

    def reading(self) -> Reading:
        """Return what to take of a file that leaves a choice.

        Raises:
            ConfigError: the channel is a name, and this layout has none.
        """
        if self.channel is not None and not str(self.channel).isdigit():
            raise ConfigError(
                f'channel "{self.channel}": the layout {self.name} has no names of channels. '
                "Give a number from 0."
            )
        return Reading(self.affine, None if self.channel is None else int(self.channel))

    def left_out(self, root: Path) -> list[LeftOut]:
        """Return the entries below ``root`` that :meth:`cases` does not read, with the reason of each.

        One with a fix ought to be read: it is an error, or named and done without by the policy "skip". Images and
        dangling links that neither a case nor this mentions are found by :func:`ssl3d.data.layouts.listing.list_cases`.
        """
        return []

    def label_names(self) -> tuple[str, ...]:
        """Return the names of the structures; structure ``k`` of a prepared label is number k - 1."""
        return tuple(self.label_values.values())

    def label_index(self) -> dict[int, int]:
        """Return stored value -> prepared value, background and aliases included."""
        index = {0: 0} | dict.fromkeys(self.ignored_label_values, 0)
        index |= {value: k for k, value in enumerate(self.label_values, start=1)}
        return index | {alias: index[value] for alias, value in self.label_aliases.items()}


def natural_key(text: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sorting key under which ``Normal_2`` comes before ``Normal_10``.

    >>> sorted(["Normal_10", "Normal_2"], key=natural_key)
    ['Normal_2', 'Normal_10']
    """
    parts = re.split(r"(\d+)", text)
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts if part)


def open_root(root: Path, layout: str) -> Path:
    """Return ``root`` as an absolute path after checking that it is a folder with something in it.

    Args:
        root: the folder that the user named.
        layout: what was expected in it, for the error.

    Raises:
        DataError: missing, not a folder, or empty.
    """
    root = Path(root).expanduser().absolute()
    if not root.exists():
        raise DataError(f"{root} does not exist. Give a folder that holds {layout}.")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder. Give the folder that holds {layout}.")
    if not any(root.iterdir()):
        raise DataError(f"{root} is empty. Give a folder that holds {layout}.")
    return root


def layout_error(root: Path, dataset: Dataset, problem: str) -> DataError:
    """Return the error for a folder that has another layout than ``dataset`` expects."""
    found = sorted((entry.name + "/" * entry.is_dir() for entry in root.iterdir()), key=natural_key)
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return DataError(
        f"{root} does not have the layout of {dataset.name}: {problem}\n"
        f"  expected: {dataset.layout}\n"
        f"  found:    {', '.join(found[:8])}{more}\n"
        "Fix: give the folder that holds these files, or name the data set that it is."
    )


def read_table(path: Path, delimiter: str = ",") -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns of a table and its rows, line 2 first.

    Raises:
        DataError: not text in UTF-8, or nothing that can be a table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            return list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f'{path} is not a table in UTF-8 ({error}). Fix: save it as such (in Excel: "CSV UTF-8").'
        ) from error


def incomplete_error(dataset: Dataset, problems: Iterable[str], fix: str) -> DataError:
    """Return the error for a release of which files are missing: one line a problem, all of them."""
    problems = list(problems)
    lines = "\n".join(f"  {problem}" for problem in problems)
    does = "does" if len(problems) == 1 else "do"
    return DataError(
        f"{dataset.name}: {count(len(problems), 'file')} {does} not fit together:\n{lines}\nFix: {fix}"
    )
