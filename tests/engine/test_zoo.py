"""A sample of ``python -m tests.zoo``: small models of families that differ in what they call."""

from __future__ import annotations

import pytest
import torch

import fastjac
from tests import zoo

pytest.importorskip("timm", reason="its models are compared")
pytest.importorskip("torchvision", reason="its models are compared")

SAMPLE = [
    "timm/test_vit",
    "timm/test_vit_relpos",
    "timm/test_byobnet",
    "timm/test_convnext",
    "timm/test_efficientnet_evos",
    "timm/test_mambaout",
    "timm/test_maxvit",
    "timm/test_nfnet",
    "timm/csatv2",
    "timm/gmlp_ti16_224",
    "timm/hiera_tiny_224",
    "timm/mobilenetv4_conv_small_035",
    "timm/mobilevit_xxs",
    "timm/mvitv2_tiny",
    "timm/xcit_nano_12_p8_224",
    "torchvision/googlenet",  # its output is a tuple with two auxiliary heads
    "torchvision/mobilenet_v3_small",  # hard-sigmoid, hard-swish, dropout
    "torchvision/shufflenet_v2_x0_5",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_is_the_double_backwards(name):
    result = zoo.examine(name)
    assert result.verdict == "exact", result


def altered(monkeypatch, change):
    """Put ``change(result)`` in the place of what the engine returns."""
    exact = fastjac.with_jacobian

    def with_jacobian(*args, strategy, **kwargs):
        out = exact(*args, strategy="autograd", **kwargs)
        return change(out) if strategy == "auto" else out

    monkeypatch.setattr(fastjac, "with_jacobian", with_jacobian)
    return zoo.examine("timm/test_vit")


@pytest.mark.parametrize("factor", [1e-7, float("nan")])
def test_a_wrong_gradient_is_inexact(monkeypatch, factor):
    """J's value is right, and its gradient is not."""

    def change(out):
        j = out.jacobian
        out.jacobian = j + factor * torch.randn_like(j) * (j - j.detach())
        return out

    assert altered(monkeypatch, change).verdict == "inexact"


def test_a_missing_gradient_is_a_raw_error(monkeypatch):
    def change(out):
        out.jacobian = out.jacobian.detach()
        return out

    result = altered(monkeypatch, change)
    assert (result.verdict, result.detail[:12]) == ("raw error", "RuntimeError")


def test_a_refusal_is_a_clear_error(monkeypatch):
    def change(out):
        raise fastjac.FastjacError("gelu: no rule")

    result = altered(monkeypatch, change)
    assert (result.verdict, result.detail) == ("clear error", "gelu: no rule")


def test_a_models_own_failure_is_its_own_verdict(monkeypatch):
    def make_model(name, size):
        return torch.nn.Linear(7, 2), False

    monkeypatch.setattr(zoo, "make_model", make_model)
    result = zoo.examine("timm/test_vit")
    assert result.verdict == "reference fails"
    assert "the forward fails at 224 pixels: RuntimeError" in result.detail


def test_batch_norms_get_more_than_two_values(monkeypatch):
    """Here one pixel of each image at 64, and four at 128."""
    model = torch.nn.Sequential(
        torch.nn.AvgPool2d(64),
        torch.nn.BatchNorm2d(3),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
    monkeypatch.setattr(zoo, "BATCH", 2)
    monkeypatch.setattr(zoo, "make_model", lambda name, size: (model, False))
    assert zoo.Trial.of("timm/test_vit").x.shape == (2, 3, 128, 128)
