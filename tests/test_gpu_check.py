"""scripts/gpu_check.sh, as far as it can be tested without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


@pytest.fixture
def gpu_check(monkeypatch):
    path = SCRIPT.with_suffix(".py")
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    run = subprocess.run([SCRIPT], env=env, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("gpu_check: ")
    assert "no GPU" in line or "has no CUDA" in line
    assert not (tmp_path / "out").exists()


def python(gpu_check, name: str, code: str, limit: float = 60, results=None, **options):
    command = [sys.executable, "-c", code]
    return gpu_check.Step(name, command, limit, {"SAID": "hello"}, results, **options)


def check(gpu_check, folder: Path, *stages) -> tuple[int, dict]:
    """The exit status, and the JSON."""
    status = gpu_check.check([list(stage) for stage in stages], {"gpu": "none"}, folder)
    return status, json.loads((folder / "gpu_check.json").read_text())


def test_every_step_is_in_the_json(gpu_check, tmp_path, capsys):
    written = tmp_path / "written.json"
    build = python(gpu_check, "build", "import os; print(os.environ['SAID'])")
    write = f"open({str(written)!r}, 'w').write('[1, 2]')"
    benchmarks = python(gpu_check, "benchmarks", write, results=gpu_check.json_of(written))
    status, record = check(gpu_check, tmp_path, [build], [benchmarks])
    assert status == 0
    assert (record["gpu"], record["passed"]) == ("none", True)
    assert record["steps"]["benchmarks"]["results"] == [1, 2]
    assert (tmp_path / "gpu_check" / "build.log").read_text() == "hello\n"
    assert "build                           passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "limit", "key", "expected"),
    [
        ("print('why'); raise SystemExit(3)", 60, "status", 3),
        ("import time; print('why', flush=True); time.sleep(60)", 2, "status", "stopped after 2 s"),
        ("print('why')", 60, "problem", "FileNotFoundError"),
    ],
    ids=["status", "time", "no results"],
)
def test_a_failed_step_fails_the_check_and_keeps_its_output(
    gpu_check, tmp_path, code, limit, key, expected
):
    absent = gpu_check.json_of(tmp_path / "absent.json")
    tests = python(gpu_check, "tests", code, limit, absent)
    after = python(gpu_check, "after", "print('still runs')")
    status, record = check(gpu_check, tmp_path, [tests], [after])
    failed, after = record["steps"]["tests"], record["steps"]["after"]
    assert status == 1
    assert record["passed"] is failed["passed"] is False
    assert str(expected) in str(failed[key])
    assert failed["output"] == ["why"]
    assert after["passed"]


def test_nothing_follows_a_failed_step_that_is_required(gpu_check, tmp_path, capsys):
    build = python(gpu_check, "build", "print('why'); raise SystemExit(1)", required=True)
    status, record = check(gpu_check, tmp_path, [build], [python(gpu_check, "tests", "")])
    assert status == 1
    assert list(record["steps"]) == ["build"]
    assert not record["passed"]
    assert "why" in capsys.readouterr().out


CHILD = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(99)"
PARENT = """
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {code!r}])
while not pathlib.Path({path!r}).exists() or not pathlib.Path({path!r}).read_text():
    time.sleep(0.01)
{then}
"""


def gone(process: int) -> bool:
    """Whether it has ended, or soon does; a zombie has."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def with_a_child(path: Path, then: str) -> str:
    """Code that starts a process, which writes its number to path and sleeps; then does ``then``."""
    return PARENT.format(code=CHILD.format(str(path)), path=str(path), then=then)


@pytest.mark.parametrize("then", ["time.sleep(99)", "", "raise SystemExit(1)"])
def test_all_of_a_steps_processes_end_with_it(gpu_check, tmp_path, then):
    child = tmp_path / "child"
    step = python(gpu_check, "tests", with_a_child(child, then), 5 if "sleep" in then else 60)
    check(gpu_check, tmp_path, [step])
    assert gone(int(child.read_text()))


