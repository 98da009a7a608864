"""The steps of gpu_check.sh, and the JSON it writes. Run that."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 590  # seconds, for all steps' limits together
KERNEL_TESTS = ("tests/ops",)
CUDA_TESTS = ("tests/ops", "tests/cuda_graphs", "tests/engine")
# Every operator at odd strides and alignments, and norm_act_pool's vectors in one dtype: some tens of
# tests, under a tool that takes tens of times as long and looks at fastjac's kernels alone. Without
# PyTorch's own cache, which would hide an access between two tensors.
SANITIZED = "any_strides or (in_every_dtype and not residual and bfloat16)"
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# The dtype and the layout that a GPU trains in. In all of them the operators' benchmarks take minutes.
TIMED = "not contiguous and not torch.float"
STEPS = ("plain", "compiled", "naive", "fastjac")


@dataclass
class Step:
    """A command, and whether and why it counts as passed."""

    name: str
    command: list[str]
    limit: float  # seconds, beside what earlier steps have left of theirs
    env: dict[str, str] = field(default_factory=dict)
    results: Callable[[], Any] | None = None  # read what it has written; raises if that is wrong


def run(step: Step, logs: Path, limit: float) -> dict[str, Any]:
    """What goes into the JSON for one step, after at most ``limit`` s; its output goes to ``logs``."""
    log = logs / f"{step.name}.log"
    record: dict[str, Any] = {"command": step.command, "env": step.env, "log": log.name}
    start = time.monotonic()
    with log.open("w") as output:
        try:
            status: int | str = subprocess.run(
                step.command,
                cwd=ROOT,
                env={**os.environ, **step.env},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        except OSError as error:
            status = str(error)
    record |= {"status": status, "passed": status == 0}
    record["seconds"] = round(time.monotonic() - start, 1)
    if status == 0 and step.results is not None:
        try:
            record["results"] = step.results()
        except Exception as error:
            record |= {"status": f"{type(error).__name__}: {error}", "passed": False}
    if not record["passed"]:
        record["output"] = log.read_text(errors="replace").splitlines()[-60:]
    return record


def tests_of(report: Path) -> Callable[[], dict[str, int]]:
    """Reads pytest's JUnit report: how many ran. None is a failure."""

    def read() -> dict[str, int]:
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        counts = {"tests": 0, "skipped": 0, "failures": 0, "errors": 0}
        for suite in suites:
            for key in counts:
                counts[key] += int(suite.get(key, 0))
        if counts["tests"] == counts["skipped"]:
            raise RuntimeError(f"no test ran: {counts}")
        return counts

    return read


def json_of(path: Path) -> Callable[[], Any]:
    return lambda: json.loads(path.read_text())


def steps(out: Path, architecture: str) -> list[Step]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    build = {"TORCH_CUDA_ARCH_LIST": architecture, "FASTJAC_CUDA": "1", "FASTJAC_NATIVE": "1"}

    def sanitizer(tool: str) -> Step:
        report = out / f"{tool}.xml"
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=99"]
        command += ["--kernel-name", "kns=fastjac"]
        command += [*pytest, "-x", "-k", SANITIZED, f"--junitxml={report}", *KERNEL_TESTS]
        return Step(tool, command, 60, UNCACHED, tests_of(report))

    tests, ops, step = (out / name for name in ("tests.xml", "ops.json", "step.json"))
    timed = ["benchmarks", "--benchmark-enable", "--benchmark-only", "--benchmark-max-time=0.2"]
    whole = [python, "-m", "benchmarks.step", "vgg9-224", "--device", "cuda", "--amp"]
    whole += ["--layouts", "channels_last", "--contenders", *STEPS]
    return [
        Step("build", [python, "setup.py", "build"], 170, build),
        Step("info", [python, "-m", "fastjac.info"], 15),
        Step("tests", [*pytest, f"--junitxml={tests}", *CUDA_TESTS], 100, {}, tests_of(tests)),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Step(
            "benchmarks",
            [*pytest, *timed, "-k", TIMED, f"--benchmark-json={ops}"],
            65,
            {},
            json_of(ops),
        ),
        Step("step", [*whole, "--json", str(step)], 120, {}, json_of(step)),
    ]


def said(*command: str) -> str | None:
    """What a command prints, or None where it can't be run."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def machine() -> dict[str, Any]:
    """The GPU and every version, or exit with status 2."""
    try:
        import torch
    except ImportError:
        refuse(f"{sys.executable} has no PyTorch (PYTHON chooses another)")
    if torch.version.cuda is None:
        refuse(f"PyTorch {torch.__version__} has no CUDA")
    if not torch.cuda.is_available():
        refuse("there is no GPU: torch.cuda.is_available() is false")
    properties = torch.cuda.get_device_properties(0)
    dirty = "-dirty" if said("git", "status", "--porcelain", "--untracked-files=no") else ""
    commit = said("git", "rev-parse", "HEAD")
    nvcc = said("nvcc", "--version")
    return {
        "gpu": properties.name,
        "architecture": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": commit + dirty if commit else "no git repository here",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": ["scripts/gpu_check.sh"],
    }


def refuse(reason: str) -> None:
    print(f"gpu_check: {reason}", file=sys.stderr)
    sys.exit(2)


def check(listed: list[Step], record: dict[str, Any], out: Path) -> int:
    """Runs the steps and writes the JSON after each, so that what was found is never lost."""
    end = time.monotonic()
    record = {**record, "passed": False, "steps": {}}
    for step in listed:
        end += step.limit
        result = run(step, out, end - time.monotonic())
        record["steps"][step.name] = result
        verdict = "passed" if result["passed"] else f"FAILED ({result['status']})"
        print(f"{step.name:12}{verdict}, {result['seconds']} s", flush=True)
        record["passed"] = len(record["steps"]) == len(listed) and all(
            done["passed"] for done in record["steps"].values()
        )
        (out / "gpu_check.json").write_text(json.dumps(record, indent=2) + "\n")
        if step.name == "build" and not result["passed"]:
            print("\n".join(result["output"]))
            break
    print(f"everything is in {out / 'gpu_check.json'}")
    return 0 if record["passed"] else 1


def main() -> int:
    found = machine()
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        refuse("there is no CUDA toolkit: put nvcc on the PATH, or set CUDA_HOME")
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    return check(steps(out, found["architecture"]), found, out)


if __name__ == "__main__":
    sys.exit(main())
