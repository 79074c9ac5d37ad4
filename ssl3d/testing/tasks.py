"""The checks of a task."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ssl3d.bench.sources import PHANTOMS, task_cohort, task_splits
from ssl3d.config import Settings, validate
from ssl3d.data.cohort import Dataset
from ssl3d.data.prepared.steps import Preparation
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.downstream.problems.kinds import problem_class
from ssl3d.downstream.task_files import METRICS
from ssl3d.downstream.tasks import Kind, Scheme, Task
from ssl3d.errors import ConfigError, PluginError, SSL3DError, count, nearest
from ssl3d.models.factory import build_backbone
from ssl3d.registry.registry import registry
from ssl3d.testing.checks import Checks, Fault, demand, is_finite, needs
from ssl3d.testing.declarations import check_name, check_title
from ssl3d.testing.suite import CPU, evaluated


class TaskChecks(Checks):
    """The checks of one task.

    Args:
        task: the task.
        settings: of the checks.
        root: where its data are, or ``phantoms``; None: made-up volumes alone are evaluated.
        registered_by: the function that registers it, for places in messages.
    """

    kind = "task"
    order = (
        "declarations_make_sense",
        "the_dataset_fits",
        "every_mode_runs",
        "its_data_are_prepared_and_evaluated",
    )

    def __init__(
        self, task: Task, settings: Settings, root: Path | None = None, registered_by: Any = None
    ) -> None:
        self.task, self.settings, self.root, self.registered_by = task, settings, root, registered_by

    @property
    def subject(self) -> Any:
        return self.registered_by or self.task

    def chosen(self) -> Sequence[str]:
        return self.order if self.root is not None else self.order[:-1]

    def dataset(self) -> Dataset:
        """Return the adapter with the facts that hold for this task."""
        dataset: Dataset = registry().datasets.get(self.task.dataset).load()
        return dataset.with_facts(**self.task.facts)

    # -- checks -----------------------------------------------------------------------------------

    def declarations_make_sense(self) -> str:
        """Names, kind, metric, counts and preparation are what the framework can use."""
        task = self.task
        check_name(task.name, "task", "ssl3d_tasks")
        others = [(e.name, e.title) for e in registry().tasks if e.name != task.name]
        check_title(task.title, "task", others)
        kinds = get_args(Kind)
        demand(task.kind in kinds, f"kind = {task.kind!r}.{nearest(str(task.kind), kinds)}")
        metrics = METRICS[task.kind]
        demand(task.metric in metrics, f"a {task.kind} is scored by {' or '.join(metrics)}, not by {task.metric!r}", None,
               f'metric="{metrics[0]}"')  # fmt: skip
        demand(
            task.counts is None or (len(task.counts) == 3 and all(isinstance(n, int) and n > 0 for n in task.counts)),
            f"counts = {task.counts!r}", None, "(training, validation, test), or None",
        )  # fmt: skip
        demand(
            task.scheme in get_args(Scheme),
            f"scheme = {task.scheme!r}.{nearest(task.scheme, get_args(Scheme))}",
        )
        demand(task.folds is None or task.folds >= 2, f"folds = {task.folds!r}", None, "2 at least, or None")
        try:
            validate(Preparation, dict(task.preparation), "preparation")
        except ConfigError as error:
            raise Fault(str(error), None, "options of ssl3d.data.prepared.steps.Preparation") from error
        return f"{task.kind}, {task.metric}"

    @needs("declarations_make_sense")
    def the_dataset_fits(self) -> str:
        """Its dataset is registered, has the facts that are given, and structures or classes for the kind."""
        task = self.task
        try:
            dataset = self.dataset()
        except (PluginError, AttributeError) as error:
            raise Fault(str(error), None, "register the dataset, or correct the name") from error
        told_by_files = type(dataset).open is not Dataset.open
        if task.kind == "segmentation":
            demand(bool(dataset.label_values) or told_by_files, f"the dataset {dataset.name} names no structures", None,
                   "label_values of the dataset, or facts={'label_values': {1: ...}}")  # fmt: skip
        if task.metric == "auc":
            demand(len(dataset.target_names) <= 2, f"auc is for two classes, and {dataset.name} has "
                   f"{len(dataset.target_names)}", None, 'metric="macro_auc"')  # fmt: skip
        crop = task.preparation.get("crop")
        demand(
            not (crop == "lungs" and dataset.modality == "mr"),
            f'crop "lungs" needs CT, and {dataset.name} is MR',
        )
        names = dataset.label_names() if task.kind == "segmentation" else tuple(dataset.target_names.values())
        return f"{dataset.name}: {', '.join(names) or 'names stand in its files'}"

    @needs("declarations_make_sense")
    def every_mode_runs(self) -> str:
        """A random backbone is evaluated on made-up volumes, in every mode of the kind."""
        backbone = build_backbone(self.settings.backbone, 0)
        task = replace(self.task, counts=(2, 2, 2))
        seen = []
        for mode in problem_class(task).modes:
            score = evaluated(backbone, task, mode, self.settings)
            demand(is_finite(score), f"{mode} scores {score}")
            seen.append(f"{mode} {task.metric} {score:.3g}")
        return ", ".join(seen)

    @needs("declarations_make_sense", "the_dataset_fits")
    def its_data_are_prepared_and_evaluated(self) -> str:
        """The cases are prepared, divided, and the first split is evaluated by nearest neighbours or linearly."""
        place = None if str(self.root) == PHANTOMS else self.root
        with tempfile.TemporaryDirectory() as folder:
            try:
                cohort = task_cohort(self.task, place, self.settings, Path(folder))
                split = task_splits(self.task, cohort, self.settings)[0]
            except SSL3DError as error:
                raise Fault(str(error), None, "correct the task, its dataset or the data") from error
            modes = problem_class(self.task).modes
            mode = "linear" if "linear" in modes else modes[0]
            downstream = self.settings.downstream
            backbone = build_backbone(self.settings.backbone, 0)
            outcome = evaluate(backbone, Evaluation(self.task, cohort, split, mode, downstream, 0, CPU))
        demand(
            is_finite(outcome.score),
            f"{mode} scores {outcome.score}",
            None,
            "look at the classes of the test cases",
        )
        parts = "/".join(str(len(part)) for part in (split.train, split.val, split.test))
        return f"{count(len(cohort), 'case')}, {parts} for training, validation and test, {mode} {outcome.score:.3g}"
