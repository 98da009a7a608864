"""Weights from files: the right ones go in, any other is refused by name."""

import pytest
import torch
from safetensors.torch import save_file

from fastjac import FastjacError
from fastjac.models import VGG, load_weights, read_weights


@pytest.fixture
def donor():
    return VGG("4 M", 3, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_pth(tmp_path, donor, wrap):
    torch.save(wrap(donor.state_dict()), tmp_path / "w.pth")
    check(donor, tmp_path / "w.pth")


def test_safetensors(tmp_path, donor):
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    check(donor, tmp_path / "w.safetensors")


def check(donor, path):
    model = VGG("4 M", 3)
    load_weights(model, read_weights(path), path)
    for name, value in donor.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_normalisation_may_be_absent(donor):
    weights = {k: v for k, v in donor.state_dict().items() if not k.startswith("normalize")}
    model = VGG("4 M", 3, mean=[0.5] * 3, std=[0.5] * 3)
    load_weights(model, weights, "file")
    assert torch.equal(model.conv1.weight, donor.conv1.weight)
    assert model.normalize.mean.flatten().tolist() == [0.5] * 3


def test_another_model_is_refused_and_nothing_is_copied(donor):
    other = VGG("4 M 4", 5)
    before = other.fc.weight.clone()
    with pytest.raises(FastjacError) as caught:
        load_weights(other, donor.state_dict(), "w.pth")
    assert str(caught.value) == (
        "w.pth holds another model than this VGG: fc.weight is [3, 4], expected [5, 4]; "
        "fc.bias is [3], expected [5]; no conv2.weight and 5 more"
    )
    assert torch.equal(other.fc.weight, before)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_unreadable(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    with pytest.raises(FastjacError, match=rf"w\.{suffix}: no such file"):
        read_weights(path)
    path.write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00{}junk and more")
    with pytest.raises(FastjacError, match=rf"w\.{suffix} is not a "):
        read_weights(path)


def test_truncated(tmp_path, donor):
    path = tmp_path / "w.pth"
    torch.save(donor.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FastjacError, match=r"w\.pth is not a readable PyTorch file"):
        read_weights(path)


def test_not_a_state_dict(tmp_path):
    for content in ([1, 2], {"a": 1}, {}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(FastjacError, match="expected a state dict"):
            read_weights(tmp_path / "w.pth")


def test_a_file_that_would_run_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"a": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(FastjacError, match="plain tensors"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
