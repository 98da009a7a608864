"""What CMake builds without PyTorch and without Python: the kernels' C++ tests."""

from __future__ import annotations

import re

import pytest

from .conftest import BUILD, build, command

pytestmark = pytest.mark.check

# The CPU's on three instruction sets, the executor's, and four operators' device code.
TESTS = 8


def passed(folder) -> int:
    said = command("ctest", "--test-dir", folder, "--output-on-failure")
    (count,) = re.findall(r"100% tests passed.* out of (\d+)", said)
    return int(count)


def test_ctest_passes(native_build):
    assert passed(native_build) == TESTS


def test_ctest_passes_with_address_sanitizer():
    # One more sees that it is there.
    assert passed(build(BUILD.with_name(f"{BUILD.name}-asan"), "-DFASTJAC_ASAN=ON")) == TESTS + 1
