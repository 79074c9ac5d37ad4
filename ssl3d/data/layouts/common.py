"""Layouts in which researchers keep their own data: nnU-Net, Medical Segmentation Decathlon, BIDS, nnssl, CSV.

Here the facts that an adapter of a release declares (label names, modality) stand in the folder
itself, so :meth:`Dataset.open` reads them first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl3d.data.cohort import (
    Case,
    Dataset,
    Modality,
    Subset,
    layout_error,
    natural_key,
)
from ssl3d.data.files.entries import LeftOut
from ssl3d.data.files.suffixes import image_suffix
from ssl3d.errors import DataError, ReadError, are, count
from ssl3d.files import MOST_JSON_BYTES, parse_json, read_bytes
from ssl3d.remedies import ENDING, PROMISE, choice


def _by_id(cases: Iterable[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: natural_key(case.id))


def _read_json(path: Path, dataset: Dataset) -> dict[str, Any]:
    if not path.is_file():
        raise layout_error(path.parent, dataset, f"{path.name} is missing.")
    try:
        content = parse_json(read_bytes(path, MOST_JSON_BYTES).decode("utf-8-sig"))
    except ReadError as error:
        raise DataError(str(error)) from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Fix: correct it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not an object. Fix: correct it.")
    return content


def _modality(name: str) -> Modality:
    """Return the modality that a channel's name stands for.

    >>> _modality("CT"), _modality("T1w"), _modality("noNorm")
    ('ct', 'mr', 'auto')
    """
    if re.fullmatch(r"(ce)?ct", name.strip(), re.IGNORECASE):
        return "ct"
    return (
        "mr"
        if re.match(r"(mr|t1|t2|flair|pd|dwi|adc|swi|t1ce|t1gd)", name.strip(), re.IGNORECASE)
        else "auto"
    )


def _labels(stored: Any, path: Path, ignored: frozenset[int] = frozenset()) -> dict[int, str]:
    """Return value -> name without the background from either form of a ``dataset.json``.

    nnU-Net v2 writes ``{"liver": 1}``; v1 and the Decathlon ``{"1": "liver"}``. What a task file ignores is left out.
    """
    if not isinstance(stored, dict) or not stored:
        raise DataError(f'{path} has no "labels". Fix: add {{"background": 0, "name": 1}}.')
    labels: dict[int, str] = {}
    for key, value in stored.items():
        if isinstance(value, list):
            raise DataError(
                f'{path}: the label "{key}" is a region of the values {value}. '
                "Fix: give one name a value (regions that overlap cannot be read), or name the values in a task file "
                "(labels)."
            )
        name, number = (value, key) if str(key).strip().isdigit() else (key, value)
        if str(number).strip().isdigit() and int(number) in ignored:
            continue
        if str(name).lower() == "ignore":
            raise DataError(
                f'{path}: the label "ignore" ({number}) marks voxels without truth, which cannot be scored. '
                f"Fix: take these cases out, and the label out of the file; or make it background in a task file "
                f"(ignore_labels: [{number}])."
            )
        try:
            labels[int(number)] = str(name)
        except (TypeError, ValueError):
            raise DataError(
                f'{path}: the label "{key}": {value!r} has no whole number. Fix: correct it.'
            ) from None
    labels.pop(0, None)
    return dict(sorted(labels.items()))


def _channel(dataset: Dataset, channels: Any, path: Path) -> tuple[int, str]:
    """Return number and name of the channel that the user has chosen, or of the only one.

    Args:
        dataset: with the user's choice.
        channels: of a ``dataset.json``: ``{"0": "T1", ...}``, a list of names, or the only name.
        path: that file.

    Raises:
        DataError: there are several and none is chosen, or there is no such channel; lists them.
    """
    if isinstance(channels, list):
        channels = dict(enumerate(channels))
    if not isinstance(channels, dict):
        channels = {0: channels or ""}
    names = {int(number): str(name) for number, name in channels.items() if str(number).isdigit()}
    names = names or {0: ""}
    there = ", ".join(f"{number}: {name}" for number, name in sorted(names.items()))
    if dataset.channel is None and len(names) > 1:
        how = choice("channel", str(min(names)))
        raise DataError(
            f"{path} says that images have {len(names)} channels ({there}), and one is read. "
            f"Fix: choose it by number or name (the first: {how.format(layout=dataset.name)})."
        )
    if dataset.channel is None:
        return min(names.items())
    wanted = str(dataset.channel)
    for number, name in names.items():
        if wanted in (str(number), name):
            return number, name
    if len(names) == 1 and wanted.isdigit():  # 4D images whose channels the file does not name
        return int(wanted), ""
    raise DataError(f"{path}: there is no channel {wanted}. Fix: choose one of {there}.")


_NNUNET_PARTS: dict[Subset, str] = {"train": "Tr", "test": "Ts"}


@dataclass
class _Found:
    """What the folders of one part of an nnU-Net data set hold."""

    cases: list[Case] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _by_stem(folder: Path, ending: str) -> tuple[dict[str, Path], list[LeftOut]]:
    """Return name without ending -> file, for the files of a folder that end in ``ending``; and all the others.

    Raises:
        DataError: two files have one name, but for the case of their endings.
    """
    files: dict[str, Path] = {}
    others: list[LeftOut] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        suffix = image_suffix(path)
        if path.name.startswith("."):
            others.append(LeftOut(path, "is hidden"))
        elif suffix is None:
            others.append(LeftOut(path, "is not of a format that is read"))
        elif suffix != ending.lower():
            fix = ENDING()
            others.append(
                LeftOut(path, f'ends in {suffix}, but dataset.json has file_ending "{ending}"', fix)
            )
        else:
            stem = path.name[: -len(suffix)]
            if stem in files:
                raise DataError(f"{files[stem]} and {path} have the same name. Fix: keep one of them.")
            files[stem] = path
    return files, others


def _broken_promises(root: Path, facts: Mapping[str, Any], counts: Mapping[str, int]) -> list[LeftOut]:
    """Return where ``dataset.json`` gives other numbers of cases than there are.

    ``numTest`` counts only where the test images are there: many releases are passed on without.
    """
    broken = []
    for key, subset, what in (("numTraining", "train", "training"), ("numTest", "test", "test")):
        promised, there = facts.get(key), counts.get(subset, 0)
        if not isinstance(promised, int) or promised == there or (subset == "test" and not there):
            continue
        problem = f"promises {count(promised, f'{what} case')} ({key}), and {there} {are(there)} there"
        fix = PROMISE(key=key)
        broken.append(LeftOut(root / "dataset.json", problem, fix))
    return broken
