"""How many kernels a step launches on a GPU: the ceilings that hold a step of a small batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import fastjac
from benchmarks.launches import launches
from benchmarks.step import CONFIGURATIONS, contender


def of_step(name: str, way: str) -> int:
    """Of a step on small images: its operations are those of large ones."""
    config = dataclasses.replace(CONFIGURATIONS[name], size=64, batch=2, width=1 / 32)
    taken = contender(way, config, "contiguous", "cpu", amp=False)
    taken.step()
    return launches(taken.step).total()


@pytest.mark.parametrize(("name", "most"), [("vgg9-224", 300), ("resnet18-224", 700)])
def test_a_step_launches_few_kernels(name, most):
    plain, naive, ours = (of_step(name, c) for c in ("plain", "naive", "fastjac"))
    assert plain < ours <= most
    assert ours < naive


def test_a_fused_plain_step_launches_about_as_many_as_a_plain_one():
    assert of_step("vgg9-224-logits", "fused") <= 1.2 * of_step("vgg9-224-logits", "plain")


def test_a_fused_batch_norm_and_relu_launches_fewer_than_pytorch():
    def step(model: nn.Module) -> None:
        with torch.no_grad():
            model(u)

    u = torch.rand(2, 4, 6, 6)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    step(fastjac.fuse(model))  # a process makes its placeholders' NaN once
    fused = launches(lambda: step(fastjac.fuse(model)))
    assert fused == {"add_": 1, "batch_norm_statistics": 2, "norm_act_pool": 1}
    assert fused.total() <= launches(lambda: step(model)).total()
