"""The public names: all there, and PyTorch imported no sooner than one of them is used."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fastjac


def python(code: str, *options: str) -> str:
    """What the code prints in a new interpreter."""
    run = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=Path(fastjac.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_they_are_the_objects_that_type_checkers_see():
    tree = ast.parse(Path(fastjac.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and node.orelse == []
                and ast.unparse(node.test) == "TYPE_CHECKING")  # fmt: skip
    declared: dict[str, object] = {}
    exec(ast.unparse(block.body), declared)
    del declared["__builtins__"]
    assert sorted(declared) == fastjac.__all__
    for name, value in declared.items():
        assert getattr(fastjac, name) is value
    assert set(fastjac.__all__) <= set(dir(fastjac))


def test_importing_and_listing_does_not_import_pytorch():
    said = python(
        "import fastjac, sys; dir(fastjac), fastjac.__all__; print('torch' in sys.modules)"
    )
    assert said == "False\n"


@pytest.mark.parametrize(
    "use",
    [
        "import fastjac; assert fastjac.losses.jacobian_match_loss is fastjac.jacobian_match_loss",
        "from fastjac import *; JacobianMatching, fuse, register_rule",
        "import fastjac.matching, fastjac; assert fastjac.matching.MatchingOutput",
        "import fastjac.ops, torch; torch.ops.fastjac.jacobian_match",
        "import torch, fastjac; fastjac.graphed; torch.ops.fastjac.norm_act_pool",
    ],
)
def test_each_way_to_import_them(use):
    assert python(f"{use}\nimport sys; print('torch' in sys.modules)") == "True\n"


def test_an_unpickled_target_needs_no_import():
    target = pickle.dumps(fastjac.AttentionWindow("layer1", window=0.3))
    assert "window=0.3" in python(f"import pickle; print(pickle.loads({target!r}))")


def test_the_version():
    assert fastjac.__version__ == version("fastjac")


@pytest.mark.parametrize("name", ["attention_windows", "_cpu", "__wrapped__"])
def test_there_are_no_other_names(name):
    with pytest.raises(AttributeError, match=f"module 'fastjac' has no attribute '{name}'"):
        getattr(fastjac, name)
