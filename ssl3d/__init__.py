"""ssl3d: a benchmark for self-supervised learning on 3D medical images.

This module is the public API for plugin authors. Names are imported on first use (PEP 562), so
that ``import ssl3d`` costs milliseconds and a listing never pays for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import pluggy

try:
    __version__ = version("ssl3d")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

hookimpl = pluggy.HookimplMarker("ssl3d")
"""Marks a function of a plugin as the implementation of a hook of :mod:`ssl3d.registry.hookspecs`."""

_LAZY = {
    "Backbone": "ssl3d.models.backbone",
    "BatchRng": "ssl3d.rng",
    "Case": "ssl3d.data.cohort",
    "Dataset": "ssl3d.data.cohort",
    "Method": "ssl3d.pretrain.method",
    "MethodConfig": "ssl3d.config",
    "Progress": "ssl3d.pretrain.method",
    "StopGradient": "ssl3d.pretrain.method",
    "TableFormat": "ssl3d.results.formats.format",
    "Task": "ssl3d.downstream.tasks",
    "create_model": "ssl3d.models.weights.create",
    "load": "ssl3d.downstream.model",
}

__all__ = ["__version__", "hookimpl", *sorted(_LAZY)]

if TYPE_CHECKING:
    from ssl3d.config import MethodConfig as MethodConfig
    from ssl3d.data.cohort import Case as Case
    from ssl3d.data.cohort import Dataset as Dataset
    from ssl3d.downstream.model import load as load
    from ssl3d.downstream.tasks import Task as Task
    from ssl3d.models.backbone import Backbone as Backbone
    from ssl3d.models.weights.create import create_model as create_model
    from ssl3d.pretrain.method import Method as Method
    from ssl3d.pretrain.method import Progress as Progress
    from ssl3d.pretrain.method import StopGradient as StopGradient
    from ssl3d.results.formats.format import TableFormat as TableFormat
    from ssl3d.rng import BatchRng as BatchRng


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ssl3d' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
