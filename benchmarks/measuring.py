"""What the benchmarks of whole steps share: timing in turn, peak memory, processes of their own."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

PAGES_KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
ALLOCATORS = {"pages kept": PAGES_KEPT, "default": {}}
PAGES_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
LAYOUTS = ("contiguous", "channels_last")
WARM = 3  # steps until the allocator has its pages
MEMORY_PROCESSES = 5  # on a CPU; PyTorch's allocator on a GPU does not vary


class Contender(Protocol):
    """One way of taking a step."""

    def step(self) -> float:
        """Take the step and wait for it; the loss."""


def memory_format(layout: str) -> Any:
    """PyTorch's name for one of :data:`LAYOUTS`."""
    import torch

    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    return formats[layout]


def time_in_turn(
    contenders: Mapping[tuple[str, str], Contender], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each step of each (name, layout), round by round, after :data:`WARM` steps."""
    for _ in range(WARM):
        for contender in contenders.values():
            contender.step()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, contender in contenders.items():
            start = time.perf_counter()
            contender.step()
            seconds[key].append(time.perf_counter() - start)
    return seconds


def compare(seconds: Mapping[tuple[str, str], list[float]]) -> dict[str, dict[str, Any]]:
    """For each name, its better layout: median, 20 and 80 % quantiles, the ratio to the first name."""
    names = list(dict.fromkeys(name for name, _ in seconds))
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        own_seconds = {layout: times for (each, layout), times in seconds.items() if each == name}
        medians = {layout: statistics.median(times) for layout, times in own_seconds.items()}
        best = min(medians, key=medians.get)
        own = own_seconds[best]
        first = seconds[names[0], rows[names[0]]["layout"]] if rows else own
        low, _, _, high = statistics.quantiles(own, n=5) if len(own) > 1 else own * 4
        rows[name] = {
            "layout": best,
            "median_s": medians[best],
            "quantiles_s": [low, high],
            "ratio": statistics.median(a / b for a, b in zip(own, first, strict=True)),
            "seconds": own_seconds,
        }
    return rows


def sweep_seconds(contender: Contender, device: str) -> dict[str, float]:
    """Seconds of a step in the reverse and in the forward sweeps of all networks; median of five."""
    from unittest import mock

    import torch

    from fastjac.engine.sweeps import Linearization

    spent: dict[str, float] = {}

    def timed(sweep: Callable[..., Any]) -> Any:
        def run(*args: Any) -> Any:
            wait()
            start = time.perf_counter()
            result = sweep(*args)
            wait()
            spent[sweep.__name__] += time.perf_counter() - start
            return result

        return run

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    sweeps = (Linearization.reverse_sweep, Linearization.forward_sweep)
    steps = []
    with mock.patch.multiple(Linearization, **{sweep.__name__: timed(sweep) for sweep in sweeps}):
        for _ in range(5):
            spent.update({sweep.__name__: 0.0 for sweep in sweeps})
            contender.step()
            steps.append(dict(spent))
    return {name: statistics.median(step[name] for step in steps) for name in spent}


def flop(contender: Contender) -> int | None:
    """Of a step's convolutions and matrix products; None of a compiled one, whose calls nothing sees."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counting(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = op(*args, **(kwargs or {}))
            name = op.overloadpacket.__name__
            if op.namespace == "fastjac" and name.startswith("winograd"):
                # Four products for an output, of the map that is given (as wide, but for padding).
                *_, height, width = args[0].shape
                filters, channels, *_ = (args[1] if name == "winograd" else args[2]).shape
                self.total += 8 * len(args[0]) * height * width * filters * channels
            elif op.overloadpacket in flop_registry:
                counted = flop_registry[op.overloadpacket]
                self.total += counted(*args, **(kwargs or {}), out_val=out)
            return out

    if type(contender).layouts != LAYOUTS:
        return None
    with Counting() as counting:
        contender.step()
    return counting.total


def flop_per_second(device: str, amp: bool) -> float:
    """Of a large product of matrices, the best of five: as such, and as a convolution of 1 x 1.

    On a CPU these are two libraries', and MKL takes twice oneDNN's time on some processors.
    """
    import torch
    import torch.nn.functional as F

    size, dtype = (2048 if device == "cpu" else 4096), (torch.bfloat16 if amp else torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    last = {"memory_format": torch.channels_last}
    maps = torch.randn(size // 64, size // 2, 16, 16, device=device, dtype=dtype).to(**last)
    weight = torch.randn(size // 2, size // 2, 1, 1, device=device, dtype=dtype).to(**last)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for product in (lambda: a @ b, lambda: F.conv2d(maps, weight)):
        product()
        for _ in range(5):
            wait()
            start = time.perf_counter()
            product()
            wait()
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_memory(contender: Contender, device: str, warm: Callable[[], Any]) -> int:
    """Bytes that three steps need, over what is there before the first.

    ``warm`` takes a step that loads code and libraries: on a CPU of a small contender, since the
    allocator may keep what it has used.
    """
    import torch

    if device == "cuda":
        before = torch.cuda.memory_allocated()
        contender.step()  # what compiling takes is none of a step's
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            contender.step()
        return torch.cuda.max_memory_allocated() - before
    warm()
    gc.collect()  # a compiled network refers to itself
    ctypes.CDLL(None).malloc_trim(0)  # memory that the warm step has freed counts for the steps
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        contender.step()
    return resident("VmHWM") - before


def spawn(
    module: str,
    task: str,
    config: Any,
    args: argparse.Namespace,
    contenders: Sequence[str],
    layouts: Sequence[str],
    env: Mapping[str, str],
) -> dict[str, Any]:
    """Measure in a process of its own: ``task`` of the ``module``'s ``--worker``, which prints JSON."""
    command = [sys.executable, "-m", module]
    command += ["--worker", task, "--worker-config", json.dumps(asdict(config))]
    command += ["--device", args.device, "--rounds", str(args.rounds), *(["--amp"] * args.amp)]
    command += ["--contenders", *contenders, "--layouts", *layouts]
    done = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def measure_memory(
    device: str, run: Callable[[Mapping[str, str]], int], processes: int = MEMORY_PROCESSES
) -> tuple[list[int], int | None]:
    """Bytes of each process, and on a CPU what the steps need: ``run(env)`` measures in a process."""
    if device == "cuda":
        return [run({})], None
    return [run({}) for _ in range(processes)], run(PAGES_RETURNED)


def text_of_time(setting: str, row: Mapping[str, Any]) -> str:
    """One contender's time under one setting."""
    low, high = row["quantiles_s"]
    text = f"{setting}: {_ms(row['median_s'])} ms ({_ms(low)} to {_ms(high)}) {row['ratio']:.2f}x"
    for sweep, spent in row.get("sweeps_s", {}).items():
        text += f", {sweep.replace('_', ' ')}s {_ms(spent)} ms"
    return text


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def text_of_memory(result: Mapping[str, Any], name: str) -> str:
    """One contender's memory beside the first's; empty where it was not measured."""
    if not result["memory"]:
        return ""
    memory, first = result["memory"], next(iter(result["memory"]))
    text = f"memory: {memory[name] / 2**20:.0f} MiB {memory[name] / memory[first]:.2f}x"
    if needed := result.get("memory_needed"):
        text += f", needed {needed[name] / 2**20:.0f} MiB {needed[name] / needed[first]:.2f}x"
    return text


def relative_error(model: Any, reference: Any) -> float:
    """Of all parameters' gradients at once, ``model``'s against ``reference``'s."""
    import torch

    ours, theirs = (
        torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, reference)
    )
    return float((ours - theirs).norm() / theirs.norm())


def environment(module: str, device: str) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
        "commit": commit,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def add_options(parser: argparse.ArgumentParser, contenders: Sequence[str], rounds: int) -> None:
    """The options that the benchmarks share."""
    parser.add_argument("--rounds", type=int, default=rounds, help="timed steps of each contender")
    parser.add_argument("--contenders", nargs="+", default=list(contenders))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument(
        "--allocators",
        nargs="+",
        default=list(ALLOCATORS),
        choices=ALLOCATORS,
        help="of a CPU, that steps are timed under",
    )
    parser.add_argument(
        "--memory-processes", type=int, default=MEMORY_PROCESSES, help="whose median is the memory"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker-config", help=argparse.SUPPRESS)


def write_json(args: argparse.Namespace, module: str, results: list[dict[str, Any]]) -> None:
    """Write what has been measured so far to ``--json``: an interrupted run keeps it."""
    if args.json is None:
        return
    args.json.parent.mkdir(parents=True, exist_ok=True)
    found = {**environment(module, args.device), "results": results}
    args.json.write_text(json.dumps(found, indent=1) + "\n")
