"""A cell of the bench: one number, what decides it (its identity), and what is written down of it (its record).

Both are made here and nowhere else, from the run whose weights are scored, so that they cannot disagree. A cell whose
weights the bench pretrains itself is identified by what decides those weights; its run must then say the same of itself.
A cell whose weights are given (``--checkpoint``) is identified by what the run says of itself, and by a hash of the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl3d.bench.stale import run_of
from ssl3d.config import BackboneConfig, Model, Settings, identity_values
from ssl3d.data.prepared.facts import preparation_differences, preparation_facts
from ssl3d.data.splits import nested_fraction
from ssl3d.downstream.harness import Outcome
from ssl3d.downstream.problems.kinds import problem_class
from ssl3d.downstream.problems.problem import MODES, Mode
from ssl3d.downstream.tasks import Task
from ssl3d.environment import device_name, environment
from ssl3d.errors import CheckpointError, DataError
from ssl3d.models.weights.checkpoint import load_backbone, read_run, weights_fingerprint
from ssl3d.pretrain.loop import pretrain_identity
from ssl3d.pretrain.spec import MethodSpec
from ssl3d.results.store.record import SCHEMA
from ssl3d.source_hash import evaluation_code

if TYPE_CHECKING:
    from ssl3d.data.checks.overlap import Overlap
    from ssl3d.data.prepared.cohort import PreparedCohort
    from ssl3d.data.splits import Split


_EXCLUDED = "volumes left out of pretraining, of people who are tested: {}"


@dataclass(frozen=True)
class TaskData:
    """A task with its prepared cases and splits (several for cross-validation).

    ``overlaps``: fingerprint of volumes for pretraining -> test images that are among them, allowed by
    the user. ``None`` for volumes that could not be looked at.
    """

    task: Task
    cohort: PreparedCohort
    splits: list[Split]
    place: Path | None = None
    """Root of the release on disk; None: phantoms."""
    overlaps: Mapping[str, tuple[Overlap, ...] | None] = field(default_factory=dict)
    twins: tuple[Overlap, ...] = ()
    """Test images that are among the training and validation images under another subject, allowed by the user."""

    def split_for(self, split: Split, fraction: float, settings: Settings) -> Split:
        """Return ``split`` with ``fraction`` of its training subjects; refuses one that lacks a class."""
        try:
            return nested_fraction(split, self.cohort.cases, fraction, settings.data.split_seed)
        except DataError as error:
            raise DataError(f"--label-fractions {fraction:g} of task {self.task.name}: {error}") from None


# --- Weights ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The weights that a cell scores, as far as they are known before they are there.

    Attributes:
        spec: the row that they stand in.
        identity: what decides them, as :func:`ssl3d.pretrain.loop.pretrain_identity` and ``run.json`` have it.
        config: of the method in that identity; empty for released weights, of which it is not known.
        trains: parts of the backbone that were trained.
        match: what the methods' pretrainings have in common besides steps, if anything.
        folder: of the run that was given; None where the bench pretrains.
        digest: hash of weights that were given.
        notes: what a table must say of them.
        left_out: bad volumes that they were pretrained without, where that is known.
    """

    spec: MethodSpec
    identity: dict[str, Any]
    config: dict[str, Any]
    trains: str
    match: dict[str, Any] | None = None
    folder: Path | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[dict[str, str], ...] = ()

    def check(self, run: Mapping[str, Any], folder: Path) -> None:
        """Refuse a run that says something else of itself than the cell does.

        Raises:
            CheckpointError: it does.
        """
        if run["identity"] != self.identity:
            raise CheckpointError(
                f"{folder} holds another run than its name says: its run.json was changed, or the folder moved here. "
                "Delete the folder, and bench pretrains again."
            )


def planned_weights(
    spec: MethodSpec, settings: Settings, data: str, seed: int, match: dict[str, Any] | None = None
) -> Weights:
    """Return the weights that a pretraining with ``settings`` (the method's own) will give.

    Args:
        spec: the method.
        settings: with the method's rate and steps.
        data: fingerprint of the volumes.
        seed: of the run.
        match: see :class:`Weights`.
    """
    identity = pretrain_identity(spec, settings, data, seed)
    match = match if identity["pretrain"] else None
    return Weights(spec, identity, identity["method"]["config"], spec.cls.trains, match)


