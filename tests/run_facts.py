"""What run.json says of a pretraining, for tests that need a run but no pretraining."""

from __future__ import annotations

from typing import Any


def finished_run(**more: Any) -> dict[str, Any]:
    """Return the least that a finished run's run.json holds."""
    method = {"name": "gvsl", "config": {}}
    identity = {"method": method, "backbone": {}, "pretrain": None, "seed": 0}
    return {
        "format": 2, "status": "finished", "step": 1, "steps": 1, "method_name": "gvsl", "backbone": {},
        "identity": identity,
    } | more  # fmt: skip
