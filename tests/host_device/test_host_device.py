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

from ..cuda_executor.conftest import BUILD, build

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def built() -> Path:
    torch_folder = Path(torch.__file__).parent
    build(BUILD, f"-DFASTJAC_TORCH={torch_folder}", target="host_device")
    return BUILD / "tests" / "host_device"


@pytest.mark.parametrize("file", sorted(HERE.glob("on_*.py")), ids=lambda file: file.stem)
def test_passes_there(built: Path, file: Path):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=os.environ | {"FASTJAC_HOST_DEVICE": str(built)},
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode != 0:
        pytest.fail(run.stdout, pytrace=False)
