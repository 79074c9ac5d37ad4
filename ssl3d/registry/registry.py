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
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

import pluggy

from ssl3d.errors import PluginError, in_words, nearest
from ssl3d.registry import hookspecs

if TYPE_CHECKING:
    from ssl3d.data.cohort import Dataset
    from ssl3d.downstream.tasks import Task
    from ssl3d.models.backbone import Backbone
    from ssl3d.pretrain.logger import Logger
    from ssl3d.pretrain.method import Method
    from ssl3d.results.formats.format import TableFormat

__without_effect__ = "what it finds is named in the identity, and hashed"

GROUP = "ssl3d"
T = TypeVar("T")


@dataclass
class Plugin:
    """One entry point: where it comes from, and why it is unusable if it is."""

    distribution: str
    version: str
    entry_point: EntryPoint
    errors: list[str] = field(default_factory=list)
    """What it cannot do: its import failed, a hook raised, or something that a hook returned is unusable."""
    problems: list[str] = field(default_factory=list)
    """What is suspicious, such as a misspelt hook."""

    @property
    def name(self) -> str:
        return f"{self.distribution}:{self.entry_point.name}"

    @property
    def error(self) -> str | None:
        """All errors in one text; None without any."""
        return "; ".join(self.errors) or None


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered thing: its name, what a listing says of it, and how to load it.

    ``overrides`` is non-empty for a variant: a named configuration of the method ``base``.
    ``source`` is ``module:Class`` of what is a class.
    """

    name: str
    plugin: str
    load: Callable[[], T]
    facts: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    source: str = ""

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

    def titles(self) -> dict[str, str]:
        """Return name -> title."""
        return {name: entry.title for name, entry in self._entries.items()}

    @contextmanager
    def lent(self, entry: Entry[T]) -> Iterator[None]:
        """Hold one more entry while the block runs, in the place of one of its name; for checks of what is not installed."""
        before = dict(self._entries)
        self._entries[entry.name] = entry
        try:
            yield
        finally:
            self._entries = before

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
                    f"\nThe plugin {plugin.name} is broken and may be meant to provide it: {plugin.error}"
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
        for distribution, version, entry_point in _installed() if entry_points is None else entry_points:
            self._load(Plugin(distribution, version, entry_point))

    def _load(self, plugin: Plugin) -> None:
        self.plugins[plugin.name] = plugin
        try:
            module = plugin.entry_point.load()
        except BaseException as error:  # a plugin may even call sys.exit() at import
            if isinstance(error, KeyboardInterrupt):
                raise
            plugin.errors.append(f"it could not be imported: {in_words(error)}")
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
            plugin.errors.append(str(error))

    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins.values() if plugin.error]

    def _entries(self, hook: str, read: Callable[[Any], Entry[Any]]) -> Iterator[Entry[Any]]:
        """Call ``hook`` plugin by plugin and make an entry of each item that it returns.

        What raises or cannot be used is an error of that plugin alone; its other items stay usable.
        """
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            plugin = self.plugins[impl.plugin_name]
            try:
                returned = impl.function()
                if isinstance(returned, str | Mapping) or not isinstance(returned, Iterable):
                    plugin.errors.append(f"{hook}() returned {_shown(returned)}: return a list.")
                    continue
                items = list(returned)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever a plugin raises
                plugin.errors.append(f"{hook}() raised {in_words(error)}")
                continue
            for item in items:
                try:
                    yield replace(read(item), plugin=plugin.name)
                except Exception as error:
                    reason = error if isinstance(error, PluginError) else in_words(error)
                    plugin.errors.append(f"{hook}() returned {_shown(item)}: {reason}")

    @cached_property
    def methods(self) -> Catalogue[type[Method]]:
        """Pretext methods and their named variants."""
        catalogue: Catalogue[type[Method]] = Catalogue("method", self.broken)
        for entry in self._entries("ssl3d_methods", partial(_class_entry, "ssl3d.pretrain.method:Method")):
            catalogue.add(entry)
            for name, overrides in entry.facts.get("variants", {}).items():
                summary = f"{entry.title} with " + ", ".join(f"{k}={v}" for k, v in overrides.items())
                catalogue.add(
                    Entry(
                        name,
                        entry.plugin,
                        entry.load,
                        {**entry.facts, "title": _variant_title(entry, name), "summary": summary},
                        base=entry.name,
                        overrides=dict(overrides),
                        source=entry.source,
                    )
                )
        return catalogue

    @cached_property
    def backbones(self) -> Catalogue[type[Backbone]]:
        """Backbones."""
        return self._catalogue(
            "backbone", "ssl3d_backbones", partial(_class_entry, "ssl3d.models.backbone:Backbone")
        )

    @cached_property
    def tasks(self) -> Catalogue[Task]:
        """Downstream tasks."""
        return self._catalogue("task", "ssl3d_tasks", _task_entry)

    @cached_property
    def datasets(self) -> Catalogue[Dataset]:
        """Dataset adapters."""
        return self._catalogue("dataset", "ssl3d_datasets", _dataset_entry)

    @cached_property
    def table_formats(self) -> Catalogue[TableFormat]:
        """Formats of ``ssl3d table``."""
        return self._catalogue("table format", "ssl3d_table_formats", _format_entry)

    @cached_property
    def loggers(self) -> Catalogue[type[Logger]]:
        """Loggers of pretraining."""
        return self._catalogue(
            "logger", "ssl3d_loggers", partial(_class_entry, "ssl3d.pretrain.logger:Logger")
        )

    @cached_property
    def catalogues(self) -> dict[str, Catalogue[Any]]:
        """All of them, by what they hold."""
        every = (self.methods, self.tasks, self.datasets, self.backbones, self.table_formats, self.loggers)
        return {one.kind: one for one in every}

    def _catalogue(self, kind: str, hook: str, read: Callable[[Any], Entry[Any]]) -> Catalogue[Any]:
        catalogue: Catalogue[Any] = Catalogue(kind, self.broken)
        for entry in self._entries(hook, read):
            catalogue.add(entry)
        return catalogue


# --- What a hook may return -----------------------------------------------------------------------

# Each of these makes the entry of one item, or raises PluginError saying why the item is none.
# Whatever a listing or the command line reads of an item is checked here.


def _shown(item: Any) -> str:
    """Return an item as code, however broken it is."""
    try:
        return repr(item)
    except Exception:
        return f"an object of {type(item).__name__}"


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise PluginError(message)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip())


def _variant_title(base: Entry[Any], name: str) -> str:
    """Return how tables call a variant: as they call its method, where its name begins with the method's."""
    rest = name.removeprefix(f"{base.name}_")
    return name.replace("_", " ") if rest == name else f"{base.title} {rest.replace('_', ' ')}"


