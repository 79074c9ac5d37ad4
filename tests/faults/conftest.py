"""``make faults`` makes all trials (SSL3D_ALL_FAULTS), with a table; else those marked ``thorough`` are left out."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from faults.damage import FULL
from faults.world import world as world

_passed: dict[str, list[int]] = defaultdict(lambda: [0, 0])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if FULL:
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the trials of a test: those that it recorded as a property, or itself."""
    if "/faults/" not in report.nodeid or report.skipped or (report.passed and report.when != "call"):
        return
    name = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
    trials = int(dict(report.user_properties).get("trials", 1))
    _passed[name][0] += trials * report.passed
    _passed[name][1] += trials


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not FULL or not _passed:
        return
    terminalreporter.write_line("\n| trial | as it should be |\n|---|--:|")
    for name, (passed, all_) in _passed.items():
        terminalreporter.write_line(f"| {name} | {passed} of {all_} |")
    passed, all_ = (sum(one[place] for one in _passed.values()) for place in (0, 1))
    terminalreporter.write_line(f"| all | {passed} of {all_} |")
