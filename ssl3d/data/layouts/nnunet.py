"""The layout of nnU-Net's raw data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl3d.data.cohort import Case, Dataset, Reading, Subset, incomplete_error, layout_error, open_root
from ssl3d.data.files.entries import LeftOut
from ssl3d.data.files.suffixes import IMAGE_SUFFIXES, image_suffix
from ssl3d.data.layouts.common import (
    _NNUNET_PARTS,
    _broken_promises,
    _by_id,
    _by_stem,
    _channel,
    _Found,
    _labels,
    _modality,
    _read_json,
)
from ssl3d.errors import DataError
from ssl3d.remedies import NUMBER


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
