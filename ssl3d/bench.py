"""The bench: every method, task, mode and seed becomes one record; finished cells are skipped.

This is the only module that knows both ends: it hands checkpoints of the pretraining loop to the
downstream harness, and the harness's outcomes to the store.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ssl3d.code import code_of, method_modules
from ssl3d.config import Settings, identity_values
from ssl3d.data.splits import nested_fraction
from ssl3d.downstream.harness import MODES, Mode, evaluate
from ssl3d.downstream.tasks import Task
from ssl3d.environment import device_name, environment
from ssl3d.errors import CheckpointError, ConfigError, DataError, nearest
from ssl3d.files import write_json
from ssl3d.models.checkpoint import RUN, load_backbone, read_run, weights_fingerprint
from ssl3d.pretrain.loop import pretrain, pretrain_identity
from ssl3d.pretrain.method import MethodSpec
from ssl3d.progress import say
from ssl3d.provenance import run_of, stale
from ssl3d.results.predictions import Kept, keep_prediction
from ssl3d.results.store import ResultStore

if TYPE_CHECKING:
    from ssl3d.data.overlap import Overlap
    from ssl3d.data.prepare import PreparedCohort
    from ssl3d.data.splits import Split


Match = Literal["steps", "voxels", "time"]
RELATIVE_COST = "relative-cost.json"
_POLL_SECONDS = 0.5


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
        label_fractions: shares of the training subjects whose labels are used; nested, and the same for
            every method and seed.
        match: what the methods' pretrainings have in common: ``steps``, ``voxels`` seen, or ``time``.
        data: place of the pretraining volumes as the user named it, for :mod:`ssl3d.provenance`.
        recompute: compute finished cells again whose code or preset has changed, or is not known.
        at_steps: pretraining steps whose weights are evaluated too, for curves; they need
            ``pretrain.keep_checkpoints``. None stands for the end.
        keep_predictions: segmentations of how many test cases to keep beside each record.
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
    label_fractions: tuple[float, ...] = (1.0,)
    match: Match = "steps"
    data: str = "phantoms"
    recompute: bool = False
    keep_predictions: int = 0

    def run(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Yield (record, computed now) for every cell, in the order of seeds, methods, tasks.

        A method is pretrained when its first unfinished cell is reached, and only then; an
        interrupted pretraining goes on where it stopped. Several processes can run one bench in one
        store: what another one is at work on, a cell or the pretraining that it needs, is passed over
        and yielded later.
        """
        left = list(self._cells())
        said = False
        while left:
            busy = []
            for cell in left:
                outcome = self._cell(*cell)
                if outcome is None:
                    busy.append(cell)
                else:
                    yield outcome
            if len(busy) == len(left):
                if not said:
                    say(f"Waiting for other processes, which are at work on the last {len(busy)} cells.")
                    said = True
                time.sleep(_POLL_SECONDS)
            left = busy

    def _cells(self) -> Iterator[tuple[MethodSpec, TaskData, Mode, Split, int, float, int | None]]:
        for seed in self.seeds:
            for spec in self.methods:
                for data in self.tasks:
                    for mode in self.modes:
                        for whole in data.splits:
                            for fraction in self.label_fractions:
                                split = data.split_for(whole, fraction, self.settings)
                                for step in self.at_steps if spec.cls.trains != "none" else (None,):
                                    yield spec, data, mode, split, seed, fraction, step

    def _cell(
        self, spec: MethodSpec, data: TaskData, mode: Mode, split: Split, seed: int, fraction: float, step: int | None
    ) -> tuple[dict[str, Any], bool] | None:  # fmt: skip
        """Return (record, computed now); None where another process is at work on it."""
        identity = self._identity(spec, data, mode, split, seed, fraction, step)
        with self.store.claim(identity, wait=False) as mine:
            if not mine:
                return None
            again = False
            if self.store.has(identity):
                record = self.store.read(self.store.path_for(identity))
                again = self.recompute and stale(record) != []
                if not again:
                    return record, False
            folder = self._pretrained(spec, seed)
            if folder is None:
                return None
            run = read_run(folder)
            backbone = load_backbone(folder, expected=self.settings.backbone, step=step)
            at = "" if step is None else f", step {step}"
            labels = "" if fraction == 1 else f", {100 * fraction:g} % of the labels"
            share = 1.0 if step is None else step / run["steps"]
            kept: list[Kept] = []

            def keep(index: int, prediction: torch.Tensor, truth: torch.Tensor) -> None:
                if len(kept) < self.keep_predictions:
                    case = data.cohort.cases[index]
                    arrays = {"prediction": prediction.numpy(), "truth": truth.numpy(),
                              "image": data.cohort.image(index)}  # fmt: skip
                    kept.append(keep_prediction(self.store, identity, case.id, arrays, case.affine))

            weights = weights_fingerprint(backbone)  # before fine-tuning changes them
            downstream = self.settings.downstream.for_mode(mode)
            outcome = evaluate(
                backbone, data.task, data.cohort, split, mode, downstream, seed, self.device,
                label=f"{spec.name}{at}, {data.task.name} {mode}, seed {seed}, {split.name}{labels}",
                on_prediction=keep,
            )  # fmt: skip
            record = {
                "schema": 1,
                "identity": identity,
                "method": {
                    "title": spec.title,
                    "trains": spec.cls.trains,
                    "notes": self._notes(spec, data, identity),
                },
                "preset": self.settings.title,
                "metric": data.task.metric,
                "score": outcome.score,
                "per_case": outcome.per_case,
                # Known without a look at every case, which is what makes large tables fast.
                "scored": sum(case.get(data.task.metric) is not None for case in outcome.per_case)
                or len(outcome.per_case),
                "excluded": outcome.excluded,
                "left_out": {"task": data.cohort.skipped, "pretraining": self._left_out(spec)},
                "overlap": [asdict(overlap) for overlap in self._overlap(data, identity) or ()],
                "twins": [asdict(twin) for twin in data.twins],
                "validation": outcome.validation,
                "best_step": outcome.best_step,
                "constant_output": outcome.constant_output,
                "cost": {
                    "pretrain_steps": _share(run["steps"], share),
                    "pretrain_seconds": _share(run["seconds"], share),
                    "voxels_seen": _share(run["voxels_seen"], share),
                    "pretrain_parameters": run["parameters_trained"],
                    "pretrain_device": run["device"],
                    "downstream_seconds": outcome.seconds,
                    "device": device_name(self.device, downstream.precision),
                    "peak_memory_mib": outcome.peak_memory_mib,
                    "parameters_trained": outcome.parameters_trained,
                },
                "environment": environment(),
                "code": code_of(method_modules(spec.cls)),
                "run": run_of(
                    self.settings, self.data, data.place, self.checkpoints.get(spec.name), data.task
                ),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "checkpoint": self.store.place_of(folder),
                "fingerprint_of_weights": weights,
                **({"predictions": kept} if kept else {}),
            }
            self.store.write(record, replace=again)
            return record, True

    def identity(
        self, spec: MethodSpec, data: TaskData, split: Split, like: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the identity of the cell that has mode, seed, labels and step of the identity ``like``."""
        part = data.split_for(split, like["label_fraction"], self.settings)
        return self._identity(
            spec, data, like["mode"], part, like["seed"], like["label_fraction"], like.get("pretrain_step")
        )

    def _identity(
        self, spec: MethodSpec, data: TaskData, mode: Mode, split: Split, seed: int, fraction: float, step: int | None
    ) -> dict[str, Any]:  # fmt: skip
        if spec.name in self.checkpoints:
            source = read_run(self.checkpoints[spec.name])
            pretraining = source["identity"] if source.get("status") == "finished" else None
        else:
            pretraining = self._pretrain_identity(spec, seed)
        downstream = self.settings.downstream.for_mode(mode)
        protocol = {k: v for k, v in identity_values(downstream).items() if k not in MODES}
        budget = identity_values(getattr(downstream, mode))
        budget.pop("crop", None)  # the protocol has it
        # Options younger than the first records are not in the identity while they are off: those stay valid.
        if budget.get("augment") is False:
            del budget["augment"]
        identity = {
            "method": spec.name,
            "method_config": spec.identity()["config"],
            "backbone": identity_values(self.settings.backbone),
            "pretrain": pretraining and pretraining["pretrain"],
            # A checkpoint from elsewhere may carry another seed than the probe.
            "pretrain_seed": pretraining and pretraining["seed"],
            "task": data.task.name,
            "task_data": data.cohort.fingerprint,
            "split": split.name,
            "split_cases": _digest([split.train, split.val, split.test]),
            "mode": mode,
            "seed": seed,
            "label_fraction": float(fraction),
            "budget": {**protocol, **budget},
        }
        if step is not None:
            identity["pretrain_step"] = step
        if (
            self.match != "steps"
            and pretraining
            and pretraining["pretrain"]
            and spec.name not in self.checkpoints
        ):
            identity["match"] = {"by": self.match, "steps": self.settings.pretrain.steps}
        return identity

    def settings_for(self, spec: MethodSpec) -> Settings:
        """Return the settings with the method's learning rate and the pretraining steps that ``match`` gives it."""
        settings = self.settings.for_method(spec.name)
        if self.match == "steps" or spec.cls.trains == "none":
            return settings
        # A step has the same voxels for every method, so matching these needs no other number of steps.
        cost = self._relative_cost(spec) if self.match == "time" else 1.0
        steps = max(1, round(settings.pretrain.steps / cost))
        pretraining = settings.pretrain.model_copy(update={"steps": steps})
        return settings.model_copy(update={"pretrain": pretraining})

    def _relative_cost(self, spec: MethodSpec) -> float:
        """Return a step's time by that of a supervised step on as many crops.

        Measured once a store, and kept there: other steps in the next call would be other cells.
        """
        path = self.store.root / RELATIVE_COST
        with self.store.claim({"file": path.name}):
            known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
            if spec.name not in known:
                from ssl3d.pretrain.describe import step_cost

                known[spec.name] = round(step_cost(spec.name).ratio, 3)
                write_json(path, known)
        return known[spec.name]

    def _pretrain_identity(self, spec: MethodSpec, seed: int) -> dict[str, Any]:
        fingerprint = self.pretraining.fingerprint if self.pretraining else ""
        return pretrain_identity(spec, self.settings_for(spec), fingerprint, seed)

    def _pretrained(self, spec: MethodSpec, seed: int) -> Path | None:
        """Return the folder of the finished run, pretraining first where there is none.

        None where another process is pretraining it.
        """
        if spec.name in self.checkpoints:
            return self.checkpoints[spec.name]
        identity = self._pretrain_identity(spec, seed)
        folder = self.store.root / "runs" / f"{spec.name}-s{seed}-{_digest(identity)}"
        with self.store.claim({"run": identity}, wait=False) as mine:
            if not mine:
                return None
            if self.recompute and (folder / RUN).is_file():
                code = read_run(folder).get("code", "unknown")
                if code != code_of(method_modules(spec.cls))["pretrain"]:
                    shutil.move(folder, _unused(folder.with_name(f"{folder.name}.stale-{code}")))
            pretrain(
                spec,
                self.pretraining,
                self.settings_for(spec),
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
        if data.twins:
            people = len({one.test for one in data.twins})
            notes.append(f"test images among the training and validation images: {people}")
        if data.cohort.skipped:
            notes.append(f"bad cases left out: {len({case['id'] for case in data.cohort.skipped})}")
        if data.cohort.preparation.uses_labels:
            notes.append("cropped to the labelled structures, which a new image does not have")
        return notes


def _share(total: float | None, share: float) -> float | None:
    """Return a part of a cost; None of an imported checkpoint, whose cost nobody knows."""
    if total is None or share == 1:
        return total
    return round(share * total) if isinstance(total, int) else share * total


def check_match(text: str) -> Match:
    """Return ``text`` if methods can be matched in it.

    Raises:
        ConfigError: they cannot.
    """
    for known in get_args(Match):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f'--match "{text}".{nearest(text, get_args(Match))}')


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


def _unused(path: Path) -> Path:
    return next(
        p
        for n in itertools.count()
        if not (p := path.with_name(f"{path.name}{f'-{n}' if n else ''}")).exists()
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
