"""scripts/gpu_check.sh, as far as it can be tested without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
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


def python(gpu_check, name: str, code: str, limit: float = 60, results=None):
    return gpu_check.Step(name, [sys.executable, "-c", code], limit, {"SAID": "hello"}, results)


def test_every_step_is_in_the_json(gpu_check, tmp_path, capsys):
    written = tmp_path / "written.json"
    listed = [
        python(gpu_check, "build", "import os; print(os.environ['SAID'])"),
        python(
            gpu_check,
            "benchmarks",
            f"open({str(written)!r}, 'w').write('[1, 2]')",
            results=gpu_check.json_of(written),
        ),
    ]
    assert gpu_check.check(listed, {"gpu": "none"}, tmp_path) == 0
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert (record["gpu"], record["passed"]) == ("none", True)
    assert record["steps"]["benchmarks"]["results"] == [1, 2]
    assert record["steps"]["build"]["command"] == listed[0].command
    assert (tmp_path / "build.log").read_text() == "hello\n"
    assert "build       passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "limit", "status"),
    [
        ("print('why'); raise SystemExit(3)", 60, 3),
        ("import time; print('why', flush=True); time.sleep(60)", 2, "stopped after 2 s"),
        ("print('why')", 60, "FileNotFoundError"),
    ],
    ids=["status", "time", "no results"],
)
def test_a_failed_step_fails_the_check_and_keeps_its_output(
    gpu_check, tmp_path, code, limit, status
):
    absent = gpu_check.json_of(tmp_path / "absent.json")
    listed = [
        python(gpu_check, "tests", code, limit, absent),
        python(gpu_check, "after", "print('still runs')"),
    ]
    assert gpu_check.check(listed, {}, tmp_path) == 1
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    failed, after = record["steps"]["tests"], record["steps"]["after"]
    assert record["passed"] is failed["passed"] is False
    assert str(status) in str(failed["status"])
    assert failed["output"] == ["why"]
    assert after["passed"]


def test_nothing_follows_a_failed_build(gpu_check, tmp_path):
    listed = [
        python(gpu_check, "build", "raise SystemExit(1)"),
        python(gpu_check, "tests", ""),
    ]
    assert gpu_check.check(listed, {}, tmp_path) == 1
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(record["steps"]) == ["build"]
    assert not record["passed"]


def test_a_run_that_skips_every_test_is_a_failure(gpu_check, tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text('<testsuites><testsuite tests="2" skipped="2"/></testsuites>')
    with pytest.raises(RuntimeError, match="no test ran"):
        gpu_check.tests_of(report)()
    report.write_text('<testsuites><testsuite tests="2" skipped="1" failures="0"/></testsuites>')
    assert gpu_check.tests_of(report)()["tests"] == 2


def test_its_steps_exist(gpu_check, tmp_path):
    listed = {step.name: step for step in gpu_check.steps(tmp_path, "9.0")}
    assert list(listed)[:5] == ["build", "info", "tests", "memcheck", "racecheck"]
    assert listed["build"].env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "--tool=racecheck" in listed["racecheck"].command
    for name in ("tests", "memcheck", "benchmarks"):
        words = [w for w in listed[name].command if not w.startswith(("--junit", "--benchmark-j"))]
        words = words[words.index(sys.executable) :]
        words += ["--collect-only", "--disable-warnings"]  # a warning may name any test
        run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        for line in run.stdout.splitlines():
            assert "::" not in line or "cuda" in line
    words = listed["step"].command
    assert words[1:4] == ["-m", "benchmarks.step", "vgg9-224"]  # none named: all of them, for hours
    assert {"plain", "compiled", "fastjac"} <= {*words}
    subprocess.run([*words, "--help"], cwd=ROOT, check=True, capture_output=True)


def test_every_step_has_its_time(gpu_check, tmp_path):
    assert sum(step.limit for step in gpu_check.steps(tmp_path, "9.0")) <= gpu_check.LIMIT < 600


def test_a_step_may_use_what_earlier_ones_left(gpu_check, tmp_path):
    listed = [
        python(gpu_check, "tests", "pass", 60),
        python(gpu_check, "after", "import time; time.sleep(2)", 1),
        python(gpu_check, "last", "import time; time.sleep(99)", -57),
    ]
    assert gpu_check.check(listed, {}, tmp_path) == 1
    record = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert [record[name]["passed"] for name in ("tests", "after", "last")] == [True, True, False]


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
