"""The bench: every method, task, mode and seed becomes one record; finished cells are skipped.

This is the only module that knows both ends: it hands checkpoints of the pretraining loop to the
downstream harness, and the harness's outcomes to the store. What a cell is, and what is written down of it, is
in :mod:`ssl3d.bench.cell`.
"""

from __future__ import annotations

import itertools
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ssl3d import signals
from ssl3d.bench import sizes
from ssl3d.bench.cell import Cell as Cell
from ssl3d.bench.cell import TaskData as TaskData
from ssl3d.bench.cell import Weights, digest, given_weights, planned_weights
from ssl3d.bench.stale import stale
from ssl3d.config import Settings
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.downstream.problems.frozen import SharedFeatures
from ssl3d.downstream.problems.problem import Mode
from ssl3d.errors import (
    CellsFailed,
    CheckpointError,
    ConfigError,
    DataError,
    MemoryFault,
    ReadError,
    SSL3DError,
    WriteError,
    count,
    nearest,
)
from ssl3d.files import read_json, write_json
from ssl3d.memory import is_out_of_memory
from ssl3d.models.weights.checkpoint import RUN, is_whole, load_backbone, read_run, weights_fingerprint
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.run_log import logged_by
from ssl3d.pretrain.spec import MethodSpec
from ssl3d.progress import say
from ssl3d.registry.blame import plugin_fault
from ssl3d.results.store.predictions import Kept, keep_prediction
from ssl3d.results.store.record import Record
from ssl3d.results.store.store import ResultStore, failure_of
from ssl3d.source_hash import pretraining_code

if TYPE_CHECKING:
    from ssl3d.data.prepared.cohort import PreparedCohort
    from ssl3d.data.splits import Split


Match = Literal["steps", "voxels", "time"]
RELATIVE_COST = "relative-cost.json"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Grid:
    """Which cells there are.

    Attributes:
        methods: the rows.
        tasks: the columns, prepared.
        modes: linear, finetune, or both.
        seeds: one seed covers initialisation, pretraining and probe; splits stay fixed.
        label_fractions: shares of the training subjects whose labels are used; nested, and the same for
            every method and seed.
        at_steps: pretraining steps whose weights are evaluated too, for curves; they need
            ``pretrain.keep_checkpoints``. None stands for the end.
    """

    methods: list[MethodSpec]
    tasks: list[TaskData]
    modes: list[Mode]
    seeds: list[int]
    label_fractions: tuple[float, ...] = (1.0,)
    at_steps: tuple[int | None, ...] = (None,)


@dataclass(frozen=True)
class Pretraining:
    """Where the weights come from.

    Attributes:
        volumes: unlabelled volumes; None when no method needs any.
        checkpoints: run folders to evaluate instead of pretraining, by method name.
        match: what the methods' pretrainings have in common: ``steps``, ``voxels`` seen, or ``time``.
        data: place of the volumes as the user named it, for :mod:`ssl3d.bench.stale`.
        seen: fingerprint of the volumes, where runs are there and the volumes are not at hand.
    """

    volumes: PreparedCohort | None
    checkpoints: dict[str, Path] = field(default_factory=dict)
    match: Match = "steps"
    data: str = "phantoms"
    seen: str = ""


@dataclass(frozen=True)
class Conduct:
    """How a call goes about it; changes no number.

    Attributes:
        recompute: compute finished cells again whose code or preset has changed, or is not known.
        keep_predictions: segmentations of how many test cases to keep beside each record.
        allow_code_change: go on with an interrupted pretraining under other code; both hashes are recorded.
        session: the same for all processes of one call. What failed in it is not tried again.
        jobs: processes of the call.
    """

    recompute: bool = False
    keep_predictions: int = 0
    allow_code_change: bool = False
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    jobs: int = 1