def test_all_processes_end_with_the_check(tmp_path):
    child = tmp_path / "child"
    code = f"""
import importlib.util, signal, sys, pathlib
spec = importlib.util.spec_from_file_location("gpu_check", {str(SCRIPT.with_suffix(".py"))!r})
gpu_check = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)
gpu_check.machine = lambda: {{"architecture": "9.0"}}
step = gpu_check.Step("tests", [sys.executable, "-c", {with_a_child(child, "time.sleep(99)")!r}], 60)
gpu_check.stages = lambda *_: [[step]]
sys.argv = ["gpu_check", {str(tmp_path)!r}]
sys.exit(gpu_check.main())
"""
    env = {**os.environ, "FASTJAC_PREBUILT": "1"}
    running = subprocess.Popen([sys.executable, "-c", code], env=env)
    while not child.exists() or not child.read_text():
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait(30) == 1
    assert gone(int(child.read_text()))


def test_the_steps_of_a_stage_run_at_the_same_time(gpu_check, tmp_path):
    """Each waits for a file of the other's."""
    names = [str(tmp_path / name) for name in "ab"]
    code = "import pathlib, time; pathlib.Path({!r}).touch()"
    code += "\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    pair = [code.format(*order) for order in (names, names[::-1])]
    steps = [python(gpu_check, name, c, 30) for name, c in zip("ab", pair, strict=True)]
    assert check(gpu_check, tmp_path, steps)[0] == 0


REPORT = """<testsuites><testsuite tests="{tests}" skipped="{skipped}" failures="{failures}">{cases}
</testsuite></testsuites>"""
FAILED = (
    '<testcase classname="tests.a" name="test_b[1]"><failure message="so">text</failure></testcase>'
)


def test_the_tests_that_failed_are_named(gpu_check, tmp_path):
    report = tmp_path / "tests.xml"
    read = gpu_check.tests_of(report)
    report.write_text(REPORT.format(tests=2, skipped=2, failures=0, cases=""))
    with pytest.raises(gpu_check.Finding, match="no test ran"):
        read("")
    report.write_text(REPORT.format(tests=2, skipped=1, failures=0, cases=""))
    assert read("")["tests"] == 2
    report.write_text(REPORT.format(tests=2, skipped=0, failures=1, cases=FAILED))
    with pytest.raises(gpu_check.Finding, match="1 tests failed") as caught:
        read("")
    assert caught.value.results["failed"] == {"tests.a.test_b[1]": "so"}


@pytest.mark.parametrize(
    ("summary", "passes"),
    [
        ("ERROR SUMMARY: 0 errors", True),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        ("ERROR SUMMARY: 10 errors", False),
        ("RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", False),
        ("Error: no attachable process found", False),
    ],
)
def test_what_a_sanitizer_says_decides(gpu_check, tmp_path, summary, passes):
    report = tmp_path / "memcheck.xml"
    report.write_text(REPORT.format(tests=1, skipped=0, failures=0, cases=""))
    log = f"========= COMPUTE-SANITIZER\n1 passed\n========= {summary}\n"
    read = gpu_check.sanitized(report)
    if passes:
        assert read(log)["summary"] == summary
    else:
        with pytest.raises(gpu_check.Finding) as caught:
            read(log)
        assert f"========= {summary}" in caught.value.results["said"]


def benchmarks(path: Path, **shares: float) -> None:
    """A file as pytest-benchmark writes it."""
    rows = [
        {"name": n, "stats": {"data": [1.0] * 99}, "extra_info": {"share_of_copy_bandwidth": s}}
        for n, s in shares.items()
    ]
    path.write_text(json.dumps({"benchmarks": rows}))


def test_bandwidth_is_held_against_a_goal_and_floors(gpu_check, tmp_path):
    path = tmp_path / "operators.json"
    read = gpu_check.bandwidth_of(path)
    benchmarks(path, fast=0.9, slower=0.7)
    results = read("")
    assert results["below_the_goal"] == {"slower": pytest.approx(gpu_check.GOAL - 0.7)}
    assert results["below_their_floor"] == {}
    assert "data" not in json.dumps(results)

    benchmarks(path, fast=0.9, slow=0.07)
    with pytest.raises(gpu_check.Finding, match="1 of 2 are below their floor") as caught:
        read("")
    assert list(caught.value.results["below_their_floor"]) == ["slow"]
    gpu_check.FLOORS["slow"] = 0.05
    assert list(read("")["below_the_goal"]) == ["slow"]

    benchmarks(path)
    with pytest.raises(gpu_check.Finding, match="nothing was timed"):
        read("")


