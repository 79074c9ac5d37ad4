"""The layout of the Medical Segmentation Decathlon."""

from __future__ import annotations

from pathlib import Path

from ssl3d.data.cohort import Case, Dataset, incomplete_error, layout_error, open_root
from ssl3d.data.files.entries import LeftOut
from ssl3d.data.files.suffixes import image_suffix
from ssl3d.data.layouts.common import _broken_promises, _by_id, _channel, _labels, _modality, _read_json


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
