"""The public API: its names are frozen here, importing it is instant, and its functions do what the commands do."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ssl3d
from ssl3d.bench.given import as_overrides
from ssl3d.cli import main
from ssl3d.errors import ConfigError, DataError, PluginError

matplotlib.use("Agg")

NAMES = """
    Backbone BatchRng Case CropSource Dataset EMA Features Logger MLP Method MethodConfig Model PooledLinear PooledNorm
    Progress RestorationHead StopGradient TableFormat Task __version__ bench check_norm create_model errors hookimpl load
    losses mean_image_error numpy_rng plot pool pretrain store testing torch_rng transforms view_measures
"""
OF_MODULES = {
    "errors": "CellsFailed CheckpointError ConfigError DataError PluginError SSL3DError TrainingError WriteError",
    "losses": """alignment cosine_distance matching_error ncc_loss negative_cosine nt_xent segmentation_loss smoothness_loss
                 soft_dice_loss uniformity""",
    "plot": "curves forest losses",
    "transforms": """BezierIntensity BrightnessContrast Flip Gamma GaussianBlur GaussianNoise InPainting LocalShuffle
                     OutPainting RandomResizedCrop RandomSpatial RandomViews SpatialParameters""",
}
ARGUMENTS = {
    "ssl3d.bench.api:pretrain": "method data out preset options more",
    "ssl3d.bench.api:bench": "methods tasks store preset options more",
    "ssl3d.bench.plan:BenchOptions": """store methods tasks modes seeds preset options data task_data checkpoint
        label_fractions match recompute allow_overlap exclude_test splits_file subject_patterns policy keep_predictions
        allow_code_change device cache session jobs""",
    "ssl3d.bench.pretraining:PretrainOptions": """method out data preset options seed resume allow_code_change exclude_test
        subject_patterns policy device cache devices nodes strategy""",
    "ssl3d.downstream.model:load": "name_or_path device preparation",
    "ssl3d.downstream.model:PretrainedModel.features": "self path local window overlap affine channel offset",
    "ssl3d.downstream.model:PretrainedModel.predict": "self path affine channel offset",
    "ssl3d.results.results:store": "folder",
    "ssl3d.results.results:Results.to_dataframe": "self per_case",
    "ssl3d.results.results:Results.model": "self statistics reference difference against",
    "ssl3d.results.results:Results.table": "self format statistics more",
    "ssl3d.plot:forest": "source task mode reference axes",
    "ssl3d.plot:curves": "source task mode x axes",
    "ssl3d.plot:losses": "runs names ax",
    "ssl3d.models.ema:EMA": "online without",
    "ssl3d.models.ema:EMA.follow": "self online momentum",
    "ssl3d.pretrain.method:Method.views": "self x rng",
    "ssl3d.pretrain.method:Method.training_step": "self views",
    "ssl3d.models.backbone:Backbone.encode": "self x",
    "ssl3d.models.backbone:Backbone.decode": "self features",
    "ssl3d.models.backbone:Backbone.global_grid": "self size grid",
}


def test_the_names_are_frozen() -> None:
    """A name that goes, or comes, is a decision: change the list here with the changelog."""
    assert sorted(ssl3d.__all__) == sorted(NAMES.split())
    for module, names in OF_MODULES.items():
        assert sorted(getattr(ssl3d, module).__all__) == sorted(names.split()), module


def test_every_name_is_there_and_documented() -> None:
    for name in ssl3d.__all__:
        thing = getattr(ssl3d, name)
        assert name == "__version__" or thing.__doc__, name
    for module in OF_MODULES:
        for name in getattr(ssl3d, module).__all__:
            assert getattr(getattr(ssl3d, module), name).__doc__, f"{module}.{name}"
    assert set(ssl3d.__all__) <= set(dir(ssl3d))


@pytest.mark.parametrize("place", ARGUMENTS)
def test_the_arguments_are_frozen(place: str) -> None:
    from importlib import import_module

    module, _, path = place.partition(":")
    thing = import_module(module)
    for part in path.split("."):
        thing = getattr(thing, part)
    assert list(inspect.signature(thing).parameters) == ARGUMENTS[place].split()  # type: ignore[arg-type]


def test_importing_ssl3d_imports_nothing_heavy() -> None:
    code = "import ssl3d, sys; ssl3d.pretrain, ssl3d.bench; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "monai", "numpy", "pandas", "matplotlib", "pydantic", "rich", "click"):
        assert f"'{heavy}'" not in loaded


def test_packages_of_the_name_of_a_function_stay_packages() -> None:
    import ssl3d.bench.run
    import ssl3d.pretrain.method

    assert ssl3d.pretrain.method.Method is ssl3d.Method and callable(ssl3d.pretrain) and callable(ssl3d.bench)


def test_bad_arguments_are_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'ssl3d\.pretrain has no argument "sed".*"seed"'):
        ssl3d.pretrain("gvsl", out=tmp_path, sed=1)  # type: ignore[operator]
    with pytest.raises(PluginError, match='"gvsl"'):
        ssl3d.pretrain("gvls", out=tmp_path / "run")  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r'ssl3d\.bench has no argument "mode".*"modes"'):
        ssl3d.bench(store=tmp_path, mode=["linear"])  # type: ignore[operator]
    with pytest.raises(ConfigError, match="mapping or a list"):
        as_overrides("pretrain.steps=1")
    with pytest.raises(DataError, match="ssl3d bench --store"):
        ssl3d.store(tmp_path / "nothing")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench from Python: two rows that learn and scratch, on one task, with two label fractions."""
    root = tmp_path_factory.mktemp("api")
    options = {"pretrain.steps": 2, "pretrain.log_every": 1}
    run = ssl3d.pretrain("denoising", out=root / "run", preset="smoke", options=options, device="cpu",
                         cache=root / "cache")  # type: ignore[operator]  # fmt: skip
    assert run["step"] == 2 and run["preparation"]["parameters"]["spacing_mm"] == 6.4
    results = ssl3d.bench(["denoising", "scratch"], ["shc"], store=root / "store", preset="smoke", options=options,
                          modes=["linear"], seeds=[0, 1, 2], label_fractions=[0.5, 1], device="cpu",
                          cache=root / "cache")  # type: ignore[operator]  # fmt: skip
    assert len(results) == 12 and not results.failures
    return root


