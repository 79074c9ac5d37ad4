"""Packages that can be called: ``ssl3d.pretrain(...)`` is a function, ``ssl3d.pretrain.method`` a module of its package."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__without_effect__ = "names of the public API"


def make_callable(package: str, function: str) -> None:
    """Let a package be called as a function, which is imported at the first call.

    A module's class may be replaced by a subclass (Python's data model, "Customizing module attribute access").

    Args:
        package: name of the package, as in ``sys.modules``.
        function: ``module:name``.
    """

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            place, _, name = function.partition(":")
            return getattr(import_module(place), name)(*args, **kwargs)

    module = sys.modules[package]
    module.__class__ = CallablePackage
