"""Conformance suite: what every pretext method must keep, checked on tiny made-up volumes.

For plugin authors' own tests::

    from ssl3d.testing import check_method

    def test_my_method():
        check_method("my_method").assert_passed()

``ssl3d check METHOD`` runs the same checks and prints them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ssl3d.config import load_settings
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.spec import MethodSpec, resolve_method
from ssl3d.testing.suite import LEARN_STEPS, Check, Suite


@dataclass
class Report:
    """The results of all checks of one method."""

    method: str
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def failures(self) -> list[str]:
        """Return the names of the checks that failed."""
        return [check.name for check in self.checks if not check.passed]

    def assert_passed(self) -> None:
        """Raise AssertionError listing every check that failed and what was seen."""
        failed = [f"  {c.name}: {c.seen}" for c in self.checks if not c.passed]
        if failed:
            raise AssertionError(f"{self.method} fails {len(failed)} checks:\n" + "\n".join(failed))


def check_method(
    method: str | type[Method],
    *,
    collapse_steps: int = 40,
    learn_steps: int = LEARN_STEPS,
    skip: Collection[str] = (),
    **options: Any,
) -> Report:
    """Run every conformance check on a method.

    Args:
        method: a registered name (a variant's too) or a Method subclass that need not be registered.
        collapse_steps: optimizer steps of the run that looks for collapse.
        learn_steps: optimizer steps of the run that looks for learning.
        skip: names of checks to leave out.
        options: configuration of the method.

    Returns:
        A report; call ``assert_passed()`` on it.

    Raises:
        PluginError: no such method.
        ConfigError: an unknown option.
    """
    if isinstance(method, str):
        short = load_settings("quick").methods  # as for other runs that are as short
        spec = resolve_method(method, {**short, method: {**short.get(method, {}), **options}})
    else:
        spec = MethodSpec(method.name, method, method.Config(**options), method.title or method.name)
    return Report(spec.name, list(Suite(spec, collapse_steps, learn_steps).run(skip=skip)))
