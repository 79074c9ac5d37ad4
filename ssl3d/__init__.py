"""ssl3d: a benchmark for self-supervised learning on 3D medical images.

This module is the public API (the docstrings). Names are imported on first use (PEP 562), so that ``import ssl3d`` costs
milliseconds and a listing never pays for torch. What is not in ``__all__`` here, or in that of :mod:`ssl3d.transforms`,
:mod:`ssl3d.losses`, :mod:`ssl3d.errors`, :mod:`ssl3d.testing` and :mod:`ssl3d.plot`, may change without notice.
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
    "CropSource": "ssl3d.pretrain.source",
    "Dataset": "ssl3d.data.cohort",
    "EMA": "ssl3d.models.ema",
    "Features": "ssl3d.models.backbone",
    "Logger": "ssl3d.pretrain.logger",
    "MLP": "ssl3d.models.heads",
    "Method": "ssl3d.pretrain.method",
    "MethodConfig": "ssl3d.config",
    "Model": "ssl3d.config",
    "PooledLinear": "ssl3d.models.heads",
    "PooledNorm": "ssl3d.models.heads",
    "Progress": "ssl3d.pretrain.method",
    "RestorationHead": "ssl3d.models.heads",
    "StopGradient": "ssl3d.pretrain.method",
    "TableFormat": "ssl3d.results.formats.format",
    "Task": "ssl3d.downstream.tasks",
    "check_norm": "ssl3d.models.heads",
    "create_model": "ssl3d.models.weights.create",
    "load": "ssl3d.downstream.model",
    "mean_image_error": "ssl3d.models.heads",
    "numpy_rng": "ssl3d.rng",
    "pool": "ssl3d.models.heads",
    "store": "ssl3d.results.results",
    "torch_rng": "ssl3d.rng",
    "view_measures": "ssl3d.pretrain.monitor",
}
_MODULES = ("bench", "errors", "losses", "plot", "pretrain", "testing", "transforms")
"""``bench`` and ``pretrain`` are called: ``ssl3d.bench(...)`` (see :mod:`ssl3d.calls`)."""

__all__ = ["__version__", "hookimpl", *sorted((*_LAZY, *_MODULES))]

if TYPE_CHECKING:
    from ssl3d.config import MethodConfig as MethodConfig
    from ssl3d.config import Model as Model
    from ssl3d.data.cohort import Case as Case
    from ssl3d.data.cohort import Dataset as Dataset
    from ssl3d.downstream.model import load as load
    from ssl3d.downstream.tasks import Task as Task
    from ssl3d.models.backbone import Backbone as Backbone
    from ssl3d.models.backbone import Features as Features
    from ssl3d.models.ema import EMA as EMA
    from ssl3d.models.heads import MLP as MLP
    from ssl3d.models.heads import PooledLinear as PooledLinear
    from ssl3d.models.heads import PooledNorm as PooledNorm
    from ssl3d.models.heads import RestorationHead as RestorationHead
    from ssl3d.models.heads import check_norm as check_norm
    from ssl3d.models.heads import mean_image_error as mean_image_error
    from ssl3d.models.heads import pool as pool
    from ssl3d.models.weights.create import create_model as create_model
    from ssl3d.pretrain.logger import Logger as Logger
    from ssl3d.pretrain.method import Method as Method
    from ssl3d.pretrain.method import Progress as Progress
    from ssl3d.pretrain.method import StopGradient as StopGradient
    from ssl3d.pretrain.monitor import view_measures as view_measures
    from ssl3d.pretrain.source import CropSource as CropSource
    from ssl3d.results.formats.format import TableFormat as TableFormat
    from ssl3d.results.results import store as store
    from ssl3d.rng import BatchRng as BatchRng
    from ssl3d.rng import numpy_rng as numpy_rng
    from ssl3d.rng import torch_rng as torch_rng


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"ssl3d.{name}")
    raise AttributeError(f"module 'ssl3d' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
