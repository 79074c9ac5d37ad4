"""MLflow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ssl3d.files import read_bytes, write_bytes
from ssl3d.pretrain.logger import RUN_ID, End, Logger

__without_effect__ = "it is told what was computed"

STATUS: dict[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
AT_ONCE = 100
"""Parameters that a call may have."""
LONGEST = 500
"""Characters of a parameter's value that every version takes."""


class MLflow(Logger):
    """MLflow, in the folder `mlflow` of a run, or where MLFLOW_TRACKING_URI says."""

    name = "mlflow"
    # The small package lacks what its database needs; whoever has all of mlflow has that, too.
    requires: ClassVar[Mapping[str, str]] = {
        "mlflow": "ssl3d[mlflow]",
        "sqlalchemy": "ssl3d[mlflow]",
        "alembic": "ssl3d[mlflow]",
    }

    def start(self, folder: Path, run: Mapping[str, Any], step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would go over the network
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        place = folder / "mlflow"
        place.mkdir(parents=True, exist_ok=True)
        own = f"sqlite:///{(place / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", own))
        if step and (place / RUN_ID).is_file():
            self._id = read_bytes(place / RUN_ID).decode()
            self._client.update_run(self._id, "RUNNING")
            return
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "ssl3d"), place)
        created = self._client.create_run(experiment, run_name=os.environ.get("MLFLOW_RUN_NAME", folder.name))
        self._id = created.info.run_id
        write_bytes(place / RUN_ID, self._id.encode())
        facts = [Param(_allowed(key), value[:LONGEST]) for key, value in _flat(run)]
        for first in range(0, len(facts), AT_ONCE):
            self._client.log_batch(self._id, params=facts[first : first + AT_ONCE])

    def _experiment(self, name: str, place: Path) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return known.experiment_id
        own = None if "MLFLOW_TRACKING_URI" in os.environ else (place / "artifacts").resolve().as_uri()
        return self._client.create_experiment(name, artifact_location=own)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_allowed(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, end: End) -> None:
        self._client.set_terminated(self._id, STATUS[end])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested mappings as text under dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), str(value)


def _allowed(name: str) -> str:
    """Return a name that MLflow takes.

    >>> _allowed("identity.backbone.channels"), _allowed("f^g: rank")
    ('identity.backbone.channels', 'f_g: rank')
    """
    return re.sub(r"[^\w./: -]", "_", name)
