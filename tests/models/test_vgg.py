"""The paper's networks, layer by layer."""

import pytest
import torch
from torch import nn

from fastjac import FastjacError
from fastjac.models import VGG, ModelSpec, check_image_size, create_model, vgg4, vgg9

PLANS = {
    vgg4: [64, "M", 128, "M", 512, "M"],
    vgg9: [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
}


def layers(plan, channels=3, width=1.0):
    """The modules that a plan stands for, written out by hand."""
    for step in plan:
        if step == "M":
            yield nn.MaxPool2d, 2, 2
            continue
        out = max(1, round(step * width))
        yield nn.Conv2d, channels, out
        yield nn.BatchNorm2d, out, out
        yield nn.ReLU, None, None
        channels = out
    yield nn.AdaptiveAvgPool2d, 1, 1
    yield nn.Flatten, None, None
    yield nn.Linear, channels, 7


@pytest.mark.parametrize("build", [vgg4, vgg9])
@pytest.mark.parametrize("width", [1.0, 0.25, 0.001])
def test_layers_follow_the_plan(build, width):
    model = build(7, width=width)
    modules = list(model.children())[1:]
    expected = list(layers(PLANS[build], width=width))
    assert len(modules) == len(expected)
    for module, (kind, a, b) in zip(modules, expected, strict=True):
        assert type(module) is kind
        if kind is nn.Conv2d:
            assert (module.in_channels, module.out_channels) == (a, b)
            assert (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        elif kind is nn.MaxPool2d:
            assert (module.kernel_size, module.stride) == (a, b)
        elif kind is nn.BatchNorm2d:
            assert module.num_features == a
        elif kind is nn.Linear:
            assert (module.in_features, module.out_features) == (a, b)


def test_output_is_that_of_the_modules_on_the_normalised_image():
    model = VGG("4 M 8", 5, in_channels=1, mean=[0.3], std=[0.2]).eval()
    x = torch.rand(3, 1, 6, 6)
    h = model.relu1(model.norm1(model.conv1((x - 0.3) / 0.2)))
    h = model.relu2(model.norm2(model.conv2(model.pool1(h))))
    torch.testing.assert_close(model(x), model.fc(h.mean((2, 3))))


@pytest.mark.parametrize("size", [32, 37])
def test_takes_its_smallest_image_and_odd_ones(size):
    model = vgg9(10, width=0.05)
    check_image_size(model, 3, size)
    assert model(torch.rand(2, 3, size, size)).shape == (2, 10)


def test_traces():
    model = vgg9(10, width=0.05).eval()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VGG("64 N 3", 10), "got 'N'"),
        (lambda: VGG("64 0", 10), "got '0'"),
        (lambda: VGG("M M", 10), "no convolution"),
        (lambda: vgg4(0), "num_classes: expected at least 1, got 0"),
        (lambda: vgg4(10, width=0), "width: expected a factor above 0, got 0"),
        (lambda: vgg4(10, 3, mean=[0.5], std=[0.5]), "mean: expected 3 numbers, got 1"),
        (lambda: vgg4(10, 1, mean=[0.5], std=[0.0]), "std above 0"),
        (lambda: check_image_size(vgg9(10, width=0.05), 3, 31), "at least 32 x 32"),
        (lambda: check_image_size(vgg9(10, width=0.05), 1, 32), "takes 3 channels"),
        (lambda: create_model(ModelSpec("vgg", 10)), "a plan such as"),
        (lambda: create_model(ModelSpec("vgg4", 10, plan="64 M")), "goes with the model 'vgg'"),
        (lambda: create_model(ModelSpec("vgg4")), "num_classes is missing"),
        (lambda: create_model(ModelSpec("vgg4", 10), pretrained=True), "no pretrained weights"),
        (lambda: create_model(ModelSpec("vgg7", 10)), "nearest: .*'vgg9'"),
        (lambda: create_model(ModelSpec("resnet18", 10)), "nearest: .*'torchvision/resnet18'"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(FastjacError, match=message):
        make()
