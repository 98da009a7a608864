"""Whole networks of torchvision and timm: the engine against the double backward, float64."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_exact
from torch import nn

from fastjac import AttentionWindow, LabelLogit


class Hardsigmoid(nn.Module):
    """PyTorch's has no double backward; this is the same function, and the oracle can take it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu6(x + 3) / 6


def double_differentiable(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        if type(child).__name__.lower() == "hardsigmoid":
            setattr(model, name, Hardsigmoid())
        else:
            double_differentiable(child)
    return model


# Name, a layer with a feature map, image size.
TORCHVISION = [
    ("resnet18", "layer1", 48),
    ("mobilenet_v2", "features.2", 48),
    ("mobilenet_v3_small", "features.1", 48),
    ("efficientnet_b0", "features.2", 32),
    ("densenet121", "features.denseblock1", 64),
    ("convnext_tiny", "features.1", 32),
    ("squeezenet1_1", "features.4", 48),
    ("shufflenet_v2_x0_5", "maxpool", 48),
    ("googlenet", "inception3a", 48),
    ("regnet_y_400mf", "trunk_output.block1", 48),
]
TIMM = [
    ("resnet18", "layer2", 48),
    ("mobilenetv3_small_050", "blocks.1", 48),
    ("efficientnet_b0", "blocks.1", 32),
    ("convnext_atto", "stages.1", 32),
]


def check(make, layer, size):
    pair = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        pair.append(double_differentiable(make()))
    torch.manual_seed(2)
    x, y = torch.rand(3, 3, size, size), torch.tensor([0, 3, 1])
    # EfficientNet's own double backward moves by 7e-9 where x moves by a rounding.
    tolerance = 1e-8 if "EfficientNet" in type(pair[0]).__name__ else 1e-9
    assert_exact(*pair, x, y, AttentionWindow(layer, window=0.3), tolerance=tolerance)
    assert_exact(*pair, x, y, LabelLogit(), batch_stats="batch", tolerance=tolerance)


@pytest.mark.parametrize(("name", "layer", "size"), TORCHVISION, ids=[n for n, *_ in TORCHVISION])
def test_torchvision(name, layer, size):
    models = pytest.importorskip("torchvision.models")
    quiet = {"googlenet": {"aux_logits": False, "init_weights": False}}.get(name, {})
    check(lambda: models.get_model(name, num_classes=5, **quiet), layer, size)


@pytest.mark.parametrize(("name", "layer", "size"), TIMM, ids=[n for n, *_ in TIMM])
def test_timm(name, layer, size):
    timm = pytest.importorskip("timm")
    check(lambda: timm.create_model(name, num_classes=5), layer, size)


def test_timm_vgg():
    """Its head chooses its operations by the map's size."""
    vgg = pytest.importorskip("timm.models.vgg")
    plan = [8, "M", 12, 12, "M"]
    check(
        lambda: vgg.VGG(plan, num_classes=5, mlp_ratio=1 / 128, norm_layer=nn.BatchNorm2d),
        "features.3",
        32,
    )
