"""Weights in hand: ``ssl3d.load`` reads a run, an export or a predictor, and takes image files from there on.

The file is checked and prepared as the images of the weights' own training were; what is different about it is said in
the result (``notes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.data.cohort import Reading
from ssl3d.data.files.findings import Finding, raise_findings
from ssl3d.data.files.volume import Volume
from ssl3d.data.prepared.case import prepare_file
from ssl3d.data.prepared.facts import read_preparation, said_preparation
from ssl3d.data.prepared.steps import Intensity, Preparation
from ssl3d.device import select_device, to_device
from ssl3d.downstream.prediction import Prediction, input_notes, with_offset
from ssl3d.downstream.predictor import FACTS, Predictor, load_predictor
from ssl3d.errors import CheckpointError, ConfigError, ReadError
from ssl3d.files import read_json
from ssl3d.models.backbone import Backbone

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What a backbone says of one image.

    Attributes:
        image: the prepared image (D, H, W) float32 in [0, 1].
        affine: (4, 4), voxel index of ``image`` and of ``local_feature`` -> RAS+ mm.
        global_feature: f^g (C, d, h, w) float32, the bottleneck.
        global_affine: (4, 4), voxel index of f^g -> RAS+ mm.
        local_feature: f^l (C', D, H, W) float32; None where it was not asked for.
        notes: what is different about the image from those that the weights were trained on.
    """

    image: np.ndarray
    affine: np.ndarray
    global_feature: np.ndarray
    global_affine: np.ndarray
    local_feature: np.ndarray | None
    notes: tuple[str, ...] = ()

    @property
    def pooled(self) -> np.ndarray:
        """The mean of f^g over its voxels, (C,): one vector for the image, as classification reads it."""
        mean: np.ndarray = self.global_feature.mean(axis=(1, 2, 3))
        return mean


@dataclass(frozen=True, eq=False)
class PretrainedModel:
    """A backbone, how its images are prepared, and the head of a task where there is one.

    Attributes:
        backbone: in evaluation mode, on ``device``; ``backbone(x)`` takes prepared volumes (B, 1, D, H, W) in [0, 1].
        device: where it computes.
        preparation: facts of :func:`ssl3d.data.prepared.facts.preparation_facts`; None: the weights do not say.
        source: where the weights come from: method, steps, hash, identity, as far as it is known.
        place: what was loaded.
        predictor: of a fine-tuned run; None: there is no head.
    """

    backbone: Backbone
    device: torch.device
    preparation: dict[str, Any] | None
    source: dict[str, Any]
    place: str
    predictor: Predictor | None = None
    _crop: tuple[int, ...] = field(default=(), repr=False)

    def prepare(
        self, path: str | Path, *, affine: Any = None, channel: int | None = None, offset: float | None = None
    ) -> tuple[Volume, np.ndarray, np.ndarray]:
        """Check, read and prepare an image file as the images of the training were.

        Args:
            path: NIfTI, NRRD or MetaImage file, or a DICOM series (its folder, or one slice).
            affine: ``sform`` or ``qform``, where a NIfTI file has two that disagree.
            channel: which volume of a file with several.
            offset: added to the stored values of this CT in the place of the training's constant.

        Returns:
            The volume as read, the prepared image (D, H, W) in [0, 1], and its affine (4, 4).

        Raises:
            CheckpointError: the weights do not say how.
            DataError: the file cannot be used; everything that is wrong with it is listed, each with the fix.
        """
        preparation, intensity = self._preparation()
        intensity = with_offset(intensity, offset)
        reading = Reading(affine, channel)
        return _sound(prepare_file(Path(path), preparation, intensity, reading=reading))

    def _preparation(self) -> tuple[Preparation, Intensity]:
        return read_preparation(self.preparation, self.place)

    @torch.no_grad()
    def features(
        self, path: str | Path, *, local: bool = True, window: Sequence[int] | None = None, overlap: float = 0.5,
        affine: Any = None, channel: int | None = None, offset: float | None = None,
    ) -> ImageFeatures:  # fmt: skip
        """Read and prepare an image, and return f^g and f^l with their affines.

        Args:
            path, affine, channel, offset: see :meth:`prepare`.
            local: whether f^l is computed; without it the decoder is not run.
            window: edges (D, H, W) in voxels; f^l is then computed window by window and blended, as in the segmentations
                of the bench, which a large image needs. None: the whole image at once. f^g is of the whole image.
            overlap: of windows, a share of their edges.

        Raises:
            CheckpointError, DataError: see :meth:`prepare`.
        """
        volume, data, grid = self.prepare(path, affine=affine, channel=channel, offset=offset)
        x = torch.from_numpy(data)[None, None].to(self.device)  # (1, 1, D, H, W)
        least, size = self.backbone.minimum_edge(), x.shape[2:]
        x = F.pad(x, [n for edge in reversed(size) for n in (0, max(0, least - edge))])  # (1, 1, >= least)
        stages = self.backbone.encode(x)
        coarse = stages[-1]  # (1, C, d, h, w)
        fine: Tensor | None = None
        if local and window is None:
            fine = self.backbone.decode(stages)  # (1, C', >= D, >= H, >= W)
        elif local and window is not None:
            fine = self._by_windows(x, window, overlap)
        if fine is not None:
            fine = fine[..., : size[0], : size[1], : size[2]]  # (1, C', D, H, W)
        place = self.backbone.global_grid(tuple(x.shape[2:]), tuple(coarse.shape[2:]))
        notes = input_notes(volume, data.shape, (self.preparation or {}).get("native_mm"), self._crop)
        return ImageFeatures(
            data, grid, _array(coarse), grid @ place, None if fine is None else _array(fine), tuple(notes)
        )

    def _by_windows(self, x: Tensor, window: Sequence[int], overlap: float) -> Tensor:
        from monai.inferers import sliding_window_inference

        result = sliding_window_inference(
            x, tuple(window), 1, lambda part: self.backbone(part)[1].float(), overlap=overlap, mode="gaussian"
        )
        assert isinstance(result, Tensor)
        return result

    def predict(
        self, path: str | Path, *, affine: Any = None, channel: int | None = None, offset: float | None = None
    ) -> Prediction:
        """Return what a fine-tuned run says of an image, whatever the kind of its task.

        Args:
            path, affine, channel, offset: see :meth:`prepare`.

        Raises:
            ConfigError: there is no head: a pretrained backbone predicts nothing.
            DataError: see :meth:`prepare`.
        """
        if self.predictor is None:
            raise ConfigError(
                f"{self.place} is a backbone without a head, which predicts nothing. Fix: ssl3d finetune --checkpoint "
                f"{self.place} --task TASK --out predictor, and load that folder."
            )
        intensity = with_offset(self.predictor.intensity, offset)
        return _sound(
            self.predictor.predict_file(Path(path), self.device, Reading(affine, channel), intensity)
        )

    def segment(self, path: str | Path, **reading: Any) -> Prediction:
        """Return :meth:`predict` of a run that was fine-tuned for a segmentation.

        Raises:
            ConfigError: it was fine-tuned for something else, or not at all.
        """
        self._demand("segment", ("segmentation",))
        return self.predict(path, **reading)

    def classify(self, path: str | Path, **reading: Any) -> Prediction:
        """Return :meth:`predict` of a run that was fine-tuned for a classification.

        Raises:
            ConfigError: it was fine-tuned for something else, or not at all.
        """
        self._demand("classify", ("classification", "multilabel"))
        return self.predict(path, **reading)

    def _demand(self, what: str, kinds: tuple[str, ...]) -> None:
        if self.predictor is not None and self.predictor.task.kind not in kinds:
            kind = self.predictor.task.kind
            right = {"segmentation": "segment", "regression": "predict"}.get(kind, "classify")
            raise ConfigError(
                f"{self.place} was fine-tuned for {self.predictor.task.name}, a {kind}: use model.{right}(...), not "
                f"model.{what}(...)."
            )


