"""``ssl3d bench --dry-run``: what a bench will cost, from steps and cases that are measured on this machine.

Pretraining is measured by the loop itself, in runs of one and of four steps in a temporary folder; an evaluation by the
harness, on a few cases and a few steps. What is in the store counts as done.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.bench.run import Bench
from ssl3d.bench.whole import run_facts
from ssl3d.data.splits import Split
from ssl3d.downstream.harness import Evaluation, Outcome, evaluate
from ssl3d.errors import SSL3DError, count
from ssl3d.models.factory import build_backbone
from ssl3d.pretrain.loop import pretrain
from ssl3d.progress import Track, duration, quiet

if TYPE_CHECKING:
    from ssl3d.bench.cell import Cell

_STEPS = (1, 4)
_FEW_TRAIN, _FEW_EVAL = 4, 2


@dataclass(frozen=True)
class Pretrainings:
    """The pretrainings of one method that are to do.

    Attributes:
        method: its name.
        runs: how many.
        steps: of each.
        step_seconds, seconds: of one step, and of one run with its checkpoints and monitors.
        memory_mib: peak; None where it cannot be measured.
        disk_mib: what a finished run leaves.
    """

    method: str
    runs: int
    steps: int
    step_seconds: float
    seconds: float
    memory_mib: float | None
    disk_mib: float


@dataclass(frozen=True)
class Evaluations:
    """The evaluations on one task in one mode that are to do; ``seconds`` of one is None where it cannot be measured."""

    task: str
    mode: str
    cells: int
    seconds: float | None
    memory_mib: float | None


@dataclass(frozen=True)
class Estimate:
    """What a bench will cost.

    Attributes:
        cells, finished: of the bench, and those in the store.
        pretrainings, evaluations: what is to do.
        jobs: processes of the call.
        device: where it was measured.
        notes: what could not be measured, and why.
    """

    cells: int
    finished: int
    pretrainings: tuple[Pretrainings, ...]
    evaluations: tuple[Evaluations, ...]
    jobs: int
    device: str
    notes: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """Of all that is to do, one after the other."""
        pretraining = sum(p.runs * p.seconds for p in self.pretrainings)
        return pretraining + sum(e.cells * (e.seconds or 0) for e in self.evaluations)

    @property
    def disk_mib(self) -> float:
        """What the runs will take in the store; records are small beside them."""
        return sum(p.runs * p.disk_mib for p in self.pretrainings)

    @property
    def memory_mib(self) -> float | None:
        """Largest peak of one process."""
        peaks = [p.memory_mib for p in self.pretrainings] + [e.memory_mib for e in self.evaluations]
        return max((peak for peak in peaks if peak is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        totals = {"seconds": self.seconds, "disk_mib": self.disk_mib, "memory_mib": self.memory_mib}
        return {**asdict(self), **totals}

    def lines(self) -> list[str]:
        """Return it for people."""
        todo = self.cells - self.finished
        lines = [f"cells   {self.cells}: {self.finished} already in the store, {todo} to compute"]
        parallel = (
            f", about {duration(self.seconds / self.jobs)} with --jobs {self.jobs}" if self.jobs > 1 else ""
        )
        lines.append(
            f"time    {duration(self.seconds)} one after the other{parallel} (measured on {self.device})"
        )
        runs = sum(p.runs for p in self.pretrainings)
        lines.append(f"disk    {_size(self.disk_mib)} for {count(runs, 'pretraining')}")
        if self.memory_mib is not None:
            lines.append(
                f"memory  {_size(self.memory_mib)} a process, {_size(self.memory_mib * self.jobs)} in all"
            )
        for p in self.pretrainings:
            lines.append(
                f"  pretraining {p.method}: {p.runs} x {duration(p.seconds)} ({p.steps} steps of {p.step_seconds:.3g} s)"
            )
        for e in self.evaluations:
            time = "not measured" if e.seconds is None else duration(e.seconds)
            lines.append(f"  {e.task} {e.mode}: {e.cells} x {time}")
        return [*lines, *(f"Not measured: {note}" for note in self.notes)]


def _size(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def estimate(bench: Bench) -> Estimate:
    """Measure what the cells of a bench that are not in its store will cost; nothing is written there.

    Raises:
        SSL3DError: a method cannot be pretrained at all.
    """
    cells = list(bench.cells())
    todo = [cell for cell in cells if not bench.store.has(cell.identity)]
    runs: dict[Path, Cell] = {}
    for cell in todo:
        folder = bench.run_folder(cell.weights)
        trained = cell.weights.folder is None and cell.weights.spec.cls.trains != "none"
        if trained and run_facts(folder).get("status") != "finished":
            runs.setdefault(folder, cell)
    methods = Counter(cell.weights.spec.name for cell in runs.values())
    kinds: dict[tuple[str, str], list[Cell]] = {}
    for cell in todo:
        kinds.setdefault((cell.data.task.name, cell.mode), []).append(cell)
    pretrainings, evaluations, notes = [], [], []
    with Track("Measuring", len(methods) + len(kinds), unit="part") as track:
        for number, (name, how_many) in enumerate(methods.items(), 1):
            cell = next(cell for cell in runs.values() if cell.weights.spec.name == name)
            pretrainings.append(_pretraining(bench, cell, how_many))
            track.update(number, note=name)
        for number, ((task, mode), some) in enumerate(kinds.items(), len(methods) + 1):
            try:
                evaluations.append(_evaluation(bench, some))
            except (SSL3DError, ValueError) as error:  # too few cases of a class for a fold
                evaluations.append(Evaluations(task, mode, len(some), None, None))
                notes.append(f"{task} {mode}: {error}")
            track.update(number, note=f"{task} {mode}")
    return Estimate(
        len(cells), len(cells) - len(todo), tuple(pretrainings), tuple(evaluations), bench.conduct.jobs,
        str(bench.device), tuple(notes),
    )  # fmt: skip


def _pretraining(bench: Bench, cell: Cell, runs: int) -> Pretrainings:
    """Measure a method by runs of a few steps: what a step takes, and what stands around the steps."""
    spec, volumes = cell.weights.spec, bench.pretraining.volumes
    settings = bench.settings_for(spec)
    budget = settings.pretrain
    took: dict[int, float] = {}
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        for number, steps in enumerate((_STEPS[0], *_STEPS)):  # the first one warms up
            short = budget.model_copy(
                update={"steps": steps, "monitor_every": steps, "checkpoint_every": steps}
            )
            out = Path(folder) / str(number)
            run = pretrain(
                spec, volumes, settings.model_copy(update={"pretrain": short}), cell.weights.identity["seed"], out,
                bench.device,
            )  # fmt: skip
            took[steps] = run["seconds"]
            memory += [run["peak_memory_mib"]] if run["peak_memory_mib"] is not None else []
        disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
    few, more = _STEPS
    step = max(1e-4, (took[more] - took[few]) / (more - few))
    around = max(
        0.0, took[few] - step
    )  # a look at the held-back volumes before and after, and one checkpoint
    looks = math.ceil(budget.steps / budget.monitor_every) + 1
    seconds = budget.steps * step + around / 2 * looks
    kept = budget.steps // budget.checkpoint_every * disk / 4 if budget.keep_checkpoints else 0.0
    return Pretrainings(spec.name, runs, budget.steps, step, seconds, max(memory, default=None), disk + kept)


def _evaluation(bench: Bench, cells: Sequence[Cell]) -> Evaluations:
    """Measure an evaluation on a few cases and steps, with fresh weights: their values change no time."""
    cell = cells[0]
    config = cell.settings.downstream.for_mode(cell.mode)

    def outcome(split: Split, steps: int) -> Outcome:
        tune = config.finetune.model_copy(update={"steps": steps, "validate_every": steps})
        chosen = config.model_copy(update={"finetune": tune})
        backbone = build_backbone(bench.settings.backbone, 0)
        evaluation = Evaluation(
            cell.data.task, cell.data.cohort, split, cell.mode, chosen, cell.seed, bench.device
        )
        with quiet():
            return evaluate(backbone, evaluation)

    few, more = _few(cell, _FEW_TRAIN), _few(cell, 2 * _FEW_TRAIN)
    outcome(few, 1)  # warms up
    if cell.mode == "finetune":
        first, second = (outcome(few, steps) for steps in _STEPS)
        one = max(0.0, second.seconds - first.seconds) / (_STEPS[1] - _STEPS[0])
        a_case = max(0.0, first.seconds - one) / (len(few.val) + len(few.test))
        rounds = math.ceil(config.finetune.steps / config.finetune.validate_every)
        each = [
            config.finetune.steps * one + a_case * (rounds * len(c.split.val) + len(c.split.test))
            for c in cells
        ]
    else:
        first, second = outcome(few, 1), outcome(more, 1)
        fitted = len(more.train) - len(few.train)
        one = max(0.0, second.seconds - first.seconds) / fitted if fitted else first.seconds / len(few.train)
        rest = max(0.0, first.seconds - one * len(few.train)) / (len(few.val) + len(few.test))
        each = [one * len(c.split.train) + rest * (len(c.split.val) + len(c.split.test)) for c in cells]
    memory = [o.peak_memory_mib for o in (first, second) if o.peak_memory_mib is not None]
    return Evaluations(
        cell.data.task.name, cell.mode, len(cells), sum(each) / len(each), max(memory, default=None)
    )


def _few(cell: Cell, train: int) -> Split:
    """Return a split of a few cases of each part, of every class as many as of the others."""
    split = cell.split
    return replace(
        split,
        train=_spread(cell, split.train, train),
        val=_spread(cell, split.val, _FEW_EVAL),
        test=_spread(cell, split.test, _FEW_EVAL),
    )


def _spread(cell: Cell, names: Sequence[str], number: int) -> tuple[str, ...]:
    """Return ``number`` of the cases, taken from the classes in turn."""
    cohort = cell.data.cohort
    by_class: dict[Any, list[str]] = {}
    for name in names:
        case = cohort.cases[cohort.index(name)]
        by_class.setdefault(case.target if case.classes is None else case.classes, []).append(name)
    turns = [some[turn] for turn in range(len(names)) for some in by_class.values() if turn < len(some)]
    return tuple(turns[:number])
