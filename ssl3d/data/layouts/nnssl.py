"""The layout of nnssl's pretraining data."""

from __future__ import annotations

import os
from pathlib import Path

from ssl3d.data.cohort import Case, Dataset, layout_error, open_root
from ssl3d.data.files.suffixes import image_suffix
from ssl3d.data.layouts.common import _by_id, _read_json


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
