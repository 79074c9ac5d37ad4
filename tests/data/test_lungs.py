"""Lungs by the network of lungmask: its own code around a network that is made here, and what is refused."""

from __future__ import annotations

import pickle
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from pydantic import ValidationError

from ssl3d.cli import main
from ssl3d.data.cohort import Case
from ssl3d.data.files.volume import write_volume
from ssl3d.data.layouts.releases import STOIC
from ssl3d.data.prepared import lungs
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.lungs import load_lungmask, lungs_by_network
from ssl3d.data.prepared.steps import Preparation
from ssl3d.downstream.task_files import load_task
from ssl3d.errors import ConfigError

pytest.importorskip("lungmask", reason='pip install "ssl3d[lungs]"')

SHAPE = (48, 40, 16)
LUNG = (slice(8, 18), slice(22, 32), slice(3, 11))  # to the left, in front and below: a flip would show
CONSOLIDATED = (slice(8, 18), slice(14, 22), slice(3, 11))  # no air: the threshold misses it


def chest() -> np.ndarray:
    """Return values after the offset (D, H, W): a body in a room, one lung, and its consolidated part."""
    data = np.zeros(SHAPE, np.float32)
    data[4:-4, 4:-4] = 1060
    data[LUNG], data[CONSOLIDATED] = 200, 900
    return data + np.random.default_rng(0).normal(0, 5, SHAPE).astype(np.float32)


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(lungs, "_loaded", {})


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of "weights"; the network calls lung what is darker than soft tissue and no room air."""
    import torch
    from lungmask import mask

    class Levels(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 1, 256, 256): (HU + 1024) / 1624
            lung = ((x > 0.06) & (x < 0.6)).float()
            return torch.cat([1 - lung, lung, torch.zeros_like(lung)], dim=1)  # (B, 3, 256, 256)

    monkeypatch.setattr(mask, "get_model", lambda name, path: Levels())
    (tmp_path / "weights.pth").write_bytes(b"made here")
    return tmp_path / "weights.pth"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "250"})


def prepared(tmp_path: Path, **options: object) -> PreparedCohort:
    write_volume(tmp_path / "a.nii.gz", (chest() - 1024).astype(np.int16), np.diag([2.0, 2, 2, 1]))
    case = Case("a", "a", tmp_path / "a.nii.gz", target=1)
    preparation = Preparation.model_validate({"spacing_mm": 2, "crop": "lungs", "margin_mm": 0, **options})
    return prepare([case], STOIC(), preparation, tmp_path / "cache")


def test_the_network_sees_the_volume_the_right_way_round(weights: Path) -> None:
    truth = np.zeros(SHAPE, bool)
    truth[LUNG] = truth[CONSOLIDATED] = True
    found = lungs_by_network(chest(), weights)
    assert found.shape == SHAPE and (found & truth).sum() / (found | truth).sum() > 0.8


def test_the_box_has_the_consolidated_part_and_the_threshold_has_not(weights: Path, tmp_path: Path) -> None:
    by_network, by_threshold = prepared(tmp_path, lungmask=weights), prepared(tmp_path)
    np.testing.assert_allclose(by_threshold.cases[0].shape, (10, 10, 8), atol=1)
    np.testing.assert_allclose(by_network.cases[0].shape, (10, 18, 8), atol=2)
    np.testing.assert_allclose(by_network.cases[0].affine[:3, 3], (16, 28, 6), atol=4)


def test_the_fingerprint_knows_the_weights_but_not_their_place(weights: Path, tmp_path: Path) -> None:
    first = prepared(tmp_path, lungmask=weights).fingerprint
    moved = tmp_path / "elsewhere.pth"
    weights.rename(moved)
    assert prepared(tmp_path, lungmask=moved).fingerprint == first
    moved.write_bytes(b"others")
    assert prepared(tmp_path, lungmask=moved).fingerprint != first
    assert prepared(tmp_path).fingerprint != first


def test_without_lungmask_nothing_is_new_in_the_parameters() -> None:
    """So fingerprints and caches of earlier versions stay valid; one of them is in test_reading.py."""
    keys = {"spacing_mm", "scaling", "intensity_offset", "crop", "margin_mm", "center_mm"}
    assert (
        Preparation().model_dump().keys() == Preparation(crop="lungs").model_dump(mode="json").keys() == keys
    )
    given = Preparation(crop="lungs", lungmask=Path("w.pth"))
    assert Preparation.model_validate(given.model_dump(mode="json")) == given


def test_the_command_and_a_task_file_take_it(weights: Path, tmp_path: Path) -> None:
    write_volume(tmp_path / "in" / "a.nii.gz", (chest() - 1024).astype(np.int16), np.diag([2.0, 2, 2, 1]))
    arguments = (
        "data",
        "prepare",
        tmp_path / "in",
        "--crop",
        "lungs",
        "--spacing",
        2,
        "--cache",
        tmp_path / "c",
    )
    result = run(*arguments, "--lungmask", weights)
    assert result.exit_code == 0, result.output
    result = run("data", "prepare", tmp_path / "in", "--lungmask", weights)
    assert result.exit_code == 2 and 'lungmask belongs to crop "lungs"' in result.output
    result = run(*arguments, "--lungmask", tmp_path / "none.pth")
    assert (
        result.exit_code == 2 and "none.pth is no file" in result.output and "Traceback" not in result.output
    )
    (tmp_path / "t.yaml").write_text(
        "name: t\nkind: classification\ndataset: stoic\npreparation: {crop: lungs, lungmask: weights.pth}\n"
    )
    assert load_task(tmp_path / "t.yaml").preparation["lungmask"] == weights
    with pytest.raises(ValidationError, match="belongs to crop"):
        Preparation(lungmask=weights)


def test_not_installed(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lungmask", None)
    with pytest.raises(ConfigError, match=r'cannot be imported .*pip install "ssl3d\[lungs\]"'):
        prepared(tmp_path, lungmask=weights)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(__file__).with_name("owned"),)


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights", pickle.dumps({"a": 1}), pickle.dumps(Malicious())],
    ids=["empty", "text", "dict", "malicious"],
)
def test_what_holds_no_weights_of_the_network_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad.pth does not hold weights of its network: .*Give a file"):
        load_lungmask(path)
    assert not Path(__file__).with_name("owned").exists()


def test_weights_of_the_network_are_loaded_from_the_file(tmp_path: Path) -> None:
    import torch
    from lungmask.resunet import UNet

    torch.manual_seed(0)
    net = UNet(n_classes=3, padding=True, depth=5, up_mode="upsample", batch_norm=True, residual=False)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    loaded = load_lungmask(tmp_path / "w.pth")
    assert loaded is load_lungmask(tmp_path / "w.pth")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name].cpu(), value)
