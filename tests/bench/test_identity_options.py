"""Options that change no number, and the memory of one job: what may not leak from one cell into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch

from ssl3d.bench.stale import _matters
from ssl3d.config import WITHOUT_EFFECT, MethodConfig, Settings, identity_values, options_without_effect
from ssl3d.device import PeakMemory
from ssl3d.environment import environment
from ssl3d.pretrain.loop import pretrain_identity
from ssl3d.pretrain.spec import MethodSpec, resolve_method

PIXELS = 2**18
"""Float32 values of one MiB."""


@pytest.mark.parametrize("option", sorted(o for o in options_without_effect() if o.startswith("pretrain.")))
def test_an_option_without_effect_is_marked_once_and_is_in_no_identity(smoke: Settings, option: str) -> None:
    name = option.removeprefix("pretrain.")
    value = getattr(smoke.pretrain, name)
    other = smoke.model_copy(
        update={"pretrain": smoke.pretrain.model_copy(update={name: not value if value is False else 7})}
    )
    spec = resolve_method("gvsl", {})
    assert pretrain_identity(spec, smoke, "d", 0) == pretrain_identity(spec, other, "d", 0)
    identity = {"method": "gvsl", "mode": "linear", "task": "shc", "pretrain": {}}
    run = {"task_data": None, "data": "phantoms"}
    assert not _matters(option, identity, run) and _matters("pretrain.lr", identity, run)


def test_the_loop_s_options_without_effect_are_those_it_has_always_left_out() -> None:
    assert {o for o in options_without_effect() if o.startswith(("pretrain.", "downstream."))} == {
        "pretrain.workers", "pretrain.checkpoint_every", "pretrain.keep_checkpoints", "pretrain.monitor_every",
        "pretrain.log_every", "pretrain.checkpoint_activations", "pretrain.keep", "pretrain.loggers",
        "downstream.feature_budget_mib", "downstream.feature_disk_mib", "downstream.windows",
    }  # fmt: skip


def test_an_option_of_a_method_can_be_marked_too() -> None:
    class Config(MethodConfig):
        weight: float = 1.0
        """Of the loss."""
        verbose: Annotated[bool, WITHOUT_EFFECT] = False
        """Says more."""

    assert identity_values(Config(verbose=True)) == {"weight": 1.0}
    method = type("M", (), {"name": "m"})
    assert MethodSpec("m", method, Config(), "M").identity() == {"name": "m", "config": {"weight": 1.0}}  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are set back by /proc")
def test_peak_memory_is_that_of_one_job() -> None:
    memory = PeakMemory(torch.device("cpu"))
    if memory.mib() is None:
        pytest.skip("this container does not let a peak be set back")
    before = memory.mib()
    block = np.ones(300 * PIXELS, dtype=np.float32)
    large = memory.mib()
    del block
    small = PeakMemory(torch.device("cpu")).mib()
    assert before is not None and large is not None and small is not None
    assert large > before + 250 and small < large - 250


def test_a_peak_that_cannot_be_set_back_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(PeakMemory, "_CLEAR", tmp_path / "no such folder" / "clear_refs")
    assert PeakMemory(torch.device("cpu")).mib() is None


def test_the_threads_of_a_record_are_those_of_its_moment() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert environment()["threads"] == threads
    finally:
        torch.set_num_threads(before)
