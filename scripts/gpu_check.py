"""The steps of gpu_check.sh, and the JSON it writes. Run that."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 590  # seconds, for all stages' limits together
LOGS = "gpu_check"  # what the steps print and write themselves, beside the JSON
# By file: each runs in a process of its own, and shares the GPU with the others. A test of an operator
# takes the root conftest's `device`, and others are marked.
ON_A_GPU = re.compile(r"pytest\.mark\.cuda|^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
CUDA_TESTS = [
    str(path.relative_to(ROOT))
    for folder in (".", "cuda_graphs", "engine", "ops", "train")
    for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))
    if ON_A_GPU.search(path.read_text())
]
# Under a tool that takes tens of times as long: the smallest calls that launch every instantiation.
SANITIZED = ("tests/ops/test_every_instantiation.py", "-k", "matches_the_reference")
# Every tool looks at fastjac's kernels alone, but for initcheck, which must see who writes what they
# read. PyTorch's import makes calls of the driver that fail.
OURS = ("--kernel-name", "kns=fastjac")
SANITIZERS = {
    "memcheck": (*OURS, "--report-api-errors=no"),
    "racecheck": OURS,
    "initcheck": (),
    "synccheck": OURS,
}
# Without PyTorch's own cache, which would hide an access between two tensors.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# The dtype and the layout that a GPU trains in. In all of them the operators' benchmarks take minutes.
TIMED = "not contiguous and not torch.float and not block"
CONFIGURATIONS = ("vgg9-224", "resnet18-224")
CONTENDERS = ("plain", "plain-compiled", "naive", "fastjac")
GRAPHED = ("plain-graphed", "fastjac-graphed")
BATCHES = ("8", "64")  # what the host bounds, and what fills the GPU
# Shares of a copy's bandwidth, each in the same run. What is below the goal is listed; what is below
# its floor fails: by the benchmark's name, or for all others.
GOAL = 0.8
FLOOR = 0.5
FLOORS = {  # 0.85 of what an H200 gave: benchmarks/results/operators-h200.json
    "test_attention_window[cuda-8x128x56x56-torch.bfloat16-channels-last]": 0.31,
    "test_attention_window[cuda-32x128x56x56-torch.bfloat16-channels-last]": 0.32,
    "test_attention_window[cuda-8x64x56x56-torch.bfloat16-channels-last]": 0.25,
    "test_batch_norm_statistics[cuda-torch.bfloat16-channels-last]": 0.35,
    "test_channel_statistics[cuda-torch.bfloat16-channels-last]": 0.35,
    "test_jacobian_match[cuda-8x3x224x224-torch.bfloat16-normalised]": 0.22,
    "test_jacobian_match[cuda-32x3x224x224-torch.bfloat16-normalised]": 0.22,
    "test_jacobian_match[cuda-128x3x32x32-torch.bfloat16-normalised]": 0.19,
    "test_jacobian_match[cuda-128x3x32x32-torch.bfloat16-raw]": 0.48,
    "test_norm_act_pool[cuda-relu-3x3-torch.bfloat16-channels-last]": 0.32,
    "test_norm_act_pool_backward[cuda-relu-2x2-torch.bfloat16-channels-last]": 0.37,
    "test_norm_act_pool_backward[cuda-relu-torch.bfloat16-channels-last]": 0.39,
    "test_norm_act_pool_backward[cuda-relu-3x3-torch.bfloat16-channels-last]": 0.26,
    "test_norm_act_pool_pushforward[cuda-fixed-relu-2x2-torch.bfloat16-channels-last]": 0.29,
    "test_norm_act_pool_pushforward[cuda-fixed-relu-torch.bfloat16-channels-last]": 0.38,
    "test_norm_act_pool_pushforward[cuda-fixed-add-relu-torch.bfloat16-channels-last]": 0.44,
    "test_norm_act_pool_pushforward[cuda-fixed-relu-3x3-torch.bfloat16-channels-last]": 0.35,
    "test_norm_act_pool_pushforward[cuda-batch-relu-2x2-torch.bfloat16-channels-last]": 0.38,
    "test_norm_act_pool_pushforward[cuda-batch-relu-torch.bfloat16-channels-last]": 0.47,
    "test_norm_act_pool_pushforward[cuda-batch-relu-3x3-torch.bfloat16-channels-last]": 0.28,
    "test_window_crop[cuda-channels-last-torch.bfloat16-32x3x224x224]": 0.13,
    "test_window_crop_adjoint[cuda-channels-last-torch.bfloat16-32x3x224x224]": 0.24,
}


class Finding(Exception):
    """Results that are a failure; they are kept."""

    def __init__(self, problem: str, results: Any) -> None:
        super().__init__(problem)
        self.results = results


@dataclass
class Step:
    """A command, and whether and why it counts as passed."""

    name: str
    command: list[str]
    limit: float  # seconds, beside what earlier stages have left of theirs
    env: dict[str, str] = field(default_factory=dict)
    results: Callable[[str], Any] | None = None  # from the log and what was written; or a Finding
    required: bool = False  # nothing follows its failure


class Running:
    """A step's processes: it leads a session of its own, and all of it ends with the step."""

    def __init__(self, step: Step, logs: Path, limit: float) -> None:
        self.step, self.limit = step, max(limit, 0.0)
        self.log = logs / f"{step.name}.log"
        self.start = time.monotonic()
        self.status: int | str | None = None
        self.process: subprocess.Popen[bytes] | None = None
        try:
            with self.log.open("w") as output:
                self.process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env={**os.environ, **step.env},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self.status = str(error)

    def ended(self) -> bool:
        """Whether it has; one that has taken its time is stopped."""
        if self.status is None:
            self.status = self.process.poll()
            if self.status is None and time.monotonic() - self.start >= self.limit:
                self.status = f"stopped after {self.limit:.0f} s"
            if self.status is not None:
                self.stop()
        return self.status is not None

    def stop(self) -> None:
        """End what is left of the step's processes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # none is
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def record(self) -> dict[str, Any]:
        """What goes into the JSON; the step has ended."""
        step = self.step
        found: dict[str, Any] = {"command": step.command, "env": step.env, "log": self.log.name}
        found |= {"status": self.status, "passed": self.status == 0}
        found["seconds"] = round(time.monotonic() - self.start, 1)
        log = self.log.read_text(errors="replace")
        if step.results is not None:
            try:
                found["results"] = step.results(log)
            except Exception as error:  # also of a step that has failed, and may have written none
                problem = str(error) if isinstance(error, Finding) else f"{error!r}"
                found["results"] = getattr(error, "results", None)
                found |= {"problem": problem, "passed": False}
        if not found["passed"]:
            found["output"] = log.splitlines()[-60:]
        return found


def tests_of(report: Path) -> Callable[[str], dict[str, Any]]:
    """Reads pytest's JUnit report: how many ran, and what failed. None is a failure."""

    def read(log: str) -> dict[str, Any]:
        root = ElementTree.parse(report).getroot()
        counts: dict[str, Any] = {"tests": 0, "skipped": 0, "failures": 0, "errors": 0}
        for suite in root.iter("testsuite"):
            for key in counts:
                counts[key] += int(suite.get(key, 0))
        failed = {}
        for case in root.iter("testcase"):
            for outcome in (*case.iter("failure"), *case.iter("error")):
                name = f"{case.get('classname')}.{case.get('name')}"
                failed[name] = (outcome.get("message") or "")[:300]
        if counts["tests"] == counts["skipped"]:
            raise Finding("no test ran", counts)
        if failed:
            first = dict(list(failed.items())[:40])
            raise Finding(f"{len(failed)} tests failed", {**counts, "failed": first})
        return counts

    return read


