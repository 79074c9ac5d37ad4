"""The bench: every method, task, mode and seed becomes one record; finished cells are skipped.

This is the only module that knows both ends: it hands checkpoints of the pretraining loop to the
downstream harness, and the harness's outcomes to the store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl3d.config import Settings
from ssl3d.downstream.harness import MODES, Mode, evaluate
from ssl3d.downstream.tasks import Task
from ssl3d.environment import device_name, environment
from ssl3d.errors import CheckpointError
from ssl3d.models.checkpoint import RUN, load_backbone, read_run, weights_fingerprint
from ssl3d.pretrain.loop import pretrain, pretrain_identity
from ssl3d.pretrain.method import MethodSpec
from ssl3d.results.store import ResultStore

if TYPE_CHECKING:
    from ssl3d.data.overlap import Overlap
    from ssl3d.data.prepare import PreparedCohort
    from ssl3d.data.splits import Split


@dataclass(frozen=True)
class TaskData:
    """A task with its prepared cases and splits (several for cross-validation).

    ``overlaps``: fingerprint of volumes for pretraining -> test images that are among them, allowed by
    the user. ``None`` for volumes that could not be looked at.
    """

    task: Task
    cohort: PreparedCohort
    splits: list[Split]
    overlaps: Mapping[str, tuple[Overlap, ...] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Everything that a bench runs over.

    Attributes:
        methods: the rows.
        tasks: the columns, prepared.
        modes: linear, finetune, or both.
        seeds: one seed covers initialisation, pretraining and probe; splits stay fixed.
        settings: the preset.
        pretraining: unlabelled volumes; None when no method needs any.
        checkpoints: run folders to evaluate instead of pretraining, by method name.
        store: where records and runs go.
        device: where to compute.
        at_steps: pretraining steps whose weights are evaluated too, for curves; they need
            ``pretrain.keep_checkpoints``. None stands for the end.
    """

    methods: list[MethodSpec]
    tasks: list[TaskData]
    modes: list[Mode]
    seeds: list[int]
    settings: Settings
    pretraining: PreparedCohort | None
    checkpoints: dict[str, Path]
    store: ResultStore
    device: torch.device
    at_steps: tuple[int | None, ...] = (None,)

    def run(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Yield (record, computed now) for every cell, in the order of seeds, methods, tasks.

        A method is pretrained when its first unfinished cell is reached, and only then; an
        interrupted pretraining goes on where it stopped.
        """
        for seed in self.seeds:
            for spec in self.methods:
                for data in self.tasks:
                    for mode in self.modes:
                        for split in data.splits:
                            for step in self.at_steps if spec.cls.trains != "none" else (None,):
                                yield self._cell(spec, data, mode, split, seed, step)

    def _cell(
        self, spec: MethodSpec, data: TaskData, mode: Mode, split: Split, seed: int, step: int | None
    ) -> tuple[dict[str, Any], bool]:
        identity = self._identity(spec, data, mode, split, seed)
        if step is not None:
            identity["pretrain_step"] = step
        with self.store.claim(identity):
            if self.store.has(identity):
                return self.store.read(self.store.path_for(identity)), False
            folder = self._pretrained(spec, seed)
            run = read_run(folder)
            backbone = load_backbone(folder, expected=self.settings.backbone, step=step)
            at = "" if step is None else f", step {step}"
            share = 1.0 if step is None else step / run["steps"]
            weights = weights_fingerprint(backbone)  # before fine-tuning changes them
            outcome = evaluate(
                backbone, data.task, data.cohort, split, mode, self.settings.downstream, seed, self.device,
                label=f"{spec.name}{at}, {data.task.name} {mode}, seed {seed}, {split.name}",
            )  # fmt: skip
            record = {
                "schema": 1,
                "identity": identity,
                "method": {
                    "title": spec.title,
                    "trains": spec.cls.trains,
                    "notes": self._notes(spec, data, identity),
                },
                "preset": self.settings.preset,
                "metric": data.task.metric,
                "score": outcome.score,
                "per_case": outcome.per_case,
                "excluded": outcome.excluded,
                "left_out": {"task": data.cohort.skipped, "pretraining": self._left_out(spec)},
                "overlap": [asdict(overlap) for overlap in self._overlap(data, identity) or ()],
                "validation": outcome.validation,
                "best_step": outcome.best_step,
                "cost": {
                    "pretrain_steps": round(share * run["steps"]),
                    "pretrain_seconds": share * run["seconds"],
                    "voxels_seen": round(share * run["voxels_seen"]),
                    "pretrain_parameters": run["parameters_trained"],
                    "pretrain_device": run["device"],
                    "downstream_seconds": outcome.seconds,
                    "device": device_name(self.device),
                    "peak_memory_mib": outcome.peak_memory_mib,
                    "parameters_trained": outcome.parameters_trained,
                },
                "environment": environment(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "checkpoint": str(folder),
                "fingerprint_of_weights": weights,
            }
            self.store.write(record)
            return record, True

    def _identity(
        self, spec: MethodSpec, data: TaskData, mode: Mode, split: Split, seed: int
    ) -> dict[str, Any]:
        if spec.name in self.checkpoints:
            source = read_run(self.checkpoints[spec.name])
            pretraining = source["identity"] if source.get("status") == "finished" else None
        else:
            pretraining = self._pretrain_identity(spec, seed)
        downstream = self.settings.downstream
        protocol = downstream.model_dump(
            mode="json", exclude={*MODES, "feature_budget_mib", "feature_disk_mib"}
        )
        return {
            "method": spec.name,
            "method_config": spec.identity()["config"],
            "backbone": self.settings.backbone.model_dump(mode="json"),
            "pretrain": pretraining and pretraining["pretrain"],
            # A checkpoint from elsewhere may carry another seed than the probe.
            "pretrain_seed": pretraining and pretraining["seed"],
            "task": data.task.name,
            "task_data": data.cohort.fingerprint,
            "split": split.name,
            "split_cases": _digest([split.train, split.val, split.test]),
            "mode": mode,
            "seed": seed,
            "label_fraction": 1.0,
            "budget": {**protocol, **getattr(downstream, mode).model_dump(mode="json")},
        }

    def _pretrain_identity(self, spec: MethodSpec, seed: int) -> dict[str, Any]:
        fingerprint = self.pretraining.fingerprint if self.pretraining else ""
        return pretrain_identity(spec, self.settings, fingerprint, seed)

    def _pretrained(self, spec: MethodSpec, seed: int) -> Path:
        """Return the folder of the finished run, pretraining first where there is none."""
        if spec.name in self.checkpoints:
            return self.checkpoints[spec.name]
        identity = self._pretrain_identity(spec, seed)
        folder = self.store.root / "runs" / f"{spec.name}-s{seed}-{_digest(identity)}"
        with self.store.claim({"run": identity}):
            pretrain(
                spec,
                self.pretraining,
                self.settings,
                seed,
                folder,
                self.device,
                resume=(folder / RUN).is_file(),
            )
        return folder

    def _left_out(self, spec: MethodSpec) -> list[dict[str, str]]:
        """Return the bad volumes that ``spec`` was pretrained without."""
        here = spec.cls.trains != "none" and spec.name not in self.checkpoints
        return self.pretraining.skipped if here and self.pretraining is not None else []

    @staticmethod
    def _overlap(data: TaskData, identity: dict[str, Any]) -> tuple[Overlap, ...] | None:
        """Return the test images that the cell's backbone has seen; None if nobody can tell."""
        seen = (identity["pretrain"] or {}).get("data")
        return data.overlaps.get(seen, ()) if seen else ()

    def _notes(self, spec: MethodSpec, data: TaskData, identity: dict[str, Any]) -> list[str]:
        notes = []
        if spec.cls.trains == "encoder" and data.task.kind == "segmentation":
            notes.append("decoder random")
        overlap = self._overlap(data, identity)
        if overlap is None:
            notes.append("volumes for pretraining are not there to look for test images among them")
        elif overlap:
            people = len({one.test for one in overlap})
            notes.append(f"test images among the volumes for pretraining: {people}")
        if data.cohort.skipped:
            notes.append(f"bad cases left out: {len({case['id'] for case in data.cohort.skipped})}")
        if data.cohort.preparation.uses_labels:
            notes.append("cropped to the labelled structures, which a new image does not have")
        return notes


def check_checkpoints(checkpoints: dict[str, Path], settings: Settings) -> None:
    """Raise CheckpointError, before any training, for a checkpoint that the bench cannot use."""
    problems = []
    for name, folder in checkpoints.items():
        try:
            load_backbone(folder, expected=settings.backbone)
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise CheckpointError("\n".join(problems))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
