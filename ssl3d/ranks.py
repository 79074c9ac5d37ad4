"""Several processes that train one network, each on its own device and its own items of every batch.

On one process every function here returns what it is given, and so it is everywhere but in a training step
(:func:`together`): a score, a monitor or a clustering is that of the process that computes it.

A step's loss is the mean over the items of all processes. Each process weighs its own losses by its :func:`share` of the
items, and gradients are added up. So a loss that is a mean over items needs nothing; where items are compared, or
normalised together, :func:`gather` has those of all::

    first, second = gather(first), gather(second)  # (items of all processes, C) each, with gradient

Whatever is computed of gathered rows is then the same on every process, and weighs as much as on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl3d.errors import LostError, TrainingError
from ssl3d.marks import without_effect
from ssl3d.memory import is_out_of_memory

T = TypeVar("T")

_items: list[int] | None = None
"""Items of each process in the step at work; None: there is no step, or one process."""
_host: Any = None
"""Processes among which numbers of the host are exchanged, where the devices' own way is NCCL; None: all, as they are."""

SAME = 1e-3
"""Share by which a sum over a tensor may differ between processes: devices of two kinds round otherwise."""


def world() -> int:
    """Return how many processes train together; 1 where nothing was started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 for the one that writes and speaks."""
    return dist.get_rank() if world() > 1 else 0


def counts(items: int, processes: int | None = None) -> list[int]:
    """Return how many of a batch's items each process has; the first ones have one more where it does not divide evenly.

    >>> counts(7, 3)
    [3, 2, 2]
    """
    processes = processes or world()
    return [items // processes + (number < items % processes) for number in range(processes)]


def own(items: int) -> slice:
    """Return which of a batch's items are this process's."""
    sizes, mine = counts(items), rank()
    return slice(sum(sizes[:mine]), sum(sizes[: mine + 1]))


@contextmanager
def together(items: int) -> Iterator[None]:
    """Let the functions below work on a batch of so many items over all processes, each with its :func:`own`."""
    global _items
    before, _items = _items, counts(items) if world() > 1 else None
    try:
        yield
    finally:
        _items = before


def share() -> float:
    """Return this process's share of the step's items: the weight of a mean over its own."""
    return 1.0 if _items is None else _items[rank()] / sum(_items)


# --- What a step computes of all items -------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Concatenate the rows of all processes; the gradient goes back to where each came from.

    ``torch.distributed.all_gather`` alone would stop it. torch.distributed.nn's own version is
    deprecated, and asks for equal numbers of rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int]) -> Tensor:
        ctx.rows = rows
        padded = x.new_zeros(max(rows), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in rows]
        with _answered():
            dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])  # (sum of rows, ...)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # The losses of all processes depend on this process's rows.
        return _added(gradients[0]).split(ctx.rows)[rank()], None


class _Total(torch.autograd.Function):
    """Add up the tensors of all processes; each loss depends on all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _added(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _added(gradients[0])


def gather(x: Tensor) -> Tensor:
    """Return the rows of all processes, in order of the items: ``x`` (B, ...) -> (items of all, ...), with gradient.

    Of several rows an item (two views, one behind the other) those of each process stay together. On one process, and
    outside a training step, ``x`` itself.

    Args:
        x: as many rows as this process has items, or a multiple; the same on every process.

    Raises:
        ValueError: it has other rows than these.
    """
    if _items is None:
        return x
    here = _items[rank()]
    if len(x) % here:
        raise ValueError(f"gather: {len(x)} rows of {here} items; use a row, or some rows, an item")
    rows = [n * (len(x) // here) for n in _items]
    gathered: Tensor = _Gather.apply(x, rows)
    return gathered


def mine(x: Tensor) -> Tensor:
    """Return this process's rows of what :func:`gather` returned, or of what was computed of that row by row."""
    if _items is None:
        return x
    several = len(x) // sum(_items)
    return x.split([several * n for n in _items])[rank()]


