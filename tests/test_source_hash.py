"""The hash of the code behind a number: what reaches it changes it, where that lies and how it is laid out do not."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl3d import source_hash as code
from ssl3d.errors import PluginError
from ssl3d.registry.registry import registry

ROOT = Path(code.__file__).parent.parent
OWN = frozenset({"ssl3d", "ssl3d_methods"})
UNET = "ssl3d.models.unet:UNet3D"
PARTS = {
    "gvsl": (code.PREPARATION, code.PRETRAINING, "ssl3d_methods.gvsl:GVSL", UNET),
    "denoising": (code.PREPARATION, code.PRETRAINING, "ssl3d_methods.denoising:Denoising", UNET),
    "genesis": (code.PREPARATION, code.PRETRAINING, "ssl3d_methods.denoising:Denoising",
                "ssl3d.models.genesis:GenesisUNet3D"),
    "segmentation": (code.PREPARATION, code.EVALUATION, f"{code.PROBLEMS}:Segmentation", UNET),
    "regression": (code.PREPARATION, code.EVALUATION, f"{code.PROBLEMS}:Regression", UNET),
}  # fmt: skip
PRETRAINED, EVALUATED = {"gvsl", "denoising", "genesis"}, {"segmentation", "regression"}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the source of ssl3d and its methods."""
    for package in ("ssl3d", "plugins/ssl3d_methods"):
        for path in (ROOT / package).rglob("*.py"):
            to = tmp_path / path.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    return tmp_path


def hashes(root: Path) -> dict[str, str]:
    code.forget()
    return {part: code.code_hash(entries, OWN, (root, root / "plugins")) for part, entries in PARTS.items()}


def changed(before: dict[str, str], root: Path) -> set[str]:
    return {part for part, value in hashes(root).items() if value != before[part]}


