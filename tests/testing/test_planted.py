"""Mistakes that authors make: each is told once, by one check, with the place in the author's file and a hint."""

from __future__ import annotations

import re
from pathlib import Path

import planted
import pytest

import ssl3d
from ssl3d.testing.report import method_suite
from ssl3d.testing.suite import Suite

SMALL = ["backbone.channels=4,8", "pretrain.crop=8"]
SLOW = {
    "features do not collapse",
    "the backbone loads into the harness",
    "learns",
    "one batch can be overfitted",
}
"""Left out unless it is theirs to tell."""


@pytest.mark.parametrize(
    ("cls", "check", "message"), planted.PLANTED, ids=[cls.__name__ for cls, *_ in planted.PLANTED]
)
def test_a_mistake_is_told_once_with_place_and_hint(
    cls: type[ssl3d.Method], check: str, message: str
) -> None:
    options = ["planted_mae.patch=4"] if issubclass(cls, planted.MAE) else []
    found = list(method_suite(cls, [*SMALL, *options]).run(skip=SLOW - {check}))
    failed = [c for c in found if c.failed]
    assert [c.name for c in failed] == [check], [c.told() for c in failed]
    assert re.search(message, failed[0].seen), failed[0].seen
    assert failed[0].hint, failed[0]
    # Beside what was seen, or in it where the loop itself refuses what a function returned.
    place = re.fullmatch(r"(\S*planted\.py):(\d+) in \w+(\.\w+)*", failed[0].where)
    place = place or re.search(r"(\S*planted\.py), line (\d+)", failed[0].seen)
    assert place, failed[0]
    line = Path(planted.__file__).read_text().splitlines()[int(place[2]) - 1]
    assert line.strip(), "a place that is empty"


@pytest.mark.parametrize("cls", [planted.Sound, planted.MAE])
def test_healthy_methods_raise_no_alarm(cls: type[ssl3d.Method]) -> None:
    found = list(method_suite(cls, SMALL[:1]).run(skip=["learns", "features do not collapse"]))
    assert [c.told() for c in found if not c.passed] == []


def test_every_check_has_its_mistake() -> None:
    """But for those whose mistakes stand in test_conformance.py."""
    elsewhere = {
        "stop gradients stop", "the backbone loads into the harness", "no label reaches the method",
        "features do not collapse", "learns",
    }  # fmt: skip
    assert {check for _, check, _ in planted.PLANTED} == set(Suite.names()) - elsewhere