def total(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over all processes, with gradient; ``x`` itself on one, and outside a training step."""
    if _items is None:
        return x
    summed: Tensor = _Total.apply(x)
    return summed


# --- What the loop does ----------------------------------------------------------------------------


def added_losses(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return losses that each process has weighed by its share, added up: what one process alone would have."""
    if world() == 1:
        return losses
    values = _added(torch.stack([*losses.values()]))
    return dict(zip(losses, values.unbind(), strict=True))


def add_gradients(module: nn.Module) -> None:
    """Add up the gradients of all processes, so that each has that of the whole batch.

    In one piece for each dtype, after the backward pass. A parameter that got none anywhere keeps none.
    """
    if world() == 1:
        return
    trained = [p for p in module.parameters() if p.requires_grad]
    wanted = exchanged([p.grad is not None for p in trained])
    pieces: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter, is_wanted in zip(trained, wanted, strict=True):
        if is_wanted:
            pieces.setdefault(parameter.dtype, []).append(parameter)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    for parameters in pieces.values():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = _added(torch.cat([g.reshape(-1) for g in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def share_state(start: int, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Give every process the tensors of the first one's module, its optimizer's, and the step to begin with.

    Args:
        start: the step, as the first process knows it.
        module: parameters and buffers are overwritten in place.
        optimizer: of the module.

    Returns:
        The first process's ``start``.
    """
    if world() == 1:
        return start
    with torch.no_grad(), _answered():
        for tensor in (*module.parameters(), *module.buffers()):
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)
    state: Any = first_ones((start, _on_host(optimizer.state_dict()) if optimizer else None))
    if optimizer is not None and rank():
        optimizer.load_state_dict(state[1])
    return int(state[0])


def _on_host(state: Any) -> Any:
    """Return a state dictionary with its tensors on the host."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: _on_host(value) for key, value in state.items()}
    return [_on_host(value) for value in state] if isinstance(state, list) else state


@without_effect
def check_same(module: nn.Module, name: str) -> None:
    """Refuse to go on where processes have come to other weights or buffers.

    Args:
        module: a method.
        name: of it, for the error.

    Raises:
        TrainingError: they have, and which; every process raises it.
    """
    if world() == 1:
        return
    named = [*module.named_parameters(), *module.named_buffers()]
    sums = torch.stack([value.detach().double().abs().sum().cpu() for _, value in named])
    parts = [torch.empty_like(sums) for _ in range(world())]
    with _answered():
        dist.all_gather(parts, sums, group=_host)
    apart = [~torch.isclose(part, parts[0], rtol=SAME, atol=1e-12, equal_nan=True) for part in parts]
    different = torch.stack(apart).any(0).tolist()
    bad = [key for (key, _), differs in zip(named, different, strict=True) if differs]
    if bad:
        raise TrainingError(
            f"{name}: {bad[0]} is not the same in all {world()} processes: it follows from the items of one alone. Fix: "
            "compute it from ssl3d.ranks.gather(x), which has the rows of all; or use one device."
        )


# --- Numbers of the host ---------------------------------------------------------------------------


def exchanged(values: Sequence[bool | int]) -> list[int]:
    """Return the largest of each value over the processes; no device is waited for."""
    if world() == 1:
        return [int(value) for value in values]
    numbers = torch.tensor([int(value) for value in values], dtype=torch.int32)
    with _answered():
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_host)
    return [int(number) for number in numbers.tolist()]


def wait() -> None:
    """Wait until all processes have come here."""
    exchanged([0])


def first_ones(value: T) -> T:
    """Return the first process's ``value`` on every process."""
    if world() == 1:
        return value
    held: list[Any] = [value]
    with _answered():
        dist.broadcast_object_list(held, 0, group=_host)
    found: T = held[0]
    return found


def begin() -> None:
    """Prepare to exchange numbers of the host; called once on every process, when they have met."""
    global _host
    _host = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None


def end() -> None:
    """Part from the others, who notice where they still wait for this process."""
    global _host
    _host = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _added(x: Tensor) -> Tensor:
    """Return the sum over all processes, without gradient."""
    summed = x.detach().clone(memory_format=torch.contiguous_format)
    with _answered():
        dist.all_reduce(summed)
    return summed


@contextmanager
def _answered() -> Iterator[None]:
    """Say what it means when the others do not answer."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's own, and torch.distributed's
        if is_out_of_memory(error):
            raise
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise LostError(
            f"Another of the {world()} processes of this run has ended, or cannot be reached ({line}). It says why, unless "
            "it was killed. The last checkpoint is whole: the same command with --resume goes on from it."
        ) from error
