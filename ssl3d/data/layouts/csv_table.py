"""Tables (CSV) of images, labels and targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ssl3d.data.cohort import Case, Dataset, layout_error, natural_key, read_table
from ssl3d.data.files.suffixes import image_suffix
from ssl3d.data.layouts.common import _by_id
from ssl3d.errors import DataError, count


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
                f"{table}: {count(len(problems), 'problem')}:\n" + "\n".join(f"  {p}" for p in problems)
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
