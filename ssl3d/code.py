"""Hashes of the source code that decides a number."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent
_SHARED = ("models", "data", "optim.py", "rng.py", "environment.py")
PARTS = {
    "pretrain": (*_SHARED, "losses", "transforms", "pretrain"),
    "downstream": (*_SHARED, "downstream"),
}


def method_modules(cls: type) -> list[str]:
    """Return the modules outside ssl3d and torch that define a method: its own and its bases'."""
    modules = dict.fromkeys(base.__module__ for base in cls.__mro__)
    return [name for name in modules if name.partition(".")[0] not in ("ssl3d", "torch", "builtins", "abc")]


def code_of(modules: Sequence[str]) -> dict[str, Any]:
    """Return the hashes of the code behind a number: of pretraining (with the method) and evaluation.

    Comments, docstrings and layout do not count.

    Args:
        modules: of the method, see :func:`method_modules`.
    """
    method = "".join(_module_hash(name) for name in modules)
    return {
        "pretrain": _digest(_part_hash("pretrain") + method),
        "downstream": _part_hash("downstream"),
        "modules": list(modules),
    }


@cache
def _part_hash(part: str) -> str:
    files = []
    for name in PARTS[part]:
        path = _ROOT / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    # Phantoms are data: the identity of a number has the hash of their contents.
    files = [file for file in files if _ROOT / "data/phantoms" not in file.parents]
    return _digest("".join(f"{f.relative_to(_ROOT).as_posix()}\n{_meaning(f)}\n" for f in files))


@cache
def _module_hash(name: str) -> str:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    return _meaning(Path(spec.origin)) if spec and spec.origin and Path(spec.origin).is_file() else "gone"


def _meaning(path: Path) -> str:
    """Return the hash of a source file without comments, docstrings and layout."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a string that stands alone is documentation, wherever it stands
            node.body = [  # type: ignore[attr-defined]
                n
                for n in body
                if not (
                    isinstance(n, ast.Expr)
                    and isinstance(n.value, ast.Constant)
                    and isinstance(n.value.value, str)
                )
            ]
    return _digest(ast.unparse(tree))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
