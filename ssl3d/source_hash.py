"""Hashes of the source code that decides a number.

The hash is over what is reached from where a number is computed: from the pretraining loop, the method and the backbone;
from the evaluation, the kind of task and the backbone; from the preparation of volumes in both. What is reached is found in
the source, name by name (a syntax tree, nothing is imported or run), through ssl3d, the bundled methods, and the modules of
whatever else a plugin's author wrote. Of a module only the definitions that are used count.

A definition is hashed without import statements, comments, docstrings and layout, and the hash of all is over the set of
them. So a module can be moved, renamed, split or merged without a change, and a helper that changes is one.

What changes no number is said where it stands: a module by ``__without_effect__ = "why"``, a function or class by the
decorator :func:`without_effect`. Options are marked by :data:`ssl3d.config.WITHOUT_EFFECT`; their defaults, and all
of the configuration, are values in the identity, and need no hash of the code.
"""

from __future__ import annotations

import ast
import hashlib
import symtable
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

from ssl3d.errors import PluginError

__without_effect__ = "it hashes code and is none that is hashed"

PREPARATION = "ssl3d.data.prepared.build:prepare"
PRETRAINING = "ssl3d.pretrain.loop:pretrain"
EVALUATION = "ssl3d.downstream.harness:evaluate"
PROBLEMS = "ssl3d.downstream.problems.kinds:problem_class"
"""Chooses the class of a kind of task; only the chosen one is part of a number's code."""

_MARK = "without_effect"


# --- The code of a number --------------------------------------------------------------------------


def pretraining_code(method: type | str, backbone: str) -> str:
    """Return the hash of the code that decides pretrained weights.

    Args:
        method: the class, or the name of a registered method.
        backbone: name of a registered backbone.

    Raises:
        PluginError: there is no such method or backbone, or its source is gone.
    """
    if isinstance(method, str):
        from ssl3d.registry.registry import registry

        entry = registry().methods.get(method)
        reference, plugin = entry.source, entry.plugin
    else:
        reference, plugin = reference_of(method), _plugin_of(method)
    source, owner = _backbone(backbone)
    return code_hash((PREPARATION, PRETRAINING, reference, source), _own((plugin, owner)))


def evaluation_code(problem: str, backbone: str) -> str:
    """Return the hash of the code that decides the score of given weights.

    Args:
        problem: name of the class that knows the kind of task, such as ``Segmentation``.
        backbone: name of a registered backbone.

    Raises:
        PluginError: there is no such class or backbone.
    """
    source, owner = _backbone(backbone)
    return code_hash((PREPARATION, EVALUATION, f"{PROBLEMS}:{problem}", source), _own((owner,)))


def reference_of(cls: type) -> str:
    """Return ``module:definition`` of a class; of one inside a function, the function."""
    return f"{cls.__module__}:{cls.__qualname__.partition('.')[0]}"


def _backbone(name: str) -> tuple[str, str]:
    from ssl3d.registry.registry import registry

    entry = registry().backbones.get(name)
    return entry.source, entry.plugin


def _plugin_of(method: type) -> str:
    from ssl3d.registry.registry import registry

    reference = reference_of(method)
    return next((entry.plugin for entry in registry().methods if entry.source == reference), "")


@cache
def _own(plugins: tuple[str, ...]) -> frozenset[str]:
    """Return the top-level modules of ssl3d and of the distributions of ``plugins`` (``distribution:entry-point``)."""
    own = {"ssl3d"}
    for plugin in plugins:
        try:
            listed = files(plugin.partition(":")[0]) or []
        except (PackageNotFoundError, ValueError):
            continue
        own |= {file.parts[0].removesuffix(".py") for file in listed if file.suffix == ".py"}
    return frozenset(own)


@cache
def code_hash(entries: Sequence[str], own: frozenset[str], folders: tuple[Path, ...] = ()) -> str:
    """Return the hash of all definitions reached from ``entries``.

    Args:
        entries: ``module:definition``; ``module:function:name`` stands for what ``name`` means in the function.
        own: top-level modules that are followed wherever they lie; of others, those outside of site-packages.
        folders: where top-level modules are looked for first.

    Raises:
        PluginError: an entry is not there.
    """
    found = closure(_tree(own, folders), entries)
    return _digest("\n".join(sorted({definition.digest for definition in found})))


