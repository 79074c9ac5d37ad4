"""Every hook of ssl3d. A hook returns values and never mutates what it is given.

A plugin is an importable module with one or more functions marked by ``ssl3d.hookimpl``,
announced in the package's ``pyproject.toml``::

    [project.entry-points.ssl3d]
    my_plugin = "my_package.my_module"

Names (of methods, tasks, datasets, backbones, table formats, loggers) are unique over all installed
plugins. Two plugins that claim one name are both named, and the name is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    # The names that plugin authors know; the modules behind them import the registry.
    from ssl3d import Backbone, Dataset, Logger, Method, TableFormat, Task

__without_effect__ = "documentation"

hookspec = pluggy.HookspecMarker("ssl3d")


@hookspec
def ssl3d_methods() -> list[type[Method] | str]:
    """Register pretext methods.

    Returns:
        :class:`ssl3d.Method` subclasses. A string ``"module:Class"`` stands for a class that is
        imported only when it is asked for, which keeps ``ssl3d methods`` fast: its ``name``,
        ``title``, ``trains`` and ``variants`` must then be literals in the class body, because
        the listing reads them from the source without running it.

    Example::

        @ssl3d.hookimpl
        def ssl3d_methods():
            return [MyMethod]
    """
    raise NotImplementedError


@hookspec
def ssl3d_tasks() -> list[Task]:
    """Register downstream tasks.

    Returns:
        :class:`ssl3d.Task` objects; each names the dataset that it is evaluated on.

    Example::

        @ssl3d.hookimpl
        def ssl3d_tasks():
            return [ssl3d.Task(name="liver", title="Liver", kind="segmentation", dataset="lits",
                               metric="dsc", counts=(80, 20, 31), preparation={"scaling": "ct"})]
    """
    raise NotImplementedError


@hookspec
def ssl3d_datasets() -> list[Dataset]:
    """Register datasets: adapters from a release's files on disk to a list of cases.

    Returns:
        Instances of :class:`ssl3d.Dataset` subclasses.

    Example::

        class LiTS(ssl3d.Dataset):
            name, summary, modality, intensity_offset = "lits", "LiTS 2017", "ct", 1024
            label_values = {1: "liver", 2: "tumour"}

            def cases(self, root):
                return [ssl3d.Case(id=p.name[7:-4], subject=p.name[7:-4], image=p,
                                   label=root / p.name.replace("volume", "segmentation"))
                        for p in sorted(root.glob("volume-*.nii"))]

        @ssl3d.hookimpl
        def ssl3d_datasets():
            return [LiTS()]
    """
    raise NotImplementedError


@hookspec
def ssl3d_backbones() -> list[type[Backbone] | str]:
    """Register backbones: the network that every method trains and every task evaluates.

    Returns:
        :class:`ssl3d.models.backbone.Backbone` subclasses, or strings ``"module:Class"`` that are
        imported when asked for (see :func:`ssl3d_methods`).

    Example::

        @ssl3d.hookimpl
        def ssl3d_backbones():
            return ["my_package.swin:SwinBackbone"]
    """
    raise NotImplementedError


@hookspec
def ssl3d_table_formats() -> list[TableFormat]:
    """Register formats of ``ssl3d table --format NAME``.

    Returns:
        :class:`ssl3d.TableFormat` objects; ``render(table)`` returns the text to print.

    Example::

        @ssl3d.hookimpl
        def ssl3d_table_formats():
            return [ssl3d.TableFormat("json", "One JSON object per cell", render=to_json)]
    """
    raise NotImplementedError


@hookspec
def ssl3d_loggers() -> list[type[Logger] | str]:
    """Register loggers: what is told the course of a pretraining that names them in ``pretrain.loggers``.

    Returns:
        :class:`ssl3d.Logger` subclasses, or strings ``"module:Class"`` that are imported when asked for (see
        :func:`ssl3d_methods`).

    Example::

        @ssl3d.hookimpl
        def ssl3d_loggers():
            return ["my_package.mail:Mail"]
    """
    raise NotImplementedError