def given_weights(
    spec: MethodSpec, folder: Path, expected: BackboneConfig, step: int | None = None
) -> Weights:
    """Return the weights of a run that was given for the row of ``spec``.

    Args:
        spec: the row.
        folder: of the finished run.
        expected: the backbone of the preset.
        step: the weights kept after that many steps; None: the last.

    Raises:
        CheckpointError: there is no finished run, it is of another method or backbone, or its weights are not
            those that it says it ended with.
    """
    backbone = load_backbone(folder, expected=expected, step=step)
    run = read_run(folder)
    name = str(run.get("method_name"))
    if name != spec.name:
        raise CheckpointError(
            f"--checkpoint {spec.name}={folder}: the run is of the method {name}, not {spec.name}, so its score cannot "
            f"stand in that row. Give it to its own: --methods {name} --checkpoint {name}={folder}"
        )
    digest = weights_fingerprint(backbone)
    if step is None and digest != run["weights_sha256"]:
        raise CheckpointError(
            f"{folder}: the weights are not those that its run.json describes (hash {digest[:12]}, not "
            f"{run['weights_sha256'][:12]}): one of the two files was replaced. Restore it, or pretrain again."
        )
    own: dict[str, Any] = run["identity"]["method"]["config"] or {}
    config = spec.identity()["config"]
    differing = sorted(key for key in config.keys() | own.keys() if own and own.get(key) != config.get(key))
    notes = [f"weights of a run with {', '.join(f'{k} = {own.get(k)}' for k in differing)}"] * bool(differing)
    if run.get("excluded"):  # an imported run says nothing of it
        notes.append(_EXCLUDED.format(len(run["excluded"])))
    return Weights(
        spec, run["identity"], own, run.get("trains") or spec.cls.trains,
        folder=folder, digest=digest, notes=tuple(notes),
    )  # fmt: skip


