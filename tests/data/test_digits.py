"""The digits: all of them, once, in [0, 1], always in the same two parts."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fastjac import FastjacError
from fastjac.data import evaluation_transform, load_data


def test_every_digit_is_in_one_part_once():
    data = load_data("digits", size=8)
    (x, y), (xt, yt) = data.train.tensors, data.test.tensors
    assert (len(x), len(xt)) == (1297, 500)
    ours = torch.cat([x, xt]).flatten(1).mul(16).round().byte().numpy()
    theirs = load_digits()
    assert {*map(bytes, ours)} == {*map(bytes, theirs.data.astype(np.uint8))}
    assert torch.cat([y, yt]).bincount().tolist() == np.bincount(theirs.target).tolist()
    assert data.labels == y.tolist()
    share = yt.bincount() / torch.cat([y, yt]).bincount()
    assert (share - 500 / 1797).abs().max() < 0.01


def test_scale_and_split():
    data, again = load_data("digits"), load_data("digits")
    x = data.train.tensors[0]
    assert x.shape == (1297, 1, 16, 16)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (0, 1)
    assert torch.equal(x, again.train.tensors[0])
    assert data.mean == pytest.approx([x.mean().item()])
    assert data.std == pytest.approx([x.std().item()])
    assert data.classes == list("0123456789")
    assert (data.channels, data.size) == (1, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_as_the_test_images_are(channels):
    test = load_data("digits", size=8, channels=channels).test[0][0]
    pixels = test[0].mul(255).round().byte().numpy()
    made = evaluation_transform("digits", 8, channels)(Image.fromarray(pixels).convert("RGB"))
    torch.testing.assert_close(made, test, rtol=0, atol=0.51 / 255)


def test_labels_go_with_their_images():
    """A nearest-mean classifier is right on nine in ten, if the labels are the images' own."""
    data = load_data("digits")
    (x, y), (xt, yt) = data.train.tensors, data.test.tensors
    means = torch.stack([x[y == k].mean(0) for k in range(10)]).flatten(1)
    assert (torch.cdist(xt.flatten(1), means).argmin(1) == yt).float().mean() > 0.85


def test_bad_input():
    with pytest.raises(FastjacError, match=r"unknown dataset 'cifar10'.*nearest: 'cifar100'"):
        load_data("cifar10")
    with pytest.raises(FastjacError, match="no augmentation"):
        load_data("digits", augment=True)
    with pytest.raises(FastjacError, match="only cifar100 and fashion-mnist can"):
        load_data("mit67", "x", download=True)
    with pytest.raises(FastjacError, match="--data-dir"):
        load_data("cifar100")
