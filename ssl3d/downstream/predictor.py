"""A fine-tuned network with all that is needed to use it on new files.

A predictor's folder holds ``model.safetensors`` (backbone and head) and ``predictor.json`` (task,
labels, preparation, intensity, backbone, protocol), written last. Nothing is ever unpickled.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from ssl3d.config import BackboneConfig, DownstreamConfig
from ssl3d.data.adapters import image_suffix
from ssl3d.data.integrity import Finding
from ssl3d.data.prepare import Intensity, Preparation, PreparedCohort, logits_to_native_grid, prepare_file
from ssl3d.data.volume import write_like
from ssl3d.downstream.harness import (
    Classification,
    Mode,
    Segmentation,
    Standardize,
    make_problem,
    problem_class,
)
from ssl3d.downstream.tasks import Task
from ssl3d.environment import to_device
from ssl3d.errors import CheckpointError, ConfigError
from ssl3d.files import write_bytes, write_json
from ssl3d.models.checkpoint import load_tensors, load_weights, save_tensors
from ssl3d.models.factory import Backbone, build_backbone

if TYPE_CHECKING:
    from ssl3d.data.splits import Split

FACTS, MODEL, TABLE = "predictor.json", "model.safetensors", "predictions.csv"
FORMAT = 1


@dataclass(frozen=True)
class _OneCase:
    """One prepared image behind the part of a cohort's interface that prediction uses."""

    data: np.ndarray
    num_classes: int

    def image(self, i: int) -> np.ndarray:
        return self.data


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

    def predict(self, data: np.ndarray, device: torch.device) -> np.ndarray:
        """Return logits (K + 1, D, H, W), or the probability (), of a prepared image (D, H, W)."""
        cohort = cast(PreparedCohort, _OneCase(data, len(self.label_names) + 1))
        problem = make_problem(self.backbone, self.task, cohort, self.mode, self.downstream, device)
        return problem.predict(self.head, 0).float().numpy()

    def predict_files(
        self,
        files: Sequence[Path],
        out: Path,
        device: torch.device,
        progress: Callable[[int], None] | None = None,
    ) -> list[Finding]:
        """Predict every file that can be read, and return what is wrong with the others.

        A segmentation is written under the name and in the format of its image, on the image's grid.
        Classes go to ``predictions.csv``: file, probability of the positive class, prediction at 0.5.

        Raises:
            ConfigError: two outputs of one name, or an output that would replace its input.
        """
        self._check_names(files, out)
        to_device(self.backbone, device)
        to_device(self.head, device)
        findings: list[Finding] = []
        rows: list[tuple[str, str, int]] = []
        out.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(files):
            prepared = prepare_file(file, self.preparation, self.intensity)
            if isinstance(prepared, list):
                findings += prepared
            else:
                image, data, affine = prepared
                predicted = self.predict(data, device)
                if self.task.kind == "segmentation":
                    native = logits_to_native_grid(predicted, affine, image.native_affine, image.native_shape)
                    values = np.array([0, *self.label_values])
                    kind = np.min_scalar_type(values.max()) if values.min() >= 0 else np.dtype(np.int32)
                    write_like(out / file.name, values.astype(kind)[native], file)
                else:
                    rows.append((str(file), f"{float(predicted):.6f}", int(predicted >= 0.5)))
            if progress is not None:
                progress(number + 1)
        if self.task.kind == "classification":
            _write_table(out / TABLE, rows)
        return findings

    def _check_names(self, files: Sequence[Path], out: Path) -> None:
        if self.task.kind != "segmentation":
            return
        seen: dict[str, Path] = {}
        for file in files:
            if file.name in seen:
                raise ConfigError(
                    f"{seen[file.name]} and {file} would both be written to {out / file.name}: "
                    "predict them into two folders."
                )
            seen[file.name] = file
            if (out / file.name).resolve() == file.resolve():
                raise ConfigError(
                    f"--out {out} would replace {file} by its segmentation: choose another folder."
                )


