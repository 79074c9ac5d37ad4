"""`make speed` at tiny sizes: every row that is fast runs, no peer vanishes, and no time is asserted."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import compare
import gpu
import pytest
import torch
from compare import Case, Limits, Missing, Value
from convolutions import convolutions
from convolutions import main as print_convolutions

from ssl3d.config import BackboneConfig
from ssl3d.models.factory import build_backbone

FAST = ("ncc", "ntxent", "shuffle", "paint", "spatial", "crop", "table")


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    compare.main([*arguments, "--quick", "--out", str(tmp_path / "speed.json")])
    found: dict[str, Any] = json.loads((tmp_path / "speed.json").read_text())
    return found


def test_every_row_is_a_function_of_its_module() -> None:
    for row, module in compare.ROWS.items():
        assert callable(getattr(importlib.import_module(f"rows.{module}"), row)), row


def test_the_fast_rows_run_and_have_a_ratio_for_each_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "--only", ",".join(FAST))
    assert {case["row"] for case in found["cases"]} == set(FAST) and not found["failed"]
    for case in found["cases"]:
        assert case["ratio"].keys() | case["missing"].keys() and case["median"]["ours"] > 0
        assert case["ratio"].keys() == case["median"].keys() - {"ours", "bound"}
        assert all(ratio > 0 for ratio in case["ratio"].values())
        assert case["share"] is None or case["share"] > 0
    assert found["machine"]["processor"] and all(rate > 0 for rate in found["limits"].values())
    assert capsys.readouterr().out.count("\n| ncc |") == 1


def test_runs_of_two_kinds_of_machine_stand_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer that one run lacks, and a case that only one has, keep their places."""
    case = {"what": "memory, 64^3, edge^2.0", "unit": "MiB", "median": {"ours": 10.0, "plain": 25.0},
            "ratio": {"plain": 2.5}, "missing": {}, "share": 0.5, "limit": "bandwidth"}  # fmt: skip
    other = {
        **case,
        "what": "memory, 64^3, edge^2.2",
        "ratio": {},
        "missing": {"plain": "not installed"},
        "share": None,
    }
    alone = {**case, "what": "a step", "unit": "s"}
    files = []
    for name, cases in (("avx2", [case, alone]), ("avx512f", [other])):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"machine": {"processor": "P", "widest": name}, "cases": cases}))
    compare.main(["--show", *map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    assert "P, avx2: ours" in lines[0] and "P, avx512f: ours" in lines[0]
    assert lines[2:] == [
        "| memory, 64^3 | plain | 10 MiB | 2.50 | 50 % of bandwidth | 10 MiB | – |  |",
        "| a step | plain | 10 s | 2.50 | 50 % of bandwidth |  |  |  |",
    ]


def test_a_peer_that_is_not_installed_keeps_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lightly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightly", None)
    (case,) = run(tmp_path, "--only", "ntxent")["cases"]
    assert list(case["missing"]) == ["lightly"] and case["ratio"] == {}
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| ntxent"))
    assert "| lightly | peer not installed: pip install -e '.[speed]'" in line


def test_ours_and_peers_take_turns_and_the_first_call_is_not_counted() -> None:
    calls: list[str] = []

    def called(name: str, *figures: float) -> Any:
        left = list(figures)
        return lambda: (calls.append(name), Value(left.pop(0)))[1]

    case = Case("x", called("a", 9, 1, 5, 3), {"b": called("b", 9, 2, 2, 8), "c": Missing("why")})
    found = compare.measure(case, 3)
    assert calls == ["a", "b"] * 4
    assert found["median"] == {"ours": 3, "b": 2} and found["missing"] == {"c": "why"}


def test_forms_that_do_not_agree_are_not_timed() -> None:
    case = Case("x", lambda: torch.tensor(1.0), {"b": lambda: torch.tensor(1.1)}, same=("b",))
    with pytest.raises(compare.Disagreement, match="do not compute the same"):
        compare.measure(case, 1)


def test_the_share_is_that_of_the_limit_which_binds() -> None:
    limits = Limits(product=100.0, convolution=200.0, bandwidth=1000.0)

    def share(**work: Any) -> tuple[float | None, str]:
        return compare.share(Case("x", lambda: None, {}, **work), {"ours": 2.0, "bound": 0.5}, limits)

    assert share(flops=100.0) == (0.25, "arithmetic")
    assert share(bytes=100.0) == (0.05, "bandwidth")
    assert share(bound=("a copy", lambda: None), flops=100.0) == (0.25, "a copy")
    assert share() == (None, "")


def test_a_row_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = compare.cases
    monkeypatch.setattr(
        compare, "cases", lambda row, setting: 1 / 0 if row == "paint" else plain(row, setting)
    )
    with pytest.raises(SystemExit, match="failed: paint"):
        run(tmp_path, "--only", "paint,ntxent")
    found = json.loads((tmp_path / "speed.json").read_text())
    assert "ZeroDivisionError" in found["failed"]["paint"] and [c["row"] for c in found["cases"]] == [
        "ntxent"
    ]


def test_an_unknown_row_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--only", "nccc"])
    assert "--only nccc: no such row; choose from ncc" in capsys.readouterr().err


# --- On a GPU ---------------------------------------------------------------------------------------------


def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(["--cpu", "--small", "--steps", "2", "--only", "unet,gvsl,busy,released", "--out", str(out)])
    found = json.loads(out.read_text())
    parts = found["parts"]
    assert list(parts) == ["limits", "unet", "gvsl", "busy", "released"]
    assert not any({"error", "left out"} & part.keys() for part in parts.values())
    assert 0 < parts["unet"]["free"]["share of the rate"] < 1
    assert parts["busy"]["share of the time"] is None, "no device, no kernels"
    assert any("conv" in entry["name"] for entry in parts["busy"]["top"])
    assert found["targets"]["released: ratio"]["reached"] == parts["released"]["ratio"] > 0


def test_parts_without_time_are_named(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(["--cpu", "--small", "--minutes", "0.01", "--only", "compile", "--out", str(out)])
    assert "s left" in json.loads(out.read_text())["parts"]["compile"]["left out"]


def test_a_part_that_fails_is_named_and_ends_in_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(gpu.PARTS, "unet", (lambda run: {}["no such kernel"], 0))
    with pytest.raises(SystemExit):
        gpu.main(["--cpu", "--small", "--only", "unet", "--out", str(tmp_path / "gpu.json")])
    assert "no such kernel" in json.loads((tmp_path / "gpu.json").read_text())["parts"]["unet"]["error"]


def test_without_a_gpu_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--cpu --small" in capsys.readouterr().err


def test_the_busy_share_counts_time_once_and_inside_the_steps_alone() -> None:
    steps = [
        {"name": f"ProfilerStep#{i}", "cat": "user_annotation", "ts": 10 * i, "dur": 10} for i in (1, 2)
    ]  # 10 to 30
    kernels = [(5, 10), (12, 6), (14, 2), (25, 100)]  # 10-15, 12-18, 14-16 within, 25-30
    events = [{"cat": "kernel", "ts": ts, "dur": dur} for ts, dur in kernels]
    events.append({"cat": "cpu_op", "ts": 0, "dur": 100})
    assert gpu.busy_share([*steps, *events]) == pytest.approx((8 + 5) / 20)
    assert gpu.busy_share(steps) is None


def test_the_convolutions_are_those_of_the_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, seen = build_backbone(BackboneConfig(channels=[4, 8, 16]), 0), []  # type: ignore[call-arg]
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(
                lambda m, x, y: seen.append((m.in_channels, m.out_channels, y.shape[-1]))
            )
    backbone(torch.zeros(1, 1, 16, 16, 16))
    assert seen[1:] == list(convolutions([4, 8, 16], 16))
    monkeypatch.setattr(
        "sys.argv", ["convolutions.py", "--edge", "8", "--batch", "1", "--channels", "4", "8"]
    )
    print_convolutions()
    assert "| 12 -> 4 | 8 |" in capsys.readouterr().out
