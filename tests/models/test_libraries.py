"""Networks of torchvision and timm: raw pixels in, names and weights as in their library."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastjac import FastjacError
from fastjac.models import (
    ModelSpec,
    check_image_size,
    create_model,
    feature_levels,
    load_weights,
    normalized,
    vgg9,
)

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(params=["torchvision", "timm"])
def pair(request):
    """A ResNet-18 of a library, and ours of the same name with its weights."""
    make = torchvision.models.get_model if request.param == "torchvision" else timm.create_model
    theirs = make("resnet18", num_classes=5)
    ours = create_model(ModelSpec(f"{request.param}/resnet18", 5, mean=MEAN, std=STD))
    load_weights(ours, theirs.state_dict(), "theirs")
    return ours.eval(), theirs.eval()


def test_is_the_librarys_on_normalised_pixels(pair):
    ours, theirs = pair
    x = torch.rand(2, 3, 40, 40)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(ours(x), theirs((x - mean) / std), rtol=0, atol=0)
    names = dict(theirs.named_modules()).keys()
    assert names | {"normalize"} == dict(ours.named_modules()).keys()
    assert set(ours.state_dict()) - set(theirs.state_dict()) == {"normalize.mean", "normalize.std"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_traces(pair, copied):
    ours, _ = pair
    x = torch.rand(2, 3, 40, 40)
    twin = copied(ours)
    assert twin.conv1.weight is not ours.conv1.weight
    torch.testing.assert_close(twin(x), ours(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.fx.symbolic_trace(twin)(x), ours(x), rtol=0, atol=0)


def test_normalisation_moves_with_the_model(pair):
    ours, _ = pair
    assert ours.double().normalize.mean.dtype == torch.float64


def test_levels():
    assert feature_levels(vgg9(10, width=0.05)) == ["pool2", "pool3", "pool4", "pool5"]
    resnet = create_model(ModelSpec("torchvision/resnet18", 5))
    assert feature_levels(resnet) == ["layer1", "layer2", "layer3", "layer4"]
    vgg = create_model(ModelSpec("torchvision/vgg11", 5))
    pools = [n for n, m in vgg.named_modules() if isinstance(m, nn.MaxPool2d)]
    assert feature_levels(vgg) == pools[1:]
    mobile = create_model(ModelSpec("timm/mobilenetv3_small_050", 5))
    assert feature_levels(mobile) == ["blocks.0", "blocks.1", "blocks.3", "blocks.5"]
    with pytest.raises(FastjacError, match="levels of Sequential are not known; name a layer"):
        feature_levels(nn.Sequential(nn.Flatten()))


def test_levels_agree_in_size():
    sizes = []
    for model in (vgg9(10, width=0.05), create_model(ModelSpec("timm/resnet18", 5))):
        shapes = []
        for name in feature_levels(model):
            model.get_submodule(name).register_forward_hook(
                lambda m, i, out, shapes=shapes: shapes.append(out.shape[2:])
            )
        model.eval()(torch.rand(1, 3, 64, 64))
        sizes.append(shapes)
    assert sizes[0] == sizes[1] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_pretrained_weights_get_a_head_of_the_right_size(monkeypatch):
    """The download is replaced by a network with known weights, the rest is as it is."""
    donor = torchvision.models.resnet18()
    monkeypatch.setattr(
        torchvision.models.ResNet18_Weights, "get_state_dict", lambda *a, **k: donor.state_dict()
    )
    model = create_model(ModelSpec("torchvision/resnet18", 5), pretrained=True)
    assert torch.equal(model.layer2[0].conv1.weight, donor.layer2[0].conv1.weight)
    assert model.fc.out_features == 5
    torch.testing.assert_close(model.normalize.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    whole = create_model(ModelSpec("torchvision/resnet18"), pretrained=True)
    assert torch.equal(whole.fc.weight, donor.fc.weight)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec("torchvision/resnet19", 5), "nearest: 'torchvision/resnet18'"),
        (ModelSpec("timm/resnett18", 5), "nearest: 'timm/resnet18'"),
        (ModelSpec("torch/resnet18", 5), "nearest: .*'torchvision/resnet18'"),
        (ModelSpec("torchvision/resnet18", 5, in_channels=1), "takes 3 channels"),
        (ModelSpec("timm/resnet18", 5, width=2), "plan and width are for"),
    ],
)
def test_bad_spec(spec, message):
    with pytest.raises(FastjacError, match=message):
        create_model(spec)


def test_image_size():
    vgg = create_model(ModelSpec("torchvision/vgg11", 5))
    with pytest.raises(FastjacError, match=r"cannot take 3 x 8 x 8 images: .*too small"):
        check_image_size(vgg, 3, 8)
    assert vgg.training
    vit = create_model(ModelSpec("timm/vit_tiny_patch16_224", 5))
    with pytest.raises(FastjacError, match=r"cannot take 3 x 32 x 32 images: .*224"):
        check_image_size(vit, 3, 32)
    net = nn.Sequential(nn.Conv2d(3, 2, 1))
    with pytest.raises(FastjacError, match="does not return logits"):
        check_image_size(net, 3, 8)


def test_a_name_that_is_taken():
    net = nn.Sequential()
    net.normalize = nn.Identity()
    with pytest.raises(FastjacError, match="'normalize' already"):
        normalized(net, MEAN, STD)


def test_imports_neither_library_unless_asked():
    code = (
        "import sys, fastjac.models as m; m.vgg4(10); "
        "assert not {'torchvision', 'timm', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