def sanitized(report: Path) -> Callable[[str], dict[str, Any]]:
    """What the tests gave, and what a tool of compute-sanitizer has said of them."""

    def read(log: str) -> dict[str, Any]:
        said = [line for line in log.splitlines() if line.startswith("=========")]
        summary = next((line for line in reversed(said) if " SUMMARY: " in line), None)
        if summary is None:
            raise Finding("the tool gave no summary", {"said": said[:60]})
        if not re.search(r"SUMMARY: 0 (errors|hazards)", summary):
            raise Finding(summary.strip("= "), {"said": said[:60]})
        return {**tests_of(report)(log), "summary": summary.strip("= ")}

    return read


def json_of(path: Path) -> Callable[[str], Any]:
    return lambda log: json.loads(path.read_text())


def bandwidth_of(path: Path) -> Callable[[str], dict[str, Any]]:
    """Reads pytest-benchmark's JSON, without its data of every round: shares of a copy's bandwidth."""

    def read(log: str) -> dict[str, Any]:
        found = json.loads(path.read_text())
        timed = {row["name"]: row["extra_info"] for row in found["benchmarks"]}
        shares = {name: row["share_of_copy_bandwidth"] for name, row in timed.items()}
        floors = {name: FLOORS.get(name, FLOOR) for name in shares}
        results = {
            "goal": GOAL,
            "below_the_goal": {n: round(GOAL - s, 3) for n, s in shares.items() if s < GOAL},
            "below_their_floor": {n: floors[n] for n, s in shares.items() if s < floors[n]},
            "operators": timed,
        }
        if not timed:
            raise Finding("nothing was timed", results)
        if results["below_their_floor"]:
            count = len(results["below_their_floor"])
            raise Finding(f"{count} of {len(timed)} are below their floor", results)
        return results

    return read