@dataclass(frozen=True)
class Bench:
    """Everything that a bench runs over.

    Attributes:
        grid: which cells there are.
        pretraining: where the weights come from.
        settings: the preset.
        store: where records and runs go.
        device: where to compute.
        conduct: what changes no number.
    """

    grid: Grid
    pretraining: Pretraining
    settings: Settings
    store: ResultStore
    device: torch.device
    conduct: Conduct = field(default_factory=Conduct)

    def run(self, look: Callable[[Mapping[str, str]], None] | None = None) -> Iterator[tuple[Record, bool]]:
        """Yield (record, computed now) for every cell, in the order of :meth:`cells`; with several processes of
        :meth:`longest_first`.

        A method is pretrained when its first unfinished cell is reached, and only then; an
        interrupted pretraining goes on where it stopped. Several processes can run one bench in one
        store: what another one is at work on, a cell or the pretraining that it needs, is passed over
        and yielded later. A cell that fails is written down by name, and the others are computed.

        Args:
            look: called while there is nothing to do but to wait, every half second, with what others hold:
                :meth:`_held`.

        Raises:
            CellsFailed: after all the others, when cells have failed.
        """
        left = self.longest_first() if self.conduct.jobs > 1 else list(self.cells())
        failed: list[str] = []
        said: set[tuple[str, str]] = set()
        while left:
            busy: list[Cell] = []
            for cell in left:
                try:
                    outcome = self.outcome(cell)
                except Failed as failure:
                    failed.append(failure.args[0])
                    continue
                if outcome is None:
                    busy.append(cell)
                else:
                    yield outcome
            if len(busy) == len(left):
                held = self._held(busy)
                for who, what in held.items():
                    if (who, what) not in said:
                        say(f"Waiting for {who}, at work on {what}.")
                said |= set(held.items())
                if look is not None:
                    look(held)
                time.sleep(_POLL_SECONDS)
            left = busy
        if failed:
            raise CellsFailed(failed)

    def cells(self) -> Iterator[Cell]:
        """Yield every cell, finished or not."""
        grid = self.grid
        rows = itertools.product(grid.seeds, grid.methods, grid.tasks, grid.modes)
        for seed, spec, data, mode in rows:
            for whole, fraction in itertools.product(data.splits, grid.label_fractions):
                for step in grid.at_steps if spec.cls.trains != "none" else (None,):
                    yield self._cell(spec, data, whole, mode, seed, fraction, step)

    def longest_first(self) -> list[Cell]:
        """Return every cell, so ordered that processes which share them end together.

        First come the pretrainings that are not finished, each by its first cell: the longest before shorter ones, of
        equal ones that with the most cells behind it. The other cells follow, fine-tuning before what is solved.
        """
        first: dict[str, Cell] = {}
        behind: Counter[str] = Counter()
        rest = []
        for cell in self.cells():
            run = self.run_folder(cell.weights).name
            behind[run] += 1
            if cell.weights.spec.cls.trains == "none" or run in first or self.is_pretrained(cell.weights):
                rest.append(cell)
            else:
                first[run] = cell
        known = self._known_costs()
        pretrainings = sorted(
            first.items(), key=lambda item: (-self._length(item[1].weights, known), -behind[item[0]])
        )
        return [cell for _, cell in pretrainings] + sorted(rest, key=lambda cell: cell.mode != "finetune")

    def is_pretrained(self, weights: Weights) -> bool:
        """Return whether the run of ``weights`` is finished, or was given."""
        folder = self.run_folder(weights)
        finished = (folder / RUN).is_file() and read_run(folder).get("status") == "finished"
        return weights.folder is not None or finished

    def _known_costs(self) -> dict[str, float]:
        """Return what is known of the methods' times a step; see :meth:`_relative_cost`."""
        return _known_costs(self.store.root / RELATIVE_COST)

    def _length(self, weights: Weights, known: Mapping[str, float]) -> float:
        """Return how long a pretraining takes, roughly, in steps of a supervised training; it decides an order only."""
        guess = 1.0 if weights.trains == "encoder" else 2.0
        steps: int = weights.identity["pretrain"]["budget"]["steps"]
        return steps * known.get(weights.spec.name, guess)

    def _held(self, busy: Sequence[Cell]) -> dict[str, str]:
        """Return what other processes hold of the cells ``busy``, by process (:func:`ssl3d.locks.this_process`)."""
        cells: dict[str, list[str]] = {}
        for cell in busy:
            who = self.store.holder(cell.identity)
            label = cell.label
            if who is None and (who := self.store.holder({"run": cell.weights.identity})) is not None:
                label = f"the pretraining of {label}"
            if who is not None:  # else it was done just now
                cells.setdefault(who, []).append(label)
        return {
            who: labels[0] + (f" and {count(len(labels) - 1, 'other cell')}" if len(labels) > 1 else "")
            for who, labels in cells.items()
        }

    def cell_like(self, identity: Mapping[str, Any]) -> Cell:
        """Return the cell of the first row, task and split that has mode, seed, labels and step of ``identity``."""
        data, step = self.grid.tasks[0], identity.get("pretrain_step")
        mode: Mode = identity["mode"]
        return self._cell(
            self.grid.methods[0],
            data,
            data.splits[0],
            mode,
            identity["seed"],
            identity["label_fraction"],
            step,
        )

    def _cell(
        self, spec: MethodSpec, data: TaskData, whole: Split, mode: Mode, seed: int, fraction: float, step: int | None
    ) -> Cell:  # fmt: skip
        split = data.split_for(whole, fraction, self.settings)
        weights = self.weights(spec, seed, step)
        return Cell(weights, data, split, mode, seed, fraction, step, self.settings, self.pretraining.data)

    # --- One cell ---

    def stands(self, record: Record) -> bool:
        """Return whether a record that is there is not to be computed again."""
        return not self.conduct.recompute or stale(record) == []

    def outcome(self, cell: Cell) -> tuple[Record, bool] | None:
        """Return (record, computed now); None where another process is at work on it.

        Raises:
            Failed: it cannot be computed.
        """
        signals.check()
        if not self.conduct.recompute:
            # Nothing is locked for what is there: a finished store may be read-only.
            with suppress(DataError):
                record = self.store.read(self.store.path_for(cell.identity))
                self.store.tidy(cell.identity, {"run": cell.weights.identity})
                return record, False
        with self.store.claim(cell.identity, wait=False) as mine:
            if not mine:
                return None
            again = False
            if self.store.has(cell.identity):
                record = self.store.read(self.store.path_for(cell.identity))
                again = not self.stands(record)
                if not again:
                    return record, False
            try:
                folder = self.pretrained(cell)
                if folder is None:
                    return None
                with sizes.evaluation(cell.data.task.name, cell.mode, self.settings):
                    record = self._evaluated(cell, folder)
                self.store.write(record, replace=again)
            except (WriteError, Failed):
                raise
            except (Exception, SystemExit) as error:
                raise self._failure(cell, _named(error)) from error
            self.store.forget_failure(cell.identity)
            return record, True

    def _evaluated(self, cell: Cell, folder: Path) -> Record:
        """Evaluate the weights in ``folder`` and return the record."""
        run = read_run(folder)
        cell.weights.check(run, folder)
        backbone = load_backbone(folder, expected=self.settings.backbone, step=cell.step)
        fingerprint = weights_fingerprint(backbone)  # before fine-tuning changes them
        if cell.weights.digest not in (None, fingerprint):
            raise CheckpointError(f"{folder}: the weights were replaced while the bench ran. Start it again.")
        cohort = cell.data.cohort
        kept: list[Kept] = []

        def keep(index: int, prediction: torch.Tensor, truth: torch.Tensor) -> None:
            if len(kept) < self.conduct.keep_predictions:
                case = cohort.cases[index]
                arrays = {
                    "prediction": prediction.numpy(),
                    "truth": truth.numpy(),
                    "image": cohort.image(index),
                }
                kept.append(keep_prediction(self.store, cell.identity, case.id, arrays, case.affine))

        protocol = self.settings.downstream.for_mode(cell.mode)
        self._features.begin(
            None
            if cell.mode == "finetune"
            else (fingerprint, cell.data.task.name, cell.mode == "multiscale", protocol.model_dump_json())
        )
        evaluation = Evaluation(
            cell.data.task, cohort, cell.split, cell.mode, protocol, cell.seed, self.device
        )
        outcome = evaluate(backbone, evaluation, cell.label, on_prediction=keep, shared=self._features)
        record = cell.record(run, fingerprint, self.store.place_of(folder), outcome, self.device)
        return record | ({"predictions": kept} if kept else {})

    @cached_property
    def _features(self) -> SharedFeatures:
        return SharedFeatures()

    # --- Weights ---

    def weights(self, spec: MethodSpec, seed: int, step: int | None = None) -> Weights:
        """Return what is known of the weights that the row of ``spec`` scores."""
        volumes, checkpoints = self.pretraining.volumes, self.pretraining.checkpoints
        if spec.name in checkpoints:
            key = (spec.name, step)
            if key not in self._given:
                self._given[key] = given_weights(spec, checkpoints[spec.name], self.settings.backbone, step)
            return self._given[key]
        by = self.pretraining.match
        match = None if by == "steps" else {"by": by, "steps": self.settings.pretrain.steps}
        fingerprint = volumes.fingerprint if volumes else self.pretraining.seen
        planned = planned_weights(spec, self.settings_for(spec), fingerprint, seed, match)
        if planned.identity["pretrain"] and volumes is not None:
            return replace(planned, left_out=tuple(volumes.skipped))
        return planned

    @cached_property
    def _given(self) -> dict[tuple[str, int | None], Weights]:
        return {}

    def run_folder(self, weights: Weights) -> Path:
        """Return where the run of ``weights`` lies, or will lie."""
        if weights.folder is not None:
            return weights.folder
        name = f"{weights.spec.name}-s{weights.identity['seed']}-{digest(weights.identity)}"
        return self.store.root / "runs" / name

    def pretrained(self, cell: Cell) -> Path | None:
        """Return the folder of the finished run, pretraining first where there is none.

        None where another process is pretraining it.

        Raises:
            Failed: the pretraining failed, now or before in this call.
        """
        weights, folder = cell.weights, self.run_folder(cell.weights)
        if weights.folder is not None:
            return folder
        with self.store.claim({"run": weights.identity}, wait=False) as mine:
            if not mine:
                return None
            if (before := self._failed_before(folder.name)) is not None:
                raise self._failure(cell, before, folder.name)
            if self.conduct.recompute and (folder / RUN).is_file():
                self._set_stale_aside(weights, folder)
            run = read_run(folder) if (folder / RUN).is_file() else {}
            if run.get("status") == "finished" and is_whole(folder, run):
                return folder
            self._features.begin(None)
            try:
                settings = self.settings_for(weights.spec)
                with sizes.pretraining(weights.spec.name, settings), logged_by(settings.pretrain.loggers):
                    pretrain(
                        weights.spec, self.pretraining.volumes, settings, weights.identity["seed"], folder, self.device,
                        resume=(folder / RUN).is_file(), allow_code_change=self.conduct.allow_code_change,
                    )  # fmt: skip
            except WriteError:
                raise
            except (Exception, SystemExit) as error:
                # Written down before the claim ends: another process must not try again.
                raise self._failure(cell, _named(error), folder.name) from error
            signals.check()
        return folder

    def _set_stale_aside(self, weights: Weights, folder: Path) -> None:
        code = read_run(folder).get("code", "unknown")
        if code != pretraining_code(weights.spec.cls, self.settings.backbone.name):
            shutil.move(folder, _unused(folder.with_name(f"{folder.name}.stale-{code}")))

    # --- Failures ---

    def _failed_before(self, run: str) -> dict[str, Any] | None:
        """Return why the pretraining ``run`` has failed in this call already, if it has."""
        mine = (
            f
            for f in self.store.sound_failures()[0]
            if f["session"] == self.conduct.session and f["run"] == run
        )
        return next((failure["error"] for failure in mine), None)

    def _failure(self, cell: Cell, error: BaseException | dict[str, Any], run: str | None = None) -> Failed:
        """Write down that ``cell`` has failed, and return what to raise.

        Args:
            cell: the cell.
            error: what happened, or what a failure of before says of it.
            run: name of the pretraining that failed; None: the evaluation did.
        """
        if isinstance(error, Failed):
            return error
        failure = failure_of(cell.head, error, self.conduct.session, run)
        self.store.write_failure(failure)
        return Failed(cell, failure)

    # --- Budgets ---

    def settings_for(self, spec: MethodSpec) -> Settings:
        """Return the settings with the method's learning rate and the pretraining steps that ``match`` gives it."""
        settings = self.settings.for_method(spec.name)
        if self.pretraining.match == "steps" or spec.cls.trains == "none":
            return settings
        # A step has the same voxels for every method, so matching these needs no other number of steps.
        cost = self._relative_cost(spec) if self.pretraining.match == "time" else 1.0
        steps = max(1, round(settings.pretrain.steps / cost))
        pretraining = settings.pretrain.model_copy(update={"steps": steps})
        return settings.model_copy(update={"pretrain": pretraining})

    def _relative_cost(self, spec: MethodSpec) -> float:
        """Return a step's time by that of a supervised step on as many crops.

        Measured once a store, and kept there: other steps in the next call would be other cells.
        """
        path = self.store.root / RELATIVE_COST
        with self.store.claim({"file": path.name}):
            known = self._known_costs()
            if spec.name not in known:
                from ssl3d.pretrain.describe import step_cost

                known[spec.name] = round(step_cost(spec.name).ratio, 3)
                write_json(path, known)
        return known[spec.name]


