"""Shared fixtures: tiny volumes made here, nothing downloaded.

Tests run in one process a core with one thread each: on volumes this small, threads wait for each
other longer than they compute.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["SSL3D_JOBS"] = "1"  # tests that want more say so

import numpy as np
import pytest
import torch

from ssl3d.config import Settings, load_settings

torch.set_num_threads(1)

_MANY_OBJECTS = 100_000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _little_for_the_collector() -> None:
    """Leave what modules hold to itself: jobs collect garbage before they measure memory, half a second for torch's."""
    if len(gc.get_objects()) > _MANY_OBJECTS:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def smoke() -> Settings:
    return load_settings("smoke")


@pytest.fixture(scope="session")
def volume_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small CT-like NIfTI volumes in HU, 20 voxels an edge at 6.4 mm."""
    import nibabel

    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    for i in range(5):
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 20)] * 3, indexing="ij"))
        body = (grid**2).sum(0) < 0.8
        heart = ((grid - rng.uniform(-0.2, 0.2, (3, 1, 1, 1))) ** 2).sum(0) < 0.15
        hu = np.where(body, 40, -1000) + np.where(heart, 300, 0) + rng.normal(0, 10, body.shape)
        affine = np.diag([6.4, 6.4, 6.4, 1])
        nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), affine), folder / f"ct_{i}.nii.gz")
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """On CI (SSL3D_NO_SKIPS) nothing is skipped: there, what is missing is installed."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and os.environ.get("SSL3D_NO_SKIPS"):
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            terminalreporter.write_line(f"SKIPPED where nothing may be: {report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skipped test fails the run where SSL3D_NO_SKIPS is set."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and reporter.stats.get("skipped") and os.environ.get("SSL3D_NO_SKIPS") and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
