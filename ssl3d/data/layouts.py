"""Layouts in which researchers keep their own data: nnU-Net, Medical Segmentation Decathlon, BIDS, nnssl, CSV.

Here the facts that an adapter of a release declares (label names, modality) stand in the folder
itself, so :meth:`Dataset.open` reads them first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl3d.data.adapters import IMAGE_SUFFIXES, image_suffix
from ssl3d.data.cohort import (
    Case,
    Dataset,
    Modality,
    Reading,
    Subset,
    incomplete_error,
    layout_error,
    natural_key,
    open_root,
    read_table,
)
from ssl3d.data.entries import LeftOut, walk
from ssl3d.errors import DataError
from ssl3d.remedies import CHOOSE_CHANNEL, ENDING, NUMBER, PROMISE


def _by_id(cases: Iterable[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: natural_key(case.id))


def _read_json(path: Path, dataset: Dataset) -> dict[str, Any]:
    if not path.is_file():
        raise layout_error(path.parent, dataset, f"{path.name} is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
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
        raise DataError(
            f"{path} says that images have {len(names)} channels ({there}), and one is read. "
            f"Fix: choose it by number or name ({CHOOSE_CHANNEL})."
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
        problem = f"promises {promised} {what} cases ({key}), and {there} are there"
        fix = PROMISE(key=key)
        broken.append(LeftOut(root / "dataset.json", problem, fix))
    return broken


class NNUNet(Dataset):
    """nnU-Net raw data, versions 1 and 2 (github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md).

    Of several channels (``_0000``, ``_0001``, ...) the user chooses one. Test cases have labels where there is a
    ``labelsTs`` folder. Under CT the offset is found from the values.
    """

    name = "nnunet"
    summary = "nnU-Net raw folder: dataset.json, imagesTr, labelsTr"
    layout = "dataset.json, imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz, imagesTs, labelsTs"

    def open(self, root: Path, labels: bool = True) -> Dataset:
        root = open_root(root, self.layout)
        path = root / "dataset.json"
        facts = _read_json(path, self)
        number, channel = _channel(self, facts.get("channel_names") or facts.get("modality"), path)
        names = _labels(facts.get("labels"), path, self.ignored_label_values) if labels else {}
        return self.with_facts(label_values=names, modality=_modality(channel), channel=number)

    def reading(self) -> Reading:
        return Reading(self.affine)  # a channel is a file of its own

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        facts = _read_json(root / "dataset.json", self)
        if isinstance(facts.get("dataset"), dict):
            cases = self._listed(root, facts["dataset"])
        else:
            found = [self._found(root, subset, facts) for subset in _NNUNET_PARTS]
            cases = [case for part in found for case in part.cases]
            problems = [problem for part in found for problem in part.problems]
            if cases and problems:
                raise incomplete_error(
                    self, problems, "copy the missing files, or remove the ones left alone."
                )
        if not any(case.subset == "train" for case in cases):
            raise layout_error(
                root, self, f"there is no image ..._{int(self.channel or 0):04d} in imagesTr/."
            )
        return _by_id(cases)

    def left_out(self, root: Path) -> list[LeftOut]:
        root = open_root(root, self.layout)
        facts = _read_json(root / "dataset.json", self)
        if isinstance(facts.get("dataset"), dict):
            counts, left_out = {"train": len(facts["dataset"])}, []
        else:
            found = {subset: self._found(root, subset, facts) for subset in _NNUNET_PARTS}
            counts = {subset: len(part.cases) for subset, part in found.items()}
            left_out = [entry for part in found.values() for entry in part.left_out]
        return left_out + _broken_promises(root, facts, counts)

    def _listed(self, root: Path, entries: Mapping[str, Any]) -> list[Case]:
        """Version 2 may list files by name, relative to the folder."""
        cases = []
        for case_id, entry in entries.items():
            images, label = entry.get("images") or [], entry.get("label")
            if not images:
                raise DataError(
                    f'{root / "dataset.json"}: the case "{case_id}" has no images. Fix: correct it.'
                )
            number = int(self.channel or 0)
            if number >= len(images):
                raise DataError(
                    f'{root / "dataset.json"}: the case "{case_id}" has {len(images)} images, so no channel {number}. '
                    "Fix: correct it, or choose another channel."
                )
            cases.append(Case(
                id=case_id, subject=case_id, image=root / images[number], label=root / label if label else None,
                subset="train",
            ))  # fmt: skip
        return cases

    def _found(self, root: Path, subset: Subset, facts: Mapping[str, Any]) -> _Found:
        """Sort out every entry of imagesTr and labelsTr, or of imagesTs and labelsTs.

        Endings are compared without regard to case, and links are followed.
        """
        ending = str(facts.get("file_ending") or ".nii.gz")
        if image_suffix(Path(f"x{ending}")) is None:
            raise DataError(
                f'{root / "dataset.json"}: files that end in "{ending}" cannot be read. '
                f"Fix: convert them to one of {', '.join(IMAGE_SUFFIXES)}."
            )
        folder, of_labels = (root / f"{kind}{_NNUNET_PARTS[subset]}" for kind in ("images", "labels"))
        channel, found = int(self.channel or 0), _Found()
        labels, others = _by_stem(of_labels, ending)
        found.left_out += others
        known: dict[str, Path] = {}
        images, others = _by_stem(folder, ending)
        found.left_out += others
        for stem, image in images.items():
            numbered = re.fullmatch(r"(.+)_(\d{4})", stem)
            if numbered is None:
                fix = NUMBER(name=f"{stem}_{channel:04d}{ending}", channel=channel)
                found.left_out.append(
                    LeftOut(image, "has no number of a channel (_0000) before its ending", fix)
                )
            elif int(numbered[2]) != channel:
                found.left_out.append(LeftOut(image, f"is another channel than {channel:04d}"))
            else:
                known[numbered[1]] = image
        for case_id, image in known.items():
            label = labels.get(case_id)
            if label is None and (subset == "train" or of_labels.is_dir()):
                found.problems.append(f"{image} has no label {of_labels / f'{case_id}{ending}'}")
            found.cases.append(Case(id=case_id, subject=case_id, image=image, label=label, subset=subset))
        named = {
            entry.path.name[: -len(image_suffix(entry.path) or "")] for entry in found.left_out if entry.fix
        }
        for stem, label in labels.items():
            if stem in known:
                continue
            if named & {stem, f"{stem}_{channel:04d}"}:
                found.left_out.append(
                    LeftOut(label, f"belongs to an image of {folder.name} that is left out")
                )
            else:
                found.problems.append(f"{label} has no image in {folder.name}")
        return found


class MSD(Dataset):
    """Medical Segmentation Decathlon (Antonelli et al., Nature Communications 2022), and whatever has its
    ``dataset.json``: files are listed there by name, relative to the folder.
    """

    name = "msd"
    summary = "Medical Segmentation Decathlon: dataset.json that lists its files"
    layout = (
        'dataset.json with "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]'
    )

    def open(self, root: Path, labels: bool = True) -> Dataset:
        root = open_root(root, self.layout)
        path = root / "dataset.json"
        facts = _read_json(path, self)
        number, channel = _channel(self, facts.get("modality"), path)
        names = _labels(facts.get("labels"), path, self.ignored_label_values) if labels else {}
        chosen = None if self.channel is None else number  # images with one channel are 3D
        return self.with_facts(label_values=names, modality=_modality(channel), channel=chosen)

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        facts = _read_json(root / "dataset.json", self)
        training = facts.get("training") or []
        if not training or not all(isinstance(entry, dict) and "image" in entry for entry in training):
            raise layout_error(
                root, self, 'dataset.json lists no {"image": ..., "label": ...} under "training".'
            )
        cases, problems = [], []
        for subset, entries in (("train", training), ("test", facts.get("test") or [])):
            for entry in entries:
                image, label = (
                    (entry, None) if isinstance(entry, str) else (entry["image"], entry.get("label"))
                )
                path = root / image
                case_id = path.name[: -len(image_suffix(path) or "") or None].removesuffix("_0000")
                problems += [f"{root / name} is listed and missing" for name in (image, label)
                             if name and not (root / name).exists()]  # fmt: skip
                cases.append(Case(
                    id=case_id, subject=case_id, image=path, label=root / label if label else None,
                    subset="train" if subset == "train" else "test",
                ))  # fmt: skip
        if problems:
            raise incomplete_error(
                self, problems, "copy the missing files, or take them out of dataset.json."
            )
        return _by_id(cases)

    def left_out(self, root: Path) -> list[LeftOut]:
        root = open_root(root, self.layout)
        facts = _read_json(root / "dataset.json", self)
        counts = {part: len(facts.get(key) or []) for part, key in (("train", "training"), ("test", "test"))}
        return _broken_promises(root, facts, counts)


class BIDS(Dataset):
    """Anatomical MR in the Brain Imaging Data Structure (bids-specification.readthedocs.io).

    Every ``anat`` image of a known suffix is a case, the person its subject. A segmentation is
    ``<same entities>_dseg``, with or without a ``desc``, beside the image or in
    ``derivatives/<pipeline>``; it belongs to the first contrast of a session in the order of
    :attr:`suffixes`. Names of its values are read from ``*_dseg.tsv`` (columns ``index``, ``name``).
    """

    name = "bids"
    subjects_known = True
    summary = "BIDS: anatomical MR (T1w and friends), dseg segmentations"
    layout = "sub-<id>/[ses-<id>/]anat/sub-<id>_T1w.nii.gz, derivatives/<pipeline>/sub-<id>/anat/sub-<id>_dseg.nii.gz"
    modality = "mr"
    suffixes = ("T1w", "T2w", "FLAIR", "PDw", "T2starw", "inplaneT1", "inplaneT2", "UNIT1", "T1map", "T2map")

    def open(self, root: Path, labels: bool = True) -> Dataset:
        root = open_root(root, self.layout)
        below = walk(root / "derivatives").files if labels and (root / "derivatives").is_dir() else []
        tables = sorted({*root.glob("*dseg.tsv"), *(p for p in below if p.name.endswith("dseg.tsv"))})
        if not tables or not labels:
            return self
        names: dict[int, str] = {}
        for line, row in enumerate(read_table(tables[0], "\t")[1], start=2):
            try:
                names[int(row["index"])] = row["name"]
            except (KeyError, TypeError, ValueError):
                fix = "give the columns index (whole number) and name"
                raise DataError(f"{tables[0]}, line {line}: no index or name. Fix: {fix}.") from None
        names.pop(0, None)
        return self.with_facts(label_values=dict(sorted(names.items())))

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        ending = re.compile(rf"_({'|'.join(self.suffixes)})(?i:\.nii(\.gz)?)$")
        images = [path for pattern in ("sub-*/anat/*", "sub-*/ses-*/anat/*") for path in root.glob(pattern)]
        images = sorted(path for path in images if ending.search(path.name))
        if not images:
            raise layout_error(root, self, "there is no anatomical image below sub-*/.")
        cases, given = [], set()
        for image in sorted(images, key=lambda path: self.suffixes.index(ending.search(path.name)[1])):  # type: ignore[index]
            entities = ending.sub("", image.name)
            label = self._dseg(root, image.parent.relative_to(root), entities)
            if label in given:
                label = None  # it lies on the grid of the first contrast
            elif label:
                given.add(label)
            case_id = ending.sub(r"_\1", image.name)
            cases.append(Case(id=case_id, subject=image.relative_to(root).parts[0], image=image, label=label))
        return _by_id(cases)

    def _dseg(self, root: Path, folder: Path, entities: str) -> Path | None:
        pattern = re.compile(rf"{re.escape(entities)}(_desc-[^_]+)?_dseg(?i:\.nii(\.gz)?)$")
        places = [root / folder, *sorted(path / folder for path in root.glob("derivatives/*"))]
        found = sorted(
            path for place in places for path in place.glob("*_dseg.*") if pattern.match(path.name)
        )
        if len(found) > 1:
            raise DataError(
                f"{entities} has {len(found)} segmentations: {', '.join(map(str, found))}. Fix: keep one of them."
            )
        return found[0] if found else None


class NNSSL(Dataset):
    """The ``pretrain_data.json`` of nnssl (github.com/MIC-DKFZ/nnssl): a collection of data sets, each
    of subjects, sessions and images. For pretraining; masks are not read.

    A path that starts with ``$`` is relative: to an environment variable of that name, to the data
    set's own folder if it is called so, or to the folder that the file is in.
    """

    name = "nnssl"
    subjects_known, lists_folder = True, False
    summary = "nnssl: pretrain_data.json that lists subjects, sessions and images"
    layout = 'pretrain_data.json with "datasets" > "subjects" > "sessions" > "images" > "image_path"'

    def cases(self, root: Path) -> list[Case]:
        root = open_root(root, self.layout)
        path = root / "pretrain_data.json"
        content = _read_json(path, self)
        cases: dict[str, Case] = {}
        try:
            for collection, data in content["datasets"].items():
                for subject, person in data["subjects"].items():
                    for session in person["sessions"].values():
                        for image in session["images"]:
                            file = self._place(root, str(image["image_path"]))
                            relative = file.relative_to(root) if file.is_relative_to(root) else file
                            case_id = relative.as_posix().removesuffix(image_suffix(file) or "").lstrip("/")
                            cases[case_id] = Case(id=case_id, subject=f"{collection}/{subject}", image=file)
        except (KeyError, TypeError, AttributeError) as error:
            raise layout_error(root, self, f"pretrain_data.json lacks {error}.") from error
        if not cases:
            raise layout_error(root, self, "pretrain_data.json lists no image.")
        return _by_id(cases.values())

    @staticmethod
    def _place(root: Path, text: str) -> Path:
        if not text.startswith("$"):
            return root / text  # an absolute path stays as it is
        variable, _, rest = text[1:].partition("/")
        if variable in os.environ:
            return Path(os.environ[variable]) / rest
        return root / rest if variable in {"", root.name} else root.parent / variable / rest


class Table(Dataset):
    """A CSV file with one row an image: ``subject``, ``image``, and ``label`` (a file), ``class`` or ``value``.

    Columns, in any order, others ignored:
        image: the file or DICOM folder, absolute or relative to the CSV.
        subject: the person; default: each row is a person.
        label: a segmentation on the image's grid.
        class: a name or number. Several, separated by ``;``, where they do not exclude each other: then
            ``none`` stands for none of them.
        value: a number to be predicted.
        split: ``train``, ``val`` or ``test``; empty: drawn.
        id: unique; default: from the image's name.
    """

    name = "csv"
    lists_folder = False
    summary = "CSV file: subject, image, label or class or value, split"
    layout = "a CSV file with the columns subject, image, label or class or value, split"

    def open(self, root: Path, labels: bool = True) -> Dataset:
        rows = self._rows(root)[1]
        several = self._several(rows)
        names = sorted({name for row in rows for name in self._classes(row, several)}, key=natural_key)
        return self.with_facts(
            target_names=dict(enumerate(names)), subjects_known=any(row.get("subject") for row in rows)
        )

    def cases(self, root: Path) -> list[Case]:
        table, rows = self._rows(root)
        names = self.target_names or self.open(root).target_names
        numbers = {name: number for number, name in names.items()}
        several = self._several(rows)
        cases, problems = [], []
        for line, row in enumerate(rows, start=2):
            image, label = table.parent / row["image"], row.get("label", "")
            if not row["image"] or not image.exists():
                problems.append(f"line {line}: image {row['image'] or '(empty)'} does not exist")
            if label and not (table.parent / label).exists():
                problems.append(f"line {line}: label {label} does not exist")
            split = row.get("split", "").lower()
            if split not in {"", "train", "val", "test"}:
                problems.append(f'line {line}: split is "{split}", not train, val or test')
            value = row.get("value", "")
            number: float | None = None
            try:
                number = float(value) if value else None
            except ValueError:
                problems.append(f'line {line}: value is "{value}", not a number')
            unknown = [name for name in self._classes(row, several) if name not in numbers]
            problems += [
                f'line {line}: class "{name}" is not one of {", ".join(numbers)}' for name in unknown
            ]
            known = tuple(numbers[name] for name in self._classes(row, several) if name in numbers)
            fallback = row["image"].removesuffix(image_suffix(Path(row["image"])) or "").strip("/")
            case_id = row.get("id") or fallback
            has_class = bool(row.get("class"))
            cases.append(Case(
                id=case_id, subject=row.get("subject") or case_id, image=image,
                label=table.parent / label if label else None,
                target=known[0] if has_class and not several and known else None,
                classes=tuple(sorted(known)) if has_class and several else None,
                value=number,
                subset={"train": "train", "val": "val", "test": "test"}.get(split),  # type: ignore[arg-type]
            ))  # fmt: skip
        if problems:
            raise DataError(
                f"{table}: {len(problems)} problem{'s' * (len(problems) > 1)}:\n" + "\n".join(f"  {p}" for p in problems)
                + "\nFix: correct these rows, or take them out."
            )  # fmt: skip
        return _by_id(cases)

    @staticmethod
    def _several(rows: Iterable[Mapping[str, str]]) -> bool:
        return any(";" in row.get("class", "") for row in rows)

    @staticmethod
    def _classes(row: Mapping[str, str], several: bool) -> list[str]:
        names = [name.strip() for name in row.get("class", "").split(";")]
        return [name for name in names if name and not (several and name.lower() == "none")]

    def _rows(self, root: Path) -> tuple[Path, list[dict[str, str]]]:
        """Return the CSV file and its rows, keys in lower case.

        Raises:
            DataError: no such file, several, or no column ``image``.
        """
        path = Path(root).expanduser().absolute()
        if path.is_dir():
            tables = sorted(path.glob("[!.]*.csv"))
            if len(tables) != 1:
                raise layout_error(path, self, f"there are {len(tables)} .csv files; name one.")
            path = tables[0]
        if not path.is_file():
            raise DataError(f"{path} does not exist. Give {self.layout}.")
        columns, stored = read_table(path)
        columns = [name.strip().lower() for name in columns]
        if "image" not in columns:
            commas = ", separated by commas" * (len(columns) == 1)
            raise DataError(
                f'{path} has no column "image"; its columns are {", ".join(columns) or "none"}. '
                f"Fix: give {self.layout}{commas}."
            )
        if not stored:
            raise DataError(f"{path} has no rows. Fix: give one an image.")
        rows = [
            {
                name.strip().lower(): (value or "").strip()
                for name, value in row.items()
                if isinstance(name, str)
            }
            for row in stored
        ]
        return path, rows


LAYOUTS: tuple[Dataset, ...] = (NNUNet(), MSD(), BIDS(), NNSSL(), Table())
