"""Running a part of a test file on another of the CPU's instruction sets, which an import chooses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def evaluate_on(isa: str, file: str, expression: str) -> str:
    """The last word that ``expression`` prints as, of ``file`` as module m, in a process of its own.

    Skips the test where the processor does not have the instruction set.
    """
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('t', {file!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        f"from fastjac.info import report; print(report()); print({expression})"
    )
    beside = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(filter(None, beside))
    env = {**os.environ, "FASTJAC_CPU_ISA": isa, "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    if f"yes, {isa}" not in out.stdout:
        pytest.skip(f"the CPU operators do not run on {isa} here:\n{out.stdout}")
    return out.stdout.split()[-1]
