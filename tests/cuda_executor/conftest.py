"""Builds the executor and the device code it runs, once, and again when a source changes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
# Beside the interpreter's other files: one build for each environment.
BUILD = Path(os.environ.get("FASTJAC_TEST_BUILD", Path(sys.prefix) / "fastjac-native"))


def command(*words: str | Path) -> str:
    """Runs it, and fails with all that it said."""
    run = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode != 0:
        pytest.fail(f"{' '.join(map(str, words))}\n{run.stdout}", pytrace=False)
    return run.stdout


def build(folder: Path, *options: str, target: str = "tests") -> Path:
    """What CMake makes of ``target``; of several test processes, the first one waits for it."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    with FileLock(f"{folder}.lock"):
        command("cmake", "-S", ROOT, "-B", folder, *generator, *options)
        command("cmake", "--build", folder, "--target", target, "--parallel", "2")
    return folder


@pytest.fixture(scope="session")
def native_build() -> Path:
    """Where CMake has built the C++ tests and the Python module."""
    import pybind11

    return build(
        BUILD,
        "-DFASTJAC_PYTHON=ON",
        "-DPYBIND11_FINDPYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )


@pytest.fixture(scope="session")
def executor(native_build: Path) -> ModuleType:
    """The module that runs operators' device code on the CPU."""
    (path,) = native_build.glob("cuda_executor.*.so")
    spec = importlib.util.spec_from_file_location("cuda_executor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
