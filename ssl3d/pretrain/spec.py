"""A method by its name, with its validated configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssl3d.config import identity_values, validate
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import seeded
from ssl3d.pretrain.method import Method
from ssl3d.registry.registry import registry


@dataclass(frozen=True)
class MethodSpec:
    """A method (or variant) with its validated configuration.

    Attributes:
        name: name on the command line; a variant's own name for a variant.
        cls: the method's class.
        config: its configuration, variant and preset applied.
        title: name in tables.
    """

    name: str
    cls: type[Method]
    config: Any
    title: str

    def build(self, backbone: Backbone, seed: int) -> Method:
        """Build the method; its initial weights depend on ``seed`` only."""
        with seeded(seed, "method", self.cls.name):
            return self.cls(backbone, self.config)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the method in a record."""
        return {"name": self.cls.name, "config": identity_values(self.config)}


def resolve_method(name: str, options: dict[str, dict[str, Any]]) -> MethodSpec:
    """Return the method called ``name`` with the preset's options for it.

    Options of a variant's base method apply to the variant too; the variant's own settings win.

    Raises:
        PluginError: no such method, or its plugin is broken.
        ConfigError: an unknown option or a value out of range.
    """
    entry = registry().methods.get(name)
    cls = entry.load()
    values = {
        **options.get(cls.name, {}),
        **(options.get(name, {}) if name != cls.name else {}),
        **entry.overrides,
    }
    title = cls.title if name == cls.name else entry.title
    return MethodSpec(name, cls, validate(cls.Config, values, f"method {name}"), title or name)
