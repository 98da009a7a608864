"""``--torchcompile``: what of the networks is compiled, and that the loss is the same."""

import json

import pytest
import torch
import torchvision
from test_auxiliary import write_images

from fastjac import FastjacError
from fastjac.models import vgg
from fastjac.train.compilation import blocks, compile_networks
from fastjac.train.objective import Network


@pytest.fixture
def compiled(monkeypatch):
    """The modules that were compiled, by a compiler that does not take a minute."""
    calls, compile_in_place = [], torch.nn.Module.compile

    def compile(module):
        calls.append(type(module).__name__)
        compile_in_place(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    return calls


def resnet(read, differentiated=()):
    return Network("student", torchvision.models.resnet18(num_classes=3), read, differentiated)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (resnet(["layer1"], ["layer1"]), ["layer2", "layer3", "layer4"]),
        (resnet(["layer1", "layer3"], ["layer1", "layer3"]), ["layer4"]),
        (resnet(["layer2"]), ["layer1", "layer2.0", "layer2.1", "layer3", "layer4"]),
        (
            resnet(["layer2", "layer3.0.conv1"], ["layer2"]),
            ["layer3.0.downsample", "layer3.1", "layer4"],
        ),
        (resnet(["layer1", "fc"], ["layer1"]), ["layer2", "layer3", "layer4"]),
        (resnet(["fc"], ["fc"]), []),
    ],
)
def test_blocks(network, names):
    buffers = {name: value.clone() for name, value in network.model.named_buffers()}
    assert list(blocks(network, torch.rand(2, 3, 32, 32))) == names
    assert network.model.training
    assert all(torch.equal(value, buffers[name]) for name, value in network.model.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.model.modules())


def test_a_block_that_also_runs_before_the_layer():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.ReLU())
            self.layer, self.last = torch.nn.Identity(), torch.nn.Sequential(torch.nn.Flatten())

        def forward(self, x):
            return self.last(self.block(self.layer(self.block(x))))

    network = Network("student", Twice(), ["layer"], ["layer"])
    assert list(blocks(network, torch.rand(2, 3, 8, 8))) == ["last"]


def test_nothing_to_compile():
    networks = [Network(r, vgg.vgg4(3), ["pool1"], ["pool1"]) for r in ("student", "teacher")]
    with pytest.raises(FastjacError, match="no network has a block of several layers behind those"):
        compile_networks(networks, torch.rand(2, 3, 32, 32))


def test_nothing_to_compile_is_found_before_anything_is_written(trainer, small, teacher, tmp_path):
    words = ["student", *small, "--teacher", teacher, "--attention", 1, "--torchcompile"]
    status, _, err = trainer(*words, "--experiment", "s")
    assert status == 2
    assert (
        "no network has a block of several layers beside those that terms of the loss read" in err
    )
    assert not (tmp_path / "runs" / "s").exists()


@pytest.mark.parametrize(
    ("flags", "modules"),
    [
        (["--jacobians", 1, "--target", "attention-window", "--layer", "layer1"], 6),
        (["--jacobian-norm", 0.1, "--target", "attention-window", "--layer", "layer3"], 1),
        (["--kd", 1], 2),
    ],
)
def test_the_loss_stays(trainer, compiled, tmp_path, flags, modules):
    write_images(tmp_path)
    words = ["--dataset", "folder", "--data-dir", tmp_path / "images", "--img-size", 48]
    words += ["--model", "torchvision/resnet18", "--batch-size", 4, "--threads", 1, "--epochs", 1]
    assert trainer("teacher", *words, "--experiment", "t")[0] == 0
    if "--jacobian-norm" not in flags:
        flags = [*flags, "--teacher", tmp_path / "runs" / "t", "--teacher-cache", "off"]
    losses = []
    for more in ([], ["--torchcompile"]):
        run = [*words, *flags, *more, "--experiment", f"s{len(more)}"]
        assert trainer("student", *run)[0] == 0
        text = (tmp_path / "runs" / f"s{len(more)}" / "metrics.jsonl").read_text()
        losses.append({k: v for k, v in json.loads(text).items() if k.startswith("train_")})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(compiled) == modules