# --- Cells -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One number: these weights, on this task, in this mode.

    Attributes:
        weights: what is scored.
        data: the task with its cases.
        split: the part of them, labels already taken away.
        mode: linear, finetune or knn.
        seed: of the evaluation.
        fraction: share of the labels.
        step: of the pretraining whose weights are scored; None: the last.
        settings: the preset.
        source: place of the pretraining volumes as the user named it.
    """

    weights: Weights
    data: TaskData
    split: Split
    mode: Mode
    seed: int
    fraction: float
    step: int | None
    settings: Settings
    source: str = "phantoms"

    @property
    def label(self) -> str:
        """What messages call it."""
        at = "" if self.step is None else f", step {self.step}"
        labels = "" if self.fraction == 1 else f", {100 * self.fraction:g} % of the labels"
        name = f"{self.weights.spec.name}{at}, {self.data.task.name} {self.mode}"
        return f"{name}, seed {self.seed}, {self.split.name}{labels}"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the number; equal identities, equal numbers."""
        weights = self.weights
        downstream = self.settings.downstream.for_mode(self.mode)
        protocol = {k: v for k, v in self._read(downstream).items() if k not in MODES}
        budget = self._read(getattr(downstream, self.mode))
        budget.pop("crop", None)  # the protocol has it
        identity = {
            "method": weights.spec.name,
            "method_config": weights.config,
            "backbone": weights.identity["backbone"],
            "pretrain": weights.identity["pretrain"],
            # A checkpoint from elsewhere may carry another seed than the probe.
            "pretrain_seed": weights.identity["seed"],
            "task": self.data.task.name,
            "task_data": self.data.cohort.fingerprint,
            "split": self.split.name,
            "split_cases": digest([self.split.train, self.split.val, self.split.test]),
            "mode": self.mode,
            "seed": self.seed,
            "label_fraction": float(self.fraction),
            "budget": {**protocol, **budget},
        }
        optional = {"pretrain_step": self.step, "match": weights.match, "weights": weights.digest}
        return identity | {key: value for key, value in optional.items() if value is not None}

    def _read(self, model: Model) -> dict[str, Any]:
        """Return the options of ``model`` that the cell's kind of task reads in its mode."""
        return identity_values(model, lambda mark: mark(self.data.task.kind, self.mode))

    @property
    def head(self) -> dict[str, Any]:
        """What a table needs to know of a cell, whether it was computed or failed."""
        return {
            "schema": SCHEMA,
            "identity": self.identity,
            "method": {
                "title": self.weights.spec.title,
                "trains": self.weights.trains,
                "notes": self.notes(),
            },
            "preset": self.settings.title,
            "metric": self.data.task.metric,
        }

    def record(
        self,
        run: Mapping[str, Any],
        fingerprint: str,
        checkpoint: str,
        outcome: Outcome,
        device: torch.device,
    ) -> dict[str, Any]:
        """Return what is written down of the number.

        Args:
            run: provenance of the weights, ``run.json``.
            fingerprint: hash of the weights that were evaluated.
            checkpoint: place of the run, as the store names it.
            outcome: of the evaluation.
            device: that it ran on.
        """
        task, metric = self.data.task, self.data.task.metric
        precision = self.settings.downstream.for_mode(self.mode).precision
        own = environment()
        return {
            **self.head,
            "score": outcome.score,
            "per_case": outcome.per_case,
            # Known without a look at every case, which is what makes large tables fast.
            "scored": sum(case.get(metric) is not None for case in outcome.per_case) or len(outcome.per_case),
            "excluded": outcome.excluded,
            "constant_output": outcome.constant_output,
            "left_out": {"task": self.data.cohort.skipped, "pretraining": list(self.weights.left_out)},
            "overlap": [asdict(overlap) for overlap in self.overlap() or ()],
            "twins": [asdict(twin) for twin in self.data.twins],
            "preparation": self._preparation(run),
            "validation": outcome.validation,
            "best_step": outcome.best_step,
            "cost": {**self._cost(run, outcome), "device": device_name(device, precision)},
            "environment": own,
            # Weights may come from another machine, or from more threads.
            **({"pretrain_environment": run["environment"]} if run["environment"] != own else {}),
            "code": self._code(run),
            "run": run_of(self.settings, self.source, self.data.place, self.weights.folder, task),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "checkpoint": checkpoint,
            "fingerprint_of_weights": fingerprint,
            **({"pretext": run["pretext"]} if "pretext" in run else {}),
        }

    def _preparation(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return how the volumes of the task and of the pretraining were prepared, and in what that differs."""
        seen, own = run.get("preparation"), preparation_facts(self.data.cohort)
        return {"task": own, "pretraining": seen, "differences": preparation_differences(seen, own)}

    def _code(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return the code of the pretraining as the run has it, and of the evaluation as it is now."""
        problem = problem_class(self.data.task).__name__
        code = {
            "pretrain": run.get("code"),
            "downstream": evaluation_code(problem, self.settings.backbone.name),
            "problem": problem,
        }
        return code | ({"pretrain_by_step": run["code_by_step"]} if "code_by_step" in run else {})

    def _cost(self, run: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
        share = 1.0 if self.step is None else self.step / run["steps"]
        return {
            "pretrain_steps": _share(run["steps"], share),
            "pretrain_seconds": _share(run["seconds"], share),
            "voxels_seen": _share(run["voxels_seen"], share),
            "pretrain_parameters": run["parameters_trained"],
            "pretrain_device": run["device"],
            "downstream_seconds": outcome.seconds,
            "peak_memory_mib": outcome.peak_memory_mib,
            "parameters_trained": outcome.parameters_trained,
        }

    def overlap(self) -> tuple[Overlap, ...] | None:
        """Return the test images that the cell's backbone has seen; None if nobody can tell."""
        seen = (self.weights.identity["pretrain"] or {}).get("data")
        return self.data.overlaps.get(seen, ()) if seen else ()

    def notes(self) -> list[str]:
        """Return what a table must say of the cell."""
        notes = list(self.weights.notes)
        if self.settings.data.exclude and self.weights.folder is None and self.weights.trains != "none":
            notes.append(_EXCLUDED.format(len(self.settings.data.exclude)))
        if self.weights.trains == "encoder" and self.data.task.kind == "segmentation":
            notes.append("decoder random")
        overlap = self.overlap()
        if overlap is None:
            notes.append("volumes for pretraining are not there to look for test images among them")
        elif overlap:
            people = len({one.test for one in overlap})
            notes.append(f"test images among the volumes for pretraining: {people}")
        if self.data.twins:
            people = len({one.test for one in self.data.twins})
            notes.append(f"test images among the training and validation images: {people}")
        if self.data.cohort.skipped:
            notes.append(f"bad cases left out: {len({case['id'] for case in self.data.cohort.skipped})}")
        if self.data.cohort.preparation.uses_labels:
            notes.append("cropped to the labelled structures, which a new image does not have")
        return notes


def _share(total: float | None, share: float) -> float | None:
    """Return a part of a cost; None of an imported checkpoint, whose cost nobody knows."""
    if total is None or share == 1:
        return total
    return round(share * total) if isinstance(total, int) else share * total


def digest(value: Any) -> str:
    """Return 12 hexadecimal digits of the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