def _class_entry(base: str, item: Any) -> Entry[Any]:
    _demand(isinstance(item, str | type), 'return classes, or strings "module:Class".')
    if isinstance(item, type):
        module_name, _, class_name = base.partition(":")
        module = sys.modules.get(module_name)  # whoever made a subclass has imported it; a listing need not
        _demand(
            module is not None and issubclass(item, getattr(module, class_name)),
            f"return subclasses of ssl3d.{class_name}.",
        )
    facts = read_facts(item) if isinstance(item, str) else class_facts(item)
    _demand(_is_name(facts["name"]), f"its name is {facts['name']!r}, which is no text.")
    variants = facts.get("variants", {})
    _demand(
        isinstance(variants, Mapping)
        and all(
            _is_name(k) and isinstance(v, Mapping) and all(map(_is_name, v)) for k, v in variants.items()
        ),
        f"variants = {variants!r}; write {{name: {{option: value}}}}.",
    )
    source = item if isinstance(item, str) else f"{item.__module__}:{item.__qualname__}"
    return Entry(facts["name"], "", partial(load_class, item), facts, source=source)


def _object_entry(item: Any) -> Entry[Any]:
    _demand(_is_name(item.name), f"its name is {item.name!r}, which is no text.")
    facts = {"title": getattr(item, "title", None), "summary": getattr(item, "summary", "")}
    _demand(isinstance(facts["summary"], str), f"its summary is {facts['summary']!r}, which is no text.")
    return Entry(item.name, "", partial(_self, item), facts)


def _task_entry(item: Any) -> Entry[Task]:
    from ssl3d.downstream.tasks import Kind, Metric, Task

    _demand(isinstance(item, Task), "return ssl3d.Task objects.")
    for key, allowed in (("kind", get_args(Kind)), ("metric", get_args(Metric))):
        value = getattr(item, key)
        _demand(value in allowed, f"{key} = {value!r}.{nearest(str(value), allowed)}")
    _demand(_is_name(item.dataset), f"dataset = {item.dataset!r}; name a registered dataset.")
    counts = item.counts
    _demand(
        counts is None
        or (
            isinstance(counts, Sequence)
            and len(counts) == 3
            and all(isinstance(n, int) and n > 0 for n in counts)
        ),
        f"counts = {counts!r}; write (training, validation, test), or None.",
    )
    return _object_entry(item)


def _dataset_entry(item: Any) -> Entry[Dataset]:
    from ssl3d.data.cohort import Dataset, Modality

    _demand(isinstance(item, Dataset), "return objects of subclasses of ssl3d.Dataset.")
    _demand(
        type(item).cases is not Dataset.cases,
        f"{type(item).__name__} has no method cases, which lists the cases.",
    )
    modalities = get_args(Modality)
    _demand(
        item.modality in modalities, f"modality = {item.modality!r}.{nearest(str(item.modality), modalities)}"
    )
    offset = item.intensity_offset
    _demand(
        offset == "auto" or isinstance(offset, int | float),
        f'intensity_offset = {offset!r}; a number or "auto".',
    )
    return _object_entry(item)


def _format_entry(item: Any) -> Entry[TableFormat]:
    _demand(callable(getattr(item, "render", None)), "return ssl3d.TableFormat objects.")
    return _object_entry(item)


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
        raise PluginError(f"{reference} could not be imported: {in_words(error)}") from error


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
