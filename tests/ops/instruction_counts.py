"""Instructions that each CPU operator takes, counted by valgrind: exact, whatever else the machine does.

    python -m tests.ops.instruction_counts

accepts what this build takes, and writes ``instruction_counts.json``, with which the test compares.
They are those executed in the extension itself, by its AVX2 kernels in one thread, of one call on small
maps. Another compiler makes other code, so the file says which made it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
ACCEPTED = Path(__file__).with_suffix(".json")
ISA = "avx2"
REQUESTS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


class Unavailable(Exception):
    """Why nothing can be counted, or compared, here."""


def compiler(library: Path) -> str:
    """What compiled a shared object, as its .comment section says."""
    found = set(re.findall(rb"(?:GCC: \(|clang version )[^\0]*", library.read_bytes()))
    return "; ".join(sorted(text.decode() for text in found)) or "unknown"


def calls() -> dict[str, Callable[[], object]]:
    """A call of each operator, in both layouts where it has kernels for each."""
    import torch

    from fastjac import ops

    make = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=make, dtype=torch.float32)
    position, weight = torch.tensor([[3, 4], [20, 21]]), random(32, 32, 3, 3)
    vectors = [random(32).abs() + 0.5 for _ in range(4)]
    found: dict[str, Callable[[], object]] = {}

    def add(op: Callable[..., object], kind: str, *arguments: object) -> None:
        found[f"{op.__name__} {kind}".strip()] = partial(op, *arguments)

    for kind, form in (("", torch.contiguous_format), ("channels-last", torch.channels_last)):
        u, tangent = (random(2, 32, 28, 28).contiguous(memory_format=form) for _ in range(2))
        for pool in ("none", "2x2", "3x3"):
            rest = (u, None, *vectors, "relu", 0.0, pool)
            y, name = ops.norm_act_pool(*rest), f"{pool} {kind}"
            add(ops.norm_act_pool, name, *rest)
            mask = [True, False, True, True]
            add(ops.norm_act_pool_backward, name, y, *rest, True, None, None, mask)
            add(ops.norm_act_pool_pushforward, name, tangent, None, y, *rest, "batch", True)
        add(ops.attention_window, kind, u, 5)
        add(ops.attention_window_slope, kind, u, position, 5)
        add(ops.channel_statistics, kind, u)
        add(ops.window_crop, kind, u, position - 5, (16, 16))
        crop = ops.window_crop(u, position, (9, 9))
        add(ops.window_crop_adjoint, kind, crop, position, (28, 28))
    add(ops.winograd, "", u, weight)
    add(ops.winograd_weight, "", tangent, u, weight)
    add(ops.jacobian_match, "", random(4, 3, 32, 32), random(4, 3, 32, 32))
    return found


def _run(requests: Path) -> None:
    """Under valgrind: each call once for what is done once, and once counted."""
    import torch

    from fastjac.ops import _library

    torch.set_num_threads(1)
    assert _library.cpu_isa() == ISA
    valgrind = ctypes.CDLL(str(requests))
    for name, call in calls().items():
        call()
        valgrind.begin()
        call()
        valgrind.end(name.encode())


def counts() -> dict[str, int]:
    """How many instructions of the extension each call takes."""
    from fastjac.ops import _library

    compilers = [c for c in ("cc", "gcc", "clang") if shutil.which(c)]
    if shutil.which("valgrind") is None or not compilers:
        raise Unavailable("valgrind and a C compiler count them, and one of them is not installed")
    if not _library.CPU.loaded:
        raise Unavailable(f"the CPU operators are not loaded: {_library.CPU.problem}")
    record = _library.build_record()["libraries"]["cpu"]
    if record.get("instruction_set") not in (None, ISA):
        raise Unavailable("the library was built for another instruction set alone")
    if ISA not in _library._instruction_sets():
        raise Unavailable("the processor has no AVX2")
    with tempfile.TemporaryDirectory() as folder:
        source, requests = Path(folder, "requests.c"), Path(folder, "requests.so")
        source.write_text(REQUESTS)
        build = [compilers[0], "-shared", "-fPIC", "-o", requests, source]
        made = subprocess.run(build, capture_output=True, text=True, check=False)
        if made.returncode:
            raise Unavailable(f"valgrind/callgrind.h does not compile: {made.stderr}")
        out = Path(folder, "out")
        env = {"FASTJAC_CPU_ISA": ISA, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--compress-strings=no"]
        command += ["--compress-pos=no", f"--callgrind-out-file={out}"]
        command += [sys.executable, __file__, str(requests)]
        done = subprocess.run(
            command, env=os.environ | env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = dict(_parse(part) for part in sorted(Path(folder).glob("out.*")))
    found.pop("", None)
    return found


def _parse(file: Path) -> tuple[str, int]:
    """The call that a part is of, and the instructions of the extension's own functions in it."""
    name, total, ours, callee = "", 0, False, False
    for line in file.read_text().splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            name = line.removeprefix("desc: Trigger: Client Request: ")
        elif line.startswith("ob="):
            ours = line.endswith("_cpu.abi3.so")
        elif line.startswith("calls="):
            callee = True  # the next line is the cost of what is called
        elif line[:1].isdigit():
            if ours and not callee:
                total += int(line.split()[1])
            callee = False
    return name, total


def library() -> Path:
    """The extension for the CPU."""
    from fastjac.ops import _library

    return _library.CPU.path


def main() -> None:
    found = {"compiler": compiler(library()), "instructions": counts()}
    ACCEPTED.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found['instructions'])} counts in {ACCEPTED}, of {found['compiler']}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _run(Path(sys.argv[1]))
    else:
        main()
