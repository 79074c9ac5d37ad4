"""A fine-tuned network with all that is needed to use it on new files.

A predictor's folder holds ``model.safetensors`` (backbone and head) and ``predictor.json`` (task,
labels, preparation, intensity, backbone, protocol), written last. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from ssl3d.config import BackboneConfig, DownstreamConfig
from ssl3d.data.cohort import ANY_READING, Reading
from ssl3d.data.files.dicom import is_dicom, series_of
from ssl3d.data.files.findings import Finding
from ssl3d.data.files.suffixes import image_suffix
from ssl3d.data.layouts.releases import Folder
from ssl3d.data.prepared.arrays import Where
from ssl3d.data.prepared.case import prepare_file
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.facts import ORIENTATION, preparation_differences, preparation_facts
from ssl3d.data.prepared.grids import logits_to_native_grid
from ssl3d.data.prepared.steps import Intensity, Preparation
from ssl3d.device import to_device
from ssl3d.downstream.prediction import Prediction, input_notes, with_offset
from ssl3d.downstream.problems.kinds import make_problem
from ssl3d.downstream.problems.problem import Mode
from ssl3d.downstream.tasks import Task
from ssl3d.errors import CheckpointError, ConfigError, ReadError, count, printable
from ssl3d.files import read_json, real, write_bytes, write_json
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.checkpoint import load_tensors, load_weights, save_tensors
from ssl3d.progress import say
from ssl3d.spreadsheet import csv_text

if TYPE_CHECKING:
    from ssl3d.downstream.harness import Evaluation

FACTS, MODEL, TABLE, NOTES = "predictor.json", "model.safetensors", "predictions.csv", "notes.json"
FORMAT = 2


@dataclass(frozen=True)
class _OneCase:
    """One prepared image behind the part of a cohort's interface that prediction uses."""

    data: np.ndarray
    num_classes: int
    target_names: dict[int, str]

    def image(self, i: int, where: Where = ...) -> np.ndarray:
        return self.data[where]


