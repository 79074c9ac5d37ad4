"""Every option of a preset: what it means, its default, its value, and where that comes from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ssl3d.config import CountsFor, Settings, load_settings, preset_chain


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        path: dotted, as in ``--set path=value``.
        meaning: its documentation.
        default: value where no preset says otherwise.
        value: value in these settings.
        source: ``default``, the file of the preset that sets it, or ``--set``.
    """

    path: str
    meaning: str
    default: Any
    value: Any
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return the option for JSON."""
        return asdict(self)


def list_options(
    preset: str, overrides: Sequence[str] = (), methods: Collection[str] | None = None
) -> list[Option]:
    """Return the options of ``preset`` with ``overrides``, in the order of their documentation.

    Raises:
        ConfigError: as :func:`ssl3d.config.load_settings`.
    """
    settings = load_settings(preset, overrides, methods)
    sources: dict[str, str] = {}
    for path, values in preset_chain(preset):
        sources |= dict.fromkeys(_leaves(values), path.name)
    for override in overrides:
        key = override.partition("=")[0].strip()
        sources[f"methods.{key}" if key.partition(".")[0] in (methods or ()) else key] = "--set"
    return [
        Option(path, meaning, default, value, _source(path, sources))
        for path, meaning, default, value in _walk(Settings(), settings)
        if path not in ("preset", "changed")
    ]


def _walk(defaults: BaseModel, values: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    for name, info in type(values).model_fields.items():
        default, value = getattr(defaults, name, None), getattr(values, name)
        if isinstance(value, BaseModel) and not value.model_extra:
            yield from _walk(default if default is not None else value, value, f"{prefix}{name}.")
        else:
            plain = [v.model_dump(mode="json") if isinstance(v, BaseModel) else v for v in (default, value)]
            meaning = " ".join([*(info.description or "").split(), *map(_counts_for, _marks(info))])
            yield prefix + name, meaning, plain[0], plain[1]


def _marks(info: FieldInfo) -> list[CountsFor]:
    return [mark for mark in info.metadata if isinstance(mark, CountsFor)]


def _counts_for(mark: CountsFor) -> str:
    """Return the sentence that says where an option counts.

    >>> _counts_for(CountsFor(("segmentation",), ("linear", "finetune")))
    'Counts for segmentation in linear, finetune only.'
    """
    kinds = f" for {', '.join(mark.kinds)}" if mark.kinds else ""
    modes = f" in {', '.join(mark.modes)}" if mark.modes else ""
    return f"Counts{kinds}{modes} only."


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _source(path: str, sources: dict[str, str]) -> str:
    """Return who set ``path``; an option that is a mapping is set by whoever sets one of its keys."""
    if any(key == path or key.startswith(f"{path}.") for key, source in sources.items() if source == "--set"):
        return "--set"
    return sources.get(path, "default")