class Failed(SSL3DError):
    """A cell that could not be computed; already written down.

    Args:
        cell: the cell.
        failure: what was written down: :func:`ssl3d.results.store.store.failure_of`.
    """

    def __init__(self, cell: Cell, failure: dict[str, Any]) -> None:
        self.failure = failure
        super().__init__(f"{cell.label}: {failure['error']['type']}: {failure['error']['message']}")


def _known_costs(path: Path) -> dict[str, float]:
    """Return what was measured before, by method.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        known = read_json(path)
    except ReadError as error:
        raise DataError(
            f"{error} Delete it: it is measured again, and matched budgets are other cells then."
        ) from error
    if not isinstance(known, dict) or not all(
        type(cost) in (int, float) and 0 < cost < 1e6 for cost in known.values()
    ):
        raise DataError(
            f"{path} is damaged: it must hold a number for each method. Delete it: it is measured again, and matched "
            "budgets are other cells then."
        )
    return dict(known)


def _named(error: BaseException) -> BaseException:
    """Return what makes one cell fail, and no other, with a message of ours; raise what is a fault of ssl3d."""
    if isinstance(error, SSL3DError):
        return error
    if is_out_of_memory(error):
        return MemoryFault(f"the memory is used up: {error}. Fix: smaller crops or batches, fewer --jobs.")
    fault = plugin_fault(error)
    if fault is None:
        raise error
    return fault


def check_match(text: str) -> Match:
    """Return ``text`` if methods can be matched in it.

    Raises:
        ConfigError: they cannot.
    """
    for known in get_args(Match):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f'--match "{text}".{nearest(text, get_args(Match))}')


def check_checkpoints(specs: list[MethodSpec], checkpoints: dict[str, Path], settings: Settings) -> None:
    """Raise CheckpointError, before any training, for a checkpoint that the bench cannot use in its row."""
    problems = []
    for spec in specs:
        if spec.name in checkpoints:
            try:
                given_weights(spec, checkpoints[spec.name], settings.backbone)
            except CheckpointError as error:
                problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))


def _unused(path: Path) -> Path:
    return next(
        p
        for n in itertools.count()
        if not (p := path.with_name(f"{path.name}{f'-{n}' if n else ''}")).exists()
    )
