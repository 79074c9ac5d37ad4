"""What imports what: circles between modules, and imports that run back up. ``python tests/imports.py`` prints both.

Every import counts: at the top of a module, inside a function, and for types only (``TYPE_CHECKING``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: From the ground up: a package may import the packages of its own layer's number or below, never those above.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "tools",
        (
            "calls",
            "errors",
            "marks",
            "memory",
            "progress",
            "parallel",
            "process",
            "remedies",
            "signals",
            "spreadsheet",
        ),
    ),
    ("configuration, files, devices", ("config", "options", "files", "locks", "device", "optim", "ranks")),
    ("machine, randomness, geometry", ("environment", "rng", "geometry")),
    ("plugins by name", ("registry", "source_hash")),
    ("volumes; transforms; losses; records and tables", ("data", "transforms", "losses", "results")),
    ("backbones and weights; reports", ("models", "plot", "report")),
    ("pretraining; evaluation", ("pretrain", "downstream")),
    ("the bench; conformance", ("bench", "testing")),
    (
        "the command line; bundled plugins",
        ("commands", "cli", "__main__", "registry.bundled", "ssl3d_methods"),
    ),
)
#: The one kind of import that may run up: the registry looks, when asked, whether a plugin returned what the contract says.
CONTRACTS = {
    "ssl3d.registry.registry": {
        "ssl3d.data.cohort", "ssl3d.downstream.tasks", "ssl3d.models.backbone", "ssl3d.pretrain.logger",
        "ssl3d.pretrain.method", "ssl3d.results.formats.format",
    },
}  # fmt: skip
#: Packages of one layer that must not know each other.
APART = (
    ("pretrain", "downstream"),
    ("transforms", "losses"),
    ("data", "results"),
    ("losses", "results"),
    ("transforms", "results"),
)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the modules of both packages by name; the public API ``ssl3d`` itself is left out."""
    found = {}
    for base, package in ((root, "ssl3d"), (root / "plugins", "ssl3d_methods")):
        for path in sorted((base / package).rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    found.pop("ssl3d", None)
    return found


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules among ``known`` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from (name for name in (full if full in known else node.module,) if name in known)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Return each module's imports."""
    known = modules(root)
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other (strongly connected, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(edges):
        if name not in index:
            visit(name)
    return found


def package(module: str) -> str:
    """Return the package of a module: its folder below ssl3d, or its own name at the bottom."""
    parts = module.split(".")
    if parts[0] != "ssl3d":
        return parts[0]
    inner = ".".join(parts[1:])
    return inner if any(inner in packages for _, packages in LAYERS) else parts[1]


def layer(module: str) -> int:
    """Return the number of a module's layer, 1 at the ground.

    Raises:
        KeyError: the table does not know its package.
    """
    for number, (_, packages) in enumerate(LAYERS, 1):
        if package(module) in packages:
            return number
    raise KeyError(module)


def back_running(edges: Mapping[str, set[str]]) -> list[str]:
    """Return the imports that run up to a higher layer, or between packages of one layer that are to be apart."""
    found = []
    for name, others in sorted(edges.items()):
        for other in sorted(others):
            pair = {package(name), package(other)}
            if layer(other) > layer(name) or (len(pair) == 2 and any(pair == set(two) for two in APART)):
                found.append(f"{name} -> {other}")
    return found


def table() -> str:
    """Return the layers as a Markdown table, the highest first, as docs/architecture.md shows it."""
    lines = ["| layer | what | packages |", "|--:|---|---|"]
    for number, (what, packages) in reversed(list(enumerate(LAYERS, 1))):
        lines.append(f"| {number} | {what} | {', '.join(f'`{name}`' for name in packages)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    every = graph()
    print(table())
    print(f"\n{len(every)} modules, {len(LAYERS)} layers")
    for what, rows in (
        ("circles", [" <-> ".join(c) for c in circles(every)]),
        ("imports that run back up", back_running(every)),
    ):
        print(f"{len(rows)} {what}", *rows, sep="\n  ")