def disturb(path: Path) -> None:
    """Give every function and class of a module one more statement, as a change of its meaning."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.body.append(ast.parse("another = 1").body[0])
    path.write_text(ast.unparse(tree))


# Written by hand from what each module is for; the code under test follows names instead.
USED_BY = {
    "ssl3d/transforms/supervised.py": EVALUATED,  # fine-tuning
    "ssl3d/losses/ncc.py": {"gvsl"},
    "ssl3d/models/genesis.py": {"genesis"},
    "ssl3d/downstream/problems/several.py": {"regression"},
    "ssl3d/downstream/metrics.py": EVALUATED,
    "ssl3d/pretrain/source.py": PRETRAINED,
    "ssl3d/optim.py": PRETRAINED | EVALUATED,
    "ssl3d/data/prepared/steps.py": PRETRAINED | EVALUATED,
    "plugins/ssl3d_methods/denoising.py": {"denoising", "genesis"},
}
USED_BY_NONE = (
    "ssl3d/progress.py", "ssl3d/errors.py", "ssl3d/files.py", "ssl3d/registry/registry.py", "ssl3d/cli.py",
    "ssl3d/bench/run.py", "ssl3d/results/table/build.py", "ssl3d/results/store/store.py", "ssl3d/report/data.py",
    "ssl3d/bench/represent.py", "ssl3d/models/weights/checkpoint.py", "ssl3d/pretrain/run_folder.py",
    "ssl3d/locks.py", "ssl3d/signals.py", "ssl3d/data/prepared/arrays.py", "ssl3d/data/prepared/stored.py",
    "ssl3d/commands/bench.py", "ssl3d/data/phantoms/brain.py", "ssl3d/data/checks/verify.py", "ssl3d/registry/scaffold.py",
    "ssl3d/models/weights/export.py", "ssl3d/models/weights/imports.py", "ssl3d/config.py", "plugins/ssl3d_methods/byol.py",
)  # fmt: skip


def test_a_changed_module_makes_exactly_those_numbers_stale_that_it_decides(copied: Path) -> None:
    before = hashes(copied)
    assert len(set(before.values())) == len(PARTS)
    for name, parts in USED_BY.items():
        path = copied / name
        original = path.read_text()
        disturb(path)
        assert changed(before, copied) == parts, name
        path.write_text(original)
    for name in USED_BY_NONE:
        disturb(copied / name)
    assert changed(before, copied) == set()


def test_every_module_of_a_closure_decides_it() -> None:
    """No module is passed by, however deep: each one, changed alone, changes the hash of those that reach it."""
    tree = code.Tree(OWN, (ROOT, ROOT / "plugins"))
    reached = {part: code.closure(tree, entries) for part, entries in PARTS.items()}

    def digest(part: str) -> str:
        return "".join(sorted({d.digest for d in reached[part]}))

    before = {part: digest(part) for part in PARTS}
    modules = {definition.module.name for definitions in reached.values() for definition in definitions}
    assert len(modules) > 30
    every = {definition.key: definition for definitions in reached.values() for definition in definitions}
    for module in sorted(modules):
        mine = [definition for definition in every.values() if definition.module.name == module]
        texts = [definition.text for definition in mine]
        for definition in every.values():
            definition.__dict__.pop("digest", None)
        for definition, text in zip(mine, texts, strict=True):
            definition.__dict__["text"] = f"{text}\nanother = 1"
        own = {part for part, ds in reached.items() if any(d.module.name == module for d in ds)}
        assert {part for part in PARTS if digest(part) != before[part]} == own, module
        for definition, text in zip(mine, texts, strict=True):
            definition.__dict__["text"] = text


def test_a_moved_and_a_split_module_make_nothing_stale(copied: Path) -> None:
    before = hashes(copied)
    new = copied / "ssl3d" / "evaluation" / "augmenting"
    new.mkdir(parents=True)
    for folder in (new, new.parent):
        (folder / "__init__.py").touch()
    (copied / "ssl3d/transforms/supervised.py").rename(new / "crops.py")
    (copied / "ssl3d/losses/ncc.py").rename(new / "correlation.py")
    # Part of a module goes into a module of its own.
    source = (copied / "ssl3d/downstream/metrics.py").read_text()
    tree = ast.parse(source)
    names = {"surface_distances"}
    moved = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    kept = [n for n in tree.body if n not in moved]
    assert moved
    head = "import numpy as np\nimport math\nfrom typing import Any\nimport torch\nfrom torch import Tensor\n"
    (new / "surfaces.py").write_text(head + "\n".join(map(ast.unparse, moved)))
    future = next(i for i, n in enumerate(kept) if isinstance(n, ast.ImportFrom)) + 1
    imported = ast.parse("from ssl3d.evaluation.augmenting import surfaces").body
    text = "\n".join(map(ast.unparse, [*kept[:future], *imported, *kept[future:]]))
    (copied / "ssl3d/downstream/metrics.py").write_text(
        text.replace("surface_distances(", "surfaces.surface_distances(")
    )
    for path in copied.rglob("*.py"):
        text = path.read_text()
        text = text.replace("ssl3d.transforms.supervised", "ssl3d.evaluation.augmenting.crops")
        path.write_text(text.replace("ssl3d.losses.ncc", "ssl3d.evaluation.augmenting.correlation"))
    assert changed(before, copied) == set()
    disturb(new / "surfaces.py")
    assert "segmentation" in changed(before, copied), "and it is followed to its new place"


def test_comments_docstrings_and_layout_do_not_count(copied: Path) -> None:
    before = hashes(copied)
    for path in copied.rglob("*.py"):
        path.write_text(
            "# A licence.\n" + ast.unparse(ast.parse(path.read_text())) + "\n'''And a string.'''\n"
        )
    assert changed(before, copied) == set()


# --- A plugin of its own -----------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A package with a method, a helper beside it, and a module that the method does not use."""
    folder = tmp_path / "made_up"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "method.py").write_text(
        textwrap.dedent('''
        """A method."""
        import torch
        import ssl3d
        import made_up_numbers
        from . import helper
        from .helper import first as chosen
        from made_up.unused import nothing  # imported, and not used

        class Own(ssl3d.Method):
            def training_step(self, views):
                from made_up.local import late
                return {"loss": chosen(torch.ones(1)) + helper.inner() + late(made_up_numbers.WEIGHT)}
        ''')
    )
    (folder / "helper.py").write_text(
        "from math import sqrt\nRATES = {}\nRATES['a'] = 1\n\ndef first(x):\n    return x * RATES['a']\n\n"
        "def second(x):\n    return x * RATES['a']\n\ndef inner():\n    return sqrt(2)\n\ndef other():\n    return 3\n"
    )
    (folder / "local.py").write_text("def late(x):\n    return x\n")
    (folder / "unused.py").write_text("def nothing():\n    return 0\n")
    (tmp_path / "made_up_numbers.py").write_text("WEIGHT = 0.5\n")
    return tmp_path


