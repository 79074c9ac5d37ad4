"""What the checks are run with: a preset of their own, and what ``--set`` changes of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from ssl3d.config import BackboneConfig, Settings, load_settings
from ssl3d.errors import ConfigError
from ssl3d.registry.registry import registry

PRESET = Path(__file__).with_name("conformance.yaml")
OWN_DATA = ("phantoms", "data", "seeds", "preset", "changed")
"""Sections that mean nothing to checks that make their own volumes."""


def conformance_settings(
    overrides: Sequence[str] = (),
    method: str | None = None,
    backbone: str | None = None,
    data: bool = False,
) -> Settings:
    """Return the settings of the checks.

    Args:
        overrides: ``KEY=VALUE`` as of ``--set``.
        method: the one that is checked, by its registered name or not; None: no method is.
        backbone: the one that is checked, in the same way; its options in ``overrides`` need no name.
        data: whether data of the user's are read.

    Raises:
        ConfigError: an unknown key, a value out of range, or an option that has no meaning here.
    """
    found = registry().methods
    names = [*found.names(), *([method] if method is not None and method not in found else [])]
    checked = (
        () if backbone in (None, BackboneConfig().name) else (f"backbone={json.dumps({'name': backbone})}",)
    )
    settings = load_settings(
        str(PRESET), (*checked, *overrides), names, registry().tasks.names(), registry().datasets.names()
    )
    if backbone is not None and settings.backbone.name != backbone:
        raise ConfigError(
            f"--set backbone names {settings.backbone.name}, and {backbone} is checked. Leave out its name: "
            "--set backbone.OPTION=VALUE."
        )
    base = found.get(method).base if method is not None and method in found else None
    for override in overrides:
        section = override.partition("=")[0].strip().split(".")[0]
        if section in OWN_DATA and not (data and section in ("data", "phantoms")):
            raise ConfigError(
                f"--set {override}: this check makes its own volumes, so {section} means nothing to it. Leave it out."
            )
        _refuse_others(override, section, names, {method, base})
    return settings


def _refuse_others(
    override: str, section: str, names: Collection[str], checked: Collection[str | None]
) -> None:
    """Raise ConfigError for an option of another method than the one that is checked."""
    if section not in names or section in checked:
        return
    what = next((name for name in checked if name), None)
    raise ConfigError(
        f"--set {override} is an option of {section}, which is not checked. Leave it out"
        + (f", or name an option of {what}." if what else f", or check {section} with it.")
    )
