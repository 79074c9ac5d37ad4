"""Tasks without code: a YAML file in the place of a plugin (see docs/own_data.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ssl3d.config import YAML_SUFFIXES, Model, PositiveInt, validate
from ssl3d.data.people import check_pattern
from ssl3d.downstream.tasks import Kind, Metric, Scheme, Task
from ssl3d.errors import ConfigError, ReadError
from ssl3d.files import MOST_YAML_BYTES, parse_yaml, read_bytes, real

METRICS: dict[Kind, tuple[Metric, ...]] = {
    "segmentation": ("dsc",), "classification": ("auc", "macro_auc"), "multilabel": ("macro_auc",),
    "regression": ("mae",),
}  # fmt: skip
"""Kind of a task -> the metrics that it can be scored by; the first is the default."""
_SCHEMES: dict[str, Scheme] = {
    "auto": "auto",
    "given": "official",
    "random": "random",
    "folds": "cv",
    "file": "file",
}


class Splits(Model):
    """How the cases are divided; always by subject."""

    scheme: Literal["auto", "given", "random", "folds", "file"] = "auto"
    """`given`: the release's own parts (a CSV's column `split`, imagesTs). `random`: drawn once. `folds`:
    cross-validation. `file`: the folds of an nnU-Net splits_final.json. `auto`: given where the test part has labels,
    else random."""
    file: Path | None = None
    """Where that file is, absolute or relative to this one; default: splits_final.json beside dataset.json."""
    train: PositiveInt | None = None
    """Subjects for training; without the three numbers 60, 20 and 20 % of all."""
    val: PositiveInt | None = None
    """Subjects for validation."""
    test: PositiveInt | None = None
    """Subjects for testing."""
    folds: int | None = Field(None, ge=2)
    """Folds of the cross-validation; default: the preset's."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        given = [n is not None for n in (self.train, self.val, self.test)]
        if any(given) and not all(given):
            raise ValueError("train, val and test belong together: give all three or none")
        if self.file is not None and self.scheme not in {"auto", "file"}:
            raise ValueError(f'a file has no meaning with the scheme "{self.scheme}"')
        if self.folds is not None and (self.file is not None or self.scheme == "file"):
            raise ValueError("folds have no meaning with a file of splits, which says how many there are")
        if self.folds is not None and self.scheme not in {"auto", "folds"}:
            raise ValueError(f'folds have no meaning with the scheme "{self.scheme}"')
        return self


