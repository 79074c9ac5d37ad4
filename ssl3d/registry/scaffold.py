"""``ssl3d new-method NAME``: a complete pip-installable package with one method that runs."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from ssl3d.errors import ConfigError
from ssl3d.files import write_bytes
from ssl3d.registry.registry import registry

METHOD = '''"""{title}: say what it learns and cite the paper it follows."""

import torch
from pydantic import Field
from torch import Tensor, nn

import ssl3d


class {cls}(ssl3d.Method):
    """Restore a volume from a noisy copy. Replace by your own pretext task."""

    name = "{name}"
    title = "{title}"
    paper = "Authors, Title, Venue Year"
    trains = "encoder+decoder"  # or "encoder": then use self.backbone.encode only

    class Config(ssl3d.MethodConfig):
        """Options, set with `--set {name}.sigma=0.2`."""

        sigma: float = Field(0.1, gt=0, le=1)
        """Standard deviation of the noise on the [0, 1] scale."""

    def __init__(self, backbone: ssl3d.Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        self.head = nn.Conv3d(backbone.local_channels, 1, kernel_size=1)

    def views(self, x: Tensor, rng: ssl3d.BatchRng) -> dict[str, Tensor]:
        noise = self.config.sigma * rng.normal(x.shape[1:])  # (B, 1, D, H, W)
        return {{"noisy": x + noise, "clean": x}}

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        _, local = self.backbone(views["noisy"])  # (B, C, D, H, W)
        return {{"mse": torch.nn.functional.mse_loss(self.head(local), views["clean"])}}

    def chance(self, views: dict[str, Tensor]) -> float:
        """Score of an output that ignores its input: what tells whether the pretext task is learned."""
        return float(views["clean"].var())  # the error of the best constant
'''

ANNOUNCEMENT = '''"""{title}, a plugin of ssl3d. Imported by every listing, so keep torch out of this file."""

import ssl3d


@ssl3d.hookimpl
def ssl3d_methods() -> list[str]:
    return ["{module}.method:{cls}"]  # imported when it is asked for
'''

PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{dist}"
version = "0.1.0"
description = "{title}, a pretext method for ssl3d"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["ssl3d"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points.ssl3d]
{name} = "{module}"

[tool.hatch.build.targets.wheel]
packages = ["{module}"]
"""

TEST = """from ssl3d.testing import check_method


def test_{name}_keeps_the_contract() -> None:
    check_method("{name}", learn_steps=60).assert_passed()  # restoring is learnt in a few steps; default: 240
"""

README = """# {dist}

{title}, a pretext method for [ssl3d](https://pypi.org/project/ssl3d/).

    pip install -e ".[test]"
    pytest                                                # the conformance suite
    ssl3d methods                                         # {name} is listed
    ssl3d bench --methods scratch,{name} --store results
"""


def new_method(name: str, folder: Path) -> list[Path]:
    """Write the package of a method called ``name`` to ``folder`` and return its files.

    Raises:
        ConfigError: the name is no identifier or taken, or ``folder`` is not empty.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f'"{name}" cannot name a method: use lower-case letters, digits and underscores.')
    if name in registry().methods:
        raise ConfigError(
            f'A method "{name}" is registered by {registry().methods.get(name).plugin}: choose another name.'
        )
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give another folder with --out.")
    names = {
        "name": name,
        "module": f"ssl3d_{name}",
        "dist": f"ssl3d-{name.replace('_', '-')}",
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "title": name.replace("_", " ").capitalize(),
    }
    files = {
        f"{names['module']}/__init__.py": ANNOUNCEMENT,
        f"{names['module']}/method.py": METHOD,
        "pyproject.toml": PYPROJECT,
        f"test_{name}.py": TEST,
        "README.md": README,
    }
    for path, text in files.items():
        write_bytes(folder / path, text.format(**names).encode())
    return [folder / path for path in files]
