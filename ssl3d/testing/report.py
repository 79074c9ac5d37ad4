"""``check_method`` and its like: all checks of one plugin, by its name or itself."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ssl3d.config import Model, validate
from ssl3d.data.cohort import Dataset
from ssl3d.downstream.task_files import is_task_file, load_task
from ssl3d.downstream.tasks import Task
from ssl3d.models.backbone import Backbone
from ssl3d.pretrain.logger import Logger
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.spec import MethodSpec, resolve_method
from ssl3d.registry.registry import Catalogue, registry
from ssl3d.results.formats.format import TableFormat
from ssl3d.testing.backbones import BackboneChecks
from ssl3d.testing.checks import Report
from ssl3d.testing.datasets import DatasetChecks
from ssl3d.testing.formats import FormatChecks
from ssl3d.testing.loggers import LoggerChecks
from ssl3d.testing.settings import conformance_settings
from ssl3d.testing.suite import Suite
from ssl3d.testing.tasks import TaskChecks

T = TypeVar("T")


def _loaded(catalogue: Catalogue[T], given: str | T) -> T:
    """Return what is registered under a name, or what is given itself."""
    return catalogue.get(given).load() if isinstance(given, str) else given


def method_suite(
    method: str | type[Method], overrides: Sequence[str] = (), options: dict[str, Any] | None = None
) -> Suite:
    """Return the checks of a method; the arguments are those of :func:`check_method`."""
    name = method if isinstance(method, str) else method.name
    settings = conformance_settings(overrides, name)
    given = {**settings.methods.get(name, {}), **(options or {})}
    if isinstance(method, str):
        spec = resolve_method(method, {**settings.methods, method: given})
    else:
        usable = isinstance(method.Config, type) and issubclass(
            method.Config, Model
        )  # if not, a check says so
        config = validate(method.Config, given, f"method {name}") if usable else None
        spec = MethodSpec(name, method, config, method.title or name)
    return Suite(spec, settings=settings)


def check_method(
    method: str | type[Method],
    *,
    collapse_steps: int = 40,
    learn_steps: int | None = None,
    skip: Collection[str] = (),
    overrides: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Run every conformance check on a method.

    Args:
        method: a registered name (a variant's too) or a Method subclass that need not be registered.
        collapse_steps: optimizer steps of the run that looks for collapse.
        learn_steps: optimizer steps of the run that looks for learning; default: 240, or what ``overrides`` say.
        skip: names of checks to leave out.
        overrides: ``KEY=VALUE`` as of ``--set``, such as ``"backbone={name: my_tiny}"``.
        options: configuration of the method.

    Returns:
        A report; call ``assert_passed()`` on it.

    Raises:
        PluginError: no such method.
        ConfigError: an unknown option or check.
    """
    suite = method_suite(method, overrides, options)
    suite = Suite(suite.spec, collapse_steps, learn_steps, suite.settings)
    return Report(suite.kind, suite.spec.name, list(suite.run(skip=skip)))


def backbone_checks(backbone: str | type[Backbone], overrides: Sequence[str] = ()) -> BackboneChecks:
    """Return the checks of a backbone; the arguments are those of :func:`check_backbone`."""
    cls = _loaded(registry().backbones, backbone)
    name = backbone if isinstance(backbone, str) else str(getattr(cls, "name", cls.__name__))
    return BackboneChecks(cls, conformance_settings(overrides, backbone=name))


