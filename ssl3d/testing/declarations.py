"""What a method declares of itself: names, parts, options and signatures, all without a single step."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from ssl3d.config import Model, Settings, validate
from ssl3d.errors import ConfigError, nearest
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.spec import MethodSpec
from ssl3d.registry.registry import registry
from ssl3d.testing.checks import demand

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Names can be typed, stand in comma-separated lists, and begin a key of ``--set``."""

CALLED_WITH = {
    "check": ("crop", "items"), "setup": ("volumes",), "views": ("x", "rng"), "held_back_views": ("x", "rng"),
    "training_step": ("views",), "chance": ("views",), "pretext_score": ("views",), "on_step_end": ("progress",),
    "on_epoch_start": ("volumes", "epoch"), "monitor": ("probe", "rng"), "view_shape": ("crop",),
    "voxels_per_item": ("crop",), "items_per_step": ("crop", "batch_size"),
}  # fmt: skip
"""Function of a method -> what the framework gives it."""


def check_name(name: Any, kind: str, at: str = "name") -> None:
    """Demand a name that can be typed and is no section of the settings."""
    demand(
        isinstance(name, str) and NAME.fullmatch(name) is not None,
        f"{name!r} cannot name a {kind}",
        at,
        "use letters, digits, - and _ only: names stand in comma-separated lists and in --set NAME.option=value",
    )
    demand(
        name not in Settings.model_fields,
        f'the name "{name}" is that of a section of the settings',
        at,
        "choose another: --set could not tell them apart",
    )


def check_title(title: Any, kind: str, others: Iterable[tuple[str, str]]) -> None:
    """Demand a title of one line that is nobody else's; ``others`` are (name, title)."""
    hint = 'write title = "..." in the class'
    demand(isinstance(title, str), f"title = {title!r} is no text", "title", hint)
    demand(
        title == title.strip() and "\n" not in title,
        f"title = {title!r} is not one trimmed line",
        "title",
        hint,
    )
    for name, other in others:
        demand(
            not title or other.casefold() != title.casefold(),
            f'the title "{title}" is that of the {kind} "{name}" too: two rows of a table could not be told apart',
            "title",
            "give it a title of its own",
        )


def check_declarations(spec: MethodSpec) -> str:
    """Demand that what a method's class declares makes sense; returns what it declares."""
    cls = spec.cls
    check_name(cls.name, "method")
    demand(isinstance(cls.Config, type) and issubclass(cls.Config, Model),
           f"Config = {cls.Config!r} is no subclass of ssl3d.MethodConfig", "Config",
           "class Config(ssl3d.MethodConfig): one typed field an option")  # fmt: skip
    others = [(e.name, e.title) for e in registry().methods if e.name not in (spec.name, cls.name)]
    check_title(cls.title if spec.name == cls.name else spec.title, "method", others)
    parts = get_args(get_args(get_type_hints(Method)["trains"])[0])
    demand(cls.trains in parts, f"trains = {cls.trains!r} does not exist.{nearest(str(cls.trains), parts)}", "trains",
           "name what gets a gradient: the tables say so")  # fmt: skip
    for name in ("volumes_per_item", "minimum_items", "views_per_item"):
        value = getattr(cls, name)
        demand(
            (isinstance(value, int) and not isinstance(value, bool) and value >= 1) or isinstance(value, property),
            f"{name} = {value!r}; it is a number of 1 at least", name,
        )  # fmt: skip
    _check_lists(cls)
    _check_variants(cls)
    return f"{cls.title or cls.name}, trains {cls.trains}"


def _check_lists(cls: type[Method]) -> None:
    for name in ("untrained", "stop_gradients"):
        value = getattr(cls, name)
        demand(isinstance(value, tuple | list) and all(isinstance(v, str) and v for v in value),
               f"{name} = {value!r} is no tuple of names", name, f'write {name} = ("name",), with the comma')  # fmt: skip
    targets = cls.targets
    demand(
        isinstance(targets, dict) and all(isinstance(n, str) for pair in targets.items() for n in pair),
        f"targets = {targets!r} is no dictionary of names", "targets", 'write targets = {"target": "online"}',
    )  # fmt: skip


def _check_variants(cls: type[Method]) -> None:
    demand(isinstance(cls.variants, dict), f"variants = {cls.variants!r}", "variants",
           "write {name: {option: value}}")  # fmt: skip
    for name, options in cls.variants.items():
        check_name(name, "method", "variants")
        try:
            validate(cls.Config, dict(options), f"variant {name}")
        except ConfigError as error:
            demand(False, str(error), "variants", "correct the option, or add it to Config")


def check_functions(cls: type[Method]) -> str:
    """Demand that the framework can call what is written, and that what must be is written; returns what is."""
    for name, arguments in CALLED_WITH.items():
        function = getattr(cls, name)
        if function is getattr(Method, name):
            continue
        demand(callable(function), f"{name} is no function", name)
        try:
            inspect.signature(function).bind("self", *arguments)
        except TypeError as error:
            told = ", ".join(("self", *arguments))
            demand(False, f"{name} cannot be called: {error}", name, f"write def {name}({told})")
    for name, value in vars(cls).items():
        meant = difflib.get_close_matches(name, CALLED_WITH, n=1, cutoff=0.85)
        misspelt = meant and name not in CALLED_WITH and inspect.isfunction(value)
        demand(
            not (misspelt and meant[0] not in vars(cls)), f"nothing calls {name}", name,
            f"if {(meant or [''])[0]} is meant, call it that; if not, begin its name with an underscore",
        )  # fmt: skip
    written = [n for n in ("views", "training_step") if getattr(cls, n) is not getattr(Method, n)]
    if cls.trains == "none":
        demand(not written, f'trains = "none", and {" and ".join(written)} would never be called', "trains",
               'name what it trains: "encoder" or "encoder+decoder"')  # fmt: skip
    else:
        missing = [n for n in ("views", "training_step") if n not in written]
        demand(not missing, f"it has no {' and no '.join(missing)}", None,
               "write them: docs/plugins.md shows a whole method")  # fmt: skip
    return (
        ", ".join(name for name in CALLED_WITH if getattr(cls, name) is not getattr(Method, name)) or "none"
    )