@dataclass(frozen=True)
class Predictor:
    """A backbone and a head, with the preparation and the protocol of their training.

    Attributes:
        task: what is predicted.
        mode: how it was trained; decides where windows are blended (features or logits).
        label_names, label_values: structures of a segmentation, and what is written for each.
        preparation, intensity: how images are prepared.
        backbone_config: to build the backbone again.
        downstream: window, overlap, precision.
        backbone, head: the networks, in evaluation mode.
        target_names: the classes in order, where there are any and they have names.
        source: where the pretrained weights come from.
        native_mm: smallest and largest edge of a voxel in the files of the training; None: not known.
    """

    task: Task
    mode: Mode
    label_names: tuple[str, ...]
    label_values: tuple[int, ...]
    preparation: Preparation
    intensity: Intensity
    backbone_config: BackboneConfig
    downstream: DownstreamConfig
    backbone: Backbone
    head: nn.Module
    target_names: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    native_mm: list[float] | None = None

    @property
    def preparation_facts(self) -> dict[str, Any]:
        """How images are prepared, as runs have it (:func:`ssl3d.data.prepared.facts.preparation_facts`)."""
        return {
            "orientation": ORIENTATION,
            "parameters": self.preparation.model_dump(mode="json"),
            "intensity": asdict(self.intensity),
            "native_mm": self.native_mm,
        }

    def predict(self, data: np.ndarray, device: torch.device) -> np.ndarray:
        """Return what the network says of a prepared image (D, H, W), see :meth:`Problem.predict`.

        Args:
            data: the prepared image.
            device: where backbone and head are; move them once with
                :func:`~ssl3d.device.to_device`, as :meth:`predict_files` does.
        """
        cohort = _one_case(data, self.label_names, self.target_names)
        problem = make_problem(self.backbone, self.task, cohort, self.mode, self.downstream, device)
        return problem.predict(self.head, 0).float().numpy()

    def predict_file(
        self,
        file: Path,
        device: torch.device,
        reading: Reading = ANY_READING,
        intensity: Intensity | None = None,
    ) -> Prediction | list[Finding]:
        """Return what the network says of an image file, or what is wrong with the file.

        Args:
            file: the file, or a DICOM series.
            device: where backbone and head are.
            reading: what to take of a file that leaves a choice.
            intensity: scaling and offset of this file, in the place of the training's.
        """
        prepared = prepare_file(file, self.preparation, intensity or self.intensity, reading=reading)
        if isinstance(prepared, list):
            return prepared
        image, data, affine = prepared
        predicted = self.predict(data, device)
        notes = tuple(input_notes(image, data.shape, self.native_mm, self.downstream.crop))
        if self.task.kind != "segmentation":
            probabilities, chosen = self._said(predicted)
            return Prediction(
                file, image.native_affine, probabilities=probabilities, prediction=chosen, notes=notes
            )
        native = logits_to_native_grid(predicted, affine, image.native_affine, image.native_shape)
        values = np.array([0, *self.label_values])
        kind = np.min_scalar_type(values.max()) if values.min() >= 0 else np.dtype(np.int32)
        named = dict(zip(self.label_values, self.label_names, strict=True))
        return Prediction(
            file, image.native_affine, values.astype(kind)[native], named, notes=notes,
            said_affine=reading.affine is not None,
        )  # fmt: skip

    def _said(self, predicted: np.ndarray) -> tuple[dict[str, float], str | float | tuple[str, ...]]:
        """Return the probabilities by class and what they amount to, or a number."""
        if self.task.kind == "regression":
            return {}, float(predicted)
        if predicted.ndim == 0:  # two classes
            names, p = self.target_names or ("0", "1"), float(predicted)
            return {names[0]: 1 - p, names[1]: p}, names[int(p >= 0.5)]
        named = dict(zip(self.target_names, predicted.tolist(), strict=True))
        if self.task.kind == "multilabel":
            return named, tuple(name for name, p in named.items() if p >= 0.5)
        return named, max(named, key=named.__getitem__)

    def predict_files(
        self,
        files: Iterable[Path],
        out: Path,
        device: torch.device,
        progress: Callable[[int], None] | None = None,
        reading: Reading = ANY_READING,
        offset: float | None = None,
    ) -> list[Finding]:
        """Predict every file that can be read, and return what is wrong with the others.

        A segmentation is written under the name and in the format of its image, on the image's grid;
        that of a DICOM series as NIfTI under the name of its folder. Classes and numbers go to
        ``predictions.csv``, one row a file. What is different about an image from those of the training goes to
        ``notes.json``, where there is anything.

        Args:
            files: the files; a mapping says below which folder of ``out`` the segmentation of each goes.
            out: folder of the results.
            device: where to compute.
            progress: told how many files are done.
            reading: what to take of a file that leaves a choice.
            offset: added to the stored values of these CTs in the place of the training's constant.

        Raises:
            ConfigError: an offset for volumes without a unit, two outputs of one name, or an output that would
                replace its input.
        """
        folders = files if isinstance(files, Mapping) else dict.fromkeys(files, Path())
        outputs = self._outputs(folders, out)
        intensity = with_offset(self.intensity, offset)
        to_device(self.backbone, device)
        to_device(self.head, device)
        findings: list[Finding] = []
        rows: list[dict[str, Any]] = []
        notes: dict[str, list[str]] = {}
        out.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(folders):
            found = self.predict_file(file, device, reading, intensity)
            if isinstance(found, list):
                findings += found
            else:
                if found.labels is None:
                    rows.append({"file": str(file), **self._row(found)})
                else:
                    outputs[file].parent.mkdir(parents=True, exist_ok=True)
                    found.save(outputs[file])
                if found.notes:
                    notes[str(file)] = list(found.notes)
            if progress is not None:
                progress(number + 1)
        if self.task.kind != "segmentation":
            _write_table(out / TABLE, rows)
        (out / NOTES).unlink(missing_ok=True)  # of an earlier call
        if notes:
            write_json(out / NOTES, notes)
        return findings

    def _row(self, found: Prediction) -> dict[str, Any]:
        """Return the columns of one file: probabilities and what they amount to, or a number."""
        if self.task.kind == "regression":
            return {"prediction": f"{found.prediction:.6g}"}
        if self.task.kind == "classification" and len(found.probabilities) == 2:
            _, probability = found.probabilities.values()
            positive = list(found.probabilities).index(str(found.prediction))
            row = {"probability": f"{probability:.6f}", "prediction": positive}
            return {**row, "class": found.prediction} if self.target_names else row
        chosen = found.prediction
        if isinstance(chosen, tuple):  # as the column class of a CSV cohort has it
            chosen = ";".join(chosen) or "none"
        columns = {f"probability_{name}": f"{p:.6f}" for name, p in found.probabilities.items()}
        return {**columns, "prediction": chosen}

    def _outputs(self, files: Mapping[Path, Path], out: Path) -> dict[Path, Path]:
        """Return where the segmentation of each file goes; refuse what would be written over."""
        if self.task.kind != "segmentation":
            return {}
        outputs: dict[Path, Path] = {}
        seen: dict[Path, Path] = {}
        for file in files:
            target = outputs[file] = out / files[file] / _output_name(file)
            if target in seen:
                raise ConfigError(
                    f"{seen[target]} and {file} would both be written to {target}: "
                    "predict them into two folders."
                )
            seen[target] = file
            if real(target) == real(file):
                raise ConfigError(
                    f"--out {out} would replace {file} by its segmentation: choose another folder."
                )
        return outputs


