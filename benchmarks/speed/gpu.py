"""Everything that is measured on a GPU, in one run of at most eight minutes, as one JSON.

The paper's preset (128^3, 32 to 512 channels, batches of two pairs) on one CUDA device:

    python benchmarks/speed/gpu.py                        # writes benchmarks/speed/results/gpu-<device>.json
    python benchmarks/speed/gpu.py --cpu --small          # the same road at tiny sizes, without a GPU: a check

    limits      rate of a bfloat16 matrix product and of a large convolution, bandwidth of the memory
    unet        forward and backward: time, share of the better rate, peak memory
    gvsl        the real pretraining loop: seconds a step, 200,000 steps from those measured, peak memory
    busy        share of the time in which the device computes, in that loop, and its most expensive kernels
    released    the released formulation of GVSL's step beside ours, turn by turn
    options     pretrain.deterministic off, checkpoint_activations on: what they cost and save
    methods     a step of each other method
    compile     pretrain.compile on; last, since compiling takes minutes

Parts for which no time is left are named in the JSON and on the screen, not left out in silence. Seconds are wall time
around work that the device has finished.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv3d

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare import RESULTS, machine
from rows.networks import gvsl_pair, operations, pass_of, released_step, step_of, unet_of

from ssl3d.config import Settings, load_settings
from ssl3d.data.prepared.volumes import ArrayVolumes
from ssl3d.device import autocast_dtype, convolutions, select_device, to_device
from ssl3d.environment import device_name
from ssl3d.models.regions import compile_blocks, recompute_blocks
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.method import Method
from ssl3d.pretrain.spec import resolve_method
from ssl3d.registry.registry import registry
from ssl3d.rng import torch_rng

PAPER_STEPS, VOLUMES = 200_000, 4
"""Steps of the paper's preset; made-up volumes to draw crops from."""
TARGETS = {
    "unet: share of the rate": 0.40, "busy: share of the time": 0.95, "released: ratio": 4.0, "gvsl: peak, GiB": 24.0,
}  # fmt: skip
GVSL_SHARE = 0.25
"""Of all the time, what the measured GVSL steps may take: on a slow device they are fewer than asked for."""


@dataclass
class Run:
    """One run of this script.

    Attributes:
        device, dtype: where, and in what the network computes.
        settings: the paper's preset, or small.
        steps: GVSL steps to measure.
        deadline: on the monotonic clock.
        minutes: that the run has.
        found: results by part.
    """

    device: torch.device
    dtype: torch.dtype | None
    settings: Settings
    steps: int
    minutes: float
    deadline: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + 60 * self.minutes

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def wait(self) -> None:
        """Until the device has done all it was told."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def peak_gib(self) -> float | None:
        return round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2) if self.cuda else None

    def begin(self) -> None:
        """Forget what earlier parts held."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, run: Callable[[], Any], least: float = 1.0, most: int = 50) -> float:
        """Return the seconds of a call, after two that warm up, over as many as fit into ``least`` seconds."""
        for _ in range(2):
            run()
        self.wait()
        began, calls = time.monotonic(), 0
        while calls < 1 or (time.monotonic() - began < least and calls < most):
            run()
            self.wait()
            calls += 1
        return (time.monotonic() - began) / calls


# --- Limits and the network ----------------------------------------------------------------------------


def limits(run: Run) -> dict[str, Any]:
    """Rates in TFLOP/s and GB/s, in bfloat16 where the network computes in it."""
    n, edge, mib = (8192, 64, 2048) if run.cuda else (256, 8, 16)
    options: dict[str, Any] = {"device": run.device, "dtype": run.dtype or torch.float32}
    a = torch.randn(n, n, **options)
    x, weight = torch.randn(2, 128, edge, edge, edge, **options), torch.randn(128, 128, 3, 3, 3, **options)
    x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
    source = torch.zeros(mib * 2**18, device=run.device)
    target = torch.empty_like(source)
    with torch.no_grad(), convolutions(deterministic=False):
        product = 2 * n**3 / run.seconds(lambda: a @ a)
        convolution = 2 * 27 * 128 * 128 * 2 * edge**3 / run.seconds(lambda: conv3d(x, weight, padding=1))
        bandwidth = 2 * 4 * source.numel() / run.seconds(lambda: target.copy_(source))
    return {
        "dtype": str(run.dtype or torch.float32).removeprefix("torch."),
        "matrix product, TFLOP/s": product / 1e12,
        "convolution, TFLOP/s": convolution / 1e12,
        "bandwidth, GB/s": bandwidth / 1e9,
    }


