"""The allocator that keeps its pages: counted in page faults, in a process of its own."""

import subprocess
import sys

import pytest

COUNT = """
import resource, statistics, sys, torch
from fastjac.train.memory import keep_pages
if sys.argv[1] == "kept":
    assert keep_pages()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(1 << 24)
    y = x + x
    del x, y
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(statistics.median(faults() for _ in range(40)))
"""


def faults_of_most_steps(how):
    """Where the heap starts varies, and with it how many of the first steps it grows for."""
    command = [sys.executable, "-c", COUNT, how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.check
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_pages_are_kept():
    kept, given_back = map(faults_of_most_steps, ("kept", "given back"))
    assert kept < 100
    assert kept < given_back / 10
