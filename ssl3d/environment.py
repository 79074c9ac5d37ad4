"""Where a number came from: versions, machine, commit. And how the device computes."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ssl3d.device import autocast_dtype
from ssl3d.marks import without_effect

PACKAGES = ("ssl3d", "torch", "timm", "monai", "nibabel", "numpy", "scipy", "scikit-learn", "SimpleITK")
EXTENSIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
"""Of a processor's instructions, those for which the libraries have kernels of their own: of x86, and of ARM."""
LIMITS = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR",
)  # fmt: skip
"""Variables by which a user keeps the libraries from some of them."""


@without_effect
def environment() -> dict[str, Any]:
    """Return the versions, the machine, the threads and the git commit that a record carries."""
    return {**_machine(), "threads": torch.get_num_threads()}


@cache
def _machine() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "instruction_set": instruction_set(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    part = _cpu_info("CPU part")  # ARM's
    return (
        _cpu_info("model name")
        or (part and f"{platform.machine()} {part}")
        or platform.processor()
        or platform.machine()
    )


@without_effect
@cache
def instruction_set() -> str:
    """Return which extensions of :data:`EXTENSIONS` the processor has, narrowest first.

    They decide which kernels compute, and so the last digits; a virtual machine's processor often has a name that says
    neither its generation nor these. Where the system does not list them, it is what torch dispatches to.
    """
    flags = (_cpu_info("flags") or _cpu_info("Features")).split()  # of x86, of ARM
    found = [name for name in EXTENSIONS if name in flags] or [torch.backends.cpu.get_cpu_capability()]
    return " ".join(found + [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)])


@cache
def _cpu_info(field: str) -> str:
    """Return a field of the first processor that Linux lists, empty where there is none."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _git_commit() -> str | None:
    """The commit of the source tree this runs from, with ``-dirty``; None for an installed wheel."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=source, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


@without_effect
def device_name(device: torch.device, precision: str) -> str:
    """Return the processor behind ``device`` and what it computes in, as in ``"AMD EPYC (2 threads, float32)"``.

    The dtype belongs to it: with ``precision`` ``auto`` one configuration gives slightly other numbers elsewhere.
    """
    dtype = "float32" if autocast_dtype(precision, device) is None else "bfloat16"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({dtype})"
    threads = torch.get_num_threads()
    return f"{_cpu_name()} ({threads} thread{'s' if threads > 1 else ''}, {dtype})"