def test_the_run_of_python_is_that_of_the_command_line(made: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["pretrain", "--method", "denoising", "--out", str(tmp_path / "run"), "--preset",
                                     "smoke", "--device", "cpu", "--set", "pretrain.steps=2", "--set",
                                     "pretrain.log_every=1", "--cache", str(made / "cache")])  # fmt: skip
    assert done.exit_code == 0, done.output
    ours, theirs = (json.loads((p / "run" / "run.json").read_text()) for p in (made, tmp_path))
    assert ours["weights_sha256"] == theirs["weights_sha256"]


def test_a_store_is_a_data_frame_of_cells_and_of_cases(made: Path) -> None:
    results = ssl3d.store(made / "store")
    cells, cases = results.to_dataframe(), results.to_dataframe(per_case=True)
    assert len(cells) == 12 and set(cells["method"]) == {"scratch", "denoising"}
    assert set(cells["label_fraction"]) == {0.5, 1.0} and cells["score"].notna().all()
    assert len(cases) == sum(len(record["per_case"]) for record in results)
    for (method, seed), group in cases[cases.label_fraction == 1].groupby(["method", "seed"]):
        (cell,) = cells[(cells.method == method) & (cells.seed == seed) & (cells.label_fraction == 1)][
            "score"
        ]
        assert 100 * group["dsc"].mean() == pytest.approx(cell, abs=1e-4)
    assert "Denoising" in results.table() and results.table("csv").startswith("table,")


def test_figures_are_axes_that_show_the_numbers_of_the_table(made: Path, tmp_path: Path) -> None:
    from matplotlib.axes import Axes

    results = ssl3d.store(made / "store")
    panels = ssl3d.plot.forest(results)
    assert (
        all(isinstance(ax, Axes) for ax in panels) and len(panels) == 2
    )  # two tables: half of the labels, and all
    drawn = {float(line.get_xdata()[0]) for ax in panels for line in ax.lines if line.get_marker() == "o"}
    expected = set()
    frame = results.to_dataframe()
    for fraction in (0.5, 1.0):
        means = frame[frame.label_fraction == fraction].groupby("method")["score"].mean()
        expected.add(round(means["denoising"] - means["scratch"], 4))
    assert {round(x, 4) for x in drawn} == expected
    (ax,) = ssl3d.plot.curves(made / "store")
    lines = {c.get_label(): np.asarray(c[0].get_xydata()) for c in ax.containers}
    assert set(lines) == {"Denoising", "Scratch"} and lines["Scratch"][:, 0].tolist() == [0.5, 1.0]
    assert lines["Scratch"][1, 1] == pytest.approx(
        frame[(frame.method == "scratch") & (frame.label_fraction == 1)]["score"].mean()
    )
    ax = ssl3d.plot.losses(made / "run")
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [1, 2]
    ax.figure.savefig(tmp_path / "figure.png")
    with pytest.raises(DataError, match='has no "nothing"'):
        ssl3d.plot.losses(made / "run", names=["nothing"])
    with pytest.raises(ConfigError, match="labels"):
        ssl3d.plot.curves(results, x="time")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="keep_checkpoints"):
        ssl3d.plot.curves(results, x="steps")


def test_the_momentum_copy_follows_like_the_one_of_byol() -> None:
    from ssl3d_methods.byol import momentum

    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    copy = ssl3d.EMA(online, without=["2"])
    assert not any(p.requires_grad for p in copy.parameters()) and not list(copy.network[2].parameters())
    before = copy.network[0].weight.clone()
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(torch.randn_like(parameter))
        online[1].running_mean.add_(1)
    copy.follow(online, 0.9)
    torch.testing.assert_close(copy.network[0].weight, 0.9 * before + 0.1 * online[0].weight)
    torch.testing.assert_close(copy.network[1].running_mean, online[1].running_mean)
    assert [ssl3d.EMA.cosine(0.99, k, 10) for k in range(11)] == [momentum(k, 10, 0.99) for k in range(11)]
    assert not copy(torch.rand(2, 3)).requires_grad