def plugin_hash(folder: Path) -> str:
    code.forget()
    return code.code_hash(("made_up.method:Own",), frozenset({"ssl3d"}), (folder,))


def replaced(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (replaced("made_up/helper.py", "return sqrt(2)", "return sqrt(3)"), True),
        (replaced("made_up/helper.py", "return x * RATES", "return 2 * x * RATES"), True),
        (replaced("made_up/helper.py", "['a'] = 1", "['a'] = 2"), True),
        (replaced("made_up/helper.py", "from math import sqrt", "from cmath import sqrt"), True),
        (replaced("made_up/method.py", "import first as", "import second as"), True),
        (replaced("made_up/local.py", "return x", "return -x"), True),
        (replaced("made_up_numbers.py", "0.5", "0.6"), True),
        (replaced("made_up/helper.py", "return 3", "return 4"), False),
        (replaced("made_up/unused.py", "return 0", "return 1"), False),
        (replaced("made_up/method.py", "A method.", "One of many."), False),
        (replaced("made_up/method.py", "from . import helper", "import made_up.helper as helper"), False),
        (replaced("made_up_numbers.py", "WEIGHT", "# of the loss\nWEIGHT"), False),
    ],
    ids=lambda value: None if isinstance(value, bool) else "",
)
def test_helpers_of_a_plugin_are_its_code(plugin: Path, change: Callable[[Path], None], stale: bool) -> None:
    before = plugin_hash(plugin)
    change(plugin)
    assert (plugin_hash(plugin) != before) is stale


def test_what_is_marked_is_left_out(plugin: Path) -> None:
    helper = replaced(
        "made_up/helper.py",
        "def inner",
        "from ssl3d.marks import without_effect\n\n@without_effect\ndef inner",
    )
    helper(plugin)
    before = plugin_hash(plugin)
    replaced("made_up/helper.py", "sqrt(2)", "sqrt(5)")(plugin)
    assert plugin_hash(plugin) == before
    replaced("made_up_numbers.py", "WEIGHT", "__without_effect__ = 'a test'\nWEIGHT")(plugin)
    before = plugin_hash(plugin)
    replaced("made_up_numbers.py", "0.5", "0.7")(plugin)
    assert plugin_hash(plugin) == before


def test_a_class_and_its_name_have_one_hash() -> None:
    entry = registry().methods.get("gvsl_without_affine")
    code.forget()
    assert code.pretraining_code("gvsl_without_affine", "unet3d") == code.pretraining_code(
        entry.load(), "unet3d"
    )
    assert code.evaluation_code("MultiLabel", "unet3d") != code.evaluation_code("MultiClass", "unet3d")
    for wrong in (
        lambda: code.pretraining_code("gone", "unet3d"),
        lambda: code.evaluation_code("Gone", "unet3d"),
    ):
        with pytest.raises(PluginError):
            wrong()


def test_hashing_imports_nothing_heavy() -> None:
    program = (
        "import sys; from ssl3d import source_hash as code; code.pretraining_code('gvsl', 'unet3d');"
        "code.evaluation_code('Segmentation', 'unet3d'); print({'torch', 'monai', 'sklearn'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
