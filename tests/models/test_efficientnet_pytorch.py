"""Weights by the names of EfficientNet-PyTorch in timm's networks: each tensor at its layer."""

import doctest

import pytest
import timm
import torch

from fastjac import FastjacError
from fastjac.models import ModelSpec, create_model, efficientnet_pytorch, load_weights
from fastjac.models.efficientnet_pytorch import as_timm, is_efficientnet_pytorch


def foreign_names(model):
    """The names of EfficientNet-PyTorch for the modules of timm's network, in the order they run."""
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head"}
    top |= {"bn2": "_bn1", "classifier": "_fc"}
    names = dict(top)
    number = 0
    for s, stage in enumerate(model.blocks):
        for b, block in enumerate(stage):
            layers = [n for n, m in block.named_children() if n.startswith(("conv", "bn"))]
            layers = [n for n in layers if any(True for _ in getattr(block, n).parameters())]
            convs = [n for n in layers if n.startswith("conv")]
            norms = [n for n in layers if n.startswith("bn")]
            kinds = ["_expand_conv", "_depthwise_conv", "_project_conv"][-len(convs) :]
            numbers = ["_bn0", "_bn1", "_bn2"][-len(norms) :]
            for name, kind in [*zip(convs, kinds, strict=True), *zip(norms, numbers, strict=True)]:
                names[f"blocks.{s}.{b}.{name}"] = f"_blocks.{number}.{kind}"
            if hasattr(block, "se") and hasattr(block.se, "conv_reduce"):
                names[f"blocks.{s}.{b}.se.conv_reduce"] = f"_blocks.{number}._se_reduce"
                names[f"blocks.{s}.{b}.se.conv_expand"] = f"_blocks.{number}._se_expand"
            number += 1
    return names


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "efficientnet_b0"])
def test_every_tensor_finds_its_layer(name):
    model = timm.create_model(name)
    names = foreign_names(model)
    weights = {}
    for key, value in model.state_dict().items():
        module, _, tensor = key.rpartition(".")
        weights[f"{names[module]}.{tensor}"] = torch.rand_like(value.float()).to(value.dtype)
    assert is_efficientnet_pytorch(weights)
    assert not is_efficientnet_pytorch(model.state_dict())
    renamed = as_timm(weights, model.state_dict())
    assert renamed.keys() == model.state_dict().keys()
    wrapped = create_model(ModelSpec(f"timm/{name}"))
    load_weights(wrapped, weights, "weights.pth")
    loaded = wrapped.state_dict()
    for module, other in names.items():
        assert torch.equal(loaded[f"{module}.weight"], weights[f"{other}.weight"])


def test_another_depth_is_refused():
    weights = {f"_blocks.{n}._project_conv.weight": torch.zeros(1) for n in range(40)}
    weights["_conv_stem.weight"] = torch.zeros(32, 3, 3, 3)
    with pytest.raises(FastjacError, match=r"weights\.pth"):
        load_weights(create_model(ModelSpec("timm/tf_efficientnet_lite0")), weights, "weights.pth")


def test_docstring():
    assert doctest.testmod(efficientnet_pytorch).failed == 0
