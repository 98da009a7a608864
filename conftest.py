"""What tests and benchmarks share: the marker of those that need a GPU, and the devices."""

from __future__ import annotations

import pytest
import torch

from fastjac.ops import _library


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """A device whose native operators are loaded, so that nothing is compared with itself."""
    library = {"cpu": _library.CPU, "cuda": _library.CUDA}[request.param]
    if not library.loaded:
        pytest.skip(f"the {library.name} operators are not loaded: {library.problem}")
    return request.param
