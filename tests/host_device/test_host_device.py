"""Builds a device without hardware, and runs each ``on_*.py`` beside this file on it.

Each in a process of its own: a device type is registered for good, and is then PyTorch's accelerator.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastjac.ops import _library

from ..cuda_executor.conftest import BUILD, build

pytestmark = pytest.mark.check

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def built() -> Path:
    torch_folder = Path(torch.__file__).parent
    build(BUILD, f"-DFASTJAC_TORCH={torch_folder}", target="host_operators")
    return BUILD / "tests" / "host_device"


RUNS = [(file, True) for file in sorted(HERE.glob("on_*.py"))] + [(HERE / "on_engine.py", False)]


@pytest.mark.parametrize(
    ("file", "native"), RUNS, ids=[f"{f.stem}-{'native' if n else 'references'}" for f, n in RUNS]
)
def test_passes_there(built: Path, file: Path, native: bool):
    if native and not _library.CPU.loaded:
        pytest.skip(f"the operators' schemas are not loaded: {_library.CPU.problem}")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=os.environ | {"FASTJAC_HOST_DEVICE": str(built), "FASTJAC_NATIVE": str(int(native))},
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode != 0:
        pytest.fail(run.stdout, pytrace=False)
