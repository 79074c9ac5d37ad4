"""Where a U-Net's time goes: each of its convolutions, forward and both gradients, against a matrix product of this run.

Usage: ``OMP_NUM_THREADS=1 python benchmarks/speed/convolutions.py [--edge 32] [--batch 2] [--channels 16 32 64 128]``

1.00 is the rate of a float32 matrix product of 1024^3. ``ONEDNN_VERBOSE=1`` says which kernels were taken.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import conv3d

ROUNDS = 7


def seconds(run: Callable[[], Any]) -> float:
    """Return the median processor time of ``run``."""
    run()
    took = []
    for _ in range(ROUNDS):
        began = time.process_time()
        run()
        took.append(time.process_time() - began)
    return statistics.median(took)


def convolutions(channels: Sequence[int], edge: int) -> Iterator[tuple[int, int, int]]:
    """Yield (channels in, channels out, edge) of each 3x3x3 convolution of a U-Net but the first, encoder first."""
    edges = [edge // 2**stage for stage in range(len(channels))]
    for c, coarser, size in zip(channels, (0, *channels), edges, strict=False):
        if coarser:
            yield coarser, c, size
        yield c, c, size
    for c, coarser, size in zip(channels[-2::-1], channels[:0:-1], edges[-2::-1], strict=True):
        yield c + coarser, c, size
        yield c, c, size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edge", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    given = parser.parse_args()
    matrix = torch.rand(1024, 1024)
    rate = 2 * 1024**3 / seconds(lambda: matrix @ matrix)
    print(f"matrix product: {rate / 1e9:.1f} GFLOP/s, {torch.get_num_threads()} thread(s)\n")
    print("| channels | edge | forward | gradient of the input | of the weights |\n|---|--:|--:|--:|--:|")
    least = took = 0.0
    for c_in, c_out, edge in convolutions(given.channels, given.edge):
        last = {"memory_format": torch.channels_last_3d}
        x, g = (torch.rand(given.batch, c, edge, edge, edge).to(**last) for c in (c_in, c_out))  # type: ignore[call-overload]
        w = torch.rand(c_out, c_in, 3, 3, 3).to(**last)  # type: ignore[call-overload]

        def gradient(*wanted: bool, x=x, g=g, w=w) -> Any:  # type: ignore[no-untyped-def]
            return torch.ops.aten.convolution_backward(
                g, x, w, [len(w)], [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1, list(wanted)
            )

        times = [
            seconds(lambda x=x, w=w: conv3d(x, w, padding=1)),
            seconds(lambda run=gradient: run(True, False, False)),
            seconds(lambda run=gradient: run(False, True, False)),
        ]
        flops = 2 * 27 * c_in * c_out * edge**3 * given.batch
        least, took = least + 3 * flops / rate, took + sum(times)
        shares = " | ".join(f"{flops / t / rate:.2f}" for t in times)
        print(f"| {c_in} -> {c_out} | {edge} | {shares} |", flush=True)
    print(f"\nAll together: {least / took:.2f} of the matrix product's rate.")


if __name__ == "__main__":
    main()