def check_backbone(
    backbone: str | type[Backbone],
    *,
    skip: Collection[str] = (),
    overrides: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Run every conformance check on a backbone.

    Args:
        backbone: a registered name or a Backbone subclass that need not be registered.
        skip: names of checks to leave out.
        overrides: ``KEY=VALUE`` as of ``--set``, such as ``"pretrain.crop=32"``.
        options: configuration of the backbone; small ones make the checks fast.

    Returns:
        A report; call ``assert_passed()`` on it.

    Raises:
        PluginError: no such backbone.
        ConfigError: an unknown option or check.
    """
    given = [f"backbone.{key}={json.dumps(value)}" for key, value in options.items()]
    checks = backbone_checks(backbone, [*given, *overrides])
    return Report(checks.kind, checks.cls.name, list(checks.run(skip=skip)))


def dataset_checks(
    dataset: str | Dataset | type[Dataset], root: str | Path | None = None, overrides: Sequence[str] = ()
) -> DatasetChecks:
    """Return the checks of a dataset; the arguments are those of :func:`check_dataset`."""
    if isinstance(dataset, str):
        dataset = registry().datasets.get(dataset).load()
    elif isinstance(dataset, type):
        dataset = dataset()
    return DatasetChecks(
        dataset, conformance_settings(overrides, data=True), None if root is None else Path(root)
    )


def check_dataset(
    dataset: str | Dataset | type[Dataset],
    root: str | Path | None = None,
    *,
    skip: Collection[str] = (),
    overrides: Sequence[str] = (),
) -> Report:
    """Run every conformance check on a dataset.

    Args:
        dataset: a registered name, an adapter, or its class.
        root: a folder in its layout, small if it can be; None: what is declared is checked, and that other folders
            are refused.
        skip: names of checks to leave out.
        overrides: ``KEY=VALUE`` as of ``--set``, such as ``"data.spacing_mm=4"``.

    Returns:
        A report; call ``assert_passed()`` on it.

    Raises:
        PluginError: no such dataset.
        ConfigError: an unknown option or check.
    """
    checks = dataset_checks(dataset, root, overrides)
    return Report(checks.kind, checks.dataset.name, list(checks.run(skip=skip)))


def task_checks(
    task: str | Task, root: str | Path | None = None, overrides: Sequence[str] = ()
) -> TaskChecks:
    """Return the checks of a task; the arguments are those of :func:`check_task`."""
    registered_by = None
    if isinstance(task, str) and is_task_file(task):
        task = load_task(Path(task))
        root = root or task.place
    elif isinstance(task, str):
        entry = registry().tasks.get(task)
        task = entry.load()
        module = registry().plugins[entry.plugin].entry_point.load()
        registered_by = getattr(module, "ssl3d_tasks", None)
    settings = conformance_settings(overrides, data=True)
    return TaskChecks(task, settings, None if root is None else Path(root), registered_by)


def check_task(
    task: str | Task,
    root: str | Path | None = None,
    *,
    skip: Collection[str] = (),
    overrides: Sequence[str] = (),
) -> Report:
    """Run every conformance check on a task.

    Args:
        task: a registered name, a task file, or a task.
        root: its data: a folder, ``LAYOUT=DIR``, or ``phantoms``; None: it is evaluated on made-up volumes alone.
        skip: names of checks to leave out.
        overrides: ``KEY=VALUE`` as of ``--set``.

    Returns:
        A report; call ``assert_passed()`` on it.

    Raises:
        PluginError: no such task.
        ConfigError: an unknown option or check.
    """
    checks = task_checks(task, root, overrides)
    return Report(checks.kind, checks.task.name, list(checks.run(skip=skip)))


def format_checks(format: str | TableFormat) -> FormatChecks:
    """Return the checks of a table format."""
    return FormatChecks(_loaded(registry().table_formats, format))


def check_format(format: str | TableFormat, *, skip: Collection[str] = ()) -> Report:
    """Run every conformance check on a table format.

    Args:
        format: a registered name or a format.
        skip: names of checks to leave out.

    Returns:
        A report; call ``assert_passed()`` on it.

    Raises:
        PluginError: no such format.
        ConfigError: an unknown check.
    """
    checks = format_checks(format)
    return Report(checks.kind, checks.format.name, list(checks.run(skip=skip)))


def logger_checks(logger: str | type[Logger]) -> LoggerChecks:
    """Return the checks of a logger."""
    return LoggerChecks(_loaded(registry().loggers, logger))


def check_logger(logger: str | type[Logger], *, skip: Collection[str] = ()) -> Report:
    """Run every conformance check on a logger.

    Args:
        logger: a registered name, or a Logger subclass that need not be registered.
        skip: names of checks to leave out.

    Returns:
        A report; call ``assert_passed()`` on it.

    Raises:
        PluginError: no such logger.
        ConfigError: an unknown check.
    """
    checks = logger_checks(logger)
    return Report(checks.kind, str(getattr(checks.cls, "name", checks.cls)), list(checks.run(skip=skip)))
