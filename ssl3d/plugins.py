"""Entry points -> registry.

pluggy's own entry-point loader lets one broken plugin stop the program and lets a later plugin
silently replace an earlier one. This loader registers ``distribution:entry-point``, keeps the
reason of a failed import until that plugin is asked for, refuses duplicate names naming both
sides, and reports misspelt hooks. It imports neither torch nor monai: a method may be announced
as ``"module:Class"``, and its listing is read from the source without running it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from ssl3d import hookspecs
from ssl3d.errors import PluginError, nearest

if TYPE_CHECKING:
    from ssl3d.data.cohort import Dataset
    from ssl3d.downstream.tasks import Task
    from ssl3d.models.factory import Backbone
    from ssl3d.pretrain.method import Method
    from ssl3d.results.formats import TableFormat

GROUP = "ssl3d"
T = TypeVar("T")


@dataclass
class Plugin:
    """One entry point: where it comes from, and why it is unusable if it is."""

    distribution: str
    version: str
    entry_point: EntryPoint
    error: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.distribution}:{self.entry_point.name}"


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered thing: its name, what a listing says of it, and how to load it.

    ``overrides`` is non-empty for a variant: a named configuration of the method ``base``.
    """

    name: str
    plugin: str
    load: Callable[[], T]
    facts: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return str(self.facts.get("title") or self.name)

    @property
    def summary(self) -> str:
        return str(self.facts.get("summary", ""))


class Catalogue(Generic[T]):
    """The registered things of one kind, by unique name."""

    def __init__(self, kind: str, broken: Callable[[], list[Plugin]]) -> None:
        self.kind, self._broken = kind, broken
        self._entries: dict[str, Entry[T]] = {}
        self.conflicts: dict[str, list[str]] = {}

    def add(self, entry: Entry[T]) -> None:
        if entry.name in self._entries or entry.name in self.conflicts:
            first = self.conflicts.setdefault(entry.name, [])
            if entry.name in self._entries:
                first.append(self._entries.pop(entry.name).plugin)
            first.append(entry.plugin)
        else:
            self._entries[entry.name] = entry

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def get(self, name: str) -> Entry[T]:
        """Return the entry called ``name``.

        Raises:
            PluginError: the name is unknown, claimed twice, or perhaps belongs to a broken plugin.
        """
        if name in self.conflicts:
            raise PluginError(
                f'{self.kind} "{name}" is registered by {" and by ".join(self.conflicts[name])}. '
                "Names are unique: uninstall one of them or ask its author to rename it."
            )
        if name not in self._entries:
            message = f'Unknown {self.kind} "{name}".{nearest(name, self._entries)}'
            for plugin in self._broken():
                message += (
                    f"\nThe plugin {plugin.name} could not be imported and may provide it: {plugin.error}"
                )
            raise PluginError(message)
        return self._entries[name]