def built(log: str) -> dict[str, Any]:
    """Which libraries the tests use."""
    paths = sorted((ROOT / "fastjac").glob("_*.so"))
    return {
        "carried": carried(),
        "log": log.splitlines(),
        "record": json.loads((ROOT / "fastjac" / "_build.json").read_text()),
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
    }


def carried() -> bool:
    """Whether the libraries that are there were built elsewhere, from these sources."""
    return os.environ.get("FASTJAC_PREBUILT") == "1"


def stages(logs: Path, architecture: str) -> list[list[Step]]:
    """The steps: those of one stage run at the same time. What they write goes to ``logs``."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    build = {"TORCH_CUDA_ARCH_LIST": architecture, "FASTJAC_CUDA": "1", "FASTJAC_NATIVE": "1"}
    loaded = "import sys, torch; from fastjac.info import report; from fastjac.ops import _library"
    loaded += "; print(report()); sys.exit(not _library.native(torch.device('cuda', 0)))"

    def tests(path: str) -> Step:
        name = path.removeprefix("tests/").removesuffix(".py").replace("/", "-")
        report = logs / f"{name}.xml"
        command = [*pytest, f"--junitxml={report}", path]
        return Step(name, command, 140, {"OMP_NUM_THREADS": "2"}, tests_of(report))

    def sanitizer(tool: str) -> Step:
        report = logs / f"{tool}.xml"
        port = 49152 + 64 * list(SANITIZERS).index(tool)  # their own: they run at the same time
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=99", f"--port={port}"]
        command += [*SANITIZERS[tool], *pytest, "-x", f"--junitxml={report}", *SANITIZED]
        return Step(tool, command, 140, {**UNCACHED, "OMP_NUM_THREADS": "2"}, sanitized(report))

    def whole_step(name: str, limit: float, configurations: Sequence[str], *options: str) -> Step:
        report = logs / f"{name}.json"
        command = [python, "-m", "benchmarks.step", *configurations, "--device", "cuda", "--amp"]
        command += ["--layouts", "channels_last", *options, "--json", str(report)]
        return Step(name, command, limit, {}, json_of(report))

    def memory(configuration: str, batch: str) -> Step:
        # It compiles, too, and what is compiled is kept for the stage that times the steps.
        options = ("--batch", batch, "--contenders", *CONTENDERS, "--measure", "memory")
        return whole_step(f"memory-{configuration}-{batch}", 140, [configuration], *options)

    ops = logs / "operators.json"
    timed = ["benchmarks", "--benchmark-enable", "--benchmark-only", "--benchmark-max-time=0.2"]
    operators = [*pytest, *timed, "-k", TIMED, f"--benchmark-json={ops}"]
    timing = ("--batch", *BATCHES, "--contenders", *CONTENDERS, *GRAPHED)
    timing += ("--measure", "time", "--rounds", "30")
    host = ("--contenders", *(c for c in CONTENDERS if c != "plain-compiled"), "--measure", "host")
    found = [
        [Step("build", [python, "setup.py", "build"], 170, build, required=True)],
        [Step("loaded", [python, "-c", loaded], 30, {}, built, required=True)],
        [
            *map(tests, CUDA_TESTS),
            *map(sanitizer, SANITIZERS),
            *(memory(name, batch) for name in CONFIGURATIONS for batch in BATCHES),
        ],
        [Step("operators", operators, 70, {}, bandwidth_of(ops))],
        [whole_step("step", 120, CONFIGURATIONS, *timing)],
        [whole_step("host", 60, CONFIGURATIONS, *host)],
    ]
    return found[1:] if carried() else found


def chosen(listed: list[list[Step]], names: Sequence[str]) -> list[list[Step]]:
    """The steps of these names; all, if there is none."""
    known = [step.name for stage in listed for step in stage]
    for name in names:
        if name not in known:
            refuse(f"there is no step {name!r}; expected of: {', '.join(known)}")
    found = [[step for step in stage if not names or step.name in names] for stage in listed]
    return [stage for stage in found if stage]


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
        "command": ["scripts/gpu_check.sh", *sys.argv[2:]],
    }


def refuse(reason: str) -> None:
    print(f"gpu_check: {reason}", file=sys.stderr)
    sys.exit(2)


def check(listed: list[list[Step]], record: dict[str, Any], out: Path) -> int:
    """Runs the stages and writes the JSON after each step, so that what was found is never lost."""
    logs = out / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    start = end = time.monotonic()
    record = {**record, "passed": False, "seconds": 0.0, "steps": {}}
    count = sum(map(len, listed))
    running: list[Running] = []

    def add(done: Running) -> bool:
        result = done.record()
        record["steps"][done.step.name] = result
        verdict = "passed" if result["passed"] else "FAILED"
        why = "" if result["passed"] else f" ({result.get('problem', result['status'])})"
        print(f"{done.step.name:32}{verdict}, {result['seconds']} s{why}", flush=True)
        record["seconds"] = round(time.monotonic() - start, 1)
        record["passed"] = len(record["steps"]) == count and all(
            step["passed"] for step in record["steps"].values()
        )
        (out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
        if done.step.required and not result["passed"]:
            print("\n".join(result["output"]))
            return False
        return True

    try:
        for stage in listed:
            left = end - time.monotonic()
            end += max(step.limit for step in stage)
            running += [Running(step, logs, left + step.limit) for step in stage]
            going = True
            while running:
                for done in [step for step in running if step.ended()]:
                    running.remove(done)
                    going = add(done) and going
                time.sleep(0.05)
            if not going:
                break
    finally:
        for step in running:
            step.stop()
    print(f"everything is in {out / 'gpu_check.json'}")
    return 0 if record["passed"] else 1


def main() -> int:
    # Whoever ends this process ends its steps, which are in sessions of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = machine()
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME") and not carried():
        refuse("there is no CUDA toolkit: put nvcc on the PATH, or set CUDA_HOME")
    out = Path(sys.argv[1]).resolve()
    listed = chosen(stages(out / LOGS, found["architecture"]), sys.argv[2:])
    return check(listed, found, out)


if __name__ == "__main__":
    sys.exit(main())