def unet(run: Run) -> dict[str, Any]:
    """Forward and backward of the batch of a step, repeatable convolutions and free ones."""
    channels, crop = tuple(run.settings.backbone.options["channels"]), run.settings.pretrain.crop
    net, x = unet_of(channels), torch.rand(run.settings.pretrain.batch_size, 1, *crop, device=run.device)
    to_device(net, run.device)
    step = autocast(run, pass_of(lambda x: net(x)[1].float(), x, net))
    work, rate = operations(step), max(v for k, v in run.found["limits"].items() if "TFLOP/s" in k) * 1e12
    result: dict[str, Any] = {"TFLOP": work / 1e12}
    for name, deterministic in (("free", False), ("deterministic", True)):
        run.begin()
        with convolutions(deterministic):
            seconds = run.seconds(step, 3)
        result[name] = {
            "seconds": seconds,
            "share of the rate": work / seconds / rate,
            "peak, GiB": run.peak_gib(),
        }
    return result


def autocast(run: Run, step: Callable[[], Any]) -> Callable[[], Any]:
    def within() -> Any:
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype is not None):
            return step()

    return within


# --- The real loop -------------------------------------------------------------------------------------


def volumes(settings: Settings) -> ArrayVolumes:
    """Return made-up volumes, a fifth larger than the crop."""
    edges = [math.ceil(1.2 * n) for n in settings.pretrain.crop]
    return ArrayVolumes([torch.rand(*edges, generator=torch_rng(i, "gpu")).numpy() for i in range(VOLUMES)])


def trained(run: Run, name: str, steps: int, **options: Any) -> tuple[float, dict[str, Any]]:
    """Pretrain for ``steps`` steps with other options of ``pretrain``; return (wall seconds, the run's facts)."""
    often = {"checkpoint_every": 10**6, "monitor_every": 10**6, "steps": steps, **options}
    settings = run.settings.model_copy(update={"pretrain": run.settings.pretrain.model_copy(update=often)})
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        facts = pretrain(
            resolve_method(name, settings.methods),
            volumes(settings),
            settings,
            0,
            Path(folder) / "run",
            run.device,
        )
        run.wait()
        return time.monotonic() - began, facts


def loop_seconds(run: Run, name: str, few: int, more: int, **options: Any) -> dict[str, Any]:
    """Return the seconds of a step: of ``few + more`` steps less those of ``few``, so without beginning and end."""
    run.begin()
    short, _ = trained(run, name, few, **options)
    long, facts = trained(run, name, few + more, **options)
    memory = facts["peak_memory_mib"]
    return {"seconds": (long - short) / more, "steps": more, "peak, GiB": memory and round(memory / 2**10, 2)}


def gvsl(run: Run) -> dict[str, Any]:
    """As many steps as asked for, or as fit into :data:`GVSL_SHARE` of the time."""
    guess = loop_seconds(run, "gvsl", 2, 4)["seconds"]
    steps = max(2, min(run.steps, int(GVSL_SHARE * 60 * run.minutes / max(guess, 1e-4))))
    result = loop_seconds(run, "gvsl", 5, steps)
    hours = result["seconds"] * PAPER_STEPS / 3600
    return result | {"asked for": run.steps, "hours of 200,000 steps": hours}


def busy(run: Run) -> dict[str, Any]:
    """Profile steps in the middle of a pretraining of GVSL."""
    wait, active = (10, 10) if run.cuda else (1, 2)
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * run.cuda
    schedule = torch.profiler.schedule(wait=wait, warmup=1, active=active, repeat=1)
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as profile,
        each_step(resolve_method("gvsl", {}).cls, profile.step),
    ):
        trained(run, "gvsl", wait + 1 + active + 2)
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return {"steps": active, "share of the time": busy_share(events), "top": top(profile, run.cuda)}


