"""The documentation is used as a reader would: every block of code, and every command that a page shows."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

import ssl3d
from ssl3d.cli import main
from ssl3d.config import BackboneConfig, load_settings, validate
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.checkpoint import weights_fingerprint
from ssl3d.registry.registry import Registry
from ssl3d.registry.registry import registry as installed
from ssl3d.testing import check_method

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
UNUSED = [
    (page, language, text)
    for page in PAGES
    for language, text in re.findall(
        r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    )
]
"""(page, language, text) of the fenced blocks that nothing below has taken."""


def take(page: str, language: str, word: str = "") -> list[str]:
    """Return the blocks of a page that hold ``word``; whoever takes them uses them."""
    found = [block for block in UNUSED if block[:2] == (page, language) and word in block[2]]
    assert found, f"{page} has no {language} block with {word}"
    for block in found:
        UNUSED.remove(block)
    return [text for *_, text in found]


(CHECK,) = take("docs/plugins.md", "python", "check_method")
BLOCKS = take("docs/plugins.md", "python", "@ssl3d.hookimpl")
(ENTRY_POINTS,) = take("docs/plugins.md", "toml")
(GATHERED,) = take("docs/plugins.md", "python", "from ssl3d.ranks import gather")
(README_METHOD,) = take("README.md", "python", "class Denoise")
(TASK_FILE,) = take("docs/own_data.md", "yaml")
(PRESET,) = take("docs/presets.md", "yaml")
PYTHON = take("docs/python.md", "python")
(NNUNET,) = take("docs/weights.md", "python", "nnUNetPlans")
(MONAI,) = take("docs/weights.md", "python", "from network import load")
SHELL = [text for page in {page for page, language, _ in UNUSED if not language} for text in take(page, "")]


def test_every_block_is_used_by_a_test_here() -> None:
    assert not UNUSED, "take it and use it as a reader would"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry of one plugin a block, beside the bundled ones."""
    folder = tmp_path_factory.mktemp("docs")
    entry_points = [("ssl3d", "0", EntryPoint("builtins", "ssl3d.registry.bundled", "ssl3d"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for number, block in enumerate(BLOCKS):
            (folder / f"docs_block_{number}.py").write_text(block)
            entry_points.append(("docs", "1", EntryPoint(f"b{number}", f"docs_block_{number}", "ssl3d")))
        found = Registry(entry_points)
        for kind in ("methods", "tasks", "datasets", "backbones", "table_formats", "loggers"):
            assert len(getattr(found, kind)) >= 1, kind
    return found


def test_every_block_registers_without_a_complaint(registry: Registry) -> None:
    assert len(registry.plugins) == 10
    assert not registry.broken() and not any(p.problems for p in registry.plugins.values())


def test_the_documented_method_is_shorter_than_40_lines() -> None:
    (block,) = (block for block in BLOCKS if "class Denoise" in block)
    assert len(block.splitlines()) < 40


def test_the_documented_method_for_several_devices_is_on_one_what_it_was(registry: Registry) -> None:
    plain = registry.methods.get("my_same_place").load()
    names = dict(vars(sys.modules[plain.__module__]))
    exec(GATHERED, names)
    torch.manual_seed(0)
    method = plain(build_backbone(BackboneConfig.model_validate({"channels": [4, 8]}), 0), plain.Config())
    views = {name: torch.rand(3, 1, 8, 8, 8) for name in ("first", "second")}
    expected = method.training_step(views)["cross_entropy"]
    assert torch.equal(names["SamePlaceAnywhere"].training_step(method, views)["cross_entropy"], expected)


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
    from ssl3d.results.table.model import TableModel

    assert registry.table_formats.get("my_json").load().render(TableModel(tables=())) == "[]"


def test_the_documented_preset_is_read_and_fits_its_schema(tmp_path: Path) -> None:
    from jsonschema import Draft202012Validator

    (tmp_path / "mine.yaml").write_text(PRESET)
    settings = (
        load_settings("quick"),
        load_settings(str(tmp_path / "mine.yaml"), methods=installed().methods.names()),
    )
    assert settings[1].pretrain.steps == 720 and settings[1].pretrain.crop == (32, 32, 32)
    assert settings[1].downstream.finetune == settings[0].downstream.finetune, "of the preset that it extends"
    schema = Draft202012Validator(json.loads(done("config", "--schema")))
    schema.validate(yaml.safe_load(PRESET))
    for shown, line in zip(
        ("bash", "zsh"), re.findall(r"^eval .*$", "".join(SHELL), re.MULTILINE), strict=True
    ):
        (variable,) = re.findall(rf"(_SSL3D_COMPLETE)={shown}_source ssl3d", line)
        result = CliRunner().invoke(main, prog_name="ssl3d", env={variable: f"{shown}_source"})
        assert result.exit_code == 0 and f"{shown}_complete" in result.output


def test_the_documented_task_file_is_read(tmp_path: Path) -> None:
    from ssl3d.downstream.task_files import load_task

    (tmp_path / "liver.yaml").write_text(TASK_FILE)
    task = load_task(tmp_path / "liver.yaml")
    assert (task.name, task.folds, task.facts["label_values"]) == ("liver", 5, {1: "liver", 2: "tumour"})


# --- A reader's package ------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "200"})


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@contextmanager
def announced(site: Path, *sources: str) -> Iterator[None]:
    """Let each source be an installed module, the first announced as docs/plugins.md says."""
    ((name, module),) = tomllib.loads(ENTRY_POINTS)["project"]["entry-points"]["ssl3d"].items()
    modules = {f"{name}_{number}" if number else name: f"{module}_{number}" if number else module
               for number in range(len(sources))}  # fmt: skip
    for imported, source in zip(modules.values(), sources, strict=True):
        (site / f"{imported}.py").write_text(source)
    info = site / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [f"{announced} = {imported}" for announced, imported in modules.items()]
    (info / "entry_points.txt").write_text("\n".join(["[ssl3d]", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        for imported in modules.values():
            patch.delitem(sys.modules, imported, raising=False)
        installed.cache_clear()
        yield
        for imported in modules.values():
            sys.modules.pop(imported, None)
    installed.cache_clear()


@pytest.fixture
def livers(tmp_path: Path) -> Path:
    """Ten livers in the documented layout: HU, a tumour in each."""
    import nibabel

    rng = np.random.default_rng(0)
    (tmp_path / "livers").mkdir()
    for i in range(10):
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 20)] * 3, indexing="ij"))
        label = np.zeros((20, 20, 20), np.uint8)
        for value, radius in ((1, 0.5), (2, 0.2)):
            label[((grid - rng.uniform(-0.2, 0.2, (3, 1, 1, 1))) ** 2).sum(0) < radius**2] = value
        image = np.where((grid**2).sum(0) < 0.8, 0, -1000) + 60 * label + rng.normal(0, 10, label.shape)
        for name, data in (("volume", image.astype(np.int16)), ("segmentation", label)):
            affine = np.diag([6.4, 6.4, 6.4, 1])
            nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / f"livers/{name}-{i}.nii.gz")
    return tmp_path / "livers"


@pytest.mark.filterwarnings("ignore")
def test_the_documented_plugin_is_pretrained_evaluated_shown_and_exported(
    livers: Path, tmp_path: Path
) -> None:
    """Everything of docs/plugins.md together: its method on its backbone, its data set, task, table format and logger."""
    (tmp_path / "site").mkdir()
    with announced(tmp_path / "site", *BLOCKS):
        _use_the_plugin(livers, tmp_path)


def _use_the_plugin(livers: Path, tmp_path: Path) -> None:
    assert "broken" not in done("plugins") and "my_liver_task" in done("tasks")
    out, store, cache = tmp_path / "run", tmp_path / "store", ["--cache", tmp_path / "cache"]
    (selects,) = re.findall(r"`--set 'backbone=(.*)'`\s+selects\s+it", (ROOT / "docs/plugins.md").read_text())
    options = ["--preset", "smoke", "--set", f"backbone={selects.replace('my_backbone', 'my_tiny')}", *cache]
    pretrain = ["pretrain", "--method", "my_denoise", "--data", f"my_liver={livers}", "--out", out, *options]
    (told,) = (
        shlex.split(line) for text in SHELL for line in text.splitlines() if "pretrain.loggers" in line
    )
    pretrain += told[told.index("--set") :]
    done(*pretrain)
    assert "4,lr," in (out / "course.csv").read_text()
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    done(*pretrain, "--resume")
    (documented,) = re.findall(
        r"`ssl3d (bench --tasks my_liver_task[^`]*)`", (ROOT / "docs/plugins.md").read_text()
    )
    words = shlex.split(documented.replace("/data/liver", str(livers)).replace("results", str(store)))
    more = [
        "--methods",
        "scratch,my_denoise",
        "--checkpoint",
        f"my_denoise={out}",
        "--modes",
        "linear,finetune",
    ]
    table = done(*words, *more, *options, "--allow-overlap", "my_liver_task")
    assert "My denoising" in table and "MY_LIVER_TASK DSC" in table
    cells = json.loads(done("table", "--store", store, "--format", "my_json"))
    assert {(c["method"], c["mode"]) for c in cells} == {
        (method, mode) for method in ("scratch", "my_denoise") for mode in ("linear", "finetune")
    }
    done("export", "--checkpoint", out, "--to", "safetensors", "--out", tmp_path / "exported")
    model = ssl3d.create_model(tmp_path / "exported")
    assert type(model).__name__ == "Tiny"
    assert weights_fingerprint(model) == weights_fingerprint(ssl3d.create_model(out))


EXAMPLES = ("my_mirrored", "my_follower", "my_same_place")


@pytest.mark.filterwarnings("ignore")
def test_the_other_documented_methods_are_pretrained_evaluated_and_exported(
    livers: Path, tmp_path: Path
) -> None:
    """An encoder alone, a momentum encoder, and two patients at once; on the documented backbone."""
    (tmp_path / "site").mkdir()
    data, store = f"my_liver={livers}", tmp_path / "store"
    options = [
        "--preset",
        "smoke",
        "--set",
        "backbone={name: my_tiny, width: 8}",
        "--cache",
        tmp_path / "cache",
    ]
    with announced(tmp_path / "site", *BLOCKS):
        for name in EXAMPLES:
            check_method(name, skip=["learns"], overrides=["backbone={name: my_tiny}"]).assert_passed()
        table = done(
            "bench", "--methods", ",".join(("scratch", *EXAMPLES)), "--tasks", "my_liver_task", "--modes", "linear",
            "--data", data, "--task-data", f"my_liver_task={livers}", "--allow-overlap", "my_liver_task",
            "--store", store, *options,
        )  # fmt: skip
        for title in ("My mirrors", "My follower", "My places"):
            assert title in table
        for name in EXAMPLES:
            (folder,) = (store / "runs").glob(f"{name}-*")
            done("export", "--checkpoint", folder, "--to", "safetensors", "--out", tmp_path / name)
            assert type(ssl3d.create_model(tmp_path / name)).__name__ == "Tiny"


@pytest.mark.filterwarnings("ignore")
def test_the_documented_checks_pass(livers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("site", "tests"):
        (tmp_path / folder).mkdir()
    livers.rename(tmp_path / "tests/livers")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(CHECK, "plugins.md", "exec"), names)
    with announced(tmp_path / "site", *BLOCKS):
        names["test_my_plugin"]()
        shown = [line for text in SHELL for line in text.splitlines() if line.startswith("ssl3d check my_")]
        assert len(shown) == 4
        for command in shown[1:]:  # what is left out is slow, and has been done just now
            slow = ["--skip", "features do not collapse"] * ("my_denoise" in command)
            slow += ["--skip", "it is pretrained evaluated and exported"] * ("my_tiny --set" in command)
            done(*shlex.split(command)[1:], *slow)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_the_fingerprint_takes_any_convolution_in_any_layout(layout: torch.memory_format) -> None:
    """A kernel or a number of channels of 1 leaves strides that say nothing."""
    found = set()
    for kernel in ((1, 1, 1), (3, 1, 1), (1, 1, 3), (2, 2, 2)):
        for channels in ((1, 1), (1, 5), (5, 1), (4, 4)):
            torch.manual_seed(0)
            module = torch.nn.Conv3d(*channels, kernel)
            plain = weights_fingerprint(module)
            assert weights_fingerprint(module.to(memory_format=layout)) == plain  # type: ignore[call-overload]
            found.add(plain)
    assert len(found) == 12, "(3, 1, 1) and (1, 1, 3) draw the same numbers"


@pytest.mark.filterwarnings("ignore")
def test_the_method_in_the_readme_is_pretrained(volume_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    with announced(tmp_path / "site", README_METHOD):
        done("pretrain", "--method", "my_denoise", "--data", volume_folder, "--preset", "smoke",
             "--set", "my_denoise.sigma=0.3", "--out", tmp_path / "run", "--cache", tmp_path / "cache")  # fmt: skip
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["method"]["config"] == {"sigma": 0.3}


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_python_is_gone_through_from_top_to_bottom(
    livers: Path, volume_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block as it stands, but for the places of the data and a preset that is done in seconds."""
    pytest.importorskip("matplotlib").use("Agg")
    _write_tasks(livers, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in PYTHON:
        if "predictors/" in block:  # the only thing that a command line before has made
            for task in ("liver", "severity"):
                done("finetune", "--checkpoint", "runs/denoising", "--task", f"{task}.yaml", "--mode", "linear",
                     "--preset", "tiny.yaml", "--out", f"predictors/{task}")  # fmt: skip
        for shown, mine in (("/data/ct", str(volume_folder)), ('"quick"', '"tiny.yaml"'), ("1000", "2")):
            block = block.replace(shown, mine)
        exec(compile(block, "python.md", "exec"), names)
        if "results.table" in block:
            assert names["run"]["step"] == 2 and len(names["results"]) == 12 and not names["results"].failures
    assert len(names["cells"]) == 12 and {"method", "case", "dsc"} <= set(names["cases"])
    assert {path.name for path in tmp_path.glob("*.p*")} == {"forest.pdf", "curves.pdf", "losses.png"}
    features = names["features"]
    assert features.local_feature.shape[1:] == features.image.shape and features.pooled.ndim == 1
    assert names["backbone"].global_channels == len(features.pooled)
    assert (tmp_path / "scan_liver.nii.gz").is_file()
    assert set(names["found"].probabilities) == {"mild", "severe"}


def _write_tasks(livers: Path, folder: Path) -> None:
    """Write a task of structures and one of classes on the livers, a scan, and a preset."""
    scans = sorted(livers.glob("volume-*.nii.gz"))
    (folder / "scan.nii.gz").write_bytes(scans[0].read_bytes())
    preset = "extends: smoke\nbackbone: {channels: [4, 8]}\npretrain: {crop: 16}\ndownstream: {crop: 16}\n"
    (folder / "tiny.yaml").write_text(preset)
    labels = [scan.with_name(scan.name.replace("volume", "segmentation")) for scan in scans]
    columns = {"liver": ("label", labels), "severity": ("class", ["mild", "severe"] * 5)}
    kinds = {"liver": "segmentation\nlabels: {1: liver, 2: tumour}", "severity": "classification"}
    for name, (column, values) in columns.items():
        rows = [f"{scan},{value}" for scan, value in zip(scans, values, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join([f"image,{column}", *rows]))
        (folder / f"{name}.yaml").write_text(
            f"name: {name}\nkind: {kinds[name]}\ndataset: csv\ndata: {name}.csv\nmodality: ct\n"
            "preparation: {spacing_mm: 6.4}\n"
        )


# --- Weights in other tools --------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run of five stages, exported for both tools."""
    from test_export import FIVE, finished

    out = finished(tmp_path, FIVE)
    for target in ("nnunet", "monai"):
        done("export", "--checkpoint", out, "--to", target, "--out", tmp_path / target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_plans_of_nnunet_build_the_network(exported: Path) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    (exported / "nnunet").rename(exported / "exported")
    plans = exported / "nnUNet_preprocessed/Dataset001_Heart/nnUNetPlans.json"
    plans.parent.mkdir(parents=True)
    before = {
        "plans_name": "nnUNetPlans",
        "configurations": {"3d_fullres": {"architecture": {}, "spacing": [1, 1, 1]}},
    }
    plans.write_text(json.dumps(before))
    exec(compile(NNUNET, "weights.md", "exec"), {})
    made = PlansManager(str(plans.with_name("ssl3dPlans.json"))).get_configuration("3d_fullres")
    assert (
        made.network_arch_class_name == "ssl3d.models.weights.nnunet.NNUNetUNet3D"
        and made.patch_size == [128] * 3
    )
    assert made.normalization_schemes == ["RescaleTo01Normalization"]


def test_monai_loads_the_weights(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (exported / "monai").rename(exported / "exported")
    monkeypatch.syspath_prepend(str(exported / "exported"))
    names: dict[str, Any] = {}
    exec(compile(MONAI, "weights.md", "exec"), names)
    with torch.no_grad():
        assert names["model"](torch.rand(1, 1, 32, 32, 32)).shape == (1, 4, 32, 32, 32)


# --- Commands ----------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Return every command that a page shows: in a block without language, indented, or `ssl3d ...` in a line."""
    text = "\n".join(SHELL)
    for page in PAGES:
        content = (ROOT / page).read_text()
        text += "\n" + "\n".join(re.findall(r"^    ((?:.*\\\n)*.*)$", content, re.MULTILINE))
        text += "\n" + "\n".join(m.replace("\n", " ") for m in re.findall(r"`(ssl3d [a-z][^`]*)`", content))
    lines = text.replace("\\\n", " ").splitlines()
    return sorted({line.split("  #")[0].strip() for line in lines if re.match(r"\s*(ssl3d|make) ", line)})


@pytest.mark.parametrize("command", commands())
def test_every_command_that_is_shown_exists_with_its_options(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets
        return
    monkeypatch.chdir(tmp_path)
    known: click.Command = main
    context = click.Context(main)
    while isinstance(known, click.Group) and words:
        names = words.pop(0).split("|")  # "ls|show" stands for two
        subcommands = [known.get_command(context, name) for name in names]
        assert all(subcommands), f"no such command: {command}"
        known = subcommands[0]  # type: ignore[assignment]
    options = {name for p in known.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= options, f"{command}: {used - options}"


def test_every_layout_is_documented(registry: Registry) -> None:
    page = (ROOT / "docs/own_data.md").read_text()
    for name in (entry.name for entry in registry.datasets if not entry.name.startswith("my_")):
        assert f"`{name}`" in page, name


LINKED = [*PAGES, "CONTRIBUTING.md", "benchmarks/studies/README.md", "benchmarks/speed/README.md"]


@pytest.mark.parametrize("page", LINKED)
def test_documented_files_exist(page: str) -> None:
    """Every link leads to a file and, after #, to a heading in it; every path in backticks is there."""
    text = (ROOT / page).read_text()
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        linked = (ROOT / page).parent / target if target else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page} links to {target}#{heading}"
    for path in re.findall(r"`((?:ssl3d|plugins|benchmarks|configs|tests|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists(), f"{page} names {path}"