def test_a_floor_is_of_a_benchmark_that_is_there(gpu_check, tmp_path):
    names = {line.partition("::")[2] for line in collected(steps(gpu_check, tmp_path)["operators"])}
    assert {*gpu_check.FLOORS} <= names
    assert all(0 < f <= gpu_check.GOAL for f in (gpu_check.FLOOR, *gpu_check.FLOORS.values()))


def steps(gpu_check, folder: Path) -> dict:
    return {step.name: step for stage in gpu_check.stages(folder, "9.0") for step in stage}


def collected(step) -> list[str]:
    """The names of the tests that a step runs."""
    words = step.command[step.command.index(sys.executable) :]
    words = [w for w in words if not w.startswith(("--junit", "--benchmark-j"))]
    words += ["--collect-only", "--disable-warnings"]  # a warning may name any test
    # Not as a worker of pytest-xdist, in which pytest-benchmark is off.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    run = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line for line in run.stdout.splitlines() if "::" in line]


def test_its_steps_exist(gpu_check, tmp_path):
    listed = steps(gpu_check, tmp_path)
    assert list(listed)[:2] == ["build", "loaded"]
    assert listed["build"].env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "--tool=racecheck" in listed["racecheck"].command
    assert gpu_check.SANITIZED[0] in listed["ops-test_every_instantiation"].command
    assert collected(listed["memcheck"])
    for name in ("step", "host", "memory-vgg9-224-8"):
        words = listed[name].command
        assert words[1:4] == ["-m", "benchmarks.step", "vgg9-224"]  # none named: all, for hours
        subprocess.run([*words, "--help"], cwd=ROOT, check=True, capture_output=True)
    assert {"plain", "plain-compiled", "fastjac"} <= {*listed["step"].command}


def test_some_steps_alone(gpu_check, tmp_path, capsys):
    listed = gpu_check.stages(tmp_path, "9.0")
    found = gpu_check.chosen(listed, ["step", "memcheck"])
    assert [[step.name for step in stage] for stage in found] == [["memcheck"], ["step"]]
    assert gpu_check.chosen(listed, []) == listed
    with pytest.raises(SystemExit) as ended:
        gpu_check.chosen(listed, ["steps"])
    assert ended.value.code == 2
    assert "there is no step 'steps'; expected of: build, loaded" in capsys.readouterr().err


def test_every_file_of_tests_that_need_a_gpu_is_run(gpu_check):
    everything = python(gpu_check, "all", "")
    everything.command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]
    assert {line.partition("::")[0] for line in collected(everything)} == {*gpu_check.CUDA_TESTS}


def test_a_carried_build_is_not_built_again(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTJAC_PREBUILT", "1")
    assert next(iter(steps(gpu_check, tmp_path))) == "loaded"


def test_every_stage_has_its_time(gpu_check, tmp_path):
    limits = [max(step.limit for step in stage) for stage in gpu_check.stages(tmp_path, "9.0")]
    assert sum(limits) <= gpu_check.LIMIT < 600


def test_a_stage_may_use_what_earlier_ones_left(gpu_check, tmp_path):
    listed = [
        python(gpu_check, "tests", "pass", 60),
        python(gpu_check, "after", "import time; time.sleep(2)", 1),
        python(gpu_check, "last", "import time; time.sleep(99)", -57),
    ]
    status, record = check(gpu_check, tmp_path, *([step] for step in listed))
    assert status == 1
    assert [record["steps"][n]["passed"] for n in ("tests", "after", "last")] == [True, True, False]


def test_paths_are_the_callers(tmp_path):
    """The script itself is found from anywhere; OUT and PYTHON are relative to where it was called."""
    shown = tmp_path / "shown"
    shown.write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    shown.chmod(0o755)
    for given, out in (("out", "out"), ("", ROOT / "benchmarks" / "results")):
        env = {**os.environ, "PYTHON": "./shown", "OUT": given}
        said = subprocess.run([SCRIPT], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert said.stdout.split() == [str(tmp_path), str(SCRIPT.with_suffix(".py")), str(out)]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", SCRIPT], check=True)
