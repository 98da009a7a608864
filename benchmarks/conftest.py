"""What the operators' benchmarks share: the bandwidth they are held against, and the report.

``make bench`` runs them twice, with the default allocator and with one that keeps its pages: on a
CPU the page faults of large tensors can cost more than the arithmetic. A share above 100 % of a
large copy's bandwidth means that the tensors stayed in a cache.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from fastjac.info import report

ROWS: list[tuple[str, ...]] = []


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(scope="session")
def copy_bandwidth() -> Callable[[str], float]:
    """Bytes per second of a large copy (256 MiB read, as many written), once per device."""
    measured: dict[str, float] = {}

    def measure(device: str) -> float:
        if device not in measured:
            source = torch.ones(2**26, device=device)
            target = torch.empty_like(source)
            times = []
            for _ in range(12):
                synchronise(device)
                start = time.perf_counter()
                target.copy_(source)
                synchronise(device)
                times.append(time.perf_counter() - start)
            measured[device] = 2 * source.nbytes / statistics.median(times[2:])
        return measured[device]

    return measure


@pytest.fixture
def measure(benchmark, copy_bandwidth, request):
    """``measure(device, bytes_moved, f)``: times f, and reports its share of a copy's bandwidth."""

    def run(device: str, bytes_moved: int, f: Callable[[], object]) -> None:
        def call() -> None:
            f()
            synchronise(device)

        benchmark(call)
        if not benchmark.enabled:
            return
        times = sorted(benchmark.stats.stats.data)
        low, median, high = (times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
        share = bytes_moved / median / copy_bandwidth(device)
        benchmark.extra_info.update(
            quantiles={"0.2": low, "0.5": median, "0.8": high},
            bytes_moved=bytes_moved,
            share_of_copy_bandwidth=share,
        )
        ROWS.append(
            (
                request.node.name,
                f"{1e3 * median:.3f} ms",
                f"{1e3 * low:.3f} to {1e3 * high:.3f}",
                f"{bytes_moved / median / 1e9:.1f} GB/s",
                f"{100 * share:.0f} %",
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
    header = ("benchmark", "median", "20 to 80 %", "moved", "of a copy")
    widths = [max(map(len, column)) for column in zip(header, *ROWS, strict=True)]
    for row in (header, *ROWS):
        cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