class Registry:
    """All installed plugins and what they register."""

    def __init__(self, entry_points: Iterable[tuple[str, str, EntryPoint]] | None = None) -> None:
        """Load the plugins.

        Args:
            entry_points: (distribution, version, entry point) triples; default: all installed.
        """
        self.manager = pluggy.PluginManager("ssl3d")
        self.manager.add_hookspecs(hookspecs)
        self.plugins: dict[str, Plugin] = {}
        for distribution, version, entry_point in entry_points or _installed():
            self._load(Plugin(distribution, version, entry_point))

    def _load(self, plugin: Plugin) -> None:
        self.plugins[plugin.name] = plugin
        try:
            module = plugin.entry_point.load()
        except BaseException as error:  # a plugin may even call sys.exit() at import
            if isinstance(error, KeyboardInterrupt):
                raise
            plugin.error = f"{type(error).__name__}: {error}"
            return
        known = {name for name in dir(hookspecs) if name.startswith("ssl3d_")}
        for name, member in inspect.getmembers(module, inspect.isroutine):
            marked = hasattr(member, "ssl3d_impl")
            if marked and name not in known:
                plugin.problems.append(f'no hook is called "{name}".{nearest(name, known)}')
            elif name in known and not marked:
                plugin.problems.append(f"{name}() is not marked: put @ssl3d.hookimpl above it.")
        try:
            self.manager.register(module, name=plugin.name)
        except pluggy.PluginValidationError as error:
            plugin.error = str(error)

    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins.values() if plugin.error]

    def _returned(self, hook: str) -> Iterator[tuple[Plugin, Any]]:
        """Call ``hook`` plugin by plugin, so that a failure is the failure of one plugin."""
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            plugin = self.plugins[impl.plugin_name]
            try:
                items = list(impl.function())
            except Exception as error:
                plugin.error = f"{hook}() raised {type(error).__name__}: {error}"
                continue
            for item in items:
                yield plugin, item

    @cached_property
    def methods(self) -> Catalogue[type[Method]]:
        """Pretext methods and their named variants."""
        catalogue: Catalogue[type[Method]] = Catalogue("method", self.broken)
        for entry in self._classes("ssl3d_methods"):
            catalogue.add(entry)
            for name, overrides in entry.facts.get("variants", {}).items():
                summary = f"{entry.title} with " + ", ".join(f"{k}={v}" for k, v in overrides.items())
                catalogue.add(
                    Entry(
                        name,
                        entry.plugin,
                        entry.load,
                        {**entry.facts, "title": name.replace("_", " "), "summary": summary},
                        base=entry.name,
                        overrides=dict(overrides),
                    )
                )
        return catalogue

    @cached_property
    def backbones(self) -> Catalogue[type[Backbone]]:
        """Backbones."""
        catalogue: Catalogue[type[Backbone]] = Catalogue("backbone", self.broken)
        for entry in self._classes("ssl3d_backbones"):
            catalogue.add(entry)
        return catalogue

    @cached_property
    def tasks(self) -> Catalogue[Task]:
        """Downstream tasks."""
        return self._objects("task", "ssl3d_tasks")

    @cached_property
    def datasets(self) -> Catalogue[Dataset]:
        """Dataset adapters."""
        return self._objects("dataset", "ssl3d_datasets")

    @cached_property
    def table_formats(self) -> Catalogue[TableFormat]:
        """Formats of ``ssl3d table``."""
        return self._objects("table format", "ssl3d_table_formats")

    def _objects(self, kind: str, hook: str) -> Catalogue[Any]:
        catalogue: Catalogue[Any] = Catalogue(kind, self.broken)
        for plugin, item in self._returned(hook):
            facts = {"title": getattr(item, "title", None), "summary": getattr(item, "summary", "")}
            catalogue.add(Entry(item.name, plugin.name, partial(_self, item), facts))
        return catalogue

    def _classes(self, hook: str) -> Iterator[Entry[Any]]:
        for plugin, item in self._returned(hook):
            try:
                facts = read_facts(item) if isinstance(item, str) else class_facts(item)
                yield Entry(facts["name"], plugin.name, partial(load_class, item), facts)
            except Exception as error:
                plugin.problems.append(f"{hook}() returned {item!r}: {error}")


FACTS = ("name", "title", "trains", "paper", "variants", "volumes_per_item")


def class_facts(cls: type) -> dict[str, Any]:
    """Return what a listing shows of a method or backbone class."""
    facts = {key: getattr(cls, key) for key in FACTS if hasattr(cls, key)}
    if not facts.get("name"):
        raise PluginError(f"{cls.__module__}.{cls.__qualname__} has no `name`; add a class attribute.")
    return {**facts, "summary": _first_line(cls.__doc__)}


def read_facts(reference: str) -> dict[str, Any]:
    """Return what a listing shows of ``"module:Class"``, read from its source without running it.

    Raises:
        PluginError: the module or the class does not exist, or has no literal ``name``.
    """
    module_name, _, class_name = reference.partition(":")
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        raise PluginError(f'module "{module_name}" not found; write "module:Class".')
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            facts: dict[str, Any] = {"summary": _first_line(ast.get_docstring(node))}
            for statement in node.body:
                if isinstance(statement, ast.Assign):
                    targets, value = statement.targets, statement.value
                elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                    targets, value = [statement.target], statement.value
                else:
                    continue
                for target in targets:
                    if isinstance(target, ast.Name) and target.id in FACTS:
                        facts[target.id] = ast.literal_eval(value)
            if "name" not in facts:
                raise PluginError(f"{reference} has no literal `name` in its class body.")
            return facts
    raise PluginError(f'no class "{class_name}" at the top level of {module_name}.')


def load_class(reference: str | type) -> Any:
    """Import ``"module:Class"``; a class is returned as it is."""
    if isinstance(reference, type):
        return reference
    module_name, _, class_name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except Exception as error:
        raise PluginError(f"{reference} could not be imported: {type(error).__name__}: {error}") from error


def _self(item: T) -> T:
    return item


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0].rstrip(".") if (text or "").strip() else ""


def _installed() -> Iterator[tuple[str, str, EntryPoint]]:
    seen: set[tuple[str, str]] = set()
    for distribution in distributions():
        for entry_point in distribution.entry_points:
            if entry_point.group != GROUP:
                continue
            name = distribution.metadata["Name"]
            # An editable install can be found twice: by its .dist-info and by its source tree.
            if (name, entry_point.name) not in seen:
                seen.add((name, entry_point.name))
                yield name, distribution.version, entry_point


@cache
def registry() -> Registry:
    """Return the registry of all installed plugins; loaded once a process."""
    return Registry()