@contextmanager
def each_step(cls: type[Method], call: Callable[[], Any]) -> Iterator[None]:
    """Call ``call`` at the end of each step of ``cls``."""
    plain = cls.on_step_end

    def on_step_end(self: Method, progress: Any) -> None:
        plain(self, progress)
        call()

    cls.on_step_end = on_step_end  # type: ignore[method-assign]
    try:
        yield
    finally:
        cls.on_step_end = plain  # type: ignore[method-assign]


def busy_share(events: list[dict[str, Any]]) -> float | None:
    """Return the share of the profiled steps in which at least one kernel or copy ran; None without a device."""
    steps = [
        e
        for e in events
        if str(e.get("name", "")).startswith("ProfilerStep") and e.get("cat") == "user_annotation"
    ]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds)
    if not spans or not steps:
        return None
    begin, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    covered, reached = 0.0, begin
    for start, stop in spans:
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            covered, reached = covered + stop - start, stop
    return covered / (end - begin)


def top(profile: torch.profiler.profile, cuda: bool, most: int = 25) -> list[dict[str, Any]]:
    """Return the most expensive operations by their own time, on the device where there is one."""
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [e for e in profile.key_averages() if not e.key.startswith("ProfilerStep")]
    total = sum(getattr(e, key) for e in found) or 1.0
    found.sort(key=lambda e: -getattr(e, key))
    return [
        {"name": e.key, "calls": e.count, "ms": getattr(e, key) / 1e3, "share": getattr(e, key) / total}
        for e in found[:most]
    ]