def _one_case(data: np.ndarray, label_names: Sequence[str], target_names: Sequence[str]) -> PreparedCohort:
    return cast(PreparedCohort, _OneCase(data, len(label_names) + 1, dict(enumerate(target_names))))


def _output_name(file: Path) -> str:
    """Return the name of a file's segmentation: the file's own, or that of the folder of a DICOM series."""
    if image_suffix(file) is not None:
        return file.name
    folder = file if file.is_dir() else file.parent
    name = real(folder).name
    if not file.is_dir() and is_dicom(file) and len(series := list(series_of(folder).values())) > 1:
        name += f"-series{next((n for n, files in enumerate(series, 1) if file.absolute() in files), 0)}"
    return f"{name}.nii.gz"


def check_keepable(task: Task, cohort: PreparedCohort) -> None:
    """Raise ConfigError, before any training, for a task that new files cannot be predicted for."""
    if cohort.preparation.uses_labels:
        raise ConfigError(
            f'Task {task.name} crops to its labels (crop "label"), which a new file does not have: '
            "fine-tune with another crop."
        )


def save_predictor(
    folder: Path,
    backbone: Backbone,
    head: nn.Module,
    evaluation: Evaluation,
    backbone_config: BackboneConfig,
    source: dict[str, Any],
) -> None:
    """Write a predictor.

    Args:
        folder: where to.
        backbone, head: the trained networks.
        evaluation: what they were evaluated on and how (:func:`harness.evaluate`).
        backbone_config: architecture of the backbone.
        source: provenance of the pretrained weights, kept as it is, with what their preparation has other than
            this task's (``differences``).
    """
    task, cohort = evaluation.task, evaluation.cohort
    check_keepable(task, cohort)
    prepared = preparation_facts(cohort)
    weights = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    weights |= {f"head.{k}": v for k, v in head.state_dict().items()}
    save_tensors(folder / MODEL, weights)
    facts = {
        "format": FORMAT,
        "task": {key: getattr(task, key) for key in ("name", "title", "kind", "dataset", "metric", "counts")},
        "mode": evaluation.mode,
        "label_names": list(cohort.label_names),
        "label_values": list(cohort.label_values),
        "target_names": [cohort.target_names[k] for k in sorted(cohort.target_names)],
        "preparation": cohort.preparation.model_dump(mode="json"),
        "intensity": asdict(cohort.intensity),
        "native_mm": prepared and prepared["native_mm"],
        "backbone": backbone_config.model_dump(mode="json"),
        "downstream": evaluation.config.model_dump(mode="json"),
        "data": cohort.fingerprint,
        "split": asdict(evaluation.split),
        "source": {
            **source,
            "differences": preparation_differences(source.get("preparation"), prepared),
        },
    }
    write_json(folder / FACTS, facts)