@cache
def _tree(own: frozenset[str], folders: tuple[Path, ...]) -> Tree:
    return Tree(own, folders)


def closure(tree: Tree, entries: Sequence[str]) -> list[Definition]:
    """Return every definition that is reached from ``entries``; see :func:`code_hash`."""
    chooser = None
    left = [tree.definition(entry) for entry in entries]
    if any(entry.startswith(f"{PROBLEMS}:") for entry in entries):
        chooser = tree.definition(PROBLEMS)
    found: dict[tuple[str, str], Definition] = {}
    while left:
        definition = left.pop()
        if definition.key in found or definition.marked or definition is chooser:
            continue
        found[definition.key] = definition
        left += definition.reached
    return list(found.values())


def forget() -> None:
    """Read all source anew at the next call, for code that has changed while this process ran."""
    code_hash.cache_clear()
    _tree.cache_clear()
    _own.cache_clear()


# --- Definitions -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Definition:
    """What one name at the top level of a module stands for: the statements that bind or change it.

    The name ``""`` stands for the statements that bind nothing, which run when the module is imported.
    """

    module: Module
    name: str
    statements: list[ast.stmt] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        return self.module.name, self.name

    @property
    def marked(self) -> bool:
        """Whether it is said to change no number."""
        return self.module.marked or any(
            isinstance(decorator, ast.Name | ast.Attribute)
            and (decorator.id if isinstance(decorator, ast.Name) else decorator.attr) == _MARK
            for statement in self.statements
            for decorator in getattr(statement, "decorator_list", ())
        )

    @cached_property
    def links(self) -> dict[str, str | list[Definition]]:
        """What its free names mean: definitions, or the dotted name of something from elsewhere."""
        links: dict[str, str | list[Definition]] = {}
        for statement in self.statements:
            uses = _Uses(statement, self.module.source(statement))
            meanings = {name: self.module.resolve(name) for name in uses.names}
            for local, target in _imports(statement, self.module):
                meanings[local] = self.module.tree.lookup(*target)
            for name, meaning in meanings.items():
                if isinstance(meaning, Module):
                    for chain in uses.chains(name):
                        links[".".join((name, *chain))] = meaning.at(chain)
                elif meaning is not None:
                    links[name] = meaning if isinstance(meaning, str) else [meaning]
        return links

    @property
    def reached(self) -> Iterator[Definition]:
        """Definitions that it uses, and what runs when its module is imported."""
        for meaning in self.links.values():
            if not isinstance(meaning, str):
                yield from meaning
        if (loose := self.module.definitions.get("")) is not None:
            yield loose

    @cached_property
    def text(self) -> str:
        """Its source without imports, comments, docstrings and layout, and without the modules before names."""
        modules = {name for name in self.module.imports if isinstance(self.module.resolve(name), Module)}
        copies = [ast.parse(self.module.source(statement)).body[0] for statement in self.statements]
        return "\n".join(ast.unparse(_Bare(modules).visit(statement)) for statement in copies)

    @cached_property
    def digest(self) -> str:
        """Hash of the text and of what its names mean: another function under the same name is a change."""
        meanings = sorted(
            (name.rpartition(".")[2], meaning)
            if isinstance(meaning, str)
            else (
                name.rpartition(".")[2],
                *sorted({d.name if d.marked else _digest(d.text) for d in meaning}),
            )
            for name, meaning in self.links.items()
        )
        return _digest(f"{self.text}\n{meanings}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Bare(ast.NodeTransformer):
    """Drops imports and strings that stand alone, and ``module.`` before a name."""

    def __init__(self, modules: Collection[str]) -> None:
        self.modules = modules

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and not body:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None  # documentation, wherever it stands
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            return ast.Name(node.attr, node.ctx)
        return self.generic_visit(node)


class _Uses:
    """The names that a statement takes from its module."""

    def __init__(self, statement: ast.stmt, source: str) -> None:
        self.statement = statement
        table = symtable.symtable(source, "source", "exec")
        self.names = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
        left = list(table.get_children())
        while left:
            scope = left.pop()
            left += scope.get_children()
            self.names |= {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}

    def chains(self, name: str) -> set[tuple[str, ...]]:
        """Return the attributes behind ``name``: ``a.b.c`` gives (b, c); () where it stands alone."""
        found: set[tuple[str, ...]] = set()
        inner: set[int] = set()
        for node in ast.walk(self.statement):  # from the outside in
            chain: list[str] = []
            part: ast.AST = node
            while isinstance(part, ast.Attribute):
                chain.insert(0, part.attr)
                part = part.value
                inner.add(id(part))
            outermost = id(node) not in inner
            if outermost and isinstance(part, ast.Name) and part.id == name:
                found.add(tuple(chain))
        return found


# --- Modules ---------------------------------------------------------------------------------------

Target = tuple[str, str | None]
"""(module, name in it), or (module, None)."""


def _imports(node: ast.AST, module: Module) -> Iterator[tuple[str, Target]]:
    """Yield (local name, target) of every import in ``node``."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            for alias in found.names:
                top = alias.name.partition(".")[0]
                yield (alias.asname, (alias.name, None)) if alias.asname else (top, (top, None))
        elif isinstance(found, ast.ImportFrom) and found.module != "__future__":
            source = module.absolute(found)
            for alias in found.names:
                yield alias.asname or alias.name, (source, alias.name)


class Module:
    """The source of one module: what its names stand for."""

    def __init__(self, tree: Tree, name: str, path: Path | None) -> None:
        self.tree, self.name = tree, name
        self.package = path is None or path.stem == "__init__"
        self.definitions: dict[str, Definition] = {}
        self.imports: dict[str, Target] = {}
        self.stars: list[str] = []
        source = path.read_bytes() if path else b""
        self._lines = source.splitlines()
        for statement in ast.parse(source).body:
            self._take(statement)
        self.marked = "__without_effect__" in self.definitions

    def source(self, statement: ast.stmt) -> str:
        """Return the text of a statement at the top level."""
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])
        assert statement.end_lineno is not None
        lines = self._lines[first - 1 : statement.end_lineno]
        lines[-1] = lines[-1][: statement.end_col_offset]  # offsets are in bytes
        lines[0] = lines[0][statement.col_offset :]  # behind a semicolon
        return b"\n".join(lines).decode()

    def _take(self, statement: ast.stmt) -> None:
        test = statement.test if isinstance(statement, ast.If) else None
        for_types = isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"
        if isinstance(statement, ast.Import | ast.ImportFrom) or for_types:
            for local, target in _imports(statement, self):
                if local == "*":
                    self.stars.append(target[0])
                else:
                    self.imports[local] = target
            return
        if (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str)
        ):
            return
        names = _bound(statement, self.source(statement))
        if not names and (root := _root(statement)):
            names = {root}
        for name in (names or {""}) - {"__all__"}:
            self.definitions.setdefault(name, Definition(self, name)).statements.append(statement)
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self.imports |= dict(_imports(statement, self))  # below try or if

    def absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        above = parts[: len(parts) - node.level + self.package]
        return ".".join([*above, *([node.module] if node.module else [])])

    def resolve(self, name: str) -> Definition | Module | str | None:
        """Return what ``name`` stands for: a dotted name for something from elsewhere, None for a builtin."""
        if name in self.definitions:
            return self.definitions[name]
        if name in self.imports:
            return self.tree.lookup(*self.imports[name])
        for module in self.stars:
            if self.tree.owns(module) and (meaning := self.tree.lookup(module, name)) is not None:
                return meaning
        return None

    def at(self, chain: tuple[str, ...]) -> str | list[Definition]:
        """Return what ``module.a.b`` stands for; all of the module where it is used as a whole."""
        meaning: Definition | Module | str | None = self
        for name in chain:
            if not isinstance(meaning, Module):
                break
            meaning = self.tree.lookup(meaning.name, name)
        if isinstance(meaning, Module):
            return list(meaning.definitions.values())
        return [meaning] if isinstance(meaning, Definition) else meaning or ".".join((self.name, *chain))


def _bound(statement: ast.stmt, source: str) -> set[str]:
    """Return the names that a statement binds at the top level of its module."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    table = symtable.symtable(source, "source", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_namespace()}


def _root(statement: ast.stmt) -> str | None:
    """Return the name that a statement such as ``TABLE["a"] = 1`` or ``TABLE.update(...)`` changes."""
    target: ast.AST | None = None
    if isinstance(statement, ast.Assign):
        target = statement.targets[0]
    elif isinstance(statement, ast.AugAssign | ast.AnnAssign):
        target = statement.target
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        target = statement.value.func if isinstance(statement.value.func, ast.Attribute) else None
    while isinstance(target, ast.Attribute | ast.Subscript):
        target = target.value
    return target.id if isinstance(target, ast.Name) else None


class Tree:
    """All source that is followed, parsed when it is first asked for.

    Args:
        own: top-level modules that are followed wherever they lie.
        folders: where top-level modules are looked for first.
    """

    def __init__(self, own: Collection[str], folders: Sequence[Path] = ()) -> None:
        self._own, self._folders = own, folders
        self._modules: dict[str, Module | None] = {}
        self._tops: dict[str, Path | None] = {}

    def definition(self, entry: str) -> Definition:
        """Return what ``module:name`` or ``module:function:name`` stands for.

        Raises:
            PluginError: nothing.
        """
        module_name, name, *inside = entry.split(":")
        meaning = self.lookup(module_name, name)
        if inside and isinstance(meaning, Definition):
            inner = meaning.links.get(inside[0])
            meaning = inner[0] if isinstance(inner, list) else None
        if not isinstance(meaning, Definition):
            raise PluginError(f"The source of {entry} is not there to tell whether it has changed.")
        return meaning

    def lookup(self, module_name: str, name: str | None) -> Definition | Module | str | None:
        """Return what ``name`` in a module stands for; the module for None."""
        module = self.module(module_name)
        if module is None:
            return module_name if name is None else f"{module_name}.{name}"
        if name is None:
            return module
        return module.resolve(name) or self.module(f"{module_name}.{name}")

    def owns(self, name: str) -> bool:
        """Return whether the module is ssl3d's or a plugin's, not a library's."""
        return self.module(name) is not None

    def module(self, name: str) -> Module | None:
        """Return a module that is followed, or None."""
        if name not in self._modules:
            self._modules[name] = None
            top, *below = name.split(".")
            place = self._top(top)
            if place is not None:
                self._modules[name] = self._read(name, place, below)
        return self._modules[name]

    def _read(self, name: str, place: Path, below: list[str]) -> Module | None:
        if place.is_file():
            return None if below else Module(self, name, place)
        folder = place.joinpath(*below)
        for path in (folder / "__init__.py", folder.with_name(f"{folder.name}.py")):
            if path.is_file():
                return Module(self, name, path)
        return Module(self, name, None) if folder.is_dir() and any(folder.rglob("*.py")) else None

    def _top(self, name: str) -> Path | None:
        """Return the file or folder of a top-level module that is followed."""
        if name not in self._tops:
            self._tops[name] = None if name in sys.stdlib_module_names else self._find(name)
        return self._tops[name]

    def _find(self, name: str) -> Path | None:
        for folder in self._folders:
            for path in (folder / name, folder / f"{name}.py"):
                if path.exists():
                    return path
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            return None
        places = list(spec.submodule_search_locations or []) if spec else []
        origin = places[0] if places else spec.origin if spec and spec.has_location else None
        if origin is None or not (places or origin.endswith(".py")):
            return None
        library = {"site-packages", "dist-packages"} & set(Path(origin).parts)
        return Path(origin) if name in self._own or not library else None
