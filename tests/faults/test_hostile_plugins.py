"""Plugins that are installed and do what they must not: others are listed, and whoever uses them is told where."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hostile_plugins import AT_IMPORT, MODULE, WRONG

from faults.commands import Outcome, command
from faults.damage import FULL
from faults.test_records import place, whole
from faults.world import TINY
from ssl3d.registry import registry as registries
from ssl3d.results.store.record import identity_hash

LISTINGS = (
    "methods",
    "tasks",
    "datasets",
    "backbones",
    "plugins",
    "methods --json",
    "tasks --json",
    "plugins --json",
)


def installed(folder: Path, name: str, source: str) -> Callable[[], None]:
    """Return what installs a plugin ``dist-NAME:NAME`` in a child."""
    (folder / f"{name}.py").write_text(source)

    def install() -> None:
        sys.path.insert(0, str(folder))
        real = registries._installed
        registries._installed = lambda: iter(  # type: ignore[assignment]
            [*real(), (f"dist-{name}", "1.0", EntryPoint(name, name, "ssl3d"))]
        )
        registries.registry.cache_clear()

    return install


SOURCES = {
    **{
        f"{hook}: {value}": MODULE.format(hook=hook, value=value).replace("\n    ", "\n")
        for hook, values in WRONG.items()
        for value in values
    },
    **AT_IMPORT,
}  # fmt: skip
SOME = list(SOURCES) if FULL else list(SOURCES)[::12]


@pytest.mark.parametrize("name", SOME)
def test_a_hostile_plugin_stops_no_listing(
    tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    module = f"hostile{list(SOURCES).index(name)}"
    listings = LISTINGS if FULL else LISTINGS[4:5]
    record_property("trials", len(listings))
    for listing in listings:
        outcome = command(*listing.split(), before=installed(tmp_path, module, SOURCES[name]))
        assert outcome.status == 0 and "Traceback" not in outcome.output, (listing, outcome)
        expected = {"methods": "gvsl", "tasks": "shc", "datasets": "mmwhs", "backbones": "unet3d"}
        assert expected.get(listing.split()[0], f"dist-{module}") in outcome.output, (listing, outcome)
        if listing == "plugins":
            assert re.search(rf"dist-{module}.*(broken|warning|nothing)", outcome.output), outcome


EVIL = '''import sys
import torch
import ssl3d


class Evil(ssl3d.Method):
    """Does what it must not."""

    name = "evil"
    title = "Evil"

    class Config(ssl3d.MethodConfig):
        """Options."""

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.head = torch.nn.Conv3d(self.backbone.local_channels, 1, 1)

    def views(self, x, rng):
        return {"x": x}

    def training_step(self, views):
        return {"mse": (self.head(self.backbone(views["x"])[1]) - views["x"]).square().mean()}

    HOOK
        BODY


@ssl3d.hookimpl
def ssl3d_methods():
    return [Evil]
'''
HOOKS = {
    "__init__": "def __init__(self, backbone, config):", "views": "def views(self, x, rng):",
    "training_step": "def training_step(self, views):", "check": "def check(self, crop, items):",
    "setup": "def setup(self, volumes):", "on_step_end": "def on_step_end(self, progress):",
    "on_epoch_start": "def on_epoch_start(self, volumes, epoch):", "monitor": "def monitor(self, probe, rng):",
    "pretext_score": "def pretext_score(self, views):", "chance": "def chance(self, views):",
    "held_back_views": "def held_back_views(self, x, rng):",
    "items_per_step": "def items_per_step(self, crop, batch_size):",
    "view_shape": "def view_shape(self, crop):",
}  # fmt: skip
DOES = {
    "divides by zero": "1 / 0",
    "exits": "sys.exit(0)",
    "raises what is no Exception": "raise BaseException('base')",
}
RETURNS = {
    "views": ("None", "3", "{}", "{'x': 3}", "{'y': x}"), "monitor": ("3", "{'a': 'x'}", "{3: 1.0}"),
    "pretext_score": ("None", "'x'", "float('nan')"), "chance": ("'x'", "float('nan')"),
    "items_per_step": ("0", "-1", "None", "'x'"), "view_shape": ("None", "(1,)"), "training_step": ("None", "{}"),
    "held_back_views": ("None",),
}  # fmt: skip
USES = {
    **{f"{hook} {what}": (hook, body) for hook in HOOKS for what, body in DOES.items()},
    **{f"{hook} returns {value}": (hook, f"return {value}") for hook, values in RETURNS.items() for value in values},
}  # fmt: skip
SOME_USES = (
    list(USES) if FULL else ["views divides by zero", "on_step_end exits", "items_per_step returns None"]
)


@pytest.mark.parametrize("use", SOME_USES)
def test_who_uses_a_hostile_method_is_told_its_hook_and_line(tmp_path: Path, world: Path, use: str) -> None:
    hook, body = USES[use]
    source = EVIL.replace("HOOK", HOOKS[hook]).replace("BODY", body)
    outcome = command(
        "pretrain", *TINY, "--method", "evil", "--data", world / "volumes", "--cache", world / "cache",
        "--out", tmp_path / "run", before=installed(tmp_path, "evil_plugin", source),
    )  # fmt: skip
    line = source.splitlines().index(f"        {body}") + 1
    told(outcome, "evil", tmp_path / "evil_plugin.py", line if use.partition(" returns ")[1] == "" else None)


def told(outcome: Outcome, name: str, path: Path, line: int | None) -> None:
    """Assert that a plugin is named, with the file and, where its own code failed, the line."""
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.output and "fault of ssl3d" not in outcome.output, outcome
    assert name in outcome.output and "Fix: " in outcome.output, outcome
    if line is not None:
        assert f"{path}, line {line}" in outcome.output, outcome


OTHER = '''import sys
import torch
import ssl3d


class Evil(ssl3d.Dataset):
    name, summary, modality, intensity_offset = "evil", "Evil", "ct", 0
    def cases(self, root):
        DATASET


class Wrong(ssl3d.Logger):
    name = "wrong"
    def start(self, folder, run, step):
        pass
    def write(self, step, values):
        LOGGER


class Twisted(ssl3d.Backbone):
    """A network."""

    name = "twisted"
    CONFIG
    def __init__(self, config):
        BACKBONE
    def encode(self, x):
        return [x]
    def decode(self, features):
        return features[0]


def render(table):
    FORMAT


@ssl3d.hookimpl
def ssl3d_datasets():
    return [Evil()]


@ssl3d.hookimpl
def ssl3d_loggers():
    return [Wrong]


@ssl3d.hookimpl
def ssl3d_backbones():
    return [Twisted]


@ssl3d.hookimpl
def ssl3d_table_formats():
    return [ssl3d.TableFormat("odd", "Odd", render)]
'''
KINDS = {
    "DATASET": ("data verify VOLUMES --as evil", ("1 / 0", "sys.exit(0)", "return None", "return [3]", "return 'x'")),
    "FORMAT": ("table --store STORE --format odd", ("1 / 0", "sys.exit(0)", "return None", "return 3")),
    "BACKBONE": ("pretrain --set backbone.name=twisted",
                 ("1 / 0", "sys.exit(0)", "pass", "raise BaseException('base')", "0")),
    "LOGGER": ("pretrain --set pretrain.loggers=[wrong]", ("1 / 0", "sys.exit(0)", "values.clear()")),
}  # fmt: skip
OTHER_USES = [(kind, body) for kind, (_, bodies) in KINDS.items() for body in bodies]


@pytest.mark.parametrize("kind, body", OTHER_USES if FULL else OTHER_USES[1::7])
def test_who_uses_another_hostile_plugin_is_told(tmp_path: Path, world: Path, kind: str, body: str) -> None:
    """A logger costs no run: that it fails is said. Of all others, the plugin and the line are."""
    options = (
        "" if body == "0" else "class Config(ssl3d.Model): channels: list = []"
    )  # a backbone without is told, too
    source = OTHER.replace(kind, body).replace("CONFIG", options)
    for other in KINDS:
        source = source.replace(other, "pass")
    text = KINDS[kind][0].replace("VOLUMES", str(world / "volumes")).replace("STORE", str(tmp_path / "store"))
    arguments: list[object] = [*text.split()]
    if arguments[0] == "pretrain":
        places = ["--data", world / "volumes", "--cache", world / "cache", "--out", tmp_path / "run"]
        own = [
            w
            for n, w in enumerate(TINY)
            if "backbone." not in w and "backbone." not in TINY[min(n + 1, len(TINY) - 1)]
        ]
        arguments += [*(own if kind == "BACKBONE" else TINY), "--method", "rotation", *places]
    place(tmp_path / "store", whole("scratch", 1), f"a-{identity_hash(whole('scratch', 1)['identity'])}.json")
    outcome = command(*arguments, before=installed(tmp_path, "other_plugin", source))
    if kind == "LOGGER":
        assert outcome.status == 0 and "Traceback" not in outcome.output, outcome
        assert body == "values.clear()" or "The logger wrong fails, and the run goes on" in outcome.output
        return
    line = source.splitlines().index(f"        {body}" if kind != "FORMAT" else f"    {body}") + 1
    raises = not body.startswith(("return", "pass", "0"))
    name = {"DATASET": "evil", "FORMAT": "odd", "BACKBONE": "twisted"}[kind]
    told(outcome, "other_plugin" if raises else name, tmp_path / "other_plugin.py", line if raises else None)