def check_keepable(task: Task, cohort: PreparedCohort) -> None:
    """Raise ConfigError, before any training, for a task that new files cannot be predicted for."""
    if problem_class(task) not in {Segmentation, Classification}:
        raise ConfigError(
            f"Task {task.name} is neither a segmentation nor a yes or no for each volume: only these can be kept "
            "for prediction so far. Evaluate it with ssl3d bench."
        )
    if cohort.preparation.uses_labels:
        raise ConfigError(
            f'Task {task.name} crops to its labels (crop "label"), which a new file does not have: '
            "fine-tune with another crop."
        )


def save_predictor(
    folder: Path,
    backbone: Backbone,
    head: nn.Module,
    *,
    task: Task,
    mode: Mode,
    cohort: PreparedCohort,
    split: Split,
    config: DownstreamConfig,
    backbone_config: BackboneConfig,
    source: dict[str, Any],
) -> None:
    """Write a predictor.

    Args:
        folder: where to.
        backbone, head: the trained networks.
        task, mode, cohort, split, config: as they were evaluated (:func:`harness.evaluate`).
        backbone_config: architecture of the backbone.
        source: provenance of the pretrained weights, kept as it is.
    """
    check_keepable(task, cohort)
    weights = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    weights |= {f"head.{k}": v for k, v in head.state_dict().items()}
    save_tensors(folder / MODEL, weights)
    facts = {
        "format": FORMAT,
        "task": {key: getattr(task, key) for key in ("name", "title", "kind", "dataset", "metric", "counts")},
        "mode": mode,
        "label_names": list(cohort.label_names),
        "label_values": list(cohort.label_values),
        "preparation": cohort.preparation.model_dump(mode="json"),
        "intensity": asdict(cohort.intensity),
        "backbone": backbone_config.model_dump(mode="json"),
        "standardized": isinstance(head, nn.Sequential) and isinstance(head[0], Standardize),
        "downstream": config.model_dump(mode="json"),
        "data": cohort.fingerprint,
        "split": asdict(split),
        "source": source,
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
        facts = json.loads(path.read_text(encoding="utf-8"))
        task = Task(**{**facts["task"], "counts": tuple(facts["task"]["counts"])})
        backbone_config = BackboneConfig.model_validate(facts["backbone"])
        downstream = DownstreamConfig.model_validate(facts["downstream"])
        names = tuple(facts["label_names"])
        preparation, intensity = (
            Preparation.model_validate(facts["preparation"]),
            Intensity(**facts["intensity"]),
        )
        mode, values, standardized = facts["mode"], tuple(facts["label_values"]), facts["standardized"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. Fine-tune again.") from error
    backbone = build_backbone(backbone_config, seed=0)
    none = cast(PreparedCohort, _OneCase(np.zeros((1, 1, 1)), len(names) + 1))
    head = make_problem(backbone, task, none, mode, downstream, torch.device("cpu")).layer()
    if standardized:
        segments = task.kind == "segmentation"
        channels = backbone.local_channels if segments else backbone.global_channels
        head = nn.Sequential(Standardize(torch.zeros(channels), torch.ones(channels)), head)
    weights = load_tensors(folder / MODEL)
    load_weights(nn.ModuleDict({"backbone": backbone, "head": head}), weights, folder / MODEL)
    backbone.eval().requires_grad_(False)
    head.eval().requires_grad_(False)
    return Predictor(
        task, mode, names, values, preparation, intensity, backbone_config, downstream, backbone, head
    )


def expand_inputs(inputs: Sequence[Path]) -> list[Path]:
    """Return the files to predict: those named, and every volume directly in a folder named.

    Raises:
        ConfigError: a folder without a volume.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and image_suffix(p) is not None)
            if not inside:
                raise ConfigError(f"--input {path} holds no NIfTI, NRRD or MetaImage file.")
            files += inside
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _write_table(path: Path, rows: list[tuple[str, str, int]]) -> None:
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "probability", "prediction"))
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
