"""The allocator that keeps its pages: counted in page faults, in a process of its own."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from fastjac.train.memory import keep_pages
if sys.argv[1] == "kept":
    assert keep_pages()
def step():
    x = torch.ones(1 << 24)
    return x + x
for _ in range(6):  # until the heap has room for all
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    command = [sys.executable, "-c", COUNT, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.check
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_pages_are_kept():
    # Where the heap starts varies, and with it, now and then, when it has room for all.
    kept = min(faults("kept") for _ in range(3))
    given_back = faults("given back")
    assert kept < 1000
    assert kept < given_back / 10
