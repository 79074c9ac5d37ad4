"""Sizes of the functions of ssl3d and the bundled plugins; ``python tests/functions.py`` prints the long and the wide.

Lines are those from ``def`` to the end of the body, decorators and the docstring left out; of a nested function they
count for the outer one, too. Arguments are all that a caller can name or pass, without ``self`` and ``cls``; the
arguments of a click command are not counted, since each is an option of the command line and nobody else passes them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("ssl3d", "plugins")
MOST_LINES = 60
MOST_ARGUMENTS = 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Size:
    """Size of one function, ``name`` as in ``ssl3d/cli.py:main``."""

    name: str
    lines: int
    arguments: int


def sizes(root: Path = ROOT) -> list[Size]:
    """Return the sizes of all functions and methods under ``root``."""
    found = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            where = path.relative_to(root).as_posix()
            for name, node in _functions(ast.parse(path.read_text(encoding="utf-8"))):
                found.append(Size(f"{where}:{name}", _lines(node), _arguments(node)))
    return found


def too_long(found: list[Size]) -> dict[str, int]:
    """Return the functions of too many lines."""
    return {size.name: size.lines for size in found if size.lines > MOST_LINES}


def too_wide(found: list[Size]) -> dict[str, int]:
    """Return the functions of too many arguments."""
    return {size.name: size.arguments for size in found if size.arguments > MOST_ARGUMENTS}


def _functions(node: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        name = inside
        if isinstance(child, Function | ast.ClassDef):
            name = f"{inside}{child.name}."
        if isinstance(child, Function):
            yield name[:-1], child
        yield from _functions(child, name)


def _lines(node: Function) -> int:
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def _arguments(node: Function) -> int:
    if any(_is_click_command(decorator) for decorator in node.decorator_list):
        return 0
    a = node.args
    named = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    named += [arg.arg for arg in (a.vararg, a.kwarg) if arg is not None]
    return len([name for name in named if name not in ("self", "cls")])


def _is_click_command(decorator: ast.expr) -> bool:
    """Whether it is ``@click.command(...)`` or ``@group.command(...)``."""
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(function, ast.Attribute) and function.attr in ("command", "group")


if __name__ == "__main__":
    measured = sizes()
    print(f"{len(measured)} functions")
    for what, large in (("lines", too_long(measured)), ("arguments", too_wide(measured))):
        for name, count in sorted(large.items(), key=lambda item: -item[1]):
            print(f"{count:4d} {what:<9}  {name}")