class TaskFile(Model):
    """One downstream task."""

    name: str
    """Unique name, shown in tables: letters, digits, - and _."""
    kind: Kind
    """`segmentation`, `classification`, `multilabel` or `regression`."""
    dataset: str
    """The layout of the data, see `ssl3d datasets`."""
    data: Path | None = None
    """The folder or CSV file, absolute or relative to this file; `--task-data NAME=DIR` overrides it."""
    title: str | None = None
    """Title in tables; default: the name in capitals."""
    summary: str = ""
    """One line for people."""
    labels: dict[int, str] | None = None
    """Stored value -> name (segmentation), or number -> name of a class; default: what the data say."""
    ignore_labels: tuple[int, ...] = ()
    """Stored values that become background."""
    empty_labels: bool = False
    """Whether a label may hold background only."""
    modality: Literal["ct", "mr", "auto"] | None = None
    """Default: what the data say."""
    intensity_offset: float | Literal["auto"] | None = None
    """Added to stored CT values so that air is near 0 and water near 1000; default: what the data say."""
    affine: Literal["sform", "qform"] | None = None
    """Which of the two is right in files where they disagree; default: such files are refused."""
    channel: int | str | None = None
    """The channel of images with several: its number from 0, or its name where the layout has names."""
    subject: str | None = None
    """Regular expression that takes the person from a case's id (its file's name without ending): what stands in
    parentheses, else all that matches; default: as the layout says, in most of them each image is a person."""
    preparation: dict[str, Any] = Field(default_factory=dict)
    """Options of the preparation: spacing_mm, scaling, crop, margin_mm, center_mm, lungmask."""
    splits: Splits = Splits()
    """How the cases are divided."""
    metric: Metric | None = None
    """`dsc`; `auc` for two classes and `macro_auc` for more; `mae`. Default: by the kind."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ValueError("use letters, digits, - and _ only")
        return name

    @field_validator("splits", mode="before")
    @classmethod
    def _scheme_alone(cls, splits: Any) -> Any:
        return {"scheme": splits} if isinstance(splits, str) else splits

    @field_validator("subject")
    @classmethod
    def _expression(cls, subject: str | None) -> str | None:
        try:
            return subject and check_pattern(subject)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @field_validator("labels", mode="before")
    @classmethod
    def _numbered(cls, labels: Any, info: Any) -> Any:
        """A list of names is numbered: from 1 for structures, from 0 for classes."""
        if not isinstance(labels, list):
            return labels
        return dict(enumerate(labels, start=1 if info.data.get("kind") == "segmentation" else 0))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.metric is not None and self.metric not in METRICS[self.kind]:
            raise ValueError(
                f"{self.kind} is scored by {' or '.join(METRICS[self.kind])}, not by {self.metric}"
            )
        if self.labels is not None:
            if self.kind == "regression":
                raise ValueError(
                    "regression has no labels: its numbers stand in the data (a CSV's column value)"
                )
            if len(set(self.labels.values())) < len(self.labels):
                raise ValueError("two labels have the same name")
            if self.kind != "segmentation" and sorted(self.labels) != list(range(len(self.labels))):
                raise ValueError("classes are numbered 0, 1, 2, ... without gaps")
            if self.kind == "classification" and len(self.labels) < 2:
                raise ValueError("there must be two classes at least")
        if self.metric == "auc" and self.labels is not None and len(self.labels) != 2:
            raise ValueError(f"auc is for two classes; for {len(self.labels)} write metric: macro_auc")
        return self


def is_task_file(name: str) -> bool:
    """Whether a name on the command line is that of a task file."""
    return name.endswith(YAML_SUFFIXES)


def load_task(path: Path) -> Task:
    """Return the task that a YAML file describes.

    Raises:
        ConfigError: no such file, not YAML, or a key or value that makes no sense; names the key.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. Give a task file, or the name of a task (ssl3d tasks).")
    try:
        text = read_bytes(path, MOST_YAML_BYTES).decode("utf-8")
    except ReadError as error:
        raise ConfigError(str(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 ({error}). Fix: save it as such.") from error
    return parse_task(text, path)


def task_of_record(record: Mapping[str, Any]) -> Task:
    """Return the task of a record: that of the file whose text it keeps, else the registered one.

    Raises:
        ConfigError: this version cannot read the text any more.
        PluginError: no such task is registered.
    """
    name, text = record["identity"]["task"], (record.get("run") or {}).get("task_file")
    if text:
        return parse_task(text, Path(f"{name}.yaml"))
    from ssl3d.registry.registry import registry

    task: Task = registry().tasks.get(name).load()
    return task


def parse_task(text: str, path: Path) -> Task:
    """Return the task that the text of a YAML file describes.

    Args:
        text: of the file.
        path: of the file, for messages and for a relative place of the data.

    Raises:
        ConfigError: not YAML, or a key or value that makes no sense; names the key.
    """
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} must hold keys and values (name, kind, dataset, ...); see docs/own_data.md."
        )
    file = validate(TaskFile, content, str(path))
    _check_preparation(file, path)
    preparation = dict(file.preparation)
    if preparation.get("lungmask") is not None:  # relative to the file, as `data` is
        preparation["lungmask"] = real(path.parent / Path(preparation["lungmask"]).expanduser())
    facts: dict[str, Any] = {}
    if file.labels is not None:
        names = {value: name for value, name in file.labels.items() if value or file.kind != "segmentation"}
        facts["label_values" if file.kind == "segmentation" else "target_names"] = names
        if file.kind == "segmentation":
            facts["label_aliases"] = {}
    if file.ignore_labels:
        facts["ignored_label_values"] = frozenset(file.ignore_labels)
    if file.empty_labels:
        facts["empty_labels"] = True
    if file.modality is not None:
        facts["modality"] = file.modality
    if file.intensity_offset is not None:
        facts["intensity_offset"] = file.intensity_offset
    if file.subject is not None:
        facts["subject_pattern"] = file.subject
    facts |= {key: getattr(file, key) for key in ("affine", "channel") if getattr(file, key) is not None}
    many = file.labels is not None and len(file.labels) > 2
    metric = file.metric or ("macro_auc" if file.kind == "classification" and many else METRICS[file.kind][0])
    counts = file.splits.train, file.splits.val, file.splits.test
    return Task(
        name=file.name,
        title=file.title or file.name.upper(),
        kind=file.kind,
        dataset=file.dataset,
        metric=metric,
        counts=None if None in counts else counts,  # type: ignore[arg-type]
        preparation=preparation,
        summary=file.summary,
        place=None if file.data is None else real(path.parent / file.data.expanduser()),
        facts=facts,
        scheme="cv" if file.splits.folds else "file" if file.splits.file else _SCHEMES[file.splits.scheme],
        splits_file=file.splits.file and real(path.parent / file.splits.file.expanduser()),
        folds=file.splits.folds,
        source=text,
    )


def _check_preparation(file: TaskFile, path: Path) -> None:
    """Raise ConfigError for an option that the preparation does not have."""
    from ssl3d.data.prepared.steps import Preparation

    validate(Preparation, file.preparation, f"{path}: preparation")
