"""The documentation is run: every Python block of docs/plugins.md, and the commands that README names."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from ssl3d.config import BackboneConfig, validate
from ssl3d.plugins import Registry

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs/plugins.md").read_text(), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry of one plugin a block, beside the bundled ones."""
    folder = tmp_path_factory.mktemp("docs")
    entry_points = [("ssl3d", "0", EntryPoint("builtins", "ssl3d.builtins", "ssl3d"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for number, block in enumerate(b for b in BLOCKS if "@ssl3d.hookimpl" in b):
            (folder / f"docs_block_{number}.py").write_text(block)
            entry_points.append(("docs", "1", EntryPoint(f"b{number}", f"docs_block_{number}", "ssl3d")))
        found = Registry(entry_points)
        for kind in ("methods", "tasks", "datasets", "backbones", "table_formats"):
            assert len(getattr(found, kind)) >= 1, kind
    return found


def test_every_block_registers_without_a_complaint(registry: Registry) -> None:
    assert len(registry.plugins) == 6
    assert not registry.broken() and not any(p.problems for p in registry.plugins.values())


def test_the_documented_method_passes_the_conformance_suite(registry: Registry) -> None:
    (check,) = (block for block in BLOCKS if "check_method" in block)
    exec(check, {"Denoise": registry.methods.get("my_denoise").load()})


def test_the_documented_method_is_shorter_than_40_lines() -> None:
    (block,) = (block for block in BLOCKS if "class Denoise" in block)
    assert len(block.splitlines()) < 40


def test_the_documented_dataset_and_task_find_their_cases(registry: Registry, tmp_path: Path) -> None:
    for name in ("volume-1.nii.gz", "segmentation-1.nii.gz", "volume-2.nii.gz", "segmentation-2.nii.gz"):
        (tmp_path / name).touch()
    task = registry.tasks.get("my_liver_task").load()
    cases = registry.datasets.get(task.dataset).load().cases(tmp_path)
    assert [(c.id, c.label and c.label.name) for c in cases] == [
        ("1", "segmentation-1.nii.gz"),
        ("2", "segmentation-2.nii.gz"),
    ]


def test_the_documented_backbone_keeps_the_contract(registry: Registry) -> None:
    cls = registry.backbones.get("my_tiny").load()
    backbone = cls(validate(cls.Config, BackboneConfig(name="my_tiny", width=4).options, "test"))  # type: ignore[call-arg]
    f_global, f_local = backbone(torch.rand(2, 1, 9, 10, 11))
    assert f_global.shape[:2] == (2, 4) and f_local.shape == (2, 4, 9, 10, 11)


def test_the_documented_table_format_renders(registry: Registry) -> None:
    from ssl3d.results.table import TableModel

    assert registry.table_formats.get("my_json").load().render(TableModel(tables=())) == "[]"


def test_the_documented_task_file_is_read(tmp_path: Path) -> None:
    from ssl3d.downstream.task_files import load_task

    (block,) = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs/own_data.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "liver.yaml").write_text(block)
    task = load_task(tmp_path / "liver.yaml")
    assert (task.name, task.folds, task.facts["label_values"]) == ("liver", 5, {1: "liver", 2: "tumour"})


def test_every_layout_is_documented(registry: Registry) -> None:
    page = (ROOT / "docs/own_data.md").read_text()
    for name in (entry.name for entry in registry.datasets if not entry.name.startswith("my_")):
        assert f"`{name}`" in page, name


def test_documented_files_exist() -> None:
    for page in ("README.md", "docs/plugins.md", "docs/own_data.md", "docs/realdata.md"):
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
        for path in re.findall(r"`((?:ssl3d|plugins|benchmarks|configs|tests|docs)/[\w./]+)`", text):
            assert (ROOT / path).exists(), f"{page} names {path}"
