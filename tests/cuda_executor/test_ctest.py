"""What CMake builds without PyTorch and without Python: the kernels' C++ tests."""

from __future__ import annotations

import re

from .conftest import BUILD, build, command


def passed(folder) -> int:
    said = command("ctest", "--test-dir", folder, "--output-on-failure")
    (count,) = re.findall(r"100% tests passed.* out of (\d+)", said)
    return int(count)


def test_ctest_passes(native_build):
    assert passed(native_build) >= 5


def test_ctest_passes_with_address_sanitizer():
    assert passed(build(BUILD.with_name(f"{BUILD.name}-asan"), "-DFASTJAC_ASAN=ON")) >= 6
