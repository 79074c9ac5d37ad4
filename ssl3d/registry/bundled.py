"""The tasks, datasets, backbones, table formats and loggers that come with ssl3d, as one ordinary plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssl3d import hookimpl

if TYPE_CHECKING:
    from ssl3d.data.cohort import Dataset
    from ssl3d.downstream.tasks import Task
    from ssl3d.results.formats.format import TableFormat


@hookimpl
def ssl3d_tasks() -> list[Task]:
    from ssl3d.downstream.tasks import BUILTIN_TASKS

    return list(BUILTIN_TASKS)


@hookimpl
def ssl3d_datasets() -> list[Dataset]:
    from ssl3d.data.layouts.bundled import LAYOUTS
    from ssl3d.data.layouts.releases import BUILTIN_DATASETS

    return [*BUILTIN_DATASETS, *LAYOUTS]


@hookimpl
def ssl3d_backbones() -> list[str]:
    return ["ssl3d.models.unet:UNet3D", "ssl3d.models.genesis:GenesisUNet3D"]


@hookimpl
def ssl3d_table_formats() -> list[TableFormat]:
    from ssl3d.results.formats.format import BUILTIN_FORMATS

    return list(BUILTIN_FORMATS)


@hookimpl
def ssl3d_loggers() -> list[str]:
    return [
        "ssl3d.pretrain.loggers.tensorboard:TensorBoard",
        "ssl3d.pretrain.loggers.wandb:WeightsAndBiases",
        "ssl3d.pretrain.loggers.mlflow:MLflow",
    ]
