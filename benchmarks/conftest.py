"""What the operators' benchmarks share: how they are timed, what they are held against, the report.

``make bench`` runs them twice, with the default allocator and with one that keeps its pages: on a
CPU the page faults of large tensors can cost more than the arithmetic. A machine's bandwidth may
change from minute to minute, so a large copy and what the operator replaces are timed beside it, in
turn, and the ratios are medians over those rounds. A share above 100 % of the copy's bandwidth means
that the tensors stayed in a cache.

On a GPU batches are larger, so that it is filled and its cache is not enough, and its own events take
the time, behind copies that keep it busy until the call is launched: pytest-benchmark's own figures
have those copies in them.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest
import torch

from fastjac.info import report

ROWS: list[tuple[str, ...]] = []
SHAPE = (8, 64, 224, 224)  # the first block of a VGG
LEAST = 2**26  # elements that a call moves on a GPU
AHEAD = (
    6  # large copies before a timed call on a GPU: about a millisecond, for the host to launch it
)
FEWEST, MOST = 9, 40  # rounds; between them, as many as --benchmark-max-time allows


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device: str, f: Callable[[], object], ahead: Callable[[], object]) -> float:
    """Of the device, for a call of f; on a GPU behind calls of ``ahead``."""
    synchronise(device)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(AHEAD):
            ahead()
        start.record()
        f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


def quantiles(times: list[float]) -> tuple[float, ...]:
    """Of 20, 50 and 80 %."""
    ordered = sorted(times)
    return tuple(ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))


@pytest.fixture(scope="session")
def large_copy() -> Callable[[str], tuple[int, Callable[[], object]]]:
    """The bytes that a large copy moves (256 MiB read, as many written), and the copy, by device."""

    @functools.cache
    def make(device: str) -> tuple[int, Callable[[], object]]:
        source = torch.ones(2**26, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes, lambda: target.copy_(source)

    return make


@pytest.fixture
def timed(request) -> bool:
    config = request.config
    return config.getoption("benchmark_enable") or config.getoption("benchmark_only")


@pytest.fixture
def filling(device, timed) -> Callable[[tuple[int, ...], int], tuple[int, ...]]:
    """``filling(shape, moved)``: with more of a batch, where a GPU is timed.

    ``moved``: the elements that the call moves for the shape as it is; then it moves :data:`LEAST`.
    """

    def fill(shape: tuple[int, ...], moved: int) -> tuple[int, ...]:
        factor = -(-LEAST // moved) if timed and device == "cuda" else 1
        return (factor * shape[0], *shape[1:])

    return fill


@pytest.fixture
def maps(device, timed, filling):
    """Makes maps of a VGG's first block; a small batch where nothing is timed."""
    generator = torch.Generator(device).manual_seed(0)
    shape = filling(SHAPE, math.prod(SHAPE)) if timed else (2, 24, 20, 20)

    def make(layout, dtype, size=None):
        size = shape if size is None else size
        x = torch.randn(size, generator=generator, device=device)
        return x.to(dtype).contiguous(memory_format=layout)

    return make


@pytest.fixture(scope="session")
def window_bytes() -> Callable[[torch.Tensor, torch.Tensor, tuple[int, int]], int]:
    """``window_bytes(x, start, size)``: what must be moved to read these windows of x.

    Memory comes in lines of 64 bytes, on a GPU in sectors of 32: all that the windows' rows touch.
    """

    def count(x: torch.Tensor, start: torch.Tensor, size: tuple[int, int]) -> int:
        piece = 32 if x.is_cuda else 64
        (first_row, first), (rows, columns) = start.cpu().unbind(1), size
        height, width = x.shape[2:]
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        planes, run = (1, x.shape[1]) if channels_last else (x.shape[1], 1)
        row = first_row[:, None] + torch.arange(rows)  # [B, rows]
        begin, end = first.clamp(0, width), (first + columns).clamp(0, width)  # [B]
        at = x.stride(0) * torch.arange(len(x))[:, None, None] + x.stride(2) * row[:, None]
        at = at + x.stride(1) * torch.arange(planes)[:, None] + x.stride(3) * begin[:, None, None]
        inside = ((row >= 0) & (row < height) & (begin < end)[:, None])[:, None].expand_as(at)
        size_of = (run * (end - begin))[:, None, None].expand_as(at)
        byte = x.data_ptr() + x.element_size() * at[inside]  # of the rows' first elements
        last = byte + x.element_size() * size_of[inside] - 1
        pieces = byte[:, None] // piece + torch.arange(int((last - byte).max()) // piece + 2)
        return piece * len(pieces[pieces <= last[:, None] // piece].unique())

    return count


@pytest.fixture
def measure(benchmark, large_copy, request):
    """``measure(device, bytes_moved, f, {name: g})``: times f, a copy and what f replaces, in turn.

    Each is called once before its timed call: what fits a cache may lie in it.
    """

    def run(
        device: str,
        bytes_moved: int,
        f: Callable[[], object],
        replaced: Mapping[str, Callable[[], object]] = MappingProxyType({}),
    ) -> None:
        if not benchmark.enabled:
            for g in replaced.values():
                g()
            benchmark(f)
            return
        copied, copy = large_copy(device)
        others = {"copy": copy, **replaced}
        times: dict[str, list[float]] = {name: [] for name in others}
        own: list[float] = []

        def beside() -> None:
            for name, g in others.items():
                g()
                times[name].append(seconds(device, g, copy))
            f()

        def call() -> None:
            own.append(seconds(device, f, copy))

        beside()
        longest = float(request.config.getoption("benchmark_max_time"))
        start = time.perf_counter()
        beside()
        call()
        rounds = longest / (time.perf_counter() - start)
        for taken in (own, *times.values()):
            taken.clear()
        benchmark.pedantic(call, setup=beside, rounds=min(max(round(rounds), FEWEST), MOST))

        low, median, high = quantiles(own)
        bandwidths = (copied / t for t in times["copy"])
        share = statistics.median(
            bytes_moved / t / bandwidth for t, bandwidth in zip(own, bandwidths, strict=True)
        )
        ratios = {
            name: statistics.median(t / g for t, g in zip(own, times[name], strict=True))
            for name in replaced
        }
        benchmark.extra_info.update(
            quantiles={"0.2": low, "0.5": median, "0.8": high},
            bytes_moved=bytes_moved,
            share_of_copy_bandwidth=share,
            replaced={name: statistics.median(times[name]) for name in replaced},
            time_over_replaced=ratios,
        )
        ROWS.append(
            (
                request.node.name,
                f"{1e3 * median:.3f} ms",
                f"{1e3 * low:.3f} to {1e3 * high:.3f}",
                f"{bytes_moved / median / 1e9:.1f} GB/s",
                f"{100 * share:.0f} %",
                ", ".join(f"{ratio:.2f} of {name}" for name, ratio in ratios.items()),
            )
        )

    return run


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.pop("node", None)
    machine_info["fastjac"] = report().splitlines()
    machine_info["malloc"] = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}


def pytest_terminal_summary(terminalreporter) -> None:
    if not ROWS:
        return
    kept = "pages kept" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default allocator"
    terminalreporter.section(f"operators, {kept}")
    header = ("benchmark", "median", "20 to 80 %", "moved", "of a copy", "time")
    widths = [max(map(len, column)) for column in zip(header, *ROWS, strict=True)]
    for row in (header, *ROWS):
        cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