def load_predictor(folder: Path) -> Predictor:
    """Load a predictor.

    Raises:
        CheckpointError: there is none in ``folder``, or it is damaged.
    """
    path = folder / FACTS
    if not path.is_file():
        raise CheckpointError(f'{folder} holds no {FACTS}; give a folder written by "ssl3d finetune --out".')
    try:
        facts = read_json(path)
        if facts["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {facts['format']}, of another ssl3d; this one reads {FORMAT}. Fine-tune again."
            )
        counts = facts["task"]["counts"]
        task = Task(**{**facts["task"], "counts": counts and tuple(counts)})
        backbone_config = BackboneConfig.model_validate(facts["backbone"])
        downstream = DownstreamConfig.model_validate(facts["downstream"])
        names = tuple(facts["label_names"])
        preparation, intensity = (
            Preparation.model_validate(facts["preparation"]),
            Intensity(**facts["intensity"]),
        )
        mode, values, targets = facts["mode"], tuple(facts["label_values"]), tuple(facts["target_names"])
        source, native_mm = facts.get("source") or {}, facts.get("native_mm")
        if not isinstance(source, dict) or not isinstance(native_mm, list | None):
            raise TypeError("source or native_mm")
        backbone = build_backbone(backbone_config, seed=0)
        none = _one_case(np.zeros((1, 1, 1)), names, targets)
        problem = make_problem(backbone, task, none, mode, downstream, torch.device("cpu"))
        head = problem.empty_head()
    except ReadError as error:
        raise CheckpointError(f"{error} Fine-tune again.") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. Fine-tune again.") from error
    weights = load_tensors(folder / MODEL)
    load_weights(nn.ModuleDict({"backbone": backbone, "head": head}), weights, folder / MODEL)
    backbone.eval().requires_grad_(False)
    head.eval().requires_grad_(False)
    return Predictor(
        task,
        mode,
        names,
        values,
        preparation,
        intensity,
        backbone_config,
        downstream,
        backbone,
        head,
        targets,
        source,
        native_mm,
    )


def expand_inputs(inputs: Sequence[Path], out: Path | None = None) -> dict[Path, Path]:
    """Return the files to predict, those named and what lies in a folder named, each with the folder of its result.

    In a folder that is what pretraining would read of it (:class:`ssl3d.data.layouts.releases.Folder`): every volume and
    every DICOM series at any depth, the latter named by one of its slices. Hidden files and segmentations are left out,
    with a word.

    Args:
        inputs: files and folders.
        out: folder of the results; what an earlier call wrote to it is no input.

    Returns:
        file -> folder of its result, relative to the output: below it lies as it did below the folder named.

    Raises:
        ConfigError: a folder without a volume.
    """
    files: dict[Path, Path] = {}
    for path in inputs:
        if not os.path.isdir(path):  # noqa: PTH112 (pathlib's raises for a name that is too long)
            files.setdefault(path, Path())
            continue
        images, series, left_out = Folder.sort_out(path)
        hidden = [entry for entry in left_out if image_suffix(entry.path) is not None]
        if hidden:
            shown = ", ".join(f"{entry.path.relative_to(path)} {entry.reason}" for entry in hidden[:3])
            say(
                f"{path}: {count(len(hidden), 'image')} left out: {printable(shown)}{', ...' * (len(hidden) > 3)}"
            )
        if not images and not series:
            raise ConfigError(f"--input {path} holds no NIfTI, NRRD or MetaImage file, and no DICOM series.")
        own = out.absolute() if out is not None and path.absolute() in out.absolute().parents else None
        for image in (image for image in images if own is None or own not in image.absolute().parents):
            files.setdefault(image, image.parent.relative_to(path))
        for first in series.values():
            files.setdefault(first, Path() if first.parent == path else first.parent.parent.relative_to(path))
    return files


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    write_bytes(path, csv_text(list(rows[0]) if rows else ["file"], rows).encode())
