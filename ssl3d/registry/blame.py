"""Whose code an error came from: a plugin's own function, file and line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

from ssl3d.errors import PluginError, SSL3DError, in_words
from ssl3d.registry.registry import registry

__without_effect__ = "messages"


def plugin_fault(error: BaseException) -> PluginError | None:
    """Return what to say of an error that came out of a plugin's code; None: it did not.

    Args:
        error: with its traceback; ``SystemExit`` counts, whatever its code.
    """
    if isinstance(error, SSL3DError | KeyboardInterrupt):
        return None
    owners = dict(_owners())
    owners.pop("ssl3d", None)
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        top = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if top in owners:
            found = (owners[top], frame.f_code, line, frame.f_locals.get("self"))
    if found is None:
        return None
    plugin, code, line, owner = found
    name = getattr(type(owner), "name", None)
    method = f"the method {name} of " if isinstance(name, str) and name else ""
    what = (
        f"called sys.exit({error.code!r})"
        if isinstance(error, SystemExit)
        else f"raised {in_words(error).splitlines()[0][:300]}"
    )
    return PluginError(
        f"{method}the plugin {plugin} {what} in {code.co_qualname}(): {Path(code.co_filename)}, line {line}. "
        "Fix: this line of the plugin, or uninstall it."
    )


def _owners() -> Iterator[tuple[str, str]]:
    """Yield (top-level module, plugin) of what is installed."""
    found = registry()
    for plugin in found.plugins.values():
        yield plugin.entry_point.module.partition(".")[0], plugin.name
    for catalogue in (found.methods, found.backbones, found.loggers):
        for entry in catalogue:
            yield entry.source.partition(":")[0].partition(".")[0], entry.plugin
