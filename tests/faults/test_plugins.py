"""Methods of a plugin that do what they must not: named, with the place in the plugin's file, and nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.runs import Plain, run, states
from ssl3d.config import load_settings
from ssl3d.errors import PluginError, TrainingError
from ssl3d.pretrain.contract import check_functions
from ssl3d.pretrain.loop import check_run
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.spec import MethodSpec

RETURNED: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "None": (lambda loss: None, "returned None, which is no dictionary"),
    "nothing": (lambda loss: {}, "returned no loss"),
    "a tensor": (lambda loss: loss, "returned tensor.*which is no dictionary"),
    "a float": (lambda loss: {"mse": float(loss)}, "loss mse is 0.*no tensor"),
    "a list": (lambda loss: {"mse": [loss]}, "loss mse is .*no tensor"),
    "no scalar": (lambda loss: {"mse": loss[None]}, r"loss mse has shape \(1,\); return scalars"),
    "no gradient": (lambda loss: {"mse": loss.detach()}, "mse has no gradient"),
    "step": (lambda loss: {"step": loss}, 'a loss is called "step"'),
    "lr": (lambda loss: {"lr": loss}, 'a loss is called "lr"'),
    "a number": (lambda loss: {3: loss}, "a loss is called 3, which is no text"),
    "not a number": (lambda loss: {"mse": loss * torch.nan}, "mse = nan at step 2"),
    "infinite": (lambda loss: {"mse": loss * torch.inf}, "mse = inf at step 2"),
}


@pytest.mark.parametrize("case", RETURNED)
def test_what_a_training_step_returns_is_refused_by_name_and_place(tmp_path: Path, case: str) -> None:
    change, message = RETURNED[case]

    class Odd(Plain):
        seen = 0

        def training_step(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            losses = super().training_step(views)
            if self.training:
                self.seen += 1
            return change(losses["mse"]) if self.seen == 3 and self.training else losses  # type: ignore[no-any-return]

    place = "" if "at step" in message else rf".*{re.escape(__file__)}, line \d+\). Fix: "
    with pytest.raises(TrainingError, match=f"plain: .*{message}{place}"):
        run(tmp_path / "run", Odd, checkpoint_every=1, steps=4)
    assert states(tmp_path / "run")[-1] == "state-00000002.safetensors"


def test_a_function_that_a_method_lacks_is_named_before_any_data_are_read() -> None:
    class NoStep(Plain):
        training_step = Method.training_step

    class Empty(NoStep):
        views = Method.views

    class Untrained(Empty):
        trains = "none"

    for cls, lacks in ((NoStep, "no training_step"), (Empty, "no views and no training_step")):
        with pytest.raises(
            PluginError, match=rf"The method plain \(.*\) cannot be trained: it has {lacks}\. Fix: "
        ):
            check_run(MethodSpec("plain", cls, cls.Config(), ""), load_settings("smoke"), 0)
    check_functions(Untrained)
    check_functions(Plain)
