"""Devices: which one to compute on, in what precision, with how much memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl3d.errors import ConfigError
from ssl3d.marks import without_effect


def select_device(name: Literal["auto", "cpu", "cuda"] | str) -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA where there is one, ``cuda:1`` the second GPU.

    On CUDA, convolutions are set to repeatable algorithms, and float32 to be float32: torch would compute them
    in TensorFloat-32, of 10 bits, without saying so.

    Raises:
        ConfigError: CUDA, or the GPU of that number, was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch sees no CUDA device; use --device auto or cpu.")
    number = name.partition(":")[2]
    if number and int(number) >= visible_gpus():
        raise ConfigError(
            f"--device {name}: torch sees {visible_gpus()} GPUs, cuda:0 to cuda:{visible_gpus() - 1}."
        )
    if name.startswith("cuda"):
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        if number:
            torch.cuda.set_device(int(number))  # for what asks for the current one
    return torch.device(name)


def visible_gpus() -> int:
    """Return how many GPUs torch sees; ``CUDA_VISIBLE_DEVICES`` limits them."""
    return torch.cuda.device_count()


def spread(device: torch.device, processes: int) -> list[torch.device]:
    """Return a device for each of so many processes: the visible GPUs in turn, or the one that was asked for.

    >>> spread(torch.device("cpu"), 2), spread(torch.device("cuda:1"), 2)
    ([device(type='cpu'), device(type='cpu')], [device(type='cuda', index=1), device(type='cuda', index=1)])
    """
    if device.type != "cuda" or device.index is not None or visible_gpus() < 2:
        return [device] * processes
    return [torch.device("cuda", number % visible_gpus()) for number in range(processes)]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, or None for float32 throughout.

    ``auto`` takes bfloat16 only where the hardware computes it: on a CPU without AVX512-BF16 or
    AMX, a bfloat16 3D convolution measured 100 times slower than float32.
    """
    if precision == "bfloat16":
        return torch.bfloat16
    if precision == "float32":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else None


def check_precision(option: str, precision: str, device: torch.device) -> None:
    """Refuse to train in bfloat16 on a CPU.

    In oneDNN 3.12 (torch 2.14) the gradient of a 3D convolution in bfloat16 reads and writes beyond its memory where an
    edge of the features is smaller than the kernel, as at the bottom of a U-Net: infinite or wrong at random, or the
    end of the process.

    Args:
        option: to name, ``pretrain.precision``.
        precision: its value.
        device: where to train.

    Raises:
        ConfigError: it would be bfloat16 on a CPU.
    """
    if device.type == "cpu" and autocast_dtype(precision, device) is torch.bfloat16:
        raise ConfigError(
            f"{option}={precision}: this CPU would train in bfloat16, in which the gradients of 3D convolutions are wrong "
            f"(oneDNN reads beyond its memory). Use --set {option}=float32."
        )


@contextmanager
def convolutions(deterministic: bool) -> Iterator[None]:
    """Let convolutions on CUDA take repeatable algorithms only, or the fastest of all by trial; as before afterwards."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = deterministic, not deterministic
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


class Copies:
    """Brings tensors of the host to a device, on a stream of their own while it computes.

    Through page-locked memory, without which a copy waits for the device. On the host's own memory nothing is copied.

    Example::

        copies = Copies(device)
        sent = copies.send(x)  # in any thread, ahead of time
        x = copies.receive(sent)  # where it is used
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to copy ``x``."""
        if self._stream is None:
            return x.to(self.device), None
        pinned = x.pin_memory()
        with torch.cuda.stream(self._stream):
            copied = pinned.to(self.device, non_blocking=True)
            return copied, self._stream.record_event()

    def receive(self, sent: tuple[Tensor, torch.cuda.Event | None]) -> Tensor:
        """Return the copy, for what the current stream computes from here on; the host does not wait for it."""
        copied, arrived = sent
        if arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            copied.record_stream(stream)  # its memory is not given away before that has used it
        return copied


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move ``module`` in place, convolutions in channels_last_3d (1.6 times faster on a CPU)."""
    module.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


@without_effect
class PeakMemory:
    """The peak memory of one job: of its tensors on CUDA, of the process while it runs on Linux.

    A process does many jobs, so its peak is set back when the job begins. What cannot be set back (another system, or
    a container that forbids it) is not measured: the peak of an earlier job says nothing of this one.

    Example::

        memory = PeakMemory(device)
        ...
        memory.mib()  # MiB, or None
    """

    _CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        _give_memory_back()  # what an earlier job has freed is not this one's
        try:
            self._CLEAR.write_text("5")  # proc(5): sets the peak back to what is in use now
            self._measured = True
        except OSError:
            self._measured = False

    def mib(self) -> float | None:
        """Return the peak since the object was made, in MiB; None where it cannot be measured."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        if not self._measured:
            return None
        lines = self._STATUS.read_text().splitlines()
        kib = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
        return None if kib is None else round(kib / 2**10, 1)


def _give_memory_back() -> None:
    """Return the memory that the C library holds for later to the system, where it can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc; musl has none
        trim(0)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x``, which is on the host, on ``device``, without waiting for what that does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def constant(values: Sequence[Any], device: torch.device) -> Tensor:
    """Return numbers that the host knows as a tensor on ``device``, without waiting for what the device does."""
    return sent(torch.tensor(values), device)