def load(
    name_or_path: str | Path, *, device: str = "auto", preparation: dict[str, Any] | None = None
) -> PretrainedModel:
    """Load weights with everything that is needed to use them on image files.

    Args:
        name_or_path: a folder written by ``ssl3d pretrain``, ``finetune``, ``import`` or ``export`` (``safetensors``,
            ``torch`` or ``huggingface``), or ``hf-hub:OWNER/NAME``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        preparation: options of :class:`ssl3d.data.prepared.steps.Preparation`, in the place of what the weights say;
            imported weights say nothing. Not for a fine-tuned run, whose head has seen its own preparation alone.

    Raises:
        CheckpointError: there are no weights, they are damaged, or the run is not finished.
        ConfigError: a device that is not there, or a preparation that cannot be used.

    Example::

        model = ssl3d.load("runs/gvsl")
        features = model.features("scan.nii.gz")
        features.global_feature, features.local_feature, features.affine
    """
    from ssl3d.models.weights.checkpoint import RUN, read_run
    from ssl3d.models.weights.create import HUB, create_model
    from ssl3d.models.weights.export import CONFIG

    folder, name = Path(name_or_path), str(name_or_path)
    where = select_device(device)
    if (folder / FACTS).is_file():
        return _of_predictor(folder, where, preparation)
    if name.startswith(HUB):
        from ssl3d.models.weights.hub import download

        folder = download(name.removeprefix(HUB))
    elif not folder.is_dir():
        raise CheckpointError(
            f'"{name}" is no folder. Give one written by ssl3d pretrain, finetune, import or export, or '
            f"{HUB}OWNER/NAME; ssl3d.create_model makes a backbone with fresh weights."
        )
    backbone = create_model(folder)
    if (folder / RUN).is_file():
        facts = read_run(folder)
        source = {key: facts.get(key) for key in ("method_name", "steps", "weights_sha256", "identity")}
    else:
        try:
            facts = read_json(folder / CONFIG)
        except ReadError as error:
            raise CheckpointError(str(error)) from error
        source = facts.get("source") or {}
    budget = ((source.get("identity") or {}).get("pretrain") or {}).get("budget") or {}
    backbone.eval().requires_grad_(False)
    to_device(backbone, where)
    known = facts.get("preparation") if preparation is None else said_preparation(preparation)
    return PretrainedModel(backbone, where, known, source, name, _crop=tuple(budget.get("crop") or ()))


def _of_predictor(folder: Path, device: torch.device, preparation: dict[str, Any] | None) -> PretrainedModel:
    if preparation is not None:
        raise ConfigError(
            f"preparation: {folder} is fine-tuned, and its head fits the preparation of its training. Leave it out."
        )
    predictor = load_predictor(folder)
    for module in (predictor.backbone, predictor.head):
        to_device(module, device)
    return PretrainedModel(
        predictor.backbone, device, predictor.preparation_facts, predictor.source, str(folder), predictor,
        tuple(predictor.downstream.crop),
    )  # fmt: skip


def _sound(found: T | list[Finding]) -> T:
    """Return what was found; raise DataError for what is wrong with the file."""
    if isinstance(found, list):
        raise_findings(found)
        raise AssertionError("a file that is refused without a finding")
    return found


def _array(x: Tensor) -> np.ndarray:
    """Return (1, C, ...) as an array (C, ...) float32."""
    array: np.ndarray = x[0].float().cpu().numpy()
    return array