def released(run: Run) -> dict[str, Any]:
    """One step of each in turn: ours as the loop runs it, the released form in float32, contiguous, volume by volume."""
    cfg = run.settings.pretrain
    channels = tuple(run.settings.backbone.options["channels"])
    ours, plain, views = gvsl_pair(channels, cfg.crop[0], cfg.batch_size // 2, run.device)
    steps = {
        "ours": step_of(ours, ours.training_step, views, run.dtype),
        "released": step_of(plain, lambda v: released_step(plain, v), views),
    }
    result: dict[str, Any] = {}
    for name, step in steps.items():
        run.begin()
        with convolutions(deterministic=False):
            result[name] = {"seconds": run.seconds(step, 3), "peak, GiB": run.peak_gib()}
    return result | {"ratio": result["released"]["seconds"] / result["ours"]["seconds"]}


def options(run: Run) -> dict[str, Any]:
    """What the loop's options cost and save, beside its default in the part gvsl."""
    few, more = (5, 20) if run.cuda else (1, 2)
    return {
        "deterministic=false": loop_seconds(run, "gvsl", few, more, deterministic=False),
        "checkpoint_activations=true": loop_seconds(run, "gvsl", few, more, checkpoint_activations=True),
        "accumulate=2": loop_seconds(run, "gvsl", few, more, accumulate=2),
    }


def methods(run: Run) -> dict[str, Any]:
    """A step of each other method in the loop; of one that fails, why."""
    few, more = (3, 8) if run.cuda else (1, 2)
    found: dict[str, Any] = {}
    for entry in registry().methods:
        if entry.base or entry.name == "gvsl" or entry.load().trains == "none":
            continue
        if run.left < 60:
            found[entry.name] = "no time left"
            continue
        try:
            found[entry.name] = loop_seconds(run, entry.name, few, more)
        except Exception as error:
            found[entry.name] = f"{type(error).__name__}: {error}"
    return found


def compiled(run: Run) -> dict[str, Any]:
    """The U-Net's step with its blocks compiled, and with their activations computed twice."""
    cfg = run.settings.pretrain
    x = torch.rand(cfg.batch_size, 1, *cfg.crop, device=run.device)
    result: dict[str, Any] = {}
    for name in ("recomputed", "compiled"):
        net: Any = unet_of(tuple(run.settings.backbone.options["channels"]))
        to_device(net, run.device)
        began = time.monotonic()
        why = None
        if name == "compiled":
            why = compile_blocks(net, x, run.dtype, True)
        else:
            recompute_blocks(net)
        run.begin()
        with convolutions(deterministic=False):
            seconds = run.seconds(autocast(run, pass_of(lambda x, net=net: net(x)[1].float(), x, net)), 3)
        result[name] = {
            "seconds": seconds, "peak, GiB": run.peak_gib(), "to compile": time.monotonic() - began, "failed": why,
        }  # fmt: skip
    return result


PARTS: dict[str, tuple[Callable[[Run], dict[str, Any]], float]] = {
    "limits": (limits, 0), "unet": (unet, 15), "gvsl": (gvsl, 30), "busy": (busy, 30), "released": (released, 20),
    "options": (options, 60), "methods": (methods, 60), "compile": (compiled, 120),
}  # fmt: skip
"""Part -> its function, and the seconds without which it is not begun."""


# --- All of it -----------------------------------------------------------------------------------------


def against_targets(found: dict[str, Any]) -> dict[str, Any]:
    """Return each target with what was reached; None where it was not measured."""

    def of(*path: str) -> Any:
        value: Any = found
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    reached = {
        "unet: share of the rate": of("unet", "free", "share of the rate"),
        "busy: share of the time": of("busy", "share of the time"),
        "released: ratio": of("released", "ratio"),
        "gvsl: peak, GiB": of("gvsl", "peak, GiB"),
    }
    return {name: {"target": target, "reached": reached[name]} for name, target in TARGETS.items()}


def small(settings: Settings) -> Settings:
    """Return the preset at sizes that a CPU does in a second."""
    return load_settings(
        "paper",
        ["pretrain.crop=16", "pretrain.batch_size=2", "backbone.channels=[4,8]", "deepcluster.clusters=2",
         "pretrain.workers=0"],
        registry().methods.names(),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="for all (default: 8)")
    parser.add_argument("--steps", type=int, default=200, help="of GVSL that are measured (default: 200)")
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)}; limits always run")
    parser.add_argument("--cpu", action="store_true", help="without a GPU")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a check that every part runs")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    chosen = given.only.split(",") if given.only else list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"--only {unknown[0]}: no such part; choose from {', '.join(PARTS)}")
    if not given.cpu and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --cpu --small checks that every part runs.")
    device = select_device("cpu" if given.cpu else "cuda")
    settings = load_settings("paper")
    settings = small(settings) if given.small else settings
    run = Run(
        device, autocast_dtype(settings.pretrain.precision, device), settings, given.steps, given.minutes
    )
    warnings.simplefilter("ignore")
    result = {
        "machine": machine(),
        "device": device_name(device, settings.pretrain.precision),
        "small": given.small,
    }
    out = (
        given.out
        or RESULTS
        / f"gpu-{'-'.join(result['device'].lower().replace('(', '').replace(')', '').split())}.json"
    )
    for name, (part, needed) in PARTS.items():
        if name != "limits" and name not in chosen:
            continue
        run.found[name] = part_of(run, name, part, needed)
        result |= {"parts": run.found, "targets": against_targets(run.found)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")  # after each part: what is there stays
    print(json.dumps(result["targets"], indent=1))
    print(f"{60 * run.minutes - run.left:.0f} s; written to {out}")
    if any("error" in part for part in run.found.values()):
        sys.exit(1)


def part_of(run: Run, name: str, part: Callable[[Run], dict[str, Any]], needed: float) -> dict[str, Any]:
    """Return what a part found; one that fails or has no time left says so, and the others go on."""
    if run.left < needed:
        print(f"{name}: left out, {run.left:.0f} s are left and it takes {needed:.0f}", flush=True)
        return {"left out": f"{run.left:.0f} s left"}
    began = time.monotonic()
    run.begin()
    try:
        with warnings.catch_warnings(action="ignore"):
            found = part(run)
    except (
        Exception
    ) as error:  # out of memory, or a kernel that this device does not have: the others still count
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    found["took"] = round(time.monotonic() - began, 1)
    shown = {k: v for k, v in found.items() if k != "top"}
    print(f"{name}: {json.dumps(shown, default=str)}", flush=True)
    return found


if __name__ == "__main__":
    main()
